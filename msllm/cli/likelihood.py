"""Measure the negative log-likelihood of held-out data for each stream.

Prints means in nats with 95 % intervals from a bootstrap. The bootstrap
resamples examples, or blocks of --block rows where examples are few and long.
With --against, it resamples the differences between the two models.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from msllm.cli.base import (
    Parser,
    Switch,
    load_model,
    non_negative_int,
    positive_int,
    write_json,
)

if TYPE_CHECKING:
    from msllm.weights.load import LoadedModel

EXAMPLES = """
msllm likelihood --checkpoint=runs/chorales
msllm likelihood --checkpoint=runs/chorales --against=runs/other --best
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_checkpoint()
    parser.add_argument(
        "--against",
        metavar="DIR",
        default="",
        help="Another run or checkpoint: also report by how much it is worse.",
    )
    parser.add_argument(
        "--best",
        action=Switch,
        default=False,
        help="Use the checkpoint of each run with the lowest evaluation loss during training, "
        "not the newest one.",
    )
    parser.add_data()
    parser.add_argument(
        "--split", choices=["train", "eval"], default="eval", help="Split of the data to read."
    )
    parser.add_visibility()
    parser.add_argument(
        "--block",
        metavar="ROWS",
        type=non_negative_int,
        default=0,
        help="Rows per resampled block. 0 resamples whole examples.",
    )
    parser.add_argument(
        "--resamples",
        metavar="N",
        type=positive_int,
        default=1000,
        help="Number of bootstrap resamples.",
    )
    parser.add_json()


def run(flags: argparse.Namespace) -> None:
    """Measures the likelihood and prints it."""
    from msllm.evals import likelihood

    def load(path: str) -> LoadedModel:
        return load_model(flags, likelihood.best_checkpoint(path) if flags.best else path)

    model = load(flags.checkpoint)
    names = model.streams.names
    units = likelihood.evaluate(model, flags.data, flags.split, flags.block)
    report = likelihood.report(units, names, flags.resamples)
    result: dict[str, Any] = {"step": model.step, "nll": report}
    print(f"step {model.step} of {flags.checkpoint}\n{likelihood.describe(report)}")
    if flags.against:
        other = load(flags.against)
        # Both models read the same data, so the default is that of the first one.
        data = flags.data or (model.run_config.data.dir if model.run_config else "")
        other_units = likelihood.evaluate(other, data, flags.split, flags.block)
        difference = likelihood.difference(units, other_units)
        worse = likelihood.report(difference, names, flags.resamples)
        result["against"] = {"step": other.step, "worse": worse}
        print(f"step {other.step} of {flags.against} is worse by\n{likelihood.describe(worse)}")
    write_json(flags.json, result)
