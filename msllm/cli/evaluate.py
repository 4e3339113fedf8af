"""Count exact answers to held-out examples.

Feeds the input streams of each held-out example row by row and lets the model
generate all other streams. An answer is exact if every output stream says what
it says in the example, ignoring silence. Prints the share of exact answers and
the number of rows until the answer.
"""

from __future__ import annotations

import argparse
import dataclasses

from msllm.cli.base import Parser, load_model, positive_int, write_json

EXAMPLES = """
msllm evaluate --checkpoint=runs/quickstart
msllm evaluate --checkpoint=runs/gsm8k --after='####' --json=result.json
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
        help="Maximum number of held-out examples, spread evenly over all of them.",
    )
    parser.add_argument(
        "--after",
        metavar="TEXT",
        default="",
        help="Compare only what an output says after the last occurrence of this text. "
        "Default: compare everything.",
    )
    parser.add_json()


def run(flags: argparse.Namespace) -> None:
    """Evaluates the checkpoint and prints the result."""
    from msllm.evals.exact_match import describe, evaluate

    model = load_model(flags)
    result = evaluate(model, flags.data, flags.examples, flags.after)
    print(f"step {model.step}: {describe(result)}")
    write_json(flags.json, dataclasses.asdict(result))
