"""Apollo 13: does one voice loop of mission control help to predict the other?

    msllm prepare --config=configs/apollo13.py
    msllm train --config=configs/apollo13.py --workdir=runs/apollo13
    msllm train --config=configs/apollo13.py:isolated --workdir=runs/apollo13_isolated
    msllm likelihood --checkpoint=runs/apollo13 --against=runs/apollo13_isolated --block=64

Data: six hours from the accident on, in data/apollo13_loops in the folder that MSLLM_SHARED names
(default: `shared` beside the repository). The last eighth of the mission is held out.
Both models have the same parameters, data and steps. With `:isolated` neither loop sees the other.
Cost: 1.0 M parameters, about 5 CPU-minutes each. Figures: docs/results.md.
"""

from msllm.config import default_config
from msllm.data.files import shared_file


def get_config(visibility="block_causal"):
    """Returns all settings of the run."""
    config = default_config()
    config.steps = 500
    config.log_every = 20
    config.eval_every = config.checkpoint.every = config.checkpoint.keep_every = 50

    config.streams.names = ("air_ground", "flight_director")
    config.streams.kinds = ("output", "output")
    config.streams.visibility = visibility

    config.data.dir = "data/apollo13"
    config.data.converter = "timed"
    config.data.path = shared_file("data/apollo13_loops/air-ground-loop.json", __file__)
    config.data.format = "msllm.data.corpora:apollo13"
    crew = {f"air-ground/{speaker}": "air_ground" for speaker in ("CAPCOM", "CDR", "CMP", "LMP")}
    config.data.options = {
        "row_seconds": 0.25,
        "longest_silence": 8,
        "roles": {**crew, "*": "flight_director"},
    }
    config.data.tokenizer.model_type = "unigram"
    config.data.tokenizer.vocab_size = 1024
    config.data.split = "tail"
    config.data.eval_percent = 12.5
    config.data.rows = 512
    config.data.batch_size = 2

    config.model.d_model = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 32
    config.model.d_ff = 384

    config.optim.lr = 2e-3
    return config
