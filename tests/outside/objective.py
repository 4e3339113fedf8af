"""A custom objective: the focal loss, which gives less weight to cells that are easy."""

import jax
import jax.numpy as jnp

from msllm.config import LossConfig

GAMMA = 2.0


def focal(hidden: jax.Array, head: jax.Array, targets: jax.Array, options: LossConfig) -> jax.Array:
    """(1 - p)^GAMMA * -log p of the target (Lin et al. 2017, arXiv 1708.02002)."""
    logits = jnp.einsum("nd,vd->nv", hidden, head, preferred_element_type=jnp.float32)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]
    return (1 - jnp.exp(log_p)) ** GAMMA * -log_p
