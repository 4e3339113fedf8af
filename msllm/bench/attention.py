"""Times attention alone, its backends side by side: the measurements of `msllm bench attention`."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from msllm.bench.timing import timed
from msllm.config import MeshConfig, ModelConfig
from msllm.errors import UserError
from msllm.model.attention.backend import Backend
from msllm.model.attention.dispatch import BACKENDS, choose_backend
from msllm.runtime.flops import attention_flops, visible_pairs
from msllm.runtime.hardware import lookup
from msllm.sharding import make_mesh
from msllm.streams import Cells, Visibility, lag_matrix, make_cells


def attention_case(case: dict) -> list[dict]:
    """Measures one case on the first device, in tables whose cells are all present.

    Args:
      case: rows, batch, streams, num_heads, num_kv_heads, head_dim, compute_dtype, steps; backends:
        names, empty for all that run on this device; memory_gib: a backend whose temporaries take
        more is compiled but not run.

    Returns: one result per backend.

    Raises UserError if a backend that is named declines.
    """
    device, lag = _device(), lag_matrix("block_causal", case["streams"])
    inputs = _inputs(case)
    results, runs = {}, {}
    for name, backend in _backends(case, lag).items():
        result = results[name] = {"benchmark": "attention", "backend": name, **case}
        functions = _compiled(backend, lag, inputs)
        temporary = {
            what: compiled.memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]
            for what, compiled in functions.items()
        }
        result.update(
            {f"{what}_temporary_mib": round(size / 2**20, 3) for what, size in temporary.items()}
        )
        if max(temporary.values()) > case["memory_gib"] * 2**30:
            result["not_run"] = f"its temporaries take more than --memory_gib={case['memory_gib']}"
        else:
            runs.update({(name, what): compiled for what, compiled in functions.items()})

    times = _interleaved(runs, inputs, case["steps"])
    pairs, hardware = case["batch"] * visible_pairs(lag, case["rows"]), lookup(device.device_kind)
    flops = attention_flops(case["num_heads"], case["head_dim"], pairs)
    for name, result in results.items():
        result |= {
            "device_kind": device.device_kind,
            "jax": jax.__version__,
            "visible_pairs": pairs,
        }
        for what, work in (("forward", flops), ("both", 3 * flops)):
            if (name, what) not in times:
                continue
            wall, cpu = times[name, what]
            result |= {
                f"{what}_wall_seconds": float(f"{wall:.4g}"),
                f"{what}_cpu_seconds": float(f"{cpu:.4g}"),
                f"{what}_useful_gflop": round(work / 1e9, 2),
                f"{what}_gflop_per_second": round(work / wall / 1e9, 1),
            }
            if device.platform == "cpu":
                result[f"{what}_cpu_ns_per_pair"] = float(f"{cpu / pairs * 1e9:.4g}")
            elif hardware and case["compute_dtype"] == "bfloat16":
                result[f"{what}_share_of_peak"] = round(work / wall / hardware.flops, 4)
            if ("reference", what) in times:
                seconds = 1 if device.platform == "cpu" else 0
                result[f"{what}_speedup"] = round(
                    times["reference", what][seconds] / times[name, what][seconds], 2
                )
    return list(results.values())


def _device() -> jax.Device:
    return jax.devices()[0]


def _backends(case: dict, lag: np.ndarray) -> dict[str, Backend]:
    """The backends that are asked for, or all that do not decline."""
    mesh, backends = make_mesh(MeshConfig(), [_device()]), {}
    sizes = {
        name: case[name] for name in ("num_heads", "num_kv_heads", "head_dim", "compute_dtype")
    }
    for name in case["backends"] or BACKENDS:
        try:
            backends[name] = choose_backend(
                ModelConfig(attention=name, **sizes), lag, case["rows"], mesh
            )
        except UserError:
            if case["backends"]:
                raise
    return backends


def _inputs(case: dict) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Cells]:
    """q, k, v, the gradient of the output, and the cells."""
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
    """`forward`, and `both`: forward and backward."""

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


def _interleaved(runs: dict, inputs: Sequence, repeats: int) -> dict:
    """Medians of (wall seconds, CPU-seconds of this process) by run.

    The runs take turns, so that changes of the machine's speed concern all of them.
    """

    def run(compiled: Callable) -> None:
        jax.block_until_ready(compiled(*inputs))

    seconds: dict[tuple[str, str], list[tuple[float, float]]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, compiled in runs.items():
            _, cpu, wall = timed(functools.partial(run, compiled))
            if repeat:  # the first one warms up
                seconds[name].append((wall, cpu))
    return {name: tuple(map(statistics.median, zip(*pairs))) for name, pairs in seconds.items()}
