"""Parses inputs ("stream=text") and per-stream options ("value" or "stream=value") of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from msllm.errors import UserError
from msllm.streams import StreamSpec

Value = TypeVar("Value", int, float)


def parse_inputs(arguments: Sequence[str], streams: StreamSpec) -> dict[str, str]:
    """The text of each input stream, from arguments "stream=text".

    Several texts of one stream are joined. Raises UserError for a stream that is not an input.
    """
    names = [name for name, kind in zip(streams.names, streams.kinds) if kind == "input"]
    inputs: dict[str, str] = {}
    for argument in arguments:
        name, separator, text = argument.partition("=")
        if not separator:
            example = names[0] if names else "STREAM"
            raise UserError(
                f"--input={argument!r}: write it as stream=text, e.g. --input='{example}=Hello'"
            )
        if streams.kinds[streams.index(name)] != "input":
            raise UserError(
                f"--input={argument!r}: {name} is generated; "
                f"inputs are {', '.join(names) or '(none)'}"
            )
        inputs[name] = inputs.get(name, "") + text
    return inputs


def parse_values(
    flag: str,
    arguments: Sequence[str],
    streams: StreamSpec,
    kind: Callable[[str], Value],
    default: Value,
) -> tuple[Value, ...]:
    """One value for each stream, from arguments "value" (all streams) and "stream=value".

    Later arguments win. Raises UserError for text that is not a number and for unknown streams.

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
            values[streams.index(name)] = value
        else:
            values = [value] * streams.size
    return tuple(values)
