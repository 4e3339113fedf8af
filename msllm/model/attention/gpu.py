"""Attention on Hopper cards (H100, H200): three Triton kernels written in Pallas, O(L) memory.

FlashAttention-2 (Dao 2023, arXiv 2307.08691). A program holds a block of queries and walks over
blocks of keys with an online softmax. The backward pass computes the scores again from the saved
log-sum-exp, once per block of queries for d_q and once per block of keys for d_k and d_v. A block
is a run of cells in row-major order (row, then stream).

The lowest and highest row and segment of each block tell which blocks a program must visit, and
which run of them is visible in full and needs no mask. In the others the mask is `visible()`. What
it needs to know of the cells is kept in integer vectors along them, so that the kernels gather
nothing: the segment is negative where a cell is absent, and the lags of a query's stream are sets
of key streams, as bits, one set for each distinct lag.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from msllm.model.attention.backend import Backend, Case, RingParts
from msllm.streams import Array, Cells, Visibility, visible

CARDS = ("H100", "H200", "H800")  # GH200 contains one of these names
# Distinct values in a lag matrix. Each one costs a vector per query and a selection per score.
MAX_LAGS = 8
MAX_STREAMS = 32  # bits of an int32
LOG2E = math.log2(math.e)  # scores are in base 2: the hardware has exp2
MASKED = -1e30  # finite, because a query that has seen no key yet must not give inf - inf

Ref = Any  # a block of an array inside a kernel


class Tile(NamedTuple):
    """How one kernel cuts up its work."""

    queries: int  # cells of a block of queries, a power of two
    keys: int  # cells of a block of keys, a power of two
    warps: int
    stages: int  # blocks in flight between memory and the tensor cores


class Tiles(NamedTuple):
    """The tile of each kernel."""

    forward: Tile
    d_q: Tile
    d_kv: Tile


# By the largest head_dim that they serve. Accumulators stay in registers (255 of 4 bytes for each
# of 32 * warps threads), blocks in flight in shared memory (227 KiB). At 128 the accumulator of the
# forward pass and d_q takes 64 registers of each thread, those of d_k and d_v 128, the two score
# blocks of the backward passes 32 each. Chosen by this arithmetic and by what the compiler makes of
# it (it spills tens of bytes of d_kv at 128, nothing else), not yet by timing.
TILES = {
    64: Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
}


def declines(case: Case) -> str | None:
    """Why the kernels cannot do what `case` asks of a GPU; None if they can."""
    if not any(card in case.device_kind for card in CARDS):
        return f"it is made for {', '.join(CARDS)} cards, and this is {case.device_kind}"
    if case.dtype != "bfloat16":
        return f"it multiplies on tensor cores in bfloat16, and the model computes in {case.dtype}"
    if case.head_dim not in (16, 32, 64, 128):
        return f"it needs a head_dim of 16, 32, 64 or 128, and this is {case.head_dim}"
    distinct = len(_levels(case.lag))
    if distinct > MAX_LAGS:
        return f"it handles {MAX_LAGS} distinct lags, and the lag matrix holds {distinct}"
    if distinct > 1 and case.streams > MAX_STREAMS:
        return f"it handles {MAX_STREAMS} streams whose lags differ, and there are {case.streams}"
    return None


def gpu_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    *,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> jax.Array:
    """As `reference_attention`, without ever holding [L, L]. `visibility.lag` is a NumPy array.

    Products are of the dtype of q, k and v, accumulated in float32.

    Args:
      interpret: run the kernels without a GPU, slowly: for tests.
      tiles: other block sizes than those of TILES, to try them out.
    """
    return _unflatten(_attention(*_prepare(q, k, v, visibility, interpret, tiles)), q.shape)


def forward_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    *,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp over keys of some streams; see `RingParts`."""
    out, lse = _outputs(*_prepare(q, k, v, visibility, interpret, tiles))
    return _unflatten(out, q.shape), _unflatten(lse.swapaxes(1, 2) / LOG2E, q.shape[:-1])


def backward_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    interpret: bool = False,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v through these keys; see `RingParts`."""
    *arrays, static = _prepare(q, k, v, visibility, interpret, tiles)

    def flat(x: jax.Array) -> jax.Array:
        return _pad(x.reshape(x.shape[0], -1, *x.shape[3:]), 1, arrays[0].shape[1], "constant")

    saved = (*arrays, flat(out), flat(lse * LOG2E).swapaxes(1, 2))
    d_q, d_k, d_v, *_ = _backward(static, saved, flat(d_out))
    return _unflatten(d_q, q.shape), _unflatten(d_k, k.shape), _unflatten(d_v, v.shape)


def _unflatten(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, cells, ...] -> `shape` [B, T, S, ...], without the cells that fill up the last block."""
    return x[:, : shape[1] * shape[2]].reshape(shape)


def _prepare(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    interpret: bool,
    tiles: Tiles | None,
) -> tuple[Any, ...]:
    """The arguments of `_attention`."""
    batch, head_dim = q.shape[0], q.shape[-1]
    tiles = tiles or TILES[min(size for size in TILES if size >= head_dim)]
    lag, q_streams = np.asarray(visibility.lag), visibility.query_streams
    levels, q_lag = _levels(lag), jnp.asarray(lag)[q_streams]
    # An absent query and an unseen key get different segments, which no other cell has.
    q_cells, k_cells = visibility.queries, visibility.keys
    queries = _vectors(
        q_cells, q_cells.present, q_streams, -2, [q_lag == level for level in levels[1:]]
    )
    keys = _vectors(k_cells, k_cells.seen, visibility.key_streams, -1)

    # Cells that fill up the last block. Queries repeat the last cell, and their output is cut off.
    # Keys are in the row of the last cell, so that they do not widen the reach of their block, but
    # no query sees them: neither as a cell of its segment nor as itself.
    key_count = keys.shape[2]
    q_block, k_block = max(tile.queries for tile in tiles), max(tile.keys for tile in tiles)
    queries, keys = _pad(queries, 2, q_block, "edge"), _pad(keys, 2, k_block, "edge")
    keys = jnp.where(
        (jnp.arange(keys.shape[2]) >= key_count) & (jnp.arange(3) > 0)[:, None], -1, keys
    )

    def flat(x: jax.Array, block: int) -> jax.Array:
        return _pad(x.reshape(batch, -1, *x.shape[3:]), 1, block, "constant")

    spans = _Spans(
        forward=_blocks_to_visit(queries, keys, q_lag, tiles.forward, of_keys=False),
        d_q=_blocks_to_visit(queries, keys, q_lag, tiles.d_q, of_keys=False),
        d_kv=_blocks_to_visit(queries, keys, q_lag, tiles.d_kv, of_keys=True),
    )
    return (
        flat(q, q_block),
        flat(k, k_block),
        flat(v, k_block),
        queries,
        keys,
        spans,
        _Static(levels, tiles, interpret),
    )


class _Static(NamedTuple):
    """What the kernels are compiled for."""

    levels: tuple[int, ...]  # see `_levels`
    tiles: Tiles
    interpret: bool


class _Spans(NamedTuple):
    """For each kernel, the blocks that each of its programs visits: [B, blocks, 4] int32.

    The four numbers are first, full, full_end and end. A program visits the blocks [first, end);
    those of the run [full, full_end), the last one without gaps, need no mask.
    """

    forward: jax.Array
    d_q: jax.Array
    d_kv: jax.Array


def _levels(lag: np.ndarray) -> tuple[int, ...]:
    """The distinct lags of a matrix [S, S], the largest first."""
    return tuple(int(level) for level in np.unique(lag)[::-1])


def _vectors(
    cells: Cells,
    used: jax.Array,
    streams: Array,
    unused_segment: int,
    stream_sets: Sequence[jax.Array] = (),
) -> jax.Array:
    """What the kernels know of cells, [B, 3 + sets, T * S] int32.

    The vectors are row, stream, segment, and sets of streams as bits.

    Args:
      cells: [B, T] and [B, T, S]. used: [B, T, S] bool; other cells get `unused_segment`.
      streams: [S] int32. stream_sets: each [S, all streams] bool, a set for each stream.
    """
    segment = jnp.where(used, cells.segment[:, :, None], unused_segment)
    bits = [
        jnp.sum(jnp.where(members, 1 << jnp.arange(members.shape[1]), 0), axis=1)
        for members in stream_sets
    ]
    vectors = [cells.row[:, :, None], streams, segment, *bits]
    flat = [jnp.broadcast_to(x, used.shape).reshape(used.shape[0], -1) for x in vectors]
    return jnp.stack(flat, axis=1).astype(jnp.int32)


def _pad(x: jax.Array, axis: int, block: int, mode: str) -> jax.Array:
    """`x` with entries added along `axis` up to a multiple of `block`."""
    missing = -x.shape[axis] % block
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], mode=mode)


def _blocks_to_visit(
    queries: jax.Array, keys: jax.Array, q_lag: jax.Array, tile: Tile, of_keys: bool
) -> jax.Array:
    """One field of `_Spans`: blocks of keys for each block of queries, or (`of_keys`) the reverse.

    Args:
      queries, keys: from `_vectors`. q_lag: [Sq, S] int32, the lags of the queries' streams.
    """

    def bounds(vectors: jax.Array, block: int) -> tuple[jax.Array, ...]:
        """Of each block: lowest and highest row; lowest and highest segment; lowest of all.

        [B, blocks] each. The lowest segment is that of used cells; the lowest of all is negative
        if the block holds an unused cell.
        """
        row, _, segment = (
            x.reshape(x.shape[0], -1, block) for x in jnp.moveaxis(vectors[:, :3], 1, 0)
        )
        used_segment = jnp.where(segment < 0, jnp.iinfo(jnp.int32).max, segment)
        return row.min(2), row.max(2), used_segment.min(2), segment.max(2), segment.min(2)

    q_row, q_row_end, q_segment, q_segment_end, q_lowest = (
        x[:, :, None] for x in bounds(queries, tile.queries)
    )
    k_row, k_row_end, k_segment, k_segment_end, k_lowest = (
        x[:, None, :] for x in bounds(keys, tile.keys)
    )
    itself = (k_row <= q_row_end) & (q_row <= k_row_end)
    earlier = (
        (k_row <= q_row_end - q_lag.min())
        & (k_segment <= q_segment_end)
        & (q_segment <= k_segment_end)
    )
    # Both blocks hold one and the same segment, and used cells only: unused ones have negative
    # segments that differ.
    one_segment = (q_lowest == q_segment_end) & (k_lowest == k_segment_end) & (q_lowest == k_lowest)
    full = (k_row_end <= q_row - q_lag.max()) & one_segment
    some = itself | earlier
    return _runs(some.swapaxes(1, 2), full.swapaxes(1, 2)) if of_keys else _runs(some, full)


def _runs(some: jax.Array, full: jax.Array) -> jax.Array:
    """Along the last axis: the range that holds all of `some`, and the last run of `full` in it.

    Returns: [..., 4] int32, as in `_Spans`.
    """
    index = jnp.arange(some.shape[-1], dtype=jnp.int32)

    def after_last(mask: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(mask, index, -1), axis=-1) + 1

    full_end = after_last(full)
    first = jnp.min(jnp.where(some, index, index.size), axis=-1)
    return jnp.stack(
        [first, after_last(~full & (index < full_end[..., None])), full_end, after_last(some)],
        axis=-1,
    )


def _visit_blocks(span: Sequence[jax.Array], visit: Callable, init: Any) -> Any:
    """Folds visit(block, carry, masked) over the blocks of a span, those without a mask first."""
    first, full, full_end, end = span
    carry = lax.fori_loop(full, full_end, functools.partial(visit, masked=False), init)

    def others(i: jax.Array, carry: Any) -> Any:
        return visit(jnp.where(i < full, i, i + (full_end - full)), carry, masked=True)

    return lax.fori_loop(first, end - (full_end - full), others, carry)


def _load(ref: Ref, cells: Any = slice(None)) -> list[jax.Array]:
    """The integer vectors of some cells, one by one.

    Triton's arrays have sizes that are powers of two, so there is no array of three vectors.
    """
    return [ref[i, cells] for i in range(ref.shape[0])]


def _load_span(ref: Ref) -> list[jax.Array]:
    """The four numbers of a span, see `_Spans`."""
    return [ref[i] for i in range(4)]


def _mask(
    queries: Sequence[jax.Array], keys: Sequence[jax.Array], levels: Sequence[int], q_axis: int
) -> jax.Array:
    """`visible()` of two blocks, [q, k] bool, or [k, q] if `q_axis` is 1.

    Args:
      queries, keys: integer vectors from `_load`. levels: distinct lags, see `_levels`.
    """
    q_row, q_stream, q_segment, *bits = (jnp.expand_dims(x, 1 - q_axis) for x in queries)
    k_row, k_stream, k_segment = (jnp.expand_dims(x, q_axis) for x in keys)
    lag = levels[0]
    for level, bit in zip(levels[1:], bits):
        lag = jnp.where((bit >> k_stream) & 1 == 1, level, lag)
    return visible(q_row, q_stream, q_segment, True, k_row, k_stream, k_segment, True, lag)


# The kernels. `_query_specs` and `_key_specs` say which block of each array a program gets: "q" and
# "k" are blocks of queries and of keys or values, "stat" one float32 per query, "queries" and
# "keys" integer vectors.


def _forward_kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    queries_ref: Ref,
    keys_ref: Ref,
    span_ref: Ref,
    out_ref: Ref,
    lse_ref: Ref,
    *,
    tile: Tile,
    levels: tuple[int, ...],
) -> None:
    """Output and log-sum-exp of one block of queries and one head."""
    q, queries = q_ref[...], _load(queries_ref)

    def visit(block: jax.Array, carry: Any, masked: bool) -> Any:
        maximum, denominator, out = carry
        cells = pl.ds(block * tile.keys, tile.keys)
        scores = plgpu.dot(q, k_ref[cells, :], trans_b=True) * (LOG2E * q.shape[1] ** -0.5)
        if masked:
            scores = jnp.where(_mask(queries, _load(keys_ref, cells), levels, 0), scores, MASKED)
        new_maximum = jnp.maximum(maximum, scores.max(1))
        weights = jnp.exp2(scores - new_maximum[:, None])
        rescale = jnp.exp2(maximum - new_maximum)
        product = plgpu.dot(weights.astype(v_ref.dtype), v_ref[cells, :])
        return new_maximum, denominator * rescale + weights.sum(1), out * rescale[:, None] + product

    init = (
        jnp.full(tile.queries, MASKED, jnp.float32),
        *(jnp.zeros(x, jnp.float32) for x in (tile.queries, q.shape)),
    )
    maximum, denominator, out = _visit_blocks(_load_span(span_ref), visit, init)
    out_ref[...] = (out / denominator[:, None]).astype(out_ref.dtype)
    lse_ref[...] = maximum + jnp.log(denominator) * LOG2E


def _d_q_kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    d_out_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    queries_ref: Ref,
    keys_ref: Ref,
    span_ref: Ref,
    d_q_ref: Ref,
    *,
    tile: Tile,
    levels: tuple[int, ...],
) -> None:
    """Gradient of one block of queries and one head."""
    q, d_out, queries = q_ref[...], d_out_ref[...], _load(queries_ref)
    lse, delta = lse_ref[...][:, None], delta_ref[...][:, None]

    def visit(block: jax.Array, d_q: jax.Array, masked: bool) -> jax.Array:
        cells = pl.ds(block * tile.keys, tile.keys)
        k = k_ref[cells, :]
        scores = plgpu.dot(q, k, trans_b=True) * (LOG2E * q.shape[1] ** -0.5)
        if masked:
            scores = jnp.where(_mask(queries, _load(keys_ref, cells), levels, 0), scores, MASKED)
        d_scores = jnp.exp2(scores - lse) * (
            plgpu.dot(d_out, v_ref[cells, :], trans_b=True) - delta
        )
        return d_q + plgpu.dot(d_scores.astype(k.dtype), k)

    d_q = _visit_blocks(_load_span(span_ref), visit, jnp.zeros(q.shape, jnp.float32))
    d_q_ref[...] = (d_q * q.shape[1] ** -0.5).astype(d_q_ref.dtype)


def _d_kv_kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    d_out_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    queries_ref: Ref,
    keys_ref: Ref,
    span_ref: Ref,
    d_k_ref: Ref,
    d_v_ref: Ref,
    *,
    tile: Tile,
    levels: tuple[int, ...],
) -> None:
    """Gradients of one block of keys and values and one key head."""
    k, v, keys, span = k_ref[...], v_ref[...], _load(keys_ref), _load_span(span_ref)

    def head(g: jax.Array, carry: Any) -> Any:
        """Adds the gradients through one query head.

        Scores are [keys, queries], so that the left operands of the products are in registers.
        """

        def visit(block: jax.Array, carry: Any, masked: bool) -> Any:
            d_k, d_v = carry
            cells = pl.ds(block * tile.queries, tile.queries)
            q, d_out = q_ref[cells, g, :], d_out_ref[cells, g, :]
            scores = plgpu.dot(k, q, trans_b=True) * (LOG2E * q.shape[1] ** -0.5)
            if masked:
                scores = jnp.where(
                    _mask(_load(queries_ref, cells), keys, levels, 1), scores, MASKED
                )
            weights = jnp.exp2(scores - lse_ref[g, cells][None, :])
            d_v += plgpu.dot(weights.astype(d_out.dtype), d_out)
            d_scores = weights * (plgpu.dot(v, d_out, trans_b=True) - delta_ref[g, cells][None, :])
            return d_k + plgpu.dot(d_scores.astype(q.dtype), q), d_v

        return _visit_blocks(span, visit, carry)

    zeros = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = lax.fori_loop(0, q_ref.shape[1], head, (zeros, zeros))
    d_k_ref[...] = (d_k * k.shape[1] ** -0.5).astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)


def _call(
    kernel: Callable[..., None],
    tile: Tile,
    static: _Static,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    inputs: Sequence[jax.Array],
) -> list[jax.Array]:
    """Runs a kernel on all blocks."""
    return pl.pallas_call(
        functools.partial(kernel, tile=tile, levels=static.levels),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=static.interpret,
        name=kernel.__name__.strip("_"),
    )(*inputs)


SpecsByName = Callable[..., list[pl.BlockSpec]]


def _query_specs(
    q: jax.Array, k: jax.Array, queries: jax.Array, keys: jax.Array, tile: Tile
) -> tuple[tuple[int, int, int], SpecsByName]:
    """Grid (query block, query head, table), and a function from names to the blocks of the arrays.

    The last queries see most keys and go first, so that no long program starts when the others end.
    """
    (batch, q_cells, heads, head_dim), (_, k_cells, kv_heads, _) = q.shape, k.shape
    blocks, group = q_cells // tile.queries, heads // kv_heads
    specs = {
        "q": pl.BlockSpec(
            (None, tile.queries, None, head_dim), lambda i, n, b: (b, blocks - 1 - i, n, 0)
        ),
        "k": pl.BlockSpec((None, k_cells, None, head_dim), lambda i, n, b: (b, 0, n // group, 0)),
        "stat": pl.BlockSpec((None, None, tile.queries), lambda i, n, b: (b, n, blocks - 1 - i)),
        "queries": pl.BlockSpec(
            (None, queries.shape[1], tile.queries), lambda i, n, b: (b, 0, blocks - 1 - i)
        ),
        "keys": pl.BlockSpec((None, keys.shape[1], k_cells), lambda i, n, b: (b, 0, 0)),
        "span": pl.BlockSpec((None, None, 4), lambda i, n, b: (b, blocks - 1 - i, 0)),
    }
    return (blocks, heads, batch), lambda *names: [specs[name] for name in names]


def _key_specs(
    q: jax.Array, k: jax.Array, queries: jax.Array, keys: jax.Array, tile: Tile
) -> tuple[tuple[int, int, int], SpecsByName]:
    """Grid (key block, key head, table), and a function from names to the blocks of the arrays."""
    (batch, q_cells, heads, head_dim), (_, k_cells, kv_heads, _) = q.shape, k.shape
    group = heads // kv_heads
    specs = {
        "q": pl.BlockSpec((None, q_cells, group, head_dim), lambda i, n, b: (b, 0, n, 0)),
        "k": pl.BlockSpec((None, tile.keys, None, head_dim), lambda i, n, b: (b, i, n, 0)),
        "stat": pl.BlockSpec((None, group, q_cells), lambda i, n, b: (b, n, 0)),
        "queries": pl.BlockSpec((None, queries.shape[1], q_cells), lambda i, n, b: (b, 0, 0)),
        "keys": pl.BlockSpec((None, keys.shape[1], tile.keys), lambda i, n, b: (b, 0, i)),
        "span": pl.BlockSpec((None, None, 4), lambda i, n, b: (b, i, 0)),
    }
    return (k_cells // tile.keys, kv_heads, batch), lambda *names: [specs[name] for name in names]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    spans: _Spans,
    static: _Static,
) -> jax.Array:
    """[B, cells, N, H] of q [B, cells, N, H], k and v [B, cells, K, H]; the cells are full blocks.

    `queries` and `keys`: from `_vectors`.
    """
    return _forward(q, k, v, queries, keys, spans, static)[0]


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    spans: _Spans,
    static: _Static,
) -> tuple[jax.Array, tuple[Any, ...]]:
    """What `_attention` returns, and what `_backward` gets."""
    saved = _outputs(q, k, v, queries, keys, spans, static)
    out, lse = (checkpoint_name(x, "attention") for x in saved)
    return out, (q, k, v, queries, keys, spans, out, lse)


def _outputs(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    spans: _Spans,
    static: _Static,
) -> list[jax.Array]:
    """Output [B, cells, N, H], and log-sum-exp [B, N, cells] float32 in base 2."""
    tile = static.tiles.forward
    grid, specs = _query_specs(q, k, queries, keys, tile)
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), _statistic(q)]
    in_specs = specs("q", "k", "k", "queries", "keys", "span")
    inputs = (q, k, v, queries, keys, spans.forward)
    return _call(_forward_kernel, tile, static, grid, in_specs, specs("q", "stat"), shapes, inputs)


def _statistic(q: jax.Array) -> jax.ShapeDtypeStruct:
    """One number per query and head, with the cells last, so that a block of them is contiguous."""
    return jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)


def _backward(static: _Static, saved: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    """Gradients of q, k and v, and None for the other arguments of `_attention`."""
    q, k, v, queries, keys, spans, out, lse = saved
    # sum(weights * d_weights) over the keys: the term of the softmax's gradient that all keys of a
    # query share.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1).swapaxes(1, 2)
    names = ("q", "k", "k", "q", "stat", "stat", "queries", "keys", "span")
    inputs = (q, k, v, d_out, lse, delta, queries, keys)

    tile = static.tiles.d_q
    grid, specs = _query_specs(q, k, queries, keys, tile)
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    (d_q,) = _call(
        _d_q_kernel, tile, static, grid, specs(*names), specs("q"), shapes, (*inputs, spans.d_q)
    )

    tile = static.tiles.d_kv
    grid, specs = _key_specs(q, k, queries, keys, tile)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    d_k, d_v = _call(
        _d_kv_kernel,
        tile,
        static,
        grid,
        specs(*names),
        specs("k", "k"),
        shapes,
        (*inputs, spans.d_kv),
    )
    return d_q, d_k, d_v, None, None, None


_attention.defvjp(_forward, _backward)

BACKEND = Backend(
    "gpu",
    gpu_attention,
    RingParts(forward_part, backward_part),
    declines=declines,
)
