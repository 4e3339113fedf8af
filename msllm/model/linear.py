"""Matrix products of activations with weights.

Training and scoring have dense weights. Decoding on a CPU stores some of them in types of its own
(msllm/kernels/cpu); the functions here dispatch on the weight's type, so the model's formulas are
the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from msllm.kernels.cpu import PackedWeight, TableWeight, matmul_packed, matmul_table


def linear(x: jax.Array, weights: Iterable[jax.Array | PackedWeight]) -> Iterator[jax.Array]:
    """Products from d_model, one for each weight: x [..., D], weights [D, ...] -> [..., ...].

    Takes a weight from `weights` only when its product is next. With generators as arguments, each
    weight is gathered just before it is used; in another order XLA:TPU needs up to 5 % more memory.
    """
    remaining: Iterator[Any] = iter(weights)
    for weight in remaining:
        if isinstance(weight, PackedWeight):
            yield from _packed_products(x, [weight, *remaining])  # all of them in one call
        else:
            yield _dense_product(x, weight)


def linear_back(x: jax.Array, weight: jax.Array | PackedWeight) -> jax.Array:
    """The product back to d_model: x [..., E...] and a weight [D, E...] -> [..., D].

    D is the first axis of every weight. It is short when it is sharded over hundreds of devices,
    and as the last axis it would be padded to the 128 lanes of a TPU.
    """
    size = weight.shape[0]
    outer = x.shape[: x.ndim - weight.ndim + 1]
    x = x.reshape(math.prod(outer), -1)
    if isinstance(weight, PackedWeight):
        [y] = matmul_packed(x, [weight])
    else:
        y = x @ weight.reshape(size, -1).T
    return y.reshape(*outer, size)


def head_logits(hidden: jax.Array, head: jax.Array | TableWeight) -> jax.Array:
    """hidden [..., D] and a head [V, D] -> logits [..., V] float32."""
    if isinstance(head, TableWeight):
        return matmul_table(hidden, head)
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def _dense_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    size = x.shape[-1]
    # As a 2-D product: with more dimensions XLA:CPU transposes the operands of the weight's
    # gradient in memory.
    y = x.reshape(-1, size) @ weight.reshape(size, -1)
    return y.reshape(*x.shape[:-1], *weight.shape[1:])


def _packed_products(x: jax.Array, weights: Sequence[PackedWeight]) -> Iterator[jax.Array]:
    for y, weight in zip(matmul_packed(x.reshape(-1, x.shape[-1]), weights), weights):
        yield y.reshape(*x.shape[:-1], *weight.shape[1:])
