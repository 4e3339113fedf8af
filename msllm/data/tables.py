"""Tables: the cells [T, S] of one example, placing text in them, and unpacking packed tables."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Table(NamedTuple):
    """One example, or several packed examples."""

    tokens: np.ndarray  # [T, S] int32; 0 where absent
    present: np.ndarray  # [T, S] bool: False where the cell is absent
    example: str = ""  # id of the example, see example_hash
    source: str = ""  # "file:line" of the record that the example was made from


class Placement(NamedTuple):
    """Tokens placed in one stream, one per row, from row `start` on."""

    stream: int
    start: int
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        """The row after the last token."""
        return self.start + len(self.tokens)


def example_hash(key: str) -> str:
    """Returns the id of the example made from `key`: 16 hex digits.

    It is the same in every run, for any order of the examples and any layout.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def held_out(example: str, percent: float) -> bool:
    """Returns whether an example is among the `percent` held out. It depends on the id alone."""
    return int(example, 16) < percent / 100 * 16 ** len(example)


def make_table(
    placements: Sequence[Placement], rows: int, streams: int, silence_id: int, example: str = ""
) -> Table:
    """Returns the table [rows, streams] of placements. All other cells are silence."""
    tokens = np.full((rows, streams), silence_id, np.int32)
    for placement in placements:
        tokens[placement.start : placement.end, placement.stream] = placement.tokens
    return Table(tokens, np.ones((rows, streams), bool), example)


def shift(table: Table, delays: Sequence[int]) -> Table:
    """Moves stream s down by delays[s] rows: [T, S] -> [T + max(delays), S]. No cell is lost.

    The new cells above and below each stream are absent.
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
    columns = [(slice(delay, delay + rows), stream) for stream, delay in enumerate(delays)]
    tokens = np.stack([table.tokens[column] for column in columns], axis=1)
    present = np.stack([table.present[column] for column in columns], axis=1)
    return Table(tokens, present, table.example)


def unpack(batch: Mapping[str, np.ndarray], examples: Sequence | None = None) -> list[Table]:
    """Returns the single examples of packed tables, in order.

    Args:
      batch: tokens [B, T, S] int32, present [B, T, S] bool, segment [B, T] int32. One packed table
        is without B in all three.
      examples: B lists with the ids of each table's examples, in the order of their segments; one
        list for one packed table. None: the ids are empty.
    """
    if batch["tokens"].ndim == 2:
        batch = {name: batch[name][None] for name in ("tokens", "present", "segment")}
        examples = None if examples is None else [examples]
    tables: list[Table] = []
    for b, segment in enumerate(batch["segment"]):
        names = None if examples is None else examples[b]
        tables += _unpack_one(batch["tokens"][b], batch["present"][b], segment, names)
    return tables


def _unpack_one(
    tokens: np.ndarray, present: np.ndarray, segment: np.ndarray, names: Sequence[str] | None
) -> Iterator[Table]:
    for number in range(1, segment.max(initial=0) + 1):
        rows = segment == number
        yield Table(tokens[rows], present[rows], "" if names is None else names[number - 1])
