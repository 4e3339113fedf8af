"""Variations of the tables of any converter.

These functions select or exchange streams, insert silence and cut long tables to pieces. All draws
depend on the example's id alone. No function changes the order within a stream or moves a cell up.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from msllm.config import VaryConfig
from msllm.data.tables import Table, select_rows

_Value = TypeVar("_Value")


def draw(values: Sequence[_Value], what: str, example: str) -> _Value:
    """Draws one of `values` for an example, the same in every run and for any order of examples.

    Args:
      values: the values to draw from.
      what: the name of the draw. Draws with different names are independent.
      example: the example's id.
    """
    return random.Random(f"{what} {example}").choice(values) if len(values) > 1 else values[0]


def select(table: Table, columns: Sequence[int]) -> Table:
    """Returns the given streams of a table, in the given order."""
    return table._replace(
        tokens=table.tokens[:, columns],
        present=table.present[:, columns],
        weights=None if table.weights is None else table.weights[:, columns],
    )


def permute(table: Table, columns: Sequence[int]) -> Table:
    """Permutes the contents of the given streams at random."""
    order = list(range(table.tokens.shape[1]))
    drawn = list(columns)
    random.Random(f"permute {table.example}").shuffle(drawn)
    for column, source in zip(columns, drawn):
        order[column] = source
    return select(table, order)


def insert_silence(table: Table, vary: VaryConfig, silence_id: int) -> Table:
    """Inserts rows in which all streams are silent: `vary.lead` rows at the beginning, and pauses.

    A stream that is absent in the row above or below a pause is absent in the pause. The loss
    weight of a pause is that of the cells above and below it if these are equal, otherwise 1.
    """
    rows = len(table.tokens)
    inserted = _count_inserted(rows, vary, table.example)
    if not inserted.any():
        return table
    place = np.arange(rows) + np.cumsum(inserted)  # where each row goes
    below = np.repeat(np.arange(rows), inserted + 1)  # the old row at or below each new row
    present = table.present[below] & table.present[np.maximum(below - 1, 0)]
    tokens = np.where(present, silence_id, 0).astype(np.int32)
    tokens[place], present[place] = table.tokens, table.present
    weights = None
    if table.weights is not None:
        above = np.concatenate([np.full_like(table.weights[:1], np.nan), table.weights])[below]
        weights = np.where(above == table.weights[below], above, np.float32(1))
        weights[place] = table.weights
    return table._replace(tokens=tokens, present=present, weights=weights)


def _count_inserted(rows: int, vary: VaryConfig, example: str) -> np.ndarray:
    """Returns the number of silent rows to insert before each row, [T] int64."""
    inserted = np.zeros(rows, np.int64)
    if vary.pause_percent:
        generator = random.Random(f"pauses {example}")
        for row in range(1, rows):
            if generator.random() < vary.pause_percent / 100:
                inserted[row] = generator.choice(vary.pause_rows)
    if rows:
        inserted[0] = draw(vary.lead, "lead", example)
    return inserted


def pieces(table: Table, rows: int) -> Iterator[Table]:
    """Cuts a long table to pieces of `rows` rows that overlap by one row.

    The overlap makes the model predict every row but the first exactly once. The ids of the pieces
    have the same beginning, so that either all pieces are held out or none.
    """
    if len(table.tokens) <= rows:
        yield table
        return
    for number, start in enumerate(range(0, len(table.tokens) - 1, rows - 1)):
        part = slice(start, start + rows)
        name = f"{table.example[:12]}{number:04x}"
        yield select_rows(table, part)._replace(example=name)
