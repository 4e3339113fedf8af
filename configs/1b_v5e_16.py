"""Qwen3-1.7B with 8 streams on 16 chips of TPU v5e (v5e-16).

    msllm train --config=configs/1b_v5e_16.py --config.data.dir=DATA --workdir=WORKDIR

Topology: v5e:4x4. Tokens per step: 16 tables x 1,024 rows x 8 streams = 131,072, 8,192 a chip.
Expected memory: 3.4 GiB a chip at the peak, of 15.75 (compiled, not run; 1b_v5e_16.budget.json,
launch/check_budgets.sh).
Mesh: a chip holds 2 of the 8 streams of 4 tables: stream 4 is one physical axis of the torus, fsdp 4 the other.
Weights are gathered, and their gradients scattered, along one axis at a time; keys and values travel along `stream`
only. Longer tables need such a mesh; at this length, fsdp 16 and stream 1 moves half as many bytes
(docs/benchmarks.md).
"""

from msllm.config import default_config
from msllm.presets import QWEN3


def get_config():
    config = default_config()
    config.steps = 100000
    config.model.update(QWEN3["1.7b"])
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.streams.names = (
        "system",
        "user",
        "tool",
        "observer",
        "thought",
        "plan",
        "output",
        "action",
    )
    config.streams.kinds = ("input",) * 4 + ("thought",) * 2 + ("output",) * 2
    config.data.rows = 1024
    config.data.batch_size = 16
    config.loss.vocab_chunks = 8
    config.loss.chunk_tokens = 8192
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 2000
    config.mesh.data, config.mesh.fsdp, config.mesh.stream = 1, 4, 4
    return config
