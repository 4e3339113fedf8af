"""Bach's chorales: four voices in four streams, each delayed by a row after the voice above.

    msllm prepare --config=configs/chorales.py
    msllm train --config=configs/chorales.py --workdir=runs/chorales --config.seed=0
    msllm prepare --config=configs/chorales.py:quarter,delays,test
    msllm likelihood --checkpoint=runs/chorales --best --data=data/chorales_quarter_delays_test

Data: data/jsb_chorales/Jsb16thSeparated.json in the folder that MSLLM_SHARED names (default:
`shared` beside the repository). Official split, training songs in all keys.
Shows the benefit of delays where streams depend on each other within a row. Without delays, in
configs/chorales.py:quarter,together, the voices of a frame are independent given the earlier
frames. The words after the colon are `quarter` or `16th` (the length of a row), `delays` or
`together`, and optionally `test`, which selects the data of the test split.
Cost: 0.8 M parameters; about 5 CPU-minutes in quarters, 13 in 16ths. Figures: docs/results.md.
"""

from msllm.config import default_config
from msllm.data.files import shared_file


def get_config(words="quarter,delays"):
    """Returns all settings of the run."""
    grid, delays, *test = words.split(",")
    readers = {"quarter": "quarter_chorales", "16th": "chorales"}
    config = default_config()
    config.steps = 1000 if grid == "quarter" else 2500
    config.log_every = 50
    config.eval_every = config.checkpoint.every = config.checkpoint.keep_every = 100

    config.streams.names = ("soprano", "alto", "tenor", "bass")
    config.streams.kinds = ("output",) * 4
    config.streams.visibility = "same_row"
    config.streams.delays = {"delays": (0, 1, 2, 3), "together": (0, 0, 0, 0)}[delays]

    config.data.dir = f"data/chorales_{grid}_{delays}" + "_test" * bool(test)
    config.data.converter = "aligned"
    config.data.path = config.data.eval_path = shared_file(
        "data/jsb_chorales/Jsb16thSeparated.json", __file__
    )
    config.data.format = f"msllm.data.corpora:{readers[grid]}_train_transposed"
    config.data.eval_format = f"msllm.data.corpora:{readers[grid]}_{'test' if test else 'valid'}"
    config.data.vary.lead = (1,)  # an initial silent row, so that the first frame is also predicted
    config.data.tokenizer.model_type = "word"
    config.data.tokenizer.vocab_size = 64
    config.data.rows = 168
    config.data.batch_size = 2

    config.model.d_model = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 32
    config.model.d_ff = 384
    config.model.rope_theta = 1e4

    config.optim.lr = 2e-3
    return config
