"""Blockwise attention in plain XLA: O(L) memory, forward and backward, on any device.

Online softmax over key blocks with the backward pass recomputed from the saved log-sum-exp (FlashAttention, Dao et al.
2022, arXiv 2205.14135, algorithms 1 and 4). A block of queries or keys is a range of rows, all streams of it. From the
lowest and highest row and segment of each block follows which key blocks a query block may reach: the others are never
computed, so packing and row-causality save time, not only memory. Within a block the mask is `visible()`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from msllm.streams import NEVER, Cells, visible_between

BLOCK_CELLS = 320  # at most, in a block: matrix products large enough for a CPU core, scores small enough for its cache
# Score of a pair that is not visible. Finite: a query that has seen no key yet must not give inf - inf. What it adds up
# meanwhile is multiplied by exp(MASKED - score) = 0 at the latest when it comes to itself.
MASKED = -1e30


def chunked_attention(
    q, k, v, q_cells: Cells, k_cells: Cells, lag, q_streams, block_cells: int = BLOCK_CELLS
):
    """As `reference_attention`, without ever holding [L, L]. Same arguments; `block_cells`: at most, in a block."""
    return _attention(
        q, k, v, (jnp.asarray(lag), q_streams, 0), *_cut(q, k, q_cells, k_cells, block_cells)
    )


def forward_part(
    q, k, v, q_cells: Cells, k_cells: Cells, lag, q_streams, k_start, block_cells: int = BLOCK_CELLS
):
    """Output, and log-sum-exp [B, T, Sq, N], over keys of some streams only, from `k_start` on (ring.py)."""
    rule, cut = _rule_of_part(k, lag, q_streams, k_start), _cut(q, k, q_cells, k_cells, block_cells)
    out, lse, _ = _outputs(q, k, v, rule, *cut)
    return _unblock(out, q.shape), _unblock(lse.reshape(*out.shape[:-1], 1), (*q.shape[:-1], 1))[
        ..., 0
    ]


def backward_part(
    q,
    k,
    v,
    q_cells,
    k_cells,
    lag,
    q_streams,
    k_start,
    out,
    lse,
    d_out,
    block_cells: int = BLOCK_CELLS,
):
    """Gradients of q, k and v through these keys, given output and log-sum-exp over all keys."""
    rule, (*cells, q_rows, k_rows) = (
        _rule_of_part(k, lag, q_streams, k_start),
        _cut(q, k, q_cells, k_cells, block_cells),
    )
    out, lse = (_head_blocks(x, q_rows, k.shape[3]) for x in (out, lse[..., None]))
    lse, reach = (
        lse.reshape(*lse.shape[:3], -1, q_rows * q.shape[2]),
        _reach(*cells, rule, q_rows, k_rows),
    )
    return _backward(q_rows, k_rows, (q, k, v, rule, *cells, out, lse, reach), d_out)[:3]


def _rule_of_part(k, lag, q_streams, k_start):
    k_start = q_streams[0] if k_start is None else k_start
    return (
        lax.dynamic_slice_in_dim(jnp.asarray(lag), k_start, k.shape[2], axis=1),
        q_streams,
        k_start,
    )


def _cut(q, k, q_cells: Cells, k_cells: Cells, block_cells: int):
    """The cells in whole blocks, and the rows of a block of queries and of keys."""
    q_rows, k_rows = (
        _block_rows(q.shape[1], q.shape[2], block_cells),
        _block_rows(k.shape[1], k.shape[2], block_cells),
    )
    # Rows that fill up the last block: absent, and where they do not widen the reach of their block. Queries repeat the
    # last row (their output is cut off); keys lie beyond all rows, so that nobody takes them for itself.
    q_cells, k_cells = _pad_cells(q_cells, q_rows), _pad_cells(k_cells, k_rows)
    beyond = jnp.arange(k_cells.row.shape[1]) >= k.shape[1]
    return q_cells, k_cells._replace(row=jnp.where(beyond, NEVER - 1, k_cells.row)), q_rows, k_rows


def _block_rows(rows: int, streams: int, block_cells: int) -> int:
    """Rows of a block: a divisor of `rows` if one comes near `block_cells`, else blocks as evenly filled as they can be."""
    most = max(1, block_cells // streams)
    divisor = max(n for n in range(1, min(most, rows) + 1) if rows % n == 0)
    if 2 * divisor >= min(most, rows):
        return divisor  # rows that fill up the last block cost more than smaller blocks: 12 % at 512 rows of 10 streams
    return -(-rows // -(-rows // most))


def _pad_rows(x, block_rows: int, mode: str = "constant"):
    missing = -x.shape[1] % block_rows
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2), mode=mode) if missing else x


def _pad_cells(cells: Cells, block_rows: int) -> Cells:
    row, segment = (_pad_rows(x, block_rows, "edge") for x in (cells.row, cells.segment))
    return Cells(
        row, segment, _pad_rows(cells.present, block_rows), _pad_rows(cells.seen, block_rows)
    )


def _blocks(x, block_rows: int):
    """[B, T, ...] -> [blocks, B, block_rows, ...]."""
    return x.reshape(x.shape[0], -1, block_rows, *x.shape[2:]).swapaxes(0, 1)


def _head_blocks(x, block_rows: int, kv_heads: int):
    """[B, T, S, N, H] -> [blocks, B, K, (N / K) * block_rows * S, H]: batched matrix products without transposes."""
    x = _pad_rows(x, block_rows)
    batch, rows, streams, heads, head_dim = x.shape
    x = x.reshape(
        batch, rows // block_rows, block_rows * streams, kv_heads, heads // kv_heads, head_dim
    )
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(rows // block_rows, batch, kv_heads, -1, head_dim)


def _unblock(x, shape):
    """Inverse of `_head_blocks`, without the rows that filled up the last block."""
    batch, rows, streams, heads, head_dim = shape
    blocks, _, kv_heads, _, _ = x.shape
    x = x.reshape(blocks, batch, kv_heads, heads // kv_heads, -1, head_dim).transpose(
        1, 0, 4, 2, 3, 5
    )
    return x.reshape(batch, -1, streams, heads, head_dim)[:, :rows]


def _reach(q_cells: Cells, k_cells: Cells, rule, q_rows: int, k_rows: int):
    """For each query block: the first and one past the last key block it may see, [nq] each, and per pair of blocks
    whether every query sees every key, [nq, nk]: then the mask need not be computed."""
    lags = rule[0][rule[1]]

    def low(x, rows):
        return _blocks(x, rows).min(2)

    def high(x, rows):
        return _blocks(x, rows).max(2)

    q_low, q_high = low(q_cells.row, q_rows)[:, None], high(q_cells.row, q_rows)[:, None]
    k_low, k_high = low(k_cells.row, k_rows), high(k_cells.row, k_rows)
    q_seg_low, q_seg_high = (
        low(q_cells.segment, q_rows)[:, None],
        high(q_cells.segment, q_rows)[:, None],
    )
    k_seg_low, k_seg_high = low(k_cells.segment, k_rows), high(k_cells.segment, k_rows)

    earlier = (k_low <= q_high - lags.min()) & (k_seg_low <= q_seg_high) & (q_seg_low <= k_seg_high)
    itself = (k_low <= q_high) & (q_low <= k_high)
    some = jnp.any(earlier | itself, axis=2)
    first = jnp.argmax(some, axis=1)
    end = some.shape[1] - jnp.argmax(some[:, ::-1], axis=1)

    def all_of(x, rows):
        return _blocks(x.all(2), rows).all(2)

    full = (k_high <= q_low - lags.max()) & (q_seg_low == q_seg_high) & (q_seg_low == k_seg_low)
    full &= (
        (q_seg_low == k_seg_high)
        & all_of(q_cells.present, q_rows)[:, None]
        & all_of(k_cells.seen, k_rows)
    )
    return first, jnp.where(some.any(1), end, first), full.all(2)


def _block_mask(q_cells: Cells, k_cells: Cells, rule):
    """`visible()` for one block of queries and one of keys: [B, 1, 1, q_rows * Sq, k_rows * S] bool."""
    mask = visible_between(q_cells, k_cells, *rule)
    batch, q_rows, q_size, k_rows, k_size = mask.shape
    return mask.reshape(batch, 1, 1, q_rows * q_size, k_rows * k_size)


def _scores(q, k, mask):
    """Masked, scaled float32 scores [B, K, G, q, k] of q [B, K, G*q, H] and k [B, K, k, H]."""
    scores = (
        jnp.einsum("bkqh,bkth->bkqt", q, k, preferred_element_type=jnp.float32)
        * q.shape[-1] ** -0.5
    )
    batch, kv_heads, _, keys = scores.shape
    return jnp.where(mask, scores.reshape(batch, kv_heads, -1, mask.shape[3], keys), MASKED)


def _at(x, i):
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, 0, keepdims=False), x)


def _mask_of(pair_is_full, q_cells, k_cells, rule):
    def all_visible():
        (batch, q_rows, q_size), (_, k_rows, k_size) = q_cells.present.shape, k_cells.seen.shape
        return jnp.ones((batch, 1, 1, q_rows * q_size, k_rows * k_size), bool)

    return lax.cond(pair_is_full, all_visible, lambda: _block_mask(q_cells, k_cells, rule))


# `rule`: what `visible_between` is told besides the cells, (lag [S, Sk], q_streams, k_start).
@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q, k, v, rule, q_cells, k_cells, q_rows: int, k_rows: int):
    return _forward(q, k, v, rule, q_cells, k_cells, q_rows, k_rows)[0]


def _forward(q, k, v, rule, q_cells, k_cells, q_rows, k_rows):
    saved = _outputs(q, k, v, rule, q_cells, k_cells, q_rows, k_rows)
    out, lse, reach = (checkpoint_name(x, "attention") for x in saved)
    return _unblock(out, q.shape), (q, k, v, rule, q_cells, k_cells, out, lse, reach)


def _outputs(q, k, v, rule, q_cells, k_cells, q_rows, k_rows):
    """Output and log-sum-exp in blocks, and `_reach`."""
    kv_heads, head_dim = k.shape[3:]
    groups = q.shape[3] // kv_heads
    reach = _reach(q_cells, k_cells, rule, q_rows, k_rows)
    keys = (
        _head_blocks(k, k_rows, kv_heads),
        _head_blocks(v, k_rows, kv_heads),
        _cell_blocks(k_cells, k_rows),
    )

    def query_block(_, block):
        q_block, cells, first, end, full = block

        def key_block(j, carry):
            top, total, out = carry
            k_block, v_block, k_block_cells = _at(keys, j)
            scores = _scores(q_block, k_block, _mask_of(full[j], cells, k_block_cells, rule))
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            keep = jnp.exp(top - new_top)
            flat = weights.reshape(*q_block.shape[:3], -1).astype(v_block.dtype)
            added = jnp.einsum("bkqt,bkth->bkqh", flat, v_block, preferred_element_type=jnp.float32)
            return (
                new_top,
                total * keep + weights.sum(-1),
                out * keep.reshape(*out.shape[:3], 1) + added,
            )

        stat = (q_block.shape[0], kv_heads, groups, q_block.shape[2] // groups)
        init = (jnp.full(stat, MASKED), jnp.zeros(stat), jnp.zeros(q_block.shape, jnp.float32))
        top, total, out = lax.fori_loop(first, end, key_block, init)
        return None, (
            (out / total.reshape(*out.shape[:3], 1)).astype(q.dtype),
            top + jnp.log(total),
        )

    blocks = (_head_blocks(q, q_rows, kv_heads), _cell_blocks(q_cells, q_rows), *reach)
    return *lax.scan(query_block, None, blocks)[1], reach


def _cell_blocks(cells: Cells, block_rows: int) -> Cells:
    return Cells(*(_blocks(x, block_rows) for x in cells))


def _backward(q_rows, k_rows, saved, d_out):
    q, k, v, rule, q_cells, k_cells, out, lse, reach = saved
    kv_heads, head_dim = k.shape[3:]
    keys = (
        _head_blocks(k, k_rows, kv_heads),
        _head_blocks(v, k_rows, kv_heads),
        _cell_blocks(k_cells, k_rows),
    )
    q_blocks, d_out = _head_blocks(q, q_rows, kv_heads), _head_blocks(d_out, q_rows, kv_heads)
    # The part of the softmax's gradient that all keys of a query share.
    shared = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1).reshape(lse.shape)

    def query_block(d_keys, block):
        q_block, q_t, cells, lse, shared, d_out, d_out_t, first, end, full = block

        def key_block(j, carry):
            d_q, d_keys, d_values = carry
            k_block, v_block, k_block_cells = _at(keys, j)
            scores = _scores(q_block, k_block, _mask_of(full[j], cells, k_block_cells, rule))
            weights = jnp.exp(scores - lse[..., None])
            d_weights = jnp.einsum(
                "bkqh,bkth->bkqt", d_out, v_block, preferred_element_type=jnp.float32
            )
            d_scores = (
                weights * (d_weights.reshape(weights.shape) - shared[..., None]) * head_dim**-0.5
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

            def add(total, x):
                return lax.dynamic_update_index_in_dim(total, _at(total, j) + x, j, 0)

            return d_q, add(d_keys, d_k), add(d_values, d_v)

        d_q, *d_keys = lax.fori_loop(
            first, end, key_block, (jnp.zeros(q_block.shape, jnp.float32), *d_keys)
        )
        return tuple(d_keys), d_q.astype(q.dtype)

    # The gradients of keys and values are made transposed, out of transposed q and d_out: in the other order XLA:CPU
    # would transpose the much larger weights and scores in memory.
    def flip(x):
        return x.swapaxes(3, 4)

    zeros = jnp.zeros(flip(keys[0]).shape, jnp.float32)
    cells = _cell_blocks(q_cells, q_rows)
    blocks = (q_blocks, flip(q_blocks), cells, lse, shared, d_out, flip(d_out), *reach)
    (d_k, d_v), d_q = lax.scan(query_block, (zeros, zeros), blocks)
    d_k, d_v = flip(d_k), flip(d_v)
    gradients = (
        _unblock(d_q, q.shape),
        _unblock(d_k, k.shape).astype(k.dtype),
        _unblock(d_v, v.shape).astype(v.dtype),
    )
    return (*gradients, None, None, None)


_attention.defvjp(_forward, _backward)
