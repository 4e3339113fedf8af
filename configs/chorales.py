"""Bach's chorales, four voices in four streams, each a row behind the one above it.

    python -m msllm.prepare --config=configs/chorales.py
    python -m msllm.train --config=configs/chorales.py --workdir=runs/chorales

Data: data/jsb_chorales/Jsb16thSeparated.json in the folder named by MSLLM_SHARED, else in the folder `shared` beside the
repository; the official split, quarter notes (every fourth row), training songs in all keys. Shows what delays are worth
where streams depend on each other within a row: with --config.streams.delays="(0,0,0,0)" the voices of a frame are
independent given the frames before it. docs/results.md has the figures and how the test set is scored.
"""

import os
import pathlib

from msllm.config import default_config


def get_config():
    """All settings of the run."""
    config = default_config()
    config.steps = 2000
    config.log_every = 50
    config.eval_every = 100

    config.streams.names = ("soprano", "alto", "tenor", "bass")
    config.streams.kinds = ("output",) * 4
    config.streams.visibility = "same_row"
    config.streams.delays = (0, 1, 2, 3)

    shared = pathlib.Path(os.environ.get("MSLLM_SHARED") or pathlib.Path(__file__).resolve().parents[2] / "shared")
    config.data.dir = "data/chorales"
    config.data.converter = "aligned"
    config.data.path = config.data.eval_path = str(shared / "data/jsb_chorales/Jsb16thSeparated.json")
    config.data.format = "msllm.data.corpora:quarter_chorales_train_transposed"
    config.data.eval_format = "msllm.data.corpora:quarter_chorales_valid"
    config.data.vary.lead = (1,)  # a silent row first, so that the first frame is predicted too
    config.data.tokenizer.model_type = "word"
    config.data.tokenizer.vocab_size = 64
    config.data.rows = 168
    config.data.batch_size = 16

    config.model.d_model = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 32
    config.model.d_ff = 384
    config.model.rope_theta = 1e4

    config.optim.lr = 2e-3
    return config
