"""Sources: the one place that reads a user's files. From a path or glob to records, each of a known file and line.

| format | file name | a record is |
|---|---|---|
| `jsonl` | `.jsonl`, `.ndjson` | a line with a JSON object |
| `json` | `.json` | an item of the JSON list, or the whole JSON value; if the file holds several values: as `jsonl` |
| `parquet` | `.parquet` | a row |
| `array_record` | `.array_record`, `.arrayrecord` | a record that holds a JSON object |
| `text` | | the whole file, a text (`texts` reads it without keeping it in memory) |

A file of another name is `text` where the converter reads texts, else `jsonl`; `config.data.format` overrides the name.
There, `package.module:function` is a reader of the user's own: a function from a file's path to its records. `jsonl`,
`json` and `text` may be compressed (`.gz`, `.zst` after the name), all but `array_record` remote (`gs://`, by etils).
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from array_record.python import array_record_module
from etils import epath

from msllm.config import import_object
from msllm.errors import UserError

BLOCK_CHARACTERS = 1 << 16  # of plain text read at a time
PORTION_BYTES = 32 << 20  # of input that one process works on at a time
MOST_PORTIONS = 1024  # of an input; those of a very large one are larger
SHOWN = 5  # bad records told of by name
LEAST_RECORDS = 1000  # before so many, a share of bad ones says little
FORMATS = ("jsonl", "json", "parquet", "array_record", "text")
_ENDINGS = {name: name for name in FORMATS} | {"ndjson": "jsonl", "arrayrecord": "array_record"}
_COMPRESSED = re.compile(r"\.(gz|zst)$")


class BadRecord(UserError):
    """A record that cannot be used. Others can: how many may be left out says `config.data.bad_percent`."""


class BadRecords:
    """Counts records and the bad ones among them; raises UserError when these are too many.

    Attributes: records: read so far. bad: left out of them. shown: messages of the first of those. empty: good records
    that hold nothing to make a table of.
    """

    def __init__(self, percent: float = 0.0, show: bool = False):
        """percent: of all records that may be bad. show: whether to print the first ones to stderr as they come."""
        self._percent, self._show = percent, show
        self.records = self.bad = self.empty = 0
        self.shown: list[str] = []

    def add(self, error: BadRecord) -> None:
        """Notes a bad record. Raises `error` if none may be bad, UserError if there were too many."""
        self.bad += 1
        self.tell(str(error))
        self._check(LEAST_RECORDS, error)

    def tell(self, message: str) -> None:
        """Keeps the message of a bad record, and prints it if so asked, if it is one of the first."""
        if len(self.shown) < SHOWN:
            self.shown.append(message)
            if self._show and self._percent:
                print(f"left out: {message}", file=sys.stderr, flush=True)

    def counts(self) -> dict[str, Any]:
        """Its attributes, for `merge`."""
        return {name: getattr(self, name) for name in ("records", "bad", "empty", "shown")}

    def merge(self, counts: Mapping[str, Any]) -> None:
        """Adds the `counts()` of the records that follow."""
        for message in counts["shown"]:
            self.tell(message)
        for name in ("records", "bad", "empty"):
            setattr(self, name, getattr(self, name) + counts[name])

    def finish(self) -> None:
        """To be called when all records were read. Raises UserError if too many of them were bad."""
        self._check(0, None)

    def _check(self, least: int, error: BadRecord | None) -> None:
        if self.bad <= max(self.records, least) * self._percent / 100:
            return
        if error is not None and not self._percent:
            raise error
        raise UserError(
            f"{self.bad} of {self.records} records are bad, more than config.data.bad_percent={self._percent} allows:"
            f" correct them, or allow more. The first: {'; '.join(self.shown)}"
        )


class Record(NamedTuple):
    """One record of a file."""

    file: str
    number: int  # of the line, item or row, from 1
    value: Any  # what JSON knows

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"

    def text(self, key: str) -> str:
        """The text that the record holds under `key`. Raises BadRecord."""
        return text_of(self.value, key, self.where)


class Part(NamedTuple):
    """A file, or the part `index` of `count` equal ones: a record belongs to exactly one part."""

    file: str
    format: str
    index: int = 0
    count: int = 1
    before: int = 0  # `jsonl`: the lines that begin before this part


def text_of(value: Any, key: str, where: str) -> str:
    """value[key], which must be a text. Raises BadRecord."""
    text = value.get(key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        keys = (
            f"the record's keys: {sorted(value)}"
            if isinstance(value, dict)
            else f"the record is {_short(value)}"
        )
        raise BadRecord(f"{where}: {key!r} is {text!r}: must be a text ({keys})")
    return text


def input_files(path: str) -> list[str]:
    """The files that a path or glob names, sorted. Raises UserError if there are none."""
    if "://" in path:
        root = re.match(r"\w+://[^/]*(?:/[^/*?\[]*(?=/|$))*", path)[
            0
        ]  # up to the first part with a wildcard
        rest = path[len(root) :].lstrip("/")
        with _readable(path):
            files = (
                [str(file) for file in epath.Path(root).glob(rest)]
                if rest
                else [path] * epath.Path(path).exists()
            )
    else:
        files = glob.glob(path, recursive=True)
    if not files:
        raise UserError(
            f"config.data.path is {path!r}: there is no such file; give one with --config.data.path=... (the configs of"
            " this project read the folder named by MSLLM_SHARED, else the folder `shared` beside the repository)"
        )
    return sorted(files)


def parts(path: str, format: str = "", other: str = "jsonl", count: int = 1) -> list[Part]:
    """`count` parts of each file that a path or glob names, in the order of their records. Raises UserError.

    `format` is the config's; `other` is that of files whose names do not tell. What cannot be parted stays whole:
    compressed files, `json`, `text`, and files with a reader of the user's own.
    """
    return [part for file in input_files(path) for part in _parts(file, format, other, count)]


def portions(path: str, format: str = "", other: str = "jsonl") -> list[list[Part]]:
    """The input as portions of about PORTION_BYTES, each of one part or more; together the parts are all, in order.

    They depend on the sizes of the files alone. What cannot be parted (see `parts`) may make a portion larger.
    """
    sizes = {file: _size(file) for file in input_files(path)}
    total = sum(sizes.values())
    size = max(PORTION_BYTES, total / MOST_PORTIONS)
    size = total / max(math.ceil(total / size), 1)  # equal ones
    found: dict[int, list[Part]] = {}
    end = 0
    for file, length in sizes.items():
        for part in _parts(file, format, other, max(round(length / size), 1) if size else 1):
            end += length / part.count
            middle = end - length / part.count / 2
            found.setdefault(int(middle / size) if size else 0, []).append(part)
    return list(found.values())


def _parts(file: str, format: str, other: str, count: int) -> list[Part]:
    if ":" not in format and format not in ("", *FORMATS):
        choices = f"package.module:function, or one of {', '.join(FORMATS)}"
        raise UserError(f"config.data.format is {format!r}: must be empty, {choices}")
    ending = _COMPRESSED.sub("", file).rpartition(".")[2].lower()
    kind = format or _ENDINGS.get(ending, other)
    if _COMPRESSED.search(file) or kind not in ("jsonl", "parquet", "array_record"):
        count = 1
    before = _lines_before(file, count) if kind == "jsonl" else [0] * count
    return [Part(file, kind, i, count, before[i]) for i in range(count)]


def read(part: Part, bad: BadRecords | None = None) -> Iterator[Record]:
    """The records of a part, in order. Raises UserError, and for bad records what `bad` (default: none may be) says."""
    bad = bad or BadRecords()
    for number, value in _READERS.get(part.format, _own)(part):
        bad.records += 1
        if isinstance(value, BadRecord):
            bad.add(value)
        else:
            yield Record(part.file, number, value)


def texts(part: Part, key: str, bad: BadRecords) -> Iterator[tuple[str, Iterator[str]]]:
    """("file:line", blocks of text) of every document of a part: a plain text, or what records hold under `key`."""
    if part.format == "text":
        bad.records += 1
        yield f"{part.file}:1", _blocks(part.file)
        return
    for record in read(part, bad):
        try:
            text = record.text(key)
        except BadRecord as error:
            bad.add(error)
            continue
        yield record.where, iter([text])


def file_hash(file: str) -> str:
    """sha256 (hex) of a file, local or remote."""
    with _readable(file), _open_raw(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def function_hash(path: str, setting: str) -> str:
    """sha256 (hex) of the module that a function of the user's own comes from: what it makes depends on it."""
    import_object(path, setting)
    return file_hash(sys.modules[path.partition(":")[0]].__file__)


# Readers: part -> (number, value) of every record; a value that is a BadRecord could not be read.


def _json_lines(part: Part) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(part.file, part.index, part.count, part.before):
        if line.strip():
            yield number, _parse(line, f"{part.file}:{number}")


def _json_document(part: Part) -> Iterator[tuple[int, Any]]:
    with _readable(part.file), _open(part.file) as stream:
        content = stream.read()
    try:
        value = json.loads(content)
    except ValueError:  # several values: then they are lines
        yield from _json_lines(part)
        return
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _text(part: Part) -> Iterator[tuple[int, Any]]:
    yield 1, "".join(_blocks(part.file))


def _parquet(part: Part) -> Iterator[tuple[int, Any]]:
    parquet = _need("pyarrow.parquet", part.file)
    with _readable(part.file), _open_raw(part.file) as stream:
        try:
            file = parquet.ParquetFile(stream)
        except ValueError as error:  # pyarrow.ArrowInvalid is one
            raise UserError(
                f"{part.file} is no parquet file ({error}): correct config.data.path"
            ) from error
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        groups = _share(len(sizes), part)
        number = sum(sizes[: groups.start])
        for batch in file.iter_batches(batch_size=256, row_groups=list(groups)) if groups else ():
            for value in batch.to_pylist():
                number += 1
                yield number, value


def _array_record(part: Part) -> Iterator[tuple[int, Any]]:
    if "://" in part.file:
        raise UserError(
            f"{part.file}: ArrayRecord files are read from disk only: copy it, or use jsonl or parquet"
        )
    try:
        reader = array_record_module.ArrayRecordReader(part.file)
        rows = _share(reader.num_records(), part)
        for start in range(rows.start, rows.stop, 256):
            stop = min(start + 256, rows.stop)
            for number, content in enumerate(reader.read(start, stop), start + 1):
                yield number, _parse(content, f"{part.file}:{number}")
        reader.close()  # tells what was wrong with a file that seemed empty
    except Exception as error:  # its errors have no common class
        raise UserError(
            f"{part.file}: cannot be read ({error}): correct config.data.path"
        ) from error


def _own(part: Part) -> Iterator[tuple[int, Any]]:
    reader = import_object(part.format, "config.data.format")
    yield from enumerate(reader(part.file), 1)


_READERS = {
    "jsonl": _json_lines,
    "json": _json_document,
    "text": _text,
    "parquet": _parquet,
    "array_record": _array_record,
}


def _parse(content: bytes, where: str) -> Any:
    """The JSON object of a line or record; a BadRecord if it is none."""
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        return BadRecord(f"{where}: not UTF-8 ({error}): convert the file to UTF-8")
    except json.JSONDecodeError as error:
        return BadRecord(f"{where}: invalid JSON ({error}): each line must be a JSON object")
    if not isinstance(value, dict):
        return BadRecord(
            f"{where}: {_short(content.decode().strip())}: each line must be a JSON object"
        )
    return value


def _lines(
    file: str, index: int = 0, count: int = 1, before: int = 0
) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of the lines that begin in part `index` of `count` equal ones of a file, after `before`."""
    with _readable(file), _open(file) as stream:
        if count == 1:
            yield from enumerate(stream, 1)
            return
        size = stream.seek(0, io.SEEK_END)
        start, stop = size * index // count, size * (index + 1) // count
        number, position = before, stream.seek(max(start - 1, 0))
        if start:  # the line of the byte before is of the part before
            position += len(stream.readline())
        while position < stop:
            line = stream.readline()
            number += 1
            position += len(line)
            yield number, line


def _lines_before(file: str, count: int) -> list[int]:
    """How many lines begin before each of `count` equal parts of a file."""
    if count == 1:
        return [0]
    before, lines, line_ended = [], 0, True  # `lines` begin before `position`
    with _readable(file), _open(file) as stream:
        size = stream.seek(0, io.SEEK_END)
        position = stream.seek(0)
        for start in (size * index // count for index in range(count)):
            while position < start:
                block = stream.read(min(1 << 20, start - position))
                lines += line_ended + block.count(b"\n", 0, -1)
                line_ended = block.endswith(b"\n")
                position += len(block)
            before.append(lines)
    return before


def _size(file: str) -> int:
    with _readable(file):
        return epath.Path(file).stat().length if "://" in file else os.path.getsize(file)


def _blocks(file: str) -> Iterator[str]:
    """The text of a file in blocks of whole lines. Raises UserError."""
    lines, size, number = [], 0, 0
    try:
        for number, line in _lines(file):
            text = line.decode()
            lines.append(text)
            size += len(text)
            if size >= BLOCK_CHARACTERS:
                yield "".join(lines)
                lines, size = [], 0
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}:{number}: not UTF-8 ({error}): convert the file to UTF-8"
        ) from error
    if lines:
        yield "".join(lines)


def _open_raw(file: str) -> BinaryIO:
    return epath.Path(file).open("rb") if "://" in file else open(file, "rb")


@contextlib.contextmanager
def _open(file: str) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed."""
    with _open_raw(file) as raw:
        if file.endswith(".gz"):
            with gzip.open(raw) as stream:
                yield stream
        elif file.endswith(".zst"):
            yield io.BufferedReader(_Blocks(_decompress(raw, file)), 1 << 16)
        else:
            yield raw


def _decompress(raw: BinaryIO, file: str) -> Iterator[bytes]:
    """The bytes of a .zst file. (The library's own reader takes a file that was cut off for a whole one.)"""
    zstandard = _need("zstandard", file)
    frame = None
    try:
        while block := raw.read(1 << 16):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise UserError(f"{file}: cannot be read ({error}): correct config.data.path") from error
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")


class _Blocks(io.RawIOBase):
    """Blocks of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest and (block := next(self._blocks, None)) is not None:
            self._rest = memoryview(block)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


@contextlib.contextmanager
def _readable(file: str) -> Iterator[None]:
    """Turns what may go wrong with a file into a UserError."""
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        what = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: cannot be read ({what}): correct config.data.path") from error
    except ImportError as error:
        raise UserError(f"{file}: cannot be read ({error}): install what is named there") from error


def _need(module: str, file: str) -> Any:
    """A module that only some files need. Raises UserError."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{file}: needs the package {package}: `pip install {package}`, or msllm[data]"
        ) from error


def _share(total: int, part: Part) -> range:
    """The indices, of `total`, that belong to a part."""
    return range(total * part.index // part.count, total * (part.index + 1) // part.count)


def _short(value: Any) -> str:
    return repr(value[:40]) if isinstance(value, str) else repr(value)[:40]
