"""Counts examples that came before, in memory that does not grow with their number."""

from __future__ import annotations

import array
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

FILE_IDS = 1 << 20  # in a file
BLOCK = 1 << 19  # ids in memory at a time
_IDS = 1 << 64


class Ids:
    """Writes the ids of examples (hex digits, of which the last 16 count) to files NAME.0000.npy, ... of a folder."""

    def __init__(self, folder: pathlib.Path, name: str):
        self._folder, self._name, self._files = folder, name, 0
        self._ids = array.array("Q")

    def add(self, examples: Iterable[str]) -> None:
        """Notes examples."""
        self._ids.extend(int(example, 16) % _IDS for example in examples)
        if len(self._ids) >= FILE_IDS:
            self.close()

    def close(self) -> None:
        """Writes what is left."""
        np.save(
            self._folder / f"{self._name}.{self._files:04d}.npy",
            np.unique(np.array(self._ids, np.uint64)),
        )
        self._files += 1
        self._ids = array.array("Q")


def count_duplicates(
    files: dict[str, Sequence[pathlib.Path]], examples: dict[str, int]
) -> dict[str, int]:
    """From the files of `Ids` by split, and the number of examples of each: how many of them came before in their own
    split, and in "train_and_eval" how many different ones are in both."""
    distinct = dict.fromkeys(files, 0)
    both = 0
    blocks = (
        sum(len(np.load(path, mmap_mode="r")) for paths in files.values() for path in paths)
        // BLOCK
        + 1
    )
    for block in range(blocks):  # ids are hashes: equal ranges hold about as many
        first, last = _IDS * block // blocks, _IDS * (block + 1) // blocks - 1
        found = {split: _between(paths, first, last) for split, paths in files.items()}
        for split, ids in found.items():
            distinct[split] += len(ids)
        both += len(np.intersect1d(*found.values(), assume_unique=True))
    return {**{split: examples[split] - distinct[split] for split in files}, "train_and_eval": both}


def _between(paths: Sequence[pathlib.Path], first: int, last: int) -> np.ndarray:
    """The different ids from `first` to `last`."""
    found = [np.zeros(0, np.uint64)]
    for path in paths:
        ids = np.load(path, mmap_mode="r")
        start, stop = (
            np.searchsorted(ids, np.uint64(first)),
            np.searchsorted(ids, np.uint64(last), side="right"),
        )
        found.append(np.array(ids[start:stop]))
    return np.unique(np.concatenate(found))
