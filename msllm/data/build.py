"""Builds prepared data portion by portion, for the workers of `msllm prepare`.

One worker converts, splits and packs a portion of the input, and writes it to shards of its own.
The bytes therefore do not depend on the number of workers, and a finished portion need not be
built again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from msllm.config import Config
from msllm.data import converters, records
from msllm.data.duplicates import Ids
from msllm.data.executors import Status
from msllm.data.packing import Packed, Packer
from msllm.data.sources import BadRecords, Part
from msllm.data.tables import Table, held_out
from msllm.errors import UserError
from msllm.runtime.files import write_atomically
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

SPLITS = ("train", "eval")
WORK = "unfinished"  # folder of the reports of finished portions, until all are finished
STATUS_SECONDS = 1.0  # between two status reports of a worker


class Portion(NamedTuple):
    """The part of the input that one worker prepares at a time."""

    number: int  # from 0
    total: int  # number of portions of this input
    parts: Sequence[Part | None]  # of the input
    split: str = ""  # the split of all examples; empty: decided for each example
    examples: int | None = None  # use only the first examples, this many; None: all
    # Hold out the examples from this number on; None: hold out by id.
    held_out_from: int | None = None

    @property
    def name(self) -> str:
        """The prefix of the names of the portion's files in the folder WORK."""
        return f"{self.split or 'portion'}-{self.number:05d}"

    def __str__(self) -> str:
        text = f"portion {self.number + 1} of {self.total}"
        files = [part.file for part in self.parts if part]
        if files:
            text += f", {files[0]}"
        if files and files[-1] != files[0]:
            text += f" to {files[-1]}"
        return text


class _Clock:
    """Says when the next status is due."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Returns whether STATUS_SECONDS have passed since this last returned True."""
        now = time.monotonic()
        if now - self._last <= STATUS_SECONDS:
            return False
        self._last = now
        return True


def divide(config: Config) -> list[Portion]:
    """Divides the input into portions. They depend on the settings and the input alone.

    Raises UserError if there is no input, or its format is unknown.
    """
    found = _number(converters.input_portions(config), "train" if config.data.eval_path else "")
    if config.data.eval_path:
        data = dataclasses.replace(
            config.data, path=config.data.eval_path, format=config.data.eval_format
        )
        held_out_input = dataclasses.replace(config, data=data)
        found += _number(converters.input_portions(held_out_input), "eval")
    return found


def _number(portions: Sequence[Sequence[Part | None]], split: str) -> list[Portion]:
    return [Portion(i, len(portions), parts, split) for i, parts in enumerate(portions)]


def splits_of(portions: Iterable[Portion]) -> list[str]:
    """Returns the distinct values of `Portion.split`, in order of appearance."""
    return list(dict.fromkeys(portion.split for portion in portions))


def count(
    config: Config, spec: StreamSpec, tokenizer: Tokenizer, portion: Portion
) -> Generator[Status, None, int]:
    """Counts the examples of a portion, at most `portion.examples`.

    Yields the status from time to time, and returns the number of examples.
    """
    bad, clock = BadRecords(config.data.bad_percent), _Clock()
    number = 0
    for number, _ in enumerate(_tables(config, spec, tokenizer, portion, bad), 1):
        if clock.is_due():
            yield Status(number)
    return number


def place(config: Config, portions: Sequence[Portion], counts: Sequence[int]) -> list[Portion]:
    """Applies `max_examples` and `split = "tail"`, which depend on positions in the whole input.

    Args:
      counts: the number of examples of each portion. Counts after the portions that hold the first
        `max_examples` are ignored.

    Returns:
      The portions that hold the first `max_examples`, with `examples` and `held_out_from` set.
    """
    placed = []
    for split in splits_of(portions):
        of_split = [
            (portion, examples)
            for portion, examples in zip(portions, counts)
            if portion.split == split
        ]
        placed += _place_split(config, of_split)
    return placed


def _place_split(config: Config, portions: Sequence[tuple[Portion, int]]) -> list[Portion]:
    """Applies `place` to portions of the same split, each with its number of examples."""
    limit = config.data.max_examples
    total = sum(examples for _, examples in portions)
    if limit:
        total = min(total, limit)
    first_held_out = total - round(total * config.data.eval_percent / 100)
    placed, start = [], 0
    for portion, examples in portions:
        if limit and start >= total:
            break
        if config.data.split == "tail" and not portion.split:
            portion = portion._replace(held_out_from=max(first_held_out - start, 0))
        if limit and start + examples >= limit:
            portion = portion._replace(examples=limit - start)
        placed.append(portion)
        start += examples
    return placed


def build(
    config: Config,
    spec: StreamSpec,
    tokenizer: Tokenizer,
    out: pathlib.Path,
    portion: Portion,
    check_run: Callable[[], None] = lambda: None,
) -> Generator[Status, None, dict[str, Any]]:
    """Writes the shards of a portion and then its report, unless that has already been done.

    Yields the status from time to time, and returns the report (see `finished_report`).

    Args:
      config, spec, tokenizer: the settings, the streams and the tokenizer of the data.
      out: the folder to write to.
      portion: the portion.
      check_run: raises an exception if the run was replaced by another one. It is called before
        files are moved into place.

    Raises UserError for bad input.
    """
    report = finished_report(out, portion)
    if report is not None:
        return report
    packers = {split: Packer(config.data.rows, tokenizer.silence_id) for split in SPLITS}
    writers = {
        split: ShardWriter(out, split, portion, config.data.shards, spec.size, tokenizer)
        for split in SPLITS
    }
    bad, clock = BadRecords(config.data.bad_percent), _Clock()
    try:
        for number, table in enumerate(_tables(config, spec, tokenizer, portion, bad)):
            split = _split_of(config, portion, number, table)
            for packed in packers[split].add(table):
                writers[split].write(packed)
            if clock.is_due():
                yield Status(number + 1, _count_tokens(writers.values()), bad.shown)
        for split in SPLITS:
            for packed in packers[split].finish():
                writers[split].write(packed)
        check_run()
        report = {
            "splits": {split: _report(packers[split], writers[split]) for split in SPLITS},
            "bad": bad.counts(),
        }
        write_atomically(_report_path(out, portion), json.dumps(report))
    finally:
        for writer in writers.values():
            writer.discard()
    return report


def finished_report(out: pathlib.Path, portion: Portion) -> dict[str, Any] | None:
    """Returns the report that `build` wrote for a portion, or None if the portion must be built.

    Keys: `splits` (the counts, the shards and the files of ids of each split) and `bad`
    (`BadRecords.counts`). A portion whose files were damaged later must be built again.
    """
    try:
        report = json.loads(_report_path(out, portion).read_text())
        for split, part in report["splits"].items():
            if "ids" not in part:  # of a run that an earlier version began
                found = sorted((out / WORK).glob(f"{portion.name}.{split}.*.npy"))
                part["ids"] = [path.name for path in found]
            for shard in part["shards"]:
                records.check_shard(out, shard)
            for name in part["ids"]:
                np.load(out / WORK / name, mmap_mode="r")
    except (UserError, OSError, ValueError, KeyError, EOFError):
        return None
    return report


def final_status(report: Mapping[str, Any]) -> Status:
    """Returns the status of a finished portion from its report."""
    splits = report["splits"].values()
    examples = sum(part["examples"] + part["dropped"] for part in splits)
    return Status(examples, sum(sum(part["tokens"]) for part in splits), report["bad"]["shown"])


class ShardWriter:
    """Writes the packed tables of one split of a portion to shards in turn, and counts them.

    Attributes:
      tables: the number of tables written.
      rows: the number of their rows that hold an example.
      tokens: [S] int64, the number of cells of each stream that hold a token.
      silence: [S] int64, the number of cells of each stream that are silent.
      unknown: [S] int64, the number of tokens of each stream that are unknown to the tokenizer.
      excluded: [S] int64, the number of present cells of loss weight 0.
      weighted: [S] int64, the number of present cells of another loss weight than 0 or 1.
      ids: the ids of the examples.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        split: str,
        portion: Portion,
        shards: int,
        streams: int,
        tokenizer: Tokenizer,
    ):
        """Plans the shards of the portion, at least one.

        Args:
          shards: the number of shards that the portions of the split should have together.
          streams: S.
        """
        own = -(-shards // portion.total)
        numbers = range(portion.number * own, (portion.number + 1) * own)
        count = own * portion.total
        self._names = [f"{split}-{i:05d}-of-{count:05d}.array_record" for i in numbers]
        self._directory, self._tokenizer = directory, tokenizer
        self._writers: list[Any] = []
        # A worker that outlives its run, or is believed to be lost, may write the same shards.
        self._token = secrets.token_hex(4)
        self.ids = Ids(directory / WORK, f"{portion.name}.{split}")
        self.tables = self.rows = 0
        self.tokens, self.silence, self.unknown = np.zeros((3, streams), np.int64)
        self.excluded, self.weighted = np.zeros((2, streams), np.int64)

    def write(self, table: Packed) -> None:
        """Appends one table."""
        shard = self.tables % len(self._names)
        if shard == len(self._writers):  # opened on first use: a small split has fewer shards
            path = str(self._temporary(shard))
            self._writers.append(
                array_record_module.ArrayRecordWriter(path, records.WRITER_OPTIONS)
            )
        self._writers[shard].write(records.encode_record(table, self._tokenizer.vocab_size))
        silent = table.present & (table.tokens == self._tokenizer.silence_id)
        self.silence += silent.sum(axis=0)
        self.tokens += (table.present & ~silent).sum(axis=0)
        if self._tokenizer.unknown_id is not None and not self._tokenizer.lossless:
            unknown = table.present & (table.tokens == self._tokenizer.unknown_id)
            if unknown.any():
                self.unknown += unknown.sum(axis=0)
        if table.weights is not None:
            self.excluded += (table.present & (table.weights == 0)).sum(axis=0)
            others = (table.weights != 0) & (table.weights != 1)
            self.weighted += (table.present & others).sum(axis=0)
        self.tables += 1
        self.rows += int((table.segment > 0).sum())
        self.ids.add(table.examples)

    def close(self) -> list[dict[str, Any]]:
        """Moves the shards into place and returns their manifest entries.

        Keys of an entry: file, records, bytes, sha256.
        """
        self.ids.close()
        shards = []
        for i, (name, writer) in enumerate(zip(self._names, self._writers)):
            writer.close()
            path = self._directory / name
            os.replace(self._temporary(i), path)
            shards.append(
                {
                    "file": name,
                    "records": len(range(i, self.tables, len(self._names))),
                    "bytes": path.stat().st_size,
                    "sha256": records.file_hash(path),
                }
            )
        return shards

    def discard(self) -> None:
        """Removes the files of shards that were not moved into place."""
        for shard in range(len(self._writers)):
            self._temporary(shard).unlink(missing_ok=True)

    def _temporary(self, shard: int) -> pathlib.Path:
        return self._directory / f"{self._names[shard]}.{self._token}.tmp"


def _tables(
    config: Config, spec: StreamSpec, tokenizer: Tokenizer, portion: Portion, bad: BadRecords
) -> Iterator[Table]:
    tables = (
        table
        for part in portion.parts
        for table in converters.convert_part(config, spec, tokenizer, part, bad)
    )
    return itertools.islice(tables, portion.examples)


def _split_of(config: Config, portion: Portion, number: int, table: Table) -> str:
    """Returns the split of the portion's example `number`."""
    if portion.split:
        return portion.split
    if portion.held_out_from is not None:
        return "eval" if number >= portion.held_out_from else "train"
    return "eval" if held_out(table.example, config.data.eval_percent) else "train"


def _count_tokens(writers: Iterable[ShardWriter]) -> int:
    return sum(int(writer.tokens.sum()) for writer in writers)


def _report(packer: Packer, writer: ShardWriter) -> dict[str, Any]:
    return {
        "shards": writer.close(),
        "ids": writer.ids.files,
        "tables": writer.tables,
        "rows": writer.rows,
        "examples": packer.examples,
        "cut": packer.cut,
        "cut_rows": packer.cut_rows,
        "cut_tokens": np.broadcast_to(packer.cut_tokens, writer.tokens.shape).tolist(),
        "longest": packer.longest,
        "dropped": packer.dropped,
        "tokens": writer.tokens.tolist(),
        "silence": writer.silence.tolist(),
        "unknown": writer.unknown.tolist(),
        "excluded": writer.excluded.tolist(),
        "weighted": writer.weighted.tolist(),
    }


def _report_path(out: pathlib.Path, portion: Portion) -> pathlib.Path:
    return out / WORK / f"{portion.name}.json"
