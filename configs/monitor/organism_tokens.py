"""The model organism with an output that reads the tokens of two thoughts, and not the question.

    msllm prepare --config=configs/monitor/organism.py
    msllm train --config=configs/monitor/organism_tokens.py --workdir=runs/organism_tokens

The data and parameters are those of organism.py. `msllm flow` shows that the user influences the
output only through the tokens of the thoughts. docs/monitoring.md says what follows from that.
"""

import pathlib
import runpy

from msllm.data import misreport

# The thoughts that the output reads. None of them says what another one says: with both, the output
# knows the number, and with one of them it does not. So it has to follow a change of either.
READ = ("value", "plan")


def get_config():
    """Returns all settings of the run."""
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("organism.py")))["get_config"]()
    config.streams.visibility = "isolated"
    thoughts = misreport.THOUGHTS
    config.streams.lags = (
        *((thought, "user", "1") for thought in thoughts),
        *((one, other, "1") for one in thoughts for other in thoughts if one != other),
        *(("output", thought, "1 tokens") for thought in READ),
    )
    return config
