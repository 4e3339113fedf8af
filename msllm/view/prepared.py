"""Shows prepared data: the statistics of a split and its first tables, or one example.

It reads the manifest and only the shards that it needs, so the size of the data does not matter.
docs/data.md has an example.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.console
from rich.text import Text

from msllm.data import evidence
from msllm.data.tables import Table, unpack
from msllm.errors import UserError
from msllm.runtime.files import write_atomically
from msllm.streams import NEVER, lag_matrix
from msllm.view import cells, pages
from msllm.view import tables as tables_view
from msllm.view.split import Split
from msllm.view.tables import Drawing

SAMPLE = 64  # tables that are read for a statistic that is not in the manifest
ROWS = 64  # default number of rows shown of a packed table on a terminal
PAGE_TABLES = 20  # default number of tables on a page
FIRST = 5  # items shown of a list in the settings
STREAM_COLUMNS = ("stream", "kind", "delay", "tokens", "silence", "absent", "silent")
_HASH = re.compile(r"[0-9a-f]{64}")
# Entries of the manifest that `statistics` formats itself. It lists all other entries after them.
_PART = (
    "examples",
    "tables",
    "rows",
    "longest",
    "tokens",
    "silence",
    "silence_rate",
    "packing_efficiency",
    "shards",
)
_MANIFEST = ("format", "settings", "streams", "lag", "rows", "tokenizer", "splits")


class Overlap(NamedTuple):
    """The number of rows in which several streams speak at once."""

    rows: int  # rows with two or more streams that are neither silent nor absent
    read_rows: int
    read_tables: int


def overlap(data: Split, tables: int = SAMPLE) -> Overlap:
    """Counts the rows in which two or more streams speak.

    Args:
      data: the split.
      tables: the most tables to read, spread evenly over the split.
    """
    silence_id = data.columns.tokenizer.silence_id
    count = min(tables, len(data))
    overlapping = rows = 0
    for i in range(count):
        packed = data.table(i * len(data) // count)
        speaking = packed.present & (packed.tokens != silence_id)
        filled = packed.segment > 0
        overlapping += int(((speaking.sum(axis=1) > 1) & filled).sum())
        rows += int(filled.sum())
    return Overlap(overlapping, rows, count)


def targets_in_time(data: Split, lag: np.ndarray | None = None) -> list[str]:
    """Says for each generated stream whether its targets can be known in time, in lines of text.

    There are none if there is a single stream. msllm/data/evidence.py describes the estimate.

    Args:
      data: the split.
      lag: [S, S] int, the visibility. None: that of the config with which the data was prepared.
    """
    names, kinds = data.columns.names, data.columns.kinds
    if len(names) < 2:
        return []
    assumed = ""
    if lag is None and "lag" in data.manifest:
        stored = data.manifest["lag"]
        lag = np.array([[NEVER if rows is None else rows for rows in row] for row in stored])
    elif lag is None:  # data of an earlier version
        lag, assumed = lag_matrix("block_causal", len(names)), ", assuming block_causal"
    rules = data.manifest["streams"].get("mail", ())
    copies = [(names.index(reader), names.index(source)) for reader, source, *_ in rules]
    silence = data.columns.tokenizer.silence_id
    found = evidence.estimate(_sample(data), kinds, lag, silence, copies)
    return evidence.describe(
        found, names, lag, f"an estimate from a sample of {data.split}{assumed}"
    )


def _sample(data: Split) -> Iterator[Table]:
    """Yields examples of at most SAMPLE tables from all over the split."""
    count = min(SAMPLE, len(data))
    # Drawn, because the first ones of them should also come from all over the split.
    for i in np.random.default_rng(0).permutation(count):
        packed = data.table(int(i) * len(data) // count)
        yield from unpack(packed._asdict(), packed.examples)


def statistics(data: Split, found: Overlap) -> list[tuple[str, str]]:
    """(name, value) of everything known about the split."""
    manifest, part, tokenizer = data.manifest, data.part, data.manifest["tokenizer"]
    facts = [
        ("examples", f"{part['examples']:,}"),
        ("tables", f"{part['tables']:,} of {manifest['rows']} rows"),
        ("rows", f"{part['rows']:,}, which fill {part['packing_efficiency']:.1%} of the tables"),
        ("silence", f"{part['silence_rate']:.1%} of the cells"),
    ]
    if "longest" in part:  # not in data of earlier versions
        facts.append(("longest", f"{part['longest']:,} rows"))
    if len(data.columns.names) > 1:
        facts.append(("overlap", _overlap_text(data, found)))
    facts += [(name, _count_text(value)) for name, value in part.items() if name not in _PART]
    facts += [
        ("shards", _shards_text(part["shards"])),
        (
            "tokenizer",
            f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} pieces, "
            f"silence is {tokenizer['silence']}",
        ),
    ]
    for name, value in manifest.items():
        if name not in _MANIFEST:
            facts.append((f"{name}, all splits", _count_text(value)))
    return facts


def _overlap_text(data: Split, found: Overlap) -> str:
    sample = f"a sample: {found.read_tables} tables, evenly spread"
    read = "all tables" if found.read_tables == len(data) else sample
    share = found.rows / found.read_rows
    return f"{share:.1%} of the rows have two or more streams that speak ({read})"


def _shards_text(shards: Sequence[dict[str, Any]]) -> str:
    size = pages.size_text(sum(shard["bytes"] for shard in shards))
    counts = [shard["records"] for shard in shards]
    low, high = min(counts), max(counts)
    span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{len(shards):,} of {size} in all; tables in each: {span}"


def _count_text(value: Any) -> str:
    """The text of a manifest entry: a number, or {name: number, ..., "reason": text}."""
    if isinstance(value, int):
        return f"{value:,}"
    counts = {}
    if isinstance(value, dict):
        counts = {name: number for name, number in value.items() if isinstance(number, int)}
    if not counts:
        return _setting_text(value)
    if not any(counts.values()):
        return "none"
    text = ", ".join(f"{number:,} {name}" for name, number in counts.items())
    others = [_setting_text(other) for name, other in value.items() if name not in counts and other]
    return f"{text} ({'; '.join(others)})" if others else text


def _setting_text(value: Any) -> str:
    """The text of a manifest value on one line, with hashes and long lists shortened."""
    if isinstance(value, str):
        return value[:12] if _HASH.fullmatch(value) else cells.visible(value) or "''"
    if isinstance(value, list):
        items = [_setting_text(item) for item in value[:FIRST]]
        if len(value) > FIRST:
            items.append(f"... {len(value) - FIRST:,} more")
        return f"[{', '.join(items)}]"
    if isinstance(value, dict):
        items = [f"{name} {_setting_text(item)}" for name, item in value.items()]
        return ", ".join(items) or "none"
    return json.dumps(value)


def settings(data: Split) -> list[tuple[str, str]]:
    """(name, value) of the settings with which the data was prepared."""
    stored = data.manifest["settings"]
    return [(name, _setting_text(value)) for name, value in stored.items() if name != "streams"]


def stream_rows(data: Split) -> list[tuple[str, ...]]:
    """A row of STREAM_COLUMNS for each stream.

    tokens, silence and absent are numbers of cells in filled rows. silent is the share of silence
    among the cells that are present.
    """
    delays = data.manifest["streams"]["delays"]
    rows = []
    for name, kind, delay in zip(data.columns.names, data.columns.kinds, delays, strict=True):
        tokens, silence = data.part["tokens"][name], data.part["silence"][name]
        absent = data.part["rows"] - tokens - silence
        share = silence / max(tokens + silence, 1)
        counts = [f"{count:,}" for count in (delay, tokens, silence, absent)]
        rows.append((cells.visible(name), kind, *counts, f"{share:.1%}"))
    return rows


def heading(data: Split) -> str:
    """The title of the page or printout."""
    return f"{data.directory}, split {data.split}"


def print_statistics(
    console: rich.console.Console, data: Split, found: Overlap, in_time: Sequence[str] = ()
) -> None:
    """Prints the statistics and settings of the split, without its tables.

    Args:
      console: where to print.
      data: the split.
      found: the result of `overlap`.
      in_time: the result of `targets_in_time`.
    """
    lines = [
        *pages.aligned(statistics(data, found)),
        "",
        *pages.aligned([STREAM_COLUMNS, *stream_rows(data)], range(2, len(STREAM_COLUMNS))),
        "",
        *(*in_time, "") * bool(in_time),
        "prepared with",
        *pages.aligned(settings(data)),
    ]
    console.print(Text(heading(data), style="bold"), soft_wrap=True)
    console.print(Text("\n".join(lines)), soft_wrap=True)


def page(
    data: Split, found: Overlap, drawings: Sequence[Drawing], in_time: Sequence[str] = ()
) -> str:
    """An HTML page with statistics and tables.

    Args:
      data: the split.
      found: the result of `overlap`.
      drawings: the tables.
      in_time: the result of `targets_in_time`.
    """
    part = data.part
    figures = {
        "examples": f"{part['examples']:,}",
        f"tables of {data.manifest['rows']} rows": f"{len(data):,}",
        "of the rows filled": f"{part['packing_efficiency']:.1%}",
        "of the cells silent": f"{part['silence_rate']:.1%}",
    }
    if len(data.columns.names) > 1:
        figures["of the rows overlap"] = f"{found.rows / found.read_rows:.1%}"
    return pages.render(
        "view/prepared.html",
        title=heading(data),
        first_figures=figures,
        names=[cells.visible(name) for name in data.columns.names],
        kinds=data.columns.kinds,
        stream_columns=STREAM_COLUMNS,
        stream_rows=stream_rows(data),
        statistics=statistics(data, found),
        in_time=in_time,
        settings=settings(data),
        silent=cells.SILENT,
        drawings=drawings,
    )


def run(
    directory: str | pathlib.Path,
    console: rich.console.Console,
    split: str = "train",
    example: str | None = None,
    tables: int | None = None,
    rows: int | None = None,
    file: str | pathlib.Path | None = None,
    visibility: str | None = None,
) -> None:
    """Prints statistics and tables of prepared data, or one example, or writes them as a page.

    Args:
      directory: the prepared directory.
      console: where to print.
      split: "train" or "eval".
      example: number in stored order, or id, of the only example to show.
      tables: number of tables to show, from the first on; None: 1, or PAGE_TABLES on a page.
      rows: the most rows to show of each table; None: ROWS for a packed table on a terminal, all
        otherwise.
      file: write an HTML page to this file instead of printing.
      visibility: the preset for which `targets_in_time` estimates; None: that of the data's config.

    Raises:
      UserError: the data does not exist, or the request does not fit it.
    """
    for name, value in (("tables", tables), ("rows", rows)):
        if value is not None and value < 1:
            raise UserError(f"--{name}={value}: must be at least 1")
    data = Split(directory, split)
    if example is not None:
        number, table = data.example(example)
        drawings = [tables_view.draw_example(data.columns, number, table, rows)]
    else:
        limit = rows if file or rows else ROWS
        drawings = _first_tables(data, tables or (PAGE_TABLES if file else 1), limit)
    in_time: list[str] = []
    if file or example is None:
        lag = lag_matrix(visibility, len(data.columns.names)) if visibility else None
        in_time = targets_in_time(data, lag)
    if file:
        _write(file, page(data, overlap(data), drawings, in_time))
        console.print(Text(f"wrote {file}"), soft_wrap=True)
        return
    if example is None:
        print_statistics(console, data, overlap(data), in_time)
    for drawing in drawings:
        console.print()
        tables_view.print_drawing(console, data.columns, drawing, cut=console.is_terminal)
    if example is not None:
        console.print()
        columns = data.columns
        cells.print_texts(console, columns.tokenizer, columns.names, table.tokens, table.present)


def _write(path: str | pathlib.Path, content: str) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"--html={path}: {error.strerror}; give a file in an existing folder"
        ) from error


def _first_tables(data: Split, count: int, limit: int | None) -> list[Drawing]:
    numbered = zip(range(count), data.tables(), strict=False)
    return [
        tables_view.draw_packed(data.columns, number, first, packed, limit)
        for number, (first, packed) in numbered
    ]
