"""Attention on TPUs with the splash-attention kernels of jax.

The kernels are a FlashAttention-2 in Pallas that skips blocks. They take one axis of queries and
one of keys, a segment id for each query and key, and a predicate on an int32 code of the query and
the index of the key. `visible()` is split into two parts to fit this interface:

- Earlier keys are the pairs that a lag admits, computed by the kernels. The segment ids hold what
  differs between tables; absent queries and unseen keys get ids that match no others. The code
  holds the query's row and the streams that its stream sees.
- The query's own key is one pair per query, computed in plain XLA. A silent cell may be hidden from
  all other cells but always sees itself, which segment ids cannot express.

Both parts are merged by their log-sum-exp. The backward kernels get the merged output and
log-sum-exp, so that they compute the gradient of one softmax over both parts.

All tables of a batch follow one another on the axis of the kernels. Each block of queries visits
only the key blocks of its own table, so the grid is as large as for separate calls.
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

LANES = 128  # lanes of a TPU's vector registers; the kernels' blocks are multiples of it
NO_QUERY, NO_KEY = -1, -2  # segment ids of absent queries and unseen keys; real ids are >= 0
EXACT = 1 << 22  # `_quotient` is exact below this


class Blocks(NamedTuple):
    """The number of cells in a block of queries and in a block of keys, for all kernels."""

    q: int
    k: int


# The keys are prefixes of the device kind, and the longest match is used. In the forward pass a
# block of q queries does q floating-point operations for each byte of keys and values that it loads
# (in bfloat16). This should be well above the chip's ratio of peak rate to memory bandwidth: 229
# for v4, 240 for v5e, 166 for v5p, 560 for v6e, 312 for v7x. Above that, smaller blocks are better,
# because they skip more between packed examples. All sizes here compile forward and backward; 2048
# x 2048 runs out of vector memory on v4, v5e and v5p. The sizes come from data sheets and compiled
# programs, not from timings.
BLOCKS = {
    "TPU": Blocks(512, 512),
    "TPU v6 lite": Blocks(1024, 512),
}
# The maximum number of entries in the block map of one call. An entry takes 5 bytes of scalar
# memory. Maps of this size compile for all TPU generations. They hold one table of 131,072 cells in
# blocks of 512, or 256 tables of 8,192 cells. Larger batches are split into several calls.
MAP_ENTRIES = 1 << 16
MAX_HEAD_DIM = 256  # the largest head_dim that is known to compile, also in float32


def blocks_for(device_kind: str) -> Blocks:
    """The block sizes for a TPU with this `device_kind`."""
    matching = (kind for kind in BLOCKS if device_kind.startswith(kind))
    return BLOCKS[max(matching, key=len, default="TPU")]


def declines(case: Case) -> str | None:
    """The reason why the kernels cannot compute `case` on a TPU, or None if they can."""
    if case.dtype not in ("bfloat16", "float32"):
        return f"it computes in bfloat16 or float32, but the model in {case.dtype}"
    if case.head_dim > MAX_HEAD_DIM:
        return f"it needs a head_dim of at most {MAX_HEAD_DIM}, not {case.head_dim}"
    if case.heads % case.kv_heads:
        return (
            "it needs the same number of query heads for each key head, but there are "
            f"{case.heads} for {case.kv_heads}"
        )
    blocks = blocks_for(case.device_kind)
    (q_block, q_length), (k_block, k_length) = _even_blocks(
        case.rows, case.q_streams, case.streams, blocks
    )
    if not _fits(1, q_length // q_block, k_length // k_block, k_length):
        return (
            f"{case.rows} rows of {case.streams} streams need a larger block map than the scalar "
            "memory of a TPU holds"
        )
    return None


def options(case: Case) -> dict[str, Any]:
    """The keyword arguments of `splash_attention` for a case."""
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
    """Computes `reference_attention` with TPU kernels: O(L) memory, forward and backward.

    Args:
      q: [B, T, Sq, N, H].
      k, v: [B, T, S, K, H].
      visibility: of rows 0 to T - 1 of the same tables, with keys of all S streams. Its `lag` must
        be a NumPy array, because it is compiled into the kernels. Its `query_streams` must hold
        each stream at most once.
      interpret: run the kernels on any device. This is slow.
      blocks: the largest block sizes, multiples of 128, from `blocks_for`. Smaller blocks are used
        where they need less padding.

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
    """Output and log-sum-exp over the keys of some streams; see `RingParts`."""
    plan, static, by_tables = _setup(q, k, visibility, interpret, blocks)

    def outputs(q, k, v, *cells):
        planned = plan(*cells)
        if visibility.key_offset is None:  # the keys include the queries' own
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
    """Gradients of q, k and v through the keys of some streams; see `RingParts`."""
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

    Returns: (plan, static, by_tables). `plan` makes a `_Plan` from cells of queries and of keys.
      `by_tables(function, *arrays)` calls a function with as many tables at a time as the kernels
      can take, and concatenates the results.
    """
    batch, rows, q_size = q.shape[:3]
    k_rows, k_size = k.shape[1:3]
    if k_rows != rows:
        raise ValueError(
            f"the queries have {rows} rows and the keys {k_rows}: pass queries and keys of the same"
            " rows"
        )
    (q_block, q_length), (k_block, k_length) = _even_blocks(
        rows, q_size, k_size, blocks or BLOCKS["TPU"]
    )
    per_table = (q_length // q_block, k_length // k_block, k_length)
    tables = next(
        n for n in range(batch, 0, -1) if n == 1 or batch % n == 0 and _fits(n, *per_table)
    )
    predicate = _make_predicate(np.asarray(visibility.lag), rows, tables, k_size, k_length)
    blocks = Blocks(q_block, k_block)

    def plan(q_cells: Cells, k_cells: Cells) -> _Plan:
        part = visibility._replace(queries=q_cells, keys=k_cells)
        return _plan(part, predicate, blocks, q_length, k_length)

    def by_tables(function: Callable, *arrays: Any) -> Any:
        if tables == batch:
            return function(*arrays)
        calls = jax.tree.map(lambda x: x.reshape(-1, tables, *x.shape[1:]), arrays)
        results = lax.map(lambda call: function(*call), calls)
        return jax.tree.map(lambda x: x.reshape(batch, *x.shape[2:]), results)

    return plan, _Static(predicate.sees, blocks, interpret), by_tables


def _even_blocks(
    rows: int, q_streams: int, k_streams: int, blocks: Blocks
) -> list[tuple[int, int]]:
    """Splits the axes into the fewest blocks, filled as evenly as possible.

    Args:
      rows: T.
      q_streams, k_streams: the streams of the queries and of the keys.
      blocks: the largest block sizes.

    Returns: (cells of a block, padded length) for queries and for keys.
    """
    sizes = []
    for cells, block in zip((rows * q_streams, rows * k_streams), blocks):
        count = -(-cells // block)
        block = -(-cells // (count * LANES)) * LANES
        sizes.append((block, count * block))
    return sizes


def _fits(tables: int, q_blocks: int, k_blocks: int, k_length: int) -> bool:
    """Whether one call can process this many tables.

    The block map must fit into scalar memory, and `_quotient` must be exact for the keys' indices.
    """
    return tables * q_blocks * k_blocks <= MAP_ENTRIES and tables * k_length < EXACT


# --- visibility as a predicate on (code of the query, index of the key) ---


class _Predicate(NamedTuple):
    """Which pairs of a query and an earlier key the lag matrix admits.

    Attributes:
      encode: (row [Lq], stream [Lq], table [], first stream of the keys []) -> code [Lq], all
        int32. Runs before the kernels.
      sees: (code, index of the key on the kernels' axis) -> bool. Runs elementwise in the kernels.
    """

    encode: Callable
    sees: Callable


def _make_predicate(
    lag: np.ndarray, rows: int, tables: int, size: int, k_length: int
) -> _Predicate:
    """The cheapest predicate that expresses the pairs that `lag` admits.

    These are the pairs of `visible()` without a cell's own key.

    Args:
      lag: [S, S] int32.
      rows: T.
      tables: the number of tables on the kernels' axis.
      size: the number of key streams: S, or S divided by the parts of ring attention.
      k_length: the number of keys of each table on the kernels' axis.
    """
    lags = np.unique(np.minimum(lag, rows))  # no row can reach a lag of `rows` or more
    finite = lags[lags < rows]
    if len(lags) == 1:
        # All streams have the same lag. The code is the index of the first key in the first row
        # that is not visible.
        def limit(row, stream, table, start):
            return table * k_length + jnp.maximum(row - lags[0] + 1, 0) * size

        return _Predicate(limit, lambda code, key: key < code)

    def row_and_stream(key):
        """The row and the stream of a key in its table."""
        if tables > 1:
            key = key - _quotient(key, k_length) * k_length
        row = _quotient(key, size)
        return row, key - row * size

    if len(finite) == 1 and rows.bit_length() + size <= 31:
        # There is one lag, and some streams are never seen. The code holds the number of visible
        # rows, and a bit for each stream that is seen.
        members = (lag == finite[0]).reshape(lag.shape[0], -1, size) << np.arange(size)
        seen_streams = jnp.asarray(members.sum(2), jnp.int32)

        def encode(row, stream, table, start):
            visible_rows = jnp.maximum(row - finite[0] + 1, 0)
            return visible_rows << size | seen_streams[stream, start // size]

        def sees(code, key):
            row, stream = row_and_stream(key)
            return (row < code >> size) & ((code >> stream) & 1 == 1)

        return _Predicate(encode, sees)

    # The lags are arbitrary. The predicate starts from the most frequent lag, and replaces it for
    # each pair of streams that has another one.
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
        pair_lag = jnp.full_like(code, usual)
        for other, value in others:
            pair_lag = jnp.where(pair == other, value, pair_lag)
        return row <= (code >> bits) - pair_lag

    return _Predicate(encode_pair, sees_pair)


def _quotient(x: jax.Array, divisor: int) -> jax.Array:
    """x // divisor for int32 0 <= x < EXACT, with a shift or one float32 product.

    TPUs have no integer division. The result is exact, because (x + 0.5) / divisor is at least
    0.5 / divisor away from an integer, and the float32 product is off by less than
    2^-23 x / divisor.
    """
    if divisor & (divisor - 1) == 0:
        return x >> (divisor.bit_length() - 1)
    return ((x.astype(jnp.float32) + 0.5) * np.float32(1 / divisor)).astype(jnp.int32)


# --- the kernels' arguments besides q, k and v ---


class _Plan(NamedTuple):
    """The cells of B tables, for kernels whose axes hold B * Lq queries and B * Lk keys.

    Attributes:
      code: [B * Lq] int32, see `_Predicate`.
      q_segment, k_segment: [B * Lq] and [B * Lk] int32, the segment ids.
      forward: (key block to load, kind of block), [1, B * query blocks, key blocks] each. The kinds
        are EMPTY, PARTIAL and FULL.
      backward: (query block to load, kind of block), [1, query blocks, B * key blocks] each.
      without_own: [B * Lq] bool, the query's own key is not among its earlier keys.
      own: [Sq] int32, the column of the keys that holds each stream of the queries. Out of range if
        the keys do not include the queries' own.
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
    """Makes the plan of one call. Lq is `q_length` and Lk is `k_length`."""
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
        q_segment=jnp.where(queries.used, queries.segment, NO_QUERY).reshape(-1),
        k_segment=jnp.where(keys.used, keys.segment, NO_KEY).reshape(-1),
        forward=_forward_order(kinds),
        backward=_backward_order(kinds),
        without_own=~flatten(row, q_cells.segment, own_is_earlier, q_length).used.reshape(-1),
        own=own,
    )


def _next_active(active: jax.Array, axis: int) -> jax.Array:
    """For each entry along `axis`, the index of the next active entry, which may be itself.

    After the last active entry this wraps around to the first one. Without active entries it is 0.
    """
    size = active.shape[axis]
    index = lax.broadcasted_iota(jnp.int32, active.shape, axis)
    ahead = lax.cummin(jnp.where(active, index, size), axis=axis, reverse=True)
    first = lax.slice_in_dim(ahead, 0, 1, axis=axis)
    return jnp.where(ahead < size, ahead, first) % size


def _forward_order(kinds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(key block to load, kind) of each step, from kinds [B, query blocks, key blocks].

    A step with nothing to compute loads the block that the next active step needs.
    """
    batch, q_blocks, k_blocks = kinds.shape
    shape = (1, batch * q_blocks, k_blocks)
    step = _next_active(kinds.reshape(-1) != EMPTY, 0)  # steps are in the order of `kinds`
    load = step // (q_blocks * k_blocks) * k_blocks + step % k_blocks
    return load.reshape(shape), kinds.reshape(shape)


def _backward_order(kinds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(query block to load, kind) of each step of the kernel for the gradients of keys.

    That kernel visits, for each key block, the query blocks of the same table.
    """
    batch, q_blocks, k_blocks = kinds.shape
    table = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    load = table * q_blocks + _next_active(kinds != EMPTY, 1)

    def by_key_block(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(1, q_blocks, batch * k_blocks)

    return by_key_block(load), by_key_block(kinds)


# --- softmax over both parts ---


def _to_kernel_axis(x: jax.Array, length: int) -> jax.Array:
    """[B, T, S, N, ...] -> [N, B * length, ...]: the kernels' axis, table after table."""
    batch, rows, streams, heads, *rest = x.shape
    x = x.reshape(batch, rows * streams, heads, *rest)
    x = jnp.pad(x, [(0, 0), (0, length - rows * streams)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x, 2, 0).reshape(heads, batch * length, *rest)


def _from_kernel_axis(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_to_kernel_axis` on an array of shape `shape`."""
    batch, rows, streams, heads, *rest = shape
    x = x.reshape(heads, batch, -1, *rest)[:, :, : rows * streams]
    return jnp.moveaxis(x, 0, 2).reshape(shape)


def _operands(
    q: jax.Array, k: jax.Array, v: jax.Array, plan: _Plan
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """(scaled q, k, v) and each query's own (k, v), on the kernels' axis."""
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
    """[N, L, ...] -> [K, N / K, L, ...]: query heads grouped by their key head."""
    # Without this barrier XLA saves float32 copies of the kernels' bfloat16 inputs, and a copy of
    # the keys for each query head.
    return lax.optimization_barrier(x.reshape(kv_heads, -1, *x.shape[1:]))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The dot product over the last axis, in float32."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), -1)


def _own_scores(q: jax.Array, own_k: jax.Array, plan: _Plan) -> jax.Array:
    """Each query's score with its own key, [K, N / K, L] float32.

    The score is -inf where the kernel handles the own key as one of the earlier keys.
    """
    scores = _dot(_grouped(q, own_k.shape[0]), own_k[:, None])
    return jnp.where(plan.without_own, scores, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, plan: _Plan, static: _Static) -> jax.Array:
    """The output [B, T, Sq, N, H] in q's dtype."""
    return _forward(q, k, v, plan, static)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, plan: _Plan, static: _Static
) -> tuple[jax.Array, tuple[Any, ...]]:
    """The forward pass: the output, and the values that `_backward` needs."""
    saved = checkpoint_name((plan, *_outputs(q, k, v, plan, static)), "attention")
    _, out, _, _ = saved
    return _from_kernel_axis(out, q.shape), (q, k, v, *saved)


def _outputs(
    q: jax.Array, k: jax.Array, v: jax.Array, plan: _Plan, static: _Static
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output, log-sum-exp and the weight of each query's own key, on the kernels' axis.

    Returns: [N, B * Lq, H] in q's dtype, [N, B * Lq] float32, [K, N / K, B * Lq] float32.
    """
    operands, (own_k, own_v) = _operands(q, k, v, plan)
    early_out, early_lse = (_grouped(x, k.shape[3]) for x in _run_forward(*operands, plan, static))
    own = _own_scores(operands[0], own_k, plan)
    lse = jnp.logaddexp(early_lse, own)
    early_weight, own_weight = jnp.exp(early_lse - lse)[..., None], jnp.exp(own - lse)[..., None]
    # For a query without an earlier key, the kernel's log-sum-exp is -inf and its output is NaN. If
    # the kernel visited masked keys, they are a large negative number and the mean of the masked
    # values. The weight is 0 in both cases.
    early = jnp.where(early_weight > 0, early_weight * early_out, 0)
    out = early + own_weight * own_v[:, None]
    out, lse = out.astype(q.dtype).reshape(operands[0].shape), lse.reshape(operands[0].shape[:2])
    return out, lse, own_weight[..., 0]


def _backward(static: _Static, saved: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    """Gradients of q, k and v, and None for the plan."""
    q, k, v, plan, out, lse, own_weight = saved
    scale, kv_heads = q.shape[-1] ** -0.5, k.shape[3]
    operands, (own_k, own_v) = _operands(q, k, v, plan)
    d_out = _to_kernel_axis(d_out, out.shape[1] // q.shape[0])
    # The softmax's gradient has a term that all keys of a query share: the sum over the keys of
    # weights * d_weights, which equals the sum over H of out * d_out.
    delta = _dot(out, d_out)
    d_q, d_k, d_v = _run_backward(*operands, lse, d_out, delta, plan, static)
    if own_weight is None:  # the keys do not include the queries' own
        return (
            _from_kernel_axis((d_q * scale).astype(q.dtype), q.shape),
            _from_kernel_axis(d_k, k.shape),
            _from_kernel_axis(d_v, k.shape),
            None,
        )

    scaled, d_out, delta, d_q = (_grouped(x, kv_heads) for x in (operands[0], d_out, delta, d_q))
    d_scores = own_weight * (_dot(d_out, own_v[:, None]) - delta)
    d_q = (d_q + d_scores[..., None] * own_k[:, None]) * scale

    def add_own(gradient: jax.Array, own: jax.Array) -> jax.Array:
        """Adds the gradient of each query's own key to the kernel's gradient of all keys."""
        own = _from_kernel_axis(own.astype(k.dtype), (*q.shape[:3], *k.shape[3:]))
        gradient = _from_kernel_axis(gradient, k.shape)
        return gradient.at[:, :, plan.own].add(own, unique_indices=True)

    d_k = add_own(d_k, jnp.sum(d_scores[..., None] * scaled, 1))
    d_v = add_own(d_v, jnp.sum(own_weight[..., None] * d_out, 1))
    return _from_kernel_axis(d_q.astype(q.dtype), q.shape), d_k, d_v, None


_attention.defvjp(_forward, _backward)


# --- calls of the kernels ---
#
# Private functions of jax are used only below. jax has no public way to run the backward kernels
# with a given log-sum-exp.

MASKED = kernels.DEFAULT_MASK_VALUE
LAYOUT = kernels.QKVLayout.HEAD_DIM_MINOR


def _mask_info(plan: _Plan, order: tuple[jax.Array, jax.Array]) -> MaskInfo:
    """The kernels' block map; `order` is `plan.forward` or `plan.backward`."""
    load, kind = order
    return MaskInfo(
        data_next=load,
        mask_next=None,
        block_mask=kind,
        partial_mask_blocks=None,
        q_sequence=plan.code,  # type: ignore[arg-type]  # traced arrays work as well
    )


def _run_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, plan: _Plan, static: _Static
) -> tuple[jax.Array, jax.Array]:
    """Output [N, B * Lq, H] and log-sum-exp [N, B * Lq] float32 over the earlier keys.

    Args:
      q: [N, B * Lq, H].
      k, v: [K, B * Lk, H].
      plan: the cells.
      static: what the kernels are compiled for.
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

    Args:
      q, d_out: [N, B * Lq, H].
      k, v: [K, B * Lk, H].
      lse, delta: [N, B * Lq], over all keys.
      plan: the cells.
      static: what the kernels are compiled for.
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
