"""Attention on TPUs by the splash-attention kernels of jax.

The kernels are a FlashAttention-2 in Pallas that skips blocks. They take one axis of queries and
one of keys, a segment id of each, and a predicate on an int32 code of the query and the index of
the key. To fit that, `visible()` is split in two:

- Earlier keys: the pairs that a lag admits. The segment ids carry what differs from table to table:
  an absent query and an unseen key get ids that nothing shares. The code carries the query's row
  and which streams its stream sees.
- The query's own key: one pair per query, in plain XLA. A silent cell may be hidden from all
  others, but it sees itself, which no segment id can express.

Both parts are merged by their log-sum-exp. The backward kernels are given the merged output and
log-sum-exp, so that they compute the gradient of one softmax over both parts.

All tables of a batch lie one after another on the axis of the kernels. Each block of queries visits
the key blocks of its own table only, so the grid is as if each table had a call of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from msllm.model.attention.backend import Backend, Case, RingParts
from msllm.model.attention.blocks import EMPTY, block_map, flatten
from msllm.streams import Cells, Visibility

LANES = 128  # of a TPU's vector registers: the kernels' blocks are multiples of it
NO_QUERY, NO_KEY = -1, -2  # segment ids of absent queries and unseen keys; real ones are >= 0


class Blocks(NamedTuple):
    """Cells of a block of queries and of a block of keys, in all kernels."""

    q: int
    k: int


# By the start of the device kind; the longest entry that fits counts. In the forward pass a block
# of q queries does q floating-point operations for each byte of keys and values that it loads (in
# bfloat16). This should be well above the chip's ratio of peak rate and memory bandwidth: 229 for
# v4, 240 for v5e, 166 for v5p, 560 for v6e, 312 for v7x. Beyond that, smaller blocks skip more
# between packed examples. All of these compile forward and backward; 2048 x 2048 runs out of vector
# memory on v4, v5e and v5p. From data sheets and compiled programs, not from timings.
BLOCKS = {
    "TPU": Blocks(512, 512),
    "TPU v6 lite": Blocks(1024, 512),
}
# Entries of one call's map of blocks, 5 bytes each, in scalar memory. This many compile for all
# generations: one table of 131,072 cells in blocks of 512, or 256 tables of 8,192. A larger batch
# is cut into several calls.
MAP_ENTRIES = 1 << 16
MAX_HEAD_DIM = 256  # the largest that was compiled in float32 as well


def blocks_for(device_kind: str) -> Blocks:
    """The blocks for a TPU, by the name that the runtime gives it."""
    fitting = (kind for kind in BLOCKS if device_kind.startswith(kind))
    return BLOCKS[max(fitting, key=len, default="TPU")]


def declines(case: Case) -> str | None:
    """Why the kernels cannot do what `case` asks of a TPU; None if they can."""
    if case.dtype not in ("bfloat16", "float32"):
        return f"it computes in bfloat16 or float32, and the model in {case.dtype}"
    if case.head_dim > MAX_HEAD_DIM:
        return f"it needs a head_dim of at most {MAX_HEAD_DIM}, and this is {case.head_dim}"
    if case.heads % case.kv_heads:
        return (
            "it needs the same number of query heads for each key head, and there are "
            f"{case.heads} for {case.kv_heads}"
        )
    blocks = blocks_for(case.device_kind)
    (q_block, q_length), (k_block, k_length) = _even_blocks(
        case.rows, case.q_streams, case.streams, blocks
    )
    if not _fits(1, q_length // q_block, k_length // k_block, k_length):
        return (
            f"{case.rows} rows of {case.streams} streams make more blocks than the scalar memory "
            "of a TPU can map"
        )
    return None


def options(case: Case) -> dict[str, Any]:
    """Keyword arguments of `splash_attention` for a device."""
    return {"blocks": blocks_for(case.device_kind)}


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    *,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> jax.Array:
    """As `reference_attention`, by TPU kernels: O(L) memory, forward and backward.

    Args:
      q: [B, T, Sq, N, H]. k, v: [B, T, S, K, H].
      visibility: of rows 0 .. T - 1 of the same tables, with keys of all S streams. `lag` is a
        NumPy array, since it is compiled into the kernels; `query_streams` holds each stream at
        most once.
      interpret: run the kernels on any device, slowly.
      blocks: from `blocks_for(device_kind)`; multiples of 128. Smaller ones are taken where they
        waste less.

    Returns: [B, T, Sq, N, H] in q's dtype.
    """
    plan, static, by_tables = _setup(q, k, visibility, interpret, blocks)

    def attend(q, k, v, *cells):
        return _attention(q, k, v, plan(*cells), static)

    return by_tables(attend, q, k, v, visibility.queries, visibility.keys)


def forward_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    *,
    interpret: bool = False,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp over keys of some streams; see `RingParts`."""
    plan, static, by_tables = _setup(q, k, visibility, interpret, blocks)

    def outputs(q, k, v, *cells):
        planned = plan(*cells)
        if visibility.key_offset is None:  # the queries' own keys are among these
            out, lse, _ = _outputs(q, k, v, planned, static)
        else:
            out, lse = _run_forward(*_operands(q, k, v, planned)[0], planned, static)
        return _from_kernel_axis(out.astype(q.dtype), q.shape), _from_kernel_axis(lse, q.shape[:-1])

    return by_tables(outputs, q, k, v, visibility.queries, visibility.keys)


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
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v through these keys; see `RingParts`."""
    plan, static, by_tables = _setup(q, k, visibility, interpret, blocks)

    def gradients(q, k, v, q_cells, k_cells, out, lse, d_out):
        planned = plan(q_cells, k_cells)
        out, lse = (_to_kernel_axis(x, planned.q_segment.size // q.shape[0]) for x in (out, lse))
        own_weight = None
        if visibility.key_offset is None:
            (scaled, *_), (own_k, _) = _operands(q, k, v, planned)
            own_weight = jnp.exp(_own_scores(scaled, own_k, planned) - _grouped(lse, k.shape[3]))
        return _backward(static, (q, k, v, planned, out, lse, own_weight), d_out)[:3]

    return by_tables(gradients, q, k, v, visibility.queries, visibility.keys, out, lse, d_out)


class _Static(NamedTuple):
    """What the kernels are compiled for."""

    sees: Callable  # see `_Predicate`
    blocks: Blocks
    interpret: bool


def _setup(
    q: jax.Array, k: jax.Array, visibility: Visibility, interpret: bool, blocks: Blocks | None
) -> tuple[Callable[[Cells, Cells], _Plan], _Static, Callable]:
    """What the three functions above share.

    Returns: (plan, static, by_tables). `plan` makes a _Plan of cells of queries and of keys.
      `by_tables(function, *arrays)` calls a function with as many tables of each array at a time as
      the kernels can take.
    """
    batch, rows, q_size = q.shape[:3]
    lag, rows_of_keys, k_size = np.asarray(visibility.lag), *k.shape[1:3]
    if rows_of_keys != rows:
        raise ValueError(
            f"the queries have {rows} rows and the keys {rows_of_keys}: they must be the same rows"
        )
    (q_block, q_length), (k_block, k_length) = _even_blocks(
        rows, q_size, k_size, blocks or BLOCKS["TPU"]
    )
    per_table = (q_length // q_block, k_length // k_block, k_length)
    tables = next(
        n for n in range(batch, 0, -1) if n == 1 or batch % n == 0 and _fits(n, *per_table)
    )
    predicate = _make_predicate(lag, rows, tables, k_size, k_length)
    blocks = Blocks(q_block, k_block)

    def plan(q_cells: Cells, k_cells: Cells) -> _Plan:
        part = visibility._replace(queries=q_cells, keys=k_cells)
        return _plan(part, predicate, blocks, q_length, k_length)

    def by_tables(function, *arrays):
        if tables == batch:
            return function(*arrays)
        calls = jax.tree.map(lambda x: x.reshape(-1, tables, *x.shape[1:]), arrays)
        results = lax.map(lambda call: function(*call), calls)
        return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)

    return plan, _Static(predicate.sees, blocks, interpret), by_tables


def _even_blocks(
    rows: int, q_streams: int, k_streams: int, blocks: Blocks
) -> list[tuple[int, int]]:
    """(block, padded length) of queries and of keys, with as few, evenly filled blocks as possible.

    `blocks`: the largest blocks.
    """
    sizes = []
    for cells, block in zip((rows * q_streams, rows * k_streams), blocks):
        count = -(-cells // block)
        block = -(-cells // (count * LANES)) * LANES
        sizes.append((block, count * block))
    return sizes


def _fits(tables: int, q_blocks: int, k_blocks: int, k_length: int) -> bool:
    """Whether one call can do this many tables.

    Their block map must fit into scalar memory, and `_quotient` must be exact for their keys.
    """
    return tables * q_blocks * k_blocks <= MAP_ENTRIES and tables * k_length < EXACT


# --- visibility as a predicate on (code of the query, index of the key) ---


class _Predicate(NamedTuple):
    """The pairs that the lag matrix admits.

    Attributes:
      encode: (row [Lq], stream [Lq], table [], first stream of the keys []) -> code [Lq], all
        int32.
      sees: (code, index of the key on the kernels' axis) -> bool, elementwise, inside the kernel.
    """

    encode: Callable
    sees: Callable


def _make_predicate(
    lag: np.ndarray, rows: int, tables: int, size: int, k_length: int
) -> _Predicate:
    """The pairs that `lag` admits, in the cheapest form that can express them.

    These are the pairs of `visible()` without a cell's own key.

    Args:
      lag: [S, S] int32. rows: T.
      tables: how many lie on the kernels' axis, `k_length` keys each.
      size: streams of the keys: all S, or one of several equal parts of them.
    """
    lags = np.unique(np.minimum(lag, rows))  # a lag of all rows is never reached
    finite = lags[lags < rows]
    if len(lags) == 1:
        # All streams have the same lag: the visible keys are those before the first row that is too
        # near.
        def limit(row, stream, table, start):
            return table * k_length + jnp.maximum(row - lags[0] + 1, 0) * size

        return _Predicate(limit, lambda code, key: key < code)

    def row_and_stream(key):
        """Of a key in its table."""
        if tables > 1:
            key = key - _quotient(key, k_length) * k_length
        row = _quotient(key, size)
        return row, key - row * size

    if len(finite) == 1 and rows.bit_length() + size <= 31:
        # One lag, and some streams are never seen: one bit for each stream that is.
        members = (lag == finite[0]).reshape(lag.shape[0], -1, size) << np.arange(size)
        seen_streams = jnp.asarray(members.sum(2), jnp.int32)

        def encode(row, stream, table, start):
            reach = jnp.maximum(row - finite[0] + 1, 0)
            return reach << size | seen_streams[stream, start // size]

        def sees(code, key):
            row, stream = row_and_stream(key)
            return (row < code >> size) & ((code >> stream) & 1 == 1)

        return _Predicate(encode, sees)

    # Any lags: the most frequent one, and by comparison each pair of streams that differs from it.
    bits = max(lag.size // size - 1, 1).bit_length()
    values, counts = np.unique(lag, return_counts=True)
    usual = int(values[counts.argmax()])
    by_part = lag.reshape(lag.shape[0], -1, size).swapaxes(0, 1)  # [part of the keys, S, size]
    others = [(pair, int(value)) for pair, value in enumerate(by_part.ravel()) if value != usual]

    def encode_pair(row, stream, table, start):
        return row << bits | start // size * lag.shape[0] + stream

    def sees_pair(code, key):
        row, stream = row_and_stream(key)
        pair = (code & (1 << bits) - 1) * size + stream
        between = jnp.full_like(code, usual)
        for other, value in others:
            between = jnp.where(pair == other, value, between)
        return row <= (code >> bits) - between

    return _Predicate(encode_pair, sees_pair)


EXACT = 1 << 22  # `_quotient` is exact below this


def _quotient(x: jax.Array, divisor: int) -> jax.Array:
    """x // divisor for int32 0 <= x < EXACT, by a shift or one float32 product.

    TPUs have no integer division. (x + 0.5) / divisor is at least 0.5 / divisor away from an
    integer, and the float32 product is off by less than 2^-23 x / divisor.
    """
    if divisor & (divisor - 1) == 0:
        return x >> (divisor.bit_length() - 1)
    return ((x.astype(jnp.float32) + 0.5) * np.float32(1 / divisor)).astype(jnp.int32)


# --- what the kernels need besides q, k and v ---


class _Plan(NamedTuple):
    """The cells of B tables for the kernels, whose axes hold B * Lq queries and B * Lk keys.

    Attributes:
      code: [B * Lq] int32, see `_Predicate`.
      q_segment, k_segment: [B * Lq] and [B * Lk] int32.
      forward: (key block to load, kind of block), [1, B * query blocks, key blocks] each.
      backward: (query block to load, kind of block), [1, query blocks, B * key blocks] each.
      without_own: [B * Lq] bool, the query's own key is not among its earlier keys.
      own: [Sq] int32, the column of the keys that holds each stream of the queries, if one does.
    """

    code: jax.Array
    q_segment: jax.Array
    k_segment: jax.Array
    forward: tuple[jax.Array, jax.Array]
    backward: tuple[jax.Array, jax.Array]
    without_own: jax.Array
    own: jax.Array


def _plan(
    visibility: Visibility, predicate: _Predicate, blocks: Blocks, q_length: int, k_length: int
) -> _Plan:
    """The plan of one call; Lq is `q_length` and Lk is `k_length`, multiples of the blocks."""
    q_cells, k_cells = visibility.queries, visibility.keys
    batch, rows, q_size = q_cells.present.shape
    q_streams = jnp.asarray(visibility.query_streams, jnp.int32)
    k_start = jnp.asarray(visibility.first_key_stream, jnp.int32)
    row = jnp.arange(rows, dtype=jnp.int32)
    queries = flatten(row, q_cells.segment, q_cells.present, q_length)
    keys = flatten(row, k_cells.segment, k_cells.seen, k_length)
    lags = visibility.pair_lags()
    kinds = block_map(queries, keys, lags.min(), lags.max(), *blocks)

    stream = jnp.pad(jnp.tile(q_streams, rows), (0, q_length - rows * q_size))
    code = jax.vmap(lambda table: predicate.encode(queries.row, stream, table, k_start))(
        jnp.arange(batch)
    )
    own = q_streams - k_start
    sees_own_row = jnp.asarray(np.diagonal(visibility.lag) <= 0)[q_streams]
    own_is_earlier = q_cells.present & k_cells.seen[:, :, own] & sees_own_row
    return _Plan(
        code=code.reshape(-1),
        q_segment=jnp.where(queries.here, queries.segment, NO_QUERY).reshape(-1),
        k_segment=jnp.where(keys.here, keys.segment, NO_KEY).reshape(-1),
        forward=_forward_order(kinds),
        backward=_backward_order(kinds),
        without_own=~flatten(row, q_cells.segment, own_is_earlier, q_length).here.reshape(-1),
        own=own,
    )


def _next_active(active: jax.Array, places: Callable, axis: int) -> jax.Array:
    """Of each entry along an axis, the place of the next active one, itself included.

    Past the last active entry it is the place of the first one. `places` maps indices to places.
    """
    size = active.shape[axis]
    index = lax.broadcasted_iota(jnp.int32, active.shape, axis)
    ahead = lax.cummin(jnp.where(active, index, size), axis=axis, reverse=True)
    first = lax.slice_in_dim(ahead, 0, 1, axis=axis)
    return places(jnp.where(ahead < size, ahead, first) % size)


def _forward_order(kinds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(key block to load, kind) of each step, from kinds [B, query blocks, key blocks].

    A step with nothing to compute already loads the block that the next step needs.
    """
    batch, q_blocks, k_blocks = kinds.shape
    steps = kinds.reshape(-1)  # table, query block, key block: the order of the kernel

    def place(step):
        return step // (q_blocks * k_blocks) * k_blocks + step % k_blocks

    load = _next_active(steps != EMPTY, place, 0)
    return load.reshape(1, batch * q_blocks, k_blocks), steps.reshape(1, batch * q_blocks, k_blocks)


def _backward_order(kinds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(query block to load, kind) of each step of the kernel for gradients of keys.

    That kernel visits the query blocks of each key block.
    """
    batch, q_blocks, k_blocks = kinds.shape
    table = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    load = _next_active(kinds != EMPTY, lambda step: table * q_blocks + step, 1)

    def by_key_block(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(1, q_blocks, batch * k_blocks)

    return by_key_block(load), by_key_block(kinds)


# --- softmax over both parts ---


def _to_kernel_axis(x: jax.Array, length: int) -> jax.Array:
    """[B, T, S, N, ...] -> [N, B * length, ...]: the kernels' axis, one table after another."""
    batch, rows, streams, heads, *rest = x.shape
    x = x.reshape(batch, rows * streams, heads, *rest)
    x = jnp.pad(x, [(0, 0), (0, length - rows * streams)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x, 2, 0).reshape(heads, batch * length, *rest)


def _from_kernel_axis(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Inverse of `_to_kernel_axis`; `shape` is that of its argument."""
    batch, rows, streams, heads, *rest = shape
    x = x.reshape(heads, batch, -1, *rest)[:, :, : rows * streams]
    return jnp.moveaxis(x, 0, 2).reshape(shape)


def _operands(
    q: jax.Array, k: jax.Array, v: jax.Array, plan: _Plan
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """On the kernels' axis: (q, scaled; k; v), and each query's own (k, v)."""
    q_length, k_length = plan.q_segment.size // q.shape[0], plan.k_segment.size // q.shape[0]
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    own_k, own_v = (_to_kernel_axis(x[:, :, plan.own], q_length) for x in (k, v))
    own = lax.optimization_barrier((own_k, own_v))
    return (
        _to_kernel_axis(scaled, q_length),
        _to_kernel_axis(k, k_length),
        _to_kernel_axis(v, k_length),
    ), own


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """[N, L, ...] -> [K, N / K, L, ...]: query heads by the key head that they use."""
    # Without this barrier XLA saves float32 copies of what the kernels read in bfloat16, and one
    # copy of the keys per query head.
    return lax.optimization_barrier(x.reshape(kv_heads, -1, *x.shape[1:]))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Float32 sums of products over the last axis."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), -1)


def _own_scores(q: jax.Array, own_k: jax.Array, plan: _Plan) -> jax.Array:
    """[K, N / K, L] float32: each query's score with its own key.

    -inf where the kernel has it among the earlier keys.
    """
    scores = _dot(_grouped(q, own_k.shape[0]), own_k[:, None])
    return jnp.where(plan.without_own, scores, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, plan: _Plan, static: _Static) -> jax.Array:
    """[B, T, Sq, N, H] in q's dtype."""
    return _forward(q, k, v, plan, static)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, plan: _Plan, static: _Static
) -> tuple[jax.Array, tuple[Any, ...]]:
    """What `_attention` returns, and what `_backward` gets."""
    saved = jax.tree.map(
        lambda x: checkpoint_name(x, "attention"), (plan, *_outputs(q, k, v, plan, static))
    )
    return _from_kernel_axis(saved[1], q.shape), (q, k, v, *saved)


def _outputs(
    q: jax.Array, k: jax.Array, v: jax.Array, plan: _Plan, static: _Static
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output, log-sum-exp and the weight of each query's own key, on the kernels' axis.

    Returns: [N, B * Lq, H] in q's dtype, [N, B * Lq] float32, [K, N / K, B * Lq] float32.
    """
    operands, (own_k, own_v) = _operands(q, k, v, plan)
    early_out, early_lse = (_grouped(x, k.shape[3]) for x in _run_forward(*operands, plan, static))
    own = _own_scores(operands[0], own_k, plan)
    # For a query without an earlier key, the kernel's log-sum-exp is -inf and its output not a
    # number; if it met masked keys, they are a huge negative number and the mean of the masked
    # values.
    lse = jnp.logaddexp(early_lse, own)
    early, itself = jnp.exp(early_lse - lse)[..., None], jnp.exp(own - lse)[..., None]
    out = jnp.where(early > 0, early * early_out, 0) + itself * own_v[:, None]
    out, lse = out.astype(q.dtype).reshape(operands[0].shape), lse.reshape(operands[0].shape[:2])
    return out, lse, itself[..., 0]


def _backward(static: _Static, saved: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    """Gradients of q, k and v, and None for the plan."""
    q, k, v, plan, out, lse, own_weight = saved
    scale, kv_heads = q.shape[-1] ** -0.5, k.shape[3]
    operands, (own_k, own_v) = _operands(q, k, v, plan)
    d_out = _to_kernel_axis(d_out, out.shape[1] // q.shape[0])
    # sum(weights * d_weights) over the keys: the term of the softmax's gradient that all keys of a
    # query share.
    delta = _dot(out, d_out)
    d_q, d_k, d_v = _run_backward(*operands, lse, d_out, delta, plan, static)
    if own_weight is None:  # these keys are those of other streams
        return (
            _from_kernel_axis((d_q * scale).astype(q.dtype), q.shape),
            _from_kernel_axis(d_k, k.shape),
            _from_kernel_axis(d_v, k.shape),
            None,
        )

    grouped = (_grouped(x, kv_heads) for x in (operands[0], d_out, delta, d_q))
    scaled, d_out, delta, d_q = grouped
    d_scores = own_weight * (_dot(d_out, own_v[:, None]) - delta)
    d_q = (d_q + d_scores[..., None] * own_k[:, None]) * scale

    def with_own(d, own):
        """The gradient of all keys, from the kernel, plus that of each query's own key."""
        own = _from_kernel_axis(own.astype(k.dtype), (*q.shape[:3], *k.shape[3:]))
        return _from_kernel_axis(d, k.shape).at[:, :, plan.own].add(own, unique_indices=True)

    d_k = with_own(d_k, jnp.sum(d_scores[..., None] * scaled, 1))
    d_v = with_own(d_v, jnp.sum(own_weight[..., None] * d_out, 1))
    return _from_kernel_axis(d_q.astype(q.dtype), q.shape), d_k, d_v, None


_attention.defvjp(_forward, _backward)


# --- calls of the kernels ---
#
# All use of private functions of jax is below, because it has no public way to run the backward
# kernels on a given log-sum-exp.

MASKED = kernels.DEFAULT_MASK_VALUE
LAYOUT = kernels.QKVLayout.HEAD_DIM_MINOR


def _mask_info(plan: _Plan, order: tuple[jax.Array, jax.Array]) -> MaskInfo:
    """What the kernels know of their blocks; `order` is `plan.forward` or `plan.backward`."""
    load, kind = order
    return MaskInfo(
        data_next=load,
        mask_next=None,
        block_mask=kind,
        partial_mask_blocks=None,
        q_sequence=plan.code,  # type: ignore[arg-type]  # an array that is computed works as well
    )


def _run_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, plan: _Plan, static: _Static
) -> tuple[jax.Array, jax.Array]:
    """Output [N, B * Lq, H] and log-sum-exp [N, B * Lq] float32 over the earlier keys.

    q is [N, B * Lq, H], k and v are [K, B * Lk, H].
    """
    sees, blocks, interpret = static
    sizes = kernels.BlockSizes(block_q=blocks.q, block_kv=blocks.k, block_kv_compute=blocks.k)
    out, (lse,) = kernels._splash_attention_forward(
        _mask_info(plan, plan.forward),
        q,
        k,
        v,
        kernels.SegmentIds(plan.q_segment, plan.k_segment),
        sinks=None,
        mask_value=MASKED,
        is_mqa=False,
        block_sizes=sizes,
        residual_checkpoint_name=None,
        save_residuals=True,
        mask_function=sees,
        interpret=interpret,
    )
    return out, lse


def _run_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    delta: jax.Array,
    plan: _Plan,
    static: _Static,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v through the earlier keys.

    q and d_out are [N, B * Lq, H], k and v are [K, B * Lk, H]; `lse` and `delta` [N, B * Lq] are
    over all keys.
    """
    sees, blocks, interpret = static
    segments = kernels.SegmentIds(plan.q_segment, plan.k_segment)
    common: dict[str, Any] = {
        "bq": blocks.q,
        "bkv": blocks.k,
        "is_mqa": False,
        "mask_value": MASKED,
        "attn_logits_soft_cap": None,
        "q_layout": LAYOUT,
        "k_layout": LAYOUT,
        "v_layout": LAYOUT,
        "mask_function": sees,
        "interpret": interpret,
    }
    d_q = kernels._splash_attention_bwd_dq(
        q,
        k,
        v,
        segments,
        None,
        lse,
        d_out,
        delta,
        mask_info=_mask_info(plan, plan.forward),
        **common,
    )
    _, d_k, d_v = kernels._splash_attention_bwd_dkv(
        q,
        k,
        v,
        segments,
        None,
        lse,
        d_out,
        delta,
        bkv_compute=blocks.k,
        use_fused_bwd_kernel=False,
        mask_info=_mask_info(plan, plan.backward),
        **common,
    )
    return d_q, d_k, d_v


BACKEND = Backend(
    "splash",
    splash_attention,
    RingParts(forward_part, backward_part),
    declines=declines,
    options=options,
)
