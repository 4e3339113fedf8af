"""Tables as pictures of characters: on a terminal or in a page, with a mark where each example begins."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import rich.console
import rich.text

from msllm.data.packing import Packed
from msllm.data.tables import Table, unpack
from msllm.tokenizer import Tokenizer
from msllm.view import cells

_STYLE = """
.box { overflow: auto; max-height: 85vh; }
.cells { width: auto; margin: 0; border-collapse: separate; border-spacing: 0; }
.cells td, .cells th { padding: 1px 12px 1px 4px; border: 0; font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace;
  text-align: left; white-space: pre; }
.cells thead th { position: sticky; top: 0; background: var(--card); color: var(--ink); font-weight: 600;
  border-bottom: 1px solid var(--line); }
.cells small, .cells tbody th { color: var(--soft); font-weight: 400; }
.cells tbody th { text-align: right; }
.cells tr.mark th { padding-top: 9px; border-bottom: 1px solid var(--c5); text-align: left; }
.cells td.s { opacity: .45; }
.cells td.a { background: repeating-linear-gradient(135deg, transparent 0 3px, var(--line) 3px 4px); }
"""


class Columns(NamedTuple):
    """The streams of a table, and what its tokens mean."""

    names: Sequence[str]
    kinds: Sequence[str]
    tokenizer: Tokenizer


class Segment(NamedTuple):
    """An example in a drawing."""

    title: str
    first: int  # number of its first row
    table: Table


class Drawing(NamedTuple):
    """What is drawn as one table."""

    title: str
    segments: list[Segment]
    empty: int = 0  # rows without an example, which are not drawn


def of_example(number: int, table: Table) -> Drawing:
    """A single example with its number in stored order."""
    return Drawing(f"example {number:,}", [Segment(_title(number, table), 0, table)])


def of_packed(number: int, first: int, packed: Packed) -> Drawing:
    """A packed table with its number in stored order; `first`: the number of its first example."""
    segments = []
    for i, table in enumerate(unpack(packed._asdict(), packed.examples)):
        segments.append(
            Segment(_title(first + i, table), int(np.argmax(packed.segment == i + 1)), table)
        )
    rows, filled = len(packed.segment), int((packed.segment > 0).sum())
    return Drawing(
        f"table {number:,}: {filled} of {rows} rows hold examples", segments, rows - filled
    )


def _title(number: int, table: Table) -> str:
    return f"example {number:,}, {table.example}, {len(table.tokens)} rows"


def to_terminal(
    console: rich.console.Console,
    columns: Columns,
    drawing: Drawing,
    limit: int | None = None,
    cut: bool = True,
) -> None:
    """Prints a table, at most `limit` rows of it. `cut`: columns give way until a line fits the console's width."""
    segments, note = _limited(drawing, limit)
    lines = [
        [rich.text.Text(text, style="bold") for text in ("row", *map(cells.visible, columns.names))]
    ]
    marks = {}  # {line: title of the segment that begins there}
    for segment in segments:
        marks[len(lines)] = segment.title
        for row, (tokens, present) in enumerate(
            zip(segment.table.tokens.tolist(), segment.table.present)
        ):
            line = [
                cells.cell(columns.tokenizer, *cell) for cell in zip(tokens, present, columns.kinds)
            ]
            lines.append([rich.text.Text(str(segment.first + row), style="dim"), *line])
    widths = [max(line[i].cell_len for line in lines) for i in range(len(lines[0]))]
    if cut:
        widths = [widths[0], *cells.fit(widths[1:], console.width - widths[0] - 1)]
    console.print(rich.text.Text(drawing.title, style="bold"), soft_wrap=True)
    for number, line in enumerate(lines):
        if number in marks:
            rule = f"── {marks[number]} ──".ljust(sum(widths) + len(widths) - 1, "─")
            console.print(rich.text.Text(rule, style="magenta"), soft_wrap=True)
        cells.print_line(console, line, widths)
    if note:
        console.print(rich.text.Text(f"({note})", style="dim"), soft_wrap=True)


def to_html(columns: Columns, drawing: Drawing, limit: int | None = None) -> str:
    """A table, at most `limit` rows of it, as a part of a page that has `style`."""
    segments, note = _limited(drawing, limit)
    heads = [
        f"<th>{html.escape(cells.visible(name))} <small>{kind}</small></th>"
        for name, kind in zip(columns.names, columns.kinds)
    ]
    rows = []
    for segment in segments:
        title = html.escape(segment.title)
        rows.append(f"<tr class=mark><th colspan={1 + len(heads)}>{title}</th></tr>\n")
        for row, (tokens, present) in enumerate(
            zip(segment.table.tokens.tolist(), segment.table.present)
        ):
            shown = "".join(_html_cell(columns.tokenizer, *cell) for cell in zip(tokens, present))
            rows.append(f"<tr><th>{segment.first + row}</th>{shown}</tr>\n")
    head = f"<thead><tr><th>row</th>{''.join(heads)}</tr></thead>"
    body = f"<div class=box><table class=cells>{head}<tbody>{''.join(rows)}</tbody></table></div>"
    note = f"<p class='soft note'>{html.escape(note)}</p>" if note else ""
    return f"<h2>{html.escape(drawing.title)}</h2>{body}{note}\n"


def style(columns: Columns) -> str:
    """What a page needs for `to_html`, beside the common style: what is given has a colour of its own."""
    inputs = [
        f".cells td:nth-child({2 + i})" for i, kind in enumerate(columns.kinds) if kind == "input"
    ]
    return _STYLE + (f"{', '.join(inputs)} {{ color: var(--c1); }}\n" if inputs else "")


def _html_cell(tokenizer: Tokenizer, token: int, present: bool) -> str:
    if not present:
        return "<td class=a></td>"
    if token == tokenizer.silence_id:
        return f"<td class=s>{cells.SILENT}</td>"
    return f"<td>{html.escape(cells.spelling(tokenizer, token))}</td>"


def _limited(drawing: Drawing, limit: int | None) -> tuple[list[Segment], str]:
    """The segments within the first `limit` rows, and a note on what is left out."""
    total = sum(len(segment.table.tokens) for segment in drawing.segments)
    left = shown = total if limit is None else min(limit, total)
    segments = []
    for segment in drawing.segments:
        if left > 0:
            tokens, present = segment.table.tokens[:left], segment.table.present[:left]
            segments.append(
                segment._replace(table=segment.table._replace(tokens=tokens, present=present))
            )
            left -= len(tokens)
    notes = [f"{total - shown} more rows: --rows={total} shows them"] * (total > shown)
    notes += [f"{drawing.empty} empty rows"] * (drawing.empty > 0)
    return segments, ", ".join(notes)
