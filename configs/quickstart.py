"""Dictated sums in three streams: the model works while the user speaks.

    msllm prepare --config=configs/quickstart.py
    msllm train --config=configs/quickstart.py --workdir=runs/quickstart

Data: generated (msllm/data/dictation.py), no download. An example is a conversation of one to three
questions, with silences before, between and inside them.
Shows that the answer begins two rows after the question mark, whenever the user asks, and even if
the user makes a correction. Compare with quickstart_single.py.
Cost: 0.6 M parameters, 3 CPU-minutes. Expect at least 99 % of the held-out answers to be correct.
Figures: docs/results.md.
"""

from msllm.config import default_config


def get_config():
    """Returns all settings of the run."""
    config = default_config()
    config.steps = 600
    config.log_every = 20
    config.eval_every = 300

    config.streams.names = ("user", "thought", "output")
    config.streams.kinds = ("input", "thought", "output")
    # Other cells do not see silent cells, so idle rows before a question make no difference.
    config.streams.skip_silence = True

    config.data.dir = "data/quickstart"
    config.data.converter = "dictation"
    config.data.options = {
        "examples": 12_000,
        "seed": 0,
        "questions": 3,  # the most in a conversation
        "silence": 80,  # the most silent rows in a conversation
    }
    config.data.tokenizer.model_type = "word"
    config.data.tokenizer.vocab_size = 256
    config.data.rows = 128
    config.data.batch_size = 4
    config.data.eval_percent = 4.0

    config.model.d_model = 128
    config.model.num_layers = 3
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.head_dim = 32
    config.model.d_ff = 384
    config.model.rope_theta = 1e4

    config.optim.optimizer = "muon"
    config.optim.b1 = 0.95
    config.optim.lr = 3e-3
    config.optim.warmup_steps = 50
    config.optim.final_lr_ratio = 0.02
    config.checkpoint.every = 300
    return config
