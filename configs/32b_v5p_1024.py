"""Qwen3-32B with 8 streams on 1,024 chips of TPU v5p.

    msllm train --config=configs/32b_v5p_1024.py --config.data.dir=DATA --workdir=WORKDIR

Topology: v5p:8x8x16. Tokens per step: 1,024 tables x 1,024 rows x 8 streams = 8,388,608, 8,192 a chip.
Expected memory: 16.9 GiB a chip at the peak, of 95.7 (compiled, not run; 32b_v5p_1024.budget.json,
launch/check_budgets.sh).
Mesh: data 16 and both factors of fsdp, 8 and 8, are one physical axis of the torus each. Over all 1,024 chips each
would hold 5 rows of a weight, too few for XLA to scatter; 80 of 5,120 rows make 5.7 GiB of state, and there is room. A
chip holds whole tables, so no keys and values travel; over `data` scattered gradients are summed once a step.
"""

from msllm.config import default_config
from msllm.presets import QWEN3


def get_config():
    config = default_config()
    config.steps = 100000
    config.model.update(QWEN3["32b"])
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
    config.data.batch_size = 1024
    config.loss.vocab_chunks = 16
    config.loss.chunk_tokens = 8192
    config.optim.lr = 1.5e-4
    config.optim.warmup_steps = 2000
    config.mesh.data, config.mesh.fsdp, config.mesh.stream = 16, 64, 1
    return config
