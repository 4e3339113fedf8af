"""Converters: functions that make tables from files or generate them. See `config.data.converter`.

A converter takes a layout and a part of the input, and yields tables lazily, before delays are
applied. It encodes text only through the layout, so that the same function also yields the texts
that a tokenizer is trained on. Most converters are functions of one record, as are those that users
write (docs/extending/converter.md); `each_record` turns such a function into a converter.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.config import Config, StreamsConfig, VaryConfig, import_object
from msllm.data import sources
from msllm.data.converters import (
    aligned,
    chat,
    dictation,
    gsm8k,
    lanes,
    misreport,
    parallel_documents,
    roles,
    shuffles,
    single,
    tables,
    timed,
    tools,
    vary,
    wait_k,
)
from msllm.data.converters.layout import Choice, Convert, Layout, Recorder, each_record
from msllm.data.sources import BadRecord, BadRecords, Part
from msllm.data.tables import Table, check_weights, shift
from msllm.errors import UserError
from msllm.groups import expand
from msllm.mail import Conflict, deliver_to_example
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer


class Converter(NamedTuple):
    """A converter, its options with their defaults, and how its input and tables are treated."""

    function: Convert
    options: Mapping[str, Any] | None  # None: any options; the converter is a user's
    reads: str = "jsonl"  # the format of files whose names do not determine it; "": reads no files
    pieces: bool = False  # divide tables of more than T rows into pieces instead of cutting them
    # The columns of csv and tsv files that do not name them; with a dot: the values of options.
    columns: tuple[str, ...] = ()
    # Raises UserError if other settings, or these streams of the model, do not fit the converter.
    check: Callable[[Config, StreamSpec, Mapping[str, Any]], None] | None = None


_EXAMPLE = re.compile("[0-9a-f]+")
# The options that name streams.
_STREAM_OPTIONS = ("roles", "calls", "results", "stream", "source_stream", "target_stream")

CONVERTERS = {
    "chat": Converter(chat.convert, chat.OPTIONS),
    "roles": Converter(roles.convert, roles.OPTIONS),
    "wait_k": Converter(wait_k.convert, wait_k.OPTIONS, columns=(".source", ".target")),
    "timed": Converter(timed.convert, timed.OPTIONS, pieces=True),
    "tools": Converter(tools.convert, tools.OPTIONS),
    "aligned": Converter(aligned.convert, aligned.OPTIONS, pieces=True),
    "single": Converter(
        single.convert, single.OPTIONS, reads="text", pieces=True, columns=(".key",)
    ),
    "parallel_documents": Converter(
        parallel_documents.convert,
        parallel_documents.OPTIONS,
        reads="text",
        pieces=True,
        columns=(".key",),
    ),
    "lanes": Converter(
        lanes.convert, lanes.OPTIONS, reads="text", columns=(".key",), check=lanes.check
    ),
    "gsm8k": Converter(gsm8k.convert, gsm8k.OPTIONS, columns=("question", "answer")),
    "tables": Converter(tables.convert, tables.OPTIONS),
    "dictation": Converter(dictation.convert, dictation.OPTIONS, reads=""),
    "dictation_single": Converter(dictation.convert_single, dictation.OPTIONS, reads=""),
    "misreport": Converter(misreport.convert, misreport.OPTIONS, reads=""),
    "misreport_single": Converter(misreport.convert_single, misreport.SINGLE_OPTIONS, reads=""),
    "shuffles": Converter(shuffles.convert, shuffles.OPTIONS, reads=""),
}


# Options whose defaults have changed. Manifests and checkpoints that do not give them were made
# when they had these values.
FORMER_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"chat": {"overlap": 0}}


def get_converter(name: str, options: Mapping[str, Any]) -> tuple[Converter, dict[str, Any]]:
    """Returns the converter of a name or import path, and its options with defaults filled in.

    Raises UserError if there is no such converter, or it does not accept the options.
    """
    if ":" in name:
        function = import_object(name, "config.data.converter")
        if not getattr(function, "reads_files", True):  # made by `generator`
            return Converter(function, options=None, reads=""), dict(options)
        return Converter(each_record(function), options=None), dict(options)
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
    converter, options = get_converter(config.data.converter, config.data.options)
    if not converter.reads:
        return [None]
    columns = _columns(converter, options)
    return sources.parts(config.data.path, config.data.format, converter.reads, columns=columns)


def input_portions(config: Config) -> Sequence[Sequence[Part | None]]:
    """Returns the parts of the input in portions, each for one process.

    The portions depend on the settings and the sizes of the files, but not on the number of
    processes. No file is read: see `sources.portions`.
    """
    converter, options = get_converter(config.data.converter, config.data.options)
    if not converter.reads:
        return [[None]]
    columns = _columns(converter, options)
    return sources.portions(config.data.path, config.data.format, converter.reads, columns)


def _columns(converter: Converter, options: Mapping[str, Any]) -> list[str]:
    return [options[c[1:]] if c.startswith(".") else c for c in converter.columns]


def check_streams(config: Config, spec: StreamSpec) -> None:
    """Raises UserError if the streams do not fit the converter, or an option names no stream."""
    converter, options = get_converter(config.data.converter, config.data.options)
    if converter.options is None:
        return  # the options of a user's converter may mean anything
    if converter.check is not None:
        converter.check(config, spec, options)
    names = data_spec(config, spec).names
    for option in _STREAM_OPTIONS:
        value = options.get(option) or {}
        if isinstance(value, str):
            value = [value]
        pairs = value.items() if isinstance(value, Mapping) else zip(value, value)
        for key, name in pairs:
            if name in names or (name is None and option == "roles"):
                continue
            what = f"maps {key!r} to {name!r}" if option == "roles" else f"names {name!r}"
            remedy = "; None leaves a role out" if option == "roles" else ""
            raise UserError(
                f"config.data.options.{option} {what}, which is none of {names}: name one of these"
                f" streams{remedy}"
            )


def convert(
    config: Config, spec: StreamSpec, tokenizer: Tokenizer | Recorder, bad: BadRecords | None = None
) -> Iterator[Table]:
    """Yields the tables of `config.data`, in the order of the input. Raises UserError.

    Delays are applied, and mail is delivered.

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
    drawn_delays = tuple(map(spec.roster.per_stream, data.vary.delays))
    delays = drawn_delays or (spec.delays,)
    rows = data.rows - max(map(max, delays))
    if rows < 2:
        raise UserError(
            f"config.data.rows is {data.rows}: delays of {delays} rows leave none or one for an"
            " example; increase it, or use shorter delays"
        )
    check_streams(config, spec)
    written = data_spec(config, spec)
    layout = Layout(written, tokenizer, rows, options, bad)
    columns = [written.index(name) for name in spec.names]
    permuted = [stream for name in data.vary.permute for stream in spec.members(name)]
    for table in converter.function(layout, part):
        if converter.options is None:  # a user's converter
            _check_table(data.converter, layout, table)
        if table.weights is not None:
            table = _check_weights(data.converter, table)
        if columns != list(range(written.size)):
            table = vary.select(table, columns)
        if permuted:
            table = vary.permute(table, permuted)
        if data.vary != VaryConfig():
            table = vary.insert_silence(table, data.vary, tokenizer.silence_id)
        drawn = vary.draw(delays, "delays", table.example)
        for piece in vary.pieces(table, rows) if converter.pieces else [table]:
            piece = shift(piece, drawn)
            if spec.mail and not isinstance(tokenizer, Recorder):
                try:
                    piece = _with_mail(piece, spec, drawn, tokenizer.silence_id)
                except BadRecord as error:
                    bad.add(error)
                    break  # leave out the rest of a record that contradicts its mail
            yield piece


def _with_mail(table: Table, spec: StreamSpec, delays: Sequence[int], silence_id: int) -> Table:
    """Returns an example with its mail. Raises BadRecord if it says something else there."""
    try:
        tokens, present = deliver_to_example(
            table.tokens, table.present, spec.mail, spec.names, delays, silence_id
        )
    except Conflict as error:
        where = table.source or f"example {table.example}"
        raise BadRecord(f"{where}: {error}") from error
    return table._replace(tokens=tokens, present=present)


def _check_table(converter: str, layout: Layout, table: Any) -> None:
    """Raises UserError if what a converter yields is no table of the layout's streams."""
    what = ""
    if not isinstance(table, Table):
        what = f"a {type(table).__name__}, not a Table"
    else:
        tokens, present = table.tokens, table.present
        streams, size = layout.spec.size, layout.tokenizer.vocab_size
        if not isinstance(tokens, np.ndarray) or tokens.dtype != np.int32:
            what = "tokens that are no int32 array"
        elif tokens.ndim != 2 or tokens.shape[1] != streams:
            what = f"tokens of shape {tokens.shape}: must be [T, {streams}] for {layout.spec.names}"
        elif not isinstance(present, np.ndarray) or present.dtype != bool:
            what = "`present` that is no bool array"
        elif present.shape != tokens.shape:
            what = f"`present` of shape {present.shape} with tokens of shape {tokens.shape}"
        # As an unsigned number, a negative id is beyond every vocabulary.
        elif tokens.size and tokens.view(np.uint32).max() >= size:
            what = f"tokens from {tokens.min()} to {tokens.max()}: must be ids below {size}"
        elif not isinstance(table.example, str) or not _EXAMPLE.fullmatch(table.example):
            what = f"the example id {table.example!r}: must be hexadecimal, as of `example_hash`"
    if what:
        raise _bad_table(converter, table, what)


def _check_weights(converter: str, table: Table) -> Table:
    """Returns the table as `check_weights` does. Raises UserError."""
    try:
        return check_weights(table)
    except ValueError as error:
        raise _bad_table(converter, table, str(error)) from error


def _bad_table(converter: str, table: Any, what: str) -> UserError:
    where = f"{table.source}: " if isinstance(table, Table) and table.source else ""
    return UserError(
        f"{where}config.data.converter {converter!r} yields {what}; make tables with layout.table"
    )


def data_spec(config: Config, spec: StreamSpec) -> StreamSpec:
    """Returns the streams that the converter writes: `config.data.streams`, or the model's.

    Raises UserError if a stream of the model is not among them.
    """
    names = expand(config.data.streams).names
    if not names:
        return spec
    missing = [name for name in spec.names if name not in names]
    if missing:
        raise UserError(
            f"config.data.streams is {config.data.streams}: it lacks {', '.join(missing)} of"
            " config.streams.names; add them (streams to which the converter does not write are"
            " silent)"
        )
    kinds = tuple(spec.kinds[spec.index(name)] if name in spec.names else "input" for name in names)
    weights = tuple(
        spec.loss_weights[spec.index(name)] if name in spec.names else 0.0 for name in names
    )
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
    complete = True
    for portion in portions:
        found, all_read = portion_texts(config, spec, portion, bad, characters / len(portions))
        yield from found
        complete &= all_read
    if complete:
        bad.finish()


def portion_texts(
    config: Config,
    spec: StreamSpec,
    portion: Sequence[Part | None],
    bad: BadRecords,
    characters: float = math.inf,
) -> tuple[list[str], bool]:
    """Returns texts of a portion of the input, and whether they are those of all its records.

    Args:
      config, spec: as in `texts`.
      portion: the parts of the input.
      bad: counts the records.
      characters: the number of characters to stop at.
    """
    found, taken = [], 0
    for text in _all_texts(config, spec, portion, bad):
        found.append(text)
        taken += len(text)
        if taken > characters:
            return found, False
    return found, not config.data.max_examples


def _all_texts(
    config: Config, spec: StreamSpec, portion: Sequence[Part | None], bad: BadRecords
) -> Iterator[str]:
    recorder = Recorder()
    tables = (
        table for part in portion for table in convert_part(config, spec, recorder, part, bad)
    )
    for _ in itertools.islice(tables, config.data.max_examples or None):
        yield from recorder.take()
    yield from recorder.take()  # texts of records at the end that gave no table
