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


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of attention. Each backend's module exports one of these as `BACKEND`.

    Attributes:
      name: the value of `config.model.attention` that asks for it; also the name of its module.
      attend: (q, k, v, visibility) -> output: softmax attention over the keys that `visible()`
        admits, differentiable in q, k and v. q is [B, Tq, Sq, N, H], k and v are [B, Tk, Sk, K, H]
        with N a multiple of K; the output has the shape and dtype of q. The keys hold all S
        streams.
      forward_part: (q, k, v, visibility) -> (output, log-sum-exp [B, Tq, Sq, N] float32), over keys
        of some streams only. With `backward_part` it is what ring attention needs (ring.py); None
        where a backend has no such parts.
      backward_part: (q, k, v, visibility, output, log_sum_exp, d_output) -> gradients of q, k and v
        through these keys, given output and log-sum-exp over the keys of all parts.
      declines: (case) -> why the backend cannot do this, on the platform that it needs; None if it
        can.
      options: (case) -> keyword arguments of the three functions for this case, such as the sizes
        of blocks.
    """

    name: str
    attend: Callable[..., jax.Array]
    forward_part: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    backward_part: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] | None = None
    declines: Callable[[Case], str | None] = _declines_nothing
    options: Callable[[Case], dict[str, Any]] = _no_options

    def with_options(self, **options: Any) -> Backend:
        """The same backend with keyword arguments of its functions set."""
        functions = {
            field: functools.partial(function, **options)
            for field in ("attend", "forward_part", "backward_part")
            if (function := getattr(self, field))
        }
        return dataclasses.replace(self, **functions) if options else self
