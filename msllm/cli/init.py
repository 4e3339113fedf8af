"""Write a first config for your own data.

Looks at the records, and chooses a converter, streams, a tokenizer, rows, a
model and a number of steps that fit the data and this machine. Says what it
chose and why, and which commands come next. The config is a commented Python
file, which you can change.

Reads chats in all forms of docs/data.md, pairs such as source and target,
plain text, and recordings with times.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shlex

from msllm.cli.base import Parser, Switch
from msllm.errors import UserError

EXAMPLES = """
msllm init mine --from=my.jsonl
msllm init experiments/mine.py --from="chats/*.parquet" --minutes=30
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_argument(
        "name",
        metavar="NAME",
        help="Name of the run. The config is configs/NAME.py; a path that ends in .py is the "
        "config itself.",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        required=True,
        help="File or glob with the data, as config.data.path.",
    )
    parser.add_argument(
        "--format",
        metavar="NAME",
        default="",
        help="Format of the files, as config.data.format. Default: the file names decide.",
    )
    parser.add_argument(
        "--minutes",
        metavar="N",
        type=_minutes,
        help="How long training should take at most: CPU-minutes on a CPU, minutes on an "
        "accelerator. Default: 4 on a CPU, 60 on an accelerator.",
    )
    parser.add_argument(
        "--force", action=Switch, default=False, help="Overwrite the config if it exists."
    )


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}: must be a number of minutes") from None
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"is {text}: must be in (0, 1000000]")
    return value


def run(flags: argparse.Namespace) -> None:
    """Writes the config and prints what it holds."""
    from msllm.runtime.files import write_atomically
    from msllm.starter.plan import make_plan
    from msllm.starter.render import next_commands, render, summary
    from msllm.starter.survey import survey

    path, name = _config_file(flags.name)
    if path.exists() and not flags.force:
        raise UserError(f"{path} exists: choose another NAME, or overwrite it with --force")
    found = survey(flags.source, flags.format)
    plan = make_plan(found, f"data/{name}", flags.minutes or 0.0)
    commands = next_commands(str(path), name, found, plan)
    given = [f"msllm init {shlex.quote(flags.name)} --from={shlex.quote(flags.source)}"]
    if flags.format:
        given.append(f"--format={shlex.quote(flags.format)}")
    if flags.minutes:
        given.append(f"--minutes={flags.minutes:g}")
    text = render(name, " ".join(given), commands, found, plan)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}): choose another NAME") from error
    print(summary(found, plan), end="")
    for note in found.notes:
        print(f"  {note}")
    for setting, why in plan.reasons.items():
        print(f"  {setting}: {_value(plan.config, setting)}{why}")
    print(f"\nwrote {path}. Next:\n")
    for command in commands:
        print(f"    {command}")


def _config_file(name: str) -> tuple[pathlib.Path, str]:
    """Returns the path of the config, and the name of the run. Raises UserError."""
    path = pathlib.Path(name).expanduser()
    if path.suffix != ".py":
        path = pathlib.Path("configs", f"{name}.py")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", path.stem) or (
        path.suffix != pathlib.Path(name).suffix and "/" in name
    ):
        raise UserError(
            f"NAME is {name!r}: must consist of letters, digits and _ . -, or be the path of a"
            " .py file of such a name"
        )
    return path, path.stem


def _value(config: object, setting: str) -> str:
    """Returns the value of a setting for the report; "" for a section."""
    for part in setting.split("."):
        config = getattr(config, part)
    return f"{config}, " if isinstance(config, (int, float, str)) else ""
