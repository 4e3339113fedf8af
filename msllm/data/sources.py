"""Sources: the records of the files that a path or glob names, each with its file and line.

The formats, their file names, and what a record is:

- `jsonl` (`.jsonl`, `.ndjson`): a line with a JSON object.
- `json` (`.json`): an item of the JSON list, or the whole JSON value. A file whose first line is a
  JSON object by itself is read as `jsonl`.
- `csv` (`.csv`), `tsv` (`.tsv`): a row, as an object with a string for every column. The first row
  names the columns. It may be missing if the file has the columns that the converter reads.
- `parquet` (`.parquet`), `arrow` (`.arrow`, `.feather`): a row.
- `array_record` (`.array_record`, `.arrayrecord`): a record that holds a JSON object.
- `vtt`, `srt`, `rttm`, `ctm`, `textgrid` (files of these names): a recording, with its utterances
  (msllm/data/transcripts.py).
- `text`: the whole file, as a string (`texts` reads it without keeping it in memory).

If the converter reads texts, csv, tsv and the formats of recordings are read as `text`, as is a
file with any other name. Other converters read a file with any other name as `jsonl`.
`config.data.format` overrides the name. It may also be the import path `package.module:function` of
a reader, a function from a file's path to its records. All formats but `parquet`, `arrow` and
`array_record` may be compressed (`.gz`, `.zst`, `.xz` or `.bz2` after the name). All formats but
`array_record` may be remote (`gs://`, through etils).
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from array_record.python import array_record_module

from msllm.config import import_object
from msllm.data import files, transcripts
from msllm.errors import UserError

PORTION_BYTES = 32 << 20  # of input that one process works on at a time
MAX_PORTIONS = 1024  # of an input; a very large input has larger portions
MAX_SHOWN = 5  # bad records whose messages are shown
MIN_RECORDS = 1000  # with fewer records, the share of bad ones says little
_TEXTUAL = ("csv", "tsv", *transcripts.FORMATS)  # plain text for a converter that reads texts
FORMATS = ("jsonl", "json", "parquet", "arrow", "array_record", *_TEXTUAL, "text")
_FORMAT_OF_ENDING = {name: name for name in FORMATS} | {
    "ndjson": "jsonl",
    "arrayrecord": "array_record",
    "feather": "arrow",
}
# File names of other formats that people have, with what to do.
_UNREADABLE = {
    "xlsx xls ods": "save the sheet as .csv",
    "zip tar tgz 7z rar": "unpack it",
    "lz4 br lzma z": "compress it as .gz, .zst, .xz or .bz2",
    "pkl pickle pt pth npz npy h5 hdf5": "convert it to .jsonl",
    "yaml yml xml eaf trs cha stm db sqlite": "convert it to .jsonl",
    "pdf docx doc odt rtf epub html htm": "extract its text",
    "wav mp3 flac ogg mp4 png jpg jpeg": "give a transcript of it",
    "ass ssa sbv": "convert it to .srt or .vtt",
}
_DIVISIBLE = ("jsonl", "parquet", "array_record")
_BATCH = 256  # records read at a time from parquet, Arrow and ArrayRecord files
_FIELD_CHARACTERS = 1 << 30  # limit of a field of a csv file


TEXT_COUNTS = ("texts", "changed", "words", "characters", "tokens")
_SAMPLE = 64  # the first 64 texts of a portion and every 64th are in the sample


class BadRecord(UserError):
    """A record that cannot be used. `config.data.bad_percent` limits how many are left out."""


class BadRecords:
    """Counts records, their texts and the bad ones; raises UserError if too many are bad.

    Attributes:
      records: the number of records read so far.
      bad: the number of records left out because they are bad.
      shown: the messages of the first MAX_SHOWN bad records.
      empty: the number of good records that gave no table.
      texts: the numbers of encoded `texts`, and of `changed` ones among them
        (`Tokenizer.compare`); the numbers of words, characters and tokens in a sample of them.
      in_sample: the last text belongs to the sample.
      changed: the first text that the tokenizer changed.
      turns: {stream: the number of its `turns`, of `empty` ones among them, and the place of the
        `first` empty one}, of converters whose records have turns.
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
        self.texts = dict.fromkeys(TEXT_COUNTS, 0)
        self.in_sample = False
        self.changed = ""
        self.turns: dict[str, dict[str, Any]] = {}

    @property
    def allows_some(self) -> bool:
        """Whether any record may be bad."""
        return self._percent > 0

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
            "texts": self.texts,
            "changed": self.changed,
            "turns": self.turns,
        }

    def merge(self, counts: Mapping[str, Any]) -> None:
        """Adds the `counts()` of the records that follow."""
        self.records += counts["records"]
        self.bad += counts["bad"]
        self.empty += counts["empty"]
        for message in counts["shown"]:
            self.note(message)
        # The reports of portions that an earlier version made have no counts of texts.
        for name, count in counts.get("texts", {}).items():
            self.texts[name] += count
        self.changed = self.changed or counts.get("changed", "")
        for stream, theirs in counts.get("turns", {}).items():
            ours = self._turns_of(stream)
            ours["first"] = ours["first"] or theirs["first"]
            for name in ("turns", "empty"):
                ours[name] += theirs[name]

    def add_turn(self, stream: str, text: str, where: str) -> None:
        """Counts a turn of a stream, which is empty if its text is only white space."""
        counts = self._turns_of(stream)
        counts["turns"] += 1
        if not text or text.isspace():
            counts["empty"] += 1
            counts["first"] = counts["first"] or where

    def _turns_of(self, stream: str) -> dict[str, Any]:
        return self.turns.setdefault(stream, {"turns": 0, "empty": 0, "first": ""})

    def starts_text(self) -> bool:
        """Counts a text, and returns whether it belongs to the sample (`add_text`)."""
        number = self.texts["texts"]
        self.texts["texts"] = number + 1
        self.in_sample = number % _SAMPLE == 0 or number < _SAMPLE
        return self.in_sample

    def add_text(self, text: str, tokens: int, changed: bool) -> None:
        """Counts the last text if it is in the sample, or its tokens give it back changed.

        Args:
          text: the text.
          tokens: the number of its tokens.
          changed: its tokens give it back with other white space, or normalized.
        """
        if self.in_sample:
            self.texts["words"] += len(text.split())
            self.texts["characters"] += len(text)
            self.texts["tokens"] += tokens
        self.texts["changed"] += changed
        if changed and not self.changed:
            self.changed = _short(text)

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
    columns: tuple[str, ...] = ()  # csv, tsv: the columns of a file that does not name them

    @property
    def counts_lines(self) -> bool:
        """Whether `before` is needed."""
        return self.format == "jsonl" and self.count > 1


def text_of(value: Any, key: str, where: str) -> str:
    """Returns value[key]. Raises BadRecord, naming `where`, if it is not a string."""
    text = value.get(key) if isinstance(value, dict) else None
    if isinstance(text, str):
        return text
    if not isinstance(value, dict):
        raise BadRecord(f"{where}: the record is {_short(value)}: must be an object with {key!r}")
    what = f"{key!r} is {_short(text)}" if key in value else f"there is no {key!r}"
    raise BadRecord(f"{where}: {what}: must be a string (the keys: {sorted(value)})")


def parts(
    path: str,
    format: str = "",
    other: str = "jsonl",
    count: int = 1,
    columns: Sequence[str] = (),
) -> list[Part]:
    """Divides each file that a path or glob names into `count` parts, in the order of the records.

    Only `jsonl`, `parquet` and `array_record` files that are not compressed are divided.

    Args:
      path: the path or glob.
      format: `config.data.format`.
      other: the format of files whose names do not determine it.
      count: the number of parts of each file.
      columns: the columns of a csv or tsv file whose first row does not name them.

    Raises UserError if there is no such file, or the format is unknown.
    """
    found = []
    for file in files.input_files(path):
        divided = _parts(file, format, other, count, columns)
        if divided[0].counts_lines:
            divided = number_lines(divided, files.hash_and_lines_before(file, len(divided))[1])
        found += divided
    return found


def number_lines(parts: Sequence[Part], before: Sequence[int]) -> list[Part]:
    """Sets `Part.before` of parts, from the number of lines before each part of their file."""
    return [
        dataclasses.replace(part, before=before[part.index]) if part.counts_lines else part
        for part in parts
    ]


def portions(
    path: str, format: str = "", other: str = "jsonl", columns: Sequence[str] = ()
) -> list[list[Part]]:
    """Divides the input into portions of about PORTION_BYTES, each with one or more parts.

    Together the portions hold all parts, in order. They depend on the sizes of the files alone. A
    file that is not divided (see `parts`) may make a portion larger. No file is read, so `before`
    of all parts is 0 (see `number_lines`). The arguments and errors are those of `parts`.
    """
    sizes = files.file_sizes(files.input_files(path))
    total = sum(sizes.values())
    size = max(PORTION_BYTES, total / MAX_PORTIONS)
    size = total / max(math.ceil(total / size), 1)  # portions of equal size
    found: dict[int, list[Part]] = {}
    end = 0.0
    for file, length in sizes.items():
        count = max(round(length / size), 1) if size else 1
        for part in _parts(file, format, other, count, columns):
            end += length / part.count
            middle = end - length / part.count / 2  # decides which portion takes the part
            found.setdefault(int(middle / size) if size else 0, []).append(part)
    return list(found.values())


def _parts(file: str, format: str, other: str, count: int, columns: Sequence[str]) -> list[Part]:
    if ":" not in format and format not in ("", *FORMATS):
        raise UserError(
            f"config.data.format is {format!r}: must be empty, package.module:function, or one of"
            f" {', '.join(FORMATS)}"
        )
    ending = _ending(file)
    kind = format or _FORMAT_OF_ENDING.get(ending, other)
    if not format and other == "text" and kind in _TEXTUAL:
        kind = "text"
    if not format:
        _check_ending(file, ending)
    if files.COMPRESSED.search(file) or kind not in _DIVISIBLE:
        count = 1
    return [Part(file, kind, i, count, columns=tuple(columns)) for i in range(count)]


def _ending(file: str) -> str:
    """Returns the ending of a file's name, in lower case and without that of a compression."""
    return files.COMPRESSED.sub("", file).rpartition("/")[2].rpartition(".")[2].lower()


def _check_ending(file: str, ending: str) -> None:
    """Raises UserError if a file is in a format that cannot be read."""
    for endings, remedy in _UNREADABLE.items():
        if ending in endings.split():
            raise UserError(
                f"{file}: msllm does not read .{ending} files: {remedy}, or read it with"
                " config.data.format=package.module:function (it reads"
                f" {', '.join(FORMATS)})"
            )


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
            yield number, _parse(line, part.file, number)


def _read_json(part: Part) -> Iterator[tuple[int, Any]]:
    with files.readable(part.file), files.open_file(part.file) as stream:
        content = stream.read()
    try:
        value = json.loads(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{part.file}: {files.not_utf8(part.file, error)}") from error
    except json.JSONDecodeError as error:
        if not _is_object(content.lstrip().partition(b"\n")[0]):
            raise UserError(f"{part.file}:{_explain(error)}") from error
        yield from _read_json_lines(part)
        return
    except (ValueError, RecursionError) as error:
        raise UserError(f"{part.file}: invalid JSON ({error}): correct the file") from error
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _is_object(line: bytes) -> bool:
    """Returns whether a line is a JSON object by itself."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _explain(error: json.JSONDecodeError) -> str:
    """Returns "line: what is wrong" of a JSON document."""
    text, place = error.doc, error.pos
    before = text[:place].rstrip()
    if not text[place:].strip():
        line = text.count("\n", 0, place) + 1
        return (
            f"{line}: invalid JSON: the file ends in the middle of a value; it may have been cut"
            " off when it was copied"
        )
    comma = place if text[place] == "," else len(before) - 1
    if before and text[comma] == "," and text[comma + 1 :].lstrip()[:1] in ("]", "}"):
        line = text.count("\n", 0, comma) + 1
        column = comma - text.rfind("\n", 0, comma)
        return f"{line}: invalid JSON: remove the comma after the last item (column {column})"
    return f"{error.lineno}: invalid JSON ({error.msg} in column {error.colno}): correct the file"


def _read_csv(part: Part) -> Iterator[tuple[int, Any]]:
    """Reads csv, with quoted fields, or tsv, in which quotes mean nothing."""
    csv.field_size_limit(_FIELD_CHARACTERS)
    # Bytes that are not UTF-8 become surrogates, which no valid text has.
    lines = (line.decode(errors="surrogateescape") for _, line in files.lines(part.file))
    first = next(lines, "")
    lines = itertools.chain([first], lines)
    rows = (
        csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
        if part.format == "tsv"
        else csv.reader(lines, delimiter=_delimiter(first, part.columns), strict=True)
    )
    columns: Sequence[str] = ()
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield rows.line_num, BadRecord(f"{part.file}:{rows.line_num}: {error}")
            continue
        if row is None:
            return
        if not row:
            continue
        where = f"{part.file}:{rows.line_num}"
        if not columns:
            columns, is_named = _columns(part, row)
            if is_named:
                continue
        try:
            "".join(row).encode()
        except UnicodeEncodeError:
            yield rows.line_num, BadRecord(f"{where}: not UTF-8: convert the file to UTF-8")
            continue
        if len(row) != len(columns):
            error_text = f"{len(row)} fields, but {len(columns)} columns ({', '.join(columns)})"
            yield rows.line_num, BadRecord(f"{where}: the row has {error_text}")
            continue
        yield rows.line_num, dict(zip(columns, row))


def _delimiter(first: str, wanted: Sequence[str]) -> str:
    """Returns what separates the columns of a csv file.

    Where the comma is a decimal point, spreadsheets write semicolons.

    Args:
      first: the first line.
      wanted: the columns that the converter reads.
    """
    for mark in ";\t":
        names = [name.strip(' "\r\n') for name in first.split(mark)]
        fits = set(wanted) <= set(names) or len(wanted) == len(names)
        if "," not in first and len(names) > 1 and fits:
            return mark
    return ","


def _columns(part: Part, row: Sequence[str]) -> tuple[Sequence[str], bool]:
    """Returns the columns of a csv or tsv file, and whether `row`, its first row, names them."""
    wanted, found = part.columns, [name.strip() for name in row]
    if set(wanted) <= set(found):
        if len(set(found)) < len(found):
            raise UserError(f"{part.file}:1: the columns are {found}: give each a name of its own")
        return found, True
    if len(wanted) != len(row):
        raise UserError(
            f"{part.file}:1: the first row is {_short(', '.join(row))}: it must name the columns"
            f" {', '.join(wanted)}, or the file must have exactly these columns; correct the file,"
            " or name its columns in config.data.options"
        )
    _note_once(
        f"{part.file}: the first row does not name the columns {', '.join(wanted)}: the columns are"
        " taken to be these, and the first row to be a record"
    )
    return wanted, False


@functools.cache
def _note_once(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _read_transcript(part: Part) -> Iterator[tuple[int, Any]]:
    try:
        recordings = transcripts.read(part.file, part.format)
    except transcripts.Damaged as error:
        yield 1, BadRecord(str(error))
        return
    yield from enumerate(recordings, 1)


def _read_text(part: Part) -> Iterator[tuple[int, Any]]:
    yield 1, "".join(files.text_blocks(part.file))


def _read_parquet(part: Part) -> Iterator[tuple[int, Any]]:
    parquet = files.import_optional("pyarrow.parquet", part.file)
    with files.readable(part.file), files.open_raw(part.file) as stream:
        try:
            file = parquet.ParquetFile(stream)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            groups = _share(len(sizes), part)
            if not groups:
                return
            number = sum(sizes[: groups.start])
            for batch in file.iter_batches(batch_size=_BATCH, row_groups=list(groups)):
                for value in batch.to_pylist():
                    number += 1
                    yield number, value
        except ValueError as error:  # includes pyarrow.ArrowInvalid and text that is not UTF-8
            raise UserError(
                f"{part.file} is no parquet file ({error}): correct config.data.path"
            ) from error


def _read_arrow(part: Part) -> Iterator[tuple[int, Any]]:
    """Reads the file and the stream form of Arrow; Feather is the file form."""
    ipc = files.import_optional("pyarrow.ipc", part.file)
    with files.readable(part.file), files.open_raw(part.file) as stream:
        try:
            is_file = stream.read(6) == b"ARROW1"
            stream.seek(0)
            number = 0
            for batch in _file_batches(ipc, stream) if is_file else ipc.open_stream(stream):
                batch.validate(full=True)  # otherwise offsets of a damaged file crash the process
                for start in range(0, batch.num_rows, _BATCH):
                    for value in batch.slice(start, _BATCH).to_pylist():
                        number += 1
                        yield number, value
        except ValueError as error:  # includes pyarrow.ArrowInvalid
            raise UserError(
                f"{part.file} is no Arrow file ({error}): correct config.data.path"
            ) from error


def _file_batches(ipc: Any, stream: io.BufferedReader) -> Iterator[Any]:
    reader = ipc.open_file(stream)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


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
                yield number, _parse(content, part.file, number)
        reader.close()  # raises if the file seemed empty because it is damaged
    except Exception as error:  # the library's errors have no common base class
        raise UserError(
            f"{part.file}: cannot be read ({error}): correct config.data.path"
        ) from error


def _read_with_function(part: Part) -> Iterator[tuple[int, Any]]:
    reader = import_object(part.format, "config.data.format")
    number = 0
    try:
        for number, value in enumerate(reader(part.file), 1):
            yield number, value
    except UserError:
        raise
    except Exception as error:
        place = f"{part.file}, after record {number}"
        if not part.format.startswith("msllm."):
            error.add_note(f"in {part.format}, reading {place}")
            raise
        raise UserError(
            f"{place}: {part.format} cannot read the file ({type(error).__name__}: {error}):"
            " correct the file or config.data.path"
        ) from error


_READERS = {
    "jsonl": _read_json_lines,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "text": _read_text,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "array_record": _read_array_record,
} | dict.fromkeys(transcripts.FORMATS, _read_transcript)


def _parse(content: bytes, file: str, number: int) -> Any:
    """Returns the JSON object of a line or record, or a BadRecord if there is none."""
    where = f"{file}:{number}"
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        return BadRecord(f"{where}: {files.not_utf8(file, error)}")
    except json.JSONDecodeError as error:
        column = min(error.pos, len(error.doc.rstrip())) + 1  # the place may be after the line
        return BadRecord(f"{where}: invalid JSON ({error.msg} in column {column}): {_rule(file)}")
    except (ValueError, RecursionError, MemoryError) as error:
        return BadRecord(f"{where}: invalid JSON ({error}): {_rule(file)}")
    if not isinstance(value, dict):
        return BadRecord(f"{where}: {_short(content.decode().strip())}: {_rule(file)}")
    return value


def _rule(file: str) -> str:
    """Says how a record of JSON lines must look, and why the file is read as JSON lines."""
    rule = "each line must be a JSON object"
    ending = _ending(file)
    if ending in _FORMAT_OF_ENDING:
        return rule
    return (
        f"{rule}, because a file of this name is read as jsonl (for another format, set"
        f" config.data.format to one of {', '.join(FORMATS)}, or to package.module:function)"
    )


def _share(total: int, part: Part) -> range:
    """Returns the range of the `total` indices of a file that belong to a part."""
    return range(total * part.index // part.count, total * (part.index + 1) // part.count)


def _short(value: Any) -> str:
    return repr(value[:40]) if isinstance(value, str) else repr(value)[:40]
