"""Looks at files and says how their records become tables: converter, options and streams.

The records are read by the readers and the forms of `msllm prepare`. What they cannot use is an
error here as it is there.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msllm.config import StreamsConfig
from msllm.data import files, sources, transcripts
from msllm.data.converters import wait_k
from msllm.data.converters.layout import Layout, Recorder, UnreadKey, check_keys
from msllm.data.converters.messages import LISTS, Turn, pair_of, read_chat
from msllm.data.sources import BadRecord, BadRecords, Part, Record
from msllm.errors import UserError
from msllm.streams import StreamSpec

SAMPLE_BYTES = 16 << 20  # of the input, about; a larger input is looked at in several places
_PLACES = 8
_PEEK = 1 << 16
# Roles whose turns the model writes, the likeliest first. Other names, such as those of people, are
# matched by the order of the turns.
_WRITERS = "assistant output model bot agent ai answer".split()
_THOUGHTS = "reasoning thinking thought thoughts analysis".split()
_PAIRS = (
    ("source", "target"),
    ("src", "tgt"),
)
_TEXTS = "text content document body code story".split()
# Rows between the turns of a chat; each silence draws one of these.
SHORT_SILENCES = (0, 0, 1, 2, 4, 8)  # if chats are long
_SILENCES = (0, 0, 1, 2, 4, 8, 16, 32, 64)
_CALLS = ("tool_calls", "function_call")  # keys of a message
_UTTERANCE = {"start", "end", "speaker", "text"}
_MOST_STREAMS = 12
_TOKENS_BEHIND = 3  # of a target that follows its source
_ROW_SECONDS = (0.1, 0.5)  # the shortest and the longest row of timed data


@dataclasses.dataclass
class Survey:
    """What the input holds.

    Attributes:
      path: the path or glob of the input.
      kind: what the records are, in words.
      converter: `config.data.converter`.
      format: `config.data.format`.
      options: `config.data.options`.
      streams: {name: kind} of the streams.
      notes: what was decided about the records, and why, as sentences.
      records: the number of records looked at.
      share: the share of the input that was looked at, from 0 to 1.
      prompt: {stream: text} of a first input, to try the model with.
      parts: the parts of the input that were looked at, each with its number of records.
    """

    path: str
    kind: str = ""
    converter: str = ""
    format: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    streams: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    records: int = 0
    share: float = 1.0
    prompt: dict[str, str] = dataclasses.field(default_factory=dict)
    parts: list[tuple[Part, int]] = dataclasses.field(default_factory=list)


def survey(path: str, format: str = "") -> Survey:
    """Looks at the input and returns what it holds.

    Args:
      path: a path or glob, as `config.data.path`.
      format: as `config.data.format`.

    Raises UserError if there is no such file, a record cannot be used, or the records are of a kind
    for which no config can be written.
    """
    found = Survey(path, format=format)
    first = _first_file(path)
    kind = format or sources.parts(first)[0].format
    if not format and kind == "jsonl" and not _is_named_json(first) and not _is_json(first):
        kind = "text"
    if kind == "text":
        return _text_files(found)
    records = _sample(found, kind)
    if not records:
        raise UserError(f"--from is {path!r}: there is no record in it")
    keys = set(records[0].value) if isinstance(records[0].value, dict) else set()
    pair = next((pair for pair in _PAIRS if keys.issuperset(pair)), None)
    key = next((key for key in _TEXTS if isinstance(records[0].get(key), str)), None)
    if kind in transcripts.FORMATS or "utterances" in keys:
        return _timed(found, records)
    if keys & set(LISTS) or _is_chat(records[0]):
        return _chats(found, records)
    if pair:
        return _pairs(found, records, pair)
    if key:
        return _texts(found, kind, key)
    columns = ""
    if kind in ("csv", "tsv"):
        columns = "; the first row of the file must name the columns, for example question,answer"
    raise UserError(
        f"{records[0].where}: the record has the keys {sorted(keys)}: init knows chats (messages,"
        " conversations, instruction and output, prompt and completion, question and answer), pairs"
        " (source and target), texts (such as text) and recordings (utterances); rename the keys,"
        f" or write a converter (docs/extending/converter.md){columns}"
    )


def _first_file(path: str) -> str:
    if os.path.isdir(path):
        raise UserError(f"--from is {path!r}: {files.IS_FOLDER}{files.example_glob(path)!r}")
    try:
        return files.input_files(path)[0]
    except UserError as error:
        if "://" in path:  # there are many reasons, and the message names the one
            raise
        raise UserError(
            f"--from is {path!r}: there is no such file{files.missing_file(path)}; give a file or"
            " glob"
        ) from error


def _is_named_json(file: str) -> bool:
    return files.COMPRESSED.sub("", file).lower().endswith((".jsonl", ".ndjson"))


def _is_json(file: str) -> bool:
    """Returns whether the first line of a file is a JSON object."""
    for _, line in files.lines(file):
        if line.strip():
            try:
                return isinstance(json.loads(line), dict)
            except (ValueError, RecursionError):
                return False
    return False


def _sample(found: Survey, kind: str) -> list[Record]:
    """Reads records, evenly spread over the input if it is large. Fills `records` and `share`."""
    portions = sources.portions(found.path, found.format)
    step = max(len(portions) // _PLACES, 1)
    chosen = portions[::step]
    total = sum(files.file_sizes(files.input_files(found.path)).values())
    limit = SAMPLE_BYTES / len(chosen)
    records, size, complete = [], 0, step == 1
    for portion in chosen:
        taken = 0
        for part in portion:
            count = 0
            for record in _read(part):
                records.append(record)
                count += 1
                taken += len(json.dumps(record.value, ensure_ascii=False, default=str).encode())
                if taken > limit:
                    complete = False
                    break
            found.parts.append((part, count))
            if taken > limit:
                break
        size += taken
    found.records = len(records)
    found.share = 1.0 if complete else min(size / max(total, 1), 1.0)
    return records


def _read(part: Part) -> Iterator[Record]:
    return sources.read(part, BadRecords())


def _chats(found: Survey, records: Sequence[Record]) -> Survey:
    ignored: list[str] = []
    has_calls = any(_has_calls(record) for record in records)
    chats = [_turns(record, ignored, has_calls) for record in records]
    turns = [turn for chat in chats for turn in chat]
    counts = collections.Counter(turn.role for turn in turns if not turn.is_result)
    order = list(dict.fromkeys(turn.role for turn in turns if not turn.is_result))
    writer = _writer(chats, order)
    roles = _streams_of_roles(order, writer)
    inputs = [roles[role] for role in order if roles[role] not in ("output", "thought")]
    names = ["system", *inputs] if "system" in inputs else inputs
    found.streams = dict.fromkeys(names, "input")
    if has_calls:
        most = max(len(turn.calls) for turn in turns)
        numbers = [""] if most == 1 else [f"_{i}" for i in range(1, most + 1)]
        found.streams |= {f"result{i}": "input" for i in numbers}
        found.options |= {
            "calls": [f"call{i}" for i in numbers],
            "results": [f"result{i}" for i in numbers],
        }
    if "thought" in roles.values():
        found.streams["thought"] = "thought"
    found.streams |= dict.fromkeys(found.options.get("calls", ()), "output")
    found.streams["output"] = "output"
    if not has_calls:
        # Without a row between them, an answer would begin before the end of the question is seen.
        found.options["overlap"] = -1
        found.options["silence"] = list(_SILENCES)
        found.notes.append(
            "silences of drawn lengths are put between turns, so that the model waits for a"
            " question and answers it whenever it comes"
        )
        found.notes.append(
            "a row lies between a question and its answer, so that all of the answer can depend on"
            " all of the question"
        )
    found.options["roles"] = _roles_option(roles, records[0].where)
    found.kind, found.converter = "chats", "tools" if has_calls else "chat"
    if pair := pair_of(records[0]):
        _say_of_pairs(found, records, *pair)
    else:
        _say_of_empty_turns(found, turns)
    said = ", ".join(f"{role} ({counts[role]:,} turns) -> {roles[role]}" for role in order)
    found.notes.append(f"roles and their streams: {said}")
    if has_calls:
        found.notes.append(
            f"calls go to {', '.join(found.options['calls'])}, and their results to"
            f" {', '.join(found.options['results'])}: one message has at most"
            f" {len(found.options['calls'])}"
        )
    if writer not in _WRITERS:
        found.notes.append(
            f"the model writes what {writer!r} says; for another role, change `roles`"
        )
    _check_streams(found)
    if ignored:
        found.options["ignored_keys"] = ignored
        found.notes.append(
            f"left out, because nothing reads them: the keys {', '.join(ignored)} (ignored_keys)"
        )
    for turn in chats[0]:
        if roles.get(turn.role) == "output" or turn.is_result or turn.calls:
            break
        if turn.text and found.streams.get(roles[turn.role]) == "input":
            found.prompt.setdefault(roles[turn.role], turn.text)
    return found


def _say_of_pairs(found: Survey, records: Sequence[Record], question: str, answer: str) -> None:
    """Says how pairs become chats."""
    found.kind = f"pairs of {question} and {answer}"
    found.notes.append(
        f"a pair is a chat of two turns: {question} is said by user, and {answer} by assistant; for"
        f" an answer that begins while the question is still read, as in simultaneous translation,"
        f" use the converter wait_k (docs/data.md)"
    )
    empty = [
        record.where
        for record in records
        if not all(str(record.get(key) or "").strip() for key in (question, answer))
    ]
    if empty:
        found.notes.append(
            f"WARNING: empty {question} or {answer} in {len(empty):,} of {len(records):,} pairs,"
            f" the first at {empty[0]}: the model learns to give no answer, or to speak without a"
            " question; remove them if this is not what you want"
        )


def _say_of_empty_turns(found: Survey, turns: Sequence[Turn]) -> None:
    """Warns of turns that say nothing. Beside calls, and as a result of one, that is usual."""
    speech = [turn for turn in turns if not turn.is_result and not turn.calls]
    empty = [turn for turn in speech if not (turn.text or "").strip()]
    if empty:
        found.notes.append(
            f"WARNING: {len(empty):,} of {len(speech):,} turns are empty, the first (of"
            f" {empty[0].role}) at {empty[0].where}: the model learns to give no answer, or to"
            " answer silence; remove them if this is not what you want"
        )


def _is_chat(record: Record) -> bool:
    try:
        _turns(record, [], calls=True)
    except UnreadKey:
        return True
    except BadRecord:
        return False
    return True


def _has_calls(record: Record) -> bool:
    """Returns whether a record has calls of tools. Raises BadRecord."""
    ignored: list[str] = []
    while True:
        try:
            read_chat(_chat_layout(ignored), record)
            return False
        except UnreadKey as error:
            if error.key in _CALLS:
                return True
            ignored.append(error.key)


def _turns(record: Record, ignored: list[str], calls: bool) -> list[Turn]:
    """Returns the turns of a chat. Adds keys that nothing reads to `ignored`. Raises BadRecord."""
    while True:
        try:
            return read_chat(_chat_layout(ignored), record, calls).turns
        except UnreadKey as error:
            if error.hint:  # it says something, and there is a way to read it
                raise
            ignored.append(error.key)


def _chat_layout(ignored: list[str]) -> Layout:
    # Which roles the model will write is not known yet.
    roles = {"assistant": "output", "reasoning": "thought", "tools": "user", "*": "user"}
    return _layout({"roles": roles, "ignored_keys": ignored})


def _layout(options: Mapping[str, Any]) -> Layout:
    streams = StreamsConfig(("user", "thought", "output"), ("input", "thought", "output"))
    spec = StreamSpec.from_config(streams)
    return Layout(spec, Recorder(), 1 << 20, options, BadRecords())


def _writer(chats: Sequence[Sequence[Turn]], order: Sequence[str]) -> str:
    """Returns the role whose turns the model writes."""
    for role in _WRITERS:
        if role in order:
            return role
    later = collections.Counter(
        turn.role for chat in chats for turn in chat[1:] if turn.role != chat[0].role
    )
    return later.most_common(1)[0][0] if later else order[-1]


def _streams_of_roles(order: Sequence[str], writer: str) -> dict[str, str]:
    roles = {}
    for role in order:
        if role == writer:
            roles[role] = "output"
        elif role in _THOUGHTS:
            roles[role] = "thought"
        elif role == "developer":
            roles[role] = "system"
        else:
            name = re.sub(r"\W+", "_", role).strip("_").lower() or "input"
            roles[role] = f"{name}_input" if name in ("output", "thought") else name
    return roles


def _roles_option(roles: Mapping[str, str], where: str) -> dict[str, str]:
    """Returns the option `roles`. Keys of a config have no dots, so "*" stands for such roles."""
    option = {role: name for role, name in roles.items() if role != name and "." not in role}
    dotted = {role: name for role, name in roles.items() if "." in role}
    if len(set(dotted.values())) > 1:
        raise UserError(
            f"{where}: the roles or speakers {', '.join(map(repr, dotted))} have dots in their"
            " names, which a config cannot have: rename them"
        )
    if dotted:
        option["*"] = next(iter(dotted.values()))
    return option


def _check_streams(found: Survey) -> None:
    if len(found.streams) > _MOST_STREAMS:
        raise UserError(
            f"--from is {found.path!r}: its records have {len(found.streams)} roles or speakers"
            f" ({', '.join(list(found.streams)[:5])}, ...), and each would get a stream of its own:"
            " rename them to a few, such as user and assistant"
        )


def _pairs(found: Survey, records: Sequence[Record], pair: tuple[str, str]) -> Survey:
    source, target = pair
    found.kind, found.converter = f"pairs of {source} and {target}", "wait_k"
    found.streams = {"user": "input", "output": "output"}
    k = _TOKENS_BEHIND
    found.options = {"source": source, "target": target, "k": k}
    found.notes += [
        f"{target} begins {k} tokens after {source} (k = {k}), as in simultaneous translation; with"
        " k = -1 it waits for the end",
        "there are no silences before and after a pair: for a model that waits for a question and"
        f" answers it whenever it comes, name {source} question and {target} answer",
    ]
    ignored = _unread(records, {source, target})
    if ignored:
        found.options["ignored_keys"] = ignored
        found.notes.append(f"left out, because nothing reads them: the keys {', '.join(ignored)}")
    if found.format == "" and pair == (wait_k.OPTIONS["source"], wait_k.OPTIONS["target"]):
        del found.options["source"], found.options["target"]
    found.prompt = {"user": records[0].text(source)}
    return found


def _unread(records: Sequence[Record], read: set[str]) -> list[str]:
    """Returns the keys of records that nothing reads."""
    ignored: list[str] = []
    for record in records:
        while True:
            try:
                check_keys(_layout({"ignored_keys": ignored}), record.value, read, record.where)
                break
            except UnreadKey as error:
                ignored.append(error.key)
    return ignored


def _text_files(found: Survey) -> Survey:
    paths = files.input_files(found.path)
    found.kind = f"plain text in {len(paths):,} {'file' if len(paths) == 1 else 'files'}"
    found.converter, found.streams = "single", {"text": "output"}
    found.records = len(paths)
    found.notes.append("the text is one stream: an ordinary language model")
    portions = sources.portions(found.path, found.format, "text")
    found.parts = [(part, 1) for portion in portions for part in portion]
    return found


def _texts(found: Survey, kind: str, key: str) -> Survey:
    found.kind, found.converter = f"texts under {key!r}", "single"
    found.streams = {"text": "output"}
    found.options = {"key": key} if key != "text" else {}
    if kind in ("csv", "tsv"):  # which `single` reads as plain text otherwise
        found.format = kind
    found.notes.append(f"the text under {key!r} is one stream; other keys are not read")
    return found


def _timed(found: Survey, records: Sequence[Record]) -> Survey:
    words: collections.Counter[str] = collections.Counter()
    rates = []
    for record in records:
        utterances = record.get("utterances")
        for utterance in utterances if isinstance(utterances, list) else ():
            if isinstance(utterance, dict) and isinstance(utterance.get("text"), str):
                count = len(utterance["text"].split())
                words[str(utterance.get("speaker"))] += count
                start, end = utterance.get("start"), utterance.get("end")
                if isinstance(start, (int, float)) and isinstance(end, (int, float)):
                    rates.append(count / (end - start) if end > start else 0.0)
    if not words:
        raise UserError(f"--from is {found.path!r}: its recordings have no utterance with a text")
    output = words.most_common(1)[0][0]
    found.kind, found.converter = "recordings with times", "timed"
    roles = {}
    for speaker in words:
        name = re.sub(r"\W+", "_", speaker).strip("_").lower() or "speaker"
        roles[speaker] = "output" if speaker == output else name
    names = [name for name in roles.values() if name != "output"]
    found.streams = {**dict.fromkeys(names, "input"), "output": "output"}
    _check_streams(found)
    found.options = {
        "roles": _roles_option(roles, records[0].where),
        "row_seconds": _row_seconds(rates),
        "longest_silence": 40,
    }
    said = ", ".join(f"{s or 'no name'} ({n:,} words) -> {roles[s]}" for s, n in words.items())
    found.notes += [
        f"speakers and their streams: {said}",
        "the model speaks for the one who says most; for another one, change `roles`",
        f"a row is {found.options['row_seconds']} s, which keeps up with fast speech; silences of"
        " all speakers are shortened to 40 rows",
    ]
    ignored = _unread(records, {"utterances"})
    for record in records:
        for utterance in record.value["utterances"]:
            inner = Record(record.file, record.number, utterance)
            ignored += [k for k in _unread([inner], _UTTERANCE) if k not in ignored]
    if ignored:
        found.options["ignored_keys"] = ignored
        found.notes.append(f"left out, because nothing reads them: the keys {', '.join(ignored)}")
    return found


def _row_seconds(rates: Sequence[float]) -> float:
    """Returns the seconds of a row in which fast speakers say at most about one token."""
    fast = sorted(rates)[len(rates) * 9 // 10] if rates else 4.0
    low, high = _ROW_SECONDS
    return round(min(max(0.75 / max(fast, 0.1), low), high) / 0.05) * 0.05
