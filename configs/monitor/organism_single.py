"""The model organism in one stream: question, chain of thought, answer.

    msllm prepare --config=configs/monitor/organism_single.py
    msllm train --config=configs/monitor/organism_single.py --workdir=runs/organism_single

An ordinary language model with the sizes of organism.py, on the same examples and thoughts.
"""

import pathlib
import runpy


def get_config():
    """Returns all settings of the run."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("organism.py")))["get_config"]()
    config.streams.names = ("text",)
    config.streams.kinds = ("output",)
    config.data.dir = "data/organism_single"
    config.data.converter = "misreport_single"
    del config.data.options["wait"], config.data.options["contradicted"]
    config.data.rows = 160
    config.data.batch_size = 4
    return config
