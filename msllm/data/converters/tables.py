"""Ready-made tables: a list of cells or a text for every stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from msllm.data.converters.layout import Layout, check_weight, each_record
from msllm.data.sources import BadRecord, Record
from msllm.data.tables import Placement, Table

OPTIONS: dict[str, Any] = {}


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"streams": {name: [one item per row], name: "text", ...}}.

    An item is a token id, a string of exactly one token, "" (silence) or null (absent). A text is
    tokenized from row 0 on and silent after its end. Streams that are left out are silent.

    The record may have the loss weights of cells: {"weights": {name: [one number per row], ...}}.
    Streams that are left out have the weight 1 everywhere.
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
    weights = record.get("weights")
    key = json.dumps(streams, sort_keys=True)
    if weights is not None:
        key += json.dumps(weights, sort_keys=True)
    table = layout.table(placements, key, closed=False)
    _check_lengths(layout, streams, placements, where)
    for place in absent:
        table.present[place] = False
    if weights is not None:
        table = table._replace(weights=_weights_of(layout, weights, len(table.tokens), where))
    yield table


def _weights_of(layout: Layout, weights: Any, rows: int, where: str) -> np.ndarray:
    """Returns the loss weights of the cells, [rows, S] float32. Raises BadRecord."""
    array = np.ones((rows, layout.spec.size), np.float32)
    if not isinstance(weights, dict):
        raise BadRecord(f"{where}: 'weights' is {weights!r:.40}: must be {{name: [one per row]}}")
    for name, column in weights.items():
        if name not in layout.spec.names:
            raise BadRecord(
                f"{where}: weights of the unknown stream {name!r}: config.streams.names is"
                f" {layout.spec.names}"
            )
        if not isinstance(column, list) or len(column) != rows:
            raise BadRecord(f"{where}: the weights of {name!r} must be a list of {rows} numbers")
        for row, weight in enumerate(column):
            check_weight(weight, f"{where}: the weight of {name}, row {row}")
        array[:, layout.spec.index(name)] = column
    return array


def _streams_of(record: Record) -> dict[str, Any]:
    streams = record.get("streams")
    if not isinstance(streams, dict) or not (
        {"streams"} <= set(record.value) <= {"streams", "weights"}
    ):
        keys = sorted(record.value) if isinstance(record.value, dict) else "none"
        raise BadRecord(
            f'{record.where}: keys are {keys}: must be {{"streams": {{name: list or text}}}},'
            ' and may have "weights"'
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
