"""Prepare the data that training reads.

Reads or generates examples, trains a tokenizer or takes one from a file,
splits, packs, and writes shards and a manifest (docs/data.md). The same
settings and inputs give the same bytes with any number of processes. Start a
stopped run again to continue it.
"""

from __future__ import annotations

import argparse

from msllm.cli.base import Parser, whole
from msllm.errors import RunError, UserError

EXAMPLES = """
msllm prepare --config=configs/quickstart.py
msllm prepare --config=configs/gsm8k.py --out=data/gsm8k --processes=8
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_config()
    parser.add_argument(
        "--out", metavar="DIR", default="", help="Where to write. Default: config.data.dir."
    )
    parser.add_argument(
        "--processes",
        metavar="N",
        type=whole(0),
        default=0,
        help="Worker processes. 0: one per core.",
    )


def run(flags: argparse.Namespace) -> None:
    """Prepares the data and prints the report."""
    from msllm.data import workers
    from msllm.data.prepare import prepare
    from msllm.data.report import describe

    out = flags.out or flags.config.data.dir
    if not out:
        raise UserError(
            "config.data.dir is empty: say where to write with --out=DIR or --config.data.dir=DIR"
        )
    try:
        print(describe(prepare(flags.config, out, flags.processes or workers.available_cores())))
    except KeyboardInterrupt:
        raise RunError("stopped: what is finished is kept, the same command continues") from None
    print(f"prepared in {out}")
