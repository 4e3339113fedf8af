"""Flag parsing, help text, shared flags and exit statuses of all commands.

A command is a module in this folder with four parts:

- its docstring: the help text, whose first line is the summary in `msllm --help`;
- `EXAMPLES`: one to three command lines that the help text shows;
- `define_flags(parser)`: declares the flags with argparse;
- `run(flags)`: calls the library and returns the exit status (None means 0).

Commands import slow modules, such as jax, inside `run`, so that help and flag errors appear at
once.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import io
import json
import logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from msllm.errors import RunError, UserError

if TYPE_CHECKING:
    from msllm.config import Config
    from msllm.weights.load import LoadedModel

EXIT_BROKEN_PIPE = 128 + 13  # as a shell reports SIGPIPE
EXIT_INTERRUPTED = 128 + 2  # as a shell reports SIGINT


def execute(command: Callable[[], int | None]) -> int:
    """Sets up logging, calls `command` and returns the exit status.

    A `UserError` prints one line on stderr and gives status 2. A `RunError` prints one line and
    gives status 1. Ctrl-C prints one line, unless the command handles it.
    """
    # Show the info messages of msllm, but only warnings of other libraries.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("msllm").setLevel(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):  # in tests it is something else
        sys.stdout.reconfigure(errors="replace")  # its encoding may lack a character
    try:
        return command() or 0
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # the reader of the output has what it wanted, as with `| head`
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        _flush_stdout()


def _flush_stdout() -> None:
    """Flushes stdout. If that fails, redirects it, so that Python does not fail again at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ": did you mean X?" for the known word closest to `word`, or "" if none is close."""
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]}?" if close else ""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError for bad flags and formats help in one style.

    The methods `add_...` declare flags that several commands share.
    """

    def __init__(self, prog: str, description: str, examples: str = "") -> None:
        """Creates the parser.

        Args:
          prog: the command as the user types it, e.g. "msllm train".
          description: the help text above the flags.
          examples: command lines that the help text shows below the flags, one per line.
        """
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
        self._words: list[str] = []  # the arguments that are neither flags nor their values

    def add_config(self, *, required: bool = True) -> None:
        """Adds `--config=FILE` and its overrides, which `parse` turns into a `Config`.

        Args:
          required: whether the command needs a config. Without one, `config` is None.
        """
        self._takes_config = True
        self.add_argument(
            "--config",
            metavar="FILE",
            required=required,
            help="Python file that defines get_config(), e.g. configs/quickstart.py.",
        )
        self.add_argument(
            "--config.KEY",
            metavar="VALUE",
            help="Override a setting, e.g. --config.optim.lr=1e-3. msllm/config.py lists all "
            "settings. Repeatable.",
        )

    def add_checkpoint(self, *, required: bool = True, hugging_face: bool = False) -> None:
        """Adds `--checkpoint=DIR` and `--allow_code`, which `load_model` reads.

        Args:
          required: whether the command needs a checkpoint.
          hugging_face: whether the command also takes any Hugging Face folder.
        """
        folder = "a Hugging Face folder" if hugging_face else "a folder that msllm convert wrote"
        self.add_argument(
            "--checkpoint",
            metavar="DIR",
            required=required,
            help="Workdir of a run (its newest checkpoint is used), one of its checkpoints, or "
            f"{folder}.",
        )
        self.add_argument(
            "--allow_code",
            action=Switch,
            default=False,
            help="Import code outside msllm that the checkpoint names, such as a layer. The code "
            "can do anything: use this flag only for checkpoints that you trust.",
        )
        self.add_argument(
            "--threads",
            metavar="N|GROUP=N,...",
            type=threads,
            help="Number of members of the groups of interchangeable streams (docs/groups.md). "
            "Default: as in the checkpoint.",
        )

    def add_visibility(self) -> None:
        """Adds `--visibility` and `--skip_silence`, which `load_model` applies to the model."""
        from msllm.streams import PRESETS

        self.add_argument(
            "--visibility",
            choices=PRESETS,
            help="Which streams see each other. Default: as in the checkpoint.",
        )
        self.add_argument(
            "--skip_silence",
            action=Switch,
            help="Hide silent cells from attention. Default: as in the checkpoint.",
        )

    def add_data(self) -> None:
        """Adds `--data=DIR`, a directory of prepared data."""
        self.add_argument(
            "--data",
            metavar="DIR",
            default="",
            help="Directory that msllm prepare wrote. Default: the data that the checkpoint was "
            "trained on.",
        )

    def add_json(self) -> None:
        """Adds `--json=FILE`, a file for `write_json`."""
        self.add_argument(
            "--json", metavar="FILE", type=output_file, help="Also write the result to this file."
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses command-line arguments.

        After `add_config`, `config` in the result is the `Config` with all overrides applied,
        `config_file` is the path of its file, and `overrides` are the arguments that override
        settings, as given. A command that writes a command line passes these on.

        Raises UserError if the arguments are invalid.
        """
        self._refuse_unknown(arguments)
        self._words = [
            word
            for before, word in zip(["", *arguments], arguments)
            if not word.startswith("-") and ("=" in before or not before.startswith("--"))
        ]
        flags, rest = self.parse_known_args([self._without_boolean(text) for text in arguments])
        for action in self._actions:
            value = getattr(flags, action.dest, None)
            if action.metavar in ("DIR", "FILE") and value == "" != action.default:
                name = (*action.option_strings, action.metavar)[0]
                raise UserError(f"{name} is empty: give a path (see {self.prog} --help)")
            # A shell leaves the ~ of --name=~/path as it is.
            if action.metavar in ("DIR", "FILE") and isinstance(value, str):
                setattr(flags, action.dest, os.path.expanduser(value))
        if self._takes_config:
            if getattr(flags, "config.KEY") is not None:
                raise UserError(
                    "unknown config key config.KEY: --config.KEY stands for a setting, such as "
                    "--config.optim.lr=1e-3 (msllm/config.py lists all settings)"
                )
            if flags.config is None and rest:
                raise UserError(f"{rest[0]} overrides a setting of a config: give --config=FILE")
        if self._takes_config and flags.config is not None:
            flags.config_file, flags.overrides = flags.config, rest
            flags.config, rest = _read_config(flags.config, rest)
        if rest:
            raise UserError(
                f"unexpected argument {rest[0]!r}: write flags as --name=value "
                f"(see {self.prog} --help)"
            )
        return flags

    def error(self, message: str) -> NoReturn:
        """Raises UserError. argparse calls this method for arguments that it cannot parse."""
        required = re.fullmatch("the following arguments are required: (.*)", message)
        if required:
            message = f"{required[1]} must be given"
            first = required[1].partition(",")[0]
            # A word with a line break or an invisible character says nothing as a suggestion.
            if first.startswith("--") and len(self._words) == 1 and self._words[0].isprintable():
                message += f": did you mean {first}={self._words[0]}?"
        message = re.sub("^argument ([^:]+): is ", r"\1 is ", message).removeprefix("argument ")
        raise UserError(f"{message} (see {self.prog} --help)")

    def _refuse_unknown(self, arguments: Sequence[str]) -> None:
        """Raises UserError if the command does not have one of the flags."""
        known = [name for action in self._actions for name in action.option_strings]
        for text in arguments:
            name, _, _ = text.partition("=")
            is_override = self._takes_config and re.match(r"--(no)?config\.", name)
            is_flag = re.match("--?[a-zA-Z]", name)  # not a negative number
            if is_flag and name not in known and not is_override:
                setting = _setting_named(name.lstrip("-")) if self._takes_config else ""
                hint = f": did you mean --config.{setting}?" if setting else ""
                hint = hint or did_you_mean(name, known)
                raise UserError(f"unknown flag {name}{hint} ({self.prog} --help lists all flags)")

    def _without_boolean(self, text: str) -> str:
        """Rewrites `--name=true` and `--name=false` of a Switch to `--name` and `--noname`."""
        name, _, value = text.partition("=")
        for action in self._actions:
            if isinstance(action, Switch) and action.option_strings[0] == name:
                on, off = action.option_strings
                return {"true": on, "false": off}.get(value.lower(), text)
        return text


class Switch(argparse.Action):
    """A boolean flag: `--name` stores True and `--noname` stores False."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        names = [option_strings[0], option_strings[0].replace("--", "--no", 1)]
        super().__init__(names, dest, nargs=0, **options)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Stores the value. argparse calls this method."""
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows flags as `--name=VALUE` with their defaults, and required flags in the usage line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=80)

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        """Adds the usage line. argparse calls this method."""
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


def _integer(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}: must be a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"is {value}: must be at least {minimum}")
        return value

    return parse


# Flag types.
positive_int = _integer(1)
non_negative_int = _integer(0)


def comma_list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Returns the flag type for comma-separated values, each parsed by `kind`."""

    def parse(text: str) -> list[Any]:
        return [kind(word.strip()) for word in text.split(",")] if text else []

    return parse


def threads(text: str) -> int | dict[str, int]:
    """Flag type: a number of threads, or numbers by group, such as "thread=16,input=16"."""
    if "=" not in text:
        return positive_int(text)
    sizes = dict[str, int]()
    for part in text.split(","):
        name, separator, size = part.strip().rpartition("=")
        if not separator or name in sizes:
            raise argparse.ArgumentTypeError(
                f"is {text!r}: write a number, or one for each group, such as thread=16,input=16"
            )
        sizes[name] = positive_int(size)
    return sizes


def output_file(text: str) -> pathlib.Path:
    """Flag type: the path of a file to write, in a directory that exists."""
    path = pathlib.Path(text).expanduser()
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"is {text!r}: there is no directory {path.parent}; create it first"
        )
    return path


def given_flags(
    flags: argparse.Namespace, names: Iterable[str], allowed: Sequence[str], verb: str
) -> dict[str, Any]:
    """Returns the flags among `names` that the user gave, i.e. that are not None.

    Args:
      flags: the parsed flags.
      names: the flags to look at.
      allowed: the flags that `verb` takes.
      verb: the command's first argument, for the error message.

    Raises UserError if one of the given flags is not allowed.
    """
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    for name in given:
        if name not in allowed:
            takes = ", ".join(f"--{other}" for other in allowed)
            raise UserError(f"{verb} takes no --{name}: it takes {takes}")
    return given


def load_model(flags: argparse.Namespace, path: str = "") -> LoadedModel:
    """Loads the model that the flags of `add_checkpoint` and `add_visibility` describe.

    The number of threads changes before the visibility does.

    Args:
      flags: the parsed flags.
      path: the checkpoint to load in place of `--checkpoint`.
    """
    from msllm.weights.load import load

    model = load(path or flags.checkpoint, flags.allow_code)
    if flags.threads is not None:
        model = model.with_threads(flags.threads)
    if "visibility" in flags and flags.visibility:
        model = model.with_visibility(flags.visibility)
    if "skip_silence" in flags and flags.skip_silence is not None:
        model = model.with_streams(skip_silence=flags.skip_silence)
    return model


def write_json(file: str | pathlib.Path | None, value: Any) -> None:
    """Writes a value as JSON to the file of a flag. Does nothing if the flag was not given."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def write_text(file: str | pathlib.Path | None, text: str) -> None:
    """Writes text to the file of a flag. Does nothing if the flag was not given."""
    from msllm.runtime.files import write_atomically

    if file:
        write_atomically(file, text)


def _setting_named(word: str) -> str:
    """Returns the path of the setting with this name, e.g. optim.lr for lr; "": not just one."""
    from msllm.config import default_config

    found = [path for path in _paths(default_config().to_dict()) if path.split(".")[-1] == word]
    return word if word in found else found[0] if len(found) == 1 else ""


def _paths(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted paths of the settings in nested dicts."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _read_config(file: str, arguments: list[str]) -> tuple[Config, list[str]]:
    """Returns the config of a file with its overrides, and the arguments that are not overrides."""
    from absl import flags
    from ml_collections import config_flags

    from msllm.config import from_config_dict
    from msllm.runtime.files import describe_missing

    if not os.path.isfile(file.partition(":")[0]):  # false, too, for names that are too long
        what = "a folder, not a file" if os.path.isdir(file) else "there is no such file"
        within = os.path.join(file, "NAME.py") if os.path.isdir(file) else file.partition(":")[0]
        raise UserError(f"--config is {file!r}: {what} ({describe_missing(within)})")
    overrides, options = _split_overrides(arguments)
    arguments = ["msllm", f"--config={file}", *overrides]
    # A registry of its own: a program that calls this function may use the global flags of absl.
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        rest = values(arguments, known_only=True)[1:]
    except Exception as error:  # the file may raise anything
        raise UserError(_explain(file, error)) from error
    settings = values.config.to_dict()
    for path, text in options.items():
        _set_option(settings, path, text)
    return from_config_dict(settings), rest


def _split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Splits off the overrides of free-form options, which config_flags would not add.

    Also rewrites `a,b` for a tuple of strings, which config_flags would read as one string.

    Returns:
      The arguments for config_flags, and {dotted path without "config.": text}.

    Raises UserError for an override of a setting that does not exist.
    """
    from msllm.config import setting_type

    others, options = [], {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        override = re.fullmatch(r"--(?:no)?config\.(.+)", name)
        kind = setting_type(override[1]) if override else None
        if override and kind is Any and "=" in argument:
            options[override[1]] = text
            continue
        if kind == tuple[str, ...] and "," in text and text[0] not in "([\"'":
            argument = f"{name}={tuple(word.strip() for word in text.split(',') if word.strip())!r}"
        others.append(argument)
    return others, options


def _set_option(settings: dict[str, Any], path: str, text: str) -> None:
    """Sets one of the free-form options in nested dicts. A string need not be quoted."""
    *sections, last = path.split(".")
    for i, key in enumerate(sections):
        settings = settings.setdefault(key, {})
        if not isinstance(settings, dict):
            section = ".".join(sections[: i + 1])
            raise UserError(
                f"--config.{path}={text}: config.{section} is {settings!r}, not a section"
            )
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    settings[last] = text if isinstance(settings.get(last), str) else value


def _explain(file: str, error: Exception) -> str:
    """Describes an error in a config file or an override in one line."""
    path = pathlib.Path(file.partition(":")[0]).resolve()
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if pathlib.Path(frame.filename).resolve() == path]
    where = f"--config={file}: " + (f"line {lines[-1]}: " if lines else "")
    listed = "(msllm/config.py lists all settings)"
    if close := re.search(r'Did you mean "(.*?)" instead of "(.*?)"', str(error)):
        return f"{where}unknown key {close[2]}: did you mean {close[1]}? {listed}"
    if unknown := re.search(r'Key "(.*?)" does not exist', str(error)):
        return f"{where}unknown key {unknown[1]} {listed}"
    text = " ".join(str(error).split())
    if lines:
        return f"{where}{type(error).__name__}: {text}"
    # An override that is no number: the rule, in place of Python's words.
    text = re.sub(r"invalid literal for int\(\) with base 10: .*", "must be a whole number", text)
    text = re.sub(r"could not convert string to float: .*", "must be a number", text)
    return f"{where}{text} {listed}"
