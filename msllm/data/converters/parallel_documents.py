"""Plain text in all streams at once, a document in each."""

from __future__ import annotations

import json
from collections.abc import Iterator

from msllm.data.converters.layout import Layout
from msllm.data.converters.single import pieces
from msllm.data.sources import Part, texts
from msllm.data.tables import Placement, Table

OPTIONS = {"key": "text"}


def convert(layout: Layout, part: Part) -> Iterator[Table]:
    """From documents (texts; of records, the text under `key`), in pieces as `single` makes them.

    Every piece goes to the fullest stream that has room for it in T rows. A row of silence follows the end of a
    document where there is room; cells below the last document of a stream are absent.
    """
    columns: list[list[int]] = [[] for _ in layout.spec.names]
    source = ""
    for where, blocks in texts(part, layout.options["key"], layout.bad):
        column = None
        for piece in layout.counted(pieces(layout, blocks)):
            fitting = [column for column in columns if len(column) + len(piece) <= layout.rows]
            if not fitting:
                yield _table(layout, columns)._replace(source=source)
                columns = fitting = [[] for _ in layout.spec.names]
            source = source if any(columns) else where
            column = max(fitting, key=len)
            column += piece
        if column is not None and len(column) < layout.rows:
            column.append(layout.tokenizer.silence_id)
    if any(columns):
        yield _table(layout, columns)._replace(source=source)


def _table(layout: Layout, columns: list[list[int]]) -> Table:
    placements = [Placement(stream, 0, column) for stream, column in enumerate(columns)]
    table = layout.table(placements, json.dumps(columns), closed=False)
    for stream, column in enumerate(columns):
        table.present[len(column) :, stream] = False
    table.tokens[~table.present] = 0
    return table
