"""Qwen3-8B with 8 streams on 256 chips of TPU v6e (v6e-256).

    python -m msllm.train --config=configs/8b_v6e_256.py --config.data.dir=DATA --workdir=WORKDIR

Topology: v6e:16x16. Tokens per step: 512 tables x 1,024 rows x 8 streams = 4,194,304, 16,384 a chip: a v6e computes
4.7 times as fast as a v5e, and its network is only twice as fast, so more tokens must share each gathered weight.
Expected memory: see 8b_v6e_256.budget.json, which continuous integration checks.
Mesh: as 8b_v5e_256.
"""

from msllm.config import default_config
from msllm.shapes import QWEN3


def get_config():
    config = default_config()
    config.steps = 100000
    config.model.update(QWEN3["8b"])
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.streams.names = ("system", "user", "tool", "observer", "thought", "plan", "output", "action")
    config.streams.kinds = ("input",) * 4 + ("thought",) * 2 + ("output",) * 2
    config.data.rows = 1024
    config.data.batch_size = 512
    config.loss.vocab_chunks = 16
    config.loss.chunk_tokens = 8192
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 2000
    config.mesh.data, config.mesh.fsdp, config.mesh.stream = 1, 256, 1
    return config
