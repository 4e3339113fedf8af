"""Test what monitors can tell from the transcripts of a model.

A monitor is a linear classifier of the words that some streams said. It learns
to tell a fact about a run, the label, from transcripts in which the label is
known. Prints the area under the ROC curve (0.5: chance) and the g-mean of
monitors of each stream, of all streams, and of these and their agreement, with
intervals of 95 %.

A line of a file is a transcript, as msllm evaluate --transcripts writes it:

{"streams": {"thought": "...", "output": "..."}, "right": true}
"""

from __future__ import annotations

import argparse
import pathlib

from msllm.cli.base import Parser, Switch, write_json
from msllm.errors import UserError

EXAMPLES = """
msllm monitor --train=train.jsonl --test=test.jsonl --label=right
msllm monitor --train=train.jsonl --test=same.jsonl --test=other.jsonl --streams=thought,output
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_argument(
        "--train", metavar="FILE", required=True, help="Transcripts to train the monitors on."
    )
    parser.add_argument(
        "--test",
        metavar="FILE",
        action="append",
        required=True,
        help="Transcripts to test them on. Repeatable.",
    )
    parser.add_argument(
        "--label",
        metavar="KEY",
        default="label",
        help="Key of the label, which is true or false.",
    )
    parser.add_argument(
        "--streams",
        metavar="NAMES",
        help="Streams to read, separated by commas: one monitor reads these together. Default: a "
        "monitor for each stream, and for all of them.",
    )
    parser.add_argument(
        "--agreement",
        action=Switch,
        default=False,
        help="The monitor of --streams also sees which of their last words agree.",
    )
    parser.add_json()


def run(flags: argparse.Namespace) -> None:
    """Trains and tests the monitors and prints the result."""
    from msllm.evals.monitor import AGREEMENT, as_json, describe, monitor, read_transcripts

    reads = None
    if flags.streams is not None:
        names = [name.strip() for name in flags.streams.split(",") if name.strip()]
        reads = {"+".join(names) + (AGREEMENT if flags.agreement else ""): names}
    elif flags.agreement:
        raise UserError("--agreement needs --streams: name the streams to compare")
    train = read_transcripts(flags.train, flags.label)
    tests = {name: read_transcripts(path, flags.label) for name, path in _names(flags.test)}
    found = monitor(train, tests, reads)
    print(describe(found))
    write_json(flags.json, as_json(found))


def _names(paths: list[str]) -> list[tuple[str, str]]:
    """Names of files for the table: without folders, if they differ."""
    short = [pathlib.PurePath(path).name for path in paths]
    return list(zip(short if len(set(short)) == len(short) else paths, paths))
