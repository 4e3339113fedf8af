"""Sampling options of a session from the `sampling` of a frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from msllm.decode.script import DecodeOptions, per_stream
from msllm.errors import UserError
from msllm.streams import StreamSpec

# `mute` sets `ablated`, so that the log says which streams were muted.
FIELDS = tuple(field.name for field in dataclasses.fields(DecodeOptions) if field.name != "ablated")


def changed_options(
    options: DecodeOptions, sampling: Mapping[str, Any], streams: StreamSpec
) -> DecodeOptions:
    """The options with some values replaced.

    Args:
      options: the options before.
      sampling: {field of DecodeOptions: value for all streams, list of one value per stream, or
        {stream or group: value}, where other streams keep theirs}.
      streams: the streams of the model.

    Raises UserError.
    """
    arrays = None
    values: dict[str, Any] = {}
    for name, value in sampling.items():
        if name not in FIELDS:
            raise UserError(f"unknown option {name!r} in sampling: options are {', '.join(FIELDS)}")
        if isinstance(value, Mapping):
            arrays = per_stream(options, streams) if arrays is None else arrays
            if name not in arrays:
                raise UserError(f"{name} is {dict(value)!r}: must be one value for all streams")
            each = _current(options, name, streams)
            for stream, number in value.items():
                for member in streams.members(stream):
                    each[member] = number
            value = tuple(each)
        values[name] = tuple(value) if isinstance(value, list) else value
    changed = dataclasses.replace(options, **values)
    per_stream(changed, streams)  # checks the number of values
    return changed


def _current(options: DecodeOptions, name: str, streams: StreamSpec) -> list[Any]:
    """The values of an option, one per stream."""
    value = getattr(options, name)
    return list(value) if isinstance(value, tuple | list) else [value] * streams.size


def stored(options: DecodeOptions) -> dict[str, Any]:
    """The options as JSON stores them."""
    return dataclasses.asdict(options)
