"""The model organism with an output that reads the thoughts' tokens only, and not the question.

    msllm prepare --config=configs/monitor/organism.py
    msllm train --config=configs/monitor/organism_tokens.py --workdir=runs/organism_tokens

The data and parameters are those of organism.py. `msllm flow` shows that the user influences the
output only through the tokens of the thoughts. docs/monitoring.md says what follows from that.
"""

import pathlib
import runpy

from msllm.data import misreport


def get_config():
    """Returns all settings of the run."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("organism.py")))["get_config"]()
    config.streams.visibility = "isolated"
    thoughts = misreport.THOUGHTS
    config.streams.lags = (
        *((thought, "user", "1") for thought in thoughts),
        *((one, other, "1") for one in thoughts for other in thoughts if one != other),
        *(("output", thought, "1 tokens") for thought in thoughts),
    )
    return config
