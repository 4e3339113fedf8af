"""Which blocks of queries and keys have anything to compute, from the lowest and highest row and segment of each block.

For kernels that see the cells of a table as one axis, row after row, all streams of a row together: L = T * S cells,
cut into blocks of equal length. The map is conservative in what it skips and exact in what it calls full, costs
O((L / block)^2) and is computed per table at run time: packed examples skip the blocks between them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from msllm.streams import NEVER

EMPTY, PARTIAL, FULL = 0, 1, 2


class FlatCells(NamedTuple):
    """Cells of tables along one axis; L a multiple of the block length."""

    row: jax.Array  # [L] int32, ascending
    segment: jax.Array  # [B, L] int32
    here: jax.Array  # [B, L] bool: a query that is present, or a key that others may see


def flatten(row, segment, here, length: int) -> FlatCells:
    """The cells of row [T], segment [B, T] and here [B, T, S] as `length` >= T * S cells; those added are not here."""
    batch, rows, streams = here.shape
    fill = ((0, 0), (0, length - rows * streams))
    row = jnp.pad(jnp.repeat(row, streams), fill[1:], mode="edge")
    return FlatCells(
        row,
        jnp.pad(jnp.repeat(segment, streams, axis=1), fill),
        jnp.pad(here.reshape(batch, -1), fill),
    )


def block_map(queries: FlatCells, keys: FlatCells, least, most, q_block: int, k_block: int):
    """[B, query blocks, key blocks] int8: EMPTY where no query sees an earlier key, FULL where each sees all of them.

    "Earlier" is the rule without "a cell sees itself": in `visible()`, the pairs of a lag and not of one cell.

    Args:
      least, most: the smallest and the largest lag between the streams of the queries and those of the keys.
    """
    q_row, q_segment, q_all = _extent(queries, q_block)
    k_row, k_segment, k_all = _extent(keys, k_block)
    q_row, q_segment, q_all = ([x[:, :, None] for x in pair] for pair in (q_row, q_segment, q_all))
    k_row, k_segment, k_all = ([x[:, None] for x in pair] for pair in (k_row, k_segment, k_all))
    (q_low, q_high), (k_low, k_high) = q_row, k_row
    (q_first, q_last), (k_first, k_last) = q_segment, k_segment
    some = (k_low <= q_high - least) & (k_first <= q_last) & (q_first <= k_last)
    one_segment = (q_first == q_last) & (k_first == k_last) & (q_first == k_first)
    full = (k_high <= q_low - most) & one_segment & q_all[0] & k_all[0]
    return jnp.where(full, FULL, jnp.where(some, PARTIAL, EMPTY)).astype(jnp.int8)


def _extent(cells: FlatCells, block: int):
    """By block, [B, blocks] each: (lowest, highest) row of the cells that are here; of their segments; (all here,)."""
    batch, length = cells.here.shape

    def blocks(x):
        return jnp.broadcast_to(x, (batch, length)).reshape(batch, length // block, block)

    here = blocks(cells.here)

    # A block without such a cell is lower than nothing and higher than nothing.
    def low(x):
        return jnp.where(here, blocks(x), NEVER).min(2)

    def high(x):
        return jnp.where(here, blocks(x), -NEVER).max(2)

    return (
        (low(cells.row), high(cells.row)),
        (low(cells.segment), high(cells.segment)),
        (here.all(2),),
    )
