"""Measure whether the output follows a user who corrects a question.

Also measures how soon it does. The examples are held-out dictations. Each
question comes to the model twice: as a column that is known beforehand, and
word by word through a session, as a user would type it. Rows are counted from
the user's "wait".
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from msllm.cli.base import Parser, output_file, whole

EXAMPLES = """
msllm interruptions --checkpoint=runs/quickstart
msllm interruptions --checkpoint=runs/quickstart --examples=100 --json=result.json
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_argument(
        "--checkpoint", metavar="DIR", required=True, help="A run, or one of its checkpoints."
    )
    parser.add_allow_code()
    parser.add_argument(
        "--data",
        metavar="DIR",
        default="",
        help="Prepared data. Default: what the checkpoint was trained on.",
    )
    parser.add_argument(
        "--examples",
        metavar="N",
        type=whole(1),
        default=500,
        help="Number of held-out questions with a correction, at most.",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=output_file, help="Also write the result to this file."
    )


def run(flags: argparse.Namespace) -> None:
    """Measures and prints the figures."""
    from msllm.evals.interruptions import describe, evaluate
    from msllm.runtime.files import write_atomically
    from msllm.weights.load import load

    loaded = load(flags.checkpoint, flags.allow_code)
    result = evaluate(loaded, flags.data, flags.examples)
    print(f"step {loaded.step}: {describe(result)}")
    if flags.json:
        write_atomically(flags.json, json.dumps(dataclasses.asdict(result)) + "\n")
