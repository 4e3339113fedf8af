"""Qwen3-8B with 8 streams on 256 chips of TPU v5e (v5e-256).

    msllm train --config=configs/8b_v5e_256.py --config.data.dir=DATA --workdir=WORKDIR

Topology: v5e:16x16.
Tokens per step: 256 tables x 1,024 rows x 8 streams = 2,097,152, 8,192 per chip.
Expected memory: 4.3 of 15.75 GiB per chip at the peak. The program was compiled, not run:
configs/budgets/8b_v5e_256.json holds the figures and launch/check_budgets.sh checks them.
Mesh: a chip holds one stream of 8 tables. The mesh axis stream (8) and a factor of 2 of fsdp lie
along one physical axis of the torus, and the remaining factor of 16 of fsdp along the other, so
every weight gradient is a reduce-scatter. Longer tables need such a mesh. At this length, fsdp 256
and stream 1 transfers little more than half as many bytes (docs/benchmarks.md).
"""

from msllm.config import default_config
from msllm.presets import POD, QWEN3


def get_config():
    """Returns all settings of the run."""
    config = default_config()
    config.update(POD)
    config.model.update(QWEN3["8b"])
    config.model.remat = "full"
    config.data.batch_size = 256
    config.loss.vocab_chunks = 16
    config.mesh.update(data=1, fsdp=32, stream=8)
    return config
