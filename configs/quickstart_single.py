"""Dictated sums in one stream: question, then thoughts, then answer.

    msllm prepare --config=configs/quickstart_single.py
    msllm train --config=configs/quickstart_single.py --workdir=runs/quickstart_single

An ordinary language model with the parameters of quickstart.py, on examples of one question each,
without silences. Shows how many rows later it answers.
Cost: 3 to 4 CPU-minutes.
"""

import pathlib
import runpy


def get_config():
    """Returns all settings of the run."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart.py")))["get_config"]()
    config.streams.names = ("text",)
    config.streams.kinds = ("output",)
    config.streams.skip_silence = False
    config.data.dir = "data/quickstart_single"
    config.data.converter = "dictation_single"
    config.data.options = {"examples": 20_000, "seed": 0}
    config.data.rows = 96
    config.data.batch_size = 24
    config.data.eval_percent = 2.5
    config.optim.final_lr_ratio = 0.1
    config.steps = 600
    return config
