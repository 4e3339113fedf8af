"""The interface of attention backends, and the case that a backend accepts or declines."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """The part of a model's attention that one device computes."""

    platform: str  # cpu | tpu | gpu
    device_kind: str  # the runtime's name: "TPU v5 lite", "NVIDIA H100 80GB HBM3", ...
    dtype: str  # of q, k and v: float32 | bfloat16
    rows: int  # T
    streams: int  # S, of the model
    q_streams: int  # streams whose queries are on this device
    heads: int  # N on this device
    kv_heads: int  # K on this device
    head_dim: int  # H
    lag: np.ndarray  # [S, S] int32
    ring: bool = False  # ring attention: the keys come one device's streams at a time


def _declines_nothing(_: Case) -> str | None:
    return None


def _no_options(_: Case) -> dict[str, Any]:
    return {}


class LagChoices(NamedTuple):
    """Lag matrices, of which training draws one for every batch.

    Attributes:
      lag: [S, S] int32, the matrix where nothing is drawn.
      drawn: (pairs [S, S] bool, values) of each draw. These pairs get one of the values.
    """

    lag: np.ndarray
    drawn: tuple[tuple[np.ndarray, tuple[int, ...]], ...] = ()

    @property
    def num_matrices(self) -> int:
        """The number of matrices."""
        return math.prod(len(values) for _, values in self.drawn)

    def matrices(self) -> Iterator[np.ndarray]:
        """All matrices, in the order of `number`."""
        for chosen in itertools.product(*(values for _, values in self.drawn)):
            lag = self.lag.copy()
            for (pairs, _), value in zip(self.drawn, chosen):
                lag[pairs] = value
            yield lag

    def number(self, draw: jax.Array) -> jax.Array:
        """[] int32, the number of a matrix, from the place of each value, [draws] int32."""
        number = jnp.zeros((), jnp.int32)
        for place, (_, values) in enumerate(self.drawn):
            number = number * len(values) + draw[place]
        return number

    def matrix(self, draw: jax.Array) -> jax.Array:
        """[S, S] int32, traced: the matrix of the places [draws] int32 of the drawn values."""
        lag = jnp.asarray(self.lag)
        for place, (pairs, values) in enumerate(self.drawn):
            lag = jnp.where(pairs, jnp.asarray(values, jnp.int32)[draw[place]], lag)
        return lag

    def largest(self) -> np.ndarray:
        """[S, S] int32, the matrix of the largest values."""
        lag = self.lag.copy()
        for pairs, values in self.drawn:
            lag[pairs] = max(values)
        return lag


class RingParts(NamedTuple):
    """Attention over the keys of some streams: the building blocks of ring attention.

    Attributes:
      forward: (q, k, v, visibility) -> (output, log-sum-exp [B, Tq, Sq, N] float32) over the given
        keys.
      backward: (q, k, v, visibility, output, log_sum_exp, d_output) -> gradients of q, k and v
        through the given keys. `output` and `log_sum_exp` are those over the keys of all parts.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of attention. The module of a backend exports it as `BACKEND`.

    Attributes:
      name: the name of the module, and the value of `config.model.attention` that selects it.
      attend: (q, k, v, visibility) -> output: softmax attention over the keys that `visible()`
        admits, differentiable in q, k and v. q is [B, Tq, Sq, N, H], k and v are [B, Tk, Sk, K, H]
        with N a multiple of K; the output has the shape and dtype of q. The keys hold all S
        streams.
      ring_parts: for ring attention (ring.py); None if the backend cannot take keys in parts.
      declines: (case) -> the reason why the backend cannot compute the case, or None if it can.
        The platform of the case is the one that the backend needs.
      options: (case) -> keyword arguments for `attend` and `ring_parts` in this case, such as block
        sizes.
      any_cells: `attend` and `ring_parts` take any rows, streams and lags, not only those of the
        case. See apart.py.
      traced_lag: `attend` and `ring_parts` take a lag matrix that is traced. Others compile it in.
    """

    name: str
    attend: Callable[..., jax.Array]
    ring_parts: RingParts | None = None
    declines: Callable[[Case], str | None] = _declines_nothing
    options: Callable[[Case], dict[str, Any]] = _no_options
    any_cells: bool = False
    traced_lag: bool = False

    def with_options(self, **options: Any) -> Backend:
        """The backend with these keyword arguments bound to `attend` and `ring_parts`."""

        def bind(function: Callable) -> Callable:
            return functools.partial(function, **options)

        parts = self.ring_parts and RingParts(*map(bind, self.ring_parts))
        return dataclasses.replace(self, attend=bind(self.attend), ring_parts=parts)


def merge_parts(
    one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Merges (output, log-sum-exp) over two parts of the keys.

    If a query sees no key of the second part, its output there is arbitrary and may be NaN.
    """
    (out, lse), (more, more_lse) = one, other
    both = jnp.logaddexp(lse, more_lse)

    def share(x, lse):
        weight = jnp.exp(lse - both)[..., None]
        return jnp.where(weight > 0, weight * x, 0)

    return share(out, lse) + share(more, more_lse), both
