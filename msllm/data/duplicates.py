"""Counts examples that occur more than once, in memory that does not grow with their number."""

from __future__ import annotations

import array
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from msllm.runtime.files import write_atomically

FILE_IDS = 1 << 20  # ids per file
RANGE_IDS = 1 << 22  # ids in memory at a time
_IDS = 1 << 64  # number of possible ids


class Ids:
    """Writes the ids of examples to the files NAME.0000.npy, NAME.0001.npy, ... of a folder.

    An id is a string of hex digits, of which the last 16 are used.

    Attributes:
      files: the names of the files written so far.
    """

    def __init__(self, folder: pathlib.Path, name: str):
        self._folder, self._name = folder, name
        self._ids = array.array("Q")
        self.files: list[str] = []

    def add(self, examples: Iterable[str]) -> None:
        """Adds the ids of examples."""
        self._ids.extend(int(example, 16) % _IDS for example in examples)
        if len(self._ids) >= FILE_IDS:
            self.close()

    def close(self) -> None:
        """Writes the remaining ids, if any."""
        if not self._ids:
            return
        name = f"{self._name}.{len(self.files):04d}.npy"
        ids = np.unique(np.array(self._ids, np.uint64))
        write_atomically(self._folder / name, lambda stream: np.save(stream, ids))
        self.files.append(name)
        self._ids = array.array("Q")


class IdRange(NamedTuple):
    """The ids from `first` to `last` (inclusive). Ranges divide the work of finding duplicates."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"the search for duplicates among the ids from {self.first:016x}"


def ranges(examples: int) -> list[IdRange]:
    """Divides all ids into ranges, each with about RANGE_IDS ids of `examples` examples.

    Ids are hashes, so ranges of equal size hold about the same number of ids.
    """
    count = examples // RANGE_IDS + 1
    edges = [_IDS * block // count for block in range(count + 1)]
    return [IdRange(first, end - 1) for first, end in zip(edges, edges[1:])]


def count_distinct(files: Mapping[str, Sequence[pathlib.Path]], ids: IdRange) -> dict[str, int]:
    """Counts the distinct ids of a range.

    Args:
      files: the files that `Ids` wrote for each of the two splits.
      ids: the range.

    Returns:
      The number of distinct ids of each split and, under "both", of those that are in both splits.
    """
    found = {split: _between(paths, ids) for split, paths in files.items()}
    one, other = found.values()
    both = len(np.intersect1d(one, other, assume_unique=True))
    return {**{split: len(distinct) for split, distinct in found.items()}, "both": both}


def sum_duplicates(
    counts: Iterable[Mapping[str, int]], examples: Mapping[str, int]
) -> dict[str, int]:
    """Counts duplicate examples.

    Args:
      counts: the results of `count_distinct` for all ranges.
      examples: the number of examples of each split.

    Returns:
      For each split, the number of examples that repeat an earlier one of the same split; under
      "train_and_eval", the number of distinct examples that are in both splits.
    """
    repeated, both = dict(examples), 0
    for count in counts:
        for split in repeated:
            repeated[split] -= count[split]
        both += count["both"]
    return {**repeated, "train_and_eval": both}


def _between(paths: Sequence[pathlib.Path], ids: IdRange) -> np.ndarray:
    """Returns the distinct ids of a range, [n] uint64."""
    found = [np.zeros(0, np.uint64)]
    for path in paths:
        stored = np.load(path, mmap_mode="r")
        start = np.searchsorted(stored, np.uint64(ids.first))
        stop = np.searchsorted(stored, np.uint64(ids.last), side="right")
        found.append(np.array(stored[start:stop]))
    return np.unique(np.concatenate(found))
