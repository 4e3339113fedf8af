"""Attention on TPUs, by the splash-attention kernels that come with jax (Pallas; a FlashAttention-2 that skips blocks).

The kernels take one axis of queries and one of keys, a segment id of each, and a predicate on (an int32 code of the
query, the index of the key). The rule of `visible()` is cut in two to fit that:

- earlier: the pairs that a lag admits. The segment ids carry what differs from table to table: a query that is absent
  and a key that others may not see get ids that nobody shares. The code carries the query's row and what its stream
  reads.
- itself: one pair per query, plain XLA. A cell that keeps silent is hidden from all others but sees itself, which no
  segment id can express.

Both parts are merged by their log-sum-exp, and the backward kernels are given the merged output and log-sum-exp: the
gradient of one softmax over both. All tables of a batch lie behind one another on the axis of the kernels, and each
block of queries goes through the key blocks of its own table only: the grid is as if each table had a call of its own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from msllm.model.attention.backend import Case
from msllm.model.attention.blocks import EMPTY, block_map, flatten
from msllm.streams import Cells

LANES = 128  # of a TPU's vector registers: the kernels' blocks are multiples of it
# Segment ids of a query and of a key that take no part; real ones are >= 0.
NO_QUERY, NO_KEY = -1, -2


class Blocks(NamedTuple):
    """Cells of a block of queries and of keys, in the forward and in the backward kernels."""

    q: int
    k: int


# By the start of the device kind; the longest that fits counts. Forward, a block of q queries does q floating-point
# operations for each byte of keys and values that it loads (in bfloat16), which should be well above the chip's ratio
# of peak rate and memory bandwidth: 229 for v4, 240 for v5e, 166 for v5p, 560 for v6e, 312 for v7x. Beyond that,
# smaller blocks skip more between packed examples. All compile forward and backward; 2048 x 2048 runs out of vector
# memory on v4, v5e and v5p. From data sheets and compiled programs, not from timings.
BLOCKS = {
    "TPU": Blocks(512, 512),
    "TPU v6 lite": Blocks(1024, 512),
}
# Entries of the map of blocks of one call, 5 bytes each, in scalar memory. So many compile for all generations: one
# table of 131,072 cells in blocks of 512, or 256 of 8,192. A larger batch is cut into several calls.
MAP_ENTRIES = 1 << 16
MAX_HEAD_DIM = 256  # the largest that was compiled in float32 as well


def blocks_for(device_kind: str) -> Blocks:
    """The blocks for a TPU, by the name that the runtime gives it."""
    return BLOCKS[
        max((kind for kind in BLOCKS if device_kind.startswith(kind)), key=len, default="TPU")
    ]


def declines(case: Case) -> str | None:
    """Why the kernels cannot do what `case` asks; None if they can."""
    if case.platform != "tpu":
        return f"it needs a TPU, and this is a {case.platform}"
    if case.dtype not in ("bfloat16", "float32"):
        return f"it computes in bfloat16 or float32, and the model in {case.dtype}"
    if case.head_dim > MAX_HEAD_DIM:
        return f"it needs a head_dim of at most {MAX_HEAD_DIM}, and this is {case.head_dim}"
    if case.heads % case.kv_heads:
        return f"it needs as many query heads for each key head, and there are {case.heads} for {case.kv_heads}"
    blocks = blocks_for(case.device_kind)
    (q_block, q_length), (k_block, k_length) = _cuts(
        case.rows, case.q_streams, case.streams, blocks
    )
    if not _fits(1, q_length // q_block, k_length // k_block, k_length):
        return f"{case.rows} rows of {case.streams} streams make more blocks than the scalar memory of a TPU can map"
    return None


def options(case: Case) -> dict[str, Any]:
    """Keyword arguments of `splash_attention` for a device."""
    return {"blocks": blocks_for(case.device_kind)}


def splash_attention(
    q,
    k,
    v,
    q_cells: Cells,
    k_cells: Cells,
    lag,
    q_streams,
    *,
    interpret: bool = False,
    blocks: Blocks | None = None,
):
    """As `reference_attention`, by TPU kernels: O(L) memory, forward and backward. Same arguments and result, but

    Args:
      q_cells, k_cells: rows 0 .. T - 1 of the same tables; the keys are all S streams of the rows of the queries.
      lag: [S, S] int32, numpy: it is compiled into the kernels.
      q_streams: [Sq] int32, each at most once; may be traced.
      interpret: run the kernels on any device, slowly.
      blocks: of `blocks_for(device_kind)`; multiples of 128. Smaller ones are taken where they fill up better.
    """
    plan, static, by_tables = _setup(q, k, lag, interpret, blocks)

    def attend(q, k, v, *cells):
        return _attention(q, k, v, plan(*cells, q_streams, 0), static)

    return by_tables(attend, q, k, v, q_cells, k_cells)


def forward_part(
    q,
    k,
    v,
    q_cells: Cells,
    k_cells: Cells,
    lag,
    q_streams,
    k_start,
    *,
    interpret=False,
    blocks=None,
):
    """Output, and log-sum-exp [B, T, Sq, N], over keys of some streams only, from `k_start` on (ring.py)."""
    plan, static, by_tables = _setup(q, k, lag, interpret, blocks)

    def outputs(q, k, v, *cells):
        if k_start is None:
            out, lse, _ = _outputs(q, k, v, plan(*cells, q_streams, q_streams[0]), static)
        else:
            early = plan(*cells, q_streams, k_start)
            out, lse = _run_forward(*_operands(q, k, v, early)[0], early, static)
        return _unline(out.astype(q.dtype), q.shape), _unline(lse, q.shape[:-1])

    return by_tables(outputs, q, k, v, q_cells, k_cells)


def backward_part(
    q,
    k,
    v,
    q_cells: Cells,
    k_cells: Cells,
    lag,
    q_streams,
    k_start,
    out,
    lse,
    d_out,
    *,
    interpret=False,
    blocks=None,
):
    """Gradients of q, k and v through these keys, given output and log-sum-exp over all keys."""
    plan, static, by_tables = _setup(q, k, lag, interpret, blocks)

    def gradients(q, k, v, q_cells, k_cells, out, lse, d_out):
        planned = plan(q_cells, k_cells, q_streams, q_streams[0] if k_start is None else k_start)
        out, lse = (_line(x, planned.q_segment.size // q.shape[0]) for x in (out, lse))
        itself = None
        if k_start is None:
            (scaled, *_), (own_k, _) = _operands(q, k, v, planned)
            itself = jnp.exp(_own_scores(scaled, own_k, planned) - _grouped(lse, k.shape[3]))
        return _backward(static, (q, k, v, planned, out, lse, itself), d_out)[:3]

    return by_tables(gradients, q, k, v, q_cells, k_cells, out, lse, d_out)


def _setup(q, k, lag, interpret: bool, blocks: Blocks | None):
    """(q_cells, k_cells, q_streams, k_start) -> _Plan; what the kernels are compiled for; and a function that calls
    another with as many tables of each array at a time as the kernels can take."""
    batch, rows, q_size = q.shape[:3]
    lag, rows_of_keys = np.asarray(lag), k.shape[1]
    if rows_of_keys != rows:
        raise ValueError(
            f"the queries have {rows} rows and the keys {rows_of_keys}: they must be the same rows"
        )
    blocks = blocks or BLOCKS["TPU"]
    (q_block, q_length), (k_block, k_length) = _cuts(rows, q_size, k.shape[2], blocks)
    blocks, per_table = (
        Blocks(q_block, k_block),
        (q_length // q_block, k_length // k_block, k_length),
    )
    tables = next(
        n for n in range(batch, 0, -1) if n == 1 or batch % n == 0 and _fits(n, *per_table)
    )
    rule = _make_rule(lag, rows, tables, k.shape[2], k_length)
    plan = functools.partial(
        _plan, lag=lag, rule=rule, blocks=blocks, q_length=q_length, k_length=k_length
    )

    def by_tables(function, *arrays):
        if tables == batch:
            return function(*arrays)
        calls = jax.tree.map(lambda x: x.reshape(-1, tables, *x.shape[1:]), arrays)
        return jax.tree.map(
            lambda x: x.reshape(batch, *x.shape[2:]), lax.map(lambda call: function(*call), calls)
        )

    return plan, (rule.sees, blocks, interpret), by_tables


def _cuts(rows: int, q_streams: int, k_streams: int, blocks: Blocks) -> list[tuple[int, int]]:
    """(block, padded length) of queries and of keys: the number of blocks that `blocks` asks for, evenly filled."""
    cuts = []
    for cells, block in zip((rows * q_streams, rows * k_streams), blocks):
        count = -(-cells // block)
        block = -(-cells // (count * LANES)) * LANES
        cuts.append((block, count * block))
    return cuts


def _fits(tables: int, q_blocks: int, k_blocks: int, k_length: int) -> bool:
    """Whether one call can do so many tables: their map fits into scalar memory, and their keys can be counted."""
    return tables * q_blocks * k_blocks <= MAP_ENTRIES and tables * k_length < EXACT


# --- the rule as a predicate on (code of the query, index of the key) ---


class _Rule(NamedTuple):
    encode: Any  # (row [Lq], stream [Lq], table [], first stream of the keys []) -> code [Lq] int32
    sees: Any  # (code, index of the key on the kernels' axis) -> bool, elementwise, in the kernel


def _make_rule(lag: np.ndarray, rows: int, tables: int, size: int, k_length: int) -> _Rule:
    """The pairs that `lag` admits (`visible()` without "itself"), in the cheapest of three forms that can say it.

    `tables` tables of `k_length` keys each lie on the kernels' axis, of `size` streams: all, or one of equal parts.
    """
    lags = np.unique(np.minimum(lag, rows))  # a lag of all rows is never reached
    finite = lags[lags < rows]
    if len(lags) == 1:
        # All streams alike: the keys before the first row that is too near.
        def limit(row, stream, table, start):
            return table * k_length + jnp.maximum(row - lags[0] + 1, 0) * size

        return _Rule(limit, lambda code, key: key < code)

    def place(key):
        """(row, stream) of a key in its table."""
        if tables > 1:
            key = key - _quotient(key, k_length) * k_length
        row = _quotient(key, size)
        return row, key - row * size

    if len(finite) == 1 and rows.bit_length() + size <= 31:
        # One lag, but some streams are not read: one bit for each stream that is.
        read = jnp.asarray(
            ((lag == finite[0]).reshape(lag.shape[0], -1, size) << np.arange(size)).sum(2),
            jnp.int32,
        )

        def encode(row, stream, table, start):
            return jnp.maximum(row - finite[0] + 1, 0) << size | read[stream, start // size]

        def sees(code, key):
            row, stream = place(key)
            return (row < code >> size) & ((code >> stream) & 1 == 1)

        return _Rule(encode, sees)

    # Any lags: the most frequent one, and each pair of streams that differs from it, by comparison.
    bits = max(lag.size // size - 1, 1).bit_length()
    values, counts = np.unique(lag, return_counts=True)
    usual = int(values[counts.argmax()])
    by_part = lag.reshape(lag.shape[0], -1, size).swapaxes(0, 1)  # [part of the keys, S, size]
    others = [(pair, int(value)) for pair, value in enumerate(by_part.ravel()) if value != usual]

    def sees(code, key):
        row, stream = place(key)
        pair = (code & (1 << bits) - 1) * size + stream
        between = jnp.full_like(code, usual)
        for other, value in others:
            between = jnp.where(pair == other, value, between)
        return row <= (code >> bits) - between

    return _Rule(
        lambda row, stream, table, start: row << bits | start // size * lag.shape[0] + stream, sees
    )


EXACT = 1 << 22  # `_quotient` is exact below this


def _quotient(x, divisor: int):
    """x // divisor for int32 0 <= x < EXACT. TPUs have no integer division: a shift, or one float32 product.

    x + 0.5 is at least 0.5 / divisor away from a multiple, relative to which the product is off by less than 2^-23 x.
    """
    if divisor & (divisor - 1) == 0:
        return x >> (divisor.bit_length() - 1)
    return ((x.astype(jnp.float32) + 0.5) * np.float32(1 / divisor)).astype(jnp.int32)


# --- what the kernels are told about a batch ---


class _Plan(NamedTuple):
    """Everything about a batch of tables but q, k and v; B tables on one axis of B * Lq queries and B * Lk keys."""

    code: jax.Array  # [B * Lq] int32
    q_segment: jax.Array  # [B * Lq] int32
    k_segment: jax.Array  # [B * Lk] int32
    forward: tuple[
        jax.Array, jax.Array
    ]  # key block to load, kind of block: [1, B * query blocks, key blocks]
    backward: tuple[
        jax.Array, jax.Array
    ]  # query block to load, kind of block: [1, query blocks, B * key blocks]
    apart: jax.Array  # [B * Lq] bool: the query does not see itself among the earlier keys
    own: (
        jax.Array
    )  # [Sq] int32: where the streams of the queries are among those of the keys, if they are


def _plan(q_cells, k_cells, q_streams, k_start, *, lag, rule, blocks, q_length, k_length) -> _Plan:
    batch, rows, q_size = q_cells.present.shape
    q_streams, k_start = jnp.asarray(q_streams, jnp.int32), jnp.asarray(k_start, jnp.int32)
    row = jnp.arange(rows, dtype=jnp.int32)
    queries = flatten(row, q_cells.segment, q_cells.present, q_length)
    keys = flatten(row, k_cells.segment, k_cells.seen, k_length)
    lags = lax.dynamic_slice_in_dim(jnp.asarray(lag), k_start, k_cells.seen.shape[2], axis=1)[
        q_streams
    ]
    kinds = block_map(queries, keys, lags.min(), lags.max(), *blocks)

    stream = jnp.pad(jnp.tile(q_streams, rows), (0, q_length - rows * q_size))
    code = jax.vmap(lambda table: rule.encode(queries.row, stream, table, k_start))(
        jnp.arange(batch)
    )
    own = q_streams - k_start
    seen_itself = (
        q_cells.present & k_cells.seen[:, :, own] & jnp.asarray(np.diagonal(lag) <= 0)[q_streams]
    )
    return _Plan(
        code=code.reshape(-1),
        q_segment=jnp.where(queries.here, queries.segment, NO_QUERY).reshape(-1),
        k_segment=jnp.where(keys.here, keys.segment, NO_KEY).reshape(-1),
        forward=_forward_order(kinds),
        backward=_backward_order(kinds),
        apart=~flatten(row, q_cells.segment, seen_itself, q_length).here.reshape(-1),
        own=own,
    )


def _following(active, places, axis: int):
    """Along an axis: the place of the first active entry from here on; past the last one, of the first of all."""
    size = active.shape[axis]
    index = lax.broadcasted_iota(jnp.int32, active.shape, axis)
    ahead = lax.cummin(jnp.where(active, index, size), axis=axis, reverse=True)
    first = lax.slice_in_dim(ahead, 0, 1, axis=axis)
    return places(jnp.where(ahead < size, ahead, first) % size)


def _forward_order(kinds):
    """(key block to load, kind) of each step. A step with nothing to compute already loads what the next one needs."""
    batch, q_blocks, k_blocks = kinds.shape
    steps = kinds.reshape(-1)  # table, query block, key block: as the kernel goes

    def place(step):
        return step // (q_blocks * k_blocks) * k_blocks + step % k_blocks

    load = _following(steps != EMPTY, place, 0)
    return load.reshape(1, batch * q_blocks, k_blocks), steps.reshape(1, batch * q_blocks, k_blocks)


def _backward_order(kinds):
    """The same for the keys' gradients, whose kernel goes through the query blocks of each key block."""
    batch, q_blocks, k_blocks = kinds.shape
    table = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    load = _following(kinds != EMPTY, lambda step: table * q_blocks + step, 1)
    return tuple(x.swapaxes(0, 1).reshape(1, q_blocks, batch * k_blocks) for x in (load, kinds))


# --- softmax over both parts ---


def _line(x, length: int):
    """[B, T, S, N, ...] -> [N, B * length, ...]: the kernels' axis, tables behind one another."""
    batch, rows, streams, heads, *rest = x.shape
    x = x.reshape(batch, rows * streams, heads, *rest)
    x = jnp.pad(x, [(0, 0), (0, length - rows * streams)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x, 2, 0).reshape(heads, batch * length, *rest)


def _unline(x, shape):
    """Inverse of `_line`; `shape` is that of its result."""
    batch, rows, streams, heads, *rest = shape
    x = x.reshape(heads, batch, -1, *rest)[:, :, : rows * streams]
    return jnp.moveaxis(x, 0, 2).reshape(shape)


def _operands(q, k, v, plan: _Plan):
    """On the kernels' axis: q, scaled; k and v; each query's own k and v."""
    q_length, k_length = plan.q_segment.size // q.shape[0], plan.k_segment.size // q.shape[0]
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    own = lax.optimization_barrier(tuple(_line(x[:, :, plan.own], q_length) for x in (k, v)))
    return (_line(scaled, q_length), _line(k, k_length), _line(v, k_length)), own


def _grouped(x, kv_heads: int):
    """[N, L, ...] -> [K, N / K, L, ...]: query heads by the key head that they use."""
    # Without the barrier, XLA keeps float32 copies of what the kernels read in bfloat16, of keys one per query head.
    return lax.optimization_barrier(x.reshape(kv_heads, -1, *x.shape[1:]))


def _dot(a, b):
    """Float32 sums of products over the last axis."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), -1)


def _own_scores(q, own_k, plan: _Plan):
    """[K, N / K, L] float32: each query's score with itself, -inf where the kernel has it among the earlier keys."""
    return jnp.where(plan.apart, _dot(_grouped(q, own_k.shape[0]), own_k[:, None]), -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, plan: _Plan, static):
    return _forward(q, k, v, plan, static)[0]


def _forward(q, k, v, plan, static):
    saved = jax.tree.map(
        lambda x: checkpoint_name(x, "attention"), (plan, *_outputs(q, k, v, plan, static))
    )
    return _unline(saved[1], q.shape), (q, k, v, *saved)


def _outputs(q, k, v, plan, static):
    """Output and log-sum-exp on the kernels' axis, and each query's own part of its softmax."""
    operands, (own_k, own_v) = _operands(q, k, v, plan)
    early_out, early_lse = (_grouped(x, k.shape[3]) for x in _run_forward(*operands, plan, static))
    own = _own_scores(operands[0], own_k, plan)
    # Without an earlier key, the kernel's log-sum-exp is -inf and its output not a number, or, if it met masked keys
    # only, a huge negative number and their mean.
    lse = jnp.logaddexp(early_lse, own)
    early, itself = jnp.exp(early_lse - lse)[..., None], jnp.exp(own - lse)[..., None]
    out = jnp.where(early > 0, early * early_out, 0) + itself * own_v[:, None]
    out, lse = out.astype(q.dtype).reshape(operands[0].shape), lse.reshape(operands[0].shape[:2])
    return out, lse, itself[..., 0]


def _backward(static, saved, d_out):
    q, k, v, plan, out, lse, itself = saved
    scale, kv_heads = q.shape[-1] ** -0.5, k.shape[3]
    operands, (own_k, own_v) = _operands(q, k, v, plan)
    d_out = _line(d_out, out.shape[1] // q.shape[0])
    # The part of the softmax's gradient that all keys of a query share.
    shared = _dot(out, d_out)
    d_q, d_k, d_v = _run_backward(*operands, lse, d_out, shared, plan, static)
    if itself is None:  # the keys are those of other streams
        return (
            _unline((d_q * scale).astype(q.dtype), q.shape),
            _unline(d_k, k.shape),
            _unline(d_v, k.shape),
            None,
        )

    q_line, d_out, shared, d_q = (_grouped(x, kv_heads) for x in (operands[0], d_out, shared, d_q))
    d_scores = itself * (_dot(d_out, own_v[:, None]) - shared)
    d_q = (d_q + d_scores[..., None] * own_k[:, None]) * scale

    def with_own(d, own):
        """The gradient of all keys, from the kernel, and of each query's own."""
        own = _unline(own.astype(k.dtype), (*q.shape[:3], *k.shape[3:]))
        return _unline(d, k.shape).at[:, :, plan.own].add(own, unique_indices=True)

    d_k = with_own(d_k, jnp.sum(d_scores[..., None] * q_line, 1))
    d_v = with_own(d_v, jnp.sum(itself[..., None] * d_out, 1))
    return _unline(d_q.astype(q.dtype), q.shape), d_k, d_v, None


_attention.defvjp(_forward, _backward)


# --- the kernels: all that is private to jax, which has no public way to run them backward on a given log-sum-exp ---

MASKED = kernels.DEFAULT_MASK_VALUE
LAYOUT = kernels.QKVLayout.HEAD_DIM_MINOR


def _mask_info(plan: _Plan, order) -> MaskInfo:
    load, kind = order
    return MaskInfo(
        data_next=load,
        mask_next=None,
        block_mask=kind,
        partial_mask_blocks=None,
        q_sequence=plan.code,
    )


def _run_forward(q, k, v, plan: _Plan, static):
    """Output [N, B * Lq, H] and log-sum-exp [N, B * Lq] float32 over the earlier keys."""
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


def _run_backward(q, k, v, lse, d_out, shared, plan: _Plan, static):
    """Gradients of q, k and v through the earlier keys, given log-sum-exp and `shared` [N, B * Lq] over all keys."""
    sees, blocks, interpret = static
    segments = kernels.SegmentIds(plan.q_segment, plan.k_segment)
    common = {
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
        shared,
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
        shared,
        bkv_compute=blocks.k,
        use_fused_bwd_kernel=False,
        mask_info=_mask_info(plan, plan.backward),
        **common,
    )
    return d_q, d_k, d_v
