"""What converters share: the layout that places text in streams, options that examples draw, records one by one."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from msllm.data.sources import BadRecord, BadRecords, Part, Record, read
from msllm.data.tables import Placement, Table, example_hash, make_table
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

CLOSING_ROWS = 3  # silent rows after an example, at most
_WORD = re.compile(r"\s*\S+(?:\s+$)?")


class Choice(NamedTuple):
    """An option that is a whole number, or a list of them of which every example draws one, by its id."""

    default: int
    least: int


class Layout(NamedTuple):
    """The streams, tokenizer and options that a converter works with."""

    spec: StreamSpec
    tokenizer: Tokenizer | Recorder
    rows: int  # T, without those that delays take
    options: Mapping[str, Any]
    bad: BadRecords  # is told of records that cannot be used

    def one_token(self, text: str, where: str) -> int:
        """The id of a text that must be one known token. Raises BadRecord."""
        ids = self.tokenizer.encode_word(text)
        if len(ids) != 1 or ids[0] == self.tokenizer.unknown_id:
            raise BadRecord(
                f"{where}: {text!r} is {len(ids)} tokens or unknown to the tokenizer: a cell takes exactly one token;"
                " split it, or use another tokenizer (config.data.tokenizer.model_type='word' fits words)"
            )
        return ids[0]

    def words(self, text: str) -> list[Sequence[int]]:
        """The tokens of a text, word by word; a space belongs to the word after it."""
        return [self.tokenizer.encode_word(word) for word in _WORD.findall(text)]

    def say(self, stream: str, start: int, text: str) -> Placement:
        """A text in a stream, one token a row."""
        return Placement(self.spec.index(stream), start, self.tokenizer.encode(text))

    def say_words(self, stream: int, start: int, words: Sequence[str]) -> Placement:
        """Words in a stream, one a row."""
        return Placement(
            stream, start, [self.one_token(word, self.spec.names[stream]) for word in words]
        )

    def stream_of(self, role: str, where: str) -> str:
        """The name of the stream in which a role speaks, by the option `roles` ("*": all others). Raises BadRecord."""
        roles, names = self.options["roles"], self.spec.names
        name = roles.get(role) or (role if role in names else roles.get("*", role))
        if name not in names:
            raise BadRecord(
                f"{where}: role {role!r} is none of {names}: map it by config.data.options.roles"
            )
        return name

    def draw(self, option: str, key: str) -> int:
        """The value of an option (a Choice) for the example of `key`: the same in every run and order."""
        value = self.options[option]
        if isinstance(value, int):
            return value
        return value[int(example_hash(f"{option} {key}"), 16) % len(value)]

    def counted(self, items: Iterable) -> Iterator:
        """What a record gave, passed on; if it gave nothing, that is noted."""
        number = 0
        for number, item in enumerate(items, 1):
            yield item
        self.bad.empty += not number

    def table(self, placements: Sequence[Placement], key: str, closed: bool = True) -> Table:
        """The table of placements. `closed`: silent rows follow, so that the model learns to stop and to stay silent;
        their number varies (drawn by the example's hash), or it would learn to start again after so many."""
        closing_rows = 1 + int(example_hash(key), 16) % CLOSING_ROWS if closed else 0
        rows = max((p.end for p in placements), default=0) + closing_rows
        return make_table(
            placements, rows, self.spec.size, self.tokenizer.silence_id, example_hash(key)
        )


class Recorder:
    """Stands in for the tokenizer that is still to be trained, and notes the texts it is given."""

    silence_id, unknown_id, vocab_size = 0, None, 1 << 31

    def __init__(self):
        self.texts: list[str] = []
        self.control: Mapping[str, int] = collections.defaultdict(int)

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return [1]

    encode_word = encode


Converter = Callable[[Layout, Part], Iterator[Table]]


def each_record(function: Callable[[Layout, Record], Iterable[Table]]) -> Converter:
    """A converter from a function of one record. A record for which it raises BadRecord is counted and left out."""

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
            for table in layout.counted(tables):
                yield table._replace(source=record.where)

    return convert


def one_stream(layout: Layout, converter: str, remedy: str = "") -> None:
    """Raises UserError, with the remedy if there is another, unless there is one stream."""
    if layout.spec.size != 1:
        raise UserError(
            f"config.streams.names is {layout.spec.names}: {converter!r} takes exactly one stream{remedy}"
        )
