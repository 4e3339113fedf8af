"""Readers of public corpora: `config.data.format = "msllm.data.corpora:switchboard"`, and so on.

Each is a function from a file to the records that the converter named in its docstring takes. If
the output of one of them changes, it needs a new revision in msllm/data/identity.py.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any


def switchboard(file: str) -> Iterator[dict[str, Any]]:
    """For `timed`: the timed transcripts of NLTK's Switchboard sample, one call per record.

    The file has blocks separated by empty lines, in turns of speaker A and B of every call, with
    lines `start end text`. Silence is left out.
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
    """For `timed`: one recording of all loops of apollo13rt.

    `file` is any of the files `*-loop.json`; the others are found beside it. Speakers are
    `loop/label`, such as `flight-director/EECOM`. Utterances without times are left out: 2 % of
    all, namely utterances that were interrupted, and their continuations.
    """
    utterances = []
    for path in sorted(pathlib.Path(file).parent.glob("*-loop.json")):
        loop = path.name.removesuffix("-loop.json")
        for said in json.loads(path.read_text()):
            times = {"start": said.get("start"), "end": said.get("end")}
            if None not in times.values():
                utterances.append(
                    times | {"speaker": f"{loop}/{said['source']}", "text": said["message"]}
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


LOWEST, HIGHEST = 36, 81  # pitches of all chorales
TRANSPOSITIONS = range(-6, 6)  # semitones: every key once


def _chorales(part: str, every: int, transpose: bool, file: str) -> Iterator[dict[str, Any]]:
    """For `aligned`: the JSB chorales with separate voices, from the top down.

    Args:
      part: train, valid or test.
      every: take one 16th note of this many.
      transpose: yield every song in all keys in which it stays within the range of the corpus.
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

    A call is annotated at the turn of the user or the assistant that it follows.
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

    `file` is one of `BFCL_v4_*.json` with one turn; the answers are beside it in
    `answer_BFCL_v4_*.json`. If an argument has several right values, the first is taken; an
    argument that may be left out ("") is left out. The functions are the system's speech.
    """
    path = pathlib.Path(file)
    answers = map(json.loads, path.with_name(f"answer_{path.name}").read_text().splitlines())
    known = {answer["id"]: answer["ground_truth"] for answer in answers}
    for line in path.read_text().splitlines():
        question = json.loads(line)
        calls = []
        for name, values in (item for call in known[question["id"]] for item in call.items()):
            arguments = {key: right[0] for key, right in values.items() if right[0] != ""}
            calls.append(_call(name, arguments))
        system = {"role": "system", "content": json.dumps(question["function"], ensure_ascii=False)}
        answer = {"role": "assistant", "content": None, "tool_calls": calls}
        yield {"messages": [system, *question["question"][0], answer]}


def _call(name: str, arguments: Any, identity: str | None = None) -> dict[str, Any]:
    call = {"function": {"name": name, "arguments": arguments}}
    return call if identity is None else {"id": identity, **call}
