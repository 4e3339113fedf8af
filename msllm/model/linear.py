"""Matrix products of activations with weights.

Training and scoring use dense weights. Decoding on a CPU stores some weights as `PackedWeight` or
`TableWeight` (msllm/kernels/cpu). The functions here dispatch on the weight's type, so the model
code is the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from msllm.kernels.cpu import PackedWeight, TableWeight, matmul_packed, matmul_table


def linear(x: jax.Array, weights: Iterable[jax.Array | PackedWeight]) -> Iterator[jax.Array]:
    """Yields the product of x [..., D] with each weight [D, E...]: [..., E...].

    Takes each weight from `weights` just before its product. If `weights` is a generator that
    gathers parameters, each one is thus gathered just before it is used. Gathering all of them
    first costs up to 5 % more memory on XLA:TPU.
    """
    remaining: Iterator[Any] = iter(weights)
    for weight in remaining:
        if isinstance(weight, PackedWeight):
            yield from _packed_products(x, [weight, *remaining])  # one call for all weights
        else:
            yield _dense_product(x, weight)


def linear_back(x: jax.Array, weight: jax.Array | PackedWeight) -> jax.Array:
    """Multiplies x [..., E...] by the transpose of a weight [D, E...]: [..., D].

    D is the first axis of every weight, because it is short when it is sharded over hundreds of
    devices. As the last axis it would be padded to the 128 lanes of a TPU.
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
    """The logits [..., V] float32 of hidden states [..., D] with a head [V, D]."""
    if isinstance(head, TableWeight):
        return matmul_table(hidden, head)
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def _dense_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    size = x.shape[-1]
    # A 2-D product, because with more dimensions XLA:CPU transposes the operands of the weight's
    # gradient in memory.
    y = x.reshape(-1, size) @ weight.reshape(size, -1)
    return y.reshape(*x.shape[:-1], *weight.shape[1:])


def _packed_products(x: jax.Array, weights: Sequence[PackedWeight]) -> Iterator[jax.Array]:
    for y, weight in zip(matmul_packed(x.reshape(-1, x.shape[-1]), weights), weights):
        yield y.reshape(*x.shape[:-1], *weight.shape[1:])
