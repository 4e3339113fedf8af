"""Which pairs of blocks of queries and keys hold anything to compute.

For kernels that see the cells of a table as one axis, row after row and all streams of a row
together: L = T * S cells, cut into blocks of equal length. The map follows from the lowest and
highest row and segment of each block. It never skips a block that is needed, and never calls a
block full that needs a mask. It costs O((L / block)^2) and is computed for each table at run time,
so the blocks between packed examples are skipped.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from msllm.streams import NEVER, Array

EMPTY, PARTIAL, FULL = 0, 1, 2


class FlatCells(NamedTuple):
    """Cells of tables along one axis; L is a multiple of the block length."""

    row: jax.Array  # [L] int32, ascending
    segment: jax.Array  # [B, L] int32
    here: jax.Array  # [B, L] bool: a query that is present, or a key that others may see


def flatten(row: jax.Array, segment: jax.Array, here: jax.Array, length: int) -> FlatCells:
    """Cells of row [T], segment [B, T] and here [B, T, S] along one axis of `length` >= T * S.

    The cells that are added are not here.
    """
    batch, rows, streams = here.shape
    fill = ((0, 0), (0, length - rows * streams))
    row = jnp.pad(jnp.repeat(row, streams), fill[1:], mode="edge")
    return FlatCells(
        row,
        jnp.pad(jnp.repeat(segment, streams, axis=1), fill),
        jnp.pad(here.reshape(batch, -1), fill),
    )


def block_map(
    queries: FlatCells,
    keys: FlatCells,
    least: int | Array,
    most: int | Array,
    q_block: int,
    k_block: int,
) -> jax.Array:
    """Which blocks hold pairs that `visible()` admits by a lag.

    Pairs of a cell and itself are left to the caller.

    Args:
      least, most: the smallest and the largest lag between the streams of the queries and those of
        the keys.
      q_block, k_block: cells of a block of queries and of keys.

    Returns: [B, query blocks, key blocks] int8: EMPTY where no query sees an earlier key, FULL
      where each query sees all keys, else PARTIAL.
    """
    q_row, q_segment, q_all = _extents(queries, q_block)
    k_row, k_segment, k_all = _extents(keys, k_block)
    q_row, q_segment, q_all = ([x[:, :, None] for x in pair] for pair in (q_row, q_segment, q_all))
    k_row, k_segment, k_all = ([x[:, None] for x in pair] for pair in (k_row, k_segment, k_all))
    (q_low, q_high), (k_low, k_high) = q_row, k_row
    (q_first, q_last), (k_first, k_last) = q_segment, k_segment
    some = (k_low <= q_high - least) & (k_first <= q_last) & (q_first <= k_last)
    one_segment = (q_first == q_last) & (k_first == k_last) & (q_first == k_first)
    full = (k_high <= q_low - most) & one_segment & q_all[0] & k_all[0]
    return jnp.where(full, FULL, jnp.where(some, PARTIAL, EMPTY)).astype(jnp.int8)


def _extents(cells: FlatCells, block: int) -> tuple[tuple[jax.Array, ...], ...]:
    """Extents of the cells that are here in each block, [B, blocks] each.

    Returns: ((lowest, highest row), (lowest, highest segment), (all cells are here,)).
    """
    batch, length = cells.here.shape

    def blocks(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (batch, length)).reshape(batch, length // block, block)

    here = blocks(cells.here)

    # In a block without such cells, the lowest row is above all rows and the highest below all.
    def low(x: jax.Array) -> jax.Array:
        return jnp.where(here, blocks(x), NEVER).min(2)

    def high(x: jax.Array) -> jax.Array:
        return jnp.where(here, blocks(x), -NEVER).max(2)

    return (
        (low(cells.row), high(cells.row)),
        (low(cells.segment), high(cells.segment)),
        (here.all(2),),
    )
