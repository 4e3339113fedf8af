"""What the studies of threads share: the settings of the model, and running it freely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from msllm.config import default_config
from msllm.data.tables import Table
from msllm.decode.engine import FREE, generate
from msllm.mail import is_mailed
from msllm.weights.load import LoadedModel

# The settings of all small forms.
SMALL: Mapping[str, Any] = {
    "steps": 2,
    "data.batch_size": 4,
    "data.eval_percent": 10.0,
    "model.num_layers": 1,
    "log_every": 1,
}


def get_config():
    """Returns the settings that the studies share."""
    config = default_config()
    config.log_every = 20
    config.eval_every = 0

    config.data.tokenizer.model_type = "word"
    config.data.tokenizer.vocab_size = 512  # at most
    config.data.batch_size = 64
    config.data.eval_percent = 2.0

    config.model.d_model = 128
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 32
    config.model.d_ff = 384
    config.model.rope_theta = 1e4
    config.model.remat = "none"

    config.optim.lr = 1e-3
    config.optim.b2 = 0.99
    config.optim.weight_decay = 0.01
    config.optim.warmup_steps = 30
    config.checkpoint.every = 0
    return config


def get_narrow_config():
    """Returns the same settings with half the width."""
    config = get_config()
    config.model.d_model = 64
    config.model.num_heads = 2
    config.model.num_kv_heads = 2
    config.model.d_ff = 192
    config.optim.lr = 2e-3
    return config


def word_ids(model: LoadedModel, words: Sequence[str]) -> dict[str, int]:
    """The token of each word."""
    tokenizer = model.require_tokenizer()
    return {word: tokenizer.encode_word(word)[0] for word in words}


def run_freely(model: LoadedModel, tables: Sequence[Table]) -> np.ndarray:
    """What the model says if it is given the inputs of tables, and nothing else.

    Mail comes from what the model says. All tables must have as many rows.

    Returns: [N, T, S] int32.
    """
    cells = np.stack([table.tokens for table in tables])
    streams = model.streams
    given = np.array([kind == "input" for kind in streams.kinds]) & ~is_mailed(
        streams.mail, cells.shape[1], streams.size
    )
    given[0] |= ~is_mailed(streams.mail, 1, streams.size)[0]  # nothing predicts the first row
    forced = np.where(given, cells, FREE)
    return np.asarray(generate(model, cells.shape[1], forced=forced, batch=len(cells)).shown)
