"""Scores tables: the logits of a model, and the log-probability of every cell."""

from __future__ import annotations

import functools
import os
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msllm.errors import UserError
from msllm.loss import targets_and_weights
from msllm.model.model import bind
from msllm.runtime.files import write_atomically
from msllm.weights.load import LoadedModel

LOGITS_AT_ONCE = 1 << 26  # logits that are computed at a time: 256 MiB of float32


class Scores(NamedTuple):
    """A model's predictions for tables.

    Attributes:
      logits: [B, T, S, V] float32; the logits at (t, s) predict the cell (t + 1, s).
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
    silence_id = silence_of(model, silence_id)
    checked = check_tables(tables, model.streams.size, model.config.vocab_size)
    count, rows, streams = checked["tokens"].shape
    size = min(count, max(1, LOGITS_AT_ONCE // (rows * streams * model.config.vocab_size)))
    for start in range(0, count, size):
        part = {name: x[start : start + size] for name, x in checked.items()}
        missing = size - len(part["tokens"])
        # Pad the last batch, because another shape would compile again.
        part = {name: np.concatenate([x, x[:1].repeat(missing, 0)]) for name, x in part.items()}
        logits, logprob = _score(model.graph, silence_id, model.parameters, part)
        yield Scores(np.asarray(logits)[: size - missing], np.asarray(logprob)[: size - missing])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    graph: nnx.GraphDef,
    silence_id: int | None,
    parameters: dict[str, Any],
    tables: Mapping[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    model = bind(graph, parameters)
    with jax.default_matmul_precision("highest"):
        logits = model.logits(model.read(tables, silence_id))
    targets, counted, _ = targets_and_weights(tables, model.streams.loss_weights)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return logits, jnp.where(counted, chosen - jax.nn.logsumexp(logits, axis=-1), jnp.nan)


def silence_of(model: LoadedModel, silence_id: int | None = None) -> int | None:
    """The silence token: `silence_id`, or else that of the model's tokenizer.

    Raises UserError if the model hides silence and both are missing.
    """
    if silence_id is None and model.tokenizer is not None:
        silence_id = model.tokenizer.silence_id
    if model.streams.skip_silence and silence_id is None:
        raise UserError(
            "the model hides silence but has no tokenizer: pass the silence token as --silence_id"
        )
    return silence_id


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


def read_tables(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an npz file. Raises UserError if it cannot be read."""
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"--tables={path} cannot be read ({error}): give an npz file") from error


def write_scores(scores: Scores, path: str | os.PathLike) -> None:
    """Writes scores to an npz file whose arrays are named like the fields."""
    write_atomically(path, functools.partial(np.savez, **scores._asdict()))
