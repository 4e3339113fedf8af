"""Measures the train step (forward, backward and AdamW) on tokens that are drawn like text.

With edges through tokens, a step of the same model with latent edges alternates with it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msllm.bench.timing import Times, median_times, timed
from msllm.config import Config, DataConfig, LossConfig, ModelConfig, StreamsConfig
from msllm.metrics import memory_mib
from msllm.runtime.compiler import compile_step
from msllm.runtime.flops import train_flops
from msllm.runtime.hardware import lookup
from msllm.sharding import make_mesh
from msllm.step import Program, TrainState
from msllm.streams import StreamSpec

if TYPE_CHECKING:
    from msllm.bench import torch_reference

_MODEL = (
    *("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("compute_dtype", "remat", "attention"),
)


class _TorchStep(NamedTuple):
    """A step of the model in torch.

    Attributes:
      times: its times.
      loss_difference: absolute difference to the loss of msllm.
      norm_difference: relative difference to the gradient norm of msllm.
    """

    times: Times
    loss_difference: float
    norm_difference: float


def train_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures one case in this process, which should be new.

    Args:
      case: the settings of `runner.SETTINGS["train"]`, with one value of rows and of batch.
    """
    tables = random_tables(case)
    program = _make_program(case)
    trainer = _Trainer(program, tables)
    trainer.step()
    start_to_first_step = time.process_time()
    device = jax.devices()[0]
    peak_mib = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**20 or memory_mib()
    other = latent = None
    if case["torch"]:
        other = _torch_trainer(program.config.model, trainer.state.parameters, tables["tokens"])
    if case["medium"] != "latent":
        latent = _Trainer(_make_program(case | {"medium": "latent"}), tables)
        latent.step()

    ours, theirs, latents = [], [], []
    for _ in range(case["steps"]):
        metrics, *times = timed(trainer.step)
        ours.append(Times(*times))
        if other:
            theirs.append(_torch_step(other, metrics))
        if latent:
            latents.append(Times(*timed(latent.step)[1:]))

    cells = case["batch"] * case["rows"] * case["streams"]
    cpu, wall = median_times(ours)
    flops = train_flops(program.config.model, program.streams, case["batch"], case["rows"])
    line = {
        "benchmark": "train",
        **case,
        "parameters": sum(x.size for x in jax.tree.leaves(program.abstract_state.parameters)),
        "tokens_per_step": cells,
        "cpu_seconds_per_step": round(cpu, 4),
        "wall_seconds_per_step": round(wall, 4),
        "tokens_per_cpu_second": round(cells / cpu, 1),
        "tokens_per_second": round(cells / wall, 1),
        "start_to_first_step_cpu_seconds": round(start_to_first_step, 2),
        "peak_memory_mib": round(peak_mib, 1),
        "useful_gflop_per_step": round(flops / 1e9, 1),
        **_rates(device, flops, Times(cpu, wall), case["compute_dtype"]),
        "loss": round(float(metrics["loss"]), 4),
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }
    if theirs:
        line |= _torch_results(theirs, Times(cpu, wall), cells)
    if latents:
        line |= _latent_results(latents, ours, tables["tokens"])
    return [line]


class _Trainer:
    """Trains a model on the same batch again and again."""

    def __init__(self, program: Program, tables: dict[str, np.ndarray]) -> None:
        self._batch = {
            name: jax.device_put(tables[name], x.sharding)
            for name, x in program.abstract_batch.items()
        }
        self.state: TrainState = program.init()
        self._step = compile_step(program.step, self.state, self._batch)

    def step(self) -> dict[str, jax.Array]:
        """Runs a step until its results are ready, and returns its metrics."""
        self.state, metrics = jax.block_until_ready(self._step(self.state, self._batch))
        return metrics


def _make_program(case: dict[str, Any]) -> Program:
    size = case["streams"]
    config = Config(
        model=ModelConfig(**{name: case[name] for name in _MODEL}),
        streams=StreamsConfig(
            names=tuple(f"s{i}" for i in range(size)),
            kinds=("output",) * size,
            visibility_medium=case["medium"],
        ),
        data=DataConfig(rows=case["rows"], batch_size=case["batch"]),
        loss=LossConfig(chunk_tokens=case["chunk_tokens"]),
    )
    return Program(config, StreamSpec.from_config(config.streams), make_mesh(config.mesh))


def random_tables(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns tables of random tokens without absent cells.

    The arrays are tokens and present, [B, T, S], and segment, [B, T]. Token i of the vocabulary is
    drawn in proportion to 1 / i (Zipf's law), as words are in text. With several streams,
    `case["silence"]` percent of the cells hold token 0 in addition.
    """
    shape = (case["batch"], case["rows"], case["streams"])
    random = np.random.default_rng(0)
    shares = np.cumsum(1 / np.arange(1, case["vocab_size"]))
    tokens = 1 + np.searchsorted(shares, random.random(shape) * shares[-1])
    if case["streams"] > 1:
        tokens[random.random(shape) * 100 < case.get("silence", 0)] = 0
    return {
        "tokens": tokens.astype(np.int32),
        "present": np.ones(shape, bool),
        "segment": np.ones(shape[:2], np.int32),
    }


def matmul_flops_per_cpu_second(size: int = 2048, repeats: int = 5) -> float:
    """Measures the FLOPs per CPU-second of a float32 product [size, size] x [size, size].

    Returns the best of `repeats` measurements.
    """
    product = jax.jit(jnp.matmul)
    a = jnp.ones((size, size), jnp.float32)

    def multiply() -> None:
        product(a, a).block_until_ready()

    multiply()  # compiles
    return 2 * size**3 / min(timed(multiply)[1] for _ in range(repeats))


def accelerator_rates(
    device: jax.Device, flops_per_second: float, compute_dtype: str
) -> dict[str, float]:
    """Returns the rate of a device and, if its peak is known, its share of the peak (MFU).

    PaLM (arXiv 2204.02311), appendix B, defines MFU.

    Args:
      device: the device.
      flops_per_second: useful FLOPs per second that it reached.
      compute_dtype: the data type of the matrix products. Peaks are known for bfloat16 only.
    """
    rates = {"tflop_per_second_per_device": round(flops_per_second / 1e12, 2)}
    hardware = lookup(device.device_kind)
    if hardware and compute_dtype == "bfloat16":
        rates["mfu"] = round(flops_per_second / hardware.flops, 4)
    return rates


def _rates(device: jax.Device, flops: float, times: Times, compute_dtype: str) -> dict[str, float]:
    """Returns the rates of a step with `flops` useful FLOPs."""
    if device.platform == "cpu":
        return _cpu_rates(flops / times.cpu)
    return accelerator_rates(device, flops / times.wall / jax.device_count(), compute_dtype)


def _cpu_rates(flops_per_cpu_second: float) -> dict[str, float]:
    matmul = matmul_flops_per_cpu_second()
    return {
        "useful_gflop_per_cpu_second": round(flops_per_cpu_second / 1e9, 1),
        "matmul_gflop_per_cpu_second": round(matmul / 1e9, 1),
        "share_of_matmul": round(flops_per_cpu_second / matmul, 3),
    }


def _latent_results(
    latents: Sequence[Times], ours: Sequence[Times], tokens: np.ndarray
) -> dict[str, float]:
    """Returns how a step compares with that of latent edges, and how often tokens recur."""
    (cpu, wall), (our_cpu, our_wall) = median_times(latents), median_times(ours)
    fastest = min(one.cpu for one in ours) / min(one.cpu for one in latents)
    distinct = max(
        len(np.unique(table[:, stream])) for table in tokens for stream in range(tokens.shape[2])
    )
    return {
        "latent_cpu_seconds_per_step": round(cpu, 4),
        "time_to_latent_cpu": round(our_cpu / cpu, 3),
        "time_to_latent_cpu_fastest": round(fastest, 3),
        "time_to_latent_wall": round(our_wall / wall, 3),
        "most_distinct_tokens_of_a_stream": distinct,
    }


def _torch_trainer(
    model: ModelConfig, parameters: Any, tokens: np.ndarray
) -> torch_reference.Trainer:
    from msllm.bench import torch_reference

    streams = tokens.shape[2]
    return torch_reference.Trainer(torch_reference.Model(model, streams, parameters), tokens)


def _torch_step(other: torch_reference.Trainer, metrics: dict[str, jax.Array]) -> _TorchStep:
    """Runs a step in torch and compares it with the metrics of msllm."""
    (loss, norm), *times = timed(other.step)
    return _TorchStep(
        Times(*times),
        abs(loss - float(metrics["loss"])),
        abs(norm / float(metrics["gradient_norm"]) - 1),
    )


def _torch_results(steps: Sequence[_TorchStep], ours: Times, cells: int) -> dict[str, float]:
    cpu, wall = median_times([step.times for step in steps])
    first = steps[0]  # both start this step with the same parameters
    return {
        "torch_cpu_seconds_per_step": round(cpu, 4),
        "torch_wall_seconds_per_step": round(wall, 4),
        "torch_tokens_per_cpu_second": round(cells / cpu, 1),
        "torch_time_to_ours_cpu": round(cpu / ours.cpu, 3),
        "torch_time_to_ours_wall": round(wall / ours.wall, 3),
        "torch_loss_difference": float(f"{first.loss_difference:.2g}"),
        "torch_gradient_norm_relative_difference": float(f"{first.norm_difference:.2g}"),
    }
