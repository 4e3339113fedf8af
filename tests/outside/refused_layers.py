"""User layers that msllm must refuse, in decoding or everywhere."""

import jax
import jax.numpy as jnp
from flax import nnx
from outside.layer import ParallelBlock

from msllm.config import ModelConfig
from msllm.model.block import Attend
from msllm.model.layers import Angles


class ReadsRowBefore(ParallelBlock):
    """Mixes in the previous row, as RWKV does. The cache does not hold this state."""

    def __call__(self, x: jax.Array, angles: Angles, attend: Attend) -> jax.Array:
        previous = jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
        return super().__call__((x + previous) / 2, angles, attend)


class AttendsTwice(ParallelBlock):
    """Calls `attend` twice. The cache holds the keys and values of one call."""

    def __call__(self, x: jax.Array, angles: Angles, attend: Attend) -> jax.Array:
        x = super().__call__(x, angles, attend)
        return super().__call__(x, angles, attend)


class ReadsNextRow(ParallelBlock):
    """Adds the following row, so that it sees the future."""

    def __call__(self, x: jax.Array, angles: Angles, attend: Attend) -> jax.Array:
        following = jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))[:, 1:]
        return super().__call__(x + following, angles, attend)


class ReadsOtherStreams(ParallelBlock):
    """Subtracts the mean over the streams of a row."""

    def __call__(self, x: jax.Array, angles: Angles, attend: Attend) -> jax.Array:
        return super().__call__(x - x.mean(2, keepdims=True), angles, attend)


class ReadsOtherTables(ParallelBlock):
    """Divides by the standard deviation over the batch."""

    def __call__(self, x: jax.Array, angles: Angles, attend: Attend) -> jax.Array:
        return super().__call__(x / x.std((0,), keepdims=True), angles, attend)


class HoldsStatistics(ParallelBlock):
    """Has a variable that is not a parameter."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
        super().__init__(config, rngs)
        self.mean = nnx.BatchStat(jnp.zeros((config.num_layers, config.d_model)))


class HasUnknownAxis(ParallelBlock):
    """Has a parameter with an axis name that maps to no mesh axis."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
        super().__init__(config, rngs)
        self.scale = nnx.Param(jnp.ones((config.num_layers, 3)), axes=("layers", "mine"))
