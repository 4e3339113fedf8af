"""Fold: the product of a sequence of permutations, cut over several threads.

Each thread reads a share of the sequence, one permutation a row, and says the product so far. Then
the threads merge their products in log2(S) rounds, one row each. The answer is what the first
thread says in the last row. With 8 permutations in 4 threads:

    row        0    1    2         3         4
    inputs     a b  ...  merge     merge
    threads         a    ab        abcd      abcdefgh

All threads end with the whole product, or (by mail) a rotation of it: thread i merges its own
product with that of thread i + 1, then with that of i + 2, and so on.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from msllm.data.converters.layout import Layout, generator
from msllm.data.tables import Table, example_hash
from msllm.errors import UserError
from msllm.streams import StreamSpec

MERGE = "merge"  # what every input says while threads merge
# tree: thread i merges the products of 2i and 2i + 1 (mod S), in every round
# mail: thread i merges its own product with that of i + 1, i + 2, i + 4, ..., which its input holds
MERGES = ("tree", "mail")
OPTIONS: Mapping[str, Any] = {
    "group": "S4",  # S4, S5, ... all permutations; A5, ... the even ones
    "length": 64,  # permutations of an example
    "merge": "tree",
    "silent": 0,  # the first products of a thread are silent, this many; -1: all but the answer
    "wait": 0,  # rows by which all products come later
    "examples": 12_800,
    "seed": 0,
}
_CHUNK = 1024  # examples that are drawn at a time


class Problems(NamedTuple):
    """Some problems, each a row of the arrays. Elements of the group are numbers.

    Attributes:
      shares: [N, C, M], what each input holds. The whole sequence is one share after the other, or
        one row after the other if one thread reads all inputs.
      products: [N, T, S], what each thread should say; -1: nothing.
    """

    shares: np.ndarray
    products: np.ndarray


@functools.cache
def elements(group: str) -> tuple[str, ...]:
    """The elements of a permutation group as words: "021" takes 0 to 0, 1 to 2 and 2 to 1."""
    kind, degree = group[0], int(group[1:])
    found = itertools.permutations(range(degree))
    return tuple("".join(map(str, p)) for p in found if kind == "S" or is_even(p))


def is_even(permutation: tuple[int, ...]) -> bool:
    """Whether a permutation has an even number of inversions."""
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


@functools.cache
def table_of(group: str) -> np.ndarray:
    """The multiplication table: [a, b] is the number of "first a, then b"."""
    words = elements(group)
    number = {word: i for i, word in enumerate(words)}
    return np.array([[number["".join(b[int(x)] for x in a)] for b in words] for a in words])


def shape_of(spec: StreamSpec) -> tuple[list[int], list[int]]:
    """The input streams and the threads, in the order of their shares.

    The threads of several groups take turns: the first ones of all groups, the second ones, ...
    """
    inputs = [s for s, kind in enumerate(spec.kinds) if kind == "input"]
    place = {s: i for group in spec.groups for i, s in enumerate(group.members)}
    threads = [s for s in range(spec.size) if s not in inputs]
    return inputs, sorted(threads, key=lambda s: (place.get(s, s), s))


def rows_of(options: Mapping[str, Any], columns: int, threads: int) -> int:
    """Rows from the first permutation to the answer."""
    options = dict(OPTIONS) | dict(options)
    return options["length"] // columns + options["wait"] + int(math.log2(threads)) + 1


def solve(shares: np.ndarray, threads: int, options: Mapping[str, Any]) -> np.ndarray:
    """What the threads should say, [N, T, threads]; -1: nothing.

    Args:
      shares: [N, C, M], as in `Problems`.
      threads: S.
      options: as in OPTIONS.
    """
    multiply = table_of(options["group"])
    count, columns, length = shares.shape
    rounds, start = int(math.log2(threads)), options["wait"] + 1
    said = np.full((count, length + start + rounds, threads), -1)
    # [N, S, M, permutations of a row]: one thread may read several inputs
    steps = shares[..., None] if threads == columns else shares.transpose(0, 2, 1)[:, None]
    now = None
    for row in range(length):
        for factor in np.moveaxis(steps[:, :, row], -1, 0):
            now = factor if now is None else multiply[now, factor]
        said[:, start + row] = now
    assert now is not None
    for k in range(rounds):
        i = np.arange(threads)
        if options["merge"] == "tree":
            pair = now[:, 2 * i % threads], now[:, (2 * i + 1) % threads]
        else:
            pair = now, now[:, (i + 2**k) % threads]
        now = multiply[pair]
        said[:, start + length + k] = now
    silent = options["silent"]
    said[:, : -1 if silent < 0 else start + silent] = -1
    return said


def draw(
    options: Mapping[str, Any], columns: int, threads: int, count: int, seed: int
) -> Iterator[Problems]:
    """Draws problems, in chunks.

    Args:
      options: as in OPTIONS; missing ones have their defaults.
      columns: the number of inputs.
      threads: the number of threads: that of inputs, or 1.
      count: the number of problems.
      seed: of the draws.

    Raises UserError if the sequence cannot be cut in this way.
    """
    options = dict(OPTIONS) | dict(options)
    length, size = options["length"], len(elements(options["group"]))
    if length % columns or threads not in (1, columns) or threads & (threads - 1):
        raise UserError(
            f"{length} permutations, {columns} inputs and {threads} threads: the inputs must have"
            " equal shares, and there must be a power of two of threads, one for each input or one"
            " for all"
        )
    rng = np.random.default_rng(seed)
    for start in range(0, count, _CHUNK):
        now = min(_CHUNK, count - start)
        shares = rng.integers(0, size, (now, columns, length // columns))
        yield Problems(shares, solve(shares, threads, options))


def words_of(options: Mapping[str, Any]) -> list[str]:
    """All words of the problems."""
    return [MERGE, *elements(options.get("group", OPTIONS["group"]))]


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
      spec: the streams: the inputs in order, and the threads.
      ids: the token of every word.
      silence: the silence token.
      count, seed: of `draw`.
    """
    options = dict(OPTIONS) | dict(options)
    inputs, threads = shape_of(spec)
    token = np.array([ids[word] for word in elements(options["group"])] + [silence])
    rounds = int(math.log2(len(threads)))
    for shares, products in draw(options, len(inputs), len(threads), count, seed):
        length = shares.shape[2]
        cells = np.full((len(shares), products.shape[1], spec.size), silence, np.int32)
        cells[:, :length, inputs] = token[shares.transpose(0, 2, 1)]
        cells[:, :, threads] = token[products]
        if options["merge"] == "tree":
            cells[:, length : length + rounds, inputs] = ids[MERGE]
        present = np.ones(cells.shape[1:], bool)
        for problem, table in zip(shares, cells):
            yield Table(table, present, example_hash(problem.tobytes().hex()))


@generator
def convert(layout: Layout) -> Iterator[Table]:
    """The converter: problems for training and held-out ones."""
    options = dict(OPTIONS) | dict(layout.options)
    ids = {word: layout.one_token(word, "fold") for word in words_of(options)}
    silence = layout.tokenizer.silence_id
    yield from tables(options, layout.spec, ids, silence, options["examples"], options["seed"])
