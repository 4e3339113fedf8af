"""Qwen3-8B with 8 streams on 256 chips of TPU v6e (v6e-256).

    msllm train --config=configs/8b_v6e_256.py --config.data.dir=DATA --workdir=WORKDIR

Topology: v6e:16x16. Tokens per step: 512 tables x 1,024 rows x 8 streams = 4,194,304, 16,384 a chip.
Expected memory: 8.1 GiB a chip at the peak, of 31.2 (compiled, not run; 8b_v6e_256.budget.json,
launch/check_budgets.sh).
Mesh: a chip holds whole tables, so no keys and values travel; fsdp 256 is gathered along one physical axis of the
torus, then along the other. A v6e computes 4.7 times as fast as a v5e, and its network is only twice as fast: so more
tokens share each gathered weight, and nothing else is sent.
"""

from msllm.config import default_config
from msllm.presets import QWEN3


def get_config():
    config = default_config()
    config.steps = 100000
    config.model.update(QWEN3["8b"])
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
    config.data.batch_size = 512
    config.loss.vocab_chunks = 16
    config.loss.chunk_tokens = 8192
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 2000
    config.mesh.data, config.mesh.fsdp, config.mesh.stream = 1, 256, 1
    return config
