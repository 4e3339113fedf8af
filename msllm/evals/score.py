"""Scores tables, prepared data and texts: the log-probability of every cell, and the logits."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msllm.config import Config, DataConfig, VaryConfig, code_named_by
from msllm.data import records
from msllm.data.converters import CONVERTERS, convert
from msllm.data.identity import with_former_options
from msllm.data.loader import spread
from msllm.data.packing import Packer
from msllm.data.tables import Table, unpack
from msllm.errors import UserError
from msllm.evals.held_out import open_split
from msllm.loss import targets_and_weights
from msllm.model.combine import next_logits
from msllm.model.model import bind
from msllm.runtime.files import write_atomically
from msllm.weights.load import LoadedModel

LOGITS_AT_ONCE = 1 << 26  # logits that are computed at a time: 256 MiB of float32
TABLES_AT_ONCE = 8  # tables that are read at a time where logits are not kept
CELLS_AT_ONCE = 1024  # cells whose logits are computed at a time where they are not kept


class Scores(NamedTuple):
    """A model's predictions for tables.

    Attributes:
      logits: [B, T, S, V] float32; the logits at (t, s) predict the cell (t + 1, s). Those of a
        stream that is a mixture (`config.streams.combine`) are log-probabilities.
      logprob: [B, T, S] float32, the log-probability of the cell (t + 1, s), nats; nan if the cell
        does not exist.
    """

    logits: np.ndarray
    logprob: np.ndarray


def score(
    model: LoadedModel, tables: Mapping[str, np.ndarray], silence_id: int | None = None
) -> Scores:
    """Scores tables.

    Args:
      model: the model.
      tables: tokens [B, T, S]; optionally present [B, T, S] bool (default: every cell exists) and
        segment [B, T] (the packed example of each row; 0: an empty row).
      silence_id: the silence token. Needed if silence is hidden and the model has no tokenizer.

    Raises UserError if the tables do not have that form, or if silence_id is needed.
    """
    parts = list(score_batches(model, tables, silence_id))
    return Scores(*(np.concatenate(arrays) for arrays in zip(*parts)))


def score_batches(
    model: LoadedModel, tables: Mapping[str, np.ndarray], silence_id: int | None = None
) -> Iterator[Scores]:
    """Scores a few tables at a time, for tables whose logits would take too much memory together.

    The arguments and errors are those of `score`.
    """
    silence_id = model.silence_token(silence_id)
    checked = check_tables(tables, model.streams.size, model.config.vocab_size)
    count, rows, streams = checked["tokens"].shape
    size = min(count, max(1, LOGITS_AT_ONCE // (rows * streams * model.config.vocab_size)))
    for part, filled in _batches(checked, size):
        logits, logprob = _score(*_model(model, silence_id), part)
        yield Scores(np.asarray(logits)[:filled], np.asarray(logprob)[:filled])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    graph: nnx.GraphDef,
    silence_id: int | None,
    parameters: dict[str, Any],
    tables: Mapping[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    model = bind(graph, parameters)
    with jax.default_matmul_precision("highest"):
        hidden = model.read(tables, silence_id)
        logits = next_logits(model, hidden, model.cells(tables, silence_id).present)
    targets, counted, _ = targets_and_weights(tables, model.streams.loss_weights)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return logits, jnp.where(counted, chosen - jax.nn.logsumexp(logits, axis=-1), jnp.nan)


class Likelihood(NamedTuple):
    """How likely the cells of tables are. The values at (t, s) are those of the cell (t + 1, s).

    Attributes:
      logprob: [B, T, S] float32, the log-probability, nats; nan if the cell does not exist.
      likeliest: [B, T, S] bool, whether no other token is more likely; False if the cell does not
        exist.
    """

    logprob: np.ndarray
    likeliest: np.ndarray


def likelihood(
    model: LoadedModel, tables: Mapping[str, np.ndarray], silence_id: int | None = None
) -> Likelihood:
    """Scores tables without keeping their logits, which takes little memory.

    The arguments and errors are those of `score`.
    """
    silence_id = model.silence_token(silence_id)
    checked = check_tables(tables, model.streams.size, model.config.vocab_size)
    size = min(TABLES_AT_ONCE, len(checked["tokens"]))
    parts = [
        tuple(np.asarray(x)[:count] for x in _likelihood(*_model(model, silence_id), part))
        for part, count in _batches(checked, size)
    ]
    return Likelihood(*(np.concatenate(arrays) for arrays in zip(*parts)))


def _model(model: LoadedModel, silence_id: int | None) -> tuple[Any, ...]:
    return model.graph, silence_id, model.parameters


def _batches(
    tables: Mapping[str, np.ndarray], size: int
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Yields (`size` tables, how many of them count) in order. Repeated tables pad the last ones.

    Another shape would compile again.
    """
    for start in range(0, len(tables["tokens"]), size):
        part = {name: x[start : start + size] for name, x in tables.items()}
        count = len(part["tokens"])
        padding = {name: x[:1].repeat(size - count, 0) for name, x in part.items()}
        yield {name: np.concatenate([x, padding[name]]) for name, x in part.items()}, count


@functools.partial(jax.jit, static_argnums=(0, 1))
def _likelihood(
    graph: nnx.GraphDef,
    silence_id: int | None,
    parameters: dict[str, Any],
    tables: Mapping[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    model = bind(graph, parameters)
    targets, counted, _ = targets_and_weights(tables, model.streams.loss_weights)

    def row(hidden, present, targets):
        logits = next_logits(model, hidden[None, None], present[None, None])[0, 0]
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        logprob = chosen - jax.nn.logsumexp(logits, axis=-1)
        return logprob, jnp.argmax(logits, axis=-1) == targets

    with jax.default_matmul_precision("highest"):
        hidden = model.read(tables, silence_id)
        present = model.cells(tables, silence_id).present
        rows = [x.reshape(-1, *x.shape[2:]) for x in (hidden, present, targets)]
        size = max(1, CELLS_AT_ONCE // model.streams.size)
        logprob, likeliest = jax.lax.map(lambda x: row(*x), rows, batch_size=size)
    logprob = jnp.where(counted, logprob.reshape(targets.shape), jnp.nan)
    return logprob, likeliest.reshape(targets.shape) & counted


class Examples(NamedTuple):
    """Examples to score, packed into tables.

    Attributes:
      tables: tokens [B, T, S] int, present [B, T, S] bool and segment [B, T] int.
      places: B lists, the place of each segment of a table in `sources`.
      sources: for each example, in the order of the input: its id, or the place of its record.
    """

    tables: dict[str, np.ndarray]
    places: list[list[int]]
    sources: list[str]


def pack(examples: Iterable[Table], rows: int = 2) -> Examples:
    """Packs examples into tables with as many rows as the longest one has, at least `rows`.

    Examples of one row, in which there is nothing to predict, are left out. Raises UserError if no
    others are left.
    """
    tables = [table for table in examples if len(table.tokens) > 1]
    if not tables:
        raise UserError("there is no example of at least 2 rows to score")
    packer = Packer(max(rows, *(len(table.tokens) for table in tables)))
    packed = []
    for number, table in enumerate(tables):
        packed += packer.add(table._replace(example=str(number)))
    packed += packer.finish()
    fields = ("tokens", "present", "segment")
    return Examples(
        {name: np.stack([getattr(table, name) for table in packed]) for name in fields},
        [list(map(int, table.examples)) for table in packed],
        [table.source or table.example for table in tables],
    )


def read_data(
    model: LoadedModel, data: str = "", split: str = "eval", examples: int = 500
) -> Examples:
    """Reads examples of prepared data.

    Args:
      model: a model with a tokenizer.
      data: the prepared directory. Empty: the one that the model was trained on.
      split: the split of the data.
      examples: the most examples to read, spread evenly over the split.

    Raises UserError if there is no such data, or if it does not fit the model.
    """
    manifest = open_split(model, data, split).manifest  # checks that the data fits
    folder = data or (model.run_config.data.dir if model.run_config else "")
    wanted = set(spread(manifest["splits"][split]["examples"], examples))
    found = (table for i, table in enumerate(_stored_examples(folder, split)) if i in wanted)
    return pack(found, manifest["rows"])


def _stored_examples(folder: str, split: str) -> Iterator[Table]:
    """Yields the examples of a split in stored order, which is not that of training batches."""
    manifest, paths = records.open_prepared(folder, split, part=None)
    reader, size = records.Reader(paths), manifest["tokenizer"]["vocab_size"]
    for number in range(manifest["splits"][split]["tables"]):
        packed = records.decode_record(reader[number], len(manifest["streams"]["names"]), size)
        yield from unpack(packed._asdict(), packed.examples)


def read_text(model: LoadedModel, path: str | os.PathLike, allow_code: bool = False) -> Examples:
    """Reads texts or records of any form that `msllm prepare` reads.

    They become tables by the converter and the options with which the data of the model was
    prepared. Where there is none (the data was generated, or the model was imported), a model of
    one stream takes plain text, and another one takes records of the converter `tables`.

    Args:
      model: a model with a tokenizer.
      path: the file.
      allow_code: import a converter or reader outside of msllm that the model's config names.

    Raises UserError if the file cannot be read, or a record does not fit.
    """
    tokenizer = model.require_tokenizer()
    if not pathlib.Path(path).is_file():
        raise UserError(f"--text={path}: there is no such file")
    run = model.run_config
    data = with_former_options(run.data) if run else DataConfig(converter="")
    known, example = CONVERTERS.get(data.converter), ""
    if not data.converter or (known and not known.reads):
        converter = "single" if model.streams.size == 1 else "tables"
        data = DataConfig(converter=converter, rows=model.trained_rows or DataConfig().rows)
        if converter == "tables":
            example = json.dumps({"streams": dict.fromkeys(model.streams.names, "...")})
    elif not allow_code:
        for setting, code in code_named_by(data, "config.data").items():
            raise UserError(
                f"{setting} of the checkpoint is {code!r}: reading the text would run this code. If"
                " you trust it, allow it by --allow_code"
            )
    data = dataclasses.replace(
        data,
        path=str(path),
        format=data.format if ":" in data.format else "",
        max_examples=0,
        bad_percent=0.0,
        vary=VaryConfig(),
    )
    try:
        return pack(convert(Config(data=data), model.streams, tokenizer))
    except UserError as error:
        if not example:
            raise
        raise UserError(
            f"{error}; a record for this model is a line such as {example} (docs/data.md, tables)"
        ) from error


def check_tables(
    tables: Mapping[str, np.ndarray], streams: int, vocab_size: int
) -> dict[str, np.ndarray]:
    """The tables with all three arrays, as int32 and bool. Absent cells hold 0.

    Args:
      tables: as in `score`.
      streams: S of the model.
      vocab_size: V of the model.

    Raises UserError if the tables do not have that form.
    """
    if "tokens" not in tables:
        raise UserError(
            f"the tables have no array tokens, only {sorted(tables)}: tokens [B, T, S] is needed"
        )
    tokens = tables["tokens"]
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise UserError(f"tokens has shape {tokens.shape}: must be [B, T, S], all above 0")
    if tokens.shape[2] != streams:
        raise UserError(
            f"tokens has shape {tokens.shape}, {tokens.shape[2]} streams: the model has {streams}"
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens has type {tokens.dtype}: must be integers")
    present = tables.get("present", np.ones(tokens.shape, bool))
    if present.shape != tokens.shape or present.dtype != bool:
        raise UserError(
            f"present is {present.dtype} {present.shape}: must be bool of shape {tokens.shape},"
            " as tokens"
        )
    segment = tables.get("segment", np.ones(tokens.shape[:2], np.int32))
    if segment.shape != tokens.shape[:2] or not np.issubdtype(segment.dtype, np.integer):
        raise UserError(
            f"segment is {segment.dtype} {segment.shape}: must be integers of shape"
            f" {tokens.shape[:2]}"
        )
    for number, ids in enumerate(segment):
        _check_segment(number, ids)
    bad = present & ((tokens < 0) | (tokens >= vocab_size))
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise UserError(
            f"tokens{list(where)} is {tokens[where]}: the vocabulary has ids 0 to {vocab_size - 1}"
        )
    return {
        "tokens": np.where(present, tokens, 0).astype(np.int32),
        "present": present,
        "segment": segment.astype(np.int32),
    }


def _check_segment(number: int, ids: np.ndarray) -> None:
    """Raises UserError unless each segment id of a table, [T], is one run of rows."""
    rule = f"segment of table {number}: each id must be one run of rows, and 0 means an empty row;"
    if ids.min() < 0:
        raise UserError(f"{rule} it holds {ids.min()}")
    run_ids = ids[np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))]  # the id of each run
    found, counts = np.unique(run_ids, return_counts=True)
    again = found[(counts > 1) & (found > 0)]
    if len(again):
        raise UserError(f"{rule} id {again[0]} has several runs")


def read_tables(path: str | os.PathLike, model: LoadedModel) -> Examples:
    """Reads tables from an npz file, with the arrays that `score` takes; it may have others.

    Raises UserError if it cannot be read, or if the tables do not fit the model.
    """
    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"--tables={path} cannot be read ({error}): give an npz file") from error
    tables = check_tables(found, model.streams.size, model.config.vocab_size)
    places: list[list[int]] = []
    sources: list[str] = []
    for number, segment in enumerate(tables["segment"]):
        ids = list(dict.fromkeys(segment[segment > 0].tolist()))  # in the order of the rows
        places.append(list(range(len(sources), len(sources) + len(ids))))
        sources += [f"table {number}, segment {one}" for one in ids]
    return Examples(tables, places, sources)


def write_scores(
    scores: Scores | Likelihood,
    path: str | os.PathLike,
    tables: Mapping[str, np.ndarray] | None = None,
    names: Sequence[str] = (),
    overwrite: bool = True,
) -> None:
    """Writes scores to an npz file whose arrays are named like the fields.

    Args:
      scores: the result of `score` or `likelihood`.
      path: the file.
      tables: the scored tables, which are written as well.
      names: names of the streams, which are written as the array `streams`.
      overwrite: whether to replace a file that exists.

    Raises FileExistsError if the file exists and must not be replaced.
    """
    arrays = {**(tables or {}), **scores._asdict()}
    if names:
        arrays["streams"] = np.array(names)
    write_atomically(path, functools.partial(np.savez, **arrays), overwrite=overwrite)
