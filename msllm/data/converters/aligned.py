"""Data that is already aligned in rows, such as the voices of a score."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from msllm.data.converters.layout import Layout, check_keys, each_record
from msllm.data.sources import BadRecord, Record
from msllm.data.tables import Placement, Table

OPTIONS = {"key": "rows", "silence": [-1], "ignored_keys": []}


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"rows": [[an item per stream], ...]}.

    An item is a number or a word, and must be one token as it is written. "" and the items in the
    option `silence` are silence; null is absent. The option `key` is the key of the rows.
    """
    rows = _rows_of(layout, record)
    check_keys(layout, record.value, {layout.options["key"]}, record.where)
    ids = dict.fromkeys(["", *layout.options["silence"]], layout.tokenizer.silence_id)
    placements = []
    for stream, (name, column) in enumerate(zip(layout.spec.names, zip(*rows))):
        tokens = [
            _token(layout, item, ids, f"{record.where}, {name}, row {row}")
            for row, item in enumerate(column)
        ]
        placements.append(Placement(stream, 0, tokens))
    table = layout.table(placements, json.dumps(rows), closed=False)
    for number, row in enumerate(rows):
        table.present[number] = [item is not None for item in row]
    yield table


def _rows_of(layout: Layout, record: Record) -> list[list[Any]]:
    key, names = layout.options["key"], layout.spec.names
    rows = record.get(key)
    if isinstance(rows, list) and all(isinstance(r, list) and len(r) == len(names) for r in rows):
        return rows
    raise BadRecord(
        f"{record.where}: {key!r} must be a list of rows, each a list of {len(names)} items {names}"
    )


def _token(layout: Layout, item: Any, ids: dict[Any, int], where: str) -> int:
    """Returns the token of an item, or 0 if it is absent. `ids` caches the tokens of items."""
    if item is None:
        return 0
    if not isinstance(item, (int, float, str)):
        raise BadRecord(f"{where}: {item!r} is no cell: give a number or a word")
    if item not in ids:
        ids[item] = layout.one_token(str(item), where)
    return ids[item]
