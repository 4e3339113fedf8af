"""Counts examples that occur more than once, in memory that does not grow with their number."""

from __future__ import annotations

import array
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

FILE_IDS = 1 << 20  # ids per file
BLOCK_IDS = 1 << 19  # ids in memory at a time
_IDS = 1 << 64  # number of possible ids


class Ids:
    """Writes the ids of examples to the files NAME.0000.npy, NAME.0001.npy, ... of a folder.

    An id is a string of hex digits, of which the last 16 are used.
    """

    def __init__(self, folder: pathlib.Path, name: str):
        self._folder, self._name, self._files = folder, name, 0
        self._ids = array.array("Q")

    def add(self, examples: Iterable[str]) -> None:
        """Adds the ids of examples."""
        self._ids.extend(int(example, 16) % _IDS for example in examples)
        if len(self._ids) >= FILE_IDS:
            self.close()

    def close(self) -> None:
        """Writes the remaining ids."""
        path = self._folder / f"{self._name}.{self._files:04d}.npy"
        np.save(path, np.unique(np.array(self._ids, np.uint64)))
        self._files += 1
        self._ids = array.array("Q")


def count_duplicates(
    files: Mapping[str, Sequence[pathlib.Path]], examples: Mapping[str, int]
) -> dict[str, int]:
    """Counts duplicate examples.

    Args:
      files: the files that `Ids` wrote for each of the two splits.
      examples: the number of examples of each split.

    Returns:
      For each split, the number of examples that repeat an earlier one of the same split; under
      "train_and_eval", the number of distinct examples that are in both splits.
    """
    distinct, both = dict.fromkeys(files, 0), 0
    for first, last in _ranges(files):
        found = {split: _between(paths, first, last) for split, paths in files.items()}
        for split, ids in found.items():
            distinct[split] += len(ids)
        one, other = found.values()
        both += len(np.intersect1d(one, other, assume_unique=True))
    return {**{split: examples[split] - distinct[split] for split in files}, "train_and_eval": both}


def _ranges(files: Mapping[str, Sequence[pathlib.Path]]) -> list[tuple[int, int]]:
    """Returns ranges (first id, last id) that hold about BLOCK_IDS ids each.

    Ids are hashes, so ranges of equal size hold about the same number of ids.
    """
    ids = sum(len(np.load(path, mmap_mode="r")) for paths in files.values() for path in paths)
    count = ids // BLOCK_IDS + 1
    edges = [_IDS * block // count for block in range(count + 1)]
    return [(first, end - 1) for first, end in zip(edges, edges[1:])]


def _between(paths: Sequence[pathlib.Path], first: int, last: int) -> np.ndarray:
    """Returns the distinct ids from `first` to `last` (inclusive), [n] uint64."""
    found = [np.zeros(0, np.uint64)]
    for path in paths:
        ids = np.load(path, mmap_mode="r")
        start = np.searchsorted(ids, np.uint64(first))
        stop = np.searchsorted(ids, np.uint64(last), side="right")
        found.append(np.array(ids[start:stop]))
    return np.unique(np.concatenate(found))
