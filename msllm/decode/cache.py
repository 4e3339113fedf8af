"""The key-value cache of sessions: its layout in memory, and attention over it.

Each session has a window of W rows. A session may keep its first rows for good. In the rest of the
window, a new row replaces the oldest one. The cache stores the number of each row beside its keys,
and `streams.Visibility` decides from these numbers which cells a query sees. A row that fell out of
the window is no longer stored, so no query sees it.

Every block of rows of every layer has its own arrays. A matrix product reads a whole array, and XLA
would first copy a slice of a larger one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msllm.config import ModelConfig
from msllm.kernels import cpu as cpu_kernels
from msllm.kernels.cpu import PANEL
from msllm.model.relays import Columns
from msllm.sharding import axis_index, axis_size, gather_streams, psum
from msllm.streams import Cells, Visibility

UNREAD = -1  # the row number of a place in the window that holds no row
# The score of an invisible pair. It is finite because a device may hold no key that a query sees:
# with -inf, the softmax over that device's keys would be nan.
MASKED = -1e30
# Attention reads this many rows at a time, and skips blocks that no session has reached.
BLOCK_ROWS = 512
DTYPES = ("float32", "bfloat16", "int8")
# On CPUs a bfloat16 cache is stored as raw bits. XLA:CPU computes in float32 and would convert the
# whole cache to write one row.
BITS = "uint16"


class Layout(NamedTuple):
    """The order of the dimensions of keys and of values, as names of logical axes.

    In a layout with an axis "panel", the axis "row" counts the PANEL rows within a panel.
    """

    keys: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def in_panels(self) -> bool:
        return "panel" in self.keys


# The order in which the model computes keys and values.
CELLS = ("batch", "row", "stream", "kv_heads", "head_dim")
# The fastest order for attention by XLA on CPUs. On TPUs, rows need no padding to the lane width.
ROWS_LAST = Layout(*[("batch", "kv_heads", "head_dim", "stream", "row")] * 2)
# The order in which `cpu_kernels.attend_row` reads keys and values.
PANELS = Layout(
    ("batch", "kv_heads", "stream", "panel", "head_dim", "row"),
    ("batch", "kv_heads", "stream", "panel", "row", "head_dim"),
)


class Stored(NamedTuple):
    """Keys or values of R rows in one layer, in the order of a Layout: [B, K, H, S, R] or panels.

    The fields are arrays, or their shardings.
    """

    data: Any  # float32, bfloat16, BITS or int8
    scale: Any  # for int8: float32, one scale for each head's vector (H = 1); else None

    def unscaled(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The data as `dtype`, not multiplied by the scale."""
        data = self.data
        if data.dtype == BITS:
            data = jax.lax.bitcast_convert_type(data, jnp.bfloat16)
        return data.astype(dtype)


Blocks = list[Stored]  # the blocks of one layer's keys or values, in the order of rows


class Cache(NamedTuple):
    """Everything that attention needs from earlier rows."""

    keys: list[Blocks]  # per layer
    values: list[Blocks]
    cells: Cells  # [B, W] and [B, W, S]; places without a row are not seen


def block_sizes(window: int, layout: Layout = ROWS_LAST) -> tuple[int, int]:
    """(number of blocks, rows per block) for a window. The blocks hold at least its rows."""
    number, unit = -(-window // BLOCK_ROWS), _unit(layout.keys)
    return number, -(-window // (number * unit)) * unit


def _unit(axes: tuple[str, ...]) -> int:
    """The number that the rows of a block are a multiple of."""
    return PANEL if "panel" in axes else 1


def empty_cache(
    config: ModelConfig, batch: int, window: int, streams: int, dtype: str, layout: Layout
) -> Cache:
    """An empty cache with a window of `window` rows for each of `batch` sessions.

    Args:
      dtype: one of DTYPES, or BITS.
    """
    number, rows = block_sizes(window, layout)
    window = number * rows  # rounded up to full blocks; the places beyond the window stay empty

    def stored(axes: tuple[str, ...]) -> Stored:
        unit = _unit(axes)
        sizes = {
            "batch": batch,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "stream": streams,
            "panel": rows // unit,
            "row": rows if unit == 1 else unit,
        }
        data = jnp.zeros([sizes[axis] for axis in axes], dtype)
        if dtype != "int8":
            return Stored(data, None)
        sizes["head_dim"] = 1
        return Stored(data, jnp.zeros([sizes[axis] for axis in axes], "float32"))

    def layers(axes: tuple[str, ...]) -> list[Blocks]:
        return [[stored(axes) for _ in range(number)] for _ in range(config.num_layers)]

    cells = Cells(
        row=jnp.full((batch, window), UNREAD, jnp.int32),
        segment=jnp.ones((batch, window), jnp.int32),
        present=jnp.zeros((batch, window, streams), bool),
        seen=jnp.zeros((batch, window, streams), bool),
    )
    return Cache(layers(layout.keys), layers(layout.values), cells)


def place(row: jax.Array, keep: jax.Array, window: int) -> jax.Array:
    """The place of a row in a window whose first `keep` rows never fall out."""
    return jnp.where(row < keep, row, keep + (row - keep) % (window - keep))


def store(x: jax.Array, dtype: jax.typing.DTypeLike, axes: tuple[str, ...]) -> Stored:
    """Converts keys or values [B, T, S, K, H] to the form in which the cache stores them.

    With int8, each vector of H numbers has its own scale. Zeros fill up the last panel.

    Args:
      dtype: one of DTYPES, or BITS.
      axes: the order of the dimensions, from a Layout.
    """
    names = CELLS
    if "panel" in axes:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % PANEL), *[(0, 0)] * 3])
        x = x.reshape(len(x), -1, PANEL, *x.shape[2:])
        names = ("batch", "panel", *names[1:])
    x = x.transpose([names.index(axis) for axis in axes])
    if dtype == BITS:
        return Stored(jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype), None)
    if dtype != jnp.int8:
        return Stored(x.astype(dtype), None)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axes.index("head_dim"), keepdims=True) * (1 / 127)
    return Stored(jnp.round(x / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8), scale)


def write_row(
    keys: Blocks,
    values: Blocks,
    k: jax.Array,
    v: jax.Array,
    at: jax.Array,
    layout: Layout,
    rows: int,
) -> tuple[Blocks, Blocks]:
    """Stores one row of each session in one layer.

    Args:
      keys, values: the layer's blocks, of `rows` rows each.
      k, v: [B, 1, S, K, H].
      at: [B] int32, places in the window. A place beyond the window stores nothing.

    Returns: the new keys and values.
    """
    write = _write_row_by_kernel if layout.in_panels else _write_row_by_xla
    written = [
        write(block, k, v, at - number * rows, layout, rows)
        for number, block in enumerate(zip(keys, values))
    ]
    return [key for key, _ in written], [value for _, value in written]


def _write_row_by_kernel(
    block: tuple[Stored, Stored], k, v, at: jax.Array, layout: Layout, rows: int
) -> tuple[Stored, Stored]:
    """`write_row` for one block, in place."""
    del layout, rows
    leaves, tree = jax.tree.flatten(block)
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    return jax.tree.unflatten(tree, cpu_kernels.write_row(leaves, k, v, at))


def _write_row_by_xla(
    block: tuple[Stored, Stored], k, v, at: jax.Array, layout: Layout, rows: int
) -> tuple[Stored, Stored]:
    """`write_row` for one block, as a loop over the sessions that write to it.

    XLA:CPU would fuse a scatter, or a sequence of slice updates, into the matrix products that
    follow, and write to copies of the cache.
    """
    dtype = block[0].data.dtype
    new = [store(k, dtype, layout.keys), store(v, dtype, layout.values)]
    elsewhere = (at < 0) | (at >= rows)
    order = jnp.argsort(elsewhere)  # the sessions that write to this block come first

    def write_session(i, block):
        session = order[i]

        def put(axes, old, new):
            start = [{"batch": session, "row": at[session]}.get(axis, 0) for axis in axes]
            row = jax.lax.dynamic_slice_in_dim(new, session, 1)
            return jax.lax.dynamic_update_slice(old, row, start)

        def put_all(axes, old, new):
            return jax.tree.map(lambda old, new: put(axes, old, new), old, new)

        return tuple(map(put_all, layout, block, new))

    return jax.lax.fori_loop(0, jnp.sum(~elsewhere), write_session, block)


def write_table(
    blocks: Blocks, x: jax.Array, slot: jax.Array, axes: tuple[str, ...], rows: int
) -> Blocks:
    """Stores rows at the beginning of one session's window, in one layer.

    Args:
      blocks: the layer's keys or values, in blocks of `rows` rows.
      x: [1, T, S, K, H].
      slot: [] int32, the session. A slot beyond all sessions stores nothing.
      axes: the order of the dimensions of the blocks.
    """
    unit, new = _unit(axes), store(x, blocks[0].data.dtype, axes)
    row_axis = axes.index("panel" if unit > 1 else "row")

    def write_block(block: Stored, start: int) -> Stored:
        def put(old, new):
            end = min((start + rows) // unit, new.shape[row_axis])
            part = jax.lax.slice_in_dim(new, start // unit, end, axis=row_axis)[0]
            return old.at[(slot, *map(slice, part.shape))].set(part, mode="drop")

        return jax.tree.map(put, block, new) if start < x.shape[1] else block

    return [write_block(block, number * rows) for number, block in enumerate(blocks)]


def write_cells(old: Cells, new: Cells, at: jax.Array) -> Cells:
    """Stores the cells of one row of each session, [B, 1] and [B, 1, S], at places [B]."""
    batch = jnp.arange(at.shape[0])
    return jax.tree.map(lambda old, new: old.at[batch, at].set(new[:, 0], mode="drop"), old, new)


def visible_keys(queries: Cells, keys: Cells, columns: Columns) -> jax.Array:
    """The mask of one row's queries, in each session, over the keys of this device.

    Args:
      queries: [B, 1] and [B, 1, S].
      keys: [B, W] and [B, W, M].
      columns: of the model.

    Returns: [B, S, columns of this device, W] bool, True where the query sees the key.
    """
    size = columns.size
    streams = np.arange(len(columns.lag)).reshape(-1, size)[:, : columns.streams].ravel()
    lag = jnp.asarray(columns.lag)
    mask = Visibility(queries, keys, lag, jnp.asarray(streams, jnp.int32), 0).mask()[:, 0]
    mask = jax.lax.dynamic_slice_in_dim(mask, axis_index("stream") * size, size, axis=3)
    return mask.swapaxes(2, 3)


class _Softmax(NamedTuple):
    """Partial attention over some of the keys, for each query [B, K, N / K, S].

    See FlashAttention, arXiv 2205.14135.
    """

    top: jax.Array  # [..., 1] the highest score
    norm: jax.Array  # [..., 1] the sum of e^(score - top)
    out: jax.Array  # [..., H] the sum of the values, weighted by e^(score - top)

    def merge(self, other: _Softmax) -> _Softmax:
        """The partial attention over the keys of both."""
        top = jnp.maximum(self.top, other.top)
        parts = []
        for part in (self, other):
            scale = jnp.exp(part.top - top)
            parts.append((part.norm * scale, part.out * scale))
        (norm, out), (other_norm, other_out) = parts
        return _Softmax(top, norm + other_norm, out + other_out)


def attend(
    q: jax.Array,
    keys: Blocks,
    values: Blocks,
    mask: jax.Array,
    filled: jax.Array,
    kernel: Callable | None = None,
) -> jax.Array:
    """Attention of one row over the cache, with an online softmax over its blocks.

    Inside `shard_map`, each device holds the keys of its own streams. Every device receives the
    queries of all streams, which are far smaller than the keys. The softmax is combined over the
    mesh axis `stream`.

    Args:
      q: [B, 1, S of this device, N, H].
      keys, values: one layer's blocks.
      mask: from `visible_keys`.
      filled: [] int32. No session that advances has written a place from `filled` on.
      kernel: attention over one block in panels (`cpu_kernels.attend_row`). None: use XLA, with
        blocks that have the rows last.

    Returns: the same shape and dtype as q.
    """
    streams, all_q = q.shape[2], gather_streams(q)
    grouped = _group_by_kv_head(all_q, keys[0].data.shape[1])
    rows = mask.shape[-1] // len(keys)

    def attend_block(i: int, keys: Stored, values: Stored, mask) -> _Softmax:
        if kernel:
            block_filled = filled - i * rows if i else filled
            return _attend_block_by_kernel(kernel, grouped, keys, values, mask, block_filled)
        return _attend_block_by_xla(grouped, keys, values, mask, q.dtype)

    softmax = attend_block(0, keys[0], values[0], mask[..., :rows])
    for i in range(1, len(keys)):

        def add(softmax, keys, values, mask, i=i):
            return softmax.merge(attend_block(i, keys, values, mask))

        def skip(softmax, *_):
            return softmax

        block = keys[i], values[i], mask[..., i * rows : (i + 1) * rows]
        softmax = jax.lax.cond(filled > i * rows, add, skip, softmax, *block)
    out = _normalised(softmax).transpose(0, 3, 1, 2, 4).reshape(all_q.shape).astype(q.dtype)
    return jax.lax.dynamic_slice_in_dim(out, axis_index("stream") * streams, streams, axis=2)


def _group_by_kv_head(q: jax.Array, kv_heads: int) -> jax.Array:
    """Scaled queries [B, 1, S, N, H] as [B, K, N / K, S, H]."""
    batch, _, streams, _, head_dim = q.shape
    grouped = q.reshape(batch, streams, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    return grouped * head_dim**-0.5


def _attend_block_by_kernel(
    kernel: Callable, q: jax.Array, keys: Stored, values: Stored, mask, filled
) -> _Softmax:
    """Attention of queries [B, K, N / K, S, H] over one block in panels."""
    scales = [x.scale for x in (keys, values) if x.scale is not None]
    queries = _flat_queries(q).astype(jnp.float32)
    parts = kernel(queries, keys.data, values.data, mask, filled, scales, MASKED)
    return _Softmax(*(_like_queries(x, q) for x in parts))


def _attend_block_by_xla(
    q: jax.Array, keys: Stored, values: Stored, mask, dtype: jax.typing.DTypeLike
) -> _Softmax:
    """Attention of queries [B, K, N / K, S, H] over one block with rows last."""

    def flat_keys(x):
        """The keys of all rows and streams as one axis M."""
        return x.reshape(*x.shape[:3], -1)

    def dot(equation, x, y):
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

    batch, streams = q.shape[0], q.shape[3]
    scores = dot("bkqh,bkhm->bkqm", _flat_queries(q), flat_keys(keys.unscaled(dtype)))
    if keys.scale is not None:
        scores *= flat_keys(keys.scale)
    mask = mask.reshape(batch, 1, 1, streams, -1)
    scores = jnp.where(mask, _like_queries(scores, q), MASKED)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    norm, weights = weights.sum(-1, keepdims=True), _flat_queries(weights)
    if values.scale is not None:
        weights *= flat_keys(values.scale)
    out = dot("bkhm,bkqm->bkhq", flat_keys(values.unscaled(dtype)), weights.astype(dtype))
    return _Softmax(top, norm, _like_queries(out.swapaxes(2, 3), q))


def _flat_queries(x: jax.Array) -> jax.Array:
    """[B, K, N / K, S, ...] -> [B, K, Q, ...], Q = N / K * S."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _like_queries(x: jax.Array, q: jax.Array) -> jax.Array:
    """[B, K, Q, ...] -> [B, K, N / K, S, ...], the dimensions of q."""
    return x.reshape(*q.shape[:-1], x.shape[-1])


def _normalised(softmax: _Softmax) -> jax.Array:
    """The attention output [B, K, N / K, S, H], over the keys of all devices."""
    top, norm, out = softmax
    if axis_size("stream") > 1:
        scale = jnp.exp(top - jax.lax.pmax(top, "stream"))
        norm, out = psum(norm * scale, "stream"), psum(out * scale, "stream")
    return out / norm
