"""Ring attention over the mesh axis `stream`: keys and values are passed on, not gathered.

This follows Liu et al. 2023 (arXiv 2310.01889), with streams in place of blocks of rows. A device
attends to the keys of its own streams, passes them on to its neighbour and continues with the keys
that it receives, until it has attended to the keys of all devices. It holds the keys and values of
two devices at a time, and every device has the same work. The outputs over parts of the keys are
merged by their log-sum-exp.

The backward pass goes around the ring once more, and the gradients of keys and values travel with
them. Each part gets the output and log-sum-exp over all keys, so that the sum of the parts is the
gradient of one softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from msllm.model.attention.backend import Backend, merge_parts
from msllm.sharding import axis_index, axis_size
from msllm.streams import Array, Cells, Visibility


class _Keys(NamedTuple):
    """The arrays that travel around the ring: one device's keys, values and their cells."""

    k: jax.Array  # [B, T, S, K, H]
    v: jax.Array
    present: jax.Array  # [B, T, S] bool, as in `Cells`
    seen: jax.Array


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cells: Cells,
    key_cells: Cells,
    lag: Array,
    backend: Backend,
    traced_lag: jax.Array | None = None,
) -> jax.Array:
    """Computes `dispatch.attention` on one device inside `shard_map`, without gathering.

    Args:
      q: [B, T, S, N, H], where S are the streams of this device.
      k, v: [B, T, M, K, H], where M are the streams and relays of this device.
      cells: the cells of the queries.
      key_cells: the cells of the keys.
      lag: the lags of all columns, as in `relays.Columns`.
      backend: one that has `ring_parts`.
      traced_lag: the lags, if they are traced; see `dispatch.attention`.

    Returns: [B, T, S, N, H] in q's dtype.
    """
    size, devices = k.shape[2], axis_size("stream")
    parts = backend.ring_parts
    if parts is None:
        raise ValueError(
            f"the backend {backend.name!r} has no ring_parts: choose one that has, or set"
            " config.model.kv_ring to False"
        )

    def pass_on(arrays: Any) -> Any:
        neighbours = [(i, (i + 1) % devices) for i in range(devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, "stream", neighbours), arrays)

    def with_queries(
        part: Callable,
        q: jax.Array,
        cells: Cells,
        traced_lag: jax.Array | None,
        *after: jax.Array,
    ) -> Callable:
        """Binds one of `ring_parts` to the queries: a function of the keys and the turn.

        In turn i a device has the keys of the i-th device before it. The turn is None for its own
        keys, the only ones that include the queries' own cells.

        Args:
          after: arguments of the part that follow the visibility.
        """
        place = axis_index("stream")
        streams = place * size + jnp.arange(q.shape[2])
        lags = lag if traced_lag is None else traced_lag

        def run(keys: _Keys, turn: jax.Array | None):
            offset = (place - turn) % devices * size if turn is not None else None
            key_cells = cells._replace(present=keys.present, seen=keys.seen)
            return part(
                q, keys.k, keys.v, Visibility(cells, key_cells, lags, streams, offset), *after
            )

        return run

    @jax.custom_vjp
    def attend(q, k, v, cells, key_cells, traced_lag):
        return forward(q, k, v, cells, key_cells, traced_lag)[0]

    def forward(q, k, v, cells, key_cells, traced_lag):
        run = with_queries(parts.forward, q, cells, traced_lag)
        keys = _Keys(k, v, key_cells.present, key_cells.seen)

        # The last turn passes on keys that no device needs any more. A special last turn would
        # complicate the loop.
        def turn(i, carry):
            keys, so_far = carry
            return pass_on(keys), merge_parts(so_far, run(keys, i))

        out, lse = run(keys, None)
        start = (pass_on(keys), (out.astype(jnp.float32), lse))
        _, (out, lse) = lax.fori_loop(1, devices, turn, start)
        out, lse = (checkpoint_name(x, "attention") for x in (out.astype(q.dtype), lse))
        return out, (q, k, v, cells, key_cells, traced_lag, out, lse)

    def backward(saved, d_out):
        q, k, v, cells, key_cells, traced_lag, out, lse = saved
        part = with_queries(parts.backward, q, cells, traced_lag, out, lse, d_out)
        keys = _Keys(k, v, key_cells.present, key_cells.seen)

        def run(keys, turn):
            return [x.astype(jnp.float32) for x in part(keys, turn)]

        def turn(i, carry):
            keys, d_q, d_kv = carry
            more_q, *more_kv = run(keys, i)
            return pass_on(keys), d_q + more_q, pass_on(jax.tree.map(jnp.add, d_kv, more_kv))

        d_q, *d_kv = run(keys, None)
        _, d_q, d_kv = lax.fori_loop(1, devices, turn, (pass_on(keys), d_q, pass_on(d_kv)))
        return *(d.astype(x.dtype) for d, x in zip((d_q, *d_kv), (q, k, v))), None, None, None

    attend.defvjp(forward, backward)
    return attend(q, k, v, cells, key_cells, traced_lag)
