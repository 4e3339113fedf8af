"""How well a model predicts held-out examples, stream by stream and turn by turn.

The rows before each cell are those of the example, so this needs no generation, and it works for
any streams. A turn is an input and what follows it, up to the next input (see
`exact_match.turn_ends`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msllm.config import LossConfig
from msllm.data.loader import spread
from msllm.data.packing import Packed, Packer
from msllm.data.tables import Table
from msllm.errors import UserError
from msllm.evals.exact_match import turn_ends
from msllm.evals.held_out import examples as held_out_examples
from msllm.evals.held_out import open_split
from msllm.loss import next_row_loss, targets_and_weights
from msllm.model.model import bind
from msllm.weights.load import LoadedModel

SHOWN_TURNS = 8  # turns with a line of their own
_CELLS = 1024  # cells whose logits are computed at a time


class Predicted(NamedTuple):
    """How well a model predicts what a stream says in a turn.

    Attributes:
      stream: name of the stream.
      turn: number of the turn, from 1 on; 0: all turns.
      tokens: number of tokens that are predicted; silence is none.
      nll: mean negative log-likelihood of these tokens, nats.
      accuracy: share of these tokens that are the most likely ones.
      silences: number of silent cells that are predicted.
      silent: share of these cells in which silence is the most likely token; None: there are none.
    """

    stream: str
    turn: int
    tokens: int
    nll: float
    accuracy: float
    silences: int
    silent: float | None


def evaluate(model: LoadedModel, data: str = "", examples: int = 500) -> list[Predicted]:
    """Predicts what the streams that are not inputs say in held-out examples.

    Args:
      model: a model with a tokenizer.
      data: the prepared directory. Empty: the one that the model was trained on.
      examples: the most examples to use, spread evenly over the split.

    Returns:
      For each stream, all turns together, and then each turn if there are several. What has no
      tokens is left out.

    Raises UserError if the data does not fit the model, or if it has nothing to predict.
    """
    loader = open_split(model, data)
    model = model.with_streams(delays=tuple(loader.manifest["streams"]["delays"]))
    silence = model.require_tokenizer().silence_id
    wanted = set(spread(loader.manifest["splits"]["eval"]["examples"], examples))
    packer = Packer(loader.manifest["rows"])
    sums: dict[tuple[int, int], np.ndarray] = {}
    turns: dict[str, np.ndarray] = {}  # [T] the turn of each row of an example
    packed: list[Packed] = []
    for number, table in enumerate(held_out_examples(loader)):
        if number in wanted:
            turns[str(number)] = _turn_of_rows(table, model)
            packed += packer.add(table._replace(example=str(number)))
    packed += packer.finish()
    for table, nll, right in _predict(model, packed):
        said = table.tokens[1:] != silence
        for segment, example in enumerate(table.examples, 1):
            rows = np.flatnonzero(table.segment == segment)
            both = table.present[rows[:-1]] & table.present[rows[1:]]
            turn = turns[example][1:]
            for s, kind in enumerate(model.streams.kinds):
                if kind == "input":
                    continue
                for spoken in (True, False):
                    counted = both[:, s] & (said[rows[:-1], s] == spoken)
                    values = np.stack([counted, nll[rows[:-1], s], right[rows[:-1], s]])
                    values = np.where(counted, values, 0)
                    for n in np.unique(turn[counted]):
                        added = values[:, turn == n].sum(1)
                        for key in ((s, int(n)), (s, 0)):
                            sums.setdefault(key, np.zeros((2, 3)))[int(not spoken)] += added
    return list(_results(sums, model.streams.names))


def _results(
    sums: Mapping[tuple[int, int], np.ndarray], names: Sequence[str]
) -> Iterator[Predicted]:
    """Makes means of sums by stream and turn: (count, nll, right) of tokens and of silence."""
    several = {turn for _, turn in sums} - {0, 1}
    found = False
    for (stream, turn), (said, silent) in sorted(sums.items()):
        if said[0] and (several or not turn):
            found = True
            yield Predicted(
                names[stream],
                turn,
                int(said[0]),
                float(said[1] / said[0]),
                float(said[2] / said[0]),
                int(silent[0]),
                float(silent[2] / silent[0]) if silent[0] else None,
            )
    if not found:
        raise UserError(
            "no stream that the model generates says anything in the held-out examples: prepare"
            " other data"
        )


def _turn_of_rows(table: Table, model: LoadedModel) -> np.ndarray:
    """[T] int, the number of the turn that each row of an example belongs to, from 1 on."""
    inputs = np.array(model.streams.kinds) == "input"
    silence = model.require_tokenizer().silence_id
    spoken = (table.present & (table.tokens != silence))[:, inputs].any(1)
    turn = np.ones(len(table.tokens), np.int64)
    for end in turn_ends(table, model)[:-1]:
        turn[end + 1 + int(np.argmax(spoken[end + 1 :])) :] += 1
    return turn


def _predict(
    model: LoadedModel, packed: Sequence[Packed]
) -> Iterator[tuple[Packed, np.ndarray, np.ndarray]]:
    """Yields each table with the nll of the next rows' cells and whether they are the likeliest.

    Both are [T, S], and mean something only for cells that have a target.
    """
    silence = model.require_tokenizer().silence_id
    size = min(8, max(1, len(packed)))
    for start in range(0, len(packed), size):
        some = list(packed[start : start + size])
        # Pad the last batch, because another shape would compile again.
        padded = some + some[:1] * (size - len(some))
        batch = {
            name: np.stack([getattr(table, name) for table in padded])
            for name in ("tokens", "present", "segment")
        }
        batch["tokens"] = batch["tokens"].astype(np.int32)
        nll, right = _measure(model.graph, silence, model.parameters, batch)
        yield from zip(some, np.asarray(nll), np.asarray(right))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(
    graph: nnx.GraphDef, silence: int, parameters: dict[str, Any], tables: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """(nll of the targets, whether they are the most likely tokens), [B, T, S] each."""
    model = bind(graph, parameters)
    hidden = model.read(tables, silence)
    targets, _, weights = targets_and_weights(tables, (1.0,) * model.streams.size)
    nll = next_row_loss(hidden, model.head_parameter[...], targets, weights, LossConfig())[1]
    cells = hidden.reshape(-1, hidden.shape[-1])
    likeliest = jax.lax.map(lambda x: jnp.argmax(model.logits(x)), cells, batch_size=_CELLS)
    return nll, likeliest.reshape(targets.shape) == targets


def describe(found: Sequence[Predicted]) -> str:
    """The result of `evaluate` as lines of text."""
    width = max(len("stream"), *(len(one.stream) for one in found))
    lines = [f"{'stream':{width}}  turn     tokens  nats/token  accuracy  silence kept"]
    for one in found:
        if one.turn > SHOWN_TURNS:
            continue
        turn = str(one.turn) if one.turn else "all"
        kept = "" if one.silent is None else f"{one.silent:12.1%}"
        line = (
            f"{one.stream:{width}}  {turn:>4}  {one.tokens:9,}  {one.nll:10.4f}"
            f"  {one.accuracy:8.1%}  {kept}"
        )
        lines.append(line.rstrip())
    later = max(one.turn for one in found) - SHOWN_TURNS
    if later > 0:
        lines.append(f"and {later} later turns (--json=FILE has them)")
    return "\n".join(lines)
