"""Qwen3-8B with 8 streams on 64 chips of TPU v5p (v5p-128: Cloud counts cores).

    python -m msllm.train --config=configs/8b_v5p_128.py --config.data.dir=DATA --workdir=WORKDIR

Topology: v5p:4x4x4. Tokens per step: 256 tables x 1,024 rows x 8 streams = 2,097,152, 32,768 a chip.
Expected memory: see 8b_v5p_128.budget.json, which continuous integration checks.
Mesh: stream 4 is one physical axis of the torus, fsdp 16 the other two. Each chip holds 2 of the 8 streams.
"""

from msllm.config import default_config
from msllm.shapes import QWEN3


def get_config():
    config = default_config()
    config.steps = 100000
    config.model.update(QWEN3["8b"])
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "dots"
    config.streams.names = ("system", "user", "tool", "observer", "thought", "plan", "output", "action")
    config.streams.kinds = ("input",) * 4 + ("thought",) * 2 + ("output",) * 2
    config.data.rows = 1024
    config.data.batch_size = 128
    config.loss.vocab_chunks = 16
    config.loss.chunk_tokens = 8192
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 2000
    config.mesh.data, config.mesh.fsdp, config.mesh.stream = 1, 64, 1
    return config
