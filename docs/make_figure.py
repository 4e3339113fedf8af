"""Draws the picture of README.md: a multi-stream table, and who sees whom.

    python docs/make_figure.py [OUT.svg]

The example comes out of the dictation converter, and who sees whom out of `msllm.streams.visible`: the picture cannot
disagree with the code. Needs matplotlib (extras `test` and `notebooks`).
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data import converters
from msllm.streams import StreamSpec, make_cells, visibility_table
from msllm.tokenizer import train

OUT = pathlib.Path(__file__).with_name("streams.svg")
WIDTH, HEIGHT = 11.3, 6.7  # inches; all coordinates below are inches too
CARD, INK, MUTED, FAINT, LINE = "#ffffff", "#1f2430", "#6b7280", "#f3f4f6", "#d5d9e0"
PALE = "#b6bcc6"  # text of cells that are not seen
# Fill and text of a stream's cells, and the fill of its silence.
COLORS = {
    "user": ("#c6dcf7", "#12477d", "#eef4fc"),
    "tool": ("#e2d3f3", "#5b2d8a", "#f6f1fb"),
    "thought": ("#fadfa9", "#7a4b00", "#fdf6e6"),
    "output": ("#bfe6ca", "#15592f", "#ecf7ef"),
}
MARK = "#d6336c"  # the cell whose view is shown


class Example(NamedTuple):
    """A table as words, silence as ""."""

    names: tuple[str, ...]
    words: list[list[str]]  # [T][S]

    def row_of(self, stream: str, word: str) -> int:
        """The first row in which the stream says the word."""
        column = self.names.index(stream)
        return next(t for t, row in enumerate(self.words) if row[column] == word)


def example() -> Example:
    """The shortest dictation with a correction and another step after it."""
    streams = StreamsConfig()
    data = DataConfig(converter="dictation", options={"examples": 1000, "seed": 0})
    config, spec = Config(streams=streams, data=data), StreamSpec.from_config(streams)
    tokenizer = train(
        converters.texts(config, spec), TokenizerConfig(model_type="word", vocab_size=256)
    )

    def piece(token):
        return "" if token == tokenizer.silence_id else tokenizer.decode([token])

    best = None
    for table in converters.convert(config, spec, tokenizer):
        found = Example(
            spec.names, [[piece(token) for token in row] for row in table.tokens.tolist()]
        )
        said = " ".join(row[0] for row in found.words)
        if len(re.findall(r"\d", said.partition("wait")[2])) > 1 and "it" not in said.split():
            best = min(best or found, found, key=lambda e: len(e.words))
    return best


def seen_from(row: int, stream: str, rows: int, streams: StreamsConfig) -> np.ndarray:
    """[rows, S] bool: the cells that one cell sees in a table without absent cells."""
    spec = StreamSpec.from_config(streams)
    cells = make_cells(np.ones((1, rows, spec.size), bool), np.ones((1, rows), np.int32))
    return visibility_table(cells, spec.lag_array)[row, spec.index(stream)]


class Card:
    """A white card with rounded corners, y downward."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self.box(0.03, 0.03, width - 0.06, height - 0.06, CARD, edge=LINE, width=1.0, radius=0.14)

    def box(self, x, y, w, h, fill, edge="none", width=0.0, radius=0.05, style="-", z=1):
        shape = f"round,pad=0,rounding_size={radius}"
        line = {"edgecolor": edge, "linewidth": width, "linestyle": style}
        self.axes.add_patch(
            FancyBboxPatch((x, y), w, h, shape, facecolor=fill, zorder=z, clip_on=False, **line)
        )

    def text(self, x, y, text, size=9.0, color=INK, ha="left", va="center", **kwargs):
        self.axes.text(x, y, text, fontsize=size, color=color, ha=ha, va=va, zorder=5, **kwargs)

    def arrow(self, start, end, color, bend=0.0, width=1.3):
        self.axes.add_patch(
            FancyArrowPatch(
                start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>", mutation_scale=9,
                color=color, linewidth=width, shrinkA=0, shrinkB=0, zorder=6,
            )
        )  # fmt: skip

    def grid(
        self,
        x,
        y,
        size,
        names: Sequence[str],
        rows: int,
        words=None,
        seen=None,
        query=None,
        numbers=True,
    ):
        """Cells of `size` (width, height) with the names above; those not in `seen` are pale, `query` is outlined."""
        w, h = size
        gap = 0.035
        for s, name in enumerate(names):
            big = words is not None
            self.text(
                x + (s + 0.5) * w, y - (0.13 if big else 0.09), name, 10 if big else 8, COLORS[name][1], "center",
                weight="bold",
            )  # fmt: skip
            for t in range(rows):
                fill, ink, quiet = COLORS[name]
                word = words[t][s] if big else ""
                if seen is not None and not seen[t, s]:
                    fill, ink = FAINT, PALE
                elif seen is None and not word:
                    fill = quiet
                left, top = x + s * w + gap / 2, y + t * h + gap / 2
                self.box(left, top, w - gap, h - gap, fill)
                if big:
                    self.text(
                        x + (s + 0.5) * w,
                        y + (t + 0.5) * h + 0.005,
                        word or "\N{MIDDLE DOT}",
                        10,
                        ink,
                        "center",
                    )
        for t in range(rows) if numbers else ():
            self.text(x - 0.1, y + (t + 0.5) * h, str(t), 8, MUTED, "right")
        if query is not None:
            t, s = query
            self.box(x + s * w, y + t * h, w, h, "none", MARK, 1.8, 0.06, z=4)


def draw() -> Figure:
    """The whole picture."""
    shown = example()
    names, rows = shown.names, len(shown.words)
    card = Card(WIDTH, HEIGHT)
    top, w, h = 1.44, 0.86, (HEIGHT - 1.44 - 0.45) / rows
    thought = names.index("thought")

    # (a) the table
    x = 0.72
    card.text(x - 0.3, 0.42, "Rows are time, columns are streams", 12.5, weight="bold")
    card.text(x - 0.3, 0.73, "Each forward pass reads one row and predicts the next.", 9.5, MUTED)
    card.text(
        x - 0.3, 0.94, "A stream that has nothing to say is silent (\N{MIDDLE DOT}).", 9.5, MUTED
    )
    card.grid(x, top, (w, h), names, rows, shown.words)
    card.arrow((x - 0.42, top + 0.05), (x - 0.42, top + 4 * h), MUTED, width=1.0)
    card.text(x - 0.42, top + 4.2 * h, "time", 9, MUTED, "center", "top", rotation=90)
    notes = x + 3 * w + 0.1
    wait, undo = shown.row_of("user", "wait"), shown.row_of("thought", "undo")
    end, answer = shown.row_of("user", "?"), shown.row_of("output", "that")
    first = next(t for t, row in enumerate(shown.words) if row[thought])
    for row, text in (
        (first, "thinks while\nthe user speaks"),
        (undo, f"reacts to the\ncorrection of\nrow {wait}"),
        (answer, f"answers {answer - end} rows\nafter the end\nof the question"),
    ):
        card.text(notes, top + (row + 0.5) * h, text, 9, MUTED, va="center", linespacing=1.25)

    # (b) who sees whom, in the same table
    x = 4.96
    row = undo - 1
    seen = seen_from(row, "thought", rows, StreamsConfig(names=names))
    card.text(x - 0.3, 0.42, "What one cell sees", 12.5, weight="bold")
    card.text(x - 0.3, 0.73, "The outlined cell sees all streams up to the row", 9.5, MUTED)
    card.text(x - 0.3, 0.94, "before, and itself. It predicts the cell below it.", 9.5, MUTED)
    card.grid(x, top, (w, h), names, rows, shown.words, seen, (row, thought))
    side = x + (thought + 1) * w
    card.box(
        x + thought * w,
        top + (row + 1) * h,
        w,
        h,
        "none",
        MARK,
        1.1,
        0.06,
        style=(0, (2.5, 2)),
        z=4,
    )
    card.arrow(
        (side + 0.02, top + (row + 0.5) * h), (side + 0.02, top + (row + 1.5) * h), MARK, bend=-0.9
    )
    card.text(side + 0.25, top + (row + 1) * h, "predicts", 9, MARK, "left", weight="bold")

    # (c) presets and a named edge
    small = ("user", "tool", "thought", "output")
    kinds = ("input", "input", "thought", "output")
    panels = (
        ("block_causal", "earlier rows of all streams", {}),
        ("same_row", "also the same row", {"visibility": "same_row"}),
        ("isolated", "its own stream only", {"visibility": "isolated"}),
        (
            '("output", "tool", "never")',
            "a firewall: tool is never read",
            {"lags": (("output", "tool", "never"),)},
        ),
    )
    x, count, marked = 8.38, 5, 3
    w, h = 0.66, 0.12
    card.text(x, 0.42, "The rule is a setting", 12.5, weight="bold")
    card.text(x, 0.73, "A lag per pair of streams, from a preset", 9.5, MUTED)
    card.text(x, 0.94, "or by name; the same at every layer.", 9.5, MUTED)
    for number, (title, meaning, settings) in enumerate(panels):
        y = 1.28 + number * 1.29
        card.text(x, y, title, 9.5, INK, family="DejaVu Sans Mono", weight="bold")
        card.text(x, y + 0.2, meaning, 9, MUTED)
        seen = seen_from(
            marked, "output", count, StreamsConfig(names=small, kinds=kinds, **settings)
        )
        card.grid(x, y + 0.5, (w, h), small, count, seen=seen, query=(marked, 3), numbers=False)
    return card.figure


def save(out: str | pathlib.Path) -> None:
    """Writes the picture; the same bytes for the same version of matplotlib."""
    out = pathlib.Path(out)
    with matplotlib.rc_context(
        {"svg.hashsalt": "msllm", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    ):
        plain = {"metadata": dict.fromkeys(("Date", "Creator", "Format", "Type"))}
        draw().savefig(out, transparent=True, **(plain if out.suffix == ".svg" else {"dpi": 130}))
    if out.suffix == ".svg":  # a thousandth of a point is fine enough
        out.write_text(re.sub(r"(\.\d{3})\d+", r"\1", out.read_text()))


if __name__ == "__main__":
    save(sys.argv[1] if len(sys.argv) > 1 else OUT)
