"""The negative log-likelihood of held-out data, by stream, with intervals; and what another model makes of the same data.

Units of the bootstrap (Efron 1979) are examples, or runs of `block` rows of them where examples are few and long; the
interval holds the middle 95 % of the resampled means. A comparison resamples the differences unit by unit.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msllm.config import LossConfig
from msllm.errors import UserError
from msllm.evals.exact_match import open_data
from msllm.loss import next_row_loss, targets_and_weights
from msllm.model.model import bind
from msllm.weights.load import LoadedModel

SEED = 0  # of the resampling


class Units(NamedTuple):
    """Sums over the units of the bootstrap, in the order of the data."""

    nll: np.ndarray  # [units, S] float64, nats
    targets: np.ndarray  # [units, S] float64: cells predicted
    targets_spoken: np.ndarray  # of these, the ones that are not silence
    nll_spoken: np.ndarray  # of those
    nll_words: np.ndarray  # of those, given that they are not silence: what is said, without when


def measure(
    loaded: LoadedModel,
    data: str = "",
    split: str = "eval",
    visibility: str = "",
    block: int = 0,
    skip_silence: bool | None = None,
) -> Units:
    """Sums over a split of prepared data.

    Args:
      data: the prepared directory; empty: the one that the checkpoint was trained on.
      visibility: a preset in place of the checkpoint's own. block: rows of a unit; 0: examples are the units.
      skip_silence: whether silence is hidden as a key; None: as the checkpoint has it.
    """
    loader = open_data(loaded, data, split)
    model = loaded.with_visibility(visibility) if visibility else loaded
    model = model if skip_silence is None else model.with_streams(skip_silence=skip_silence)
    silence = loaded.tokenizer.silence_id
    sums: dict[tuple[int, int, int], np.ndarray] = {}
    for step in range(loader.num_batches):
        batch = loader.batch(step)
        size = len(batch["segment"])
        held = min(size, loader.num_tables - step * size)  # a last batch is filled up
        nll, words, targets, counted = map(
            np.asarray, _nll(model.graph, silence, model.parameters, batch)
        )
        spoken = counted & (targets != silence)
        parts = [nll * counted, counted, spoken, nll * spoken, np.where(spoken, words, 0)]
        values = np.stack(parts, axis=2).astype(np.float64)  # [B, T, len(parts), S]
        for b in range(held):
            segment = batch["segment"][b]
            for number in range(1, segment.max(initial=0) + 1):
                rows = np.flatnonzero(segment == number)
                for start in range(0, len(rows) - 1, block or len(rows)):
                    part = rows[start : start + (block or len(rows))]
                    sums[step * size + b, number, start] = values[b, part].sum(0)
    if not sums:
        raise UserError(
            f"split {split!r} of {loader.config.dir} holds no example of two rows: prepare more"
        )
    return Units(*np.moveaxis(np.stack(list(sums.values())), 1, 0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nll(graph, silence, parameters, tables):
    model = bind(graph, parameters)
    hidden = model.read(tables, silence)
    targets, counted, weights = targets_and_weights(tables, (1.0,) * model.streams.size)
    head = model.head_parameter[...]
    nll = next_row_loss(hidden, head, targets, weights, LossConfig())[1]

    def logit(rows):
        return jnp.einsum("...d,...d->...", hidden, rows, preferred_element_type=jnp.float32)

    silence_logprob = logit(head[silence]) - logit(head[targets]) - nll
    return nll, nll + jnp.log1p(-jnp.exp(jnp.minimum(silence_logprob, -1e-6))), targets, counted


def best(workdir: str) -> str:
    """Of the checkpoints that are left in a workdir, the one whose evaluation in training was best. Raises UserError."""
    path = pathlib.Path(workdir)
    lines = (
        path.joinpath("metrics.jsonl").read_text().splitlines()
        if path.joinpath("metrics.jsonl").is_file()
        else []
    )
    losses = {
        line["step"]: line["eval/loss"] for line in map(json.loads, lines) if "eval/loss" in line
    }
    kept = [step for step in losses if (path / "checkpoints" / str(step)).is_dir()]
    if not kept:
        raise UserError(
            f"{workdir} has no checkpoint of a step that was evaluated: train with config.checkpoint.every and"
            " config.checkpoint.keep_every equal to config.eval_every"
        )
    return str(path / "checkpoints" / str(min(kept, key=losses.get)))


def report(units: Units, names: tuple[str, ...], resamples: int = 1000) -> dict[str, Any]:
    """Nats per target: {stream, "all" or "row": {"nll", "low", "high", "targets", "nll_spoken", "nll_words"}}.

    "all" is over the targets of all streams; "row" is the sum of the streams' means: where the streams are in step, the
    nats of a row.
    """
    drawn = np.random.default_rng(SEED).multinomial(
        len(units.nll), np.full(len(units.nll), 1 / len(units.nll)), resamples
    )

    def mean(total, count):
        return total / np.maximum(count, 1)

    means, again = (
        mean(units.nll.sum(0), units.targets.sum(0)),
        mean(drawn @ units.nll, drawn @ units.targets),
    )

    def entry(value, resampled, columns) -> dict[str, float]:
        low, high = np.percentile(resampled, (2.5, 97.5))
        spoken = units.targets_spoken[:, columns].sum()
        values = {
            "nll": value,
            "low": low,
            "high": high,
            "targets": units.targets[:, columns].sum(),
        }
        for name in ("nll_spoken", "nll_words"):
            values[name] = mean(getattr(units, name)[:, columns].sum(), spoken)
        return {name: float(value) for name, value in values.items()}

    every = slice(None)
    everything = mean((drawn @ units.nll).sum(1), (drawn @ units.targets).sum(1))
    return {
        **{name: entry(means[s], again[:, s], slice(s, s + 1)) for s, name in enumerate(names)},
        "all": entry(mean(units.nll.sum(), units.targets.sum()), everything, every),
        "row": entry(means.sum(), again.sum(1), every),
    }


def difference(units: Units, other: Units) -> Units:
    """By how many nats `other` is worse on the same data, to `report`. Raises UserError if they are not the same."""
    if units.targets.shape != other.targets.shape or (units.targets != other.targets).any():
        raise UserError(
            "the two checkpoints predict different cells: their streams, delays or data differ"
        )
    worse = {
        name: getattr(other, name) - getattr(units, name)
        for name in ("nll", "nll_spoken", "nll_words")
    }
    return units._replace(**worse)


def describe(result: dict[str, Any]) -> str:
    """A report as lines of text."""
    width = max(len(name) for name in result)
    lines = [
        f"{'':{width}}  nats per target  95 % interval         targets  without silence  words alone"
    ]
    for name, entry in result.items():
        interval = f"{entry['low']:.4f} .. {entry['high']:.4f}"
        words = "" if name == "row" else f"{entry['nll_spoken']:15.4f}  {entry['nll_words']:11.4f}"
        lines.append(
            f"{name:{width}}  {entry['nll']:15.4f}  {interval:19}  {int(entry['targets']):9,}  {words}".rstrip()
        )
    return "\n".join(lines)
