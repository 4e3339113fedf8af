"""Attention on Hopper cards (H100, H200): three Triton kernels written in Pallas, O(L) memory.

FlashAttention-2 (Dao 2023, arXiv 2307.08691). A program holds a block of queries and iterates over
blocks of keys with an online softmax. The backward pass recomputes the attention weights from the
saved log-sum-exp, once per block of queries for d_q and once per block of keys for d_k and d_v. A
block is a run of cells in row-major order (row, then stream).

A program visits only the blocks that it can reach, and computes no mask for a run of blocks that
are visible completely (blocks.py). In the other blocks the mask is `visible()`. The arguments of
`visible()` are integer vectors along the cells, so that the kernels need no gathers. The segment is
negative where a cell is absent. The lags of a query's stream are a set of key streams for each
distinct lag, stored as bits.
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
from msllm.model.attention.blocks import Extents, all_earlier, share_rows, some_earlier
from msllm.streams import Array, Cells, Visibility, visible

CARDS = ("H100", "H200", "H800")  # GH200 contains one of these names
# Distinct values in a lag matrix. Each one costs a vector per query and a `where` per score.
MAX_LAGS = 8
MAX_STREAMS = 32  # bits of an int32
LOG2E = math.log2(math.e)  # scores are in base 2, because the hardware has an exp2 instruction
# The score of a pair that is not visible. It is finite, because for a query that has seen no key
# yet, an infinite score would give inf - inf.
MASKED = -1e30

Ref = Any  # a block of an array inside a kernel


class Tile(NamedTuple):
    """The block sizes and the launch parameters of one kernel."""

    queries: int  # cells of a block of queries, a power of two
    keys: int  # cells of a block of keys, a power of two
    warps: int
    stages: int  # pipeline stages: blocks in flight between memory and the tensor cores


class Tiles(NamedTuple):
    """The tile of each kernel."""

    forward: Tile
    d_q: Tile
    d_kv: Tile


# The keys are the largest head_dim that the tiles serve. Accumulators stay in registers (255 of 4
# bytes for each of 32 * warps threads), and blocks in flight in shared memory (227 KiB). With a
# head_dim of 128, the accumulator of the forward pass or of d_q takes 64 registers of each thread,
# those of d_k and d_v together 128, and the two score blocks of the backward passes 32 each. The
# sizes follow from this arithmetic and from the compiler's output (the only spills are tens of
# bytes in d_kv at 128). They have not been timed yet.
TILES = {
    64: Tiles(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
}


def declines(case: Case) -> str | None:
    """The reason why the kernels cannot compute `case` on a GPU, or None if they can."""
    if not any(card in case.device_kind for card in CARDS):
        return f"it supports {', '.join(CARDS)} cards only, but this is {case.device_kind}"
    if case.dtype != "bfloat16":
        return f"it computes in bfloat16, but the model in {case.dtype}"
    if case.head_dim not in (16, 32, 64, 128):
        return f"it needs a head_dim of 16, 32, 64 or 128, not {case.head_dim}"
    distinct = len(_levels(case.lag))
    if distinct > MAX_LAGS:
        return f"it supports at most {MAX_LAGS} distinct lags, but the lag matrix has {distinct}"
    if distinct > 1 and case.streams > MAX_STREAMS:
        return (
            f"it supports at most {MAX_STREAMS} streams if their lags differ, but there are "
            f"{case.streams}"
        )
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
    """Computes `reference_attention` without holding an array [L, L].

    Products are in the dtype of q, k and v, accumulated in float32.

    Args:
      q, k, v: as in `reference_attention`.
      visibility: of the same cells. Its `lag` must be a NumPy array, because it is compiled into
        the kernels.
      interpret: run the kernels without a GPU. This is slow and meant for tests.
      tiles: block sizes to use in place of those in TILES.
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
    """Output and log-sum-exp over the keys of some streams; see `RingParts`."""
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
    """Gradients of q, k and v through the keys of some streams; see `RingParts`."""
    *arrays, static = _prepare(q, k, v, visibility, interpret, tiles)
    q_length = arrays[0].shape[1]

    def flat(x: jax.Array) -> jax.Array:
        return _pad(x.reshape(x.shape[0], -1, *x.shape[3:]), 1, q_length, "constant")

    saved = (*arrays, flat(out), flat(lse * LOG2E).swapaxes(1, 2))
    d_q, d_k, d_v, *_ = _backward(static, saved, flat(d_out))
    return _unflatten(d_q, q.shape), _unflatten(d_k, k.shape), _unflatten(d_v, v.shape)


def _unflatten(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, cells, ...] -> `shape` [B, T, S, ...], without the padding of the last block."""
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
    # Absent queries and unseen keys get different segments, which no other cells have.
    q_cells, k_cells = visibility.queries, visibility.keys
    queries = _vectors(
        q_cells, q_cells.present, q_streams, -2, [q_lag == level for level in levels[1:]]
    )
    keys = _vectors(k_cells, k_cells.seen, visibility.key_streams, -1)

    # Pad the last block with copies of the last cell, so that the block reaches no more rows. The
    # outputs of padded queries are dropped. Padded keys get no stream and no segment, so that no
    # query takes them for a key of its segment or for its own cell.
    key_count = keys.shape[2]
    q_block, k_block = max(tile.queries for tile in tiles), max(tile.keys for tile in tiles)
    queries, keys = _pad(queries, 2, q_block, "edge"), _pad(keys, 2, k_block, "edge")
    keys = keys.at[:, 1:, key_count:].set(-1)

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
    """The blocks that each program of each kernel visits, [B, programs, 4] int32.

    The four numbers are first, full, full_end and end. A program visits the blocks [first, end). No
    mask is needed for [full, full_end), the last contiguous run of blocks that are seen completely.
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
    """The integer vectors of cells that the kernels read, [B, 3 + sets, T * S] int32.

    The vectors are the row, the stream, the segment, and each set of streams as bits.

    Args:
      cells: the cells, [B, T] and [B, T, S].
      used: [B, T, S] bool.
      streams: [S] int32, the stream of each column.
      unused_segment: the segment of the cells that are not used.
      stream_sets: [S, all streams] bool each, a set of streams for each column.
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
    """Pads `x` along `axis` to a multiple of `block`."""
    missing = -x.shape[axis] % block
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], mode=mode)


def _blocks_to_visit(
    queries: jax.Array, keys: jax.Array, q_lag: jax.Array, tile: Tile, of_keys: bool
) -> jax.Array:
    """One field of `_Spans`.

    Args:
      queries, keys: from `_vectors`.
      q_lag: [Sq, S] int32, the lags of the queries' streams.
      tile: the block sizes.
      of_keys: False finds the key blocks for each query block, True the query blocks for each key
        block.
    """
    q = Extents(*(x[:, :, None] for x in _extents(queries, tile.queries)))
    k = Extents(*(x[:, None, :] for x in _extents(keys, tile.keys)))
    some = some_earlier(q, k, q_lag.min()) | share_rows(q, k)
    full = all_earlier(q, k, q_lag.max())
    return _runs(some.swapaxes(1, 2), full.swapaxes(1, 2)) if of_keys else _runs(some, full)


def _extents(vectors: jax.Array, block: int) -> Extents:
    """Extents of the rows of all cells and the segments of used cells, [B, blocks] each."""
    row, _, segment = (x.reshape(x.shape[0], -1, block) for x in jnp.moveaxis(vectors[:, :3], 1, 0))
    used = segment >= 0
    used_segment = jnp.where(used, segment, jnp.iinfo(jnp.int32).max)
    return Extents(row.min(2), row.max(2), used_segment.min(2), segment.max(2), used.all(2))


def _runs(some: jax.Array, full: jax.Array) -> jax.Array:
    """Finds the range of `some` along the last axis, and the last contiguous run of `full` in it.

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
    """Folds visit(block, carry, masked) over a span, first over the blocks that need no mask."""
    first, full, full_end, end = span
    carry = lax.fori_loop(full, full_end, functools.partial(visit, masked=False), init)
    skipped = full_end - full

    def visit_masked(i: jax.Array, carry: Any) -> Any:
        return visit(jnp.where(i < full, i, i + skipped), carry, masked=True)

    return lax.fori_loop(first, end - skipped, visit_masked, carry)


def _load(ref: Ref, cells: Any = slice(None)) -> list[jax.Array]:
    """Loads the integer vectors of some cells, one by one.

    They cannot be one array, because the sizes of Triton's arrays are powers of two.
    """
    return [ref[i, cells] for i in range(ref.shape[0])]


def _load_span(ref: Ref) -> list[jax.Array]:
    """Loads the four numbers of a span, see `_Spans`."""
    return [ref[i] for i in range(4)]


def _mask(
    queries: Sequence[jax.Array], keys: Sequence[jax.Array], levels: Sequence[int], q_axis: int
) -> jax.Array:
    """`visible()` for a query block and a key block, [q, k] bool, or [k, q] if `q_axis` is 1.

    Args:
      queries, keys: integer vectors from `_load`.
      levels: the distinct lags, from `_levels`.
      q_axis: the axis of the queries in the result.
    """
    q_row, q_stream, q_segment, *bits = (jnp.expand_dims(x, 1 - q_axis) for x in queries)
    k_row, k_stream, k_segment = (jnp.expand_dims(x, q_axis) for x in keys)
    lag = levels[0]
    for level, bit in zip(levels[1:], bits):
        lag = jnp.where((bit >> k_stream) & 1 == 1, level, lag)
    return visible(q_row, q_stream, q_segment, True, k_row, k_stream, k_segment, True, lag)


# The kernels. `_query_specs` and `_key_specs` define the block of each array that a program gets:
# "q" for queries, "k" for keys or values, "stat" for one float32 per query, "queries" and "keys"
# for the integer vectors of cells, and "span" for the blocks to visit.


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
    """Computes output and log-sum-exp of one block of queries and one head."""
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
    """Computes the gradient of one block of queries and one head."""
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
    """Computes the gradients of one block of keys and values and one key head."""
    k, v, keys, span = k_ref[...], v_ref[...], _load(keys_ref), _load_span(span_ref)

    def head(g: jax.Array, carry: Any) -> Any:
        """Adds the gradients through one query head.

        Scores are [keys, queries], so that the products have their left operands in registers.
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
    """Runs a kernel on a grid of blocks."""
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
    """The grid (query block, query head, table), and a function from names to block specs.

    The last query blocks see the most keys. They run first, so that no long program starts late.
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
    """The grid (key block, key head, table), and a function from names to block specs."""
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
    """The output [B, Lq, N, H], where Lq and Lk are multiples of the block sizes.

    Args:
      q: [B, Lq, N, H].
      k, v: [B, Lk, K, H].
      queries, keys: from `_vectors`.
      spans: from `_blocks_to_visit`.
      static: what the kernels are compiled for.
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
    """The forward pass: the output, and the values that `_backward` needs."""
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
    """Output [B, Lq, N, H], and log-sum-exp [B, N, Lq] float32 in base 2."""
    tile = static.tiles.forward
    grid, specs = _query_specs(q, k, queries, keys, tile)
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), _statistic(q)]
    in_specs = specs("q", "k", "k", "queries", "keys", "span")
    inputs = (q, k, v, queries, keys, spans.forward)
    return _call(_forward_kernel, tile, static, grid, in_specs, specs("q", "stat"), shapes, inputs)


def _statistic(q: jax.Array) -> jax.ShapeDtypeStruct:
    """One number per query and head, [B, N, Lq]; Lq is last so that blocks are contiguous."""
    return jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)


def _backward(static: _Static, saved: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    """Gradients of q, k and v, and None for the other arguments of `_attention`."""
    q, k, v, queries, keys, spans, out, lse = saved
    # The softmax's gradient has a term that all keys of a query share: the sum over the keys of
    # weights * d_weights, which equals the sum over H of out * d_out.
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
