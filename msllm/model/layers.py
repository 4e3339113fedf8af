"""Parts of the decoder: parameters, RMSNorm, rotary positions, attention projections, MLP.

Every weight of a block has a leading axis `layers`. The model scans over this axis, so inside the
scan a block holds the weights of one layer. Each parameter states its shape, its logical axes (see
msllm/sharding.py) and its initial scale.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from msllm.config import ModelConfig, RopeScalingConfig
from msllm.kernels.cpu import PackedWeight, TableWeight
from msllm.model.linear import linear, linear_back
from msllm.sharding import RULES, gather, mesh_axes, psum

ROPE_SPAN = 4096  # rows; see `rope_angles`
# `checkpoint_name`s of the values that the remat policy `dots` saves for the backward pass.
SAVED = ("qkv", "attention", "mid", "mlp")

Angles = tuple[jax.Array, jax.Array]  # cos and sin of the rotary positions, from `rope_angles`


class InputWeight(nnx.Param):
    """A weight [layers, D, ...] that only `linear` uses. Decoding may store it packed."""


class OutputWeight(nnx.Param):
    """A weight [layers, D, ...] that only `linear_back` uses. Decoding may store it packed."""


def parameter(
    rngs: nnx.Rngs | None,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    scale: float,
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """A float32 parameter drawn from normal(0, scale), with its logical axes as metadata.

    Args:
      rngs: source of the random numbers. None creates zeros, for use where only shapes matter.
      shape: the shape, with the axis `layers` first for parameters of a block.
      axes: the logical axis of each dimension, from `RULES` in msllm/sharding.py.
      scale: the standard deviation.
      kind: `InputWeight` if only `linear` uses the parameter, `OutputWeight` if only `linear_back`
        does.
    """
    assert len(shape) == len(axes), (shape, axes)
    value = (
        scale * jax.random.normal(rngs.params(), shape, jnp.float32) if rngs else jnp.zeros(shape)
    )
    return kind(value, axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A float32 parameter filled with `value`, with its logical axes as metadata."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def gather_param(parameter: nnx.Param, dtype: jax.typing.DTypeLike) -> Any:
    """Gathers one layer's weight along d_model, in the compute dtype.

    Heads, ffn and vocabulary stay sharded.

    Args:
      parameter: inside the scan over layers, or one without the axis `layers`.
      dtype: the dtype of the result.

    Returns: an array; or the `PackedWeight` or `TableWeight` in which decoding has stored the
      weight. Those are on one device and already in the compute dtype.
    """
    value = parameter.get_value()
    if isinstance(value, PackedWeight | TableWeight):
        return value
    axes = parameter.axes[-value.ndim :]  # the scan over layers has removed the first axis
    if "embed" not in axes:
        return value.astype(dtype)
    return gather_weight(value, dtype, axes.index("embed"))


def gather_weight(weight: jax.Array, dtype: jax.typing.DTypeLike, axis: int) -> jax.Array:
    """Casts a weight to `dtype` and gathers it along its dimension `axis`, which is d_model."""
    # The cast comes first, because it halves the bytes to send if the dtype is bfloat16.
    return gather(weight.astype(dtype), axis, RULES["embed"])


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x * weight / rms(x) over the last axis, in float32 (RMSNorm, arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight).astype(x.dtype)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScalingConfig) -> np.ndarray:
    """Angle per row of each rotated pair, [H / 2] float32 (RoPE, Su et al. 2021, arXiv 2104.09864).

    `scaling` lowers the frequencies of some or all pairs, for contexts longer than those trained
    on.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaled = frequencies / scaling.factor
    share = np.clip(_unscaled_share(frequencies, head_dim, theta, scaling), 0, 1)
    return (share * frequencies + (1 - share) * scaled).astype(np.float32)


def _unscaled_share(
    frequencies: np.ndarray, head_dim: int, theta: float, scaling: RopeScalingConfig
) -> float | np.ndarray:
    """The weight of each pair's original frequency in the blend, not yet clipped to [0, 1]."""
    if scaling.kind == "none":
        return 1.0
    if scaling.kind == "linear":
        return 0.0
    if scaling.kind == "llama3":
        # Llama 3.1 scales long wavelengths, keeps short ones, and blends in between.
        rotations = scaling.original_max_position * frequencies / (2 * math.pi)
        return (rotations - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )

    # YaRN (Peng et al. 2023, arXiv 2309.00071, 3.2) blends linearly in the index of the pair,
    # between the pairs that turn beta_fast and beta_slow times within the original context.
    def exponent_of(turns: float) -> float:
        """x, where theta^-x is the frequency that turns this many times."""
        return math.log(scaling.original_max_position / (turns * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(head_dim / 2 * exponent_of(scaling.beta_fast)), 0)
    last = min(math.ceil(head_dim / 2 * exponent_of(scaling.beta_slow)), head_dim - 1)
    return 1 - (np.arange(head_dim // 2) - first) / (last - first if last != first else 0.001)


def rope_scale(scaling: RopeScalingConfig) -> float:
    """The factor on rotated queries and keys; YaRN sharpens attention (arXiv 2309.00071, 3.4)."""
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0


def rope_angles(position: jax.Array, config: ModelConfig) -> Angles:
    """cos and sin of the rotary angles, times `rope_scale`.

    Args:
      position: [B, T] or [B, T, S] int32.
      config: the settings of the model.

    Returns: cos and sin, each [B, T, 1 or S, 1, H / 2] float32.
    """
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    if position.ndim == 2:
        position = position[:, :, None]
    # Sessions have no last row, and at row 10^6 position * frequency in float32 is off by 1e-2. The
    # angle is therefore the sum of two products: one for spans of ROPE_SPAN rows, one for the rows
    # within a span. The angle of a span is reduced modulo 2 pi in float64. In the first span the
    # result equals position * frequency bit for bit.
    span_angle = (ROPE_SPAN * frequencies.astype(np.float64) % (2 * math.pi)).astype(np.float32)
    position, scale = position[..., None, None], rope_scale(config.rope_scaling)
    angle = (position % ROPE_SPAN).astype(jnp.float32) * frequencies
    angle += (position // ROPE_SPAN).astype(jnp.float32) * span_angle
    return scale * jnp.cos(angle), scale * jnp.sin(angle)


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """Rotates the pairs (m, m + H/2) of the last axis of x [B, T, S, heads, H]."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


class Projections(nnx.Module):
    """The q, k, v and output projections of attention, with optional biases and head norms."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
        layers, d_model, head_dim = config.num_layers, config.d_model, config.head_dim
        heads, kv_heads = config.num_heads, config.num_kv_heads
        self.config = config
        q_shape = (layers, d_model, heads, head_dim)
        q_axes = ("layers", "embed", "heads", "head_dim")
        kv_shape = (layers, d_model, kv_heads, head_dim)
        kv_axes = ("layers", "embed", "kv_heads", "head_dim")
        scale = d_model**-0.5
        self.q = parameter(rngs, q_shape, q_axes, scale, InputWeight)
        self.k = parameter(rngs, kv_shape, kv_axes, scale, InputWeight)
        self.v = parameter(rngs, kv_shape, kv_axes, scale, InputWeight)
        # As in GPT-2, residual branches start small, so that activations do not grow with depth.
        out_scale = (heads * head_dim * 2 * layers) ** -0.5
        self.o = parameter(rngs, q_shape, q_axes, out_scale, OutputWeight)
        if config.attention_bias:
            kv_bias_axes = ("layers", "kv_heads", "head_dim")
            self.q_bias = constant(0.0, (layers, heads, head_dim), ("layers", "heads", "head_dim"))
            self.k_bias = constant(0.0, (layers, kv_heads, head_dim), kv_bias_axes)
            self.v_bias = constant(0.0, (layers, kv_heads, head_dim), kv_bias_axes)
        if config.qk_norm:
            self.q_norm = constant(1.0, (layers, head_dim), ("layers", "head_dim"))
            self.k_norm = constant(1.0, (layers, head_dim), ("layers", "head_dim"))

    def qkv(self, x: jax.Array, angles: Angles) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [B, T, S, D] -> q [B, T, S, N, H], k and v [B, T, S, K, H], normalised and rotated."""
        # A generator, so that `linear` gathers each weight just before its product.
        weights = (gather_param(weight, x.dtype) for weight in (self.q, self.k, self.v))
        q, k, v = (checkpoint_name(y, "qkv") for y in linear(x, weights))
        if self.config.attention_bias:
            q = q + self.q_bias[...].astype(q.dtype)
        if self.config.qk_norm:
            q = rms_norm(q, self.q_norm[...], self.config.norm_eps)
        k, v = self._keys_and_values(k, v)
        return rotate(q, angles), rotate(k, angles), v

    def kv(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, T, S, D] -> k and v [B, T, S, K, H]. The keys are normalised, but not rotated."""
        weights = (gather_param(weight, x.dtype) for weight in (self.k, self.v))
        k, v = (checkpoint_name(y, "qkv") for y in linear(x, weights))
        return self._keys_and_values(k, v)

    def _keys_and_values(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The products with biases and norms."""
        if self.config.attention_bias:
            k = k + self.k_bias[...].astype(k.dtype)
            v = v + self.v_bias[...].astype(v.dtype)
        if self.config.qk_norm:
            k = rms_norm(k, self.k_norm[...], self.config.norm_eps)
        return k, v

    def out(self, x: jax.Array) -> jax.Array:
        """x [B, T, S, N, H] -> [B, T, S, D]."""
        return psum(linear_back(x, gather_param(self.o, x.dtype)), *mesh_axes("heads"))


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None):
        layers, d_model, d_ff = config.num_layers, config.d_model, config.d_ff
        shape, axes = (layers, d_model, d_ff), ("layers", "embed", "mlp")
        self.gate = parameter(rngs, shape, axes, d_model**-0.5, InputWeight)
        self.up = parameter(rngs, shape, axes, d_model**-0.5, InputWeight)
        self.down = parameter(rngs, shape, axes, (d_ff * 2 * layers) ** -0.5, OutputWeight)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, S, D] -> the same shape."""
        gate, up = gather_param(self.gate, x.dtype), gather_param(self.up, x.dtype)
        # Without this barrier XLA:TPU delays the weight gradients and keeps the widest activations
        # alive through attention's backward pass.
        x, gate, up = tie_gradients((x, gate, up))
        gate, up = (checkpoint_name(y, "mlp") for y in linear(x, [gate, up]))
        down = gather_param(self.down, x.dtype)
        return psum(linear_back(jax.nn.silu(gate) * up, down), *mesh_axes("mlp"))


@jax.custom_vjp
def tie_gradients(values: Any) -> Any:
    """The identity; its backward pass computes the gradients of all values before it uses any."""
    return values


def _tie_gradients_forward(values):
    return values, None


def _tie_gradients_backward(_, gradients):
    return (jax.lax.optimization_barrier(gradients),)


tie_gradients.defvjp(_tie_gradients_forward, _tie_gradients_backward)
