"""Data that is a table already: all streams in step, such as the voices of a score or the channels of a sensor."""

from __future__ import annotations

import json
from collections.abc import Iterator

from msllm.data.converters.layout import Layout, each_record
from msllm.data.sources import BadRecord, Record
from msllm.data.tables import Placement, Table

OPTIONS = {"key": "rows", "silence": [-1]}


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"rows": [[an item per stream], ...]}; the option `key` is the key of the rows.

    An item is a number or a word, and must be one token as written; one of `silence` or "" is silence, null is absent.
    """
    key, names = layout.options["key"], layout.spec.names
    rows = record.value.get(key) if isinstance(record.value, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and len(row) == len(names) for row in rows
    ):
        raise BadRecord(
            f"{record.where}: {key!r} must be a list of rows, each a list of {len(names)} items {names}"
        )
    silent = ["", *layout.options["silence"]]
    known = dict.fromkeys(silent, layout.tokenizer.silence_id)
    columns = []
    for name, column in zip(names, zip(*rows)):
        tokens = []
        for number, item in enumerate(column):
            if item is not None and not isinstance(item, (int, float, str)):
                raise BadRecord(
                    f"{record.where}, {name}, row {number}: {item!r} is no cell: give a number or a word"
                )
            if item is not None and item not in known:
                known[item] = layout.one_token(str(item), f"{record.where}, {name}, row {number}")
            tokens.append(0 if item is None else known[item])
        columns.append(tokens)
    table = layout.table(
        [Placement(s, 0, c) for s, c in enumerate(columns)], json.dumps(rows), closed=False
    )
    for number, row in enumerate(rows):
        table.present[number] = [item is not None for item in row]
    yield table
