"""Measure the likelihood of held-out data, stream by stream.

Prints negative log-likelihoods with intervals. Units of the bootstrap are
examples, or runs of --block rows where examples are few and long. The interval
holds the middle 95 % of the resampled means. A comparison with --against
resamples the differences unit by unit.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from msllm.cli.base import Parser, Switch, output_file, whole

EXAMPLES = """
msllm likelihood --checkpoint=runs/chorales
msllm likelihood --checkpoint=runs/chorales --against=runs/other --best
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    from msllm.streams import PRESETS

    parser.add_argument(
        "--checkpoint", metavar="DIR", required=True, help="A run, or one of its checkpoints."
    )
    parser.add_allow_code()
    parser.add_argument(
        "--against",
        metavar="DIR",
        default="",
        help="Another run or checkpoint: report by how much it is worse.",
    )
    parser.add_argument(
        "--best",
        action=Switch,
        default=False,
        help="Use the checkpoint of each run with the best evaluation during training.",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        default="",
        help="Prepared data. Default: what the checkpoint was trained on.",
    )
    parser.add_argument("--split", metavar="NAME", default="eval", help="Split of the data.")
    parser.add_argument(
        "--visibility",
        choices=PRESETS,
        default="",
        help="Which streams see each other. Default: as in the checkpoint.",
    )
    parser.add_argument(
        "--skip_silence",
        action=Switch,
        help="Hide silent cells from attention. Default: as in the checkpoint.",
    )
    parser.add_argument(
        "--block",
        metavar="ROWS",
        type=whole(0),
        default=0,
        help="Length of a unit of the bootstrap. 0: whole examples.",
    )
    parser.add_argument(
        "--resamples",
        metavar="N",
        type=whole(1),
        default=1000,
        help="How often the units are resampled.",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=output_file, help="Also write the result to this file."
    )


def run(flags: argparse.Namespace) -> None:
    """Measures the likelihood and prints it."""
    from msllm.evals import likelihood
    from msllm.runtime.files import write_atomically
    from msllm.weights.load import LoadedModel, load

    def load_checkpoint(path: str) -> LoadedModel:
        path = likelihood.best_checkpoint(path) if flags.best else path
        model = load(path, flags.allow_code)
        if flags.visibility:
            model = model.with_visibility(flags.visibility)
        if flags.skip_silence is not None:
            model = model.with_streams(skip_silence=flags.skip_silence)
        return model

    model = load_checkpoint(flags.checkpoint)
    names = model.streams.names
    units = likelihood.evaluate(model, flags.data, flags.split, flags.block)
    report = likelihood.report(units, names, flags.resamples)
    result: dict[str, Any] = {"step": model.step, "nll": report}
    print(f"step {model.step} of {flags.checkpoint}\n{likelihood.describe(report)}")
    if flags.against:
        other = load_checkpoint(flags.against)
        data = flags.data or (model.run_config.data.dir if model.run_config else "")
        other_units = likelihood.evaluate(other, data, flags.split, flags.block)
        difference = likelihood.difference(units, other_units)
        worse = likelihood.report(difference, names, flags.resamples)
        result["against"] = {"step": other.step, "worse": worse}
        print(f"step {other.step} of {flags.against} is worse by\n{likelihood.describe(worse)}")
    if flags.json:
        write_atomically(flags.json, json.dumps(result, indent=2) + "\n")
