"""Chase: follow a chain of pointers, one after the other. More threads cannot help.

First come the pointers, one a row, in any order: in one row, the stream `from` holds an item and
the stream `to` the item that it points to. Then `to` holds the item to start from, and the threads
repeat it. From the next row on, they follow the pointers. If a row is to advance by several
pointers, they share them: of 4 pointers a row, 4 threads say the first, the second, the third and
the fourth item, and 2 threads the second and the fourth. The answer is what the last thread says in
the last row. Every item depends on the one before, and threads that speak in the same row cannot
hear one another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from msllm.data.converters.layout import Layout, generator
from msllm.data.tables import Table, example_hash
from msllm.errors import UserError
from msllm.streams import StreamSpec

ITEMS = tuple("abcdefghijklmnop")
OPTIONS: Mapping[str, Any] = {
    "steps": 8,  # pointers to follow
    "rows": 8,  # rows to follow them in
    "examples": 12_800,
    "seed": 0,
}
_CHUNK = 1024  # examples that are drawn at a time


def rows_of(options: Mapping[str, Any]) -> int:
    """T: the pointers, the start, its repetition, and the rows of the threads."""
    return len(ITEMS) + 2 + options["rows"]


def solve(
    pointers: np.ndarray, starts: np.ndarray, threads: int, options: Mapping[str, Any]
) -> np.ndarray:
    """What the threads should say, [N, rows, threads].

    Args:
      pointers: [N, ITEMS].
      starts: [N].
      threads: S.
      options: as in OPTIONS.

    Raises UserError if the threads cannot share the pointers of a row.
    """
    advance = options["steps"] // options["rows"]
    if options["steps"] % options["rows"] or max(advance, threads) % min(advance, threads):
        raise UserError(
            f"{options['steps']} pointers in {options['rows']} rows of {threads} threads: each row"
            " must advance by as many, of which each thread must have an equal share"
        )
    chain = [starts]
    for _ in range(options["steps"]):
        chain.append(np.take_along_axis(pointers, chain[-1][:, None], 1)[:, 0])
    first = np.arange(options["rows"])[:, None] * advance
    # Of more threads than pointers, several say the same.
    within = (np.arange(threads) + 1) * advance // threads
    return np.stack(chain, 1)[:, first + np.maximum(within, 1)]


def tables(
    options: Mapping[str, Any],
    spec: StreamSpec,
    ids: Mapping[str, int],
    silence: int,
    count: int,
    seed: int,
) -> Iterator[Table]:
    """Problems as tables.

    Args:
      options: as in OPTIONS; missing ones have their defaults.
      spec: the streams `from` and `to`, and the threads.
      ids: the token of every word.
      silence: the silence token.
      count: the number of problems.
      seed: of the draws.
    """
    options = dict(OPTIONS) | dict(options)
    rng, token = np.random.default_rng(seed), np.array([ids[item] for item in ITEMS])
    threads = [s for s, kind in enumerate(spec.kinds) if kind != "input"]
    for begin in range(0, count, _CHUNK):
        now, size = min(_CHUNK, count - begin), len(ITEMS)
        order = rng.permuted(np.tile(np.arange(size), (now, 1)), axis=1)
        pointers, starts = rng.integers(0, size, (now, size)), rng.integers(0, size, now)
        cells = np.full((now, rows_of(options), spec.size), silence, np.int32)
        cells[:, :size, spec.index("from")] = token[order]
        cells[:, :size, spec.index("to")] = token[np.take_along_axis(pointers, order, 1)]
        cells[:, size, spec.index("to")] = token[starts]
        cells[:, size + 1, threads] = token[starts][:, None]
        cells[:, size + 2 :, threads] = token[solve(pointers, starts, len(threads), options)]
        present = np.ones(cells.shape[1:], bool)
        for problem, start, table in zip(pointers, starts, cells):
            yield Table(table, present, example_hash(f"{problem.tolist()} {start}"))


@generator
def convert(layout: Layout) -> Iterator[Table]:
    """The converter."""
    options = dict(OPTIONS) | dict(layout.options)
    ids = {item: layout.one_token(item, "chase") for item in ITEMS}
    silence = layout.tokenizer.silence_id
    yield from tables(options, layout.spec, ids, silence, options["examples"], options["seed"])
