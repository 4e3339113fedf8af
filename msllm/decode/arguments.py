"""Parses inputs ("stream=text") and per-stream options ("value" or "stream=value") of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from msllm.errors import UserError
from msllm.streams import StreamSpec

Value = TypeVar("Value", int, float)


def parse_inputs(arguments: Sequence[str], streams: StreamSpec) -> dict[str, str]:
    """Parses arguments "stream=text" to {input stream: text}.

    The texts of arguments for the same stream are joined. Raises UserError for a stream that is not
    an input.
    """
    inputs = parse_texts("input", arguments, streams)
    names = [name for name, kind in zip(streams.names, streams.kinds) if kind == "input"]
    for name, text in inputs.items():
        if name not in names:
            raise UserError(
                f"--input={f'{name}={text}'!r}: {name} is generated; inputs are"
                f" {', '.join(names) or '(none)'}; --force sets what other streams say"
            )
    return inputs


def parse_texts(flag: str, arguments: Sequence[str], streams: StreamSpec) -> dict[str, str]:
    """Parses arguments "stream=text" to {stream: text}.

    The texts of arguments for the same stream are joined. Raises UserError for unknown streams.

    Args:
      flag: the name of the flag, for error messages.
      arguments: the values of the flag.
      streams: the streams of the model.
    """
    texts: dict[str, str] = {}
    for argument in arguments:
        name, separator, text = argument.partition("=")
        if not separator:
            is_input = [kind == "input" for kind in streams.kinds]
            example = streams.names[is_input.index(True) if any(is_input) else 0]
            raise UserError(
                f"--{flag}={argument!r}: write it as stream=text, e.g. --{flag}='{example}=Hello'"
            )
        name = streams.names[streams.index(name)]
        texts[name] = texts.get(name, "") + text
    return texts


def parse_values(
    flag: str,
    arguments: Sequence[str],
    streams: StreamSpec,
    kind: Callable[[str], Value],
    default: Value,
) -> tuple[Value, ...]:
    """One value for each stream, from arguments "value" (all streams) and "stream=value".

    The name of a group sets all its members. Later arguments win. Raises UserError for text that is
    not a number and for unknown streams.

    Args:
      flag: the name of the flag, for error messages.
      kind: int or float.
    """
    values = [default] * streams.size
    for argument in arguments:
        name, separator, number = argument.rpartition("=")
        try:
            value = kind(number)
        except ValueError as error:
            raise UserError(
                f"--{flag}={argument}: {number!r} is not a number; write a value, or stream=value"
            ) from error
        if separator:
            for stream in streams.members(name):
                values[stream] = value
        else:
            values = [value] * streams.size
    return tuple(values)
