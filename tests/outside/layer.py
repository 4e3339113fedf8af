"""A custom layer: attention and MLP in parallel, with a learned gate."""

import jax
import jax.numpy as jnp
from flax import nnx

from msllm.config import ModelConfig
from msllm.model.block import Attend
from msllm.model.layers import Angles, Mlp, Projections, constant, gather_param, rms_norm


class ParallelBlock(nnx.Module):
    """x + gate * (attention(norm(x)) + mlp(norm(x)))."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
        shape, axes = (config.num_layers, config.d_model), ("layers", "embed")
        self.config = config
        self.norm = constant(1.0, shape, axes)
        self.gate = constant(1.0, shape, axes)
        self.attention = Projections(config, rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x: jax.Array, angles: Angles, attend: Attend) -> jax.Array:
        normed = rms_norm(x, gather_param(self.norm, jnp.float32), self.config.norm_eps)
        q, k, v = self.attention.qkv(normed, angles)
        attended = self.attention.out(attend(q, k, v))
        return x + gather_param(self.gate, x.dtype) * (attended + self.mlp(normed))
