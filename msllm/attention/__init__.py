"""Attention over the cells of tables: chooses the backend and brings the keys of all streams together."""

from __future__ import annotations

import jax.numpy as jnp

from msllm.attention.chunked import chunked_attention
from msllm.attention.reference import reference_attention
from msllm.sharding import axis_index, gather
from msllm.streams import Cells

BACKENDS = {"chunked": chunked_attention, "reference": reference_attention}


def attention(q, k, v, cells: Cells, lag, backend: str):
    """Every cell attends to the cells that it sees.

    Inside `shard_map` each device holds some tables, some streams and some heads; it gathers the keys and values of all
    streams (they are smaller than the activations, and every stream needs the same share of them, so the work is
    balanced) and computes its own streams' outputs.

    Args:
      q: [B, T, S, N, H]. k, v: [B, T, S, K, H]. cells: of the same tables. lag: [S, S] int32 of all streams.
      backend: a name in BACKENDS.

    Returns: [B, T, S, N, H] in q's dtype.
    """
    size = q.shape[2]
    whole = lambda x: gather(x, 2, ("stream",))
    k_cells = cells._replace(present=whole(cells.present), seen=whole(cells.seen))
    streams = axis_index("stream") * size + jnp.arange(size)
    return BACKENDS[backend](q, whole(k), whole(v), cells, k_cells, jnp.asarray(lag), streams)
