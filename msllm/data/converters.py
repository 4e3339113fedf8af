"""Converters: from files (or a generator) to tables. `config.data.converter` names one, `config.data.options` sets it.

A converter is a function (layout, path) -> tables, before delays. It encodes text only through `layout.tokenizer`, so
the same function also yields the texts that a tokenizer is trained on.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from msllm.config import Config
from msllm.data import dictation as dictation_lib
from msllm.data.tables import Placement, Table, example_hash, make_table, shift
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

BLOCK_CHARACTERS = 1 << 16  # of plain text encoded at a time
CLOSING_ROWS = 3  # silent rows after an example, at most
_CALCULATOR = re.compile(r"<<[^>]*>>")


class Layout(NamedTuple):
    """What converters share."""

    spec: StreamSpec
    tokenizer: Tokenizer | _Recorder
    rows: int  # T
    options: Mapping[str, Any]

    def one_token(self, text: str, where: str) -> int:
        """The id of a text that must be one known token."""
        ids = self.tokenizer.encode(text)
        if len(ids) != 1 or ids[0] == self.tokenizer.unknown_id:
            raise UserError(
                f"{where}: {text!r} is {len(ids)} tokens or unknown to the tokenizer: a cell takes exactly one token;"
                " split it, or use another tokenizer (config.data.tokenizer.model_type='word' fits words)"
            )
        return ids[0]

    def say(self, stream: str, start: int, text: str) -> Placement:
        """A text in a stream, one token a row."""
        return Placement(self.spec.index(stream), start, self.tokenizer.encode(text))

    def say_words(self, stream: int, start: int, words: Sequence[str]) -> Placement:
        """Words in a stream, one a row."""
        return Placement(stream, start, [self.one_token(word, self.spec.names[stream]) for word in words])

    def table(self, placements: Sequence[Placement], key: str, closed: bool = True) -> Table:
        """The table of placements. `closed`: silent rows follow, so that the model learns to stop and to stay silent;
        their number varies (drawn by the example's hash), or it would learn to start again after so many."""
        closing_rows = 1 + int(example_hash(key), 16) % CLOSING_ROWS if closed else 0
        rows = max((p.end for p in placements), default=0) + closing_rows
        return make_table(placements, rows, self.spec.size, self.tokenizer.silence_id, example_hash(key))


def gsm8k(layout: Layout, path: str) -> Iterator[Table]:
    """GSM8K: jsonl {"question", "answer"}. The user asks, the thought works, the output gives the number.

    The thought starts `think_after` rows after the question does (-1: when it has ended); the output starts when
    question and thought have both ended.
    """
    think_after = layout.options["think_after"]
    if think_after < -1:
        raise UserError(f"config.data.options.think_after is {think_after}: must be a number of rows, or -1")
    for where, record in read_jsonl(path):
        question, answer = _text(record, "question", where), _text(record, "answer", where)
        worked, mark, number = answer.rpartition("####")
        if not mark:
            raise UserError(f"{where}: the answer has no last line '#### number': correct the record")
        asked = layout.say("user", 0, question)
        start = asked.end if think_after < 0 else think_after
        thought = layout.say("thought", start, _CALCULATOR.sub("", worked).rstrip("\n"))
        output = layout.say("output", max(asked.end, thought.end), number.strip())
        yield layout.table([asked, thought, output], question)


def tables(layout: Layout, path: str) -> Iterator[Table]:
    """Ready tables: jsonl {"streams": {name: [one item a row], name: "text", ...}}.

    An item is a token id, a string of exactly one token, "" (silence) or null (absent). A text is tokenized from row 0
    and silent after its end. Streams left out are silent.
    """
    for where, record in read_jsonl(path):
        streams = record.get("streams")
        if not isinstance(streams, dict) or set(record) != {"streams"}:
            raise UserError(f'{where}: keys are {sorted(record)}: must be {{"streams": {{name: list or text}}}}')
        placements, absent, lists = [], [], False
        for name, content in streams.items():
            if name not in layout.spec.names:
                raise UserError(f"{where}: unknown stream {name!r}: config.streams.names is {layout.spec.names}")
            if isinstance(content, str):
                placements.append(layout.say(name, 0, content))
            elif isinstance(content, list):
                stream, lists = layout.spec.index(name), True
                cells = [_cell(layout, item, f"{where}, {name}, row {row}") for row, item in enumerate(content)]
                absent += [(row, stream) for row, cell in enumerate(cells) if cell is None]
                placements.append(Placement(stream, 0, [cell or 0 for cell in cells]))
            else:
                raise UserError(f"{where}: stream {name!r} is {content!r}: must be a list of cells or a text")
        table = layout.table(placements, json.dumps(streams, sort_keys=True), closed=False)
        lengths = {layout.spec.names[p.stream]: p.end for p in placements}
        if lists and any(isinstance(streams[name], list) and n < len(table.tokens) for name, n in lengths.items()):
            raise UserError(f'{where}: lengths in rows are {lengths}: lists must be equally long; pad with "" or null')
        for cell in absent:
            table.present[cell] = False
        yield table


def _cell(layout: Layout, item: Any, where: str) -> int | None:
    """The token of an item; None: absent."""
    if item is None or item == "":
        return None if item is None else layout.tokenizer.silence_id
    if isinstance(item, str):
        return layout.one_token(item, where)
    if type(item) is not int or not 0 <= item < layout.tokenizer.vocab_size:
        size = layout.tokenizer.vocab_size
        raise UserError(f"{where}: {item!r} is no cell: must be a token id below {size}, a string or null")
    return item


def chat(layout: Layout, path: str) -> Iterator[Table]:
    """Chats: jsonl {"messages": [{"role", "content"}, ...]}, one turn after another, other streams silent meanwhile.

    `roles` maps roles to streams (a role left out is a stream's name); a turn of a stream that is not an input starts
    `overlap` rows before the turn before it ends.
    """
    roles, overlap, spec = layout.options["roles"], layout.options["overlap"], layout.spec
    if overlap < 0:
        raise UserError(f"config.data.options.overlap is {overlap}: must be a number of rows >= 0")
    for where, record in read_jsonl(path):
        messages = record.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError(f'{where}: must be {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
        turns, ends = [], dict.fromkeys(spec.names, 0)
        for message in messages:
            role, content = _text(message, "role", where), _text(message, "content", where)
            name = roles.get(role, role)
            if name not in spec.names:
                raise UserError(f"{where}: role {role!r} is none of {spec.names}: map it by config.data.options.roles")
            start = 0
            if turns:
                early = 0 if spec.kinds[spec.index(name)] == "input" else overlap
                start = max(turns[-1].end - early, turns[-1].start, ends[name])
            turns.append(layout.say(name, start, content))
            ends[name] = turns[-1].end
        if turns:
            yield layout.table(turns, json.dumps(messages, sort_keys=True))


def text(layout: Layout, path: str) -> Iterator[Table]:
    """Plain text in one stream, cut to pieces of `config.data.rows` rows.

    A piece begins with the last token of the piece before it: so every token (but the first) is predicted once.
    """
    _one_stream(layout, "text")
    for file in input_files(path):
        tokens = []
        for block in _blocks(file):
            tokens += layout.tokenizer.encode(block)
            start = 0
            while len(tokens) - start >= layout.rows:
                yield _piece(layout, tokens[start : start + layout.rows])
                start += layout.rows - 1
            tokens = tokens[start:]
        if len(tokens) > 1:
            yield _piece(layout, tokens)


def _piece(layout: Layout, tokens: Sequence[int]) -> Table:
    return layout.table([Placement(0, 0, tokens)], json.dumps(tokens), closed=False)


def _blocks(file: str) -> Iterator[str]:
    lines, size = [], 0
    for _, line in _lines(file):
        lines.append(line)
        size += len(line)
        if size >= BLOCK_CHARACTERS:
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def _one_stream(layout: Layout, converter: str) -> None:
    if layout.spec.size != 1:
        raise UserError(f"config.streams.names is {layout.spec.names}: {converter!r} takes exactly one stream")


def dictation(layout: Layout, path: str) -> Iterator[Table]:
    """Dictated sums (msllm/data/dictation.py) in the streams user, thought and output."""
    del path  # generated
    user, thought, output = map(layout.spec.index, ("user", "thought", "output"))
    for example in dictation_lib.generate(layout.options["examples"], layout.options["seed"]):
        placements, free = [layout.say_words(user, 0, example.question)], 0
        for word, said in example.thoughts:
            start = max(word + dictation_lib.REACTION, free)  # wait while the thought before it is still being said
            placements.append(layout.say_words(thought, start, said))
            free = placements[-1].end
        # The number, third word of the answer, comes REACTION rows after its thought, which ends in row `free - 1`.
        start = max(len(example.question) - 1 + dictation_lib.REACTION, free - 1)
        placements.append(layout.say_words(output, start, example.answer))
        yield layout.table(placements, " ".join(example.question))


def dictation_single(layout: Layout, path: str) -> Iterator[Table]:
    """The same dictated sums in one stream: the whole question, then all thoughts, then the answer."""
    del path  # generated
    _one_stream(layout, "dictation_single")
    for example in dictation_lib.generate(layout.options["examples"], layout.options["seed"]):
        thoughts = [word for _, said in example.thoughts for word in said]
        words = [*example.question, *thoughts, *example.answer]
        yield layout.table([layout.say_words(0, 0, words)], " ".join(example.question))


class Converter(NamedTuple):
    """A converter, its options with their defaults, and whether it reads files."""

    function: Callable[[Layout, str], Iterator[Table]]
    options: Mapping[str, Any]
    reads_files: bool = True


CONVERTERS = {
    "gsm8k": Converter(gsm8k, {"think_after": -1}),
    "tables": Converter(tables, {}),
    "chat": Converter(chat, {"roles": {}, "overlap": 0}),
    "text": Converter(text, {}),
    "dictation": Converter(dictation, {"examples": 20_000, "seed": 0}, reads_files=False),
    "dictation_single": Converter(dictation_single, {"examples": 20_000, "seed": 0}, reads_files=False),
}


def get_converter(name: str, options: Mapping[str, Any]) -> tuple[Converter, dict[str, Any]]:
    """The converter that `config.data.converter` names, and its options with defaults filled in. Raises UserError."""
    if name not in CONVERTERS:
        raise UserError(f"config.data.converter is {name!r}: must be one of {', '.join(CONVERTERS)}")
    known = CONVERTERS[name].options
    for key, value in options.items():
        if key not in known:
            raise UserError(f"unknown option config.data.options.{key}: {name} knows {', '.join(known) or 'none'}")
        if type(value) is not type(known[key]):
            raise UserError(f"config.data.options.{key} is {value!r}: expected {type(known[key]).__name__}")
    return CONVERTERS[name], {**known, **options}


def convert(config: Config, spec: StreamSpec, tokenizer: Tokenizer | _Recorder) -> Iterator[Table]:
    """The tables of `config.data`, in input order, delays applied. Raises UserError."""
    converter, options = get_converter(config.data.converter, config.data.options)
    layout = Layout(spec, tokenizer, config.data.rows, options)
    for number, table in enumerate(converter.function(layout, config.data.path), 1):
        yield shift(table, spec.delays)
        if number == config.data.max_examples:
            return


def texts(config: Config, spec: StreamSpec) -> Iterator[str]:
    """The texts of `config.data`: what its tokenizer is trained on."""
    recorder = _Recorder()
    for _ in convert(config, spec, recorder):
        yield from recorder.texts
        recorder.texts.clear()
    yield from recorder.texts


class _Recorder:
    """Stands in for the tokenizer that is still to be trained, and notes the texts it is given."""

    silence_id, unknown_id, vocab_size = 0, None, 1 << 31

    def __init__(self):
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return [1]


def input_files(path: str) -> list[str]:
    """The files that a path or glob names, sorted. Raises UserError if there are none."""
    files = sorted(glob.glob(path, recursive=True))
    if not files:
        raise UserError(
            f"config.data.path is {path!r}: there is no such file; give one with --config.data.path=... (the configs of"
            " this project read the folder named by MSLLM_SHARED, else the folder `shared` beside the repository)"
        )
    return files


def read_jsonl(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", record) of every line of the jsonl files that `path` names. Raises UserError."""
    for file in input_files(path):
        for number, line in _lines(file):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{number}: invalid JSON ({error}): each line must be a JSON object") from error
            if not isinstance(record, dict):
                raise UserError(f"{file}:{number}: {line.strip()[:40]!r}: each line must be a JSON object")
            yield f"{file}:{number}", record


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its newline) of a UTF-8 file; nothing else about it is changed."""
    number = 0
    try:
        with open(file, encoding="utf-8", newline="\n") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, after line {number}: not UTF-8 ({error}): convert the file to UTF-8") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}): correct config.data.path") from error


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {value!r}: must be a text (the record's keys: {sorted(record)})")
    return value
