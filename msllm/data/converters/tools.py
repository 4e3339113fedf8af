"""Tool traces: speech, calls and results in streams of their own; calls made at once run at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from msllm.data.converters.layout import Choice, Layout, each_record
from msllm.data.sources import BadRecord, Record, text_of
from msllm.data.tables import Placement, Table
from msllm.errors import UserError

OPTIONS = {
    "roles": {},
    "calls": ["call"],
    "results": ["result"],
    "call_after": Choice(-1, least=-1),
    "latency": Choice(0, least=0),
}


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"messages": [...]} in the form of chat APIs.

    A message has a "role" and a "content" (speech; may be null). A message of role "assistant" may have "tool_calls",
    [{"id", "function": {"name", "arguments"}}, ...]; a message of role "tool" has the "tool_call_id" whose result its
    content is. A call is said as `name arguments`.

    `roles` maps the roles of speech to streams. Every call of a message goes to the stream of `calls` that is free
    first, its result to the stream at the same place of `results`. Calls start with the speech of their message:
    when all before them has ended, or (`call_after` >= 0) so many rows after the last speech of an input started, but
    not before the results that were there when the calls were made. A result starts `latency` rows after its call
    ended, speech when all before it has ended.
    """
    calls, results = layout.options["calls"], layout.options["results"]
    if len(calls) != len(results) or not calls:
        raise UserError(
            f"config.data.options.calls is {calls}, results is {results}: give as many, one or more"
        )
    for name in (*calls, *results):
        layout.spec.index(name)  # raises UserError
    messages = record.value.get("messages") if isinstance(record.value, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord(
            f'{record.where}: must be {{"messages": [{{"role": ..., "content": ...}}, ...]}}'
        )
    key = json.dumps(messages, sort_keys=True)
    call_after, latency = layout.draw("call_after", key), layout.draw("latency", key)
    placements: list[Placement] = []
    free = dict.fromkeys(layout.spec.names, 0)  # the row after the last token of each stream
    made: dict[
        str, tuple[int, int]
    ] = {}  # id of a call: (place in `calls`, row after its last token)
    heard = 0  # the row in which the last speech of an input started
    known = 0  # the row after the results so far

    def say(name: str, start: int, text: str) -> Placement:
        placements.append(layout.say(name, max(start, free[name]), text))
        free[name] = placements[-1].end
        return placements[-1]

    for number, message in enumerate(messages):
        where = f"{record.where}, message {number}"
        role, content = text_of(message, "role", where), message.get("content")
        if role == "tool":
            place, end = _of_call(made, message, where)
            known = max(
                known, say(results[place], end + latency, text_of(message, "content", where)).end
            )
            continue
        now = max(free.values())
        if content or not message.get("tool_calls"):
            name = layout.stream_of(role, where)
            start = say(name, now, text_of(message, "content", where)).start
            if layout.spec.kinds[layout.spec.index(name)] == "input":
                heard = start
        if call_after >= 0:
            now = min(max(heard + call_after, known), now)
        for name, identity, arguments in _calls(message, where):
            place = min(range(len(calls)), key=lambda i: max(now, free[calls[i]], free[results[i]]))
            made[identity] = place, say(calls[place], now, f"{name} {arguments}").end
    if placements:
        yield layout.table(placements, key)


def _calls(message: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, str]]:
    """(name, id, arguments) of every call of a message."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise BadRecord(f"{where}: 'tool_calls' is {calls!r}: must be a list")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        name, arguments = text_of(function, "name", where), function.get("arguments", "")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        yield name, str(call.get("id", "")), arguments


def _of_call(
    made: Mapping[str, tuple[int, int]], message: Mapping[str, Any], where: str
) -> tuple[int, int]:
    """Place and end of the call whose result a message is."""
    identity = str(message.get("tool_call_id", ""))
    if identity not in made:
        known = ", ".join(made) or "none"
        raise BadRecord(
            f"{where}: 'tool_call_id' is {identity!r}: must be the id of a call before it ({known})"
        )
    return made[identity]
