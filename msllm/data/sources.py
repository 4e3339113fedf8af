"""Sources: the records of the files that a path or glob names, each with its file and line.

The formats, their file names, and what a record is:

- `jsonl` (`.jsonl`, `.ndjson`): a line with a JSON object.
- `json` (`.json`): an item of the JSON list, or the whole JSON value. A file that holds several
  values is read as `jsonl`.
- `parquet` (`.parquet`): a row.
- `array_record` (`.array_record`, `.arrayrecord`): a record that holds a JSON object.
- `text`: the whole file, as a string (`texts` reads it without keeping it in memory).

A file with any other name is `text` if the converter reads texts, and `jsonl` otherwise.
`config.data.format` overrides the name. It may also be the import path `package.module:function` of
a reader, a function from a file's path to its records. `jsonl`, `json` and `text` may be compressed
(`.gz` or `.zst` after the name). All formats but `array_record` may be remote (`gs://`, through
etils).
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from array_record.python import array_record_module

from msllm.config import import_object
from msllm.data import files
from msllm.errors import UserError

PORTION_BYTES = 32 << 20  # of input that one process works on at a time
MAX_PORTIONS = 1024  # of an input; a very large input has larger portions
MAX_SHOWN = 5  # bad records whose messages are shown
MIN_RECORDS = 1000  # with fewer records, the share of bad ones says little
FORMATS = ("jsonl", "json", "parquet", "array_record", "text")
_FORMAT_OF_ENDING = {name: name for name in FORMATS} | {
    "ndjson": "jsonl",
    "arrayrecord": "array_record",
}
_DIVISIBLE = ("jsonl", "parquet", "array_record")
_BATCH = 256  # records read at a time from parquet and ArrayRecord files


class BadRecord(UserError):
    """A record that cannot be used. `config.data.bad_percent` limits how many are left out."""


class BadRecords:
    """Counts records and the bad ones among them; raises UserError if too many are bad.

    Attributes:
      records: the number of records read so far.
      bad: the number of records left out because they are bad.
      shown: the messages of the first MAX_SHOWN bad records.
      empty: the number of good records that gave no table.
    """

    def __init__(self, percent: float = 0.0, show: bool = False):
        """Starts with all counts at 0.

        Args:
          percent: the percentage of all records that may be bad.
          show: print the messages of the first bad records to stderr as they come.
        """
        self._percent, self._show = percent, show
        self.records = self.bad = self.empty = 0
        self.shown: list[str] = []

    def add(self, error: BadRecord) -> None:
        """Counts a bad record. Raises `error` if none is allowed, UserError if too many are bad."""
        self.bad += 1
        self.note(str(error))
        self._check(MIN_RECORDS, error)

    def note(self, message: str) -> None:
        """Keeps, and may print, the message of a bad record if it is one of the first MAX_SHOWN."""
        if len(self.shown) < MAX_SHOWN:
            self.shown.append(message)
            if self._show and self._percent:
                print(f"left out: {message}", file=sys.stderr, flush=True)

    def counts(self) -> dict[str, Any]:
        """Returns the attributes, for `merge`."""
        return {
            "records": self.records,
            "bad": self.bad,
            "empty": self.empty,
            "shown": self.shown,
        }

    def merge(self, counts: Mapping[str, Any]) -> None:
        """Adds the `counts()` of the records that follow."""
        self.records += counts["records"]
        self.bad += counts["bad"]
        self.empty += counts["empty"]
        for message in counts["shown"]:
            self.note(message)

    def finish(self) -> None:
        """Raises UserError if too many records are bad. Call it when all have been read."""
        self._check(0, None)

    def _check(self, least: int, error: BadRecord | None) -> None:
        """Raises if more records are bad than are allowed among `least` records or more."""
        if self.bad <= max(self.records, least) * self._percent / 100:
            return
        if error is not None and not self._percent:
            raise error
        raise UserError(
            f"{self.bad} of {self.records} records are bad, more than"
            f" config.data.bad_percent={self._percent} allows: correct them, or increase it."
            f" The first: {'; '.join(self.shown)}"
        )


class Record(NamedTuple):
    """One record of a file."""

    file: str
    number: int  # of the line, item or row, from 1
    value: Any  # a JSON value

    @property
    def where(self) -> str:
        """The place of the record, "file:number"."""
        return f"{self.file}:{self.number}"

    def get(self, key: str) -> Any:
        """Returns the value of `key`; None without one, or if the record is no JSON object."""
        return self.value.get(key) if isinstance(self.value, dict) else None

    def text(self, key: str) -> str:
        """Returns the string that the record holds under `key`. Raises BadRecord."""
        return text_of(self.value, key, self.where)


@dataclasses.dataclass(frozen=True)
class Part:
    """A file, or part `index` of `count` equal parts of it. Each record belongs to one part."""

    file: str
    format: str
    index: int = 0
    count: int = 1
    before: int = 0  # jsonl: the number of lines that begin before this part


def text_of(value: Any, key: str, where: str) -> str:
    """Returns value[key]. Raises BadRecord, naming `where`, if it is not a string."""
    text = value.get(key) if isinstance(value, dict) else None
    if isinstance(text, str):
        return text
    if isinstance(value, dict):
        found = f"the record's keys: {sorted(value)}"
    else:
        found = f"the record is {_short(value)}"
    raise BadRecord(f"{where}: {key!r} is {text!r}: must be a string ({found})")


def parts(path: str, format: str = "", other: str = "jsonl", count: int = 1) -> list[Part]:
    """Divides each file that a path or glob names into `count` parts, in the order of the records.

    Compressed files, `json`, `text`, and files for a user's reader are not divided.

    Args:
      path: the path or glob.
      format: `config.data.format`.
      other: the format of files whose names do not determine it.
      count: the number of parts of each file.

    Raises UserError if there is no such file, or the format is unknown.
    """
    return [part for file in files.input_files(path) for part in _parts(file, format, other, count)]


def portions(path: str, format: str = "", other: str = "jsonl") -> list[list[Part]]:
    """Divides the input into portions of about PORTION_BYTES, each with one or more parts.

    Together the portions hold all parts, in order. They depend on the sizes of the files alone. A
    file that is not divided (see `parts`) may make a portion larger. The arguments and errors are
    those of `parts`.
    """
    sizes = {file: files.file_size(file) for file in files.input_files(path)}
    total = sum(sizes.values())
    size = max(PORTION_BYTES, total / MAX_PORTIONS)
    size = total / max(math.ceil(total / size), 1)  # portions of equal size
    found: dict[int, list[Part]] = {}
    end = 0.0
    for file, length in sizes.items():
        count = max(round(length / size), 1) if size else 1
        for part in _parts(file, format, other, count):
            end += length / part.count
            middle = end - length / part.count / 2  # decides which portion takes the part
            found.setdefault(int(middle / size) if size else 0, []).append(part)
    return list(found.values())


def _parts(file: str, format: str, other: str, count: int) -> list[Part]:
    if ":" not in format and format not in ("", *FORMATS):
        raise UserError(
            f"config.data.format is {format!r}: must be empty, package.module:function, or one of"
            f" {', '.join(FORMATS)}"
        )
    ending = files.COMPRESSED.sub("", file).rpartition(".")[2].lower()
    kind = format or _FORMAT_OF_ENDING.get(ending, other)
    if files.COMPRESSED.search(file) or kind not in _DIVISIBLE:
        count = 1
    before = files.lines_before(file, count) if kind == "jsonl" else [0] * count
    return [Part(file, kind, i, count, before[i]) for i in range(count)]


def read(part: Part, bad: BadRecords | None = None) -> Iterator[Record]:
    """Yields the records of a part, in order. Raises UserError.

    Args:
      part: the part of a file to read.
      bad: counts the records, and limits the bad ones; None: no bad record is allowed.
    """
    bad = bad or BadRecords()
    for number, value in _READERS.get(part.format, _read_with_function)(part):
        bad.records += 1
        if isinstance(value, BadRecord):
            bad.add(value)
        else:
            yield Record(part.file, number, value)


def texts(part: Part, key: str, bad: BadRecords) -> Iterator[tuple[str, Iterator[str]]]:
    """Yields ("file:line", blocks of text) for every document of a part.

    A document is a plain text file, or the string that a record holds under `key`.
    """
    if part.format == "text":
        bad.records += 1
        yield f"{part.file}:1", files.text_blocks(part.file)
        return
    for record in read(part, bad):
        try:
            text = record.text(key)
        except BadRecord as error:
            bad.add(error)
            continue
        yield record.where, iter([text])


# Readers yield (number, value) for every record of a part. The value of a record that cannot be
# parsed is a BadRecord.


def _read_json_lines(part: Part) -> Iterator[tuple[int, Any]]:
    for number, line in files.lines(part.file, part.index, part.count, part.before):
        if line.strip():
            yield number, _parse(line, f"{part.file}:{number}")


def _read_json(part: Part) -> Iterator[tuple[int, Any]]:
    with files.readable(part.file), files.open_file(part.file) as stream:
        content = stream.read()
    try:
        value = json.loads(content)
    except ValueError:  # the file holds several values, one per line
        yield from _read_json_lines(part)
        return
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _read_text(part: Part) -> Iterator[tuple[int, Any]]:
    yield 1, "".join(files.text_blocks(part.file))


def _read_parquet(part: Part) -> Iterator[tuple[int, Any]]:
    parquet = files.import_optional("pyarrow.parquet", part.file)
    with files.readable(part.file), files.open_raw(part.file) as stream:
        try:
            file = parquet.ParquetFile(stream)
        except ValueError as error:  # includes pyarrow.ArrowInvalid
            raise UserError(
                f"{part.file} is no parquet file ({error}): correct config.data.path"
            ) from error
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        groups = _share(len(sizes), part)
        if not groups:
            return
        number = sum(sizes[: groups.start])
        for batch in file.iter_batches(batch_size=_BATCH, row_groups=list(groups)):
            for value in batch.to_pylist():
                number += 1
                yield number, value


def _read_array_record(part: Part) -> Iterator[tuple[int, Any]]:
    if "://" in part.file:
        raise UserError(
            f"{part.file}: ArrayRecord files are read from disk only: copy the file, or use jsonl"
            " or parquet"
        )
    try:
        reader = array_record_module.ArrayRecordReader(part.file)
        rows = _share(reader.num_records(), part)
        for start in range(rows.start, rows.stop, _BATCH):
            stop = min(start + _BATCH, rows.stop)
            for number, content in enumerate(reader.read(start, stop), start + 1):
                yield number, _parse(content, f"{part.file}:{number}")
        reader.close()  # raises if the file seemed empty because it is damaged
    except Exception as error:  # the library's errors have no common base class
        raise UserError(
            f"{part.file}: cannot be read ({error}): correct config.data.path"
        ) from error


def _read_with_function(part: Part) -> Iterator[tuple[int, Any]]:
    reader = import_object(part.format, "config.data.format")
    yield from enumerate(reader(part.file), 1)


_READERS = {
    "jsonl": _read_json_lines,
    "json": _read_json,
    "text": _read_text,
    "parquet": _read_parquet,
    "array_record": _read_array_record,
}


def _parse(content: bytes, where: str) -> Any:
    """Returns the JSON object of a line or record, or a BadRecord if there is none."""
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        return BadRecord(f"{where}: not UTF-8 ({error}): convert the file to UTF-8")
    except json.JSONDecodeError as error:
        return BadRecord(f"{where}: invalid JSON ({error}): each line must be a JSON object")
    if not isinstance(value, dict):
        text = _short(content.decode().strip())
        return BadRecord(f"{where}: {text}: each line must be a JSON object")
    return value


def _share(total: int, part: Part) -> range:
    """Returns the range of the `total` indices of a file that belong to a part."""
    return range(total * part.index // part.count, total * (part.index + 1) // part.count)


def _short(value: Any) -> str:
    return repr(value[:40]) if isinstance(value, str) else repr(value)[:40]
