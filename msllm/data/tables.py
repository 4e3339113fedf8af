"""Tables: one example as cells [T, S], how text is placed in one, and how packed tables are taken apart again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Table(NamedTuple):
    """One example, or several packed ones."""

    tokens: np.ndarray  # [T, S] int32; 0 where absent
    present: np.ndarray  # [T, S] bool: False where the cell is absent
    example: str = ""  # id of the example: example_hash of what it was made from
    source: str = ""  # "file:line" of the record it was made from


class Placement(NamedTuple):
    """Tokens of one stream, one a row, from row `start` on."""

    stream: int
    start: int
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        """The row after the last token."""
        return self.start + len(self.tokens)


def example_hash(key: str) -> str:
    """16 hex digits that name the example made from `key`: the same in every run, order and layout."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def held_out(example: str, percent: float) -> bool:
    """Whether an example belongs to the held-out `percent` of all, by its id alone."""
    return int(example, 16) < percent / 100 * 16 ** len(example)


def make_table(
    placements: Sequence[Placement], rows: int, streams: int, silence_id: int, example: str = ""
) -> Table:
    """The table [rows, streams] of placements; every other cell is silence, none is absent."""
    tokens = np.full((rows, streams), silence_id, np.int32)
    for placement in placements:
        tokens[placement.start : placement.end, placement.stream] = placement.tokens
    return Table(tokens, np.ones((rows, streams), bool), example)


def shift(table: Table, delays: Sequence[int]) -> Table:
    """Moves stream s down by delays[s] rows. [T, S] -> [T + max(delays), S], so that no cell is lost.

    The new cells are absent: above a stream (it has not begun) and, up to the end of the longest, below it (it has
    ended).
    """
    rows, longest = len(table.tokens), max(delays, default=0)
    if longest == 0:
        return table
    tokens = np.zeros((rows + longest, len(delays)), np.int32)
    present = np.zeros(tokens.shape, bool)
    for stream, delay in enumerate(delays):
        tokens[delay : delay + rows, stream] = table.tokens[:, stream]
        present[delay : delay + rows, stream] = table.present[:, stream]
    return table._replace(tokens=tokens, present=present)


def unshift(table: Table, delays: Sequence[int]) -> Table:
    """Undoes `shift`: [T + max(delays), S] -> [T, S]."""
    rows = len(table.tokens) - max(delays, default=0)
    columns = [slice(delay, delay + rows) for delay in delays]
    tokens = np.stack([table.tokens[rows, s] for s, rows in enumerate(columns)], axis=1)
    present = np.stack([table.present[rows, s] for s, rows in enumerate(columns)], axis=1)
    return Table(tokens, present, table.example)


def unpack(batch: Mapping[str, np.ndarray], examples: Sequence | None = None) -> list[Table]:
    """The single examples of packed tables, in order.

    Args:
      batch: tokens [B, T, S] int32, present [B, T, S] bool, segment [B, T] int32; or one table without B.
      examples: the example ids of each table, in the order of their segments ([B] lists; one list without B).
    """
    if batch["tokens"].ndim == 2:
        batch = {name: batch[name][None] for name in ("tokens", "present", "segment")}
        examples = None if examples is None else [examples]
    tables = []
    for b, segment in enumerate(batch["segment"]):
        for number in range(1, segment.max(initial=0) + 1):
            rows = segment == number
            name = "" if examples is None else examples[b][number - 1]
            tables.append(Table(batch["tokens"][b][rows], batch["present"][b][rows], name))
    return tables
