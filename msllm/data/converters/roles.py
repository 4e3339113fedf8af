"""Turns of roles, such as an instruction and the data that it is about, in any streams.

The same records fit models that separate roles in different ways. All roles may share one stream,
in which marks tell them apart; each role may have a stream, laid one after the other or side by
side. `place` decides the rows, also for the prompts of `msllm.evals.prompts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.data.converters.layout import Layout, Recorder, each_record
from msllm.data.converters.messages import read_chat
from msllm.data.sources import Record
from msllm.data.tables import Placement, Table
from msllm.errors import UserError
from msllm.tokenizer import Tokenizer

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
    mark: Sequence[int] = ()  # the tokens that begin the turn


class Placed(NamedTuple):
    """A turn in its rows.

    Attributes:
      turn: the turn.
      start: the first row of the mark, or of the tokens if there is no mark.
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
      options: `beside` and `rows`.
    """
    placed: list[Placed] = []
    free = [0] * len(kinds)  # the next free row of each stream
    before = 0  # the end of the turn before
    for turn in turns:
        start = free[turn.stream]
        if turn.role not in options["beside"]:
            start = max(start, max(free) if kinds[turn.stream] == "output" else before)
        first = start + len(turn.mark)
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


def mark_of(role: str, marks: Mapping[str, str], tokenizer: Tokenizer | Recorder) -> list[int]:
    """The tokens that begin a turn of a role; empty without a mark.

    Raises UserError if the mark has no control piece, so that a text could hold it.
    """
    mark = marks.get(role, "")
    if not mark or isinstance(tokenizer, Recorder):  # there are no control pieces yet
        return []
    if not any(piece in mark for piece in tokenizer.control if piece != tokenizer.silence):
        raise UserError(
            f"config.data.options.marks maps {role!r} to {mark!r}, which has no control piece of"
            f" the tokenizer ({', '.join(tokenizer.control)}): list it in"
            " config.data.tokenizer.reserved"
        )
    return encode_unfiltered(mark, tokenizer)


def encode_unfiltered(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text in which control pieces become control tokens, except silence."""
    found = [
        (text.find(piece), piece)
        for piece in tokenizer.control
        if piece and piece != tokenizer.silence and piece in text
    ]
    if not found:
        return tokenizer.encode(text) if text else []
    at, piece = min(found, key=lambda pair: (pair[0], -len(pair[1])))
    # One space on both sides of a control piece is not part of its neighbours.
    before, after = text[:at], text[at + len(piece) :]
    if before.endswith(" ") and after.startswith(" "):
        before, after = before[:-1], after[1:]
    return [
        *(tokenizer.encode(before) if before else []),
        tokenizer.control[piece],
        *encode_unfiltered(after, tokenizer),
    ]


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"messages": [{"role", "content"}, ...]}, or another form that `messages` reads.

    A turn starts when the turn before it has ended; a turn of an output stream, when all turns
    before it have ended. Only what the model says is predicted, with the silence that ends it. All
    other cells have the loss weight 0.

    Options:

    - `roles`: maps roles to streams, as in `Layout.stream_of`. Roles may share a stream.
    - `beside`: roles whose turns start as soon as their own stream is free.
    - `marks`: {role: text that begins each turn of the role}. The text has a control piece of the
      tokenizer, such as one of `config.data.tokenizer.reserved`: no other text encodes to that. The
      mark is given and never predicted.
    - `rows`: {role: rows} that a turn of the role takes at least, with its mark. What follows then
      starts in the same row, however long the turn is.
    - `said`: roles that the model says. Empty: those of streams that are no inputs.
    - `ignored_keys`: keys of records and messages that are left out, as in `check_keys`.
    """
    messages, key = read_chat(layout, record)
    spec, options = layout.spec, layout.options
    turns, weights = [], []
    for message in messages:
        name = layout.stream_of(message.role, message.where)
        layout.bad.add_turn(name, message.text or "", message.where)
        stream = spec.index(name)
        mark = mark_of(message.role, options["marks"], layout.tokenizer)
        turns.append(Turn(message.role, stream, layout.encode(message.text or ""), mark))
        said = said_by_model(message.role, stream, spec.kinds, options["said"])
        weights.append(message.weight if said else 0.0)
    if turns:
        placed = place(turns, spec.kinds, options)
        yield _table(layout, placed, weights, key)


def _table(
    layout: Layout,
    placed: Sequence[Placed],
    weights: Sequence[float],
    key: str,
) -> Table:
    """The table of placed turns, with a closing row of silence."""
    last = max(one.end for one in placed)
    placements = [
        Placement(one.turn.stream, one.start, [*one.turn.mark, *one.turn.tokens]) for one in placed
    ]
    closing = Placement(placed[0].turn.stream, last, [layout.tokenizer.silence_id])
    table = layout.table([*placements, closing], key, closed=False)
    array = np.zeros(table.tokens.shape, np.float32)
    for one, weight in sorted(zip(placed, weights), key=lambda pair: pair[0].start):
        stream = one.turn.stream
        array[one.start : one.first, stream] = 0
        array[one.first : one.first + len(one.turn.tokens) + 1, stream] = weight
    return table._replace(weights=array)
