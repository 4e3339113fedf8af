"""The configs of the folders beside this file: `--config=config.py:tatoeba`, and so on."""

import pathlib

from msllm.config import default_config

HERE = pathlib.Path(__file__).parent
# folder: converter, format, input, percent held out
CASES = {
    "tatoeba": ("wait_k", "msllm.data.corpora:tatoeba", "pairs.txt", 40.0),
    "interrupted": ("wait_k", "msllm.data.corpora:tatoeba", "pairs.txt", 0.0),
    "built_in": ("wait_k", "", "pairs.jsonl", 0.0),
    "own": ("own:convert", "", "pairs.jsonl", 0.0),
}


def get_config(case):
    """The settings with which `case` was prepared."""
    config = default_config()
    config.streams.names = ("user", "output")
    config.streams.kinds = ("input", "output")
    config.data.converter, config.data.format, file, config.data.eval_percent = CASES[case]
    config.data.path = str(HERE / file)
    config.data.dir = str(HERE / case)
    config.data.tokenizer.model_type = "word"
    config.data.tokenizer.vocab_size = 64
    config.data.rows = 16
    config.data.batch_size = 2
    config.data.shards = 1
    return config
