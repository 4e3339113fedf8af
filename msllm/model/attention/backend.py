"""What an attention backend is, and what it is asked for before it is chosen."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Case(NamedTuple):
    """The share of a model's attention that one device computes."""

    platform: str  # cpu | tpu | gpu
    device_kind: str  # as the runtime names it: "TPU v5 lite", "NVIDIA H100 80GB HBM3", ...
    dtype: str  # of q, k and v: float32 | bfloat16
    rows: int  # T
    streams: int  # S, all of them
    q_streams: int  # how many of them have their queries on this device
    heads: int  # N on this device
    kv_heads: int  # K on this device
    head_dim: int  # H
    lag: np.ndarray  # [S, S] int32
    ring: bool = False  # the keys come in parts, one device's streams at a time


def _declines_nothing(_: Case) -> str | None:
    return None


def _no_options(_: Case) -> dict[str, Any]:
    return {}


class RingParts(NamedTuple):
    """Attention over the keys of some streams only, from which ring attention is put together.

    Attributes:
      forward: (q, k, v, visibility) -> (output, log-sum-exp [B, Tq, Sq, N] float32).
      backward: (q, k, v, visibility, output, log_sum_exp, d_output) -> gradients of q, k and v
        through these keys, given output and log-sum-exp over the keys of all parts.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of attention. Each backend's module exports one of these as `BACKEND`.

    Attributes:
      name: the value of `config.model.attention` that asks for it; also the name of its module.
      attend: (q, k, v, visibility) -> output: softmax attention over the keys that `visible()`
        admits, differentiable in q, k and v. q is [B, Tq, Sq, N, H], k and v are [B, Tk, Sk, K, H]
        with N a multiple of K; the output has the shape and dtype of q. The keys hold all S
        streams.
      ring_parts: for ring attention (ring.py); None where a backend cannot take keys in parts.
      declines: (case) -> why the backend cannot do this, on the platform that it needs; None if it
        can.
      options: (case) -> keyword arguments of these functions for this case, such as the sizes of
        blocks.
    """

    name: str
    attend: Callable[..., jax.Array]
    ring_parts: RingParts | None = None
    declines: Callable[[Case], str | None] = _declines_nothing
    options: Callable[[Case], dict[str, Any]] = _no_options

    def with_options(self, **options: Any) -> Backend:
        """The same backend with keyword arguments of its functions set."""

        def bind(function: Callable) -> Callable:
            return functools.partial(function, **options)

        parts = self.ring_parts and RingParts(*map(bind, self.ring_parts))
        return dataclasses.replace(self, attend=bind(self.attend), ring_parts=parts)
