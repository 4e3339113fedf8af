"""Qwen3-8B with 8 streams on 64 chips of TPU v5p (v5p-128: Cloud TPU counts cores).

    msllm train --config=configs/8b_v5p_128.py --config.data.dir=DATA --workdir=WORKDIR

Topology: v5p:4x4x4.
Tokens per step: 128 tables x 1,024 rows x 8 streams = 1,048,576, 16,384 per chip.
Expected memory: 51.5 of 95.7 GiB per chip at the peak. The program was compiled, not run:
configs/budgets/8b_v5p_128.json holds the figures and launch/check_budgets.sh checks them.
Mesh: a chip holds all streams of its tables, so no keys and values are transferred, and the head is
computed only for streams with a loss weight. Weights are gathered over fsdp (64) along one physical
axis of the torus, then along the other two. The remat policy dots fits in memory: it saves the
outputs of matmuls, which saves a fifth of the FLOPs.
"""

from msllm.config import default_config
from msllm.presets import POD, QWEN3


def get_config():
    """Returns all settings of the run."""
    config = default_config()
    config.update(POD)
    config.model.update(QWEN3["8b"])
    config.model.remat = "dots"
    config.data.batch_size = 128
    config.loss.vocab_chunks = 16
    config.mesh.update(data=1, fsdp=64, stream=1)
    return config
