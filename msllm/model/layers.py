"""Parts of the decoder: parameters, RMSNorm, rotary positions, attention projections, MLP.

Every weight of a block has a leading axis `layers`: the model scans over it, and inside the scan a block sees its own
layer's slice. Each parameter states its shape, its logical axes (see sharding.py) and its initial scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from msllm.config import ModelConfig
from msllm.model.rope import rope_frequencies, rope_size
from msllm.sharding import RULES, gather, mesh_axes, psum

ROPE_SPAN = 4096  # rows; see `rope_angles`
# Names of the values that the remat policy `dots` keeps for the backward pass.
SAVED = ("qkv", "attention", "mid", "mlp")


def parameter(
    rngs: nnx.Rngs | None, shape: tuple[int, ...], axes: tuple[str, ...], scale: float
) -> nnx.Param:
    """A float32 parameter drawn from normal(0, scale) (no `rngs`: zeros), with its logical axes as metadata."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(
        scale * jax.random.normal(rngs.params(), shape, jnp.float32) if rngs else jnp.zeros(shape),
        axes=axes,
    )


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A float32 parameter that starts at `value`."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def gather_param(parameter: nnx.Param, dtype) -> jax.Array:
    """One layer's weight in the compute dtype, complete along d_model; heads, ffn and vocabulary stay sharded."""
    value = parameter[...]
    axes = parameter.axes[
        len(parameter.axes) - value.ndim :
    ]  # inside the scan over layers the first one is gone
    return (
        gather_weight(value, dtype, axes.index("embed")) if "embed" in axes else value.astype(dtype)
    )


def gather_weight(weight: jax.Array, dtype, axis: int) -> jax.Array:
    """A weight in the compute dtype, gathered along its dimension `axis`, which is d_model."""
    return gather(
        weight.astype(dtype), axis, RULES["embed"]
    )  # cast first: half the bytes in bfloat16


def linear(x: jax.Array, weights: Iterable[jax.Array], products=None) -> Iterator[jax.Array]:
    """From d_model into heads or MLP: x [..., D], weights [D, ...]. `products`: makes all at once, see `native.products`.
    As 2-D products: with more dimensions, XLA:CPU transposes the operands of the weight's gradient in memory."""
    size = x.shape[-1]
    if products:
        weights = list(weights)
        made = products(x.reshape(-1, size), [weight.reshape(size, -1) for weight in weights], 0)
    for i, weight in enumerate(weights):
        # One after the other, from their weights on: in another order, XLA:TPU needs up to 5 % more memory.
        y = made[i] if products else x.reshape(-1, size) @ weight.reshape(size, -1)
        yield y.reshape(*x.shape[:-1], *weight.shape[1:])


def linear_back(x: jax.Array, weight: jax.Array, products=None) -> jax.Array:
    """Back to d_model: the product of the last axes of x and those of the weight [D, ...]. D is the first axis of every
    weight: sharded over hundreds of devices it is short, and as the last one it would be padded to a TPU's 128 lanes."""
    size = weight.shape[0]
    kept = x.shape[: x.ndim - weight.ndim + 1]
    x, weight = x.reshape(math.prod(kept), -1), weight.reshape(size, -1)
    return (products(x, [weight], 1)[0] if products else x @ weight.T).reshape(*kept, size)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x * weight / rms(x) over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467), computed in float32."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight).astype(x.dtype)


def rope_angles(position: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin for positions [B, T] or [B, T, S], times `rope_size`: each [B, T, 1 or S, 1, H / 2] float32."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    if position.ndim == 2:
        position = position[:, :, None]
    # Sessions have no last row: at row 10^6 a product in float32 is wrong by 1e-2. So whole turns are left out of what
    # a span of rows turns by, in float64; up to its end nothing changes, not a bit.
    of_span = (ROPE_SPAN * frequencies.astype(np.float64) % (2 * math.pi)).astype(np.float32)
    position, size = position[..., None, None], rope_size(config.rope_scaling)
    angle = (position % ROPE_SPAN).astype(jnp.float32) * frequencies
    angle += (position // ROPE_SPAN).astype(jnp.float32) * of_span
    return size * jnp.cos(angle), size * jnp.sin(angle)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (m, m + H/2) of the last axis of x [B, T, S, heads, H]."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


class Projections(nnx.Module):
    """The q, k, v and output projections of attention, with optional biases and norms on the heads."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
        layers, d_model, head_dim = config.num_layers, config.d_model, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.config = config
        scale = d_model**-0.5
        self.q = parameter(
            rngs,
            (layers, d_model, heads, head_dim),
            ("layers", "embed", "heads", "head_dim"),
            scale,
        )
        kv_axes = ("layers", "embed", "kv_heads", "head_dim")
        self.k = parameter(rngs, (layers, d_model, kv_heads, head_dim), kv_axes, scale)
        self.v = parameter(rngs, (layers, d_model, kv_heads, head_dim), kv_axes, scale)
        # Residual branches start small, so that depth does not change the size of activations (GPT-2).
        out_scale = (heads * head_dim * 2 * layers) ** -0.5
        self.o = parameter(
            rngs,
            (layers, d_model, heads, head_dim),
            ("layers", "embed", "heads", "head_dim"),
            out_scale,
        )
        if config.attention_bias:
            self.q_bias = constant(0.0, (layers, heads, head_dim), ("layers", "heads", "head_dim"))
            self.k_bias = constant(
                0.0, (layers, kv_heads, head_dim), ("layers", "kv_heads", "head_dim")
            )
            self.v_bias = constant(
                0.0, (layers, kv_heads, head_dim), ("layers", "kv_heads", "head_dim")
            )
        if config.qk_norm:
            self.q_norm = constant(1.0, (layers, head_dim), ("layers", "head_dim"))
            self.k_norm = constant(1.0, (layers, head_dim), ("layers", "head_dim"))

    def qkv(self, x: jax.Array, angles, products=None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, S, D] -> q [B, T, S, N, H], k and v [B, T, S, K, H], normalised and rotated."""
        weights = (
            gather_param(weight, x.dtype) for weight in (self.q, self.k, self.v)
        )  # each when it is used
        q, k, v = (checkpoint_name(y, "qkv") for y in linear(x, weights, products))
        if self.config.attention_bias:
            q, k, v = (
                y + b[...].astype(y.dtype)
                for y, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
            )
        if self.config.qk_norm:
            q = rms_norm(q, self.q_norm[...], self.config.norm_eps)
            k = rms_norm(k, self.k_norm[...], self.config.norm_eps)
        return rotate(q, angles), rotate(k, angles), v

    def out(self, x: jax.Array, products=None) -> jax.Array:
        """x [B, T, S, N, H] -> [B, T, S, D]."""
        return psum(linear_back(x, gather_param(self.o, x.dtype), products), *mesh_axes("heads"))


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
        layers, d_model, d_ff = config.num_layers, config.d_model, config.d_ff
        axes = ("layers", "embed", "mlp")
        self.gate = parameter(rngs, (layers, d_model, d_ff), axes, d_model**-0.5)
        self.up = parameter(rngs, (layers, d_model, d_ff), axes, d_model**-0.5)
        self.down = parameter(rngs, (layers, d_model, d_ff), axes, (d_ff * 2 * layers) ** -0.5)

    def __call__(self, x: jax.Array, products=None) -> jax.Array:
        """x [B, T, S, D] -> the same."""
        # Else XLA:TPU puts the gradients of the weights off, and keeps the widest activations while attention needs room.
        x, gate, up = tie_gradients(
            (x, gather_param(self.gate, x.dtype), gather_param(self.up, x.dtype))
        )
        gate, up = (checkpoint_name(y, "mlp") for y in linear(x, [gate, up], products))
        down = gather_param(self.down, x.dtype)
        return psum(linear_back(jax.nn.silu(gate) * up, down, products), *mesh_axes("mlp"))


@jax.custom_vjp
def tie_gradients(values):
    """The same values. None of their gradients is used before all of them have been made."""
    return values


tie_gradients.defvjp(
    lambda values: (values, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),)
)
