"""Helpers for converters: placing text in streams, drawing options, reading records."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from msllm.data.sources import BadRecord, BadRecords, Part, Record, read
from msllm.data.tables import Placement, Table, example_hash, make_table
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

MAX_CLOSING_ROWS = 3  # of silence after an example
_WORD = re.compile(r"\s*\S+(?:\s+$)?")
_Item = TypeVar("_Item")


class Choice(NamedTuple):
    """An option that is an int, or a list of ints from which each example draws one."""

    default: int
    least: int  # the smallest allowed value


class Layout(NamedTuple):
    """The streams, tokenizer and options that a converter works with."""

    spec: StreamSpec
    tokenizer: Tokenizer | Recorder
    rows: int  # T minus the rows that delays need
    options: Mapping[str, Any]
    bad: BadRecords  # counts the records that cannot be used

    def one_token(self, text: str, where: str) -> int:
        """Returns the id of a text that must be exactly one known token. Raises BadRecord."""
        ids = self.tokenizer.encode_word(text)
        if len(ids) != 1 or ids[0] == self.tokenizer.unknown_id:
            raise BadRecord(
                f"{where}: {text!r} is {len(ids)} tokens or unknown to the tokenizer: a cell takes"
                " exactly one token; split it, or use another tokenizer"
                " (config.data.tokenizer.model_type='word' fits words)"
            )
        return ids[0]

    def words(self, text: str) -> list[Sequence[int]]:
        """Returns the tokens of each word of a text. White space belongs to the word after it."""
        return [self.tokenizer.encode_word(word) for word in _WORD.findall(text)]

    def say(self, stream: str, start: int, text: str) -> Placement:
        """Places a text in a stream from row `start` on, one token per row."""
        return Placement(self.spec.index(stream), start, self.tokenizer.encode(text))

    def say_words(self, stream: int, start: int, words: Sequence[str]) -> Placement:
        """Places words, each of one token, in stream number `stream` from row `start` on."""
        name = self.spec.names[stream]
        return Placement(stream, start, [self.one_token(word, name) for word in words])

    def stream_of(self, role: str, where: str) -> str:
        """Returns the name of the stream for a role. Raises BadRecord.

        The option `roles` maps roles to streams. A role that is not in it may be the name of a
        stream. The entry "*" of the option stands for all other roles.
        """
        roles, names = self.options["roles"], self.spec.names
        name = roles.get(role) or (role if role in names else roles.get("*", role))
        if name not in names:
            raise BadRecord(
                f"{where}: role {role!r} is none of {names}: map it by config.data.options.roles"
            )
        return name

    def draw(self, option: str, key: str) -> int:
        """Returns the value of an option (a Choice) for the example of `key`.

        The value is the same in every run and for any order of the examples.
        """
        value = self.options[option]
        if isinstance(value, int):
            return value
        return value[int(example_hash(f"{option} {key}"), 16) % len(value)]

    def count_empty(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yields the items of a record, and counts the record as empty if there are none."""
        empty = True
        for item in items:
            empty = False
            yield item
        self.bad.empty += empty

    def table(self, placements: Sequence[Placement], key: str, closed: bool = True) -> Table:
        """Returns the table of placements.

        Args:
          placements: the tokens of the table. All other cells are silence.
          key: identifies the example; the id of the example is a hash of it.
          closed: add silent rows at the end, from which the model learns to stop and stay silent.
            Their number is drawn for each example. From a fixed number, the model would learn to
            start again after that many rows.
        """
        example = example_hash(key)
        closing_rows = 1 + int(example, 16) % MAX_CLOSING_ROWS if closed else 0
        rows = max((p.end for p in placements), default=0) + closing_rows
        return make_table(placements, rows, self.spec.size, self.tokenizer.silence_id, example)


class Recorder:
    """Replaces a tokenizer that is not trained yet, and records the texts that it would encode."""

    silence_id, unknown_id, vocab_size = 0, None, 1 << 31

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.control: Mapping[str, int] = collections.defaultdict(int)

    def encode(self, text: str) -> list[int]:
        """Records a text and returns one arbitrary token."""
        self._texts.append(text)
        return [1]

    encode_word = encode

    def take(self) -> list[str]:
        """Returns the texts recorded since the last call."""
        texts, self._texts = self._texts, []
        return texts


# The arguments are a layout and a part of the input, or None for a converter that reads no files.
Convert = Callable[[Layout, Any], Iterator[Table]]


def each_record(function: Callable[[Layout, Record], Iterable[Table]]) -> Convert:
    """Turns a function from one record to its tables into a converter.

    A record for which the function raises BadRecord is counted and left out. Any other exception
    but UserError gets a note that names the record.
    """

    @functools.wraps(function)
    def convert(layout: Layout, part: Part) -> Iterator[Table]:
        for record in read(part, layout.bad):
            try:
                tables = list(function(layout, record))
            except BadRecord as error:
                layout.bad.add(error)
                continue
            except UserError:
                raise
            except Exception as error:
                error.add_note(f"in {record.where}")
                raise
            for table in layout.count_empty(tables):
                yield table._replace(source=record.where)

    return convert


def messages_of(record: Record) -> list[dict[str, Any]]:
    """Returns the record's "messages", a list of JSON objects. Raises BadRecord."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord(
            f'{record.where}: must be {{"messages": [{{"role": ..., "content": ...}}, ...]}}'
        )
    return messages


def require_one_stream(layout: Layout, converter: str, remedy: str = "") -> None:
    """Raises UserError unless there is exactly one stream. `remedy` is added to its message."""
    if layout.spec.size != 1:
        raise UserError(
            f"config.streams.names is {layout.spec.names}: {converter!r} takes exactly one"
            f" stream{remedy}"
        )
