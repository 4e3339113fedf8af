"""Measures the attention backends alone, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msllm.bench.timing import Times, median_times, timed
from msllm.config import MeshConfig, ModelConfig
from msllm.errors import UserError
from msllm.model.attention.backend import Backend
from msllm.model.attention.dispatch import BACKENDS, choose_backend
from msllm.runtime.flops import attention_flops, visible_pairs
from msllm.runtime.hardware import lookup
from msllm.sharding import make_mesh
from msllm.streams import Cells, Visibility, lag_matrix, make_cells

_Run = tuple[str, str]  # backend, and `forward` or `both`


def attention_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures one case on the first device, with tables whose cells are all present.

    Args:
      case: the settings of `runner.SETTINGS["attention"]`, with one value of rows and of batch.
        Without names in `backends`, all backends that run on this device are measured. A backend
        whose temporary buffers exceed `memory_gib` is compiled but not run.

    Returns:
      One result per backend.

    Raises:
      UserError: a backend named in the case declines it.
    """
    device, lag = _device(), lag_matrix("block_causal", case["streams"])
    inputs = _inputs(case)
    results: dict[str, dict[str, Any]] = {}
    runs: dict[_Run, jax.stages.Compiled] = {}
    for name, backend in _backends(case, lag).items():
        result = results[name] = {"benchmark": "attention", "backend": name, **case}
        functions = _compiled(backend, lag, inputs)
        temporary = {
            what: compiled.memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]
            for what, compiled in functions.items()
        }
        for what, size in temporary.items():
            result[f"{what}_temporary_mib"] = round(size / 2**20, 3)
        if max(temporary.values()) > case["memory_gib"] * 2**30:
            result["not_run"] = f"temporary buffers exceed --memory_gib={case['memory_gib']}"
        else:
            runs.update({(name, what): compiled for what, compiled in functions.items()})

    times = _interleaved(runs, inputs, case["steps"])
    pairs = case["batch"] * visible_pairs(lag, case["rows"])
    forward_flops = attention_flops(case["num_heads"], case["head_dim"], pairs)
    for result in results.values():
        result |= {
            "device_kind": device.device_kind,
            "jax": jax.__version__,
            "visible_pairs": pairs,
        }
    for (name, what), measured in times.items():
        flops = forward_flops if what == "forward" else 3 * forward_flops
        rates = _rates(device, measured, flops, pairs, case["compute_dtype"])
        if reference := times.get(("reference", what)):
            rates["speedup"] = _speedup(device, reference, measured)
        results[name] |= {f"{what}_{key}": value for key, value in rates.items()}
    return list(results.values())


def _rates(
    device: jax.Device, times: Times, flops: float, pairs: int, compute_dtype: str
) -> dict[str, float]:
    """Returns times and rates of a run that computes `flops` for `pairs` visible pairs."""
    rates = {
        "wall_seconds": float(f"{times.wall:.4g}"),
        "cpu_seconds": float(f"{times.cpu:.4g}"),
        "useful_gflop": round(flops / 1e9, 2),
        "gflop_per_second": round(flops / times.wall / 1e9, 1),
    }
    hardware = lookup(device.device_kind)
    if device.platform == "cpu":
        rates["cpu_ns_per_pair"] = float(f"{times.cpu / pairs * 1e9:.4g}")
    elif hardware and compute_dtype == "bfloat16":
        rates["share_of_peak"] = round(flops / times.wall / hardware.flops, 4)
    return rates


def _speedup(device: jax.Device, reference: Times, times: Times) -> float:
    """Returns the speedup over the reference backend, in CPU time if the device is a CPU."""
    if device.platform == "cpu":
        return round(reference.cpu / times.cpu, 2)
    return round(reference.wall / times.wall, 2)


def _device() -> jax.Device:
    return jax.devices()[0]


def _backends(case: dict[str, Any], lag: np.ndarray) -> dict[str, Backend]:
    """Returns the backends that the case names, or all that do not decline it."""
    mesh, backends = make_mesh(MeshConfig(), [_device()]), {}
    names = ("num_heads", "num_kv_heads", "head_dim", "compute_dtype")
    sizes = {name: case[name] for name in names}
    for name in case["backends"] or BACKENDS:
        try:
            backends[name] = choose_backend(
                ModelConfig(attention=name, **sizes), lag, case["rows"], mesh
            )
        except UserError:
            if case["backends"]:
                raise
    return backends


def _inputs(case: dict[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Cells]:
    """Returns q, k, v, the gradient of the output, and the cells."""
    rng, tables = np.random.default_rng(0), (case["batch"], case["rows"], case["streams"])

    def make(heads: str) -> jax.Array:
        return jnp.asarray(
            rng.standard_normal((*tables, case[heads], case["head_dim"]), np.float32),
            case["compute_dtype"],
        )

    cells = jax.tree.map(
        jnp.asarray, make_cells(np.ones(tables, bool), np.ones(tables[:2], np.int32))
    )
    return make("num_heads"), make("num_kv_heads"), make("num_kv_heads"), make("num_heads"), cells


def _compiled(
    backend: Backend, lag: np.ndarray, inputs: Sequence
) -> dict[str, jax.stages.Compiled]:
    """Compiles the forward pass (`forward`), and forward with backward (`both`)."""

    def forward(q, k, v, d_out, cells):
        visibility = Visibility(cells, cells, lag, jnp.arange(lag.shape[0]))
        return backend.attend(q, k, v, visibility)

    def both(q, k, v, d_out, cells):
        out, pull_back = jax.vjp(lambda q, k, v: forward(q, k, v, d_out, cells), q, k, v)
        return out, *pull_back(d_out)

    return {
        "forward": jax.jit(forward).lower(*inputs).compile(),
        "both": jax.jit(both).lower(*inputs).compile(),
    }


def _interleaved(
    runs: dict[_Run, jax.stages.Compiled], inputs: Sequence, repeats: int
) -> dict[_Run, Times]:
    """Returns the median times of each run.

    The runs take turns, so that changes in the machine's speed affect all of them.
    """

    def run(compiled: Callable) -> None:
        jax.block_until_ready(compiled(*inputs))

    for compiled in runs.values():  # warm-up
        run(compiled)
    times: dict[_Run, list[Times]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, compiled in runs.items():
            times[name].append(Times(*timed(run, compiled)[1:]))
    return {name: median_times(measured) for name, measured in times.items()}
