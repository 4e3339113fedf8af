"""Reading while solving: GSM8K with thoughts that start k rows after the question.

    msllm prepare --config=configs/reading.py
    msllm train --config=configs/reading.py --workdir=runs/reading
    msllm prepare --config=configs/reading.py:8
    msllm likelihood --checkpoint=runs/reading --data=data/reading_8

Data: data/gsm8k/train.jsonl in the folder that MSLLM_SHARED names (default: `shared` beside the
repository).
One model is trained for all k, and every example draws one k. The number after the colon gives all
examples the same k (-1: when the question has ended). Evaluating on these data measures the cost of
starting to think before the question is known.
Cost: 1.7 M parameters, about 12 CPU-minutes. Figures: docs/results.md.
"""

from msllm.config import default_config
from msllm.data.files import shared_file

STARTS = [0, 8, 32, -1]


def get_config(k=""):
    """Returns all settings of the run."""
    config = default_config()
    config.steps = 800
    config.log_every = 20
    config.eval_every = 200

    config.streams.names = ("user", "thought", "output")
    config.streams.kinds = ("input", "thought", "output")

    config.data.dir = f"data/reading_{k}" if k else "data/reading"
    config.data.converter = "gsm8k"
    config.data.path = shared_file("data/gsm8k/train.jsonl", __file__)
    config.data.options = {"think_after": int(k) if k else STARTS}
    config.data.tokenizer.path = "data/reading/tokenizer.model" if k else ""
    config.data.tokenizer.model_type = "unigram"
    config.data.tokenizer.vocab_size = 2048
    config.data.rows = 512
    config.data.batch_size = 2
    config.data.eval_percent = 4.0

    config.model.d_model = 160
    config.model.num_layers = 4
    config.model.num_heads = 5
    config.model.num_kv_heads = 5
    config.model.head_dim = 32
    config.model.d_ff = 480

    config.optim.lr = 2e-3
    return config
