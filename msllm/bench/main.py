"""Benchmarks as JSON lines; `docs/benchmarks.md` keeps results.

    msllm bench train [--rows=102,512] [--batch=4,1] [--streams=10] [--steps=5] [--d_model=256 ...]
    msllm bench attention [--rows=102,512] [--batch=4,1] [--backends=chunked,reference] [--head_dim=64 ...]
    msllm bench decode [--rows=400] [--prefill=100] [--streams=10] [--cache_dtype=int8]
    msllm bench prepare [--size_mb=64,256] [--converter=chat] [--processes=2]
    msllm bench loader [--tables=4000] [--sources=1] [--silence=60] [--epochs=4]

`train`: the train step (forward, backward, AdamW) on random tokens. `attention`: the backends alone, in turn, forward
and with the backward pass. `decode`: rows of one session, with all streams and with one, in turn, for each type of cache
(29.4 M parameters unless sizes are given). `prepare`: preparing a made corpus of each size, and the memory that it takes.
`loader`: prepared tables from disk to batches, T = 512, B = 32, S = 1, 3 and 10. Each case runs in a new process, on
whatever devices jax finds. CPU-seconds are those of the process (user + system; `prepare`: and of its workers), so that
other work on the machine matters less than in wall time. What is reached on an accelerator with --compute_dtype=bfloat16 is
given as a share of its peak (msllm/runtime/hardware.py).

With --torch, `train` and `decode` take turns with the same model in torch (transformers' Qwen3 with a dense mask, on CPU;
both must be installed), from the same parameters: how far loss and gradient norm differ and which rows agree is printed, too.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from msllm.bench.timing import timed
from msllm.errors import UserError, run

CACHES = ["int8", "bfloat16", "float32"]

flags.DEFINE_list("rows", ["102", "512"], "T of each case.")
flags.DEFINE_list("batch", ["4", "1"], "Tables of each case.")
flags.DEFINE_integer("streams", 10, "S.")
flags.DEFINE_integer("steps", 5, "Steps (or repetitions) measured, after the first.")
flags.DEFINE_integer("vocab_size", 8192, "V.")
flags.DEFINE_integer("d_model", 256, "D.")
flags.DEFINE_integer("d_ff", 768, "F.")
flags.DEFINE_integer("num_layers", 4, "Layers.")
flags.DEFINE_integer("num_heads", 4, "N.")
flags.DEFINE_integer("num_kv_heads", 2, "K.")
flags.DEFINE_integer("head_dim", 64, "H.")
flags.DEFINE_enum(
    "compute_dtype", "float32", ["float32", "bfloat16"], "Of matrix products and activations."
)
flags.DEFINE_string("attention", "auto", "train: the backend, as in config.model.attention.")
flags.DEFINE_list(
    "backends", [], "attention: the backends to measure; none: all that run on this device."
)
flags.DEFINE_float(
    "memory_gib", 4.0, "attention: a backend whose temporaries take more is not run."
)
flags.DEFINE_enum("remat", "dots", ["none", "dots", "full", "offload"], "Remat policy.")
flags.DEFINE_boolean(
    "torch", False, "train, decode: in turn with the same model in torch, with a dense mask."
)
flags.DEFINE_integer("prefill", 100, "decode: rows of each table that are read before.")
flags.DEFINE_list("cache_dtype", CACHES, "decode: of keys and values; each is a case.")
flags.DEFINE_integer("chunk_tokens", 1024, "Cells whose logits exist at one time.")
flags.DEFINE_integer("tables", 4000, "loader: tables of each source.")
flags.DEFINE_integer("sources", 1, "loader: sources; several are mixed.")
flags.DEFINE_integer(
    "silence", 60, "loader: percent of the cells that are silent, where there are several streams."
)
flags.DEFINE_integer("epochs", 4, "loader: measured, after the first.")

flags.DEFINE_list("size_mb", ["64", "256"], "prepare: MB of text of each case.")
flags.DEFINE_enum(
    "converter",
    "chat",
    ["chat", "wait_k", "parallel_documents"],
    "prepare: what makes streams of it.",
)
flags.DEFINE_integer("processes", 2, "prepare: worker processes.", lower_bound=1)

HEADS = ("num_heads", "num_kv_heads", "head_dim", "compute_dtype")
SHAPE = ("vocab_size", "d_model", "d_ff", "num_layers", *HEADS, "remat", "attention")
# Per benchmark, the flags that make a case, besides rows and batch.
CASES = {
    "train": (*SHAPE, "streams", "steps", "chunk_tokens", "torch"),
    "attention": (*HEADS, "streams", "steps", "backends", "memory_gib"),
    "decode": (
        "vocab_size",
        "d_model",
        "d_ff",
        "num_layers",
        *HEADS,
        "streams",
        "steps",
        "prefill",
        "cache_dtype",
        "torch",
    ),
    "prepare": ("converter", "processes"),
    "loader": ("tables", "sources", "silence", "epochs"),
}
# What a benchmark takes in place of a flag's default.
DEFAULTS = {
    "decode": {
        **{
            "rows": ["400"],
            "batch": ["1"],
            "steps": 32,
            "d_model": 512,
            "d_ff": 1536,
            "num_layers": 8,
        },
        **{"num_heads": 8, "num_kv_heads": 4},
    }
}


def matmul_flops_per_cpu_second(size: int = 2048, repeats: int = 5) -> float:
    """This machine's rate for a float32 product [size, size] x [size, size], the best of `repeats`."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(lambda a, b: a @ b)
    a = jnp.ones((size, size), jnp.float32)
    product(a, a).block_until_ready()
    seconds = (timed(lambda: product(a, a).block_until_ready())[1] for _ in range(repeats))
    return 2 * size**3 / min(seconds)


def accelerator_rates(device, flops_per_second: float, compute_dtype: str) -> dict:
    """What a device reaches and, where its peak is known, its share of that (MFU: PaLM, arXiv 2204.02311, app. B)."""
    from msllm.runtime.hardware import lookup

    rates, hardware = (
        {"tflop_per_second_per_device": round(flops_per_second / 1e12, 2)},
        lookup(device.device_kind),
    )
    if hardware and compute_dtype == "bfloat16":
        rates["mfu"] = round(flops_per_second / hardware.flops, 4)
    return rates


def train_case(case: dict) -> list[dict]:
    """Measures one case in this process, which should be a new one."""
    gc.disable()  # until the step is compiled, as the command `msllm train` starts
    import jax
    import numpy as np

    from msllm.config import Config, DataConfig, LossConfig, ModelConfig, StreamsConfig
    from msllm.metrics import memory_mib
    from msllm.runtime.compiler import compile_step
    from msllm.runtime.flops import train_flops
    from msllm.sharding import make_mesh
    from msllm.step import Program
    from msllm.streams import StreamSpec

    batch, rows, size = case["batch"], case["rows"], case["streams"]
    config = Config(
        model=ModelConfig(**{name: case[name] for name in SHAPE}),
        streams=StreamsConfig(names=tuple(f"s{i}" for i in range(size)), kinds=("output",) * size),
        data=DataConfig(rows=rows, batch_size=batch),
        loss=LossConfig(chunk_tokens=case["chunk_tokens"]),
    )
    streams = StreamSpec.from_config(config.streams)
    program = Program(config, streams, make_mesh(config.mesh))
    tokens = (
        np.random.default_rng(0)
        .integers(0, case["vocab_size"], (batch, rows, size))
        .astype(np.int32)
    )
    arrays = {
        "tokens": tokens,
        "present": np.ones(tokens.shape, bool),
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
    other = _torch_trainer(config.model, state.parameters, tokens) if case["torch"] else None
    own_times, other_times, differences = [], [], []
    for _ in range(case["steps"]):
        (state, metrics), *times = timed(lambda: jax.block_until_ready(step(state, tables)))
        own_times.append(times)
        if other:
            (loss, norm), *times = timed(other.step)
            other_times.append(times)
            differences.append(
                (abs(loss - metrics["loss"]), abs(norm / metrics["gradient_norm"] - 1))
            )
    seconds, wall = (statistics.median(x) for x in zip(*own_times))
    flops = train_flops(config.model, streams, batch, rows)
    if device.platform == "cpu":
        matmul = matmul_flops_per_cpu_second()
        reached = {
            "useful_gflop_per_cpu_second": round(flops / seconds / 1e9, 1),
            "matmul_gflop_per_cpu_second": round(matmul / 1e9, 1),
            "share_of_matmul": round(flops / seconds / matmul, 3),
        }
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
        other_seconds, other_wall = (statistics.median(x) for x in zip(*other_times))
        line |= {
            "torch_cpu_seconds_per_step": round(other_seconds, 4),
            "torch_wall_seconds_per_step": round(other_wall, 4),
            "torch_tokens_per_cpu_second": round(batch * rows * size / other_seconds, 1),
            "torch_time_to_ours_cpu": round(other_seconds / seconds, 3),
            "torch_time_to_ours_wall": round(other_wall / wall, 3),
            # Of the first step that both take from the same parameters.
            "torch_loss_difference": float(f"{differences[0][0]:.2g}"),
            "torch_gradient_norm_relative_difference": float(f"{differences[0][1]:.2g}"),
        }
    return [line]


def _torch_trainer(model, parameters, tokens):
    from msllm.bench import torch_reference as bench_torch

    return bench_torch.Trainer(bench_torch.Model(model, tokens.shape[2], parameters), tokens)


def measure(benchmark: str, case: dict) -> None:
    """Runs one case in this process and prints its lines."""
    # Only what is measured is imported: the time to the first step begins with the process.
    module = (
        sys.modules[__name__]
        if benchmark == "train"
        else importlib.import_module(f"msllm.bench.{benchmark}")
    )
    for result in getattr(module, f"{benchmark}_case")(case):
        print(json.dumps(result), flush=True)


def _cases(benchmark: str) -> list[dict]:
    def given(name):
        return flags.FLAGS[name].value if flags.FLAGS[name].present else None

    def value(name):
        return given(name) or DEFAULTS.get(benchmark, {}).get(name, flags.FLAGS[name].value)

    common = {name: value(name) for name in CASES[benchmark]}
    if benchmark == "prepare":
        sizes = flags.FLAGS.size_mb
        if not all(x.isdigit() and int(x) > 0 for x in sizes):
            raise UserError(f"--size_mb is {sizes}: must be positive numbers, one a case")
        return [{"size_mb": int(size), **common} for size in sizes]
    if benchmark == "loader":
        return [{"rows": 512, "batch": 32, "streams": size, **common} for size in (1, 3, 10)]
    rows, batches = value("rows"), value("batch")
    if len(rows) != len(batches) or not all(x.isdigit() and int(x) > 0 for x in rows + batches):
        rule = "both need as many positive numbers as there are cases"
        raise UserError(f"--rows is {rows} and --batch is {batches}: {rule}")
    cases = [{"rows": int(t), "batch": int(b), **common} for t, b in zip(rows, batches)]
    if benchmark != "decode":
        return cases
    dtypes = common["cache_dtype"]
    if not dtypes or not set(dtypes) <= set(CACHES):
        raise UserError(f"--cache_dtype is {dtypes}: must be some of {', '.join(CACHES)}")
    return [{**case, "cache_dtype": dtype} for case in cases for dtype in dtypes]


def _check_torch(case: dict) -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--torch: {' and '.join(missing)} not installed: pip install {' '.join(missing)}"
        )
    if case["compute_dtype"] != "float32":
        raise UserError(f"--compute_dtype is {case['compute_dtype']}: must be float32 with --torch")


def main(argv: Sequence[str]) -> None:
    """Runs each case in a process of its own, with the settings of launch/env.sh."""
    if len(argv) != 2 or argv[1] not in CASES:
        raise UserError(f"what to measure is {argv[1:]}: must be one of {', '.join(CASES)}")
    cases = _cases(argv[1])
    if cases[0].get("torch"):
        _check_torch(cases[0])
    for case in cases:
        # Of torch: its threads do not spin while ours work.
        tunables = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
        environment = {"GLIBC_TUNABLES": tunables, "OMP_WAIT_POLICY": "passive", **os.environ}
        code = "import json, sys; from msllm.bench.main import measure; measure(sys.argv[1], json.loads(sys.argv[2]))"
        done = subprocess.run(
            [sys.executable, "-c", code, argv[1], json.dumps(case)], env=environment
        )
        if done.returncode:
            raise UserError(f"the case {case} ended with status {done.returncode}: see above")


if __name__ == "__main__":
    run(main, positional=1)
