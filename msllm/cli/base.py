"""What all commands share: how flags are parsed and explained, and how a command ends.

A command is a module in this folder. Its docstring and `EXAMPLES` are its help text,
`define_flags(parser)` declares its flags with argparse, and `run(flags)` calls the library and
returns the exit status (None: 0). Whatever is slow to import, jax above all, is imported inside
`run`, so that help and errors in flags appear at once.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from msllm.errors import RunError, UserError

if TYPE_CHECKING:
    from msllm.config import Config


def execute(command: Callable[[], int | None]) -> int:
    """Calls `command` with logging set up and returns the exit status.

    A `UserError` becomes one line on stderr and status 2, a `RunError` one line and status 1.
    """
    # Messages of msllm are shown as they are. Of the libraries below it, only warnings are shown.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("msllm").setLevel(logging.INFO)
    try:
        return command() or 0
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ ": did you mean X?" with the known word that is most like `word`; "" if none is."""
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]}?" if close else ""


class Parser(argparse.ArgumentParser):
    """The flags of one command. Bad flags raise UserError."""

    def __init__(self, prog: str, description: str, examples: str = ""):
        lines = "\n".join(f"  {line}".rstrip() for line in examples.strip().splitlines())
        super().__init__(
            prog,
            description=description.strip(),
            epilog=f"examples:\n{lines}" if lines else None,
            formatter_class=_HelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self._positionals.title, self._optionals.title = "arguments", "flags"
        self.add_argument("--help", "-h", action="help", help="Show this text and exit.")
        self._takes_config = False

    def add_config(self) -> None:
        """Adds `--config=FILE` and its overrides. `parse` turns them into a `Config`."""
        self._takes_config = True
        self.add_argument(
            "--config",
            metavar="FILE",
            required=True,
            help="Python file whose get_config() returns the settings, e.g. configs/quickstart.py.",
        )
        self.add_argument(
            "--config.KEY",
            metavar="VALUE",
            help="Override a setting, e.g. --config.optim.lr=1e-3 (msllm/config.py lists all).",
        )

    def add_allow_code(self) -> None:
        """Adds `--allow_code`, for commands that load a checkpoint."""
        self.add_argument(
            "--allow_code",
            action="store_true",
            help="Import layers outside of msllm that the checkpoint names. They can run any code.",
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The values of all flags. Raises UserError.

        With `add_config`, `config` is the `Config` with all overrides, and `config_file` the path
        of its file.
        """
        self._refuse_unknown(arguments)
        flags, rest = self.parse_known_args([self._without_boolean(text) for text in arguments])
        if self._takes_config:
            flags.config_file = flags.config
            flags.config, rest = _read_config(flags.config, rest)
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}: write options as --name=value")
        return flags

    def error(self, message: str) -> NoReturn:
        """Raises UserError. argparse calls this for flags that it cannot parse."""
        required = re.fullmatch("the following arguments are required: (.*)", message)
        message = f"{required[1]} must be given" if required else message
        message = re.sub("^argument ([^:]+): is ", r"\1 is ", message).removeprefix("argument ")
        raise UserError(f"{message} (see {self.prog} --help)")

    def _refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Raises UserError for a flag that the command does not have."""
        known = [name for action in self._actions for name in action.option_strings]
        for text in arguments:
            name, _, _ = text.partition("=")
            is_override = self._takes_config and re.match(r"--(no)?config\.", name)
            is_flag = re.match("--?[a-zA-Z]", name)  # not a negative number
            if is_flag and name not in known and not is_override:
                hint = did_you_mean(name, known)
                raise UserError(f"unknown flag {name}{hint} ({self.prog} --help lists all flags)")

    def _without_boolean(self, text: str) -> str:
        """`--name=true` and `--name=false` of a Switch as `--name` and `--noname`."""
        name, _, value = text.partition("=")
        for action in self._actions:
            if isinstance(action, Switch) and action.option_strings[0] == name:
                return dict(zip(("true", "false"), action.option_strings)).get(value.lower(), text)
        return text


class Switch(argparse.Action):
    """A flag without a value: `--name` is True, `--noname` is False."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        names = [option_strings[0], option_strings[0].replace("--", "--no", 1)]
        super().__init__(names, dest, nargs=0, **options)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Stores the value. argparse calls this."""
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Flags as `--name=VALUE`, each with its default. The usage line has only what is required."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=80)

    def add_usage(self, usage, actions, groups, prefix=None) -> None:
        """Adds the usage line. argparse calls this."""
        needed = [self._format_action_invocation(a) for a in actions if a.required]
        if any(action.dest == "config" for action in actions):
            needed.append("[--config.KEY=VALUE ...]")
        super().add_usage(" ".join([self._prog, *needed, "[FLAGS]"]), actions, groups, prefix)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return str(action.metavar or action.dest)
        if isinstance(action, Switch):
            name = action.option_strings[0]
            return name if action.default is False else name.replace("--", "--[no]", 1)
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        value = action.metavar or "|".join(map(str, action.choices or ()))
        return f"{action.option_strings[0]}={value}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.required and action.option_strings:
            return f"{text} Required."
        is_empty = action.default in (None, "", [], argparse.SUPPRESS)
        if isinstance(action, Switch) or is_empty or action.default is False:
            return text
        return f"{text} Default: {action.default}."


def whole(least: int = 0) -> Callable[[str], int]:
    """The type of a flag that takes a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}: must be a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"is {value}: must be at least {least}")
        return value

    return parse


def comma_list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of a flag that takes values separated by commas, each of the type `kind`."""

    def parse(text: str) -> list[Any]:
        return [kind(word.strip()) for word in text.split(",")] if text else []

    return parse


def output_file(text: str) -> pathlib.Path:
    """The type of a flag that names a file to write."""
    path = pathlib.Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"is {text!r}: there is no directory {path.parent}, create it first"
        )
    return path


def given_flags(
    flags: argparse.Namespace, names: Iterable[str], allowed: Sequence[str], verb: str
) -> dict[str, Any]:
    """Those of the flags `names` that were given, i.e. are not None.

    Raises UserError if one of them is not `allowed` with the command's first argument, `verb`.
    """
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    for name in given:
        if name not in allowed:
            takes = ", ".join(f"--{other}" for other in allowed)
            raise UserError(f"{verb} takes no --{name}: it takes {takes}")
    return given


def _read_config(file: str, arguments: list[str]) -> tuple[Config, list[str]]:
    """The config of a file with the overrides among `arguments`, and the other arguments."""
    from absl import flags
    from ml_collections import config_flags

    from msllm.config import from_config_dict

    if not pathlib.Path(file.partition(":")[0]).is_file():
        raise UserError(f"--config is {file!r}: there is no such file")
    arguments = ["msllm", f"--config={file}", *arguments]
    values = flags.FlagValues()  # not the global one: a command can be called from any program
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        rest = values(arguments, known_only=True)[1:]
    except Exception as error:  # the file may raise anything
        raise UserError(_explain(file, error)) from error
    return from_config_dict(values.config), rest


def _explain(file: str, error: Exception) -> str:
    """What is wrong with a config file or an override, in one line."""
    path = pathlib.Path(file.partition(":")[0]).resolve()
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename).resolve() == path]
    where = f"--config={file}: " + (f"line {lines[-1]}: " if lines else "")
    listed = "(msllm/config.py lists all settings)"
    if close := re.search(r'Did you mean "(.*?)" instead of "(.*?)"', str(error)):
        return f"{where}unknown key {close[2]}: did you mean {close[1]}? {listed}"
    text = " ".join(str(error).split())
    return f"{where}{type(error).__name__}: {text}" if lines else f"{where}{text} {listed}"
