"""Scores given tables with a model.

Tables are tokens [B, T, S] and, unless every cell exists, present [B, T, S] bool; segment [B, T] if examples are
packed (0: an empty row). Scores are logits [B, T, S, V] float32, which predict the cell (t + 1, s), and logprob
[B, T, S] float32, the log-probability of that cell's token (nan where it does not exist).
"""

from __future__ import annotations

import functools
import os
import zipfile
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from msllm.errors import UserError
from msllm.loss import targets_and_weights
from msllm.model.model import bind
from msllm.runtime.files import write_atomically
from msllm.weights.load import LoadedModel

LOGITS_AT_ONCE = 1 << 26  # numbers: 256 MiB of float32


def score(
    loaded: LoadedModel, tables: dict[str, np.ndarray], silence_id: int | None = None
) -> Iterator[dict]:
    """Yields, for a few tables at a time, logits [b, T, S, V] and logprob [b, T, S] (see the module's docstring).

    Args:
      tables: tokens, and optionally present and segment. Raises UserError if they are no tables.
      silence_id: needed if silence is not seen as a key and the model came without a tokenizer.
    """
    silence_id = silence_of(loaded, silence_id)
    tables = check_tables(tables, loaded.streams.size, loaded.config.vocab_size)
    count, rows, streams = tables["tokens"].shape
    at_once = min(count, max(1, LOGITS_AT_ONCE // (rows * streams * loaded.config.vocab_size)))
    for start in range(0, count, at_once):
        part = {name: x[start : start + at_once] for name, x in tables.items()}
        size = len(part["tokens"])
        # A last, smaller part is filled up: it would be compiled once more otherwise.
        part = {
            name: np.concatenate([x, x[:1].repeat(at_once - size, 0)]) for name, x in part.items()
        }
        logits, logprob = _score(loaded.graph, silence_id, loaded.parameters, part)
        yield {"logits": np.asarray(logits)[:size], "logprob": np.asarray(logprob)[:size]}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(graph, silence_id, parameters, tables):
    model = bind(graph, parameters)
    with jax.default_matmul_precision("highest"):
        logits = model.logits(model.read(tables, silence_id))
    targets, counted, _ = targets_and_weights(tables, model.streams.loss_weights)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return logits, jnp.where(counted, chosen - jax.nn.logsumexp(logits, axis=-1), jnp.nan)


def silence_of(loaded: LoadedModel, silence_id: int | None = None) -> int | None:
    """The silence token, which the tokenizer knows if it is not given. Raises UserError if it is unknown and needed."""
    if silence_id is None and loaded.tokenizer is not None:
        silence_id = loaded.tokenizer.silence_id
    if loaded.streams.skip_silence and silence_id is None:
        raise UserError(
            "silence is to be hidden but the model has no tokenizer: say which token it is, --silence_id"
        )
    return silence_id


def check_tables(
    tables: dict[str, np.ndarray], streams: int, vocab_size: int
) -> dict[str, np.ndarray]:
    """Tables with `present` and `segment` filled in and all dtypes settled. Raises UserError."""
    if "tokens" not in tables:
        raise UserError(
            f"the tables have no array tokens, only {sorted(tables)}: tokens [B, T, S] is needed"
        )
    tokens = tables["tokens"]
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise UserError(f"tokens has shape {tokens.shape}: must be [B, T, S], none of them 0")
    if tokens.shape[2] != streams:
        raise UserError(
            f"tokens has shape {tokens.shape}, {tokens.shape[2]} streams: the model has {streams}"
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"tokens has type {tokens.dtype}: must be integers")
    present = tables.get("present", np.ones(tokens.shape, bool))
    if present.shape != tokens.shape or present.dtype != bool:
        raise UserError(
            f"present is {present.dtype} {present.shape}: must be bool of tokens' shape {tokens.shape}"
        )
    segment = tables.get("segment", np.ones(tokens.shape[:2], np.int32))
    if segment.shape != tokens.shape[:2] or not np.issubdtype(segment.dtype, np.integer):
        raise UserError(
            f"segment is {segment.dtype} {segment.shape}: must be integers of shape {tokens.shape[:2]}"
        )
    for number, ids in enumerate(segment):
        starts = ids[np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))]
        again = [int(i) for i in np.unique(starts) if i > 0 and np.sum(starts == i) > 1]
        if again or ids.min() < 0:
            raise UserError(
                f"segment of table {number}: each id must be one run of rows, and 0 an empty row; "
                + (
                    f"id {again[0]} comes back after another one"
                    if again
                    else f"it holds {ids.min()}"
                )
            )
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


def read_tables(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an npz file. Raises UserError if it cannot be read."""
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"--tables={path} cannot be read ({error}): give an npz file") from error


def write_scores(parts: Iterable[dict[str, np.ndarray]], path: str | os.PathLike) -> None:
    """Writes what `score` yields to an npz file."""
    parts = list(parts)
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    write_atomically(path, functools.partial(np.savez, **arrays))
