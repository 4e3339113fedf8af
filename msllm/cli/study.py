"""Run an experiment of one config file, in several arms and seeds.

Prepares the data, trains every arm with every seed, measures the models and
collects records, a table and plots (docs/studies.md). To continue after an
interruption, run the same command again: nothing that is done is repeated.
"""

from __future__ import annotations

import argparse
import re

from msllm.cli.base import Parser, Switch, comma_list, non_negative_int
from msllm.errors import RunError

EXAMPLES = """
msllm study configs/roles/study.py --out=runs/roles --jobs=2
msllm study configs/roles/study.py --out=runs/roles --shard=0/4
msllm study configs/roles/study.py --out=/tmp/roles --small
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_argument("study", metavar="CONFIG", help="Python file that defines get_study().")
    parser.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="Directory for data, runs and results. All shards may share it.",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=non_negative_int,
        default=1,
        help="Number of processes at a time. 0 does everything in this process, for debuggers.",
    )
    parser.add_argument(
        "--shard",
        metavar="I/N",
        type=_shard,
        default="0/1",
        help="Only do part I of N of the points, I from 0. The call that finds all points done "
        "collects them.",
    )
    parser.add_argument(
        "--small",
        action=Switch,
        default=False,
        help="Run the study's small form: a few steps and items, as a test.",
    )
    parser.add_argument(
        "--only",
        metavar="ARM",
        type=comma_list(str),
        default=[],
        help="Only train and measure these arms, separated by commas.",
    )
    parser.add_argument(
        "--redo",
        action=Switch,
        default=False,
        help="Delete and repeat finished runs whose settings have changed.",
    )
    parser.add_argument(
        "--remeasure",
        action=Switch,
        default=False,
        help="Measure again, without training.",
    )
    parser.add_argument(
        "--collect_only",
        action=Switch,
        default=False,
        help="Train and measure nothing. If points are missing, write a table of the seeds that "
        "are done to DIR/partial.md.",
    )
    parser.add_argument(
        "--job",
        metavar="NAME",
        default="",
        help="Only do one job in this process, such as points/ARM-SEED. A study starts its "
        "processes with this flag.",
    )


def run(flags: argparse.Namespace) -> int:
    """Runs the study and returns the exit status."""
    import pathlib

    from msllm import study
    from msllm.runtime.processes import EXIT_STOPPED
    from msllm.study import work
    from msllm.study.plan import Plan

    try:
        if flags.job:
            work.watch_parent()
            out = pathlib.Path(flags.out).absolute()
            work.do(Plan(study.load_study(flags.study), out, flags.small), flags.job)
            return 0
        study.run(
            flags.study,
            flags.out,
            jobs=flags.jobs,
            shard=flags.shard,
            small=flags.small,
            only=flags.only,
            redo=flags.redo,
            remeasure=flags.remeasure,
            collect_only=flags.collect_only,
        )
    except KeyboardInterrupt:
        raise RunError(
            "stopped: finished work is kept; run the same command again to continue"
        ) from None
    except work.Stopped as stopped:
        print(stopped)
        return EXIT_STOPPED
    return 0


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise argparse.ArgumentTypeError(
            f"is {text!r}: must be I/N with I from 0 to N - 1, such as 0/4"
        )
    return int(found[1]), int(found[2])
