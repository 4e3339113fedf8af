"""Chat with a model on a full screen, and type while it generates.

Shows one column per stream. ^S saves the conversation; --replay shows a saved
one and needs no checkpoint. docs/chat.md lists all keys. The screen needs the
extra "chat": pip install "msllm[chat]".
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING

from msllm.cli import generate
from msllm.cli.base import Parser, load_model, positive_int
from msllm.errors import UserError

if TYPE_CHECKING:
    from msllm.chat.player import Player

EXAMPLES = """
msllm chat --checkpoint=runs/quickstart --pace=4 --temperature=output=0.7
msllm chat --replay=chat.npz
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_checkpoint(required=False)
    parser.add_argument(
        "--replay", metavar="FILE", help="Saved conversation to show. Replaces --checkpoint."
    )
    parser.add_argument(
        "--pace",
        metavar="X",
        type=float,
        help="Rows per second; with --replay, speed relative to the recording. Default: 4; with "
        "--replay, 1.",
    )
    parser.add_argument(
        "--window",
        metavar="ROWS",
        type=positive_int,
        help="Number of past rows that the model sees. The session itself has no limit. Default: "
        "as many rows as the model was trained on, or 1024 if that is unknown.",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="chat.npz",
        help="npz file that ^S writes. If it exists, ^S writes NAME-2.npz, NAME-3.npz, ...",
    )
    generate.define_sampling_flags(parser)


def open_player(flags: argparse.Namespace) -> Player:
    """Opens a recording, or a session whose functions are all compiled.

    Raises UserError unless exactly one of --checkpoint and --replay is given.
    """
    from msllm.chat.player import Live, Replay, warm_up
    from msllm.chat.recording import Recording
    from msllm.decode.engine import Engine
    from msllm.decode.script import check_rows, default_window

    if (flags.checkpoint is None) == (flags.replay is None):
        raise UserError(
            "give either --checkpoint=DIR, to chat with a model, "
            "or --replay=FILE, to see a recording"
        )
    if flags.replay is not None:
        if flags.threads is not None:
            raise UserError(
                "--threads is for a model, and --replay shows a recording: leave it out"
            )
        return Replay(Recording.load(flags.replay), 1.0 if flags.pace is None else flags.pace)
    model = load_model(flags)
    model.require_tokenizer()
    window = flags.window or default_window(model)
    check_rows(model.trained_rows, window)  # now, because a later warning would disturb the screen
    engine = Engine(model, window=window)
    print("compiling ...", file=sys.stderr)
    warm_up(engine)
    options = generate.sampling_options(flags, model.streams)
    return Live(engine, options, 4.0 if flags.pace is None else flags.pace)


def run(flags: argparse.Namespace) -> None:
    """Opens the screen."""
    try:
        from msllm.chat.screen import ChatApp
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "textual":
            raise
        raise UserError(
            "the screen needs the package textual: pip install 'msllm[chat]'"
        ) from error
    out = pathlib.Path(flags.out)
    if out.suffix != ".npz" or not out.absolute().parent.is_dir():
        raise UserError(
            f"--out={out}: must be a name that ends in .npz, in a directory that exists"
        )
    # Textual draws on stderr.
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):
        raise UserError(
            "the screen needs a terminal as stdin, stdout and stderr: use `msllm generate` to "
            "print rows to a file or a pipe"
        )
    ChatApp(open_player(flags), out).run()
