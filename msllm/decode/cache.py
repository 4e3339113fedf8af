"""Keys and values of the rows that sessions have read: where a row lies, how it is stored, attention over what is there.

A window of W rows belongs to each session. Its first rows are kept for good, as many as the session asks for; in the
others a new row takes the place of the oldest. Which cells a query sees follows from the row numbers that lie beside
the keys, by the one rule of `streams.py`, and never from their places: rows that fell out are not there to be seen.

Every block of rows of every layer has its own arrays: a product reads a whole array, a slice of one would be copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from msllm.config import ModelConfig
from msllm.kernels import cpu as cpu_kernels
from msllm.kernels.cpu import PANEL
from msllm.sharding import axis_index, axis_size, gather_streams, psum
from msllm.streams import Cells, Visibility

UNREAD = -1  # the number of a row that has not been read: no query's
MASKED = (
    -1e30
)  # score of a pair that is not visible; finite, since a device may hold no key that a query sees
BLOCK_ROWS = (
    512  # rows that attention reads at a time; the blocks that no session has come to are left out
)
DTYPES = ("float32", "bfloat16", "int8")
BITS = "uint16"  # those of bfloat16, on a CPU: there XLA computes in float32, and would convert a whole cache to write one row


class Layout(NamedTuple):
    """The dimensions of keys and of values, by the names of their logical axes. With "panel", "row" is one inside of it."""

    keys: tuple[str, ...]
    values: tuple[str, ...]


CELLS = ("batch", "row", "stream", "kv_heads", "head_dim")  # as the model makes them
# The products of attention by XLA are fastest so on CPUs, and nothing is padded to the lanes of a TPU.
ROWS_LAST = Layout(*[("batch", "kv_heads", "head_dim", "stream", "row")] * 2)
# What `cpu_kernels.attend_row` reads from one end to the other.
PANELS = Layout(
    ("batch", "kv_heads", "stream", "panel", "head_dim", "row"),
    ("batch", "kv_heads", "stream", "panel", "row", "head_dim"),
)


class Stored(NamedTuple):
    """Keys or values of R rows in one layer."""

    values: jax.Array  # float32, bfloat16, BITS or int8, in a Layout: [B, K, H, S, R], or in panels
    scale: jax.Array | None  # int8: float32, one unit of each head's vector, H = 1; else None

    def numbers(self, dtype) -> jax.Array:
        """The values in another type, not scaled."""
        bits = self.values.dtype == BITS
        return (
            jax.lax.bitcast_convert_type(self.values, jnp.bfloat16) if bits else self.values
        ).astype(dtype)


class Cache(NamedTuple):
    """All that attention needs of earlier rows."""

    keys: list[list[Stored]]  # per layer, per block
    values: list[list[Stored]]
    cells: Cells  # [B, W] and [B, W, S]; rows not read are not seen


def blocks(window: int, layout: Layout = ROWS_LAST) -> tuple[int, int]:
    """(number, rows of each) of the blocks of a window; they hold at least so many rows."""
    number, unit = -(-window // BLOCK_ROWS), _unit(layout.keys)
    return number, -(-window // (number * unit)) * unit


def _unit(axes: tuple[str, ...]) -> int:
    """Rows of which there are whole multiples in a block."""
    return PANEL if "panel" in axes else 1


def empty_cache(
    config: ModelConfig, batch: int, window: int, streams: int, dtype: str, layout: Layout
) -> Cache:
    """A cache of `window` rows for each of `batch` sessions, nothing read yet."""
    number, rows = blocks(window, layout)
    window = number * rows  # the last places may stay empty
    sizes = {
        "batch": batch,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "stream": streams,
    }

    def stored(axes: tuple[str, ...]) -> list[list[Stored]]:
        unit = _unit(axes)
        all_sizes = {**sizes, "panel": rows // unit, "row": rows if unit == 1 else unit}

        def zeros(dtype, **other):
            return jnp.zeros([{**all_sizes, **other}[axis] for axis in axes], dtype)

        def one():
            return Stored(zeros(dtype), zeros("float32", head_dim=1) if dtype == "int8" else None)

        return [[one() for _ in range(number)] for _ in range(config.num_layers)]

    row, segment = (
        jnp.full((batch, window), UNREAD, jnp.int32),
        jnp.ones((batch, window), jnp.int32),
    )
    present, seen = (jnp.zeros((batch, window, streams), bool) for _ in range(2))
    return Cache(stored(layout.keys), stored(layout.values), Cells(row, segment, present, seen))


def place(row, kept, window: int):
    """Where a row lies in a window of `window` rows of which the first `kept` stay; integers or arrays of them."""
    return jnp.where(row < kept, row, kept + (row - kept) % (window - kept))


def store(x: jax.Array, dtype, axes: tuple[str, ...]) -> Stored:
    """Keys or values [B, T, S, K, H] as the cache has them; int8 with a scale for each vector. The last panel is filled up with
    zeros."""
    names = CELLS
    if "panel" in axes:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % PANEL), *[(0, 0)] * 3]).reshape(
            len(x), -1, PANEL, *x.shape[2:]
        )
        names = ("batch", "panel", *names[1:])
    x = x.transpose(*map(names.index, axes))
    if dtype == BITS:
        return Stored(jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), dtype), None)
    if dtype != jnp.int8:
        return Stored(x.astype(dtype), None)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axes.index("head_dim"), keepdims=True) * (1 / 127)
    return Stored(jnp.round(x / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8), scale)


def write_row(
    keys: list[Stored],
    values: list[Stored],
    k: jax.Array,
    v: jax.Array,
    at: jax.Array,
    layout: Layout,
    rows: int,
):
    """Stores one row of each session in one layer: k and v [B, 1, S, K, H], at places [B], in blocks of so many rows.
    Returns (keys, values). A place beyond the window writes nothing."""
    if "panel" in layout.keys:
        new = [x.astype(jnp.float32) for x in (k, v)]

        def write(block, at):
            return jax.tree.unflatten(
                jax.tree.structure(block), cpu_kernels.write_row(jax.tree.leaves(block), *new, at)
            )
    else:
        new = [store(x, keys[0].values.dtype, axes) for x, axes in zip((k, v), layout)]

        def write(block, at):
            return _write_row(block, new, at, layout, rows)

    written = [write(block, at - number * rows) for number, block in enumerate(zip(keys, values))]
    return [list(x) for x in zip(*written)]


def _write_row(block, new, at: jax.Array, layout: Layout, rows: int):
    """`write_row` for one block, (keys, values) of `rows` rows, by XLA.

    A loop over the sessions that write here, and not a scatter, nor slices one after the other: these XLA:CPU would merge into
    the products that follow, and write to copies of the cache.
    """
    elsewhere = (at < 0) | (at >= rows)
    order = jnp.argsort(elsewhere)  # those that write here come first

    def write(i, block):
        b = order[i]

        def put(axes, old, new):
            start = [{"batch": b, "row": at[b]}.get(axis, 0) for axis in axes]
            return jax.lax.dynamic_update_slice(old, jax.lax.dynamic_slice_in_dim(new, b, 1), start)

        return tuple(
            jax.tree.map(functools.partial(put, axes), *both)
            for axes, *both in zip(layout, block, new)
        )

    return jax.lax.fori_loop(0, jnp.sum(~elsewhere), write, block)


def write_table(
    blocks: list[Stored], x: jax.Array, slot, axes: tuple[str, ...], rows: int
) -> list[Stored]:
    """Stores rows x [1, T, S, K, H] at the first places of a session, in blocks of so many rows; a session beyond all of
    them stores nothing."""
    unit, new = _unit(axes), store(x, blocks[0].values.dtype, axes)
    axis = axes.index("panel" if unit > 1 else "row")

    def put(old, new, start):
        end = min((start + rows) // unit, new.shape[axis])
        part = jax.lax.slice_in_dim(new, start // unit, end, axis=axis)[0]
        return old.at[(slot, *map(slice, part.shape))].set(part, mode="drop")

    def start(number):
        return functools.partial(put, start=number * rows)

    return [
        jax.tree.map(start(i), old, new) if i * rows < x.shape[1] else old
        for i, old in enumerate(blocks)
    ]


def write_cells(old: Cells, new: Cells, at: jax.Array) -> Cells:
    """The same for the cells of one row of each session, [B, 1] and [B, 1, S]."""
    batch = jnp.arange(at.shape[0])
    return jax.tree.map(lambda old, new: old.at[batch, at].set(new[:, 0], mode="drop"), old, new)


def visible_keys(queries: Cells, keys: Cells, lag, streams: int) -> jax.Array:
    """The rule, for one row of each session and this device's `streams` of the keys: [B, S, streams, W] bool."""
    mask = Visibility(queries, keys, jnp.asarray(lag), jnp.arange(lag.shape[0])).mask()[:, 0]
    return jax.lax.dynamic_slice_in_dim(
        mask, axis_index("stream") * streams, streams, axis=3
    ).swapaxes(2, 3)


def attend(
    q: jax.Array,
    keys: list[Stored],
    values: list[Stored],
    mask: jax.Array,
    filled: jax.Array,
    kernel: Callable | None = None,
) -> jax.Array:
    """Attention of one row over the cache, with an online softmax over its blocks (arXiv 2205.14135).

    Inside `shard_map` every device has the keys of its own streams; all queries come to all keys, which is far less to
    send, and the softmax is put together over the mesh axis `stream`.

    Args:
      q: [B, 1, S of this device, N, H]. keys, values: one layer's blocks, rows last. mask: from `visible_keys`.
      filled: [] int32: places from here on have not been written by any session that matters.
      kernel: attention over one block, instead of XLA's: `cpu_kernels.attend_row`, for blocks in panels.

    Returns: the same shape and dtype as q.
    """
    mine, all_q = q.shape[2], gather_streams(q)
    batch, _, streams, heads, head_dim = all_q.shape
    kv_heads = keys[0].values.shape[1]
    grouped = (
        all_q.reshape(batch, streams, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
        * head_dim**-0.5
    )
    grouped = grouped.reshape(batch, kv_heads, -1, head_dim)

    def by_stream(x):
        return x.reshape(batch, kv_heads, -1, streams, x.shape[-1])

    def by_head(x):
        return x.reshape(batch, kv_heads, -1, x.shape[-1])

    def dot(equation, x, y):
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)

    def part(keys: Stored, values: Stored, mask, filled):
        """(highest score, sum of the weights, weighted sum of the values) over some rows."""
        if kernel:
            scales = [x.scale for x in (keys, values) if x.scale is not None]
            queries = grouped.astype(jnp.float32)
            return [
                by_stream(x)
                for x in kernel(queries, keys.values, values.values, mask, filled, scales, MASKED)
            ]

        def flat(x):
            return x.reshape(*x.shape[:3], -1)  # the keys of all rows and streams, M

        scores = dot("bkqh,bkhm->bkqm", grouped, flat(keys.numbers(q.dtype)))
        if keys.scale is not None:
            scores *= flat(keys.scale)
        scores = jnp.where(mask.reshape(batch, 1, 1, streams, -1), by_stream(scores), MASKED)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        norm, weights = weights.sum(-1, keepdims=True), by_head(weights)
        if values.scale is not None:
            weights *= flat(values.scale)
        out = dot("bkhm,bkqm->bkhq", flat(values.numbers(q.dtype)), weights.astype(q.dtype))
        return top, norm, by_stream(out.swapaxes(2, 3))

    def merge(old, new):
        top = jnp.maximum(old[0], new[0])
        scaled = [[x * jnp.exp(of[0] - top) for x in of[1:]] for of in (old, new)]
        return top, *map(jnp.add, *scaled)

    rows = mask.shape[-1] // len(keys)
    for i, block in enumerate(zip(keys, values)):
        cut = mask[..., i * rows : (i + 1) * rows]
        if i == 0:
            top, norm, out = part(*block, cut, filled)
        else:

            def add(so_far, keys, values, cut):
                return merge(so_far, part(keys, values, cut, filled - i * rows))

            def skip(so_far, *_):
                return so_far

            top, norm, out = jax.lax.cond(
                filled > i * rows, add, skip, (top, norm, out), *block, cut
            )
    if axis_size("stream") > 1:
        keep = jnp.exp(top - jax.lax.pmax(top, "stream"))
        norm, out = psum(norm * keep, "stream"), psum(out * keep, "stream")
    out = (out / norm).transpose(0, 3, 1, 2, 4).reshape(all_q.shape).astype(q.dtype)
    return jax.lax.dynamic_slice_in_dim(out, axis_index("stream") * mine, mine, axis=2)
