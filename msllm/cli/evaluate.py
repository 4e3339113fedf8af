"""Answer held-out examples and count the exact answers.

The input streams of each held-out example are given row by row, and the model
generates all other streams. An example is right if every output stream says
exactly what it says in the example, silence left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from msllm.cli.base import Parser, output_file, whole

EXAMPLES = """
msllm evaluate --checkpoint=runs/quickstart
msllm evaluate --checkpoint=runs/gsm8k --after='####' --json=result.json
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
        help="Number of held-out examples at most, spread evenly over all.",
    )
    parser.add_argument(
        "--after",
        metavar="TEXT",
        default="",
        help="Compare only what an output says after the last occurrence of this text.",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=output_file, help="Also write the result to this file."
    )


def run(flags: argparse.Namespace) -> None:
    """Evaluates the checkpoint and prints the result."""
    from msllm.evals.exact_match import describe, evaluate
    from msllm.runtime.files import write_atomically
    from msllm.weights.load import load

    loaded = load(flags.checkpoint, flags.allow_code)
    result = evaluate(loaded, flags.data, flags.examples, flags.after)
    print(f"step {loaded.step}: {describe(result)}")
    if flags.json:
        write_atomically(flags.json, json.dumps(dataclasses.asdict(result)) + "\n")
