"""Qwen3-1.7B with 8 streams on one node of 8 H100.

    msllm train --config=configs/1b_h100_8.py --config.data.dir=DATA --workdir=WORKDIR

Tokens per step: 32 tables x 1,024 rows x 8 streams = 262,144, 32,768 per GPU.
Expected memory: parameters and optimizer take 2.4 GiB per GPU. The rest has not been measured on
such a node.
Budget: none, because compiling for a GPU requires one.
Mesh: fsdp only, because all GPUs of a node are connected at the same speed. A GPU holds all streams
of its tables, so no keys and values are transferred.
"""

from msllm.config import default_config
from msllm.presets import POD, QWEN3


def get_config():
    """Returns all settings of the run."""
    config = default_config()
    config.update(POD)
    config.model.update(QWEN3["1.7b"])
    config.model.remat = "dots"
    config.data.batch_size = 32
    config.loss.vocab_chunks = 1
    config.mesh.update(data=1, fsdp=8, stream=1)
    return config
