"""Converters: from files (or a generator) to tables. `config.data.converter` names one, `config.data.options` sets it.

A converter is a function (layout, part of the input) -> tables, lazily, before delays. It encodes text only through
`layout.tokenizer`, so the same function also yields the texts that a tokenizer is trained on. Most are functions of
one record, made converters by `each_record`; so is a converter of the user's own, "package.module:function".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from msllm.data.converters.layout import Choice, Layout, Recorder, each_record
from msllm.data.sources import BadRecords, Part
from msllm.data.tables import Table, shift
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer


class Converter(NamedTuple):
    """A converter, its options with their defaults, and what it makes of its input."""

    function: Callable[[Layout, Part], Iterator[Table]]
    options: Mapping[str, Any] | None  # None: any
    reads: str = "jsonl"  # format of files whose names do not tell; "": it reads none
    pieces: bool = False  # tables of more than T rows are continued in others, not cut


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
    """The converter that `config.data.converter` names, and its options with defaults filled in. Raises UserError."""
    if ":" in name:
        return Converter(each_record(import_object(name, "config.data.converter")), None), dict(
            options
        )
    if name not in CONVERTERS:
        raise UserError(
            f"config.data.converter is {name!r}: must be one of {', '.join(CONVERTERS)}, or package.module:function"
        )
    known = CONVERTERS[name].options
    for key in options:
        if key not in known:
            raise UserError(
                f"unknown option config.data.options.{key}: {name} knows {', '.join(known) or 'none'}"
            )
    return CONVERTERS[name], {
        key: _option(key, options.get(key, default), default) for key, default in known.items()
    }


def _option(key: str, value: Any, default: Any) -> Any:
    """The value of an option, as JSON knows it; its default says what it may be."""
    value = list(value) if isinstance(value, tuple) and not isinstance(value, Choice) else value
    if not isinstance(default, Choice):
        if type(default) is float and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise UserError(
                f"config.data.options.{key} is {value!r}: expected {type(default).__name__}"
            )
        return value
    value = default.default if value is default else value
    for item in value if isinstance(value, list) and value else [value]:
        if type(item) is not int:
            raise UserError(
                f"config.data.options.{key} is {value!r}: expected int, or a list of them to draw from"
            )
        if item < default.least:
            raise UserError(
                f"config.data.options.{key} is {value!r}: must be at least {default.least}"
            )
    return value


def input_parts(config: Config) -> list[Part | None]:
    """The parts of the input of `config.data`, in order; [None] where the converter reads no files."""
    converter, _ = get_converter(config.data.converter, config.data.options)
    return (
        sources.parts(config.data.path, config.data.format, converter.reads)
        if converter.reads
        else [None]
    )


def input_portions(config: Config) -> list[list[Part | None]]:
    """The same parts in portions for one process each; they depend on the input alone."""
    converter, _ = get_converter(config.data.converter, config.data.options)
    return (
        sources.portions(config.data.path, config.data.format, converter.reads)
        if converter.reads
        else [[None]]
    )


def convert(
    config: Config, spec: StreamSpec, tokenizer: Tokenizer | Recorder, bad: BadRecords | None = None
) -> Iterator[Table]:
    """The tables of `config.data`, in input order, delays applied. Raises UserError.

    `bad` is told of the records and the bad ones among them.
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
    """The tables of one part of the input, as `convert`."""
    converter, options = get_converter(config.data.converter, config.data.options)
    data, changes = config.data, config.data.vary
    delays = changes.delays or (spec.delays,)
    written = data_spec(config, spec)
    rows = data.rows - max(map(max, delays))
    if rows < 2:
        raise UserError(
            f"config.data.rows is {data.rows}: delays of {delays} rows leave none of it"
        )
    layout = Layout(written, tokenizer, rows, options, bad)
    columns = [written.index(name) for name in spec.names]
    exchanged = [spec.index(name) for name in changes.permute]
    for table in converter.function(layout, part):
        if columns != list(range(written.size)):
            table = vary.select(table, columns)
        if exchanged:
            table = vary.permute(table, exchanged)
        if changes != VaryConfig():
            table = vary.insert_silence(table, changes, tokenizer.silence_id)
        drawn = vary.draw(delays, "delays", table.example)
        for piece in vary.pieces(table, rows) if converter.pieces else [table]:
            yield shift(piece, drawn)


def data_spec(config: Config, spec: StreamSpec) -> StreamSpec:
    """The streams that the converter writes: the model's, or those of `config.data.streams`. Raises UserError."""
    names = config.data.streams
    if not names:
        return spec
    missing = [name for name in spec.names if name not in names]
    if missing:
        raise UserError(
            f"config.data.streams is {names}: it lacks {', '.join(missing)} of config.streams.names; name those too"
            " (they are silent if nothing is written to them)"
        )
    kinds = tuple(spec.kinds[spec.index(name)] if name in spec.names else "input" for name in names)
    return StreamSpec.from_config(
        StreamsConfig(names=names, kinds=kinds, loss_weights=(1.0,) * len(names))
    )


def texts(
    config: Config,
    spec: StreamSpec,
    portions: Sequence[list[Part | None]] = (),
    characters: float = math.inf,
) -> Iterator[str]:
    """The texts of `config.data`: what its tokenizer is trained on.

    `characters`: how many these may have in all. Of more, an equal share comes from the beginning of every one of
    `portions`; without any, and with `config.data.max_examples`, all comes from the beginning of the input.
    """
    if not portions or config.data.max_examples:
        portions = [input_parts(config)]
    bad = BadRecords(config.data.bad_percent)
    for portion in portions:
        recorder, taken = Recorder(), 0
        tables = (
            table for part in portion for table in convert_part(config, spec, recorder, part, bad)
        )
        for _ in itertools.chain(
            itertools.islice(tables, config.data.max_examples or None), [None]
        ):
            for text in recorder.texts:
                if taken > characters / len(portions):
                    break
                taken += len(text)
                yield text
            recorder.texts.clear()
            if taken > characters / len(portions):
                break
