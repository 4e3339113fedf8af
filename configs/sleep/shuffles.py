"""Shuffled cards in three streams: the thought works while the user is silent.

    msllm prepare --config=configs/sleep/shuffles.py
    msllm train --config=configs/sleep/shuffles.py --workdir=runs/shuffles

Data: generated (msllm/data/shuffles.py), no download. The user tells how cards are shuffled, says
which cards the questions may be about, and asks after up to 16 silent rows.
Shows that an answer comes sooner if the thought could work it out before the question.
configs/sleep/study.py measures that.
"""

from msllm.config import default_config


def get_config():
    """Returns all settings of the run."""
    config = default_config()
    config.steps = 1_500
    config.log_every = 20
    config.eval_every = 400

    config.streams.names = ("user", "thought", "output")
    config.streams.kinds = ("input", "thought", "output")
    # Other cells do not see silent cells, so that it makes little difference how long it is silent.
    config.streams.skip_silence = True

    config.data.dir = "data/shuffles"
    config.data.converter = "shuffles"
    config.data.options = {
        "examples": 16_000,
        "seed": 0,
        "cards": 16,
        # Told by the user. Examples with a single move teach the model early to read it.
        "moves": (1, 2),
        "steps": 7,  # made, in turn
        "choices": (1, 4, 16),  # the numbers of cards that the questions may be about
        "silence": 16,  # the most silent rows before the first question
        "questions": 3,  # the most in an example
        # Whether to go on with a card or to drop it is decided in one row of each question.
        "emphasis": 8.0,
    }
    config.data.tokenizer.model_type = "word"
    config.data.tokenizer.vocab_size = 256
    config.data.rows = 256
    config.data.batch_size = 2
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
    config.checkpoint.every = 400
    return config
