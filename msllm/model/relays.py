"""Relays: the columns through which streams see what other streams say, and nothing else.

An edge through tokens lets its reader see the tokens of the source (docs/design.md). The source
then has a *relay*: a column of cells whose tokens are those of the source, with the same rows,
presence and stream embedding. A relay attends to itself only, so its keys and values depend on its
token alone. It is never predicted. If only some tokens pass an edge, the relay holds silence in
place of the others. A stream has a relay for each set of tokens that passes to some reader.

On a device, the relays follow the streams along the stream axis of the activations. Queries are
those of the streams; keys and values are those of all columns.

The keys and values of a relay depend on its token alone, but for the rotary position of its keys.
`relay_keys` therefore computes them once for each distinct token of a column.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msllm.errors import UserError
from msllm.model.attention.backend import LagChoices
from msllm.sharding import axis_index, axis_size, gather_streams, pmax_over_mesh
from msllm.streams import NEVER, Cells, Relay, StreamSpec


class Columns(NamedTuple):
    """The columns of keys on all devices along the mesh axis `stream`.

    Attributes:
      streams: number of streams on each device, with those that only pad the axis.
      relays: number of relays on each device, with those that only pad it.
      sources: the stream of each relay, in the order of the devices; -1: padding.
      passes: [relays, N + 1] bool, whether token i < N passes each relay, and last, whether all
        further tokens pass; None: every token passes every relay.
      lag: [M, M] int32, lag[reader, source] of all columns, in the order of the devices.
      drawn: (pairs [M, M] bool, lags) of each lag that training draws: these pairs share it.
    """

    streams: int
    relays: int
    sources: tuple[int, ...]
    lag: np.ndarray
    passes: np.ndarray | None = None
    drawn: tuple[tuple[np.ndarray, tuple[int, ...]], ...] = ()

    @property
    def size(self) -> int:
        """Number of columns on each device."""
        return self.streams + self.relays

    @property
    def lag_choices(self) -> LagChoices:
        """The lag matrices, of which training draws one for every batch."""
        return LagChoices(self.lag, self.drawn)


@functools.lru_cache(maxsize=64)
def columns_of(spec: StreamSpec, devices: int) -> Columns:
    """Lays out the columns of a model on `devices` devices along the mesh axis `stream`."""
    found = spec.relays
    streams, relays = -(-spec.size // devices), -(-len(found) // devices)
    size = streams + relays
    sources = (*(relay.source for relay in found), *[-1] * (relays * devices - len(found)))
    stream_columns = [i // streams * size + i % streams for i in range(spec.size)]
    relay_columns = [j // relays * size + streams + j % relays for j in range(len(found))]
    lag = np.full((devices * size, devices * size), NEVER, np.int32)
    lag[np.ix_(stream_columns, stream_columns)] = spec.lag_array
    for (reader, source), relay in spec.edge_relays.items():
        column = relay_columns[found.index(relay)]
        lag[stream_columns[reader], column] = spec.token_lag_array[reader, source]
    drawn = []
    for draw in spec.drawn_lags:
        pairs = np.zeros(lag.shape, bool)
        for edge in draw.edges:
            if draw.medium == "tokens":
                column = relay_columns[found.index(spec.edge_relays[edge])]
            else:
                column = stream_columns[edge[1]]
            pairs[stream_columns[edge[0]], column] = True
        drawn.append((pairs, draw.values))
    passes = _passes(found, len(sources))
    return Columns(streams, relays, sources, lag, passes, tuple(drawn))


def _passes(found: tuple[Relay, ...], size: int) -> np.ndarray | None:
    """`Columns.passes` of relays that are padded to `size`."""
    if all(relay.passing is None for relay in found):
        return None
    ids = [None if x.passing is None else np.array(x.passing, np.int32) for x in found]
    passes = np.ones((size, max(int(x.max()) for x in ids if x is not None) + 2), bool)
    for relay, tokens in enumerate(ids):
        if tokens is not None:
            passes[relay] = False
            passes[relay, tokens] = True
    return passes


def local_columns(spec: StreamSpec) -> Columns:
    """The columns inside `shard_map`, or on one device."""
    return columns_of(spec, axis_size("stream"))


def stream_columns(columns: Columns) -> jax.Array:
    """[S] int32, the columns of this device's streams among all columns."""
    return axis_index("stream") * columns.size + jnp.arange(columns.streams)


class Expanded(NamedTuple):
    """The columns of a device.

    Attributes:
      tokens: [B, T, M] int32.
      streams: [M] int32, the stream of each column, for the stream embedding.
      cells: the cells of all columns.
    """

    tokens: jax.Array
    streams: jax.Array
    cells: Cells


def add_relays(
    columns: Columns, tokens: jax.Array, cells: Cells, silence_id: int | None
) -> Expanded:
    """Adds the relays of this device to its streams.

    Args:
      columns: of the model.
      tokens: [B, T, S] int32.
      cells: of the same cells.
      silence_id: the silence token. Needed only if some tokens do not pass an edge.
    """
    streams = axis_index("stream") * columns.streams + jnp.arange(columns.streams)
    if not columns.relays:
        return Expanded(tokens, streams, cells)
    sources = _local_sources(columns)
    # Silence is a token, so `skip_silence` hides nothing from the readers of a relay.
    present = add_relay_columns(columns, cells.present)
    present = present.at[:, :, columns.streams :].min(sources >= 0)
    seen = jnp.concatenate([cells.seen, present[:, :, columns.streams :]], axis=2)
    return Expanded(
        _without_stopped(columns, add_relay_columns(columns, tokens), silence_id),
        jnp.concatenate([streams, jnp.maximum(sources, 0)]),
        cells._replace(present=present, seen=seen),
    )


def _without_stopped(columns: Columns, tokens: jax.Array, silence_id: int | None) -> jax.Array:
    """Replaces the tokens [B, T, M] that do not pass their relays by silence."""
    if columns.passes is None:
        return tokens
    if silence_id is None:
        raise UserError(
            "some edges let only a set of tokens pass, and others are seen as silence: pass the"
            " token that means silence as silence_id=..."
        )
    own = axis_index("stream") * columns.relays
    passes = jax.lax.dynamic_slice_in_dim(jnp.asarray(columns.passes), own, columns.relays)
    relayed = tokens[:, :, columns.streams :]
    known = jnp.minimum(relayed, passes.shape[1] - 1)
    relayed = jnp.where(passes[jnp.arange(columns.relays), known], relayed, silence_id)
    return jnp.concatenate([tokens[:, :, : columns.streams], relayed], axis=2)


def add_relay_columns(columns: Columns, x: jax.Array) -> jax.Array:
    """Adds to x [B, T, S] the columns of the relays' sources: [B, T, M]."""
    if not columns.relays:
        return x
    sources = jnp.maximum(_local_sources(columns), 0)
    return jnp.concatenate([x, jnp.take(gather_streams(x), sources, axis=2)], axis=2)


def _local_sources(columns: Columns) -> jax.Array:
    """[R] int32, the stream of each relay on this device; -1: padding."""
    own = axis_index("stream") * columns.relays + jnp.arange(columns.relays)
    return jnp.asarray(columns.sources, jnp.int32)[own]


class Distinct(NamedTuple):
    """The distinct tokens of each column, numbered in the order of their first occurrence.

    The number of a token depends on earlier rows of its column alone. Other columns and later rows
    therefore do not move it to another place of a matrix product, where it could be rounded
    differently.

    Attributes:
      row: [B, T, R] int32, the row of the first occurrence of the i-th token. Past the last token
        the rows are arbitrary.
      number: [B, T, R] int32, the number of each cell's token.
      most: [] int32, the largest number of distinct tokens in a column.
    """

    row: jax.Array
    number: jax.Array
    most: jax.Array


def distinct_tokens(tokens: jax.Array) -> Distinct:
    """Finds the distinct tokens of each column of tokens [B, T, R]."""
    row = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    order = jnp.argsort(tokens, axis=1, stable=True)  # equal tokens are neighbours, in time order
    in_order = jnp.take_along_axis(tokens, order, axis=1)
    changes = (in_order != jnp.roll(in_order, 1, axis=1)) | (row == 0)
    start = jax.lax.cummax(jnp.where(changes, row, 0), axis=1)
    first = jnp.take_along_axis(order, start, axis=1)
    first = jnp.take_along_axis(first, jnp.argsort(order, axis=1), axis=1)  # by row again
    is_first = first == row
    rank = jnp.cumsum(is_first, axis=1, dtype=jnp.int32) - 1
    return Distinct(
        jnp.argsort(~is_first, axis=1, stable=True),
        jnp.take_along_axis(rank, first, axis=1),
        rank[:, -1].max() + 1,
    )


RelayTower = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def relay_keys(
    x: jax.Array, tokens: jax.Array, tower: RelayTower, parts: int
) -> tuple[jax.Array, jax.Array]:
    """The keys and values of relays in all layers, each computed once per distinct token.

    Args:
      x: [B, T, R, D], the embeddings of the relays.
      tokens: [B, T, R] int32. Cells of a column with the same number have the same embedding.
      tower: (embeddings [B, T', R, D]) -> keys, not rotated, and values [layers, B, T', R, K, H].
      parts: the tokens of a column are divided into this many parts. Those that are not needed are
        skipped.

    Returns: keys, not rotated, and values [layers, B, T, R, K, H].
    """
    found = distinct_tokens(tokens)
    rows = tokens.shape[1]
    size = -(-rows // parts)
    parts = -(-rows // size)
    x = jnp.take_along_axis(x, found.row[..., None], axis=1)
    x = jnp.pad(x, [(0, 0), (0, parts * size - rows), (0, 0), (0, 0)])
    x = jnp.moveaxis(x.reshape(len(x), parts, size, *x.shape[2:]), 1, 0)
    shapes = jax.eval_shape(tower, x[0])

    def skip(_: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def part(_, given):
        number, x = given
        # All devices must agree, because the tower may communicate.
        return None, jax.lax.cond(number * size < most, tower, skip, x)

    most = pmax_over_mesh(found.most)
    _, keys_and_values = jax.lax.scan(part, None, (jnp.arange(parts), x))

    def of_cells(y: jax.Array) -> jax.Array:
        """[parts, layers, B, size, R, K, H] -> [layers, B, T, R, K, H]."""
        y = jnp.moveaxis(y, 0, 2)
        y = y.reshape(*y.shape[:2], parts * size, *y.shape[4:])
        # In float32, because the gradient of a token is a sum over all cells that hold it.
        number = found.number[None, ..., None, None]
        return jnp.take_along_axis(y.astype(jnp.float32), number, axis=2).astype(y.dtype)

    keys, values = map(of_cells, keys_and_values)
    return keys, values


Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def attend_to_columns(streams: int, attend: Attend) -> Attend:
    """An `attend` for all columns, in which relays attend to themselves.

    Args:
      streams: the number of streams among the columns, which come first.
      attend: (q [B, T, S, N, H], k and v [B, T, M, K, H]) -> [B, T, S, N, H].
    """

    def attend_all(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if q.shape[2] == streams:
            return attend(q, k, v)
        out = attend(q[:, :, :streams], k, v)
        # The softmax over a single key is 1.
        itself = jnp.repeat(v[:, :, streams:], q.shape[3] // v.shape[3], axis=3)
        return jnp.concatenate([out, itself.astype(out.dtype)], axis=2)

    return attend_all
