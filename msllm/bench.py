"""Benchmarks as JSON lines; `docs/benchmarks.md` keeps results.

    python -m msllm.bench train [--rows=102,512] [--batch=4,1] [--streams=10] [--steps=5] [--d_model=256 ...]

`train`: the train step (forward, backward, AdamW) on random tokens, each case in a new process. CPU-seconds are those of
the process (user + system), so that other work on the machine matters less than in wall time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from msllm.errors import UserError, run

flags.DEFINE_list("rows", ["102", "512"], "T of each case.")
flags.DEFINE_list("batch", ["4", "1"], "Tables of each case.")
flags.DEFINE_integer("streams", 10, "S.")
flags.DEFINE_integer("steps", 5, "Steps measured, after the first.")
flags.DEFINE_integer("vocab_size", 8192, "V.")
flags.DEFINE_integer("d_model", 256, "D.")
flags.DEFINE_integer("d_ff", 768, "F.")
flags.DEFINE_integer("num_layers", 4, "Layers.")
flags.DEFINE_integer("num_heads", 4, "N.")
flags.DEFINE_integer("num_kv_heads", 2, "K.")
flags.DEFINE_integer("head_dim", 64, "H.")
flags.DEFINE_enum("remat", "dots", ["none", "dots", "full"], "Remat policy.")
flags.DEFINE_integer("chunk_tokens", 1024, "Cells whose logits exist at one time.")

SHAPE = ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "head_dim", "remat")


def matmul_flops_per_cpu_second(size: int = 2048, repeats: int = 5) -> float:
    """This machine's rate for a float32 product [size, size] x [size, size], the best of `repeats`."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(lambda a, b: a @ b)
    a = jnp.ones((size, size), jnp.float32)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        product(a, a).block_until_ready()
        seconds.append(time.process_time() - begin)
    return 2 * size**3 / min(seconds)


def train_case(case: dict) -> dict:
    """Measures one case in this process, which should be a new one."""
    import jax
    import numpy as np

    from msllm.compiler import compile_step
    from msllm.config import Config, DataConfig, LossConfig, ModelConfig, StreamsConfig
    from msllm.flops import train_flops
    from msllm.metrics import memory_mib
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
    tokens = np.random.default_rng(0).integers(0, case["vocab_size"], (batch, rows, size)).astype(np.int32)
    arrays = {"tokens": tokens, "present": np.ones(tokens.shape, bool), "segment": np.ones((batch, rows), np.int32)}
    tables = {name: jax.device_put(arrays[name], x.sharding) for name, x in program.abstract_batch.items()}
    state = program.init()
    step = compile_step(program.step, state, tables)
    state, metrics = step(state, tables)
    jax.block_until_ready((state, metrics))
    start_to_first_step = time.process_time()
    cpu, wall = [], []
    for _ in range(case["steps"]):
        begin, begin_wall = time.process_time(), time.perf_counter()
        state, metrics = step(state, tables)
        jax.block_until_ready((state, metrics))
        cpu.append(time.process_time() - begin)
        wall.append(time.perf_counter() - begin_wall)
    peak_mib = memory_mib()
    matmul = matmul_flops_per_cpu_second()
    seconds = statistics.median(cpu)
    flops = train_flops(config.model, streams, batch, rows)
    return {
        "benchmark": "train",
        **case,
        "parameters": sum(x.size for x in jax.tree.leaves(program.abstract_state.parameters)),
        "tokens_per_step": batch * rows * size,
        "cpu_seconds_per_step": round(seconds, 4),
        "wall_seconds_per_step": round(statistics.median(wall), 4),
        "tokens_per_cpu_second": round(batch * rows * size / seconds, 1),
        "start_to_first_step_cpu_seconds": round(start_to_first_step, 2),
        "peak_memory_mib": round(peak_mib, 1),
        "useful_gflop_per_step": round(flops / 1e9, 1),
        "useful_gflop_per_cpu_second": round(flops / seconds / 1e9, 1),
        "matmul_gflop_per_cpu_second": round(matmul / 1e9, 1),
        "share_of_matmul": round(flops / seconds / matmul, 3),
        "loss": round(float(metrics["loss"]), 4),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def _cases() -> list[dict]:
    rows, batches = flags.FLAGS.rows, flags.FLAGS.batch
    if len(rows) != len(batches) or not all(x.isdigit() and int(x) > 0 for x in rows + batches):
        raise UserError(f"--rows is {rows} and --batch is {batches}: both need as many positive numbers as there are cases")
    common = {name: flags.FLAGS[name].value for name in (*SHAPE, "streams", "steps", "chunk_tokens")}
    return [{"rows": int(t), "batch": int(b), **common} for t, b in zip(rows, batches)]


def main(argv: Sequence[str]) -> None:
    """Runs each case in a process of its own, with the settings of launch/env.sh."""
    if argv[1:] != ["train"]:
        raise UserError(f"what to measure is {argv[1:]}: must be train")
    for case in _cases():
        environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ}
        code = "import json, sys; from msllm.bench import train_case; print(json.dumps(train_case(json.loads(sys.argv[1]))))"
        done = subprocess.run([sys.executable, "-c", code, json.dumps(case)], env=environment, stdout=subprocess.PIPE)
        if done.returncode:
            raise UserError(f"the case {case} ended with status {done.returncode}: see above")
        print(done.stdout.decode().strip(), flush=True)


if __name__ == "__main__":
    run(main, positional=1)
