"""Dense attention with O(L^2) memory. The tests compare every other backend with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from msllm.model.attention.backend import Backend
from msllm.streams import Visibility


def reference_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility
) -> jax.Array:
    """Softmax attention over the keys that `visible()` admits.

    Args:
      q: [B, Tq, Sq, N, H].
      k, v: [B, Tk, Sk, K, H], with N a multiple of K. Query head n uses key head n // (N / K).
      visibility: of these queries and keys.

    Returns: [B, Tq, Sq, N, H] in q's dtype. Scores and softmax are float32.
    """
    weights = attention_weights(q, k, visibility).astype(v.dtype)
    grouped = weights.reshape(v.shape[0], v.shape[3], -1, *weights.shape[2:])
    out = jnp.einsum("bkgtsup,bupkh->btskgh", grouped, v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


def attention_weights(q: jax.Array, k: jax.Array, visibility: Visibility) -> jax.Array:
    """The weights of `reference_attention`; the arguments are the same.

    Returns: [B, N, Tq, Sq, Tk, Sk] float32. They sum to 1 over the keys, and are 0 for keys that
      `visible()` does not admit.
    """
    batch, rows, streams, heads, head_dim = q.shape
    kv_heads = k.shape[3]
    grouped = q.reshape(batch, rows, streams, kv_heads, heads // kv_heads, head_dim)
    scores = (
        jnp.einsum("btskgh,bupkh->bkgtsup", grouped, k, preferred_element_type=jnp.float32)
        / head_dim**0.5
    )
    mask = visibility.mask()
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=(-2, -1))
    return weights.reshape(batch, heads, *weights.shape[3:])


BACKEND = Backend("reference", reference_attention, traced_lag=True)
