"""Words or utterances with the times at which they were said; whoever speaks at once stays at once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from msllm.data.converters.layout import Layout, each_record
from msllm.data.sources import BadRecord, Record, text_of
from msllm.data.tables import Placement, Table
from msllm.errors import UserError

OPTIONS = {"row_seconds": 0.25, "roles": {}, "longest_silence": 0, "ignored": []}


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"utterances": [{"start": seconds, "end": seconds, "speaker": role, "text": text}, ...]}, a recording.

    `roles` maps speakers to streams ("*": all others); several may share one. Row r is the time from r * `row_seconds`
    to (r + 1) * `row_seconds`, counted from the first utterance. The n tokens of an utterance are spread evenly over
    its time, each in the row in which its n-th part of the time ends; where that row is taken, in the next free one: a
    stream with more tokens than rows falls behind, and catches up in a silence.
    `longest_silence`: rows that remain of a longer time in which no stream says anything (0: all).
    `ignored`: texts that are left out, such as "[silence]".
    """
    seconds = layout.options["row_seconds"]
    if not seconds > 0:
        raise UserError(f"config.data.options.row_seconds is {seconds}: must be positive")
    utterances = record.value.get("utterances") if isinstance(record.value, dict) else None
    if not isinstance(utterances, list):
        raise BadRecord(
            f'{record.where}: must be {{"utterances": [{{"start", "end", "speaker", "text"}}, ...]}}'
        )
    said = []
    for number, utterance in enumerate(utterances):
        where = f"{record.where}, utterance {number}"
        text = text_of(utterance, "text", where)
        name = layout.stream_of(text_of(utterance, "speaker", where), where)
        start, end = _time(utterance, "start", where), _time(utterance, "end", where)
        if end < start:
            raise BadRecord(
                f"{where}: ends at {end}, before it starts at {start}: correct the times"
            )
        if text not in layout.options["ignored"]:
            said.append((start, end, name, text))
    if not said:
        return
    said.sort(
        key=lambda item: item[:2]
    )  # stable: of two that start and end at once, the first given is first
    first = said[0][0]
    cells: dict[str, list[tuple[int, int]]] = {
        name: [] for name in layout.spec.names
    }  # (row, token), rising
    for start, end, name, text in said:
        tokens, column = layout.tokenizer.encode(text), cells[name]
        for i, token in enumerate(tokens, 1):
            row = math.ceil((start - first + (end - start) * i / len(tokens)) / seconds) - 1
            column.append((max(row, column[-1][0] + 1 if column else 0), token))
    rows = sorted({row for column in cells.values() for row, _ in column})
    place = dict(zip(rows, _shorten(rows, layout.options["longest_silence"])))
    placements = []
    for name, column in cells.items():
        tokens = [layout.tokenizer.silence_id] * (place[column[-1][0]] + 1 if column else 0)
        for row, token in column:
            tokens[place[row]] = token
        placements.append(Placement(layout.spec.index(name), 0, tokens))
    yield layout.table(placements, json.dumps(utterances, sort_keys=True))


def _shorten(rows: list[int], longest: int) -> list[int]:
    """The rows in which anything is said, after every silence is cut to `longest` rows (0: none is)."""
    if longest <= 0:
        return rows
    shorter, before = [], -1
    for row in rows:
        silent = min(row - before - 1, longest)
        shorter.append((shorter[-1] if shorter else -1) + 1 + silent)
        before = row
    return shorter


def _time(utterance: dict[str, Any], key: str, where: str) -> float:
    value = utterance.get(key)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise BadRecord(f"{where}: {key!r} is {value!r}: must be a time in seconds")
    return value
