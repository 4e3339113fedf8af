"""Measure whether and how soon the output follows a user's correction.

Needs a model trained on dictations (configs/quickstart.py). Each held-out
question with a correction is given to the model twice: as a column that is
known beforehand ("table"), and word by word through a session, as a user would
type it ("live"). Rows are counted from the user's "wait".
"""

from __future__ import annotations

import argparse
import dataclasses

from msllm.cli.base import Parser, load_model, positive_int, write_json

EXAMPLES = """
msllm interruptions --checkpoint=runs/quickstart
msllm interruptions --checkpoint=runs/quickstart --examples=100 --json=result.json
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_checkpoint()
    parser.add_data()
    parser.add_argument(
        "--examples",
        metavar="N",
        type=positive_int,
        default=500,
        help="Maximum number of held-out questions with a correction.",
    )
    parser.add_json()


def run(flags: argparse.Namespace) -> None:
    """Measures the reactions and prints the figures."""
    from msllm.evals.interruptions import describe, evaluate

    model = load_model(flags)
    result = evaluate(model, flags.data, flags.examples)
    print(f"step {model.step}: {describe(result)}")
    write_json(flags.json, dataclasses.asdict(result))
