"""Chooses an attention backend, and gathers the keys of all streams on each device."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from msllm.config import ModelConfig
from msllm.errors import UserError
from msllm.model.attention.apart import are_apart, attend_apart
from msllm.model.attention.backend import Backend, Case, LagChoices
from msllm.model.attention.ring import ring_attention
from msllm.sharding import axis_index, axis_size, gather_streams, mesh_axes
from msllm.streams import Cells, Visibility, pad_lag

log = logging.getLogger("msllm")

ANY = "any"
# The backends, best first, and the platform that each needs. The platform is here and not in
# `Backend`, so that a backend's module is imported only on its platform: kernel libraries are slow
# to import.
BACKENDS = {"splash": "tpu", "gpu": "gpu", "cpu": "cpu", "chunked": ANY, "reference": ANY}
# `config.model.attention = "auto"` never chooses the reference, because its memory is quadratic.
AUTO = tuple(name for name in BACKENDS if name != "reference")

# A `jax.checkpoint` policy that saves a kernel's output and log-sum-exp, so that the backward pass
# does not run the forward kernel again.
KEEP_OUTPUT = jax.checkpoint_policies.save_only_these_names("attention")


def get_backend(name: str) -> Backend:
    """The backend called `name`, one of BACKENDS, with its default options."""
    return importlib.import_module(f"msllm.model.attention.{name}").BACKEND


# A backend that compiles lags in needs a kernel for each matrix from which lags are drawn.
MAX_MATRICES = 16


def choose_backend(
    config: ModelConfig,
    lag: np.ndarray | LagChoices,
    rows: int,
    mesh: Mesh,
    relays: int = 0,
) -> Backend:
    """Chooses the best backend for a model on a mesh, and sets its options.

    Logs the backend's name, and the reasons why better ones for the same platform decline.

    Args:
      config: the settings of the model.
      lag: [S, S] int32, the lag matrix, or that of all columns (`relays.Columns`); or the matrices
        of which one is drawn.
      rows: T, the rows of a table.
      mesh: the mesh on which the model runs.
      relays: the columns of each device that have no queries.

    Raises UserError if the config names a backend that declines.
    """
    choices = lag if isinstance(lag, LagChoices) else LagChoices(lag)
    case = _case(config, choices.lag, rows, mesh, relays)
    passed_over = ""
    candidates = [name for name in AUTO if BACKENDS[name] in (ANY, case.platform)]
    for name in candidates if config.attention == "auto" else (config.attention,):
        reason = declines(name, case) or _declines_choices(name, case, choices)
        if reason is None:
            log.info("attention: %s%s", name, passed_over)
            backend = get_backend(name)
            return backend.with_options(**backend.options(case))
        passed_over += f"; not {name}: {reason}"
    raise UserError(
        f"config.model.attention is {config.attention!r}: {reason}; set it to 'auto' or another "
        "backend"
    )


def portable_backend(config: ModelConfig) -> Backend:
    """A backend that runs on every device and on tables of any size."""
    return get_backend("reference" if config.attention == "reference" else "chunked")


def declines(name: str, case: Case) -> str | None:
    """The reason why the backend called `name` cannot compute `case`, or None if it can."""
    platform = BACKENDS[name]
    if platform not in (ANY, case.platform):
        return f"it needs a {platform.upper()}, but the devices are of platform {case.platform}"
    backend = get_backend(name)
    if case.ring and backend.ring_parts is None:
        return "it takes all keys at once, but with model.kv_ring they come in parts"
    return backend.declines(case)


def _declines_choices(name: str, case: Case, choices: LagChoices) -> str | None:
    """The reason why a backend cannot compute some of the lags that may be drawn, or None."""
    if choices.num_matrices == 1 or get_backend(name).traced_lag:
        return None
    if choices.num_matrices > MAX_MATRICES:
        return (
            f"it compiles a kernel for each lag matrix that may be drawn, at most {MAX_MATRICES},"
            f" and config.streams.lags gives {choices.num_matrices}"
        )
    padded = (pad_lag(lag, case.streams) for lag in choices.matrices())
    reasons = (declines(name, case._replace(lag=lag)) for lag in padded)
    return next((reason for reason in reasons if reason), None)


def _case(config: ModelConfig, lag: np.ndarray, rows: int, mesh: Mesh, relays: int) -> Case:
    """The case that each device of `mesh` computes."""
    device, parts = mesh.devices.flat[0], mesh.shape["stream"]
    head_parts = int(np.prod([mesh.shape[axis] for axis in mesh_axes("heads")]))
    columns = -(-lag.shape[0] // parts)  # streams are padded to a multiple of the parts
    return Case(
        platform=device.platform,
        device_kind=device.device_kind,
        dtype=config.compute_dtype,
        rows=rows,
        streams=columns * parts,
        q_streams=columns - relays,
        heads=config.num_heads // head_parts,
        kv_heads=config.num_kv_heads // head_parts,
        head_dim=config.head_dim,
        lag=pad_lag(lag, columns * parts),
        ring=config.kv_ring and parts > 1,
    )


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cells: Cells,
    lag: np.ndarray,
    backend: Backend,
    kv_parts: int = 1,
    ring: bool = False,
    key_cells: Cells | None = None,
    traced_lag: jax.Array | None = None,
) -> jax.Array:
    """Attends from every cell to the cells that it sees.

    Inside `shard_map` each device holds some tables, some streams and some heads. It gathers the
    keys and values of all streams, which are smaller than the activations, and computes the outputs
    of its own streams. Every stream needs the same share of the keys, so the work is balanced.

    Args:
      q: [B, T, S, N, H], where S are the streams of this device.
      k, v: [B, T, M, K, H], where M are the streams and relays of this device (relays.py).
      cells: the cells of the queries.
      lag: the lags of all columns, as in `relays.Columns`.
      backend: from `choose_backend` or `get_backend`.
      kv_parts: gathers the heads of k and v in this many parts. The backward pass gathers each part
        again, so that only 1 / kv_parts of the gathered keys and values exist at a time.
      ring: passes keys and values around the devices of the mesh axis `stream` (ring.py) instead of
        gathering them.
      key_cells: the cells of the keys; None: those of the queries.
      traced_lag: the lags, if they are traced, for a backend that takes such lags. `lag` then has
        the largest values that they may have.

    Returns: [B, T, S, N, H] in q's dtype.
    """
    key_cells = cells if key_cells is None else key_cells
    lag = pad_lag(lag, k.shape[2] * axis_size("stream"))
    if backend.any_cells and are_apart(lag, q.shape[2], k.shape[2]):
        return attend_apart(q, k, v, cells, key_cells, lag, backend, traced_lag)
    if ring and axis_size("stream") > 1:
        return ring_attention(q, k, v, cells, key_cells, lag, backend, traced_lag)
    keys = key_cells._replace(
        present=gather_streams(key_cells.present), seen=gather_streams(key_cells.seen)
    )
    streams = axis_index("stream") * k.shape[2] + jnp.arange(q.shape[2])
    visibility = Visibility(cells, keys, lag if traced_lag is None else traced_lag, streams)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return backend.attend(q, gather_streams(k), gather_streams(v), visibility)

    if kv_parts == 1:
        return attend(q, k, v)

    def split(x: jax.Array) -> jax.Array:
        """[B, T, S, heads, H] -> [kv_parts, B, T, S, heads / kv_parts, H]."""
        return jnp.moveaxis(x.reshape(*x.shape[:3], kv_parts, -1, x.shape[-1]), 3, 0)

    out = jax.lax.map(
        lambda part: jax.checkpoint(attend, policy=KEEP_OUTPUT)(*part),
        (split(q), split(k), split(v)),
    )
    return jnp.moveaxis(out, 0, 3).reshape(q.shape)


def attention_of_draw(
    choices: LagChoices,
    draw: jax.Array | None,
    backend: Backend,
    attend: Callable[..., jax.Array],
    *arrays: jax.Array,
) -> jax.Array:
    """Attends by the lags that were drawn for a batch.

    Args:
      choices: the lag matrices of all columns.
      draw: [draws] int32, the place of each drawn value; None: nothing is drawn.
      backend: a backend that takes traced lags gets those of the draw. For another one, all
        matrices are compiled, and one of them runs.
      attend: gets `arrays` and the keywords `lag` and `traced_lag`, and returns the result of
        `attention`.
    """
    if draw is None or not choices.drawn:
        return attend(*arrays, lag=choices.lag)
    if backend.traced_lag:
        return attend(*arrays, lag=choices.largest(), traced_lag=choices.matrix(draw))
    branches = [functools.partial(attend, lag=lag) for lag in choices.matrices()]
    return jax.lax.switch(choices.number(draw), branches, *arrays)
