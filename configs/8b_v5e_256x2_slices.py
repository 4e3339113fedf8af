"""Qwen3-8B with 8 streams on two slices of 256 chips of TPU v5e.

    msllm train --config=configs/8b_v5e_256x2_slices.py --config.data.dir=DATA --workdir=WORKDIR

Topology: 2 slices of v5e:16x16.
Tokens per step: 512 tables x 1,024 rows x 8 streams = 4,194,304, 8,192 per chip.
Expected memory: 4.3 of 15.75 GiB per chip at the peak. The program was compiled, not run:
configs/budgets/8b_v5e_256x2_slices.json holds the figures and launch/check_budgets.sh checks them.
Mesh: each slice is laid out as in 8b_v5e_256.py, and the mesh axis data (2) spans the slices. Only
scattered gradients cross the data-centre network, once per step.
"""

from msllm.config import default_config
from msllm.presets import POD, QWEN3


def get_config():
    """Returns all settings of the run."""
    config = default_config()
    config.update(POD)
    config.model.update(QWEN3["8b"])
    config.model.remat = "full"
    config.data.batch_size = 512
    config.loss.vocab_chunks = 16
    config.mesh.update(data=2, fsdp=32, stream=8)
    return config
