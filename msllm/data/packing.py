"""Packs examples into tables of T rows by best fit, in windows that bound the memory."""

from __future__ import annotations

import bisect
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from msllm.data.tables import Table, select_rows

WINDOW = 2000  # examples sorted at a time; a smaller window wastes more rows
WINDOW_CELLS = 1 << 25  # a window with this many cells is packed early
OPEN_BINS = 64  # partly filled tables that stay open for the next window


class Packed(NamedTuple):
    """Several examples in one table of T rows."""

    tokens: np.ndarray  # [T, S] int32; 0 where absent
    present: np.ndarray  # [T, S] bool
    segment: np.ndarray  # [T] int32: 1, 2, ... in order; 0 in empty rows
    examples: list[str]  # ids, in the order of the segments
    weights: np.ndarray | None = None  # [T, S] float32: the loss weights of cells; None: all are 1


class Packer:
    """Packs examples: `add` returns tables as they fill up, `finish` the remaining ones.

    Attributes:
      examples: the number of examples packed.
      rows: the number of their rows.
      cut: the number of examples longer than T. Only their first T rows are packed.
      cut_rows: the number of their rows that are lost.
      cut_tokens: the number of tokens of each stream in these rows, [S], without silence; 0: no
        example was cut.
      longest: the number of rows of the longest example, before it is cut.
      dropped: the number of examples with fewer than 2 rows, in which there is nothing to predict.
    """

    def __init__(self, rows: int, silence_id: int | None = None):
        """Takes the number of rows T of the packed tables, and the token that means silence."""
        self.table_rows, self._silence_id = rows, silence_id
        self.cut_tokens: np.ndarray | int = 0
        self._window: list[Table] = []
        self._cells = 0  # of the tables in the window
        self._free: list[tuple[int, int]] = []  # (free rows, bin number), sorted
        self._bins: dict[int, list[Table]] = {}
        self._made = 0  # bins so far
        self.examples = self.rows = self.cut = self.cut_rows = self.dropped = 0
        self.longest = 0

    def add(self, table: Table) -> list[Packed]:
        """Adds one example, and returns the tables that this finishes."""
        length = len(table.tokens)
        if length < 2:
            self.dropped += 1
            return []
        self.longest = max(self.longest, length)
        if length > self.table_rows:
            self.cut += 1
            self.cut_rows += length - self.table_rows
            lost = slice(self.table_rows, length)
            spoken = table.present[lost] & (table.tokens[lost] != self._silence_id)
            self.cut_tokens = self.cut_tokens + spoken.sum(axis=0)
            table = select_rows(table, slice(self.table_rows))
        self.examples += 1
        self.rows += len(table.tokens)
        self._window.append(table)
        self._cells += table.tokens.size
        if len(self._window) < WINDOW and self._cells < WINDOW_CELLS:
            return []
        return self._pack(OPEN_BINS)

    def finish(self) -> list[Packed]:
        """Returns all remaining tables."""
        return self._pack(0)

    def _pack(self, keep: int) -> list[Packed]:
        """Packs the window, longest example first, each into the fullest table that has room.

        Returns the finished tables. The `keep` tables with the most free rows stay open.
        """
        for table in sorted(self._window, key=_length, reverse=True):
            self._place(table)
        self._window, self._cells = [], 0
        done = self._free[: max(len(self._free) - keep, 0)]
        self._free = self._free[len(done) :]
        return [self._join(self._bins.pop(number)) for _, number in sorted(done, key=itemgetter(1))]

    def _place(self, table: Table) -> None:
        rows = len(table.tokens)
        place = bisect.bisect_left(self._free, (rows, -1))
        if place < len(self._free):
            free, number = self._free.pop(place)
        else:
            free, number = self.table_rows, self._made
            self._bins[number] = []
            self._made += 1
        self._bins[number].append(table)
        bisect.insort(self._free, (free - rows, number))

    def _join(self, tables: list[Table]) -> Packed:
        streams = tables[0].tokens.shape[1]
        tokens = np.zeros((self.table_rows, streams), np.int32)
        present = np.zeros((self.table_rows, streams), bool)
        segment = np.zeros(self.table_rows, np.int32)
        weights = None
        start = 0
        for number, table in enumerate(tables, 1):
            rows = slice(start, start + len(table.tokens))
            tokens[rows], present[rows], segment[rows] = table.tokens, table.present, number
            if table.weights is not None:
                if weights is None:
                    weights = np.ones(tokens.shape, np.float32)
                weights[rows] = table.weights
            start = rows.stop
        return Packed(tokens, present, segment, [table.example for table in tables], weights)


def _length(table: Table) -> int:
    return len(table.tokens)
