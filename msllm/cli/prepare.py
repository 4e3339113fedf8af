"""Prepare data for training.

Reads or generates examples, trains or loads a tokenizer, packs the examples
into tables, and writes a train and an eval split (docs/data.md). The output
does not depend on the number of workers or where they run. To continue after an
interruption, run the same command again.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from msllm.cli.base import Parser, non_negative_int
from msllm.errors import RunError, UserError

if TYPE_CHECKING:
    from msllm.config import Config

EXAMPLES = """
msllm prepare --config=configs/quickstart.py
msllm prepare --config=configs/gsm8k.py --out=data/gsm8k --processes=8
msllm prepare --config=configs/gsm8k.py --out=/shared/gsm8k --cluster=slurm --processes=256
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_config()
    parser.add_argument(
        "--out", metavar="DIR", default="", help="Directory to write. Default: config.data.dir."
    )
    parser.add_argument(
        "--processes",
        metavar="N",
        type=non_negative_int,
        default=0,
        help="Number of worker processes. 0 starts one per core of this machine.",
    )
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        default="",
        help="Run on a Dask cluster: the address of its scheduler, a scheduler file (*.json), or "
        "slurm or kube to start --processes workers there (docs/large_corpora.md).",
    )


def run(flags: argparse.Namespace) -> None:
    """Prepares the data and prints the report."""
    from msllm.data import executors
    from msllm.data.prepare import prepare
    from msllm.data.report import describe

    out = flags.out or flags.config.data.dir
    if not out:
        raise UserError(
            "config.data.dir is empty: set the directory to write with --out=DIR or "
            "--config.data.dir=DIR"
        )
    try:
        if flags.cluster:
            with executors.cluster(flags.cluster, flags.processes) as executor:
                manifest = prepare(flags.config, out, executor=executor)
        else:
            processes = flags.processes or executors.available_cores()
            manifest = prepare(flags.config, out, processes)
    except KeyboardInterrupt:
        raise RunError(
            "stopped: finished work is kept; run the same command again to continue"
        ) from None
    print(describe(manifest))
    if in_time := _targets_in_time(flags.config, out):
        print("\n".join(in_time))
    print(f"prepared in {out}")


def _targets_in_time(config: Config, out: str) -> list[str]:
    """Says for each generated stream whether its targets can be known in time."""
    from msllm.data.records import read_manifest
    from msllm.streams import StreamSpec, resolve_visibility
    from msllm.view.prepared import targets_in_time
    from msllm.view.split import Split

    spec = StreamSpec.from_config(resolve_visibility(config).streams)
    manifest = read_manifest(out)
    filled = [split for split, part in manifest["splits"].items() if part["tables"]]
    return targets_in_time(Split(out, filled[0]), spec.prediction_lag_array)
