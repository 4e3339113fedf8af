"""Shows prepared data: `msllm inspect DIR [--example=N] [--html=FILE]`.

Prints statistics of a split and its first tables, a line a row and a column a stream, or one example in full
(docs/data.md). Reads the manifest and the few shards that it needs, so the size of the data does not matter.
"""

from __future__ import annotations

import html
import json
import pathlib
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.text
from absl import flags
from array_record.python import array_record_module

from msllm import errors
from msllm.data import records
from msllm.data.packing import Packed
from msllm.data.tables import Table, unpack
from msllm.errors import UserError
from msllm.runtime.files import write_atomically
from msllm.runtime.progress import Progress
from msllm.tokenizer import Tokenizer
from msllm.view import cells, markup
from msllm.view import tables as tables_view
from msllm.view.tables import Columns, Drawing

SAMPLE = 64  # tables that are read for a statistic which the manifest does not have
ROWS = 64  # rows that the terminal shows of a packed table, if nothing is said
PAGE_TABLES = 20  # tables of a page, if nothing is said
FIRST = 5  # items of a long list in the settings
_HASH = re.compile(r"[0-9a-f]{64}")
_STYLE = """
main { max-width: none; } .figures { max-width: 980px; }
section { max-width: max-content; min-width: min(100%, 980px); }
details { margin-top: 14px; } summary { cursor: pointer; }
"""


class Split:
    """One split of a prepared directory. A shard is opened, and its size checked, when one of its tables is read.

    Attributes:
      manifest: the directory's manifest; `part` is what it says of the split.
      columns: names and kinds of the streams, and the tokenizer.
    """

    def __init__(self, directory: str | pathlib.Path, split: str):
        """Raises UserError where there is no such data, or no table in it."""
        self.directory, self.split = pathlib.Path(directory), split
        self.manifest, self._paths = records.open_prepared(directory, split, part=None)
        self.part = self.manifest["splits"][split]
        stored, streams = self.manifest["tokenizer"], self.manifest["streams"]
        tokenizer = Tokenizer.load(self.directory / stored["file"], stored["silence"])
        self.columns = Columns(streams["names"], streams["kinds"], tokenizer)
        self._starts = np.cumsum([0, *(shard["records"] for shard in self.part["shards"])])
        self._shard, self._reader = None, None
        if not len(self):
            others = [name for name, part in self.manifest["splits"].items() if part["tables"]]
            raise UserError(
                f"--split={split}: {directory} has no table in it; look at --split={' or '.join(others)}"
            )

    def __len__(self) -> int:
        """The number of packed tables."""
        return self.part["tables"]

    def table(self, number: int) -> Packed:
        """A packed table by its number in stored order: 0 is the first one of the first shard."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        try:
            if shard != self._shard:
                if self._reader is not None:
                    self._reader.close()
                self._shard, self._reader = None, None
                records.check_shard(self.directory, self.part["shards"][shard], read=False)
                # Records are read alone: what lies behind one is not read ahead.
                self._reader = array_record_module.ArrayRecordReader(
                    self._paths[shard], "readahead_buffer_size:0"
                )
                self._shard = shard
            record = self._reader.read([number - int(self._starts[shard])])[0]
        except RuntimeError as error:
            raise UserError(
                f"{self._paths[shard]} is corrupt ({error}): restore it, or prepare again"
            ) from error
        return records.decode_record(
            record, len(self.columns.names), self.columns.tokenizer.vocab_size
        )

    def tables(self) -> Iterator[tuple[int, Packed]]:
        """(number of its first example, table) of all packed tables in stored order, each read when it is asked for."""
        first = 0
        for number in range(len(self)):
            packed = self.table(number)
            yield first, packed
            first += len(packed.examples)

    def example(self, wanted: str) -> tuple[int, Table]:
        """An example's number in stored order, and its table; `wanted`: that number, or the example's id.

        Tables are read from the first one on until it is found. Raises UserError if there is none.
        """
        total = self.part["examples"]
        by_id = re.fullmatch(r"[0-9a-f]{16}", wanted)
        if not by_id and not wanted.isdecimal():
            raise UserError(
                f"--example={wanted!r}: give a number from 0 to {total - 1}, or an id of 16 hex digits"
            )
        if not by_id and int(wanted) >= total:
            raise UserError(
                f"--example={wanted}: split {self.split!r} of {self.directory} holds the examples 0 to {total - 1}"
            )
        with Progress("inspect: tables", len(self)) as progress:
            for number, (first, packed) in enumerate(self.tables()):
                progress.show(number)
                if by_id and wanted in packed.examples:
                    place = packed.examples.index(wanted)
                elif not by_id and int(wanted) < first + len(packed.examples):
                    place = int(wanted) - first
                else:
                    continue
                return first + place, unpack(packed._asdict(), packed.examples)[place]
        raise UserError(
            f"--example={wanted}: split {self.split!r} of {self.directory} does not hold it; an example that was held"
            " out is in the other split (--split=train or --split=eval)"
        )


class Overlap(NamedTuple):
    """In how many rows several streams speak."""

    rows: int  # of two or more streams that are neither silent nor absent
    of: int  # rows that were read
    tables: int  # tables that were read


def overlap(data: Split, tables: int = SAMPLE) -> Overlap:
    """Counts the rows in which two or more streams speak, in so many tables spread evenly over the split."""
    count = min(tables, len(data))
    found = rows = 0
    for i in range(count):
        packed = data.table(i * len(data) // count)
        speaking = (packed.present & (packed.tokens != data.columns.tokenizer.silence_id)).sum(
            axis=1
        )
        found += int(((speaking > 1) & (packed.segment > 0)).sum())
        rows += int((packed.segment > 0).sum())
    return Overlap(found, rows, count)


def statistics(data: Split, found: Overlap) -> list[tuple[str, str]]:
    """(what, value) of everything known of the split as a whole."""
    manifest, part = data.manifest, data.part
    sampled = (
        "all tables"
        if found.tables == len(data)
        else f"a sample: {found.tables} tables, evenly spread"
    )
    sizes, counts = ([shard[key] for shard in part["shards"]] for key in ("bytes", "records"))
    tokenizer = manifest["tokenizer"]
    facts = [
        ("examples", f"{part['examples']:,}"),
        ("tables", f"{part['tables']:,} of {manifest['rows']} rows"),
        ("rows", f"{part['rows']:,}, which fill {part['packing_efficiency']:.1%} of the tables"),
        ("silence", f"{part['silence_rate']:.1%} of the cells"),
    ]
    if len(data.columns.names) > 1:
        share = f"{found.rows / found.of:.1%} of the rows have two or more streams that speak ({sampled})"
        facts.append(("overlap", share))
    # What else is counted, whatever it is: cut, dropped, ...
    known = (
        "examples",
        "tables",
        "rows",
        "tokens",
        "silence",
        "silence_rate",
        "packing_efficiency",
        "shards",
    )
    facts += [(name, _counted(value)) for name, value in part.items() if name not in known]
    facts += [
        (
            "shards",
            f"{len(sizes):,} of {markup.size_text(sum(sizes))} in all; tables in each: {_span(counts)}",
        ),
        (
            "tokenizer",
            f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} pieces, silence is {tokenizer['silence']}",
        ),
    ]
    known = ("format", "settings", "streams", "rows", "tokenizer", "splits")
    return facts + [
        (f"{name}, all splits", _counted(v)) for name, v in manifest.items() if name not in known
    ]


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _counted(value: Any) -> str:
    """Counts as the manifest keeps them: a number, or {what: number, ..., "reason": why}."""
    if isinstance(value, dict):
        counts = {name: number for name, number in value.items() if isinstance(number, int)}
        others = [_setting(other) for name, other in value.items() if name not in counts and other]
        if counts:
            shown = ", ".join(f"{number:,} {name}" for name, number in counts.items())
            return (
                (f"{shown} ({'; '.join(others)})" if others else shown)
                if any(counts.values())
                else "none"
            )
    return f"{value:,}" if isinstance(value, int) else _setting(value)


def _setting(value: Any) -> str:
    """A value of the manifest on one line: hashes and long lists are cut."""
    if isinstance(value, str):
        return value[:12] if _HASH.fullmatch(value) else cells.visible(value) or "''"
    if isinstance(value, list):
        more = [f"... {len(value) - FIRST:,} more"] * (len(value) > FIRST)
        return "[" + ", ".join([*map(_setting, value[:FIRST]), *more]) + "]"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_setting(item)}" for name, item in value.items()) or "none"
    return json.dumps(value)


def settings(data: Split) -> list[tuple[str, str]]:
    """(name, value) of what the data was prepared with."""
    return [
        (name, _setting(value))
        for name, value in data.manifest["settings"].items()
        if name != "streams"
    ]


STREAM_COLUMNS = ("stream", "kind", "delay", "tokens", "silence", "absent", "silent")


def stream_rows(data: Split) -> list[tuple[str, ...]]:
    """A row of STREAM_COLUMNS for each stream: cells of filled rows, and the share of silence in those present."""
    rows = []
    for name, kind, delay in zip(
        data.columns.names, data.columns.kinds, data.manifest["streams"]["delays"]
    ):
        tokens, silence = data.part["tokens"][name], data.part["silence"][name]
        absent, share = data.part["rows"] - tokens - silence, silence / max(tokens + silence, 1)
        rows.append(
            (
                cells.visible(name),
                kind,
                *(f"{n:,}" for n in (delay, tokens, silence, absent)),
                f"{share:.1%}",
            )
        )
    return rows


def heading(data: Split) -> str:
    """What is shown."""
    return f"{data.directory}, split {data.split}"


def print_statistics(console: rich.console.Console, data: Split, found: Overlap) -> None:
    """Everything known of the split, without its tables."""
    console.print(rich.text.Text(heading(data), style="bold"), soft_wrap=True)
    lines = markup.aligned(statistics(data, found), ())
    lines += [
        "",
        *markup.aligned([STREAM_COLUMNS, *stream_rows(data)], range(2, len(STREAM_COLUMNS))),
    ]
    lines += ["", "prepared with", *markup.aligned(settings(data), ())]
    console.print(rich.text.Text("\n".join(lines)), soft_wrap=True)


def page(data: Split, found: Overlap, drawings: Sequence[Drawing], limit: int | None = None) -> str:
    """Statistics and tables as a page of HTML."""
    share = f"{found.rows / found.of:.1%}"
    figures = {
        "examples": f"{data.part['examples']:,}",
        f"tables of {data.manifest['rows']} rows": f"{len(data):,}",
        "of the rows filled": f"{data.part['packing_efficiency']:.1%}",
        "of the cells silent": f"{data.part['silence_rate']:.1%}",
        **({"of the rows overlap": share} if len(data.columns.names) > 1 else {}),
    }
    parts = [f"<h1>{html.escape(heading(data))}</h1>", markup.figures(figures)]
    parts.append(
        f"<section><h2>Streams</h2>{markup.table(STREAM_COLUMNS, stream_rows(data), range(2, 7))}</section>"
    )
    parts.append(f"<section><h2>Statistics</h2>{markup.table((), statistics(data, found), ())}")
    parts.append(
        f"<details><summary>prepared with</summary>{markup.table((), settings(data), ())}</details></section>"
    )
    parts.append(
        f"<p class='soft note'>Below: {cells.SILENT} is silence, hatched cells are absent. An example begins at each"
        " line with its number and its id.</p>"
    )
    style = _STYLE + tables_view.style(data.columns)
    parts += [
        f"<section>{tables_view.to_html(data.columns, one, limit)}</section>" for one in drawings
    ]
    return markup.document(heading(data), "".join(parts), style)


def write(path: str | pathlib.Path, content: str) -> None:
    """Writes a text file, whole or not at all. Raises UserError where that is impossible."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"--html={path}: {error.strerror}; give a file in a folder that exists"
        ) from error


def run(
    directory: str | pathlib.Path,
    console: rich.console.Console,
    split: str = "train",
    example: str | None = None,
    tables: int | None = None,
    rows: int | None = None,
    file: str | None = None,
) -> None:
    """Shows what the flags ask for on `console`, or writes it as a page to `file`. Raises UserError."""
    for name, value in (("tables", tables), ("rows", rows)):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: must be at least 1")
    data = Split(directory, split)
    if example is not None:
        number, table = data.example(example)
        drawings = [tables_view.of_example(number, table)]
    else:
        first_tables = zip(range(tables or (PAGE_TABLES if file else 1)), data.tables())
        drawings = [tables_view.of_packed(i, first, packed) for i, (first, packed) in first_tables]
    if file:
        write(file, page(data, overlap(data), drawings, rows))
        console.print(rich.text.Text(f"wrote {file}"), soft_wrap=True)
        return
    if example is None:
        print_statistics(console, data, overlap(data))
        rows = rows or ROWS
    for one in drawings:
        console.print()
        tables_view.to_terminal(console, data.columns, one, rows, cut=console.is_terminal)
    if example is not None:
        console.print()
        cells.print_texts(
            console, data.columns.tokenizer, data.columns.names, table.tokens, table.present
        )


def main(argv: Sequence[str]) -> None:
    """Shows what the command line asks for."""
    if len(argv) < 2:
        raise UserError("there is no directory to look at: msllm inspect DIR, e.g. data/quickstart")
    flag = flags.FLAGS
    run(argv[1], cells.console(), flag.split, flag.example, flag.tables, flag.rows, flag.html)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this, without a traceback
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that does not know a character
    flags.DEFINE_enum("split", "train", ["train", "eval"], "Which split.")
    flags.DEFINE_string(
        "example", None, "Show one example: its number in stored order, or its id (16 hex digits)."
    )
    flags.DEFINE_integer(
        "tables", None, f"Tables to show, from the first on: 1, in a page {PAGE_TABLES}."
    )
    flags.DEFINE_integer(
        "rows", None, f"Rows to show of each table; the terminal shows {ROWS}, of an example all."
    )
    flags.DEFINE_string("html", None, "Write a page to this file instead.")
    errors.run(main, positional=1)
