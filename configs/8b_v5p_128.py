"""Qwen3-8B with 8 streams on 64 chips of TPU v5p (v5p-128: Cloud counts cores).

    msllm train --config=configs/8b_v5p_128.py --config.data.dir=DATA --workdir=WORKDIR

Topology: v5p:4x4x4. Tokens per step: 128 tables x 1,024 rows x 8 streams = 1,048,576, 16,384 a chip.
Expected memory: 51.5 GiB a chip at the peak, of 95.7 (compiled, not run; 8b_v5p_128.budget.json,
launch/check_budgets.sh).
Mesh: a chip has room for whole tables, so no keys and values travel, and the head is computed for the streams with
loss weight only. fsdp 64 is gathered along one physical axis of the torus, then along the other two. The memory lets
remat keep the results of products, which saves a fifth of the FLOPs.
"""

from msllm.config import default_config
from msllm.presets import QWEN3


def get_config():
    config = default_config()
    config.steps = 100000
    config.model.update(QWEN3["8b"])
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
    config.data.batch_size = 128
    config.loss.vocab_chunks = 16
    config.loss.chunk_tokens = 8192
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 2000
    config.mesh.data, config.mesh.fsdp, config.mesh.stream = 1, 64, 1
    return config
