"""Packs examples into tables of T rows: best fit, in windows, so that memory does not grow with the corpus."""

from __future__ import annotations

import bisect
from typing import NamedTuple

import numpy as np

from msllm.data.tables import Table

WINDOW = 2000  # examples sorted at a time: more rows are wasted in smaller windows
WINDOW_CELLS = 1 << 25  # or, of long tables of many streams, fewer: so many cells
OPEN_BINS = 64  # unfinished tables that wait for the next window


class Packed(NamedTuple):
    """Several examples in one table of T rows."""

    tokens: np.ndarray  # [T, S] int32; 0 where absent
    present: np.ndarray  # [T, S] bool
    segment: np.ndarray  # [T] int32: 1, 2, ... in order; 0: an empty row
    examples: list[str]  # ids, in the order of the segments


class Packer:
    """Collects examples and gives packed tables: `add` as they fill up, `finish` the rest.

    Attributes (counts):
      examples: examples packed. rows: their rows. cut: examples longer than T, of which the first T rows were kept;
      cut_rows: the rows lost by that. dropped: examples of fewer than 2 rows, which predict nothing.
    """

    def __init__(self, rows: int):
        self.table_rows = rows
        self._window: list[Table] = []
        self._cells = 0  # of the tables in the window
        self._free: list[tuple[int, int]] = []  # (free rows, bin number), sorted
        self._bins: dict[int, list[Table]] = {}
        self._made = 0
        self.examples = self.rows = self.cut = self.cut_rows = self.dropped = 0

    def add(self, table: Table) -> list[Packed]:
        """Takes one example; gives the tables that are finished now."""
        length = len(table.tokens)
        if length < 2:
            self.dropped += 1
            return []
        if length > self.table_rows:
            self.cut += 1
            self.cut_rows += length - self.table_rows
            table = table._replace(
                tokens=table.tokens[: self.table_rows], present=table.present[: self.table_rows]
            )
        self.examples += 1
        self.rows += len(table.tokens)
        self._window.append(table)
        self._cells += table.tokens.size
        return (
            self._pack(OPEN_BINS)
            if len(self._window) >= WINDOW or self._cells >= WINDOW_CELLS
            else []
        )

    def finish(self) -> list[Packed]:
        """Gives all tables that are left."""
        return self._pack(0)

    def _pack(self, keep: int) -> list[Packed]:
        """Packs the window, longest first, each into the fullest table with room; keeps the `keep` emptiest tables."""
        for table in sorted(self._window, key=lambda t: -len(t.tokens)):
            need = len(table.tokens)
            place = bisect.bisect_left(self._free, (need, -1))
            if place < len(self._free):
                free, number = self._free.pop(place)
            else:
                free, number = self.table_rows, self._made
                self._bins[number] = []
                self._made += 1
            self._bins[number].append(table)
            bisect.insort(self._free, (free - need, number))
        self._window, self._cells = [], 0
        done = self._free[: max(len(self._free) - keep, 0)]
        self._free = self._free[len(done) :]
        return [
            self._join(self._bins.pop(number))
            for _, number in sorted(done, key=lambda item: item[1])
        ]

    def _join(self, tables: list[Table]) -> Packed:
        streams = tables[0].tokens.shape[1]
        tokens = np.zeros((self.table_rows, streams), np.int32)
        present = np.zeros((self.table_rows, streams), bool)
        segment = np.zeros(self.table_rows, np.int32)
        start = 0
        for number, table in enumerate(tables, 1):
            rows = slice(start, start + len(table.tokens))
            tokens[rows], present[rows], segment[rows] = table.tokens, table.present, number
            start = rows.stop
        return Packed(tokens, present, segment, [table.example for table in tables])
