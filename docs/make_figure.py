"""Draws the figure in README.md: a multi-stream table, and which cells see which.

    python docs/make_figure.py [OUT.svg]

The example comes from the dictation converter and the visibility from `msllm.streams`, so the
figure agrees with the code. Needs matplotlib (extras `test` and `notebooks`).
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

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
# By stream: the fill and text colours of its cells, and the fill of silent cells.
COLORS = {
    "user": ("#c6dcf7", "#12477d", "#eef4fc"),
    "tool": ("#e2d3f3", "#5b2d8a", "#f6f1fb"),
    "thought": ("#fadfa9", "#7a4b00", "#fdf6e6"),
    "output": ("#bfe6ca", "#15592f", "#ecf7ef"),
}
MARK = "#d6336c"  # the cell whose view is shown


class Example(NamedTuple):
    """A table of words."""

    names: tuple[str, ...]
    words: list[list[str]]  # [T][S]; "" for silence

    def row_of(self, stream: str, word: str) -> int:
        """The first row in which the stream says a word that begins with `word`."""
        column = self.names.index(stream)
        return next(t for t, row in enumerate(self.words) if row[column].startswith(word))


def example() -> Example:
    """The shortest dictation with a correction that another step follows."""
    streams = StreamsConfig()
    data = DataConfig(converter="dictation", options={"examples": 1000, "seed": 0})
    config, spec = Config(streams=streams, data=data), StreamSpec.from_config(streams)
    texts = converters.texts(config, spec)
    tokenizer = train(texts, TokenizerConfig(model_type="word", vocab_size=256))

    def word(token: int) -> str:
        return "" if token == tokenizer.silence_id else tokenizer.decode([token])

    fitting = []
    for table in converters.convert(config, spec, tokenizer):
        words = [[word(token) for token in row] for row in table.tokens.tolist()]
        said = " ".join(row[0] for row in words)
        numbers_after = re.findall(r"\d", said.partition("wait")[2])
        if len(numbers_after) > 1 and "it" not in said.split():
            fitting.append(Example(spec.names, words))
    return min(fitting, key=lambda found: len(found.words))


def seen_from(row: int, stream: str, rows: int, streams: StreamsConfig) -> np.ndarray:
    """[rows, S] bool: the cells that one cell sees in a table without absent cells."""
    spec = StreamSpec.from_config(streams)
    cells = make_cells(np.ones((1, rows, spec.size), bool), np.ones((1, rows), np.int32))
    return visibility_table(cells, spec.lag_array)[row, spec.index(stream)]


class Grid(NamedTuple):
    """Where the cells of a table are drawn."""

    x: float
    y: float
    width: float  # of a cell
    height: float  # of a cell

    def at(self, row: float, column: float) -> tuple[float, float]:
        """The upper left corner of a cell. Fractions give a point inside the cell."""
        return self.x + column * self.width, self.y + row * self.height


class Card:
    """A white card with rounded corners. y points downward."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self.box(0.03, 0.03, width - 0.06, height - 0.06, CARD, edge=LINE, width=1.0, radius=0.14)

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str,
        edge: str = "none",
        width: float = 0.0,
        radius: float = 0.05,
        style: Any = "-",
        z: int = 1,
    ) -> None:
        """Draws a box with rounded corners. `width`, `style` and `edge` apply to its outline."""
        shape = f"round,pad=0,rounding_size={radius}"
        line = {"edgecolor": edge, "linewidth": width, "linestyle": style}
        box = FancyBboxPatch((x, y), w, h, shape, facecolor=fill, zorder=z, clip_on=False, **line)
        self.axes.add_patch(box)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 9.0,
        color: str = INK,
        ha: str = "left",
        va: str = "center",
        **options: Any,
    ) -> None:
        """Draws text. `options` are passed to `axes.text`."""
        self.axes.text(x, y, text, fontsize=size, color=color, ha=ha, va=va, zorder=5, **options)

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        color: str,
        bend: float = 0.0,
        width: float = 1.3,
    ) -> None:
        """Draws an arrow, straight unless `bend` is given."""
        style = {"connectionstyle": f"arc3,rad={bend}", "arrowstyle": "-|>", "mutation_scale": 9}
        line = {"color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0, "zorder": 6}
        self.axes.add_patch(FancyArrowPatch(start, end, **style, **line))

    def heading(self, x: float, title: str, *lines: str) -> None:
        """Draws the title of a column and the lines below it."""
        self.text(x, 0.42, title, 12.5, weight="bold")
        for y, line in zip((0.73, 0.94), lines, strict=True):
            self.text(x, y, line, 9.5, MUTED)

    def table(self, grid: Grid, shown: Example, seen: np.ndarray | None = None) -> None:
        """Draws a table with its words and row numbers.

        Args:
          grid: the position of the cells.
          shown: the table.
          seen: [T, S] bool, False for cells to draw pale; None: draw all normally.
        """
        for s, name in enumerate(shown.names):
            x, y = grid.at(0, s + 0.5)
            self.text(x, y - 0.13, name, 10, COLORS[name][1], "center", weight="bold")
            for t, row in enumerate(shown.words):
                fill, ink = _colors(name, row[s], seen is None or seen[t, s], seen is None)
                self._cell(grid, t, s, fill)
                x, y = grid.at(t + 0.5, s + 0.5)
                self.text(x, y + 0.005, row[s] or "\N{MIDDLE DOT}", 10, ink, "center")
        for t in range(len(shown.words)):
            self.text(grid.x - 0.1, grid.at(t + 0.5, 0)[1], str(t), 8, MUTED, "right")

    def small_table(self, grid: Grid, names: Sequence[str], seen: np.ndarray) -> None:
        """Draws cells without words; those that are not `seen` [T, S] are pale."""
        for s, name in enumerate(names):
            x, y = grid.at(0, s + 0.5)
            self.text(x, y - 0.09, name, 8, COLORS[name][1], "center", weight="bold")
            for t in range(len(seen)):
                self._cell(grid, t, s, COLORS[name][0] if seen[t, s] else FAINT)

    def outline(self, grid: Grid, row: int, column: int, **line: Any) -> None:
        """Outlines a cell. `line` holds the width and style of the outline."""
        x, y = grid.at(row, column)
        line = {"width": 1.8, **line}
        self.box(x, y, grid.width, grid.height, "none", MARK, radius=0.06, z=4, **line)

    def _cell(self, grid: Grid, row: int, column: int, fill: str) -> None:
        gap = 0.035
        x, y = grid.at(row, column)
        self.box(x + gap / 2, y + gap / 2, grid.width - gap, grid.height - gap, fill)


def _colors(name: str, word: str, seen: bool, quiet: bool) -> tuple[str, str]:
    """Fill and text colours of a cell. With `quiet`, silence has its own fill."""
    if not seen:
        return FAINT, PALE
    fill, ink, silence = COLORS[name]
    return (fill if word or not quiet else silence), ink


def draw() -> Figure:
    """Draws the figure."""
    shown = example()
    card = Card(WIDTH, HEIGHT)
    top = 1.44
    height = (HEIGHT - top - 0.45) / len(shown.words)
    _draw_table(card, shown, Grid(0.72, top, 0.86, height))
    _draw_view(card, shown, Grid(4.96, top, 0.86, height))
    _draw_settings(card, x=8.38)
    return card.figure


def _draw_table(card: Card, shown: Example, grid: Grid) -> None:
    """Draws the example with notes beside it."""
    x, y = grid.x, grid.y
    card.heading(
        x - 0.3,
        "Rows are time, columns are streams",
        "Each forward pass reads one row and predicts the next.",
        "A stream that has nothing to say is silent (\N{MIDDLE DOT}).",
    )
    card.table(grid, shown)
    left, below = x - 0.42, grid.at(4, 0)[1]
    card.arrow((left, y + 0.05), (left, below), MUTED, width=1.0)
    card.text(left, grid.at(4.2, 0)[1], "time", 9, MUTED, "center", "top", rotation=90)

    wait, undo = shown.row_of("user", "wait"), shown.row_of("thought", "undo")
    end, answer = shown.row_of("user", "?"), shown.row_of("output", "that")
    thought = shown.names.index("thought")
    first = next(t for t, row in enumerate(shown.words) if row[thought])
    notes = {
        first: "thinks while\nthe user speaks",
        undo: f"reacts to the\ncorrection of\nrow {wait}",
        answer: f"answers {answer - end} rows\nafter the end\nof the question",
    }
    for row, text in notes.items():
        note_x, note_y = grid.at(row + 0.5, 3)
        card.text(note_x + 0.1, note_y, text, 9, MUTED, va="center", linespacing=1.25)


def _draw_view(card: Card, shown: Example, grid: Grid) -> None:
    """Draws what one cell of the example sees."""
    thought, row = shown.names.index("thought"), shown.row_of("thought", "undo") - 1
    seen = seen_from(row, "thought", len(shown.words), StreamsConfig(names=shown.names))
    card.heading(
        grid.x - 0.3,
        "What one cell sees",
        "The outlined cell sees all streams up to the row",
        "before, and itself. It predicts the cell below it.",
    )
    card.table(grid, shown, seen)
    card.outline(grid, row, thought)
    card.outline(grid, row + 1, thought, width=1.1, style=(0, (2.5, 2)))
    side, middle = grid.at(row + 0.5, thought + 1)
    below = grid.at(row + 1.5, 0)[1]
    card.arrow((side + 0.02, middle), (side + 0.02, below), MARK, bend=-0.9)
    card.text(side + 0.25, grid.at(row + 1, 0)[1], "predicts", 9, MARK, "left", weight="bold")


def _draw_settings(card: Card, x: float) -> None:
    """Draws what an output cell sees under each preset, and with one edge set by name."""
    names = ("user", "tool", "thought", "output")
    kinds = ("input", "input", "thought", "output")
    rows, row = 5, 3
    firewall = ("output", "tool", "never")
    panels: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("block_causal", "earlier rows of all streams", {}),
        ("same_row", "also the same row", {"visibility": "same_row"}),
        ("isolated", "its own stream only", {"visibility": "isolated"}),
        ('("output", "tool", "never")', "a firewall: tool is never read", {"lags": (firewall,)}),
    )
    card.heading(
        x,
        "The rule is a setting",
        "A lag per pair of streams, from a preset",
        "or by name; the same at every layer.",
    )
    for number, (title, meaning, settings) in enumerate(panels):
        y = 1.28 + number * 1.29
        card.text(x, y, title, 9.5, INK, family="DejaVu Sans Mono", weight="bold")
        card.text(x, y + 0.2, meaning, 9, MUTED)
        streams = StreamsConfig(names=names, kinds=kinds, **settings)
        grid = Grid(x, y + 0.5, 0.66, 0.12)
        card.small_table(grid, names, seen_from(row, "output", rows, streams))
        card.outline(grid, row, names.index("output"))


def save(out: str | pathlib.Path) -> None:
    """Writes the figure. The bytes depend only on the version of matplotlib."""
    out = pathlib.Path(out)
    settings = {"svg.hashsalt": "msllm", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    options: dict[str, Any] = {"dpi": 130}
    if out.suffix == ".svg":
        options = {"metadata": dict.fromkeys(("Date", "Creator", "Format", "Type"))}
    with matplotlib.rc_context(settings):
        draw().savefig(out, transparent=True, **options)
    if out.suffix == ".svg":  # keep three decimals
        out.write_text(re.sub(r"(\.\d{3})\d+", r"\1", out.read_text()))


if __name__ == "__main__":
    save(sys.argv[1] if len(sys.argv) > 1 else OUT)
