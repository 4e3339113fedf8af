"""Readers of public corpora: `config.data.format = "msllm.data.corpora:switchboard"`, and so on.

Each reader yields the records of a file for the converter that its docstring names. If you change
what a reader yields, increase its version in `REVISIONS` (msllm/data/identity.py).
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any


def switchboard(file: str) -> Iterator[dict[str, Any]]:
    """For `timed`: the timed transcripts of NLTK's Switchboard sample, one call per record.

    The file consists of blocks separated by empty lines. For each call there is a block of speaker
    A, then one of speaker B. A line is `start end text`. Silence is left out.
    """
    blocks = pathlib.Path(file).read_text().strip().split("\n\n")
    for a, b in zip(blocks[::2], blocks[1::2], strict=True):
        yield {"utterances": [*_switchboard_block("A", a), *_switchboard_block("B", b)]}


def _switchboard_block(speaker: str, block: str) -> Iterator[dict[str, Any]]:
    for line in block.strip().splitlines():
        start, end, text = line.strip().split(maxsplit=2)
        if text != "[silence]":
            yield {"start": float(start), "end": float(end), "speaker": speaker, "text": text}


def apollo13(file: str) -> Iterator[dict[str, Any]]:
    """For `timed`: all voice loops of apollo13rt as one recording.

    `file` is any one of the files `*-loop.json`; the others are read from the same folder. Speakers
    are `loop/label`, such as `flight-director/EECOM`. Utterances without times (2 % of all) are
    left out. They are utterances that were interrupted, and their continuations.
    """
    utterances = []
    for path in sorted(pathlib.Path(file).parent.glob("*-loop.json")):
        loop = path.name.removesuffix("-loop.json")
        for item in json.loads(path.read_text()):
            times = {"start": item.get("start"), "end": item.get("end")}
            if None not in times.values():
                utterances.append(
                    times | {"speaker": f"{loop}/{item['source']}", "text": item["message"]}
                )
    yield {"utterances": utterances}


def tatoeba(file: str) -> Iterator[dict[str, Any]]:
    """For `wait_k`: sentence pairs of manythings.org/anki.

    A line is `source TAB target TAB attribution`.
    """
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            source, target, attribution = line.rstrip("\n").split("\t")
            yield {"source": source, "target": target, "attribution": attribution}


LOWEST, HIGHEST = 36, 81  # the range of pitches in the chorales (MIDI note numbers)
TRANSPOSITIONS = range(-6, 6)  # in semitones; reaches every key once


def _chorales(part: str, every: int, transpose: bool, file: str) -> Iterator[dict[str, Any]]:
    """For `aligned`: the JSB chorales with separate voices, from the top down.

    Args:
      part: train, valid or test.
      every: keep every n-th row. A row of the file is a 16th note.
      transpose: yield each chorale in all keys in which it stays within the range of the corpus.
    """
    for song in json.loads(pathlib.Path(file).read_text())[part]:
        pitches = [pitch for row in song for pitch in row if pitch >= 0]  # -1 is silence
        for shift in TRANSPOSITIONS if transpose else (0,):
            if LOWEST <= min(pitches) + shift and max(pitches) + shift <= HIGHEST:
                yield {"rows": [_transpose(row, shift) for row in song[::every]]}


def _transpose(row: list[int], shift: int) -> list[int]:
    return [pitch + shift if pitch >= 0 else pitch for pitch in row]


chorales_train = functools.partial(_chorales, "train", 1, False)
chorales_train_transposed = functools.partial(_chorales, "train", 1, True)
chorales_valid = functools.partial(_chorales, "valid", 1, False)
chorales_test = functools.partial(_chorales, "test", 1, False)
quarter_chorales_train = functools.partial(_chorales, "train", 4, False)
quarter_chorales_train_transposed = functools.partial(_chorales, "train", 4, True)
quarter_chorales_valid = functools.partial(_chorales, "valid", 4, False)
quarter_chorales_test = functools.partial(_chorales, "test", 4, False)


def taskmaster4(file: str) -> Iterator[dict[str, Any]]:
    """For `tools`: dialogues of Taskmaster-4.

    The corpus annotates a call at the turn, of the user or the assistant, that it follows.
    """
    for dialogue in json.loads(pathlib.Path(file).read_text()):
        messages = []
        for turn in dialogue["utterances"]:
            messages.append({"role": turn["speaker"], "content": turn["text"]})
            messages += _taskmaster_calls(turn.get("annotations", []))
        yield {"messages": messages}


def _taskmaster_calls(annotations: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Returns the message of a turn's calls, and the messages of their results."""
    calls: dict[str, dict[str, str]] = {}
    responses: dict[str, dict[str, str]] = {}
    for note in annotations:
        _, kind, number = note["context"].split("_")  # api_call_3 or api_response_3
        notes = {"call": calls, "response": responses}[kind]
        notes.setdefault(number, {})[note["name"]] = note["value"]
    messages: list[dict[str, Any]] = []
    if calls:
        made = [
            _call(call["api_call"], call.get("request", ""), number)
            for number, call in calls.items()
        ]
        messages.append({"role": "assistant", "content": None, "tool_calls": made})
    for number, answer in responses.items():
        content = answer.get("response", "")
        messages.append({"role": "tool", "tool_call_id": number, "content": content})
    return messages


def bfcl(file: str) -> Iterator[dict[str, Any]]:
    """For `tools`: questions of the Berkeley Function Calling Leaderboard, answered by calls.

    `file` is one of the single-turn files `BFCL_v4_*.json`. Its answers are in the same folder, in
    `answer_BFCL_v4_*.json`. If an argument has several correct values, the first is used. An
    argument whose first value is "" may be left out, and is. The system message lists the
    functions.
    """
    path = pathlib.Path(file)
    answers = map(json.loads, path.with_name(f"answer_{path.name}").read_text().splitlines())
    known = {answer["id"]: answer["ground_truth"] for answer in answers}
    for line in path.read_text().splitlines():
        question = json.loads(line)
        calls = []
        for name, values in (item for call in known[question["id"]] for item in call.items()):
            arguments = {key: correct[0] for key, correct in values.items() if correct[0] != ""}
            calls.append(_call(name, arguments))
        system = {"role": "system", "content": json.dumps(question["function"], ensure_ascii=False)}
        answer = {"role": "assistant", "content": None, "tool_calls": calls}
        yield {"messages": [system, *question["question"][0], answer]}


def _call(name: str, arguments: Any, identity: str | None = None) -> dict[str, Any]:
    call = {"function": {"name": name, "arguments": arguments}}
    return call if identity is None else {"id": identity, **call}
