"""Attention over the cells of tables: chooses the backend and spreads it over the mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from msllm.attention.chunked import chunked_attention
from msllm.attention.reference import reference_attention
from msllm.sharding import partition
from msllm.streams import Cells

BACKENDS = {"chunked": chunked_attention, "reference": reference_attention}


def attention(q, k, v, cells: Cells, lag, backend: str):
    """Every cell attends to the cells that it sees.

    On a mesh, each device holds some tables, some streams and some heads of q, k and v; it gathers the keys and values
    of all streams (they are smaller than the activations, and every stream needs the same share of them, so the work
    is balanced) and computes its own streams' outputs.

    Args:
      q: [B, T, S, N, H]. k, v: [B, T, S, K, H]. cells: of the same tables. lag: [S, S] int32, on the host.
      backend: a name in BACKENDS.

    Returns: [B, T, S, N, H] in q's dtype.
    """
    kernel = BACKENDS[backend]
    lag = jnp.asarray(lag)
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q, k, v, cells, cells, lag, jnp.arange(q.shape[2]))

    def local(q, k, v, cells, lag):
        gather = lambda x: lax.all_gather(x, "stream", axis=2, tiled=True)
        k_cells = cells._replace(present=gather(cells.present), seen=gather(cells.seen))
        streams = lax.axis_index("stream") * q.shape[2] + jnp.arange(q.shape[2])
        return kernel(q, gather(k), gather(v), cells, k_cells, lag, streams)

    heads = partition("batch", "row", "stream", "heads", "head_dim")
    kv_heads = partition("batch", "row", "stream", "kv_heads", "head_dim")
    table, row = partition("batch", "row", "stream"), partition("batch", "row")
    specs = (heads, kv_heads, kv_heads, Cells(row, row, table, table), partition("replicated", "replicated"))
    # The custom VJP inside is not annotated with the mesh axes that its values vary over.
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(q, k, v, cells, lag)
