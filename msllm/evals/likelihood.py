"""The negative log-likelihood of prepared data, stream by stream, with intervals.

The intervals come from the bootstrap (Efron 1979), which resamples examples, or blocks of `block`
rows if examples are few and long. An interval holds the middle 95 % of the resampled means. A
comparison of two models resamples the differences unit by unit.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msllm.config import LossConfig
from msllm.errors import UserError
from msllm.evals.held_out import open_split
from msllm.loss import next_row_loss, targets_and_weights
from msllm.model.combine import pool_products, sources
from msllm.model.model import bind
from msllm.weights.load import LoadedModel

SEED = 0  # the seed of the resampling


class Likelihoods(NamedTuple):
    """Sums over each unit of the bootstrap, in the order of the data; [units, S] float64 each.

    Attributes:
      nll: negative log-likelihood of the targets, nats.
      targets: number of predicted cells.
      targets_spoken: number of predicted cells that are not silence.
      nll_spoken: negative log-likelihood of the targets that are not silence, nats.
      nll_words: negative log-likelihood of the same targets, given that they are not silence, nats.
        It measures what a stream says, and not when.
      bytes: UTF-8 bytes of the targets (`Tokenizer.piece_bytes`).
    """

    nll: np.ndarray
    targets: np.ndarray
    targets_spoken: np.ndarray
    nll_spoken: np.ndarray
    nll_words: np.ndarray
    bytes: np.ndarray


def evaluate(
    model: LoadedModel, data: str = "", split: str = "eval", block: int = 0
) -> Likelihoods:
    """Measures the likelihood of a split of prepared data.

    Args:
      model: a model with a tokenizer. `model.with_visibility` and `model.with_streams` change
        which streams see each other.
      data: the prepared directory. Empty: the one that the model was trained on.
      split: the split of the data.
      block: rows per unit; 0: examples are the units.

    Raises UserError if the data does not fit the model, or if it holds no example of two rows.
    """
    loader = open_split(model, data, split)
    tokenizer = model.require_tokenizer()
    silence, piece_bytes = tokenizer.silence_id, tokenizer.piece_bytes
    units: list[np.ndarray] = []
    for step in range(loader.num_batches):
        batch = loader.batch(step)
        size = len(batch["segment"])
        filled = min(size, loader.num_tables - step * size)  # filler follows in the last batch
        nll, words, targets, counted = map(
            np.asarray, _nll(model.graph, silence, model.parameters, batch)
        )
        spoken = counted & (targets != silence)
        spelled = np.where(counted, piece_bytes[targets], 0)
        said = np.where(spoken, words, 0)
        values = [nll * counted, counted, spoken, nll * spoken, said, spelled]
        stacked = np.stack(values, axis=2).astype(np.float64)  # [B, T, fields of Likelihoods, S]
        for b in range(filled):
            units += [stacked[b, rows].sum(0) for rows in _units(batch["segment"][b], block)]
    if not units:
        raise UserError(
            f"split {split!r} of {data or 'the data of the checkpoint'} holds no example of two"
            " rows: prepare more"
        )
    return Likelihoods(*np.moveaxis(np.stack(units), 1, 0))


def _units(segment: np.ndarray, block: int) -> Iterator[np.ndarray]:
    """The rows of each unit of a table; `segment`: [T]."""
    for number in range(1, segment.max(initial=0) + 1):
        rows = np.flatnonzero(segment == number)
        length = block or len(rows)
        for start in range(0, len(rows) - 1, length):  # the last row predicts nothing
            yield rows[start : start + length]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nll(
    graph: nnx.GraphDef,
    silence: int,
    parameters: dict[str, Any],
    tables: Mapping[str, jax.Array],
) -> tuple[jax.Array, ...]:
    """(nll, nll given that the target is not silence, targets, counted), [B, T, S] each."""
    model = bind(graph, parameters)
    states, present = model.read(tables, silence), model.cells(tables, silence).present
    targets, counted, _ = targets_and_weights(tables, (1.0,) * model.streams.size)
    head = model.head_parameter[...]

    def losses(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The nll of the targets, and the log-probability of silence."""
        weights = jnp.ones(targets.shape)
        nll = next_row_loss(hidden, head, targets, weights, LossConfig())[1]

        def logit(rows: jax.Array) -> jax.Array:
            return jnp.einsum("...d,...d->...", hidden, rows, preferred_element_type=jnp.float32)

        return nll, logit(head[silence]) - logit(head[targets]) - nll

    nll, silence_logprob = losses(pool_products(model, states, present), targets)
    for rule in model.streams.combine:
        if rule.mode == "mixture":
            found, s = sources(model, rule, states, present), rule.stream
            of_sources = jnp.repeat(targets[:, :, s, None], len(rule.sources), axis=-1)
            each = losses(found.hidden, of_sources)
            log_p, log_silence = (
                jax.nn.logsumexp(found.log_weights + x, axis=-1) for x in (-each[0], each[1])
            )
            nll = nll.at[:, :, s].set(-log_p)
            silence_logprob = silence_logprob.at[:, :, s].set(log_silence)
    words = nll + jnp.log1p(-jnp.exp(jnp.minimum(silence_logprob, -1e-6)))
    return nll, words, targets, counted


def best_checkpoint(workdir: str | os.PathLike) -> str:
    """The checkpoint of a workdir with the lowest eval/loss during training.

    Raises UserError if no evaluated step has a checkpoint.
    """
    workdir = pathlib.Path(workdir)
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    losses: dict[int, float] = {}
    for line in map(json.loads, lines):
        if "eval/loss" in line and (workdir / "checkpoints" / str(line["step"])).is_dir():
            losses[line["step"]] = line["eval/loss"]
    if not losses:
        raise UserError(
            f"{workdir} has no checkpoint of a step that was evaluated: train with"
            " config.checkpoint.every and config.checkpoint.keep_every set to config.eval_every"
        )
    return str(workdir / "checkpoints" / str(min(losses, key=losses.__getitem__)))


def report(
    units: Likelihoods, names: tuple[str, ...], resamples: int = 1000
) -> dict[str, dict[str, float]]:
    """Means per target with intervals, in nats.

    Args:
      units: the result of `evaluate` or `difference`.
      names: names of the streams.
      resamples: how often the units are resampled.

    Returns:
      {name: {"nll", "low", "high", "targets", "nll_spoken", "nll_words", "bits_per_byte"}}. low and
      high bound the interval of nll. bits_per_byte is the sum of nll, in bits, over the bytes of
      the targets; it is missing if these have none. There is an entry for each stream, and two
      more. "all" is the mean over the targets of all streams. "row" is the sum of the streams'
      means, which is the nats per row if every row has a target in every stream.
    """
    count = len(units.nll)
    generator = np.random.default_rng(SEED)
    drawn = generator.multinomial(count, np.full(count, 1 / count), resamples)
    nll, targets = drawn @ units.nll, drawn @ units.targets  # [resamples, S]
    means = _mean(units.nll.sum(0), units.targets.sum(0))  # [S]
    resampled = _mean(nll, targets)
    every = slice(None)
    result = {
        name: _entry(units, means[s], resampled[:, s], slice(s, s + 1))
        for s, name in enumerate(names)
    }
    over_all = _mean(units.nll.sum(), units.targets.sum())
    result["all"] = _entry(units, over_all, _mean(nll.sum(1), targets.sum(1)), every)
    result["row"] = _entry(units, means.sum(), resampled.sum(1), every)
    return result


def _mean(total: Any, count: Any) -> Any:
    return total / np.maximum(count, 1)


def _entry(
    units: Likelihoods, nll: float, resampled: np.ndarray, streams: slice
) -> dict[str, float]:
    low, high = np.percentile(resampled, (2.5, 97.5))
    spoken = units.targets_spoken[:, streams].sum()
    nll_sum, spelled = units.nll[:, streams].sum(), units.bytes[:, streams].sum()
    values = {
        "nll": nll,
        "low": low,
        "high": high,
        "targets": units.targets[:, streams].sum(),
        "nll_spoken": _mean(units.nll_spoken[:, streams].sum(), spoken),
        "nll_words": _mean(units.nll_words[:, streams].sum(), spoken),
    }
    if spelled:
        values["bits_per_byte"] = nll_sum / np.log(2) / spelled
    return {name: float(value) for name, value in values.items()}


def difference(units: Likelihoods, other: Likelihoods) -> Likelihoods:
    """By how many nats `other` is worse on the same data. Pass the result to `report`.

    Raises UserError if the two did not predict the same cells.
    """
    if units.targets.shape != other.targets.shape or (units.targets != other.targets).any():
        raise UserError(
            "the two checkpoints predict different cells: their streams, delays or data differ"
        )
    return units._replace(
        nll=other.nll - units.nll,
        nll_spoken=other.nll_spoken - units.nll_spoken,
        nll_words=other.nll_words - units.nll_words,
    )


def describe(result: dict[str, dict[str, float]]) -> str:
    """A report as lines of text."""
    width = max(len(name) for name in result)
    columns = (
        "nats per target  95 % interval         targets  without silence  words alone"
        "  bits per byte"
    )
    lines = [f"{'':{width}}  {columns}"]
    for name, entry in result.items():
        interval = f"{entry['low']:.4f} .. {entry['high']:.4f}"
        words = "" if name == "row" else f"{entry['nll_spoken']:15.4f}  {entry['nll_words']:11.4f}"
        if name != "row" and "bits_per_byte" in entry:
            words += f"  {entry['bits_per_byte']:13.4f}"
        line = (
            f"{name:{width}}  {entry['nll']:15.4f}  {interval:19}  {int(entry['targets']):9,}"
            f"  {words}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)
