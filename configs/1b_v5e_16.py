"""Qwen3-1.7B with 8 streams on 16 chips of TPU v5e (v5e-16).

    msllm train --config=configs/1b_v5e_16.py --config.data.dir=DATA --workdir=WORKDIR

Topology: v5e:4x4.
Tokens per step: 16 tables x 1,024 rows x 8 streams = 131,072, 8,192 per chip.
Expected memory: 3.4 of 15.75 GiB per chip at the peak. The program was compiled, not run:
configs/budgets/1b_v5e_16.json holds the figures and launch/check_budgets.sh checks them.
Mesh: a chip holds 2 of the 8 streams of 4 tables. The mesh axis stream (4) is one physical axis of
the torus and fsdp (4) is the other. Weights are gathered, and their gradients scattered, along one
axis at a time. Keys and values are transferred only along stream. Longer tables need such a mesh.
At this length, fsdp 16 and stream 1 transfers half as many bytes (docs/benchmarks.md).
"""

from msllm.config import default_config
from msllm.presets import POD, QWEN3


def get_config():
    """Returns all settings of the run."""
    config = default_config()
    config.update(POD)
    config.model.update(QWEN3["1.7b"])
    config.model.remat = "full"
    config.data.batch_size = 16
    config.loss.vocab_chunks = 8
    config.mesh.update(data=1, fsdp=4, stream=4)
    return config
