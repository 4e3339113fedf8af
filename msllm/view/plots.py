"""Plots for notebooks: tables, visibility, losses, attention between streams, and entropy.

Every function draws on matplotlib axes from the caller (extra `notebooks`). A stream has the same
colour in all plots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from msllm.decode.script import Row
from msllm.errors import UserError
from msllm.view import cells
from msllm.view.tables import Columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

MARK = "#d6336c"  # outline of a marked cell
DARK = 0.6  # on shades above this, text is white


def table(
    axes: Axes,
    columns: Columns,
    tokens: np.ndarray,
    present: np.ndarray | None = None,
    shade: np.ndarray | None = None,
    cell: tuple[int, int] | None = None,
    scale: str = "",
) -> None:
    """Draws a table of tokens, with the first row at the top.

    Silence is a middle dot. Absent cells are grey.

    Args:
      axes: where to draw.
      columns: the streams.
      tokens: [T, S] int.
      present: [T, S] bool; None: all cells are present.
      shade: [T, S] in [0, 1], the darkness of the cells; nan counts as 0.
      cell: (t, s) of a cell to outline.
      scale: what the shades measure; a colour scale with this label is drawn. Empty: no scale.
    """
    rows, streams = tokens.shape
    present = np.ones(tokens.shape, bool) if present is None else present
    shade = np.zeros(tokens.shape) if shade is None else np.nan_to_num(np.asarray(shade, float))
    axes.set_facecolor("0.85")
    shown = np.ma.masked_array(shade, ~present)
    image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if scale:
        _color_scale(image, scale)
    for t, s in np.argwhere(present):
        text = cells.draw(columns.tokenizer, int(tokens[t, s]), True).text
        _write(axes, s, t, text.replace("$", r"\$"), float(shade[t, s]))
    axes.set_xticks(range(streams), columns.names)
    axes.set_yticks(range(rows), [str(row) for row in range(rows)], fontsize=7)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for s, label in enumerate(axes.get_xticklabels()):
        label.set_color(f"C{s}")
    if cell is not None:
        t, s = cell
        left, right, top, bottom = s - 0.48, s + 0.48, t - 0.48, t + 0.48
        xs, ys = [left, right, right, left, left], [top, top, bottom, bottom, top]
        axes.plot(xs, ys, color=MARK, linewidth=2)


def visibility(axes: Axes, seen: np.ndarray, names: Sequence[str]) -> None:
    """Draws the visibility of cells as a matrix, dark where a query sees a key.

    The cells are in row-major order.

    Args:
      axes: where to draw.
      seen: [T, S, T, S] bool (query row, query stream, key row, key stream), from
        `streams.visibility_table`.
      names: names of the streams.
    """
    from matplotlib.patches import Patch

    rows, streams = seen.shape[:2]
    matrix = seen.reshape(rows * streams, rows * streams)
    image = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    labels = [f"{name} {t}" for t in range(rows) for name in names]
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    for edge in range(streams, rows * streams, streams):
        axes.axhline(edge - 0.5, color="0.6", linewidth=0.5)
        axes.axvline(edge - 0.5, color="0.6", linewidth=0.5)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    # A query never sees later rows, so this corner is empty.
    colors = {"sees": image.get_cmap()(1.0), "does not see": image.get_cmap()(0.0)}
    handles = [Patch(facecolor=c, edgecolor="0.6", label=label) for label, c in colors.items()]
    axes.legend(handles=handles, loc="upper right", fontsize=6)


def losses(
    axes: Axes,
    metrics: Mapping[str, tuple[np.ndarray, np.ndarray]],
    names: Sequence[str],
    kind: str = "nll",
    **style: Any,
) -> None:
    """Draws a metric of each stream over the steps of a run.

    Args:
      axes: where to draw.
      metrics: {metric: (steps, values)}, from `metrics.read`.
      names: names of the streams. Streams without the metric get no line.
      kind: nll, nll_spoken (without silence), eval/nll or eval/nll_spoken.
      style: further arguments of `axes.plot`.

    Raises:
      UserError: no stream has the metric.
    """
    drawn = [(s, name) for s, name in enumerate(names) if f"{kind}/{name}" in metrics]
    if not drawn:
        kinds = sorted({metric.rpartition("/")[0] for metric in metrics} - {""})
        raise UserError(
            f"no stream has the metric {kind!r}: there are {', '.join(kinds) or 'none'}"
        )
    for s, name in drawn:
        steps, values = metrics[f"{kind}/{name}"]
        axes.plot(steps, values, **{"color": f"C{s}", "label": f"{name}, {kind}", **style})
    _label(axes, "step", "nats per target")


def between(axes: Axes, shares: np.ndarray, names: Sequence[str]) -> None:
    """Draws a heat map of the attention between streams.

    Args:
      axes: where to draw.
      shares: [S, S] (reader, source), from `attention_map.between_streams`.
      names: names of the streams.
    """
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    _color_scale(image, "share of attention")
    for reader, source in np.ndindex(shares.shape):
        share = float(shares[reader, source])
        _write(axes, source, reader, f"{share:.2f}", share)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("attends to")


def entropy(axes: Axes, rows: Sequence[Row], names: Sequence[str], **style: Any) -> None:
    """Draws the entropy of the model's distribution in each cell of a session.

    Args:
      axes: where to draw.
      rows: rows of a session.
      names: names of the streams. Input streams have no entropy, and so no line, unless the engine
        computes all logits.
      style: further arguments of `axes.plot`.
    """
    number, values = [row.index for row in rows], np.array([row.entropy for row in rows])
    for s, name in enumerate(names):
        if not np.isnan(values[:, s]).all():
            axes.plot(number, values[:, s], **{"color": f"C{s}", "label": name, **style})
    _label(axes, "row", "entropy, nats")


def _color_scale(image: AxesImage, label: str) -> None:
    """Draws the colour scale of an image beside its axes."""
    axes = image.axes
    assert axes is not None
    scale = axes.figure.colorbar(image, ax=axes, label=label, fraction=0.046, pad=0.04)
    scale.ax.tick_params(labelsize=7)


def _write(axes: Axes, x: int, y: int, text: str, shade: float) -> None:
    """Writes text into a cell, in a colour that contrasts with the cell's shade."""
    color = "white" if shade > DARK else "black"
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=color)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8)
