"""Layers of a user that msllm must refuse, in decoding or everywhere."""

import jax
import jax.numpy as jnp
from flax import nnx
from outside.layer import ParallelBlock

from msllm.config import ModelConfig
from msllm.model.block import Attend
from msllm.model.layers import Angles


class ReadsRowBefore(ParallelBlock):
    """Mixes in the row before, as RWKV does: a state that the cache does not have."""

    def __call__(self, x: jax.Array, angles: Angles, attend: Attend) -> jax.Array:
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
        return super().__call__((x + before) / 2, angles, attend)


class AttendsTwice(ParallelBlock):
    """Needs keys and values of two calls."""

    def __call__(self, x: jax.Array, angles: Angles, attend: Attend) -> jax.Array:
        x = super().__call__(x, angles, attend)
        return super().__call__(x, angles, attend)


class ReadsNextRow(ParallelBlock):
    """Sees the future."""

    def __call__(self, x: jax.Array, angles: Angles, attend: Attend) -> jax.Array:
        after = jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))[:, 1:]
        return super().__call__(x + after, angles, attend)


class ReadsOtherStreams(ParallelBlock):
    """Takes a mean over the streams of a row."""

    def __call__(self, x: jax.Array, angles: Angles, attend: Attend) -> jax.Array:
        return super().__call__(x - x.mean(2, keepdims=True), angles, attend)


class ReadsOtherTables(ParallelBlock):
    """Normalises over the batch."""

    def __call__(self, x: jax.Array, angles: Angles, attend: Attend) -> jax.Array:
        return super().__call__(x / x.std((0,), keepdims=True), angles, attend)


class HoldsStatistics(ParallelBlock):
    """Has a variable that is no parameter."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
        super().__init__(config, rngs)
        self.mean = nnx.BatchStat(jnp.zeros((config.num_layers, config.d_model)))


class HasUnknownAxis(ParallelBlock):
    """Has a parameter whose axis lies nowhere."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
        super().__init__(config, rngs)
        self.scale = nnx.Param(jnp.ones((config.num_layers, 3)), axes=("layers", "mine"))
