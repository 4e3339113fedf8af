"""Evaluate the answers to held-out examples.

First predicts what each generated stream says in the examples, given the rows
before: the negative log-likelihood and the accuracy of its tokens, by turn.

Then feeds the input streams of each example row by row and lets the model
generate all other streams. An answer is exact if every output stream says what
it says in the example, ignoring silence. Prints the share of exact answers and
the number of rows until the answer.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from msllm.cli.base import Parser, load_model, positive_int, write_json
from msllm.errors import UserError

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
    from msllm import flow
    from msllm.evals import by_turn, exact_match

    model = load_model(flags)
    for line in flow.summary(model.streams, model.config.vocab_size):
        print(line)
    predicted = by_turn.evaluate(model, flags.data, flags.examples)
    result: dict[str, Any] = {"predicted": [one._asdict() for one in predicted]}
    step = "" if model.step is None else f"step {model.step}: "
    print(f"{step}what each stream says, given the rows before")
    print(by_turn.describe(predicted), end="\n\n")
    if exact_match.is_applicable(model):
        try:
            exact = exact_match.evaluate(model, flags.data, flags.examples, flags.after)
            result |= dataclasses.asdict(exact)
            print(exact_match.describe(exact))
        except exact_match.NoAnswers as error:
            print(error)
    elif flags.after:
        raise UserError("--after needs answers, and the model has no input and output stream")
    write_json(flags.json, result)
