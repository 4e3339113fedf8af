"""GSM8K in three streams: the user asks, the thought works, the output gives the number.

    msllm prepare --config=configs/gsm8k.py
    msllm train --config=configs/gsm8k.py --workdir=runs/gsm8k

Data: data/gsm8k/train.jsonl in the folder that MSLLM_SHARED names (default: `shared` beside the
repository). --config.data.path=FILE reads another file of the same form.
--config.data.options.think_after=ROWS lets the thought start before the question ends.
Shows packing of real text (less than 5 % of the rows are padding). A model of this size does not
learn to calculate.
Cost: prepare about 5 CPU-seconds; 2.5 M parameters.
"""

from msllm.config import default_config
from msllm.data.files import shared_file


def get_config():
    """Returns all settings of the run."""
    config = default_config()
    config.steps = 1000

    config.streams.names = ("user", "thought", "output")
    config.streams.kinds = ("input", "thought", "output")

    config.data.dir = "data/gsm8k"
    config.data.converter = "gsm8k"
    config.data.path = shared_file("data/gsm8k/train.jsonl", __file__)
    config.data.options = {"think_after": -1}
    config.data.tokenizer.model_type = "unigram"
    config.data.tokenizer.vocab_size = 4096
    config.data.rows = 512
    config.data.batch_size = 8
    config.data.eval_percent = 2.0

    config.model.d_model = 192
    config.model.num_layers = 4
    config.model.num_heads = 6
    config.model.num_kv_heads = 2
    config.model.head_dim = 32
    config.model.d_ff = 576

    config.optim.lr = 2e-3
    return config
