"""Attention over the cells of tables: chooses the backend and brings the keys of all streams together."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from msllm.config import ModelConfig
from msllm.errors import UserError
from msllm.model.attention.backend import Case
from msllm.model.attention.ring import ring_attention
from msllm.sharding import axis_index, axis_size, gather_streams, mesh_axes
from msllm.streams import Cells, pad_lag

log = logging.getLogger("msllm")

# Backends and the platform that each needs, the best first. The module of that name is imported when it is chosen: the
# libraries of kernels are slow to import. `auto` never takes the last one, whose memory is quadratic.
BACKENDS = {"splash": "tpu", "gpu": "gpu", "native": "cpu", "chunked": "", "reference": ""}


def backend(name: str) -> Callable:
    """The function of a backend; its signature is that of `reference_attention`."""
    return getattr(_module(name), f"{name}_attention")


def choose_backend(config: ModelConfig, lag: np.ndarray, rows: int, mesh) -> Callable:
    """The backend's function for tables of `rows` rows on `mesh`. Logs it, and why the better ones were passed over.

    Raises UserError when the config asks for one that declines.
    """
    device, heads = (
        mesh.devices.flat[0],
        int(np.prod([mesh.shape[axis] for axis in mesh_axes("heads")])),
    )
    per_device = -(-lag.shape[0] // mesh.shape["stream"])
    size = per_device * mesh.shape["stream"]
    shape = (
        size,
        per_device,
        config.num_heads // heads,
        config.num_kv_heads // heads,
        config.head_dim,
    )
    ring = config.kv_ring and mesh.shape["stream"] > 1
    case = Case(
        device.platform,
        device.device_kind,
        config.compute_dtype,
        rows,
        *shape,
        pad_lag(lag, size),
        ring,
    )
    passed = []
    for name in list(BACKENDS)[:-1] if config.attention == "auto" else [config.attention]:
        reason = declines(name, case)
        if reason is None:
            log.info(
                "attention: %s%s", name, "".join(f"; not {other}: {why}" for other, why in passed)
            )
            options = getattr(_module(name), "options", lambda case: {})(case)
            return functools.partial(backend(name), **options)
        passed.append((name, reason))
    raise UserError(
        f"config.model.attention is {config.attention!r}: {reason}; set it to 'auto' or another backend"
    )


def declines(name: str, case: Case) -> str | None:
    """Why a backend cannot do what is asked; None if it can."""
    needs = BACKENDS[name]
    if needs and case.platform != needs:
        return f"it needs a {needs.upper()}, and the devices are of platform {case.platform}"
    if case.ring and not hasattr(_module(name), "forward_part"):
        return "it takes all keys at once, and they come one device's streams at a time (model.kv_ring)"
    return _module(name).declines(case) if needs else None


def _module(name: str):
    return importlib.import_module(f"msllm.model.attention.{'cpu' if name == 'native' else name}")


# Values that a checkpointed attention keeps: with a kernel's output and log-sum-exp it need not run again.
KEEP_OUTPUT = jax.checkpoint_policies.save_only_these_names("attention")


def attention(q, k, v, cells: Cells, lag, kernel: Callable, kv_parts: int = 1, ring: bool = False):
    """Every cell attends to the cells that it sees.

    Inside `shard_map` each device holds some tables, some streams and some heads; it gathers the keys and values of all
    streams (they are smaller than the activations, and every stream needs the same share of them, so the work is
    balanced) and computes its own streams' outputs.

    Args:
      q: [B, T, S, N, H]. k, v: [B, T, S, K, H]. cells: of the same tables. lag: [S, S] int32 of all streams, without
        those that fill up the mesh axis.
      kernel: the function of a backend, from `choose` or `backend`.
      kv_parts: how many times to gather, some heads each time. Each part's keys and values are gathered again backward,
        so that 1 / kv_parts of them exist at a time.
      ring: never gather them: they go round, one device's streams at a time.

    Returns: [B, T, S, N, H] in q's dtype.
    """
    size = q.shape[2]
    lag = pad_lag(lag, size * axis_size("stream"))
    if ring and axis_size("stream") > 1:
        return ring_attention(q, k, v, cells, lag, kernel)
    k_cells = cells._replace(present=gather_streams(cells.present), seen=gather_streams(cells.seen))
    streams = axis_index("stream") * size + jnp.arange(size)

    def all_keys(q, k, v):
        return kernel(q, gather_streams(k), gather_streams(v), cells, k_cells, lag, streams)

    if kv_parts == 1:
        return all_keys(q, k, v)

    def split(x):
        return jnp.moveaxis(x.reshape(*x.shape[:3], kv_parts, -1, x.shape[-1]), 3, 0)

    out = jax.lax.map(
        lambda part: jax.checkpoint(all_keys, policy=KEEP_OUTPUT)(*part),
        (split(q), split(k), split(v)),
    )
    return jnp.moveaxis(out, 0, 3).reshape(q.shape)
