"""Blockwise attention in plain XLA: O(L) memory, forward and backward, on any device.

The forward pass is an online softmax over blocks of keys. The backward pass recomputes the
attention weights from the saved log-sum-exp (FlashAttention, Dao et al. 2022, arXiv 2205.14135,
algorithms 1 and 4). A block of queries or keys is a range of rows with all their streams. A query
block skips the key blocks that it cannot reach (blocks.py), so packing and causality save time as
well as memory. Within a block the mask is `visible()`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from msllm.model.attention.backend import Backend, RingParts
from msllm.model.attention.blocks import Extents, all_earlier, share_rows, some_earlier
from msllm.streams import NEVER, Cells, Visibility

# The maximum number of cells of a block. Larger blocks keep a CPU core busy with larger products,
# but their scores must fit into its cache.
BLOCK_CELLS = 320
# The score of a pair that is not visible. It is finite, because for a query that has seen no key
# yet, an infinite score would give inf - inf. What such a query has summed up is later multiplied
# by exp(MASKED - score) = 0, at the latest when the query reaches its own cell.
MASKED = -1e30


def chunked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    *,
    block_cells: int = BLOCK_CELLS,
) -> jax.Array:
    """Computes `reference_attention` without holding an array [L, L].

    Args:
      q, k, v, visibility: as in `reference_attention`.
      block_cells: the maximum number of cells of a block.
    """
    return _attention(q, k, v, *_blocked(visibility, block_cells))


def forward_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    *,
    block_cells: int = BLOCK_CELLS,
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp over the keys of some streams; see `RingParts`."""
    out, lse, _ = _outputs(q, k, v, *_blocked(visibility.narrowed(), block_cells))
    lse = _unblock(lse.reshape(*out.shape[:-1], 1), (*q.shape[:-1], 1))
    return _unblock(out, q.shape), lse[..., 0]


def backward_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    block_cells: int = BLOCK_CELLS,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v through the keys of some streams; see `RingParts`."""
    visibility, q_rows, k_rows = _blocked(visibility.narrowed(), block_cells)
    out, lse = (_head_blocks(x, q_rows, k.shape[3]) for x in (out, lse[..., None]))
    lse = lse.reshape(*lse.shape[:3], -1, q_rows * q.shape[2])
    reach = _reach(visibility, q_rows, k_rows)
    return _backward(q_rows, k_rows, (q, k, v, visibility, out, lse, reach), d_out)[:3]


def _blocked(visibility: Visibility, block_cells: int) -> tuple[Visibility, int, int]:
    """Pads queries and keys with absent rows, so that all blocks are full.

    Padded queries have the number of the last row, so that their block reaches no more keys. Padded
    keys have a number beyond all rows, so that no query takes them for its own cell.

    Returns: the padded visibility, the rows of a block of queries, and those of a block of keys.
    """
    queries, keys = visibility.queries, visibility.keys
    (_, rows, q_streams), (_, key_rows, k_streams) = queries.present.shape, keys.seen.shape
    q_rows = _block_rows(rows, q_streams, block_cells)
    k_rows = _block_rows(key_rows, k_streams, block_cells)
    queries, keys = _pad_cells(queries, q_rows), _pad_cells(keys, k_rows)
    beyond = jnp.arange(keys.row.shape[1]) >= key_rows
    keys = keys._replace(row=jnp.where(beyond, NEVER - 1, keys.row))
    return visibility._replace(queries=queries, keys=keys), q_rows, k_rows


def _block_rows(rows: int, streams: int, block_cells: int) -> int:
    """The rows of a block of at most `block_cells` cells.

    This is a divisor of `rows` if there is one of at least half the limit. Otherwise the blocks are
    filled as evenly as possible. Rows that only pad the last block cost more than smaller blocks
    do: 12 % at 512 rows of 10 streams.
    """
    most = max(1, block_cells // streams)
    limit = min(most, rows)
    divisor = max(n for n in range(1, limit + 1) if rows % n == 0)
    if 2 * divisor >= limit:
        return divisor
    blocks = -(-rows // most)
    return -(-rows // blocks)


def _pad_rows(x: jax.Array, block_rows: int, mode: str = "constant") -> jax.Array:
    """Pads the rows of [B, T, ...] to a multiple of `block_rows`."""
    missing = -x.shape[1] % block_rows
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), mode=mode) if missing else x


def _pad_cells(cells: Cells, block_rows: int) -> Cells:
    row, segment = (_pad_rows(x, block_rows, "edge") for x in (cells.row, cells.segment))
    return Cells(
        row, segment, _pad_rows(cells.present, block_rows), _pad_rows(cells.seen, block_rows)
    )


def _blocks(x: jax.Array, block_rows: int) -> jax.Array:
    """[B, T, ...] -> [blocks, B, block_rows, ...]."""
    return x.reshape(x.shape[0], -1, block_rows, *x.shape[2:]).swapaxes(0, 1)


def _cell_blocks(cells: Cells, block_rows: int) -> Cells:
    return Cells(*(_blocks(x, block_rows) for x in cells))


def _head_blocks(x: jax.Array, block_rows: int, kv_heads: int) -> jax.Array:
    """[B, T, S, N, H] -> [blocks, B, K, (N / K) * block_rows * S, H].

    In this layout the batched matrix products need no transposes.
    """
    x = _pad_rows(x, block_rows)
    batch, rows, streams, heads, head_dim = x.shape
    x = x.reshape(
        batch, rows // block_rows, block_rows * streams, kv_heads, heads // kv_heads, head_dim
    )
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(rows // block_rows, batch, kv_heads, -1, head_dim)


def _unblock(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_head_blocks` on an array of shape `shape`; drops the padding."""
    batch, rows, streams, heads, head_dim = shape
    blocks, _, kv_heads, _, _ = x.shape
    x = x.reshape(blocks, batch, kv_heads, heads // kv_heads, -1, head_dim).transpose(
        1, 0, 4, 2, 3, 5
    )
    return x.reshape(batch, -1, streams, heads, head_dim)[:, :rows]


def _reach(
    visibility: Visibility, q_rows: int, k_rows: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the key blocks that each query block needs.

    Returns: (first, end, full). For each of nq query blocks, `first` is the first key block that it
      may see and `end` is the one past the last, [nq] int32 each. `full` [nq, nk] bool is True if
      every query of a block sees every key of another, so that no mask is needed.
    """
    lags = visibility.pair_lags()
    q_extents = _extents(visibility.queries, visibility.queries.present, q_rows)
    q = Extents(*(x[:, None] for x in q_extents))  # [nq, 1, B]
    k = _extents(visibility.keys, visibility.keys.seen, k_rows)  # [nk, B]
    some = jnp.any(some_earlier(q, k, lags.min()) | share_rows(q, k), axis=2)
    full = jnp.all(all_earlier(q, k, lags.max()), axis=2)
    first = jnp.argmax(some, axis=1)
    end = some.shape[1] - jnp.argmax(some[:, ::-1], axis=1)
    return first, jnp.where(some.any(1), end, first), full


def _extents(cells: Cells, used: jax.Array, block_rows: int) -> Extents:
    """Extents of all cells in each block, used or not, [blocks, B] each."""
    row, segment, used = (_blocks(x, block_rows) for x in (cells.row, cells.segment, used))
    return Extents(row.min(2), row.max(2), segment.min(2), segment.max(2), used.all((2, 3)))


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled scores [B, K, G, q, k] float32, MASKED where `mask` is False.

    q is [B, K, G * q, H], k is [B, K, k, H], where G = N / K.
    """
    scores = (
        jnp.einsum("bkqh,bkth->bkqt", q, k, preferred_element_type=jnp.float32)
        * q.shape[-1] ** -0.5
    )
    batch, kv_heads, _, keys = scores.shape
    return jnp.where(mask, scores.reshape(batch, kv_heads, -1, mask.shape[3], keys), MASKED)


def _at(x: Any, i: jax.Array) -> Any:
    """The i-th entry along the first axis of each leaf."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, 0, keepdims=False), x)


def _block_mask(visibility: Visibility, full: jax.Array) -> jax.Array:
    """The mask of a query block and a key block, [B, 1, 1, q_rows * Sq, k_rows * Sk] bool.

    Args:
      visibility: of the cells of these blocks.
      full: [] bool, all pairs are visible. The mask is then not computed.
    """
    batch, q_rows, q_size = visibility.queries.present.shape
    _, k_rows, k_size = visibility.keys.seen.shape
    shape = (batch, 1, 1, q_rows * q_size, k_rows * k_size)
    return lax.cond(full, lambda: jnp.ones(shape, bool), lambda: visibility.mask().reshape(shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility, q_rows: int, k_rows: int
) -> jax.Array:
    """The output [B, Tq, Sq, N, H]. The last three arguments are from `_blocked`."""
    return _forward(q, k, v, visibility, q_rows, k_rows)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility, q_rows: int, k_rows: int
) -> tuple[jax.Array, tuple[Any, ...]]:
    """The forward pass: the output, and the values that `_backward` needs."""
    saved = _outputs(q, k, v, visibility, q_rows, k_rows)
    out, lse, reach = (checkpoint_name(x, "attention") for x in saved)
    return _unblock(out, q.shape), (q, k, v, visibility, out, lse, reach)


def _outputs(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility, q_rows: int, k_rows: int
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Output [nq, B, K, G * q, H], log-sum-exp [nq, B, K, G, q], and `_reach`; G = N / K."""
    kv_heads = k.shape[3]
    groups = q.shape[3] // kv_heads
    reach = _reach(visibility, q_rows, k_rows)
    keys = (
        _head_blocks(k, k_rows, kv_heads),
        _head_blocks(v, k_rows, kv_heads),
        _cell_blocks(visibility.keys, k_rows),
    )

    def query_block(_, block):
        q_block, cells, first, end, full = block

        def key_block(j, carry):
            maximum, denominator, out = carry
            k_block, v_block, k_cells = _at(keys, j)
            pairs = visibility._replace(queries=cells, keys=k_cells)
            scores = _scores(q_block, k_block, _block_mask(pairs, full[j]))
            new_maximum = jnp.maximum(maximum, scores.max(-1))
            weights = jnp.exp(scores - new_maximum[..., None])
            rescale = jnp.exp(maximum - new_maximum)
            flat = weights.reshape(*q_block.shape[:3], -1).astype(v_block.dtype)
            product = jnp.einsum(
                "bkqt,bkth->bkqh", flat, v_block, preferred_element_type=jnp.float32
            )
            return (
                new_maximum,
                denominator * rescale + weights.sum(-1),
                out * rescale.reshape(*out.shape[:3], 1) + product,
            )

        stat = (q_block.shape[0], kv_heads, groups, q_block.shape[2] // groups)
        init = (jnp.full(stat, MASKED), jnp.zeros(stat), jnp.zeros(q_block.shape, jnp.float32))
        maximum, denominator, out = lax.fori_loop(first, end, key_block, init)
        out = (out / denominator.reshape(*out.shape[:3], 1)).astype(q.dtype)
        return None, (out, maximum + jnp.log(denominator))

    q_blocks, q_cells = _head_blocks(q, q_rows, kv_heads), _cell_blocks(visibility.queries, q_rows)
    _, (out, lse) = lax.scan(query_block, None, (q_blocks, q_cells, *reach))
    return out, lse, reach


def _backward(
    q_rows: int, k_rows: int, saved: tuple[Any, ...], d_out: jax.Array
) -> tuple[Any, ...]:
    """Gradients of q, k and v, and None for the visibility."""
    q, k, v, visibility, out, lse, reach = saved
    kv_heads, head_dim = k.shape[3:]
    keys = (
        _head_blocks(k, k_rows, kv_heads),
        _head_blocks(v, k_rows, kv_heads),
        _cell_blocks(visibility.keys, k_rows),
    )
    q_blocks, d_out = _head_blocks(q, q_rows, kv_heads), _head_blocks(d_out, q_rows, kv_heads)
    # The softmax's gradient has a term that all keys of a query share: the sum over the keys of
    # weights * d_weights, which equals the sum over H of out * d_out.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1).reshape(lse.shape)

    def query_block(d_kv, block):
        q_block, q_t, cells, lse, delta, d_out, d_out_t, first, end, full = block

        def key_block(j, carry):
            d_q, d_keys, d_values = carry
            k_block, v_block, k_cells = _at(keys, j)
            pairs = visibility._replace(queries=cells, keys=k_cells)
            scores = _scores(q_block, k_block, _block_mask(pairs, full[j]))
            weights = jnp.exp(scores - lse[..., None])
            d_weights = jnp.einsum(
                "bkqh,bkth->bkqt", d_out, v_block, preferred_element_type=jnp.float32
            )
            d_scores = (
                weights * (d_weights.reshape(weights.shape) - delta[..., None]) * head_dim**-0.5
            )
            d_scores = d_scores.reshape(d_weights.shape).astype(q.dtype)
            weights = weights.reshape(d_weights.shape).astype(q.dtype)
            d_v = jnp.einsum(
                "bkhq,bkqt->bkht", d_out_t, weights, preferred_element_type=jnp.float32
            )
            d_k = jnp.einsum("bkhq,bkqt->bkht", q_t, d_scores, preferred_element_type=jnp.float32)
            d_q += jnp.einsum(
                "bkqt,bkth->bkqh", d_scores, k_block, preferred_element_type=jnp.float32
            )

            def add(sums: jax.Array, x: jax.Array) -> jax.Array:
                return lax.dynamic_update_index_in_dim(sums, _at(sums, j) + x, j, 0)

            return d_q, add(d_keys, d_k), add(d_values, d_v)

        d_q, *d_kv = lax.fori_loop(
            first, end, key_block, (jnp.zeros(q_block.shape, jnp.float32), *d_kv)
        )
        return tuple(d_kv), d_q.astype(q.dtype)

    # The gradients of keys and values are computed transposed, from transposed q and d_out.
    # Otherwise XLA:CPU would transpose the much larger weights and scores in memory.
    def flip(x: jax.Array) -> jax.Array:
        return x.swapaxes(3, 4)

    zeros = jnp.zeros(flip(keys[0]).shape, jnp.float32)
    q_cells = _cell_blocks(visibility.queries, q_rows)
    blocks = (q_blocks, flip(q_blocks), q_cells, lse, delta, d_out, flip(d_out), *reach)
    (d_k, d_v), d_q = lax.scan(query_block, (zeros, zeros), blocks)
    d_k, d_v = flip(d_k), flip(d_v)
    return (
        _unblock(d_q, q.shape),
        _unblock(d_k, k.shape).astype(k.dtype),
        _unblock(d_v, v.shape).astype(v.dtype),
        None,
    )


_attention.defvjp(_forward, _backward)

BACKEND = Backend(
    "chunked",
    chunked_attention,
    RingParts(forward_part, backward_part),
    any_cells=True,
    traced_lag=True,
)
