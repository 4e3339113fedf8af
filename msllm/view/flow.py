"""Shows the flow certificate (`msllm.flow`) as text, and as an HTML page with a picture."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from msllm.combine import sources_of
from msllm.flow import LATENT, Flow, certificate, count_rows, table
from msllm.streams import NEVER, StreamSpec
from msllm.view.cells import visible
from msllm.view.pages import aligned, render

_NOTES = {
    "latent": "the reader sees a function of the source's hidden states, without a bound in bits",
    "bits": "the most that the reader learns about the source per row, through tokens",
    "rows": "the fewest rows from a token of the source to logits of the reader that depend on it",
    "never": "nothing that the source says or holds changes the reader's logits by one bit",
}
_LEAST_RADIUS, _GAP, _NODE = 110.0, 90.0, 34.0  # pixels: of the circle, between nodes, of a node


class Cell(NamedTuple):
    """A cell of the matrix of influences.

    Attributes:
      text: "never", or "-" on the diagonal, or the medium or the bits.
      rows: the fewest rows as text, or "".
      kind: a CSS class: latent, tokens, never or own.
      path: how the source influences the reader, for a tooltip.
    """

    text: str
    rows: str
    kind: str
    path: str


class Arrow(NamedTuple):
    """An edge of the picture.

    Attributes:
      line: the path of the SVG.
      kind: a CSS class: latent, tokens or mail.
      text: what the edge is, for a tooltip.
      label: the tokens that pass; empty: all.
      x, y: the place of the label.
    """

    line: str
    kind: str
    text: str
    label: str = ""
    x: float = 0.0
    y: float = 0.0


class Node(NamedTuple):
    """A stream in the picture, at (x, y) pixels."""

    name: str
    kind: str
    x: float
    y: float


def text(spec: StreamSpec, vocab_size: int = 0) -> str:
    """The certificate as text: the table of generation, and what differs when tokens are given.

    Args:
      spec: the streams.
      vocab_size: the number of tokens; 0: unknown.
    """
    found = certificate(spec, vocab_size)
    lines = ["Influence in generation", "", *aligned(_shown(table(found))), ""]
    mentioned = {flow.medium if flow else "never" for _, _, flow in found.pairs()}
    notes = [("rows", mentioned - {"never"}), ("latent", LATENT in mentioned)]
    notes += [("bits", "tokens" in mentioned and vocab_size), ("never", "never" in mentioned)]
    lines += [f"  {name}: {_NOTES[name]}" for name, is_shown in notes if is_shown]
    if "tokens" in mentioned and not vocab_size:
        lines.append(
            "  tokens: through tokens only; the bits are unknown before the data is prepared"
        )
    lines += ["", *given_lines(spec)]
    if spec.passing:
        lines += ["", "Edges that only some tokens pass, besides silence:"]
        lines += [f"  {line}" for line in passing_lines(spec)]
    return "\n".join(lines)


def given_lines(spec: StreamSpec) -> list[str]:
    """Says which influences exist only because streams choose their own tokens."""
    given = certificate(spec, generated=False)
    only = [
        f"{a} -> {b}"
        for (a, b, in_generation), (_, _, flow) in zip(
            certificate(spec).pairs(), given.pairs(), strict=True
        )
        if in_generation and not flow
    ]
    if not only:
        return [
            "The same pairs influence each other when all tokens are given (training, scoring)."
        ]
    return [
        "When all tokens are given (training, scoring), these pairs have no influence either:",
        *(f"  {visible(pair)}" for pair in only),
    ]


def passing_lines(spec: StreamSpec) -> list[str]:
    """Names the tokens that pass an edge, such as "plan -> output: digits, 10 tokens"."""
    lines = []
    for reader, source, (name, tokens) in spec.passing:
        count = "1 token" if len(tokens) == 1 else f"{len(tokens):,} tokens"
        lines.append(f"{spec.names[source]} -> {spec.names[reader]}: {name}, {count}")
    return list(map(visible, lines))


def page(title: str, spec: StreamSpec, vocab_size: int = 0) -> str:
    """The certificate as an HTML page, with a picture of the edges and a matrix of the influences.

    Args:
      title: what has these streams, such as the name of a config.
      spec, vocab_size: as for `text`.
    """
    found = certificate(spec, vocab_size)
    names = [visible(name) for name in spec.names]
    flows = [flow for _, _, flow in found.pairs()]
    matrix = [
        [
            Cell("-", "", "own", "") if a == b else _cell(names[a], names[b], found.flows[a][b])
            for b in range(spec.size)
        ]
        for a in range(spec.size)
    ]
    nodes, arrows, width, height = picture(spec)
    return render(
        "view/flow.html",
        title=f"Flow between the streams of {visible(title)}",
        figures={
            "pairs of streams": len(flows),
            "without influence": flows.count(None),
            "through tokens only": sum(f is not None and f.medium != LATENT for f in flows),
            "latent": sum(f is not None and f.medium == LATENT for f in flows),
        },
        names=names,
        matrix=matrix,
        given=given_lines(spec),
        passing=passing_lines(spec),
        notes=_NOTES,
        vocab_size=f"{vocab_size:,}" if vocab_size else "unknown",
        has_mail=bool(spec.mail),
        nodes=nodes,
        arrows=arrows,
        width=width,
        height=height,
        node=_NODE,
    )


def picture(spec: StreamSpec) -> tuple[list[Node], list[Arrow], float, float]:
    """The streams on a circle, with their edges.

    Returns: nodes, arrows, and the width and the height of the picture in pixels.
    """
    radius = max(_LEAST_RADIUS, spec.size * (2 * _NODE + _GAP) / (2 * math.pi))
    middle = radius + 2 * _NODE + 10
    angles = [2 * math.pi * s / spec.size - math.pi / 2 for s in range(spec.size)]
    points = [
        np.array([middle + radius * math.cos(a), middle + radius * math.sin(a)]) for a in angles
    ]
    nodes = [
        Node(visible(name), kind, round(float(x), 1), round(float(y), 1))
        for name, kind, (x, y) in zip(spec.names, spec.kinds, points)
    ]
    arrows, sets = [], {(r, s): visible(one.name) for r, s, one in spec.passing}
    for kind, lags in (("latent", spec.lag_array), ("tokens", spec.token_lag_array)):
        for reader, source in np.argwhere(lags < NEVER).tolist():
            if reader == source:
                continue
            line = _arrow(points[source], points[reader])
            name = sets.get((reader, source), "") if kind == "tokens" else ""
            through = " through tokens" if kind == "tokens" else ""
            through += f" of {name}" if name else ""
            what = f"{nodes[reader].name} sees {nodes[source].name}{through}"
            what += f", lag {count_rows(int(lags[reader, source]))}"
            arrows.append(Arrow(line, kind, what, name, *_label_place(line)))
    for stream, source in sources_of(spec.combine):
        if source != stream:
            what = (
                f"{nodes[stream].name} is predicted from {nodes[source].name} as well, lag 0 rows"
            )
            arrows.append(Arrow(_arrow(points[source], points[stream]), "latent", what))
    for rule in spec.mail:
        reader, source = nodes[rule.reader].name, nodes[rule.source].name
        what = f"{reader} gets mail from {source}, lag {count_rows(rule.lag)}"
        arrows.append(Arrow(_arrow(points[rule.source], points[rule.reader]), "mail", what))
    return nodes, arrows, round(2 * middle, 1), round(2 * middle, 1)


def _arrow(start: np.ndarray, end: np.ndarray) -> str:
    """A curve between two nodes, which bends to its right so that opposite arrows differ."""
    along = (end - start) / np.linalg.norm(end - start)
    across = np.array([-along[1], along[0]])
    bend = (start + end) / 2 + across * 18
    begin, tip = start + along * _NODE + across * 6, end - along * (_NODE + 7) + across * 6
    (x1, y1), (xb, yb), (x2, y2) = np.round([begin, bend, tip], 1).tolist()
    return f"M {x1} {y1} Q {xb} {yb} {x2} {y2}"


def _label_place(line: str) -> tuple[float, float]:
    """The place of a label beside the middle of an arrow: where its curve bends to."""
    x, y = line.split(" Q ")[1].split()[:2]
    return float(x), float(y)


def _cell(source: str, reader: str, flow: Flow | None) -> Cell:
    if flow is None:
        return Cell("never", "", "never", f"{source} never influences {reader}")
    path = visible(" → ".join(flow.path))
    return Cell(flow.how, count_rows(flow.rows), flow.medium, path)


def _shown(rows: list[list[str]]) -> list[list[str]]:
    return [[visible(text) for text in row] for row in rows]
