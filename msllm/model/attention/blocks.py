"""Decides which pairs of a query block and a key block have anything to compute.

The decision follows from the lowest and highest row and segment of each block (`Extents`). It never
skips a pair of blocks that is needed, and never omits a mask that is needed. It is made for each
table at run time, so that backends also skip the blocks between packed examples.

`block_map` does this for kernels that see the cells of a table as one axis of L = T * S cells, row
after row, in blocks of equal length. The map takes O((L / block)^2) operations and memory.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from msllm.streams import NEVER, Array

EMPTY, PARTIAL, FULL = 0, 1, 2


class Extents(NamedTuple):
    """Bounds on the rows and segments of blocks of cells.

    The functions below take the extents of queries and of keys, which must broadcast together.
    """

    row_low: jax.Array
    row_high: jax.Array
    segment_low: jax.Array
    segment_high: jax.Array
    all_used: jax.Array  # bool: all queries of the block are present, or all keys are seen


def some_earlier(queries: Extents, keys: Extents, least_lag: int | Array) -> jax.Array:
    """False where no query of a block sees an earlier key of another block."""
    return (
        (keys.row_low <= queries.row_high - least_lag)
        & (keys.segment_low <= queries.segment_high)
        & (queries.segment_low <= keys.segment_high)
    )


def share_rows(queries: Extents, keys: Extents) -> jax.Array:
    """False where no cell of a query block is also in the key block."""
    return (keys.row_low <= queries.row_high) & (queries.row_low <= keys.row_high)


def all_earlier(queries: Extents, keys: Extents, most_lag: int | Array) -> jax.Array:
    """True where each query of a block sees every key of another block, without a mask."""
    one_segment = (
        (queries.segment_low == queries.segment_high)
        & (keys.segment_low == keys.segment_high)
        & (queries.segment_low == keys.segment_low)
    )
    earlier = keys.row_high <= queries.row_low - most_lag
    return earlier & one_segment & queries.all_used & keys.all_used


class FlatCells(NamedTuple):
    """Cells of tables along one axis; L is a multiple of the block length."""

    row: jax.Array  # [L] int32, ascending
    segment: jax.Array  # [B, L] int32
    used: jax.Array  # [B, L] bool: the query is present, or other cells may see the key


def flatten(row: jax.Array, segment: jax.Array, used: jax.Array, length: int) -> FlatCells:
    """Puts cells on one axis and pads it with unused cells.

    Args:
      row: [T] int32.
      segment: [B, T] int32.
      used: [B, T, S] bool.
      length: the length of the axis, at least T * S.
    """
    batch, rows, streams = used.shape
    padding = ((0, 0), (0, length - rows * streams))
    return FlatCells(
        jnp.pad(jnp.repeat(row, streams), padding[1:], mode="edge"),
        jnp.pad(jnp.repeat(segment, streams, axis=1), padding),
        jnp.pad(used.reshape(batch, -1), padding),
    )


def block_map(
    queries: FlatCells,
    keys: FlatCells,
    least_lag: int | Array,
    most_lag: int | Array,
    q_block: int,
    k_block: int,
) -> jax.Array:
    """Classifies the pairs of blocks by the earlier keys that the queries see.

    The caller handles the pairs of a cell and itself.

    Args:
      queries, keys: from `flatten`.
      least_lag, most_lag: the smallest and the largest lag between the streams of the queries and
        those of the keys.
      q_block, k_block: the cells of a block of queries and of a block of keys.

    Returns: [B, query blocks, key blocks] int8. EMPTY: no query sees an earlier key. FULL: each
      query sees all keys. PARTIAL: anything else.
    """
    q = Extents(*(x[:, :, None] for x in _extents(queries, q_block)))
    k = Extents(*(x[:, None, :] for x in _extents(keys, k_block)))
    some, full = some_earlier(q, k, least_lag), all_earlier(q, k, most_lag)
    return jnp.where(full, FULL, jnp.where(some, PARTIAL, EMPTY)).astype(jnp.int8)


def _extents(cells: FlatCells, block: int) -> Extents:
    """Extents of the used cells in each block, [B, blocks] each."""
    batch, length = cells.used.shape

    def blocks(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (batch, length)).reshape(batch, length // block, block)

    used = blocks(cells.used)

    # In a block without used cells, `low` is above all rows and `high` is below all rows.
    def low(x: jax.Array) -> jax.Array:
        return jnp.where(used, blocks(x), NEVER).min(2)

    def high(x: jax.Array) -> jax.Array:
        return jnp.where(used, blocks(x), -NEVER).max(2)

    return Extents(
        low(cells.row), high(cells.row), low(cells.segment), high(cells.segment), used.all(2)
    )
