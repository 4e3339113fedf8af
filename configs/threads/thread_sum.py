"""Sums whose threads exchange what they know late, over several topologies.

Each thread reads a few digits, one a row, and says their sum so far (mod BASE). Then the threads
exchange sums in rounds. A round lasts HOLD rows, in which each thread repeats what it says, so that
edges with lags of up to HOLD - 1 rows carry the same message. The inputs say `next` in the last row
of a round. In a round, thread i of S comes to say:

- `all`: the sum of all threads.
- `star`: first, thread 0 says the sum of all, and the others repeat theirs. Then all say it.
- `tree`: the sum of what threads 2i and 2i + 1 (mod S) said.
- `ring`: its own digits plus what thread i - 1 said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from msllm.data.converters.layout import Layout, generator
from msllm.data.tables import Table, example_hash
from msllm.streams import StreamSpec

THREADS, SHARE, BASE, HOLD = 4, 2, 5, 9
NEXT = "next"
WORDS = (NEXT, *map(str, range(BASE)))
ROUNDS = {"all": 1, "star": 2, "tree": 2, "ring": THREADS - 1}
OPTIONS: Mapping[str, Any] = {"topology": "all", "examples": 12_800, "seed": 0}
_CHUNK = 1024  # examples that are drawn at a time


def sources(topology: str) -> list[tuple[int, int]]:
    """The edges (reader, source) of a topology."""
    threads = range(THREADS)
    if topology == "tree":
        pairs = [(i, j % THREADS) for i in threads for j in (2 * i, 2 * i + 1)]
    elif topology == "ring":
        pairs = [(i, (i - 1) % THREADS) for i in threads]
    elif topology == "star":
        pairs = [pair for i in threads for pair in ((0, i), (i, 0))]
    else:
        pairs = [(i, j) for i in threads for j in threads]
    return sorted({(reader, source) for reader, source in pairs if reader != source})


def rows_of(topology: str) -> int:
    """T: the digits, the rounds, and the answer."""
    return SHARE + ROUNDS[topology] * HOLD + 1


def solve(digits: np.ndarray, topology: str) -> np.ndarray:
    """What the threads say, [N, T, THREADS], from the digits [N, SHARE, THREADS]; -1: nothing."""
    said = np.full((len(digits), rows_of(topology), THREADS), -1)
    said[:, 1 : SHARE + 1] = digits.cumsum(1) % BASE
    own = now = said[:, SHARE]
    i, row = np.arange(THREADS), SHARE
    for number in range(ROUNDS[topology]):
        said[:, row : row + HOLD] = now[:, None]
        if topology == "tree":
            now = (now[:, 2 * i % THREADS] + now[:, (2 * i + 1) % THREADS]) % BASE
        elif topology == "ring":
            now = (own + np.roll(now, 1, 1)) % BASE
        elif topology == "star" and number == 0:
            now = np.where(i == 0, own.sum(1, keepdims=True) % BASE, own)
        else:
            now = np.broadcast_to(own.sum(1, keepdims=True) % BASE, own.shape)
        row += HOLD
    said[:, row:] = now[:, None]
    return said


def tables(
    topology: str, spec: StreamSpec, ids: Mapping[str, int], silence: int, count: int, seed: int
) -> Iterator[Table]:
    """Problems as tables.

    Args:
      topology: a key of ROUNDS.
      spec: the inputs, and as many threads.
      ids: the token of every word.
      silence: the silence token.
      count: the number of problems.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    token = np.array([ids[str(digit)] for digit in range(BASE)] + [silence])
    for begin in range(0, count, _CHUNK):
        now = min(_CHUNK, count - begin)
        digits = rng.integers(0, BASE, (now, SHARE, THREADS))
        said = solve(digits, topology)
        cells = np.full((now, said.shape[1], 2 * THREADS), silence, np.int32)
        cells[:, :SHARE, :THREADS] = token[digits]
        cells[:, SHARE + HOLD - 1 :: HOLD, :THREADS] = ids[NEXT]
        cells[:, :, THREADS:] = token[said]
        present = np.ones(cells.shape[1:], bool)
        for problem, table in zip(digits, cells):
            yield Table(table, present, example_hash(problem.tobytes().hex()))


@generator
def convert(layout: Layout) -> Iterator[Table]:
    """The converter."""
    options = dict(OPTIONS) | dict(layout.options)
    ids = {word: layout.one_token(word, "sum") for word in WORDS}
    silence, count = layout.tokenizer.silence_id, options["examples"]
    yield from tables(options["topology"], layout.spec, ids, silence, count, options["seed"])
