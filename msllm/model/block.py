"""One layer of the decoder, and the checks on layers that a user supplies.

`config.model.block` is the import path of the layer's class; if it is empty, the class is `Block`.
docs/extending/layer.md describes what the class must provide.
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
    """Pre-norm attention and MLP.

    A new block holds the weights of all layers. `__call__` expects those of one layer, without the
    leading axis.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
        """Creates the parameters of all layers. Without `rngs` only their shapes are meaningful."""
        self.config = config
        norm_shape, norm_axes = (config.num_layers, config.d_model), ("layers", "embed")
        self.attention_norm = constant(1.0, norm_shape, norm_axes)
        self.attention = Projections(config, rngs)
        self.mlp_norm = constant(1.0, norm_shape, norm_axes)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x: jax.Array, angles: Angles, attend: Attend) -> jax.Array:
        """Applies one layer.

        Args:
          x: [B, T, S, D].
          angles: cos and sin of the rotary positions, from `rope_angles`.
          attend: (q [B, T, S, N, H], k and v [B, T, S, K, H]) -> [B, T, S, N, H]. It attends to
            the cells of the tables in training, and to the cache in decoding. A layer must not
            read other cells in any other way.

        Returns: [B, T, S, D].
        """
        attended = attend(*self.attention.qkv(self._attention_input(x), angles))
        return self._after_attention(x, attended)

    def relay_keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The keys, not rotated, and the values of relays x [..., D] (msllm/model/relays.py)."""
        return self.attention.kv(self._attention_input(x))

    def next_relays(self, x: jax.Array, v: jax.Array) -> jax.Array:
        """Applies the layer to relays x, whose values are v. They attend to themselves."""
        heads = self.config.num_heads // self.config.num_kv_heads
        return self._after_attention(x, jnp.repeat(v, heads, axis=-2))

    def _attention_input(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, gather_param(self.attention_norm, jnp.float32), self.config.norm_eps)

    def _after_attention(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        x = checkpoint_name(x + self.attention.out(attended), "mid")
        normed = rms_norm(x, gather_param(self.mlp_norm, jnp.float32), self.config.norm_eps)
        return x + self.mlp(normed)


def block_class(config: ModelConfig) -> Callable[..., Any]:
    """The class of the layers. Raises UserError if it is not an importable nnx.Module."""
    if not config.block:
        return Block
    found = import_object(config.block, "config.model.block")
    if not (isinstance(found, type) and issubclass(found, nnx.Module)):
        raise UserError(
            f"config.model.block is {config.block!r}: must be a class derived from flax.nnx.Module"
        )
    return found


def check_variables(config: ModelConfig, variables: nnx.State) -> None:
    """Raises UserError if the blocks hold anything but parameters with logical axes.

    Args:
      config: the settings of the model.
      variables: the variables of the blocks.
    """
    for path, variable in nnx.to_flat_state(variables):
        name, axes = ".".join(map(str, path)), getattr(variable, "axes", None)
        problem = None
        if not isinstance(variable, nnx.Param):
            problem = f"is a {type(variable).__name__}, but a block can only hold parameters"
        elif axes is None:
            problem = "has no logical axes"
        elif unknown := [axis for axis in axes if axis not in RULES]:
            problem = f"has the axis {unknown[0]!r}; the axes are {', '.join(RULES)}"
        elif axes[0] != "layers" or variable.get_value().shape[0] != config.num_layers:
            problem = f"has no first axis 'layers' of length {config.num_layers}"
        if problem:
            raise UserError(
                f"config.model.block is {config.block!r}: its variable {name} {problem}; create it"
                " with `parameter` or `constant` of msllm.model.layers"
            )


@functools.lru_cache(maxsize=16)
def check_block(config: ModelConfig, streams: int, cached: bool) -> None:
    """Raises UserError if a user's block reads other cells in a way that is not allowed.

    A block reads other cells through `attend`, which applies the visibility. It may also read
    earlier rows of the same stream directly, but not in a decoder with a cache. The cache holds
    keys and values only, for one call of `attend` per layer.

    Args:
      config: the settings of the model.
      streams: S.
      cached: whether the block will run in a decoder with a cache.
    """
    if not config.block:
        return
    changed, calls = _changed_cells(config, streams)
    setting = f"config.model.block is {config.block!r}"
    forbidden = changed.copy()
    forbidden[0, 1:, 0] = False  # the cell itself and later rows of its stream may change
    if forbidden.any():
        table, row, stream = np.argwhere(forbidden)[0].tolist()
        raise UserError(
            f"{setting}: a change of row 1 of stream 0 of one table changes row {row} of stream"
            f" {stream} of {'the same' if table == 0 else 'another'} table without `attend`; read"
            " other streams, later rows and other tables through `attend` only"
        )
    if cached and changed[0, 2:].any():
        raise UserError(
            f"{setting}: a row depends on earlier rows other than through `attend`, but the cache"
            " of the decoder stores no such state; score tables instead, or use another block"
        )
    if cached and calls != 1:
        raise UserError(
            f"{setting}: it calls `attend` {calls} times in a layer, but the cache of the decoder"
            " stores keys and values for one call; score tables instead, or use another block"
        )


def _changed_cells(config: ModelConfig, streams: int) -> tuple[np.ndarray, int]:
    """Finds which outputs of a block depend on the cell (table 0, row 1, stream 0).

    Runs the block on 2 tables of 3 rows, with an `attend` that uses each cell's own q, k and v
    only.

    Returns: which outputs changed with the cell, [2, 3, S] bool, and the number of calls of
      `attend`.
    """
    config = dataclasses.replace(config, num_layers=1)
    calls = 0

    def attend(q, k, v):
        nonlocal calls
        calls += 1
        return q + jnp.repeat(k + v, q.shape[3] // k.shape[3], axis=3)

    @jax.jit
    def output(x):
        graph, weights = nnx.split(block_class(config)(config, nnx.Rngs(0)))
        leaves, tree = jax.tree.flatten(weights)
        # Noise opens gates that start at zero: a closed gate would hide what passes through it.
        keys = jax.random.split(jax.random.key(1), len(leaves))
        leaves = [w[0] + 0.1 * jax.random.normal(k, w.shape[1:]) for k, w in zip(keys, leaves)]
        block = nnx.merge(graph, jax.tree.unflatten(tree, leaves))
        angles = rope_angles(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]), config)
        return block(x, angles, attend).astype(jnp.float32)

    random = np.random.default_rng(0)
    x = random.standard_normal((2, 3, streams, config.d_model), np.float32)
    changed_x = x.copy()
    changed_x[0, 1, 0] = random.standard_normal(config.d_model, np.float32)
    before, after = (
        np.asarray(output(jnp.asarray(array, config.compute_dtype))) for array in (x, changed_x)
    )
    return (before != after).any(-1), calls
