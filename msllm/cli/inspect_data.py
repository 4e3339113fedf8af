"""Show prepared data: statistics and tables.

Tables are printed one line a row and one column a stream. Reads the manifest
and the few shards that it needs, so the size of the data does not matter
(docs/data.md).
"""

from __future__ import annotations

import argparse
import io
import signal
import sys

from msllm.cli.base import Parser, output_file, whole

EXAMPLES = """
msllm inspect data/quickstart
msllm inspect data/quickstart --example=17
msllm inspect data/quickstart --split=eval --html=quickstart.html
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_argument("directory", metavar="DIR", help="A directory that msllm prepare wrote.")
    parser.add_argument(
        "--split", choices=["train", "eval"], default="train", help="Which split to show."
    )
    parser.add_argument(
        "--example",
        metavar="ID",
        help="Show one example in full: its number in stored order, or its id (16 hex digits).",
    )
    parser.add_argument(
        "--tables",
        metavar="N",
        type=whole(1),
        help="Number of tables to show, from the first on. Default: 1, in an HTML page 20.",
    )
    parser.add_argument(
        "--rows",
        metavar="N",
        type=whole(1),
        help="Rows to show of each table. Default: 64 in a terminal; an example and HTML show all.",
    )
    parser.add_argument(
        "--html", metavar="FILE", type=output_file, help="Write an HTML page to this file instead."
    )


def run(flags: argparse.Namespace) -> None:
    """Prints the data, or writes a page."""
    from msllm.view import cells, prepared

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the command without a traceback
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack a character
    prepared.run(
        flags.directory,
        cells.console(),
        flags.split,
        flags.example,
        flags.tables,
        flags.rows,
        flags.html,
    )
