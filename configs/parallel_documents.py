"""Tiny Shakespeare in 1, 2, 4 or 8 streams that do not see each other.

    msllm prepare --config=configs/parallel_documents.py:4
    msllm train --config=configs/parallel_documents.py:4 --workdir=runs/parallel_4
    msllm likelihood --checkpoint=runs/parallel_4

Data: data/tinyshakespeare/input.txt in the folder that MSLLM_SHARED names (default: `shared` beside
the repository). The last tenth is held out.
Shows that independent streams hardly change the loss. The number after the colon is the number of
streams; every step has the same number of tokens.
Cost: 0.9 M parameters, about 4 CPU-minutes. Figures: docs/results.md.
"""

from msllm.config import default_config
from msllm.data.files import shared_file

TABLES = 16  # per step, with one stream


def get_config(streams="4"):
    """Returns all settings of the run."""
    size = int(streams)
    config = default_config()
    config.steps = 1000
    config.log_every = 50
    config.eval_every = 500

    config.streams.names = tuple(f"text{s}" for s in range(size))
    config.streams.kinds = ("output",) * size
    config.streams.visibility = "isolated"

    config.data.dir = f"data/parallel_{size}"
    config.data.converter = "parallel_documents"
    config.data.options = {"shuffle": 1024}  # makes a batch as varied as one with single streams
    config.data.path = shared_file("data/tinyshakespeare/input.txt", __file__)
    config.data.tokenizer.model_type = "char"
    config.data.tokenizer.vocab_size = 256
    config.data.split = "tail"
    config.data.eval_percent = 10.0
    config.data.rows = 65  # 64 predictions
    config.data.batch_size = TABLES // size

    config.model.stream_embedding = False  # all streams are treated alike
    config.model.d_model = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 32
    config.model.d_ff = 384
    config.model.rope_theta = 1e4

    config.optim.lr = 1e-3
    return config
