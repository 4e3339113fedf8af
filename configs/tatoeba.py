"""Simultaneous translation, English to Swedish: the translation starts k words behind the sentence (wait-k).

    python -m msllm.prepare --config=configs/tatoeba.py
    python -m msllm.train --config=configs/tatoeba.py --workdir=runs/tatoeba
    python -m msllm.prepare --config=configs/tatoeba.py:3
    python -m msllm.likelihood --checkpoint=runs/tatoeba --best --data=data/tatoeba_3

Data: data/translation_tatoeba/eng-swe.txt in the folder named by MSLLM_SHARED, else in the folder `shared` beside the
repository. One model for all k, of which every example draws one; the word after the colon gives all examples the same
k (-1: when the sentence has ended), to measure what reading further ahead is worth. Wait-k: Ma et al. 2019, arXiv
1810.08398. Cost: 1.2 M parameters, about 25 CPU-minutes. Figures: docs/results.md.
"""

import os
import pathlib

from msllm.config import default_config

WAITS = [1, 3, 5, 7, -1]


def get_config(k=""):
    """All settings of the run."""
    config = default_config()
    config.steps = 4000
    config.log_every = 50
    config.eval_every = 500

    config.streams.names = ("user", "output")
    config.streams.kinds = ("input", "output")

    shared = pathlib.Path(os.environ.get("MSLLM_SHARED") or pathlib.Path(__file__).resolve().parents[2] / "shared")
    config.data.dir = f"data/tatoeba_{k}" if k else "data/tatoeba"
    config.data.converter = "wait_k"
    config.data.path = str(shared / "data/translation_tatoeba/eng-swe.txt")
    config.data.format = "msllm.data.corpora:tatoeba"
    config.data.options = {"k": int(k) if k else WAITS, "unit": "word"}
    config.data.tokenizer.path = "data/tatoeba/tokenizer.model" if k else ""
    config.data.tokenizer.vocab_size = 4096
    config.data.rows = 128
    config.data.batch_size = 8
    config.data.eval_percent = 8.0

    config.model.d_model = 128
    config.model.num_layers = 3
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 32
    config.model.d_ff = 384
    config.model.rope_theta = 1e4

    config.optim.lr = 2e-3
    return config
