"""Chats: one turn after another, or overlapping."""

from __future__ import annotations

import json
from collections.abc import Iterator

from msllm.data.converters.layout import Choice, Layout, each_record
from msllm.data.sources import BadRecord, Record, text_of
from msllm.data.tables import Table
from msllm.errors import UserError

OPTIONS = {
    "roles": {},
    "overlap": Choice(0, least=0),
    "wait": Choice(-1, least=-1),
    "thoughts": "before",
}


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"messages": [{"role", "content"}, ...]}.

    `roles` maps roles to streams ("*": all others; a role left out is a stream's name). A turn starts when the one
    before it has ended, a turn of an input when all have. Turns of other streams may come earlier, though never before
    the turn that they follow starts:

    overlap: so many rows before that turn ends.
    wait: so many rows after the last turn of an input started (-1: no matter); it still follows other turns.
    thoughts: "beside": the turn after a thought starts as if the thought were not there; "before": it follows it.
    """
    thoughts, spec = layout.options["thoughts"], layout.spec
    if thoughts not in ("before", "beside"):
        raise UserError(f"config.data.options.thoughts is {thoughts!r}: must be before or beside")
    messages = record.value.get("messages") if isinstance(record.value, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord(
            f'{record.where}: must be {{"messages": [{{"role": ..., "content": ...}}, ...]}}'
        )
    key = json.dumps(messages, sort_keys=True)
    overlap, wait = layout.draw("overlap", key), layout.draw("wait", key)
    turns, ends = [], dict.fromkeys(spec.names, 0)
    before = None  # the turn that the next one follows
    for message in messages:
        role, content = (
            text_of(message, "role", record.where),
            text_of(message, "content", record.where),
        )
        name = layout.stream_of(role, record.where)
        kind = spec.kinds[spec.index(name)]
        start = 0
        if kind == "input":
            start = max(ends.values())
        elif before is not None:
            start = max(before.end - overlap, before.start)
            if wait >= 0 and spec.kinds[before.stream] == "input":
                start = min(before.start + wait, before.end)
        turns.append(layout.say(name, max(start, ends[name]), content))
        ends[name] = turns[-1].end
        if kind != "thought" or thoughts == "before":
            before = turns[-1]
    if turns:
        yield layout.table(turns, key)
