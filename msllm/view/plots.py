"""Pictures of tables, of who sees whom, of losses, attention and entropy, for notebooks.

Every function draws on axes of matplotlib, which the caller makes (extra `notebooks`). A stream has the same colour in
all of them, by its place among the streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from msllm.decode.script import Row
from msllm.errors import UserError
from msllm.view import cells
from msllm.view.tables import Columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARK = "#d6336c"  # the cell that is spoken of
DARK = 0.6  # shades from which on text is white


def table(
    axes: Axes,
    columns: Columns,
    tokens: np.ndarray,
    present: np.ndarray | None = None,
    shade: np.ndarray | None = None,
    cell: tuple[int, int] | None = None,
) -> None:
    """A table as words, rows downwards. Silence is a middle dot, an absent cell is grey.

    Args:
      tokens: [T, S]. present: [T, S] bool; None: every cell is there.
      shade: [T, S] in 0..1 (bool: 0 or 1), the darkness of cells; nan counts as 0. cell: (t, s), which is outlined.
    """
    rows, streams = tokens.shape
    present = np.ones(tokens.shape, bool) if present is None else present
    shade = np.zeros(tokens.shape) if shade is None else np.nan_to_num(np.asarray(shade, float))
    axes.set_facecolor("0.85")
    axes.imshow(np.ma.masked_array(shade, ~present), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for t, s in np.argwhere(present):
        silent = tokens[t, s] == columns.tokenizer.silence_id
        text = cells.SILENT if silent else cells.spelling(columns.tokenizer, int(tokens[t, s]))
        color = "white" if shade[t, s] > DARK else "black"
        axes.text(s, t, text.replace("$", r"\$"), ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(streams), columns.names)
    axes.set_yticks(range(rows), range(rows), fontsize=7)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for s, label in enumerate(axes.get_xticklabels()):
        label.set_color(f"C{s}")
    if cell is not None:
        t, s = cell
        left, right, top, bottom = s - 0.48, s + 0.48, t - 0.48, t + 0.48
        axes.plot(
            [left, right, right, left, left],
            [top, top, bottom, bottom, top],
            color=MARK,
            linewidth=2,
        )


def visibility(axes: Axes, seen: np.ndarray, names: Sequence[str]) -> None:
    """Who sees whom, as a matrix of all cells by all cells in row-major order: dark where the query sees the key.

    `seen`: [T, S, T, S] bool (query row, query stream, key row, key stream), of `streams.visibility_table`.
    """
    rows, streams = seen.shape[:2]
    axes.imshow(seen.reshape(rows * streams, rows * streams), cmap="Blues", vmin=0, vmax=1)
    labels = [f"{name} {t}" for t in range(rows) for name in names]
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    for edge in range(streams, rows * streams, streams):
        axes.axhline(edge - 0.5, color="0.6", linewidth=0.5)
        axes.axvline(edge - 0.5, color="0.6", linewidth=0.5)
    axes.set_xlabel("key")
    axes.set_ylabel("query")


def losses(
    axes: Axes,
    metrics: Mapping[str, tuple[np.ndarray, np.ndarray]],
    names: Sequence[str],
    kind: str = "nll",
    **style,
) -> None:
    """A line per stream of a run's metrics. Raises UserError if no stream has such a metric.

    Args:
      metrics: from `metrics.read`. names: of all streams; those without the metric get no line.
      kind: nll, nll_spoken (silence left out), eval/nll or eval/nll_spoken. style: further arguments of `axes.plot`.
    """
    there = [(s, name) for s, name in enumerate(names) if f"{kind}/{name}" in metrics]
    if not there:
        kinds = sorted({metric.rpartition("/")[0] for metric in metrics} - {""})
        raise UserError(
            f"no stream has the metric {kind!r}: there are {', '.join(kinds) or 'none'}"
        )
    for s, name in there:
        axes.plot(
            *metrics[f"{kind}/{name}"], **{"color": f"C{s}", "label": f"{name}, {kind}", **style}
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per target")
    axes.legend(fontsize=8)


def between(axes: Axes, shares: np.ndarray, names: Sequence[str]) -> None:
    """A heat map of what streams take of each other; `shares`: [S, S], of `attention_map.between_streams`."""
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for reader, source in np.ndindex(shares.shape):
        share = shares[reader, source]
        color = "white" if share > DARK else "black"
        axes.text(source, reader, f"{share:.2f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("attends to")


def entropy(axes: Axes, rows: Sequence[Row], names: Sequence[str], **style) -> None:
    """The entropy of the distribution that each cell was chosen from, over the rows of a session: a line per stream.

    Streams that have none (inputs, unless the engine computes all logits) get no line. `style`: further arguments of
    `axes.plot`.
    """
    number, values = [row.index for row in rows], np.array([row.entropy for row in rows])
    for s, name in enumerate(names):
        if not np.isnan(values[:, s]).all():
            axes.plot(number, values[:, s], **{"color": f"C{s}", "label": name, **style})
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("row")
    axes.set_ylabel("entropy, nats")
    axes.legend(fontsize=8)
