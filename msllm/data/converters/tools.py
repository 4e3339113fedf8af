"""Tool traces: speech, calls and results in separate streams, with calls that run in parallel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from msllm.data.converters.layout import Choice, Layout, each_record
from msllm.data.converters.messages import Turn, read_chat
from msllm.data.sources import BadRecord, Record
from msllm.data.tables import Placement, Table
from msllm.errors import UserError

OPTIONS = {
    "roles": {},
    "calls": ["call"],
    "results": ["result"],
    "call_after": Choice(-1, least=-1),
    "latency": Choice(0, least=0),
    "ignored_keys": [],
}


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"messages": [...]} in the form of chat APIs, or another form that `messages` reads.

    A message has a "role" and a "content" (speech; may be null). A message may have "tool_calls",
    [{"id", "function": {"name", "arguments"}}, ...], or one "function_call". The content of a
    message of role "tool" or "function" is the result of the call with its "tool_call_id". Without
    one, it is the result of the first call without a result, among those of its "name" if it has
    one. The text of a call is `name arguments`.

    Speech starts when everything before it has ended.

    Options:

    - `roles`: maps the roles of speech to streams, as in `Layout.stream_of`.
    - `calls`, `results`: lists of streams. Each call of a message goes to the stream of `calls`
      that is free first, and its result to the stream at the same index of `results`.
    - `call_after`: start calls this many rows after the start of the last speech of an input
      stream, but not before the end of the results of earlier messages. -1: start them together
      with the speech of their message, when everything before it has ended.
    - `latency`: start a result this many rows after the end of its call.
    - `ignored_keys`: keys of records and messages that are left out, as in `check_keys`.
    """
    _check_streams(layout)
    turns, key = read_chat(layout, record, calls=True)
    trace = _Trace(layout, key)
    for turn in turns:
        if turn.is_result:
            trace.add_result(turn)
        else:
            trace.add_speech(turn)
    if trace.placements:
        yield layout.table(trace.placements, trace.key, weights=trace.weights)


class _Call(NamedTuple):
    place: int  # index in the options `calls` and `results`
    end: int  # the row after its last token
    identity: str  # "": it has none
    name: str
    where: str  # the place of its message


class _Trace:
    """Collects the placements of one record, message by message."""

    def __init__(self, layout: Layout, key: str):
        self.key = key
        self.placements: list[Placement] = []
        self.weights: list[float] = []  # of the placements
        self._layout = layout
        self._calls, self._results = layout.options["calls"], layout.options["results"]
        self._call_after = layout.draw("call_after", key)
        self._latency = layout.draw("latency", key)
        self._free = dict.fromkeys(layout.spec.names, 0)  # per stream, the row after its last token
        self._made: dict[str, _Call] = {}  # the last call of each id
        self._open: list[_Call] = []  # calls without a result yet
        self._input_start = 0  # the row in which the last speech of an input stream started
        self._results_end = 0  # the row after the results so far

    def add_result(self, turn: Turn) -> None:
        """Places the result of a call. Raises BadRecord."""
        call = self._find_call(turn)
        start = call.end + self._latency
        said = self._say(self._results[call.place], start, turn.text or "", turn.weight)
        self._results_end = max(self._results_end, said.end)

    def add_speech(self, turn: Turn) -> None:
        """Places the speech of a turn, and its calls. Raises BadRecord."""
        now = max(self._free.values())
        if turn.text or not turn.calls:
            name = self._layout.stream_of(turn.role, turn.where)
            self._layout.bad.add_turn(name, turn.text or "", turn.where)
            start = self._say(name, now, turn.text or "", turn.weight).start
            if self._layout.spec.kinds[self._layout.spec.index(name)] == "input":
                self._input_start = start
        if self._call_after >= 0:
            now = min(max(self._input_start + self._call_after, self._results_end), now)
        for call in turn.calls:
            place = min(range(len(self._calls)), key=lambda i: self._first_row(i, now))
            text = f"{call.name} {call.arguments}"
            said = self._say(self._calls[place], now, text, turn.weight)
            made = _Call(place, said.end, call.identity, call.name, turn.where)
            self._open.append(made)
            if call.identity:
                self._made[call.identity] = made

    def _find_call(self, turn: Turn) -> _Call:
        """Returns the call that a turn is the result of. Raises BadRecord."""
        if turn.identity:
            found = [self._made[turn.identity]] if turn.identity in self._made else []
        else:
            found = [call for call in self._open if turn.name in ("", call.name)]
        if not found:
            known = ", ".join(self._made) or "none"
            raise BadRecord(
                f"{turn.where}: 'tool_call_id' is {turn.identity!r}: must be the id of an earlier"
                f" call ({known}); without ids, a result needs an earlier call without one"
            )
        call = found[0]
        if len({one.where for one in found}) > 1:
            raise BadRecord(
                f"{turn.where}: the result has no 'tool_call_id', and may be that of calls of"
                f" {len(found)} messages: add the ids of calls and results"
            )
        if call in self._open:
            self._open.remove(call)
        return call

    def _first_row(self, place: int, now: int) -> int:
        """Returns the row from `now` on in which both streams at a place are free."""
        return max(now, self._free[self._calls[place]], self._free[self._results[place]])

    def _say(self, stream: str, start: int, text: str, weight: float) -> Placement:
        placement = self._layout.say(stream, max(start, self._free[stream]), text)
        self.placements.append(placement)
        self.weights.append(weight)
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
