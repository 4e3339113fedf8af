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
    weights: np.ndarray | None = None  # [T, S] float32, see `loss_weights`; None: 1 everywhere


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


def loss_weights(table: Table, placements: Sequence[Placement], weights: Sequence[float]) -> Table:
    """Returns a table in which placements have loss weights.

    The weight of a cell multiplies the loss of predicting this cell, beside the weight of its
    stream. A cell of weight 0 is not predicted, but other cells see it. The weight of a placement
    holds for its cells and for the cell after them, which ends it, unless another placement begins
    there.

    Args:
      table: the table of the placements.
      placements: as in `make_table`.
      weights: the weight of each placement.
    """
    if all(weight == 1 for weight in weights):
        return table
    array = np.ones(table.tokens.shape, np.float32)
    order = sorted(zip(placements, weights, strict=True), key=lambda pair: pair[0].start)
    for placement, weight in order:
        if len(placement.tokens):
            array[placement.start : placement.end + 1, placement.stream] = weight
    return table._replace(weights=array)


def check_weights(table: Table) -> Table:
    """Returns a table whose weights are float32, or None if all are 1.

    Raises ValueError, saying what the weights are instead, unless they are [T, S] numbers or a mask
    [T, S] bool, finite and not negative.
    """
    weights = table.weights
    if weights is None:
        return table
    if not isinstance(weights, np.ndarray) or weights.dtype.kind not in "bfiu":
        raise ValueError("weights that are no array of numbers or bool")
    if weights.shape != table.tokens.shape:
        raise ValueError(f"weights of shape {weights.shape} with tokens of {table.tokens.shape}")
    with np.errstate(over="ignore"):
        weights = weights.astype(np.float32)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        bad = weights[~(np.isfinite(weights) & (weights >= 0))][0]
        raise ValueError(f"the weight {bad}: must be finite and not negative")
    return table._replace(weights=None if (weights == 1).all() else weights)


def select_rows(table: Table, rows: slice) -> Table:
    """Returns some rows of a table."""
    return table._replace(
        tokens=table.tokens[rows],
        present=table.present[rows],
        weights=None if table.weights is None else table.weights[rows],
    )


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
    shifted = table._replace(tokens=tokens, present=present)
    if table.weights is None:
        return shifted
    weights = np.ones(tokens.shape, np.float32)
    for stream, delay in enumerate(delays):
        weights[delay : delay + rows, stream] = table.weights[:, stream]
    return shifted._replace(weights=weights)


def unshift(table: Table, delays: Sequence[int]) -> Table:
    """Undoes `shift`: [T + max(delays), S] -> [T, S]."""
    rows = len(table.tokens) - max(delays, default=0)
    columns = [(slice(delay, delay + rows), stream) for stream, delay in enumerate(delays)]

    def move(array: np.ndarray) -> np.ndarray:
        return np.stack([array[column] for column in columns], axis=1)

    weights = None if table.weights is None else move(table.weights)
    return Table(move(table.tokens), move(table.present), table.example, weights=weights)


def unpack(batch: Mapping[str, np.ndarray], examples: Sequence | None = None) -> list[Table]:
    """Returns the single examples of packed tables, in order.

    Args:
      batch: tokens [B, T, S] int32, present [B, T, S] bool, segment [B, T] int32, and weights
        [B, T, S] float32 if it has them. One packed table is without B in all of them.
      examples: B lists with the ids of each table's examples, in the order of their segments; one
        list for one packed table. None: the ids are empty.
    """
    names = ("tokens", "present", "segment", "weights")
    batch = {name: batch[name] for name in names if batch.get(name) is not None}
    if batch["tokens"].ndim == 2:
        batch = {name: array[None] for name, array in batch.items()}
        examples = None if examples is None else [examples]
    tables: list[Table] = []
    for b in range(len(batch["segment"])):
        table = {name: array[b] for name, array in batch.items()}
        tables += _unpack_one(table, None if examples is None else examples[b])
    return tables


def _unpack_one(table: Mapping[str, np.ndarray], names: Sequence[str] | None) -> Iterator[Table]:
    segment, weights = table["segment"], table.get("weights")
    for number in range(1, segment.max(initial=0) + 1):
        rows = segment == number
        yield Table(
            table["tokens"][rows],
            table["present"][rows],
            "" if names is None else names[number - 1],
            weights=None if weights is None else weights[rows],
        )
