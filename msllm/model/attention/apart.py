"""Attention of streams that see one another through relays only, or not at all.

The cells of such a stream are keys of that stream alone, so the scores between streams are not
computed. Each stream attends to itself like a model with one stream, and all streams attend to the
relays (`msllm/model/relays.py`). The two outputs are merged by their log-sum-exp. On a mesh, only
the keys and values of relays are gathered.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from msllm.model.attention.backend import Backend, merge_parts
from msllm.sharding import axis_index, gather_streams
from msllm.streams import NEVER, Array, Cells, Visibility


def are_apart(lag: Array, streams: int, columns: int) -> bool:
    """Whether no stream sees the cells of another one, and each sees all its earlier rows or none.

    Args:
      lag: the lags of all columns, as in `relays.Columns`. Traced lags may have any values.
      streams: the number of streams on a device.
      columns: the number of streams and relays on a device.
    """
    if not isinstance(lag, np.ndarray):
        return False
    is_stream = np.arange(len(lag)) % columns < streams
    between = lag[np.ix_(is_stream, is_stream)]
    own = np.diagonal(between)
    others = between[~np.eye(len(between), dtype=bool)]
    return len(own) > 1 and bool((others == NEVER).all() and ((own <= 1) | (own == NEVER)).all())


def attend_apart(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cells: Cells,
    key_cells: Cells,
    lag: np.ndarray,
    backend: Backend,
    traced_lag: jax.Array | None = None,
) -> jax.Array:
    """Computes `dispatch.attention` for streams that `are_apart`.

    Args:
      q: [B, T, S, N, H], where S are the streams of this device.
      k, v: [B, T, M, K, H], where M are the streams and relays of this device.
      cells: the cells of the queries.
      key_cells: the cells of the keys.
      lag: the lags of all columns, as in `relays.Columns`.
      backend: one with `any_cells` and `ring_parts`.
      traced_lag: the lags to relays, if they are traced; see `dispatch.attention`.

    Returns: [B, T, S, N, H] in q's dtype.
    """
    batch, rows, size = q.shape[:3]
    columns = k.shape[2]

    def fold(x: jax.Array) -> jax.Array:
        """[B, T, S, ...] -> [B * S, T, 1, ...]: each stream becomes a table."""
        return jnp.moveaxis(x, 2, 1).reshape(batch * size, rows, 1, *x.shape[3:])

    def unfold(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, size, rows, *x.shape[3:]), 1, 2)

    row, segment = (jnp.repeat(x, size, axis=0) for x in (cells.row, cells.segment))
    # Nobody sees the cells of a stream that does not see its own earlier rows.
    streams = axis_index("stream") * columns + jnp.arange(size)
    sees_itself = jnp.asarray(np.diagonal(lag) < NEVER)[streams]
    alone = Cells(row, segment, fold(cells.present), fold(cells.seen & sees_itself))
    own = Visibility(alone, alone, np.ones((1, 1), np.int32), jnp.arange(1))
    own_k, own_v = fold(k[:, :, :size]), fold(v[:, :, :size])
    if columns == size:
        return unfold(backend.attend(fold(q), own_k, own_v, own))

    parts = backend.ring_parts
    assert parts is not None
    relays = key_cells._replace(
        present=gather_streams(key_cells.present[:, :, size:]),
        seen=gather_streams(key_cells.seen[:, :, size:]),
    )
    relay_lag, rows_of_streams = _relay_lag(lag, size, columns, traced_lag)
    others = Visibility(cells, relays, relay_lag, rows_of_streams, 0)

    @jax.custom_vjp
    def attend(q, own_k, own_v, k, v, own, others):
        return forward(q, own_k, own_v, k, v, own, others)[0]

    def forward(q, own_k, own_v, k, v, own, others):
        out, lse = map(unfold, parts.forward(fold(q), own_k, own_v, own))
        merged = merge_parts((out.astype(jnp.float32), lse), parts.forward(q, k, v, others))
        out, lse = (checkpoint_name(x, "attention") for x in (merged[0].astype(q.dtype), merged[1]))
        return out, (q, own_k, own_v, k, v, own, others, out, lse)

    def backward(saved, d_out):
        q, own_k, own_v, k, v, own, others, out, lse = saved
        folded = map(fold, (out, lse, d_out))
        d_q, *d_own = parts.backward(fold(q), own_k, own_v, own, *folded)
        more_q, *d_relays = parts.backward(q, k, v, others, out, lse, d_out)
        return unfold(d_q) + more_q, *d_own, *d_relays, None, None

    attend.defvjp(forward, backward)
    relay_k, relay_v = (gather_streams(x[:, :, size:]) for x in (k, v))
    return attend(q, own_k, own_v, relay_k, relay_v, own, others)


def _relay_lag(
    lag: np.ndarray, size: int, columns: int, traced_lag: jax.Array | None
) -> tuple[Array, jax.Array]:
    """The lags from streams to relays, and the rows of this device's streams in them.

    Relays have the numbers 0, 1, ... as keys. Streams follow them, so that none of them takes a
    relay for its own column.

    Returns: [R + S of all devices, R] int32, and [S] int32.
    """
    is_stream = np.arange(len(lag)) % columns < size
    pairs = np.ix_(is_stream, ~is_stream)
    relays = int((~is_stream).sum())
    hidden = np.full((relays, relays), NEVER, np.int32)
    if traced_lag is None:
        padded: Array = np.concatenate([hidden, lag[pairs]])
    else:
        padded = jnp.concatenate([hidden, traced_lag[pairs]])
    return padded, relays + axis_index("stream") * size + jnp.arange(size)
