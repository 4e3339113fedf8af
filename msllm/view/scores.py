"""Lists the log-probability of every cell, with the cell that it belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from msllm.tokenizer import Tokenizer
from msllm.view import cells, pages

COLUMNS = ("row", "stream", "token", "id", "logprob", "likeliest")


class ScoredCell(NamedTuple):
    """The log-probability of a cell.

    Attributes:
      example: number of the example, from 0.
      source: its id, or the place of its record.
      row: the cell's row in the example, from 0.
      stream: name of the cell's stream.
      token: the cell's token as `msllm inspect` shows it; None: there is no tokenizer.
      id: the id of the token.
      logprob: the log-probability of the token given the rows before, nats.
      likeliest: whether no other token is more likely.
    """

    example: int
    source: str
    row: int
    stream: str
    token: str | None
    id: int
    logprob: float
    likeliest: bool


def scored_cells(
    tables: Mapping[str, np.ndarray],
    places: Sequence[Sequence[int]],
    sources: Sequence[str],
    logprob: np.ndarray,
    likeliest: np.ndarray,
    names: Sequence[str],
    tokenizer: Tokenizer | None,
) -> Iterator[ScoredCell]:
    """Yields every cell that is predicted, example by example and row by row.

    Args:
      tables: tokens [B, T, S], present [B, T, S] and segment [B, T].
      places: B lists, the number of the example that each segment holds.
      sources: the source of each example.
      logprob: [B, T, S]; the value at (t, s) is that of the cell (t + 1, s), nan if there is none.
      likeliest: [B, T, S] bool, likewise.
      names: names of the S streams.
      tokenizer: the tokenizer of the tokens, if there is one.
    """
    found: dict[int, tuple[int, np.ndarray]] = {}
    for b, segment in enumerate(tables["segment"]):
        numbers = dict.fromkeys(segment[segment > 0].tolist())  # in the order of the rows
        for place, number in zip(places[b], numbers):
            found[place] = b, np.flatnonzero(segment == number)
    for example, (b, rows) in sorted(found.items()):
        source = sources[example]
        for i, row in enumerate(rows[1:].tolist(), 1):
            for s, name in enumerate(names):
                value = float(logprob[b, row - 1, s])
                if np.isnan(value):
                    continue
                token = int(tables["tokens"][b, row, s])
                text = cells.draw(tokenizer, token, True).text if tokenizer else None
                likely = bool(likeliest[b, row - 1, s])
                yield ScoredCell(example, source, i, name, text, token, value, likely)


def as_json_lines(found: Iterable[ScoredCell]) -> str:
    """A JSON object for each cell, one per line."""
    return "".join(json.dumps(cell._asdict(), ensure_ascii=False) + "\n" for cell in found)


def as_table(found: Sequence[ScoredCell]) -> list[str]:
    """A line for each cell, below a heading for each example."""
    lines: list[tuple[str, ...]] = [COLUMNS]
    for cell in found:
        token, likely = cell.token or "", "yes" if cell.likeliest else ""
        lines.append(
            (str(cell.row), cell.stream, token, str(cell.id), f"{cell.logprob:.4f}", likely)
        )
    title, *aligned = pages.aligned(lines, (0, 3, 4))
    shown, before = [title], None
    for cell, line in zip(found, aligned):
        if cell.example != before:
            shown.append(f"── example {cell.example}, {cell.source} ──")
            before = cell.example
        shown.append(line)
    return shown


def summary(found: Iterable[ScoredCell], names: Sequence[str], silence: int | None) -> list[str]:
    """The mean of each stream in lines of text, and apart from it that of its tokens.

    Args:
      found: the cells.
      names: names of the streams.
      silence: the id of silence, if there is one.
    """
    sums = {name: np.zeros((2, 2)) for name in names}  # all cells and tokens; number and sum
    for cell in found:
        sums[cell.stream][0] += (1, cell.logprob)
        if cell.id != silence:
            sums[cell.stream][1] += (1, cell.logprob)
    lines = []
    for name, ((count, total), (said, of_said)) in sums.items():
        if count:
            spoken = f"; {int(said):,} without silence: {-of_said / said:.4f}" if said else ""
            lines.append(f"{name}: {int(count):,} cells, {-total / count:.4f} nats each{spoken}")
    return lines
