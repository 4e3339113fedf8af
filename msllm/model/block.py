"""One layer of the decoder, and layers that a user brings along.

`config.model.block` names a class by its import path; empty: `Block`. docs/extending/layer.md
describes what the class must provide.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from msllm.config import ModelConfig, import_object
from msllm.errors import UserError
from msllm.model.layers import (
    Angles,
    Mlp,
    Projections,
    constant,
    gather_param,
    rms_norm,
    rope_angles,
)
from msllm.sharding import RULES

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # see `Block.__call__`


class Block(nnx.Module):
    """Pre-norm attention and MLP. Holds the weights of all layers, and applies those of one."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
        """Makes the parameters of all layers; without `rngs` only their shapes matter."""
        self.config = config
        norm_shape, norm_axes = (config.num_layers, config.d_model), ("layers", "embed")
        self.attention_norm = constant(1.0, norm_shape, norm_axes)
        self.attention = Projections(config, rngs)
        self.mlp_norm = constant(1.0, norm_shape, norm_axes)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x: jax.Array, angles: Angles, attend: Attend) -> jax.Array:
        """One layer.

        Args:
          x: [B, T, S, D].
          angles: cos and sin of the rotary positions.
          attend: (q [B, T, S, N, H], k, v [B, T, S, K, H]) -> [B, T, S, N, H]. The only way to
            other cells: in training it attends to the cells of the tables, in decoding to the
            cache.

        Returns: [B, T, S, D].
        """
        normed = rms_norm(x, gather_param(self.attention_norm, jnp.float32), self.config.norm_eps)
        attended = attend(*self.attention.qkv(normed, angles))
        x = checkpoint_name(x + self.attention.out(attended), "mid")
        normed = rms_norm(x, gather_param(self.mlp_norm, jnp.float32), self.config.norm_eps)
        return x + self.mlp(normed)


def block_class(config: ModelConfig) -> Callable[..., Any]:
    """The class of the layers. Raises UserError if it cannot be imported, or is no nnx.Module."""
    if not config.block:
        return Block
    found = import_object(config.block, "config.model.block")
    if not (isinstance(found, type) and issubclass(found, nnx.Module)):
        raise UserError(
            f"config.model.block is {config.block!r}: must be a class derived from flax.nnx.Module"
        )
    return found


def check_variables(config: ModelConfig, variables: nnx.State) -> None:
    """Raises UserError if a block holds anything but parameters with logical axes.

    Args:
      variables: of the blocks.
    """
    for path, variable in nnx.to_flat_state(variables):
        name, axes = ".".join(map(str, path)), getattr(variable, "axes", None)
        problem = None
        if not isinstance(variable, nnx.Param):
            problem = f"is a {type(variable).__name__}, and a block can only hold parameters"
        elif axes is None:
            problem = "has no logical axes"
        elif unknown := [axis for axis in axes if axis not in RULES]:
            problem = f"has the axis {unknown[0]!r}; the axes are {', '.join(RULES)}"
        elif axes[0] != "layers" or variable.get_value().shape[0] != config.num_layers:
            problem = "does not have the layers as its first axis"
        if problem:
            raise UserError(
                f"config.model.block is {config.block!r}: its variable {name} {problem}; make it by"
                " `parameter` or `constant` of msllm.model.layers"
            )


@functools.lru_cache(maxsize=16)
def check_block(config: ModelConfig, streams: int, cached: bool) -> None:
    """Raises UserError if a block of the user takes from cells what it may not take.

    A block takes from other cells through `attend`, which applies the visibility. Beyond that it
    may use earlier rows of the same stream. A decoder with a cache has no such rows, and it has
    keys and values for one call of `attend` per layer.

    Args:
      streams: S.
      cached: whether the block will run in a decoder with a cache.
    """
    if not config.block:
        return
    changed, calls = _changed_cells(config, streams)
    setting = f"config.model.block is {config.block!r}"
    allowed = np.zeros_like(changed)
    allowed[0, 1:, 0] = True
    if (changed & ~allowed).any():
        table, row, stream = np.argwhere(changed & ~allowed)[0].tolist()
        raise UserError(
            f"{setting}: a change of row 1 of stream 0 of one table changes row {row} of stream"
            f" {stream} of {'the same' if table == 0 else 'another'} table without `attend`: take"
            " what other streams, later rows and other tables hold only through `attend`"
        )
    if cached and changed[0, 2:].any():
        raise UserError(
            f"{setting}: a row depends on earlier rows other than through `attend`, and decoding"
            " with a cache stores no such state: score tables instead, or use another block"
        )
    if cached and calls != 1:
        raise UserError(
            f"{setting}: it calls `attend` {calls} times in a layer, and decoding with a cache"
            " stores keys and values for one call: score tables instead, or use another block"
        )


def _changed_cells(config: ModelConfig, streams: int) -> tuple[np.ndarray, int]:
    """Which outputs of a block [2, 3, S] depend on the cell (table 0, row 1, stream 0).

    `attend` is replaced by a function of each cell alone. Also returns how often it is called.
    """
    config = dataclasses.replace(config, num_layers=1)
    calls = []

    def attend(q, k, v):
        calls.append(k.shape)
        own = jnp.repeat(k + v, q.shape[3] // k.shape[3], axis=3)
        return q + own

    @jax.jit
    def output(x):
        graph, weights = nnx.split(block_class(config)(config, nnx.Rngs(0)))
        leaves, tree = jax.tree.flatten(weights)
        # Noise, because a gate that starts at zero would hide what it lets through.
        keys = jax.random.split(jax.random.key(1), len(leaves))
        leaves = [w[0] + 0.1 * jax.random.normal(k, w.shape[1:]) for k, w in zip(keys, leaves)]
        block = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        angles = rope_angles(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]), config)
        return block(x, angles, attend).astype(jnp.float32)

    random = np.random.default_rng(0)
    x = random.standard_normal((2, 3, streams, config.d_model), np.float32)
    other = x.copy()
    other[0, 1, 0] = random.standard_normal(config.d_model, np.float32)
    before, after = (np.asarray(output(jnp.asarray(x, config.compute_dtype))) for x in (x, other))
    return (before != after).any(-1), len(calls)
