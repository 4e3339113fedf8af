"""Talks with a checkpoint on a full screen: a column for each stream, typing at any time while the model goes on.

    msllm chat --checkpoint=DIR --pace=4 --temperature=output=0.7
    msllm chat --replay=chat.npz

The first is saved by a key; the second shows what was saved, without a checkpoint. docs/chat.md has the keys.
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags, logging

from msllm import errors
from msllm.chat.player import Live, Player, Replay, warm_up
from msllm.chat.recording import Recording
from msllm.cli import generate
from msllm.decode.engine import Engine
from msllm.errors import UserError
from msllm.weights.load import load


def player(checkpoint: str | None, replay: str | None, pace: float | None, window: int) -> Player:
    """What the flags ask for: a recording, or a session for which everything is compiled. Raises UserError."""
    if (checkpoint is None) == (replay is None):
        raise UserError(
            "give either --checkpoint=DIR, to talk with a model, or --replay=FILE, to see a recording"
        )
    if replay is not None:
        return Replay(Recording.load(replay), 1.0 if pace is None else pace)
    model = load(checkpoint)
    if model.tokenizer is None:
        raise UserError(
            f"--checkpoint={checkpoint} has no tokenizer: use msllm.Engine with token ids"
        )
    engine = Engine(model, window=window)
    print("compiling ...", file=sys.stderr)
    warm_up(engine)
    return Live(engine, generate.options(model.streams), 4.0 if pace is None else pace)


def main(_) -> None:
    """Opens the screen that the flags ask for."""
    logging.set_verbosity(logging.WARNING)  # orbax reports everything that it opens
    flag = flags.FLAGS
    try:
        from msllm.chat.screen import ChatApp  # textual comes with the extra `chat` alone
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "textual":
            raise
        raise UserError(
            "the screen needs the package textual: pip install 'msllm[chat]'"
        ) from error
    out = pathlib.Path(flag.out)
    if out.suffix != ".npz" or not out.absolute().parent.is_dir():
        raise UserError(
            f"--out={out}: must be a name that ends in .npz, in a directory that exists"
        )
    if not all(
        stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)
    ):  # it draws on stderr
        raise UserError(
            "the screen needs a terminal, also as stderr: `msllm generate` prints rows to anything else"
        )
    ChatApp(player(flag.checkpoint, flag.replay, flag.pace, flag.window), out).run()


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "A checkpoint of msllm.")
    flags.DEFINE_string("replay", None, "A recording to show instead; needs no checkpoint.")
    flags.DEFINE_float(
        "pace",
        None,
        "Rows per second (default: 4); with --replay, times its own pace (default: 1).",
    )
    flags.DEFINE_integer(
        "window", 1024, "Rows that the model sees at most; the session goes on beyond."
    )
    flags.DEFINE_string(
        "out", "chat.npz", "Where ^S saves; if it is there already, NAME-2.npz and so on."
    )
    generate.define_options()
    errors.run(main)
