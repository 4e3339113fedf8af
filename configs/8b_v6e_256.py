"""Qwen3-8B with 8 streams on 256 chips of TPU v6e (v6e-256).

    msllm train --config=configs/8b_v6e_256.py --config.data.dir=DATA --workdir=WORKDIR

Topology: v6e:16x16.
Tokens per step: 512 tables x 1,024 rows x 8 streams = 4,194,304, 16,384 per chip.
Expected memory: 8.1 of 31.2 GiB per chip at the peak. The program was compiled, not run:
configs/budgets/8b_v6e_256.json holds the figures and launch/check_budgets.sh checks them.
Mesh: a chip holds all streams of its tables, so no keys and values are transferred. Weights are
gathered over fsdp (256) along one physical axis of the torus, then along the other. A v6e computes
4.7 times as fast as a v5e, but its network is only twice as fast, so there are more tokens per chip
for each gathered weight.
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
    config.mesh.update(data=1, fsdp=256, stream=1)
    return config
