"""Turns of roles, such as an instruction and the data that it is about, in any streams.

The same records fit models that separate roles in different ways. All roles may share one stream,
in which marks tell them apart; each role may have a stream, laid one after the other or side by
side. `place` decides the rows, also for the prompts of `msllm.evals.prompts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.data.converters.layout import Layout, each_record
from msllm.data.converters.messages import read_chat
from msllm.data.sources import Record
from msllm.data.tables import Placement, Table
from msllm.errors import UserError

OPTIONS: dict[str, Any] = {
    "roles": {},
    "beside": [],
    "marks": {},
    "rows": {},
    "said": [],
    "ignored_keys": [],
}


class Turn(NamedTuple):
    """What one role says."""

    role: str
    stream: int
    tokens: Sequence[int]  # without the mark


class Placed(NamedTuple):
    """A turn in its rows.

    Attributes:
      turn: the turn.
      start: the row of the mark, or of the first token if there is no mark.
      first: the row of the first token.
      end: the row after the last token, or after the rows that the turn takes at least.
    """

    turn: Turn
    start: int
    first: int
    end: int


def place(turns: Sequence[Turn], kinds: Sequence[str], options: Mapping[str, Any]) -> list[Placed]:
    """Places turns in rows.

    A turn starts when the turn before it has ended; in an output stream, when all turns before it
    have ended. A turn of a role in the option `beside` waits for its own stream only.

    Args:
      turns: in order.
      kinds: [S], the kinds of the streams.
      options: `beside`, `marks` and `rows`.
    """
    placed: list[Placed] = []
    free = [0] * len(kinds)  # the next free row of each stream
    before = 0  # the end of the turn before
    for turn in turns:
        start = free[turn.stream]
        if turn.role not in options["beside"]:
            start = max(start, max(free) if kinds[turn.stream] == "output" else before)
        first = start + (turn.role in options["marks"])
        end = max(first + len(turn.tokens), start + options["rows"].get(turn.role, 0))
        placed.append(Placed(turn, start, first, end))
        free[turn.stream] = before = end
    return placed


def said_by_model(role: str, stream: int, kinds: Sequence[str], said: Sequence[str]) -> bool:
    """Whether the model says the turns of a role.

    It does if the option `said` lists the role; without the option, if the role's stream is no
    input.
    """
    return role in said if said else kinds[stream] != "input"


def mark_of(role: str, marks: Mapping[str, str], control: Mapping[str, int]) -> list[int]:
    """The tokens that begin a turn of a role: one, or none. Raises UserError."""
    if role not in marks:
        return []
    piece = marks[role]
    try:
        return [control[piece]]
    except KeyError:
        known = ", ".join(control)
        raise UserError(
            f"config.data.options.marks maps {role!r} to {piece!r}, which is no control piece of"
            f" the tokenizer ({known}): list it in config.data.tokenizer.reserved"
        ) from None


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"messages": [{"role", "content"}, ...]}, or another form that `messages` reads.

    A turn starts when the turn before it has ended; a turn of an output stream, when all turns
    before it have ended. Only what the model says is predicted, with the silence that ends it. All
    other cells have the loss weight 0.

    Options:

    - `roles`: maps roles to streams, as in `Layout.stream_of`. Roles may share a stream.
    - `beside`: roles whose turns start as soon as their own stream is free.
    - `marks`: {role: control piece} that begins each turn of the role. No text encodes to it if it
      is in `config.data.tokenizer.reserved`. The mark is given and never predicted.
    - `rows`: {role: rows} that a turn of the role takes at least, with its mark. What follows then
      starts in the same row, however long the turn is.
    - `said`: roles that the model says. Empty: those of streams that are no inputs.
    - `ignored_keys`: keys of records and messages that are left out, as in `check_keys`.
    """
    messages, key = read_chat(layout, record)
    spec, options = layout.spec, layout.options
    turns, weights = [], []
    for turn in messages:
        stream = spec.index(layout.stream_of(turn.role, turn.where))
        turns.append(Turn(turn.role, stream, layout.encode(turn.text or "")))
        said = said_by_model(turn.role, stream, spec.kinds, options["said"])
        weights.append(turn.weight if said else 0.0)
    if turns:
        placed = place(turns, spec.kinds, options)
        control = layout.tokenizer.control
        marks = {turn.role: mark_of(turn.role, options["marks"], control) for turn in turns}
        yield _table(layout, placed, marks, weights, key)


def _table(
    layout: Layout,
    placed: Sequence[Placed],
    marks: Mapping[str, list[int]],
    weights: Sequence[float],
    key: str,
) -> Table:
    """The table of placed turns, with a closing row of silence."""
    last = max(one.end for one in placed)
    placements = [
        Placement(one.turn.stream, one.start, [*marks[one.turn.role], *one.turn.tokens])
        for one in placed
    ]
    closing = Placement(placed[0].turn.stream, last, [layout.tokenizer.silence_id])
    table = layout.table([*placements, closing], key, closed=False)
    array = np.zeros(table.tokens.shape, np.float32)
    for one, weight in sorted(zip(placed, weights), key=lambda pair: pair[0].start):
        stream = one.turn.stream
        array[one.start : one.first, stream] = 0
        array[one.first : one.first + len(one.turn.tokens) + 1, stream] = weight
    return table._replace(weights=array)
