"""Qwen3-8B with 8 streams on two slices of 256 chips of TPU v5e.

    msllm train --config=configs/8b_v5e_256x2_slices.py --config.data.dir=DATA --workdir=WORKDIR

Topology: 2 slices of v5e:16x16. Tokens per step: 512 tables x 1,024 rows x 8 streams = 4,194,304, 8,192 a chip.
Expected memory: 4.3 GiB a chip at the peak, of 15.75 (compiled, not run; 8b_v5e_256x2_slices.budget.json,
launch/check_budgets.sh).
Mesh: within a slice as 8b_v5e_256; `data` 2 are the slices. Only gradients that are already scattered cross the data
centre's network, once a step.
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
    config.mesh.data, config.mesh.fsdp, config.mesh.stream = 2, 32, 8
    return config
