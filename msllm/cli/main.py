"""Pretrain and run multi-stream language models.

Prepare data, train on it, and generate or chat with the trained model.
msllm COMMAND --help describes a command and its flags.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence

from msllm import __version__
from msllm.cli import base
from msllm.errors import UserError
from msllm.runtime import environment

EXAMPLES = """
msllm prepare --config=configs/quickstart.py
msllm train --config=configs/quickstart.py --workdir=runs/quickstart
msllm generate --checkpoint=runs/quickstart --input="user=take 4 add 3 ?" --rows=20
"""

# The module of each command, in the order of the help text.
COMMANDS = {
    "init": "init",
    "prepare": "prepare",
    "inspect": "inspect_data",
    "flow": "flow",
    "train": "train",
    "study": "study",
    "evaluate": "evaluate",
    "likelihood": "likelihood",
    "interruptions": "interruptions",
    "monitor": "monitor",
    "score": "score",
    "generate": "generate",
    "chat": "chat",
    "serve": "serve",
    "convert": "convert",
    "aot": "aot",
    "bench": "bench",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `msllm ARGUMENTS` and returns the exit status.

    Args:
      arguments: the command line after `msllm`; None means that of this process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return base.execute(lambda: _run(arguments))


def load_command(name: str) -> types.ModuleType:
    """Imports the module of a command."""
    return importlib.import_module(f"msllm.cli.{COMMANDS[name]}")


def parser_of(name: str) -> base.Parser:
    """Returns the parser of a command, with its flags and its help text."""
    command = load_command(name)
    parser = base.Parser(f"msllm {name}", command.__doc__ or "", command.EXAMPLES)
    command.define_flags(parser)
    return parser


def _run(arguments: list[str]) -> int | None:
    if not arguments or arguments[0] in ("--help", "-h") or arguments == ["help"]:
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"msllm {__version__}")
        return 0
    name, *rest = arguments
    if name == "help":  # msllm help train
        name, *rest = *rest[:1], "--help"
    if name not in COMMANDS:
        hint = base.did_you_mean(name, COMMANDS)
        raise UserError(f"unknown command {name!r}{hint} (msllm --help lists the commands)")
    flags = parser_of(name).parse(rest)
    environment.refuse_x64()
    if not environment.jax_has_started():  # it has in a notebook that calls `main`
        environment.configure_jax()
    return load_command(name).run(flags)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: msllm COMMAND [FLAGS]",
            "       msllm --version",
            "",
            (__doc__ or "").strip(),
            "",
            "commands:",
            *(f"  {name:{width}}  {_summary(name)}" for name in COMMANDS),
            "",
            "examples:",
            *(f"  {line}" for line in EXAMPLES.strip().splitlines()),
        ]
    )


def _summary(name: str) -> str:
    return (load_command(name).__doc__ or "").partition("\n")[0]
