"""Ready-made tables: a list of cells or a text for every stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from msllm.data.converters.layout import Layout, each_record
from msllm.data.sources import BadRecord, Record
from msllm.data.tables import Placement, Table

OPTIONS: dict[str, Any] = {}


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"streams": {name: [one item per row], name: "text", ...}}.

    An item is a token id, a string of exactly one token, "" (silence) or null (absent). A text is
    tokenized from row 0 on and silent after its end. Streams that are left out are silent.
    """
    where, streams = record.where, _streams_of(record)
    placements, absent = [], []
    for name, content in streams.items():
        if name not in layout.spec.names:
            raise BadRecord(
                f"{where}: unknown stream {name!r}: config.streams.names is {layout.spec.names}"
            )
        if isinstance(content, str):
            placements.append(layout.say(name, 0, content))
        elif isinstance(content, list):
            stream = layout.spec.index(name)
            cells = [
                _cell(layout, item, f"{where}, {name}, row {row}")
                for row, item in enumerate(content)
            ]
            absent += [(row, stream) for row, token in enumerate(cells) if token is None]
            placements.append(Placement(stream, 0, [token or 0 for token in cells]))
        else:
            raise BadRecord(
                f"{where}: stream {name!r} is {content!r}: must be a list of cells or a text"
            )
    table = layout.table(placements, json.dumps(streams, sort_keys=True), closed=False)
    _check_lengths(layout, streams, placements, where)
    for place in absent:
        table.present[place] = False
    yield table


def _streams_of(record: Record) -> dict[str, Any]:
    streams = record.get("streams")
    if not isinstance(streams, dict) or set(record.value) != {"streams"}:
        keys = sorted(record.value) if isinstance(record.value, dict) else "none"
        raise BadRecord(
            f'{record.where}: keys are {keys}: must be {{"streams": {{name: list or text}}}}'
        )
    return streams


def _check_lengths(
    layout: Layout, streams: dict[str, Any], placements: list[Placement], where: str
) -> None:
    """Raises BadRecord unless every list of cells is as long as the table."""
    lengths = {layout.spec.names[p.stream]: p.end for p in placements}
    rows = max(lengths.values(), default=0)
    if any(isinstance(streams[name], list) and n < rows for name, n in lengths.items()):
        raise BadRecord(
            f"{where}: lengths in rows are {lengths}: lists must be equally long; pad them with"
            ' "" or null'
        )


def _cell(layout: Layout, item: Any, where: str) -> int | None:
    """Returns the token of an item, or None if it is absent. Raises BadRecord."""
    if item is None:
        return None
    if item == "":
        return layout.tokenizer.silence_id
    if isinstance(item, str):
        return layout.one_token(item, where)
    size = layout.tokenizer.vocab_size
    if type(item) is not int or not 0 <= item < size:
        raise BadRecord(
            f"{where}: {item!r} is no cell: must be a token id below {size}, a string or null"
        )
    return item
