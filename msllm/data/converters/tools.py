"""Tool traces: speech, calls and results in separate streams, with calls that run in parallel."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from msllm.data.converters.layout import Choice, Layout, each_record, messages_of
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

    A message has a "role" and a "content" (speech; may be null). A message of role "assistant" may
    have "tool_calls", [{"id", "function": {"name", "arguments"}}, ...]. The content of a message
    of role "tool" is the result of the call with its "tool_call_id". The text of a call is
    `name arguments`.

    Speech starts when everything before it has ended.

    Options:

    - `roles`: maps the roles of speech to streams, as in `Layout.stream_of`.
    - `calls`, `results`: lists of streams. Each call of a message goes to the stream of `calls`
      that is free first, and its result to the stream at the same index of `results`.
    - `call_after`: start calls this many rows after the start of the last speech of an input
      stream, but not before the end of the results of earlier messages. -1: start them together
      with the speech of their message, when everything before it has ended.
    - `latency`: start a result this many rows after the end of its call.
    """
    _check_streams(layout)
    messages = messages_of(record)
    trace = _Trace(layout, json.dumps(messages, sort_keys=True))
    for number, message in enumerate(messages):
        where = f"{record.where}, message {number}"
        role = text_of(message, "role", where)
        if role == "tool":
            trace.add_result(message, where)
        else:
            trace.add_message(role, message, where)
    if trace.placements:
        yield layout.table(trace.placements, trace.key)


class _Call(NamedTuple):
    place: int  # index in the options `calls` and `results`
    end: int  # the row after its last token


class _Trace:
    """Collects the placements of one record, message by message."""

    def __init__(self, layout: Layout, key: str):
        self.key = key
        self.placements: list[Placement] = []
        self._layout = layout
        self._calls, self._results = layout.options["calls"], layout.options["results"]
        self._call_after = layout.draw("call_after", key)
        self._latency = layout.draw("latency", key)
        self._free = dict.fromkeys(layout.spec.names, 0)  # per stream, the row after its last token
        self._made: dict[str, _Call] = {}  # by id
        self._input_start = 0  # the row in which the last speech of an input stream started
        self._results_end = 0  # the row after the results so far

    def add_result(self, message: Mapping[str, Any], where: str) -> None:
        """Places the result of a call. Raises BadRecord."""
        call = _find_call(self._made, message, where)
        text = text_of(message, "content", where)
        said = self._say(self._results[call.place], call.end + self._latency, text)
        self._results_end = max(self._results_end, said.end)

    def add_message(self, role: str, message: Mapping[str, Any], where: str) -> None:
        """Places the speech of a message, and its calls. Raises BadRecord."""
        now = max(self._free.values())
        if message.get("content") or not message.get("tool_calls"):
            name = self._layout.stream_of(role, where)
            start = self._say(name, now, text_of(message, "content", where)).start
            if self._layout.spec.kinds[self._layout.spec.index(name)] == "input":
                self._input_start = start
        if self._call_after >= 0:
            now = min(max(self._input_start + self._call_after, self._results_end), now)
        for name, identity, arguments in _calls_of(message, where):
            place = min(range(len(self._calls)), key=lambda i: self._first_row(i, now))
            said = self._say(self._calls[place], now, f"{name} {arguments}")
            self._made[identity] = _Call(place, said.end)

    def _first_row(self, place: int, now: int) -> int:
        """Returns the row from `now` on in which both streams at a place are free."""
        return max(now, self._free[self._calls[place]], self._free[self._results[place]])

    def _say(self, stream: str, start: int, text: str) -> Placement:
        placement = self._layout.say(stream, max(start, self._free[stream]), text)
        self.placements.append(placement)
        self._free[stream] = placement.end
        return placement


def _check_streams(layout: Layout) -> None:
    calls, results = layout.options["calls"], layout.options["results"]
    if len(calls) != len(results) or not calls:
        raise UserError(
            f"config.data.options.calls is {calls}, results is {results}: both must have the same"
            " number of streams, at least one"
        )
    for name in (*calls, *results):
        layout.spec.index(name)  # raises UserError for an unknown stream


def _calls_of(message: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, str]]:
    """Yields (name, id, arguments) of every call of a message. Raises BadRecord."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise BadRecord(f"{where}: 'tool_calls' is {calls!r}: must be a list")
    for call in calls:
        function: Any = call.get("function") if isinstance(call, dict) else None
        name, arguments = text_of(function, "name", where), function.get("arguments", "")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        yield name, str(call.get("id", "")), arguments


def _find_call(made: Mapping[str, _Call], message: Mapping[str, Any], where: str) -> _Call:
    """Returns the call that a message is the result of. Raises BadRecord."""
    identity = str(message.get("tool_call_id", ""))
    if identity not in made:
        known = ", ".join(made) or "none"
        raise BadRecord(
            f"{where}: 'tool_call_id' is {identity!r}: must be the id of an earlier call ({known})"
        )
    return made[identity]
