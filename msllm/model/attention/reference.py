"""Dense attention: the visibility rule, literally. O(L^2) memory; what every other backend is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from msllm.streams import Cells, visible_between


def reference_attention(q, k, v, q_cells: Cells, k_cells: Cells, lag, q_streams):
    """Softmax attention over the cells that `visible()` admits.

    Args:
      q: [B, Tq, Sq, N, H]. k, v: [B, Tk, S, K, H], N a multiple of K; query head n uses key head n // (N / K).
      q_cells, k_cells: cells of the queries and of the keys.
      lag: [S, S] int32. q_streams: [Sq] int32, the streams of the queries (the keys hold all S).

    Returns: [B, Tq, Sq, N, H] in q's dtype; scores and softmax are float32.
    """
    weights = attention_weights(q, k, q_cells, k_cells, lag, q_streams).astype(v.dtype)
    grouped = weights.reshape(v.shape[0], v.shape[3], -1, *weights.shape[2:])
    out = jnp.einsum("bkgtsup,bupkh->btskgh", grouped, v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


def attention_weights(q, k, q_cells: Cells, k_cells: Cells, lag, q_streams):
    """How much of each key `reference_attention` (see there) takes: [B, N, Tq, Sq, Tk, S] float32, of sum 1 over the
    keys, and 0 for those that `visible()` does not admit."""
    batch, rows, streams, heads, head_dim = q.shape
    kv_heads = k.shape[3]
    grouped = q.reshape(batch, rows, streams, kv_heads, heads // kv_heads, head_dim)
    scores = (
        jnp.einsum("btskgh,bupkh->bkgtsup", grouped, k, preferred_element_type=jnp.float32)
        / head_dim**0.5
    )
    mask = visible_between(q_cells, k_cells, jnp.asarray(lag), q_streams)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=(-2, -1))
    return weights.reshape(batch, heads, *weights.shape[3:])
