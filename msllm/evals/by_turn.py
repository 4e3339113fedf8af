"""How well a model predicts held-out examples, stream by stream and turn by turn.

The rows before each cell are those of the example, so this needs no generation, and it works for
any streams. A turn is an input and what follows it, up to the next input (see
`exact_match.turn_ends`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from msllm.data.loader import spread
from msllm.data.tables import Table
from msllm.errors import UserError
from msllm.evals.exact_match import turn_ends
from msllm.evals.held_out import examples as held_out_examples
from msllm.evals.held_out import open_split
from msllm.evals.score import likelihood, pack
from msllm.mail import is_mailed
from msllm.weights.load import LoadedModel

SHOWN_TURNS = 8  # turns with a line of their own


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
      tokens is left out. Cells of loss weight 0 are not counted.

    Raises UserError if the data does not fit the model, or if it has nothing to predict.
    """
    loader = open_split(model, data)
    model = model.with_streams(delays=tuple(loader.manifest["streams"]["delays"]))
    silence = model.require_tokenizer().silence_id
    wanted = set(spread(loader.manifest["splits"]["eval"]["examples"], examples))
    tables = [table for i, table in enumerate(held_out_examples(loader)) if i in wanted]
    packed = pack(tables, loader.manifest["rows"])
    tables = [table for table in tables if len(table.tokens) > 1]
    turns = [_turn_of_rows(table, model) for table in tables]
    found = likelihood(model, packed.tables)
    sums: dict[tuple[int, int], np.ndarray] = {}
    for b, places in enumerate(packed.places):
        for segment, place in enumerate(places, 1):
            rows = np.flatnonzero(packed.tables["segment"][b] == segment)
            cell, target = (b, rows[:-1]), (b, rows[1:])
            values = np.stack([-found.logprob[cell], found.likeliest[cell]], axis=2)
            weights = tables[place].weights
            if weights is not None:
                values[weights[1:] == 0] = np.nan
            said = packed.tables["tokens"][target] != silence
            _add(sums, values, said, turns[place][1:], model.streams.kinds)
    return list(_results(sums, model.streams.names))


def _add(
    sums: dict[tuple[int, int], np.ndarray],
    values: np.ndarray,
    said: np.ndarray,
    turn: np.ndarray,
    kinds: Sequence[str],
) -> None:
    """Adds the targets of an example to the sums by (stream, turn); turn 0: all turns.

    Args:
      sums: [2, 3]: tokens and silence; number, nll and right ones.
      values: [n, S, 2], nll and whether the target is the likeliest; nan if there is no target.
      said: [n, S] bool, whether the target is a token.
      turn: [n] int, the turn of the target.
      kinds: the kinds of the S streams.
    """
    for stream, kind in enumerate(kinds):
        if kind == "input":
            continue
        counted = np.isfinite(values[:, stream, 0])
        for silent in (0, 1):
            rows = np.flatnonzero(counted & (said[:, stream] != bool(silent)))
            for n in np.unique(turn[rows]):
                of_turn = values[rows[turn[rows] == n], stream]
                for key in ((stream, int(n)), (stream, 0)):
                    total = sums.setdefault(key, np.zeros((2, 3)))
                    total[silent] += (len(of_turn), *of_turn.sum(0))


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
    spoken = table.present & (table.tokens != silence)
    spoken = (spoken & ~is_mailed(model.streams.mail, *spoken.shape))[:, inputs].any(1)
    turn = np.ones(len(table.tokens), np.int64)
    for end in turn_ends(table, model)[:-1]:
        turn[end + 1 + int(np.argmax(spoken[end + 1 :])) :] += 1
    return turn


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
