"""Converters: functions that make tables from files or generate them. See `config.data.converter`.

A converter takes a layout and a part of the input, and yields tables lazily, before delays are
applied. It encodes text only through the layout, so that the same function also yields the texts
that a tokenizer is trained on. Most converters are functions of one record, as are those that users
write (docs/extending/converter.md); `each_record` turns such a function into a converter.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from msllm.config import Config, StreamsConfig, VaryConfig, import_object
from msllm.data import sources
from msllm.data.converters import (
    aligned,
    chat,
    dictation,
    gsm8k,
    parallel_documents,
    single,
    tables,
    timed,
    tools,
    vary,
    wait_k,
)
from msllm.data.converters.layout import Choice, Convert, Layout, Recorder, each_record
from msllm.data.sources import BadRecords, Part
from msllm.data.tables import Table, shift
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer


class Converter(NamedTuple):
    """A converter, its options with their defaults, and how its input and tables are treated."""

    function: Convert
    options: Mapping[str, Any] | None  # None: any options
    reads: str = "jsonl"  # the format of files whose names do not determine it; "": reads no files
    pieces: bool = False  # divide tables of more than T rows into pieces instead of cutting them


CONVERTERS = {
    "chat": Converter(chat.convert, chat.OPTIONS),
    "wait_k": Converter(wait_k.convert, wait_k.OPTIONS),
    "timed": Converter(timed.convert, timed.OPTIONS, pieces=True),
    "tools": Converter(tools.convert, tools.OPTIONS),
    "aligned": Converter(aligned.convert, aligned.OPTIONS, pieces=True),
    "single": Converter(single.convert, single.OPTIONS, reads="text", pieces=True),
    "parallel_documents": Converter(
        parallel_documents.convert, parallel_documents.OPTIONS, reads="text", pieces=True
    ),
    "gsm8k": Converter(gsm8k.convert, gsm8k.OPTIONS),
    "tables": Converter(tables.convert, tables.OPTIONS),
    "dictation": Converter(dictation.convert, dictation.OPTIONS, reads=""),
    "dictation_single": Converter(dictation.convert_single, dictation.OPTIONS, reads=""),
}


def get_converter(name: str, options: Mapping[str, Any]) -> tuple[Converter, dict[str, Any]]:
    """Returns the converter of a name or import path, and its options with defaults filled in.

    Raises UserError if there is no such converter, or it does not accept the options.
    """
    if ":" in name:
        function = each_record(import_object(name, "config.data.converter"))
        return Converter(function, options=None), dict(options)
    if name not in CONVERTERS:
        raise UserError(
            f"config.data.converter is {name!r}: must be one of {', '.join(CONVERTERS)}, or"
            " package.module:function"
        )
    known = CONVERTERS[name].options or {}
    for key in options:
        if key not in known:
            names = ", ".join(known) or "none"
            raise UserError(
                f"unknown option config.data.options.{key}: the options of {name} are: {names}"
            )
    values = {
        key: _check_option(key, options.get(key, default), default)
        for key, default in known.items()
    }
    return CONVERTERS[name], values


def _check_option(key: str, value: Any, default: Any) -> Any:
    """Returns an option as a JSON value, after checking it against the type of its default."""
    if isinstance(default, Choice):
        return default.default if value is default else _check_choice(key, value, default.least)
    if isinstance(value, tuple):
        value = list(value)
    if type(default) is float and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise UserError(
            f"config.data.options.{key} is {value!r}: expected {type(default).__name__}"
        )
    return value


def _check_choice(key: str, value: Any, least: int) -> Any:
    """Returns the value of a `Choice`: an int or a list of ints. Raises UserError."""
    if isinstance(value, tuple):
        value = list(value)
    for item in value if isinstance(value, list) and value else [value]:
        if type(item) is not int:
            raise UserError(
                f"config.data.options.{key} is {value!r}: expected int, or a list of ints to draw"
                " from"
            )
        if item < least:
            raise UserError(f"config.data.options.{key} is {value!r}: must be at least {least}")
    return value


def input_parts(config: Config) -> Sequence[Part | None]:
    """Returns the parts of the input of `config.data`, in order.

    [None] stands for the input of a converter that reads no files.
    """
    converter, _ = get_converter(config.data.converter, config.data.options)
    if not converter.reads:
        return [None]
    return sources.parts(config.data.path, config.data.format, converter.reads)


def input_portions(config: Config) -> Sequence[Sequence[Part | None]]:
    """Returns the parts of the input in portions, each for one process.

    The portions depend on the settings and the input, but not on the number of processes.
    """
    converter, _ = get_converter(config.data.converter, config.data.options)
    if not converter.reads:
        return [[None]]
    return sources.portions(config.data.path, config.data.format, converter.reads)


def convert(
    config: Config, spec: StreamSpec, tokenizer: Tokenizer | Recorder, bad: BadRecords | None = None
) -> Iterator[Table]:
    """Yields the tables of `config.data`, in the order of the input, with delays. Raises UserError.

    Args:
      config, spec, tokenizer: the settings, the streams of the model and the tokenizer.
      bad: counts the records; None: a new counter that allows `config.data.bad_percent`.
    """
    bad = bad or BadRecords(config.data.bad_percent)
    number = 0
    for part in input_parts(config):
        for table in convert_part(config, spec, tokenizer, part, bad):
            yield table
            number += 1
            if number == config.data.max_examples:
                return
    bad.finish()


def convert_part(
    config: Config,
    spec: StreamSpec,
    tokenizer: Tokenizer | Recorder,
    part: Part | None,
    bad: BadRecords,
) -> Iterator[Table]:
    """Yields the tables of one part of the input, as `convert` does."""
    data = config.data
    converter, options = get_converter(data.converter, data.options)
    delays = data.vary.delays or (spec.delays,)
    rows = data.rows - max(map(max, delays))
    if rows < 2:
        raise UserError(
            f"config.data.rows is {data.rows}: delays of {delays} rows leave none or one for an"
            " example; increase it, or use shorter delays"
        )
    written = data_spec(config, spec)
    layout = Layout(written, tokenizer, rows, options, bad)
    columns = [written.index(name) for name in spec.names]
    permuted = [spec.index(name) for name in data.vary.permute]
    for table in converter.function(layout, part):
        if columns != list(range(written.size)):
            table = vary.select(table, columns)
        if permuted:
            table = vary.permute(table, permuted)
        if data.vary != VaryConfig():
            table = vary.insert_silence(table, data.vary, tokenizer.silence_id)
        drawn = vary.draw(delays, "delays", table.example)
        for piece in vary.pieces(table, rows) if converter.pieces else [table]:
            yield shift(piece, drawn)


def data_spec(config: Config, spec: StreamSpec) -> StreamSpec:
    """Returns the streams that the converter writes: `config.data.streams`, or the model's.

    Raises UserError if a stream of the model is not among them.
    """
    names = config.data.streams
    if not names:
        return spec
    missing = [name for name in spec.names if name not in names]
    if missing:
        raise UserError(
            f"config.data.streams is {names}: it lacks {', '.join(missing)} of"
            " config.streams.names; add them (streams to which the converter does not write are"
            " silent)"
        )
    kinds = tuple(spec.kinds[spec.index(name)] if name in spec.names else "input" for name in names)
    weights = (1.0,) * len(names)
    return StreamSpec.from_config(StreamsConfig(names=names, kinds=kinds, loss_weights=weights))


def texts(
    config: Config,
    spec: StreamSpec,
    portions: Sequence[Sequence[Part | None]] = (),
    characters: float = math.inf,
) -> Iterator[str]:
    """Yields the texts of `config.data`, on which its tokenizer is trained.

    Args:
      config, spec: the settings, and the streams of the model.
      portions: the input in portions. If it is empty, or with `config.data.max_examples`, all input
        is one portion.
      characters: the number of characters to stop at. Each portion gives an equal share of them,
        from its beginning.
    """
    if not portions or config.data.max_examples:
        portions = [input_parts(config)]
    bad = BadRecords(config.data.bad_percent)
    for portion in portions:
        taken = 0
        for text in _portion_texts(config, spec, portion, bad):
            yield text
            taken += len(text)
            if taken > characters / len(portions):
                break


def _portion_texts(
    config: Config, spec: StreamSpec, portion: Sequence[Part | None], bad: BadRecords
) -> Iterator[str]:
    recorder = Recorder()
    tables = (
        table for part in portion for table in convert_part(config, spec, recorder, part, bad)
    )
    for _ in itertools.islice(tables, config.data.max_examples or None):
        yield from recorder.take()
    yield from recorder.take()  # texts of records at the end that gave no table
