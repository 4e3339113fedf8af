"""Words or utterances with their times: what overlaps in time overlaps in rows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from msllm.data.converters.layout import Layout, check_keys, check_rows, each_record
from msllm.data.sources import BadRecord, Record, text_of
from msllm.data.tables import Placement, Table
from msllm.errors import UserError

OPTIONS = {
    "row_seconds": 0.25,
    "roles": {},
    "longest_silence": 0,
    "ignored": [],
    "ignored_keys": [],
}
_MAX_SECONDS = 1e11  # the year 5138, counted from 1970; times in milliseconds since 1970 are beyond
_NAMED = re.compile(r"([^\s:][^:]{0,39}):\s+(?=\S)")  # "Anna: ..."
_KEYS = frozenset(("start", "end", "speaker", "text"))


class _Utterance(NamedTuple):
    start: float  # seconds
    end: float
    stream: str
    text: str


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"utterances": [{"start": s, "end": s, "speaker": role, "text": text}, ...]}.

    A record is a recording, with times in seconds. Row r covers the time from r * `row_seconds` to
    (r + 1) * `row_seconds` after the start of the first utterance. The time of an utterance with n
    tokens is divided into n equal parts, and each token goes into the row in which its part ends.
    If that row is taken, the token goes into the next free row: a stream with more tokens than rows
    falls behind, and catches up during a silence.

    Options:

    - `roles`: maps speakers to streams, as in `Layout.stream_of`. Speakers may share a stream.
    - `longest_silence`: shorten each silence of all streams to at most this many rows; 0: off.
    - `ignored`: utterances with these texts are left out, such as "[silence]".
    - `ignored_keys`: keys of recordings and utterances that are left out, as in `check_keys`.

    The speaker of an utterance whose speaker is "" is the name before a colon at the start of its
    text, if `roles` maps this name or it is the name of a stream.
    """
    seconds = layout.options["row_seconds"]
    if not 0 < seconds < math.inf:
        raise UserError(f"config.data.options.row_seconds is {seconds}: must be positive")
    recording = record.get("utterances")
    if not isinstance(recording, list):
        raise BadRecord(
            f"{record.where}: must be"
            ' {"utterances": [{"start", "end", "speaker", "text"}, ...]}'
        )
    check_keys(layout, record.value, {"utterances"}, record.where)
    utterances = _utterances(layout, recording, record.where)
    if not utterances:
        return
    cells = _spread(layout, utterances, seconds)
    rows = sorted({row for column in cells.values() for row, _ in column})
    place = dict(zip(rows, _shorten(rows, layout.options["longest_silence"])))
    last = max(place.values(), default=0)
    span = f" of {seconds} s (times are in seconds; see config.data.options.longest_silence)"
    check_rows(last + 1, record.where, span)
    placements = []
    for name, column in cells.items():
        tokens = [layout.tokenizer.silence_id] * (place[column[-1][0]] + 1 if column else 0)
        for row, token in column:
            tokens[place[row]] = token
        placements.append(Placement(layout.spec.index(name), 0, tokens))
    yield layout.table(placements, json.dumps(recording, sort_keys=True))


def _utterances(layout: Layout, recording: list[Any], where: str) -> list[_Utterance]:
    """Returns the utterances of a recording, sorted by time. Raises BadRecord."""
    found = []
    for number, utterance in enumerate(recording):
        here = f"{where}, utterance {number}"
        text, speaker = text_of(utterance, "text", here), text_of(utterance, "speaker", here)
        check_keys(layout, utterance, _KEYS, here)
        named = None if speaker else _NAMED.match(text)
        if named and layout.maps(named[1]):
            speaker, text = named[1], text[named.end() :]
        start, end = _time(utterance, "start", here), _time(utterance, "end", here)
        if end < start:
            raise BadRecord(
                f"{here}: ends at {end}, before it starts at {start}: correct the times"
            )
        if text not in layout.options["ignored"] and not layout.leaves_out(speaker):
            stream = layout.stream_of(speaker, here)
            found.append(_Utterance(start, end, stream, text))
    # The sort is stable: utterances of the same times stay in the order of the record.
    return sorted(found, key=lambda utterance: utterance[:2])


def _time(utterance: dict[str, Any], key: str, where: str) -> float:
    value: Any = utterance.get(key)
    if type(value) not in (int, float) or not -_MAX_SECONDS < value < _MAX_SECONDS:
        raise BadRecord(f"{where}: {key!r} is {_short(value)}: must be a time in seconds")
    return value


def _short(value: Any) -> str:
    """Returns a value for a message. Python refuses to write integers of thousands of digits."""
    return (
        "a number of many digits" if isinstance(value, int) and value > 1e18 else f"{value!r:.40}"
    )


def _spread(
    layout: Layout, utterances: list[_Utterance], seconds: float
) -> dict[str, list[tuple[int, int]]]:
    """Returns the cells (row, token) of every stream, in the order of their rows."""
    cells: dict[str, list[tuple[int, int]]] = {name: [] for name in layout.spec.names}
    first = utterances[0].start
    for start, end, stream, text in utterances:
        tokens, column = layout.encode(text), cells[stream]
        for i, token in enumerate(tokens, 1):
            row = math.ceil((start - first + (end - start) * i / len(tokens)) / seconds) - 1
            free = column[-1][0] + 1 if column else 0
            column.append((max(row, free), token))
    return cells


def _shorten(rows: list[int], longest: int) -> list[int]:
    """Returns new numbers for the rows that hold tokens.

    Every silence between them is shortened to at most `longest` rows; 0: off.
    """
    if longest <= 0:
        return rows
    shorter: list[int] = []
    before = -1
    for row in rows:
        silent = min(row - before - 1, longest)
        shorter.append((shorter[-1] if shorter else -1) + 1 + silent)
        before = row
    return shorter
