"""Draws tables as text, and prints them on a terminal. prepared.html shows them on a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import rich.console
from rich.text import Text

from msllm.data.packing import Packed
from msllm.data.tables import Table, unpack
from msllm.tokenizer import Tokenizer
from msllm.view import cells
from msllm.view.cells import Cell


class Columns(NamedTuple):
    """The streams of a table, and the tokenizer of its tokens."""

    names: Sequence[str]
    kinds: Sequence[str]
    tokenizer: Tokenizer


class Segment(NamedTuple):
    """One example of a table."""

    title: str
    first: int  # number of its first row in the table
    rows: list[list[Cell]]  # [T][S]


class Drawing(NamedTuple):
    """A drawn table. A mark shows where each example begins."""

    title: str
    segments: list[Segment]
    note: str = ""  # describes the rows that are not shown


def draw_example(columns: Columns, number: int, table: Table, limit: int | None = None) -> Drawing:
    """Draws a single example.

    Args:
      columns: the streams.
      number: number of the example in stored order.
      table: the cells of the example.
      limit: the most rows to draw; None: all.
    """
    return _draw(columns, f"example {number:,}", [(number, 0, table)], 0, limit)


def draw_packed(
    columns: Columns, number: int, first: int, packed: Packed, limit: int | None = None
) -> Drawing:
    """Draws the examples of a packed table, without its empty rows.

    Args:
      columns: the streams.
      number: number of the table in stored order.
      first: number of the table's first example in stored order.
      packed: the cells of the table.
      limit: the most rows to draw; None: all.
    """
    examples = []
    for i, table in enumerate(unpack(packed._asdict(), packed.examples)):
        examples.append((first + i, int(np.argmax(packed.segment == i + 1)), table))
    rows, filled = len(packed.segment), int((packed.segment > 0).sum())
    title = f"table {number:,}: {filled} of {rows} rows hold examples"
    return _draw(columns, title, examples, rows - filled, limit)


def _draw(
    columns: Columns,
    title: str,
    examples: Sequence[tuple[int, int, Table]],
    empty: int,
    limit: int | None,
) -> Drawing:
    """Draws examples (number, first row, table). `empty` is the number of empty rows."""
    total = sum(len(table.tokens) for _, _, table in examples)
    shown = left = total if limit is None else min(limit, total)
    segments = []
    for number, first, table in examples:
        if left == 0:
            break
        rows = _rows(columns, table.tokens[:left], table.present[:left])
        heading = f"example {number:,}, {table.example}, {len(table.tokens)} rows"
        segments.append(Segment(heading, first, rows))
        left -= len(rows)
    notes = []
    if shown < total:
        notes.append(f"{total - shown} more rows: --rows={total} shows them")
    if empty:
        notes.append(f"{empty} empty rows")
    return Drawing(title, segments, ", ".join(notes))


def _rows(columns: Columns, tokens: np.ndarray, present: np.ndarray) -> list[list[Cell]]:
    return [
        [cells.draw(columns.tokenizer, *cell) for cell in zip(*row, strict=True)]
        for row in zip(tokens.tolist(), present.tolist(), strict=True)
    ]


def print_drawing(
    console: rich.console.Console, columns: Columns, drawing: Drawing, cut: bool = True
) -> None:
    """Prints a table.

    Args:
      console: where to print.
      columns: the streams.
      drawing: the drawn table.
      cut: narrow the columns until a line fits the console's width.
    """
    names = ("row", *map(cells.visible, columns.names))
    lines = [[Text(name, style="bold") for name in names]]
    marks = {}  # {number of a line: title of the example that begins there}
    for segment in drawing.segments:
        marks[len(lines)] = segment.title
        for number, row in enumerate(segment.rows, segment.first):
            texts = map(cells.styled, row, columns.kinds)
            lines.append([Text(str(number), style="dim"), *texts])
    widths = [max(text.cell_len for text in column) for column in zip(*lines, strict=True)]
    if cut:
        widths = [widths[0], *cells.fit(widths[1:], console.width - widths[0] - 1)]
    console.print(Text(drawing.title, style="bold"), soft_wrap=True)
    for number, line in enumerate(lines):
        if number in marks:
            rule = f"── {marks[number]} ──".ljust(sum(widths) + len(widths) - 1, "─")
            console.print(Text(rule, style="magenta"), soft_wrap=True)
        cells.print_line(console, line, widths)
    if drawing.note:
        console.print(Text(f"({drawing.note})", style="dim"), soft_wrap=True)
