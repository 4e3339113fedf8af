"""Qwen3-8B with 8 streams on 256 chips of TPU v5e (v5e-256).

    msllm train --config=configs/8b_v5e_256.py --config.data.dir=DATA --workdir=WORKDIR

Topology: v5e:16x16. Tokens per step: 256 tables x 1,024 rows x 8 streams = 2,097,152, 8,192 a chip.
Expected memory: 4.3 GiB a chip at the peak, of 15.75 (compiled, not run; 8b_v5e_256.budget.json,
launch/check_budgets.sh).
Mesh: a chip holds one stream of 8 tables: stream 8 and a factor 2 of fsdp lie along one physical axis of the torus,
the other 16 of fsdp along the other, so that every weight's gradient is a reduce-scatter. Longer tables need such a
mesh; at this length, fsdp 256 and stream 1 moves little more than half as many bytes (docs/benchmarks.md).
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
    config.data.batch_size = 256
    config.loss.vocab_chunks = 16
    config.loss.chunk_tokens = 8192
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 2000
    config.mesh.data, config.mesh.fsdp, config.mesh.stream = 1, 32, 8
    return config
