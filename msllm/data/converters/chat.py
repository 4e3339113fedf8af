"""Chats: turns that follow one another or overlap."""

from __future__ import annotations

from collections.abc import Iterator

from msllm.data.converters.layout import Choice, Layout, each_record
from msllm.data.converters.messages import read_chat
from msllm.data.sources import Record
from msllm.data.tables import Placement, Table, loss_weights
from msllm.errors import UserError

MAX_GAP = 1000  # rows between two turns
OPTIONS = {
    "roles": {},
    # A row between turns: under the default visibility, the cell that predicts the first token of
    # an answer does not see the last token of the question otherwise.
    "overlap": Choice(-1, least=-MAX_GAP),
    "wait": Choice(-1, least=-1),
    "thoughts": "before",
    "silence": Choice(0, least=0),
    "ignored_keys": [],
}


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"messages": [{"role", "content"}, ...]}, or another form that `messages` reads.

    A turn of an input stream starts when all previous turns have ended. Any other turn starts when
    the turn before it has ended; with the options it may start earlier, but not before the start of
    the turn before it.

    Options:

    - `roles`: maps roles to streams, as in `Layout.stream_of`.
    - `overlap`: start a turn this many rows before the end of the turn before it; below 0: leave as
      many rows between them.
    - `wait`: start a turn that follows a turn of an input stream this many rows after the start of
      that turn, and at its end at the latest; -1: off.
    - `thoughts`: "before": a thought is a turn like any other; "beside": the turn after a thought
      starts as if the thought were not there.
    - `silence`: silent rows before each turn of an input stream and after the last turn. Each of
      these silences draws a number of its own.
    - `ignored_keys`: keys of records and messages that are left out, as in `check_keys`.
    """
    thoughts, spec = layout.options["thoughts"], layout.spec
    if thoughts not in ("before", "beside"):
        raise UserError(f"config.data.options.thoughts is {thoughts!r}: must be before or beside")
    chat_turns, key = read_chat(layout, record)
    overlap, wait = layout.draw("overlap", key), layout.draw("wait", key)
    turns, ends = [], dict.fromkeys(spec.names, 0)
    before = None  # the turn that the next turn follows
    for number, turn in enumerate(chat_turns):
        name = layout.stream_of(turn.role, turn.where)
        kind = spec.kinds[spec.index(name)]
        start = 0
        if kind == "input":
            start = max(ends.values()) + layout.draw("silence", f"{key} {number}")
        elif before is not None:
            start = max(before.end - overlap, before.start)
            if wait >= 0 and spec.kinds[before.stream] == "input":
                start = min(before.start + wait, before.end)
        layout.bad.add_turn(name, turn.text or "", turn.where)
        turns.append(layout.say(name, max(start, ends[name]), turn.text or ""))
        ends[name] = turns[-1].end
        if kind != "thought" or thoughts == "before":
            before = turns[-1]
    if turns:
        silent = [layout.tokenizer.silence_id] * layout.draw("silence", f"{key} end")
        end = Placement(0, max(ends.values()), silent)
        table = layout.table([*turns, end], key)
        yield loss_weights(table, turns, [turn.weight for turn in chat_turns])
