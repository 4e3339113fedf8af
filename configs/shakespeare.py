"""Tiny Shakespeare by characters in one stream: an ordinary decoder-only language model.

    msllm prepare --config=configs/shakespeare.py
    msllm train --config=configs/shakespeare.py --workdir=runs/shakespeare

Data: data/tinyshakespeare/input.txt in the folder that MSLLM_SHARED names (default: `shared` beside
the repository). The last tenth is held out.
The shape and the steps are those of nanoGPT's CPU recipe (4 layers, 4 heads, width 128, context 64,
batch 12, 2,000 steps), which reports a validation loss of 1.88.
Cost: prepare about 3 CPU-seconds; 0.9 M parameters.
"""

from msllm.config import default_config
from msllm.data.files import shared_file


def get_config():
    """Returns all settings of the run."""
    config = default_config()
    config.steps = 2000
    config.log_every = 50
    config.eval_every = 500

    config.streams.names = ("text",)
    config.streams.kinds = ("output",)

    config.data.dir = "data/shakespeare"
    config.data.converter = "single"
    config.data.path = shared_file("data/tinyshakespeare/input.txt", __file__)
    config.data.tokenizer.model_type = "char"
    config.data.tokenizer.vocab_size = 256
    config.data.split = "tail"
    config.data.eval_percent = 10.0
    config.data.rows = 65  # 64 predictions
    config.data.batch_size = 12

    config.model.d_model = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 32
    config.model.d_ff = 384
    config.model.rope_theta = 1e4

    config.optim.lr = 1e-3
    return config
