"""The dictated sums of quickstart.py in one stream: question, then thoughts, then answer.

    msllm prepare --config=configs/quickstart_single.py
    msllm train --config=configs/quickstart_single.py --workdir=runs/quickstart_single

An ordinary language model on the same examples, with the same held-out split. Shows how many rows
later it answers.
Cost: less than quickstart.py.
"""

import pathlib
import runpy


def get_config():
    """Returns all settings of the run."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("quickstart.py")))["get_config"]()
    config.streams.names = ("text",)
    config.streams.kinds = ("output",)
    config.data.dir = "data/quickstart_single"
    config.data.converter = "dictation_single"
    config.data.batch_size = 24  # the same number of cells per step as with three streams
    config.steps = 1200
    return config
