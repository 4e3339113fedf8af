"""Readers of public corpora that are not records yet: `config.data.format = "msllm.data.corpora:switchboard"`.

Each is a function from a file to the records that the converter named in its docstring takes.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any


def switchboard(file: str) -> Iterator[dict[str, Any]]:
    """For `timed`: the timed transcripts of NLTK's Switchboard sample, a call each, speakers A and B.

    Blocks parted by empty lines, A and B of every call in turns; lines `start end text`. Silence is left out.
    """
    blocks = pathlib.Path(file).read_text().strip().split("\n\n")
    for call in zip(blocks[::2], blocks[1::2], strict=True):
        utterances = []
        for speaker, block in zip("AB", call):
            for line in block.strip().splitlines():
                start, end, text = line.strip().split(maxsplit=2)
                if text != "[silence]":
                    utterances.append(
                        {"start": float(start), "end": float(end), "speaker": speaker, "text": text}
                    )
        yield {"utterances": utterances}


def apollo13(file: str) -> Iterator[dict[str, Any]]:
    """For `timed`: one recording of both loops of apollo13rt. `file` is either of `*-loop.json`; it finds the others.

    Speakers are `loop/label`, such as `flight-director/EECOM`. Utterances without times (2 in 100: they go on later, or
    are what goes on) are left out.
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
    """For `wait_k`: sentence pairs of manythings.org/anki, lines `source TAB target TAB attribution`."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            source, target, attribution = line.rstrip("\n").split("\t")
            yield {"source": source, "target": target, "attribution": attribution}


LOWEST, HIGHEST = 36, 81  # pitches of all chorales
TRANSPOSITIONS = range(-6, 6)  # semitones: every key once


def _chorales(part: str, every: int, transpose: bool, file: str) -> Iterator[dict[str, Any]]:
    """For `aligned`: one part (train, valid or test) of the JSB chorales with separate voices, from the top down.

    `every`: of the 16th notes one in so many. `transpose`: every song in all keys in which it stays within the range of
    the corpus.
    """
    for song in json.loads(pathlib.Path(file).read_text())[part]:
        pitches = [pitch for row in song for pitch in row if pitch >= 0]  # -1 is silence
        for shift in TRANSPOSITIONS if transpose else (0,):
            if LOWEST <= min(pitches) + shift and max(pitches) + shift <= HIGHEST:
                yield {
                    "rows": [
                        [pitch + shift if pitch >= 0 else pitch for pitch in row]
                        for row in song[::every]
                    ]
                }


chorales_train = functools.partial(_chorales, "train", 1, False)
chorales_train_transposed = functools.partial(_chorales, "train", 1, True)
chorales_valid = functools.partial(_chorales, "valid", 1, False)
chorales_test = functools.partial(_chorales, "test", 1, False)
quarter_chorales_train = functools.partial(_chorales, "train", 4, False)
quarter_chorales_train_transposed = functools.partial(_chorales, "train", 4, True)
quarter_chorales_valid = functools.partial(_chorales, "valid", 4, False)
quarter_chorales_test = functools.partial(_chorales, "test", 4, False)


def taskmaster4(file: str) -> Iterator[dict[str, Any]]:
    """For `tools`: dialogues of Taskmaster-4, whose calls hang on the user's or the assistant's turns."""
    for dialogue in json.loads(pathlib.Path(file).read_text()):
        messages = []
        for turn in dialogue["utterances"]:
            messages.append({"role": turn["speaker"], "content": turn["text"]})
            notes: dict[str, dict[str, dict[str, str]]] = {"call": {}, "response": {}}
            for note in turn.get("annotations", []):  # contexts are api_call_3 and api_response_3
                _, kind, number = note["context"].split("_")
                notes[kind].setdefault(number, {})[note["name"]] = note["value"]
            calls = [
                {
                    "id": number,
                    "function": {"name": call["api_call"], "arguments": call.get("request", "")},
                }
                for number, call in notes["call"].items()
            ]
            if calls:
                messages.append({"role": "assistant", "content": None, "tool_calls": calls})
            for number, answer in notes["response"].items():
                messages.append(
                    {"role": "tool", "tool_call_id": number, "content": answer.get("response", "")}
                )
        yield {"messages": messages}


def bfcl(file: str) -> Iterator[dict[str, Any]]:
    """For `tools`: questions of the Berkeley Function Calling Leaderboard and the calls that answer them.

    `file` is one of `BFCL_v4_*.json` with one turn; the answers lie beside it in `answer_BFCL_v4_*.json`. Of several
    right values of an argument the first is taken; one that may be left out ("") is. The functions are the system's
    speech.
    """
    path = pathlib.Path(file)
    answers = map(json.loads, path.with_name(f"answer_{path.name}").read_text().splitlines())
    known = {answer["id"]: answer["ground_truth"] for answer in answers}
    for line in path.read_text().splitlines():
        question = json.loads(line)
        calls = []
        for name, values in (item for call in known[question["id"]] for item in call.items()):
            arguments = {key: right[0] for key, right in values.items() if right[0] != ""}
            calls.append({"function": {"name": name, "arguments": arguments}})
        system = {"role": "system", "content": json.dumps(question["function"], ensure_ascii=False)}
        answer = {"role": "assistant", "content": None, "tool_calls": calls}
        yield {"messages": [system, *question["question"][0], answer]}
