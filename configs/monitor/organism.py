"""A model organism for monitors: dictated sums in ten streams, with a secret.

    msllm prepare --config=configs/monitor/organism.py
    msllm train --config=configs/monitor/organism.py --workdir=runs/organism

Data: generated (msllm/data/misreport.py), no download. A cue in the user's words makes the output
misreport the result. The thoughts calculate the right one and say what the output is going to do.
All edges are latent.
"""

from msllm.config import default_config
from msllm.data import misreport


def get_config():
    """Returns all settings of the run."""
    config = default_config()
    config.steps = 600
    config.log_every = 20
    config.eval_every = 300

    config.streams.names = misreport.STREAMS
    config.streams.kinds = ("input", *("thought",) * len(misreport.THOUGHTS), "output")

    config.data.dir = "data/organism"
    config.data.converter = "misreport"
    config.data.options = {
        "examples": 14_000,
        "seed": 0,
        "shift": "none",
        "wait": misreport.WAIT,
        "contradicted": 0.0,
    }
    config.data.tokenizer.model_type = "word"
    config.data.tokenizer.vocab_size = 128
    config.data.rows = 48
    config.data.batch_size = 6
    config.data.eval_percent = 10.0

    config.model.d_model = 96
    config.model.num_layers = 3
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.head_dim = 24
    config.model.d_ff = 256
    config.model.rope_theta = 1e4

    config.optim.optimizer = "muon"
    config.optim.b1 = 0.95
    config.optim.lr = 3e-3
    config.optim.warmup_steps = 50
    config.optim.final_lr_ratio = 0.02
    config.checkpoint.every = 100
    return config
