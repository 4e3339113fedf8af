"""Qwen3-32B with 8 streams on 1,024 chips of TPU v5p.

    msllm train --config=configs/32b_v5p_1024.py --config.data.dir=DATA --workdir=WORKDIR

Topology: v5p:8x8x16.
Tokens per step: 1,024 tables x 1,024 rows x 8 streams = 8,388,608, 8,192 per chip.
Expected memory: 16.9 of 95.7 GiB per chip at the peak. The program was compiled, not run:
configs/budgets/32b_v5p_1024.json holds the figures and launch/check_budgets.sh checks them.
Mesh: data (16) and the two factors of fsdp (8 and 8) are one physical axis of the torus each. With
fsdp over all 1,024 chips each chip would hold 5 rows of a weight, too few for XLA to scatter. With
fsdp 64 it holds 80 of 5,120 rows, and 5.7 GiB of state, which fits. A chip holds all streams of its
tables, so no keys and values are transferred. Scattered gradients are summed over data once per
step.
"""

from msllm.config import default_config
from msllm.presets import POD, QWEN3


def get_config():
    """Returns all settings of the run."""
    config = default_config()
    config.update(POD)
    config.model.update(QWEN3["32b"])
    config.model.remat = "full"
    config.data.batch_size = 1024
    config.loss.vocab_chunks = 16
    config.optim.lr = 1.5e-4
    config.mesh.update(data=16, fsdp=64, stream=1)
    return config
