"""Simultaneous translation, English to Swedish, k words behind the sentence (wait-k).

    for k in 1 3 5 7 -1; do msllm prepare --config=configs/tatoeba.py:$k; done
    msllm train --config=configs/tatoeba.py --workdir=runs/tatoeba
    msllm likelihood --checkpoint=runs/tatoeba --best --data=data/tatoeba_3

Data: data/translation_tatoeba/eng-swe.txt in the folder that MSLLM_SHARED names (default: `shared`
beside the repository).
One model is trained for all k, on a mixture in which every sentence occurs with every k (-1: when
the sentence has ended). It therefore learns the translation and not a particular timing.
Wait-k: Ma et al. 2019, arXiv 1810.08398. Several k at once: Elbayad et al. 2020, arXiv 2005.08595.
Cost: 2.7 M parameters, about 70 CPU-minutes. Figures: docs/results.md.
"""

from msllm.config import default_config
from msllm.data.files import shared_file

# k and its weight in the mixture. A large k is harder, because the model must look further back.
WAITS = {1: 1.0, 3: 1.0, 5: 1.0, 7: 1.5, -1: 2.0}


def get_config(k=""):
    """Returns all settings of the run or, with `k`, those to prepare its data."""
    config = default_config()
    config.steps = 4000
    config.log_every = 50
    config.eval_every = 500
    config.checkpoint.every = 500
    config.checkpoint.keep_every = 500  # for --best

    config.streams.names = ("user", "output")
    config.streams.kinds = ("input", "output")
    # There are only 23,000 sentences. Predicting the English as well delays overfitting.
    config.streams.loss_weights = (0.3, 1.0)

    config.data.dir = f"data/tatoeba_{k}" if k else ""
    if not k:
        config.data.mixture.dirs = tuple(f"data/tatoeba_{k}" for k in WAITS)
        config.data.mixture.weights = tuple(WAITS.values())
        config.data.mixture.streams = ("output",)
    config.data.converter = "wait_k"
    config.data.path = shared_file("data/translation_tatoeba/eng-swe.txt", __file__)
    config.data.format = "msllm.data.corpora:tatoeba"
    config.data.options = {"k": int(k or 1), "unit": "word"}
    config.data.tokenizer.path = "" if k in ("", "1") else "data/tatoeba_1/tokenizer.model"
    config.data.tokenizer.model_type = "unigram"
    config.data.tokenizer.vocab_size = 4096
    config.data.rows = 128
    config.data.batch_size = 8
    config.data.eval_percent = 8.0

    config.model.d_model = 192
    config.model.num_layers = 4
    config.model.num_heads = 6
    config.model.num_kv_heads = 6
    config.model.head_dim = 32
    config.model.d_ff = 576
    config.model.rope_theta = 1e4

    config.optim.lr = 2e-3
    config.optim.weight_decay = 1.0  # ten times the default, against overfitting
    return config
