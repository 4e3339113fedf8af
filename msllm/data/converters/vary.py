"""What is done to a table after its converter, whichever that was: streams chosen, exchanged, silence put in, pieces.

All draws depend on the example's id alone. Nothing changes the order inside a stream or moves a cell up.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from msllm.config import VaryConfig
from msllm.data.tables import Table


def draw(values: Sequence, what: str, example: str):
    """One of `values` for an example: the same in every run and order, another for each `what`."""
    return random.Random(f"{what} {example}").choice(values) if len(values) > 1 else values[0]


def select(table: Table, columns: Sequence[int]) -> Table:
    """The given streams of a table, in the given order."""
    return table._replace(tokens=table.tokens[:, columns], present=table.present[:, columns])


def permute(table: Table, columns: Sequence[int]) -> Table:
    """The contents of the given streams change places, at random."""
    order = list(range(table.tokens.shape[1]))
    drawn = list(columns)
    random.Random(f"permute {table.example}").shuffle(drawn)
    for column, source in zip(columns, drawn):
        order[column] = source
    return select(table, order)


def insert_silence(table: Table, vary: VaryConfig, silence_id: int) -> Table:
    """Puts in rows in which all streams are silent: `lead` rows at the beginning, and pauses before other rows.

    A stream that is absent above or below a pause is absent in it.
    """
    rows = len(table.tokens)
    extra = np.zeros(rows, np.int64)  # rows put in before each row
    if vary.pause_percent:
        generator = random.Random(f"pauses {table.example}")
        for row in range(1, rows):
            if generator.random() < vary.pause_percent / 100:
                extra[row] = generator.choice(vary.pause_rows)
    if rows:
        extra[0] = draw(vary.lead, "lead", table.example)
    if not extra.any():
        return table
    place = np.arange(rows) + np.cumsum(extra)  # where each row goes
    below = np.repeat(np.arange(rows), extra + 1)  # for every new row: the old row at or below it
    present = table.present[below] & table.present[np.maximum(below - 1, 0)]
    tokens = np.where(present, silence_id, 0).astype(np.int32)
    tokens[place], present[place] = table.tokens, table.present
    return table._replace(tokens=tokens, present=present)


def pieces(table: Table, rows: int) -> Iterator[Table]:
    """A long table in pieces of `rows` rows, each of which begins with the last row of the one before it.

    So every row but the first is predicted once. The ids of the pieces begin alike, so that all are held out or none.
    """
    if len(table.tokens) <= rows:
        yield table
        return
    for number, start in enumerate(range(0, len(table.tokens) - 1, rows - 1)):
        part = slice(start, start + rows)
        name = f"{table.example[:12]}{number:04x}"
        yield table._replace(tokens=table.tokens[part], present=table.present[part], example=name)
