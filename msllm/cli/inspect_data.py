"""Show statistics and tables of prepared data.

Prints each table with one line per row and one column per stream, and an
estimate of whether the targets of each generated stream can be known in time.
Reads only the manifest and the shards that it needs, so it is fast for data of
any size (docs/data.md).
"""

from __future__ import annotations

import argparse
import io
import sys

from msllm.cli.base import Parser, output_file, positive_int

EXAMPLES = """
msllm inspect data/quickstart
msllm inspect data/quickstart --example=17
msllm inspect data/quickstart --split=eval --html=quickstart.html
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    from msllm.streams import PRESETS

    parser.add_argument("directory", metavar="DIR", help="Directory that msllm prepare wrote.")
    parser.add_argument(
        "--split", choices=["train", "eval"], default="train", help="Split to show."
    )
    parser.add_argument(
        "--example",
        metavar="ID",
        help="Show one example in full, by its position in the split or its id (16 hex digits).",
    )
    parser.add_argument(
        "--tables",
        metavar="N",
        type=positive_int,
        help="Number of tables to show, starting with the first. Default: 1; with --html, 20.",
    )
    parser.add_argument(
        "--rows",
        metavar="N",
        type=positive_int,
        help="Number of rows to show of each table. Default: 64; with --example or --html, all.",
    )
    parser.add_argument(
        "--visibility",
        choices=PRESETS,
        help="Visibility for which to estimate whether the targets can be known in time. Default: "
        "that of the config with which the data was prepared.",
    )
    parser.add_argument(
        "--html", metavar="FILE", type=output_file, help="Write an HTML page instead."
    )


def run(flags: argparse.Namespace) -> None:
    """Prints the data, or writes an HTML page."""
    from msllm.view import cells, prepared

    if isinstance(sys.stdout, io.TextIOWrapper):
        # Some terminals cannot encode every character.
        sys.stdout.reconfigure(errors="backslashreplace")
    prepared.run(
        flags.directory,
        cells.console(),
        flags.split,
        flags.example,
        flags.tables,
        flags.rows,
        flags.html,
        flags.visibility,
    )
