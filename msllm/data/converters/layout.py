"""Helpers for converters: placing text in streams, drawing options, reading records."""

from __future__ import annotations

import collections
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from msllm.data.sources import BadRecord, BadRecords, Part, Record, read
from msllm.data.tables import Placement, Table, example_hash, loss_weights, make_table
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import TextError, Tokenizer, check_text

MAX_CLOSING_ROWS = 3  # of silence after an example
# Rows of an example, at most: three days of a recording at four rows a second. Times of a record
# that are in the wrong unit would give many more.
MAX_ROWS = 1 << 20
MAX_WEIGHT = 1_000_000  # loss weight of a message or cell, at most
# Keys of records that say where a record comes from, and not what it says.
METADATA = frozenset(
    "id _id uuid idx index hash sha1 sha256 key doc_id record_id message_id prompt_id"
    " conversation_id conversation_hash example_id dialogue_id"
    " source attribution author dataset dataset_name subset split origin origin_dataset license url"
    " file filename file_name file_path path line"
    " lang language language_score locale domain category categories topic topics tag tags title"
    " type task task_type task_name format version model generator"
    " date time timestamp created created_at updated_at"
    " meta metadata info stats score scores rating quality difficulty confidence"
    " num_turns num_tokens token_count n_tokens length toxic redacted"
    " cache_control __index_level_0__".split()
)
_WORD = re.compile(r"\s*\S+(?:\s+$)?")
_Item = TypeVar("_Item")


class UnreadKey(BadRecord):
    """A record with a key that nothing reads.

    Attributes:
      key: the key.
      hint: how to read it; "": it cannot be read.
    """

    def __init__(self, message: str, key: str = "", hint: str = ""):
        super().__init__(message)
        self.key, self.hint = key, hint


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

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Returns the tokens of a text, and counts them.

        Args:
          text: the text.
          first: False for a text that continues another one (`Tokenizer.encode_next`).

        Raises TextError if the tokens do not give the text back (`Tokenizer.compare`).
        """
        tokenizer = self.tokenizer
        ids = tokenizer.encode(text) if first else tokenizer.encode_next(text)
        if self.bad.starts_text() or not tokenizer.lossless:
            self._check(text, ids)
        return ids

    def _check(self, text: str, ids: Sequence[int]) -> None:
        """Checks and counts a text. Of texts that cannot be wrong, a sample is enough."""
        changed = self.tokenizer.compare(text, ids) == "changed"
        if self.bad.in_sample or changed:
            self.bad.add_text(text, len(ids), changed)

    def one_token(self, text: str, where: str) -> int:
        """Returns the id of a text that must be exactly one known token. Raises BadRecord."""
        ids = self.tokenizer.encode_word(text)
        self.tokenizer.compare(text, ids)
        if len(ids) != 1 or ids[0] == self.tokenizer.unknown_id:
            raise BadRecord(
                f"{where}: {text!r} is {len(ids)} tokens or unknown to the tokenizer: a cell takes"
                " exactly one token; split it, or use another tokenizer"
                " (config.data.tokenizer.model_type='word' fits words)"
            )
        return ids[0]

    def words(self, text: str) -> list[Sequence[int]]:
        """Returns the tokens of each word of a text. White space belongs to the word after it.

        Raises TextError, as `encode` does.
        """
        words = _WORD.findall(text) or ([text] if text else [])
        is_first = itertools.chain([True], itertools.repeat(False))
        found = list(map(self.tokenizer.encode_word, words, is_first))
        if self.bad.starts_text() or not self.tokenizer.lossless:
            self._check(text, list(itertools.chain.from_iterable(found)))
        return found

    def say(self, stream: str, start: int, text: str) -> Placement:
        """Places a text in a stream from row `start` on, one token per row. Raises TextError."""
        return Placement(self.spec.index(stream), start, self.encode(text))

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
                " to one of them, or to None to leave it out"
            )
        return name

    def maps(self, role: str) -> bool:
        """Returns whether a role has an entry in the option `roles`, or is a stream."""
        return role in self.options["roles"] or role in self.spec.names

    def leaves_out(self, role: str) -> bool:
        """Returns whether the option `roles` maps a role to None: what it says is left out."""
        roles = self.options["roles"]
        if role in roles or role in self.spec.names:
            return roles.get(role, role) is None
        return roles.get("*", role) is None

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

    def table(
        self,
        placements: Sequence[Placement],
        key: str,
        closed: bool = True,
        weights: Sequence[float] | None = None,
    ) -> Table:
        """Returns the table of placements.

        Args:
          placements: the tokens of the table. All other cells are silence.
          key: identifies the example; the id of the example is a hash of it.
          closed: add silent rows at the end, from which the model learns to stop and stay silent.
            Their number is drawn for each example. From a fixed number, the model would learn to
            start again after that many rows.
          weights: the loss weight of each placement (`tables.loss_weights`); None: 1.

        Raises BadRecord if the placements overlap, or need more than MAX_ROWS rows.
        """
        rows = self._check_placements(placements)
        example = example_hash(key)
        rows += 1 + int(example, 16) % MAX_CLOSING_ROWS if closed else 0
        table = make_table(placements, rows, self.spec.size, self.tokenizer.silence_id, example)
        return table if weights is None else loss_weights(table, placements, weights)

    def _check_placements(self, placements: Sequence[Placement]) -> int:
        """Returns the row after the last placement. Raises BadRecord, as `table` does."""
        ends = [0] * self.spec.size
        in_order = True
        for stream, start, tokens in placements:
            end, stop = ends[stream], start + len(tokens)
            if start < end:
                in_order = False
            if stop > end:
                ends[stream] = stop
        rows = max(ends)
        if not in_order:
            self._check_overlap(placements)
        if rows > MAX_ROWS:
            check_rows(rows)
        return rows

    def _check_overlap(self, placements: Sequence[Placement]) -> None:
        ends: dict[int, int] = {}
        for stream, start, tokens in sorted(placements, key=itemgetter(0, 1)):
            end = ends.get(stream, 0)
            if start < end and len(tokens):
                raise BadRecord(
                    f"stream {self.spec.names[stream]!r} says two things in row {start}: place"
                    " them one after the other"
                )
            ends[stream] = max(start + len(tokens), end)


def check_rows(rows: int, where: str = "", span: str = "") -> None:
    """Raises BadRecord if an example has more than MAX_ROWS rows.

    Args:
      rows: the number of rows.
      where: the place of the record; empty if the caller adds it.
      span: how long a row lasts, to follow the number of rows in the message.
    """
    if rows > MAX_ROWS:
        place = f"{where}: " if where else ""
        raise BadRecord(
            f"{place}the example has {rows:,} rows{span}, more than {MAX_ROWS:,}: correct or divide"
            " the record"
        )


class Recorder:
    """Replaces a tokenizer that is not trained yet, and records the texts that it would encode."""

    silence_id, unknown_id, vocab_size, lossless = 0, None, 1 << 31, True

    def __init__(self) -> None:
        self._texts: list[str] = []
        self.control: Mapping[str, int] = collections.defaultdict(int)

    def encode(self, text: str) -> list[int]:
        """Records a text and returns one arbitrary token. Raises TextError, as a tokenizer does."""
        check_text(text)
        self._texts.append(text)
        return [1]

    encode_next = encode

    def encode_word(self, word: str, first: bool = True) -> list[int]:
        """Records a word, as `encode` does."""
        del first
        return self.encode(word)

    def compare(self, text: str, ids: Sequence[int]) -> str:
        """Takes every text as covered by the vocabulary."""
        del text, ids
        return "same"

    def take(self) -> list[str]:
        """Returns the texts recorded since the last call."""
        texts, self._texts = self._texts, []
        return texts


# The arguments are a layout and a part of the input, or None for a converter that reads no files.
Convert = Callable[[Layout, Any], Iterator[Table]]


def each_record(function: Callable[[Layout, Record], Iterable[Table]]) -> Convert:
    """Turns a function from one record to its tables into a converter.

    A record for which the function raises BadRecord or TextError is counted and left out. So is a
    record for which a function of msllm raises anything but UserError, or another function does so
    while `config.data.bad_percent` allows bad records. Otherwise the exception gets a note that
    names the record.
    """
    name = f"{function.__module__}:{getattr(function, '__name__', 'the converter')}"

    @functools.wraps(function)
    def convert(layout: Layout, part: Part) -> Iterator[Table]:
        for record in read(part, layout.bad):
            try:
                tables = list(function(layout, record))
            except (BadRecord, TextError) as error:
                layout.bad.add(bad_record(error, record))
                continue
            except UserError:
                raise
            except Exception as error:
                if not (name.startswith("msllm.") or layout.bad.allows_some):
                    error.add_note(f"in {record.where}")
                    raise
                what = f"{name} fails with {type(error).__name__}: {error}"
                layout.bad.add(BadRecord(f"{record.where}: {what}"))
                continue
            for table in layout.count_empty(tables):
                yield table._replace(source=record.where)

    return convert


def generator(function: Callable[[Layout], Iterable[Table]]) -> Convert:
    """Turns a function that makes tables from its options alone into a converter.

    `config.data.path` stays empty. Example ids must follow from the contents of the tables, so that
    no example is both trained on and held out.
    """

    @functools.wraps(function)
    def convert(layout: Layout, part: Part | None) -> Iterator[Table]:
        del part  # reads no files
        yield from function(layout)

    convert.reads_files = False  # type: ignore[attr-defined]
    return convert


def bad_record(error: UserError, record: Record) -> BadRecord:
    """Returns an error as a BadRecord whose message begins with the place of the record."""
    if isinstance(error, BadRecord) and str(error).startswith(record.file):
        return error
    return BadRecord(f"{record.where}: {error}")


def check_keys(
    layout: Layout,
    value: Mapping[str, Any],
    read: Set[str],
    where: str,
    hints: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Raises UnreadKey for a key of a record that nothing reads.

    Keys that say nothing (null, "", an empty list or object), keys in METADATA, and keys that the
    option `ignored_keys` lists do not matter. "*" in this option stands for all keys.

    Args:
      layout: has the option `ignored_keys`.
      value: the record, or an object in it.
      read: the keys that the converter reads.
      where: the place of `value`, for the message.
      hints: what to do about a key, for the message.
    """
    if value.keys() <= read:
        return
    ignored = layout.options["ignored_keys"]
    for key, content in value.items():
        if key in read or key in METADATA or key in ignored or content is None:
            continue
        if isinstance(content, (str, list, dict)) and not content or "*" in ignored:
            continue
        hint = f"{hints[key]}; " if key in hints else ""
        raise UnreadKey(
            f"{where}: nothing reads the key {key!r} ({content!r:.40}): {hint}remove it, or list it"
            " in config.data.options.ignored_keys",
            key,
            hint,
        )


def check_weight(value: Any, what: str) -> None:
    """Raises BadRecord unless a value is a loss weight: true, false, or 0 to MAX_WEIGHT."""
    if not isinstance(value, (bool, int, float)) or not 0 <= value <= MAX_WEIGHT:
        is_long = isinstance(value, int) and abs(value) > 1e18  # Python may refuse to write it
        shown = "a number of many digits" if is_long else f"{value!r:.40}"
        raise BadRecord(
            f"{what} is {shown}: must be true, false, or a loss weight from 0 to {MAX_WEIGHT:,}"
        )


def require_one_stream(layout: Layout, converter: str, remedy: str = "") -> None:
    """Raises UserError unless there is exactly one stream. `remedy` is added to its message."""
    if layout.spec.size != 1:
        raise UserError(
            f"config.streams.names is {layout.spec.names}: {converter!r} takes exactly one"
            f" stream{remedy}"
        )
