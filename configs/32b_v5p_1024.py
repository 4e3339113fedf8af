"""Qwen3-32B with 8 streams on 1,024 chips of TPU v5p.

    python -m msllm.train --config=configs/32b_v5p_1024.py --config.data.dir=DATA --workdir=WORKDIR

Topology: v5p:8x8x16. Tokens per step: 1,024 tables x 1,024 rows x 8 streams = 8,388,608, 8,192 a chip.
Expected memory: see 32b_v5p_1024.budget.json, which continuous integration checks.
Mesh: a chip holds one stream; stream 8 is one physical axis of the torus, fsdp 128 the other two.
"""

from msllm.config import default_config
from msllm.shapes import QWEN3


def get_config():
    config = default_config()
    config.steps = 100000
    config.model.update(QWEN3["32b"])
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.streams.names = ("system", "user", "tool", "observer", "thought", "plan", "output", "action")
    config.streams.kinds = ("input",) * 4 + ("thought",) * 2 + ("output",) * 2
    config.data.rows = 1024
    config.data.batch_size = 1024
    config.loss.vocab_chunks = 16
    config.loss.chunk_tokens = 8192
    config.optim.lr = 1.5e-4
    config.optim.warmup_steps = 2000
    config.mesh.data, config.mesh.fsdp, config.mesh.stream = 16, 64, 1
    return config
