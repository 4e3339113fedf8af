"""Qwen3-1.7B with 8 streams on one node of 8 H100.

    msllm train --config=configs/1b_h100_8.py --config.data.dir=DATA --workdir=WORKDIR

Tokens per step: 32 tables x 1,024 rows x 8 streams = 262,144, 32,768 a card.
Expected memory: parameters and optimizer 2.4 GiB a card; the rest has not been measured on such a node.
No budget: there is no compiler for GPUs that runs without one.
No budget: there is no compiler for GPUs that runs without one.
No budget: there is no compiler for GPUs that runs without one.
No budget: there is no compiler for GPUs that runs without one.
No budget: there is no compiler for GPUs that runs without one.
No budget: there is no compiler for GPUs that runs without one.
Mesh: fsdp only. Within a node every card reaches every other at the same speed, and one card holds all streams of its
tables, so no keys and values travel.
"""

from msllm.config import default_config
from msllm.presets import QWEN3


def get_config():
    config = default_config()
    config.steps = 100000
    config.model.update(QWEN3["1.7b"])
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "dots"
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
    config.data.batch_size = 32
    config.loss.vocab_chunks = 1
    config.loss.chunk_tokens = 8192
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 2000
    config.mesh.data, config.mesh.fsdp, config.mesh.stream = 1, 8, 1
    return config
