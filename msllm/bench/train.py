"""The train step: forward, backward and AdamW on random tokens."""

from __future__ import annotations

import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from msllm.bench.timing import timed
from msllm.config import Config, DataConfig, LossConfig, ModelConfig, StreamsConfig
from msllm.metrics import memory_mib
from msllm.runtime.compiler import compile_step
from msllm.runtime.flops import train_flops
from msllm.runtime.hardware import lookup
from msllm.sharding import make_mesh
from msllm.step import Program
from msllm.streams import StreamSpec

_MODEL = (
    *("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("compute_dtype", "remat", "attention"),
)


def train_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures one case in this process, which should be new.

    Args:
      case: the settings of `runner.SETTINGS["train"]`, with one value of rows and of batch.
    """
    batch, rows, size = case["batch"], case["rows"], case["streams"]
    config = Config(
        model=ModelConfig(**{name: case[name] for name in _MODEL}),
        streams=StreamsConfig(names=tuple(f"s{i}" for i in range(size)), kinds=("output",) * size),
        data=DataConfig(rows=rows, batch_size=batch),
        loss=LossConfig(chunk_tokens=case["chunk_tokens"]),
    )
    streams = StreamSpec.from_config(config.streams)
    program = Program(config, streams, make_mesh(config.mesh))
    rng = np.random.default_rng(0)
    arrays = {
        "tokens": rng.integers(0, case["vocab_size"], (batch, rows, size)).astype(np.int32),
        "present": np.ones((batch, rows, size), bool),
        "segment": np.ones((batch, rows), np.int32),
    }
    tables = {
        name: jax.device_put(arrays[name], x.sharding) for name, x in program.abstract_batch.items()
    }
    state = program.init()
    step = compile_step(program.step, state, tables)
    state, metrics = step(state, tables)
    jax.block_until_ready((state, metrics))
    start_to_first_step = time.process_time()
    device = jax.devices()[0]
    peak_mib = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**20 or memory_mib()

    other = None
    if case["torch"]:
        other = _torch_trainer(config.model, state.parameters, arrays["tokens"])

    def own_step():
        return jax.block_until_ready(step(state, tables))

    own_times, other_times, differences = [], [], []
    for _ in range(case["steps"]):
        (state, metrics), *times = timed(own_step)
        own_times.append(times)
        if other:
            (loss, norm), *times = timed(other.step)
            other_times.append(times)
            differences.append(
                (abs(loss - metrics["loss"]), abs(norm / metrics["gradient_norm"] - 1))
            )
    seconds, wall = _medians(own_times)
    flops = train_flops(config.model, streams, batch, rows)
    if device.platform == "cpu":
        reached = _cpu_rates(flops / seconds)
    else:
        reached = accelerator_rates(
            device, flops / wall / jax.device_count(), case["compute_dtype"]
        )
    line = {
        "benchmark": "train",
        **case,
        "parameters": sum(x.size for x in jax.tree.leaves(program.abstract_state.parameters)),
        "tokens_per_step": batch * rows * size,
        "cpu_seconds_per_step": round(seconds, 4),
        "wall_seconds_per_step": round(wall, 4),
        "tokens_per_cpu_second": round(batch * rows * size / seconds, 1),
        "tokens_per_second": round(batch * rows * size / wall, 1),
        "start_to_first_step_cpu_seconds": round(start_to_first_step, 2),
        "peak_memory_mib": round(peak_mib, 1),
        "useful_gflop_per_step": round(flops / 1e9, 1),
        **reached,
        "loss": round(float(metrics["loss"]), 4),
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }
    if other:
        other_seconds, other_wall = _medians(other_times)
        line |= {
            "torch_cpu_seconds_per_step": round(other_seconds, 4),
            "torch_wall_seconds_per_step": round(other_wall, 4),
            "torch_tokens_per_cpu_second": round(batch * rows * size / other_seconds, 1),
            "torch_time_to_ours_cpu": round(other_seconds / seconds, 3),
            "torch_time_to_ours_wall": round(other_wall / wall, 3),
            # Of the first step, which both take from the same parameters.
            "torch_loss_difference": float(f"{differences[0][0]:.2g}"),
            "torch_gradient_norm_relative_difference": float(f"{differences[0][1]:.2g}"),
        }
    return [line]


def matmul_flops_per_cpu_second(size: int = 2048, repeats: int = 5) -> float:
    """This machine's rate for a float32 product [size, size] x [size, size], the best of
    `repeats`.
    """
    product = jax.jit(jnp.matmul)
    a = jnp.ones((size, size), jnp.float32)
    product(a, a).block_until_ready()
    seconds = (timed(lambda: product(a, a).block_until_ready())[1] for _ in range(repeats))
    return 2 * size**3 / min(seconds)


def accelerator_rates(
    device: jax.Device, flops_per_second: float, compute_dtype: str
) -> dict[str, float]:
    """What a device reaches and, where its peak is known, its share of the peak (MFU).

    MFU is defined in PaLM (arXiv 2204.02311), appendix B.
    """
    rates = {"tflop_per_second_per_device": round(flops_per_second / 1e12, 2)}
    hardware = lookup(device.device_kind)
    if hardware and compute_dtype == "bfloat16":
        rates["mfu"] = round(flops_per_second / hardware.flops, 4)
    return rates


def _cpu_rates(flops_per_cpu_second: float) -> dict[str, float]:
    matmul = matmul_flops_per_cpu_second()
    return {
        "useful_gflop_per_cpu_second": round(flops_per_cpu_second / 1e9, 1),
        "matmul_gflop_per_cpu_second": round(matmul / 1e9, 1),
        "share_of_matmul": round(flops_per_cpu_second / matmul, 3),
    }


def _medians(times: list[list[float]]) -> tuple[float, float]:
    """Median CPU-seconds and seconds of pairs of both."""
    cpu, wall = zip(*times, strict=True)
    return statistics.median(cpu), statistics.median(wall)


def _torch_trainer(model: ModelConfig, parameters: Any, tokens: np.ndarray):
    from msllm.bench import torch_reference

    return torch_reference.Trainer(
        torch_reference.Model(model, tokens.shape[2], parameters), tokens
    )
