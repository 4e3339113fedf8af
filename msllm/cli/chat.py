"""Talk with a model on a full screen, typing while it goes on.

Each stream has a column. A key saves the conversation, and --replay shows a
saved one without a checkpoint. All keys are in docs/chat.md. The screen needs
the extra `chat`: pip install "msllm[chat]".
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING

from msllm.cli import generate
from msllm.cli.base import Parser, whole
from msllm.errors import UserError

if TYPE_CHECKING:
    from msllm.chat.player import Player

EXAMPLES = """
msllm chat --checkpoint=runs/quickstart --pace=4 --temperature=output=0.7
msllm chat --replay=chat.npz
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_argument("--checkpoint", metavar="DIR", help="A run, or one of its checkpoints.")
    parser.add_allow_code()
    parser.add_argument(
        "--replay", metavar="FILE", help="A saved conversation to show instead of a model."
    )
    parser.add_argument(
        "--pace",
        metavar="X",
        type=float,
        help="Rows per second. Default: 4. With --replay: a multiple of its own pace. Default: 1.",
    )
    parser.add_argument(
        "--window",
        metavar="ROWS",
        type=whole(1),
        default=1024,
        help="Number of past rows that the model sees. The session can go on for longer.",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        default="chat.npz",
        help="Where ^S saves. If the file exists: NAME-2.npz and so on.",
    )
    generate.define_sampling_flags(parser)


def open_player(flags: argparse.Namespace) -> Player:
    """A recording, or a session with everything compiled. Raises UserError."""
    from msllm.chat.player import Live, Replay, warm_up
    from msllm.chat.recording import Recording
    from msllm.decode.engine import Engine
    from msllm.weights.load import load

    if (flags.checkpoint is None) == (flags.replay is None):
        raise UserError(
            "give either --checkpoint=DIR, to talk with a model, "
            "or --replay=FILE, to see a recording"
        )
    if flags.replay is not None:
        return Replay(Recording.load(flags.replay), 1.0 if flags.pace is None else flags.pace)
    model = load(flags.checkpoint, flags.allow_code)
    model.require_tokenizer()
    engine = Engine(model, window=flags.window)
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
            "the screen needs a terminal, also as stderr: `msllm generate` prints rows to anything"
        )
    ChatApp(open_player(flags), out).run()
