"""Builds prepared data portion by portion: what the processes of `msllm prepare` do.

A portion of the input is converted, split, packed and written by one process, to shards of its own: so the bytes do not
depend on how many processes there are, and a finished portion need not be done again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module

from msllm.config import Config
from msllm.data import converters, records
from msllm.data.duplicates import Ids
from msllm.data.packing import Packed, Packer
from msllm.data.sources import BadRecords, Part
from msllm.data.tables import Table, held_out
from msllm.errors import UserError
from msllm.runtime.files import write_atomically
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

SPLITS = ("train", "eval")
WORK = "unfinished"  # folder of the reports of finished portions, until all are
TELL_SECONDS = 0.5  # between two messages of a process


class Portion(NamedTuple):
    """What one process prepares at a time."""

    number: int  # from 0
    of: int  # how many there are of this input
    parts: list[Part | None]  # of the input
    split: str = ""  # where all its examples belong; empty: that depends on each
    examples: int | None = None  # take only the first ones
    held_out_from: int | None = (
        None  # the example, by number, from which on all are held out; None: by their ids
    )

    @property
    def name(self) -> str:
        """Of its files in the folder WORK."""
        return f"{self.split or 'portion'}-{self.number:05d}"

    def __str__(self) -> str:
        files = [part.file for part in self.parts if part]
        named = (
            f", {files[0]}" + (f" to {files[-1]}" if files[-1] != files[0] else "") if files else ""
        )
        return f"portion {self.number + 1} of {self.of}{named}"


class Told(NamedTuple):
    """How far the work on a portion is."""

    examples: int
    tokens: int
    left_out: list[str]  # messages of bad records since the last time


def divide(config: Config) -> list[Portion]:
    """The portions of the input: they depend on settings and input alone. Raises UserError."""
    inputs = [("train" if config.data.eval_path else "", config)]
    if config.data.eval_path:
        data = dataclasses.replace(
            config.data, path=config.data.eval_path, format=config.data.eval_format
        )
        inputs.append(("eval", dataclasses.replace(config, data=data)))
    found = []
    for split, one in inputs:
        portions = converters.input_portions(one)
        found += [Portion(i, len(portions), parts, split) for i, parts in enumerate(portions)]
    return found


def count(
    config: Config, spec: StreamSpec, tokenizer: Tokenizer, portion: Portion
) -> Iterator[Told]:
    """Returns the number of examples of a portion, as many as it may give."""
    told, number = time.monotonic(), 0
    for number, _ in enumerate(
        _tables(config, spec, tokenizer, portion, BadRecords(config.data.bad_percent)), 1
    ):
        if time.monotonic() - told > TELL_SECONDS:
            yield Told(number, 0, [])
            told = time.monotonic()
    return number


def place(config: Config, portions: Sequence[Portion], counts: Sequence[int]) -> list[Portion]:
    """The portions that hold the first `max_examples`, with what that and `split` mean for their examples.

    counts: how many each portion has; of those after the first `max_examples` it does not matter.
    """
    most, placed = config.data.max_examples, []
    for split in {portion.split: None for portion in portions}:
        mine = [
            (portion, found) for portion, found in zip(portions, counts) if portion.split == split
        ]
        total = sum(found for _, found in mine)
        total = min(total, most) if most else total
        first_held_out = total - round(total * config.data.eval_percent / 100)
        start = 0
        for portion, found in mine:
            if start < total or not most:
                tail = (
                    max(first_held_out - start, 0)
                    if config.data.split == "tail" and not split
                    else None
                )
                cut = most - start if most and start + found >= most else None
                placed.append(portion._replace(examples=cut, held_out_from=tail))
            start += found
    return placed


def build(
    config: Config, spec: StreamSpec, tokenizer: Tokenizer, out: pathlib.Path, portion: Portion
) -> Iterator[Told]:
    """Writes the shards of a portion and, when they are in place, its report. Raises UserError."""
    packers = {split: Packer(config.data.rows) for split in SPLITS}
    writers = {
        split: ShardWriter(out, split, portion, config.data.shards, spec.size, tokenizer)
        for split in SPLITS
    }
    bad = BadRecords(config.data.bad_percent)
    examples, told, shown = 0, time.monotonic(), 0

    def tell() -> Told:
        tokens = sum(int(writer.tokens.sum()) for writer in writers.values())
        return Told(examples, tokens, bad.shown[shown:])

    for number, table in enumerate(_tables(config, spec, tokenizer, portion, bad)):
        split = portion.split or (
            "eval" if _is_held_out(config, portion, number, table) else "train"
        )
        for packed in packers[split].add(table):
            writers[split].write(packed)
        examples = number + 1
        if time.monotonic() - told > TELL_SECONDS:
            yield tell()
            told, shown = time.monotonic(), len(bad.shown)
    for split in SPLITS:
        for packed in packers[split].finish():
            writers[split].write(packed)
    report = {
        "splits": {split: _report(packers[split], writers[split]) for split in SPLITS},
        "bad": bad.counts(),
    }
    write_atomically(_report_path(out, portion), json.dumps(report))
    yield tell()


def is_finished(out: pathlib.Path, portion: Portion) -> bool:
    """Whether a portion has a report, and its shards are whole."""
    if not _report_path(out, portion).is_file():
        return False
    try:
        for part in read_report(out, portion)["splits"].values():
            for shard in part["shards"]:
                records.check_shard(out, shard)
    except UserError:  # damaged since: it is made again
        return False
    return True


def read_report(out: pathlib.Path, portion: Portion) -> dict[str, Any]:
    """What `build` counted in a portion: splits (counts and shards of each) and bad (`BadRecords.counts`)."""
    return json.loads(_report_path(out, portion).read_text())


def write_manifest(directory: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, atomically."""
    write_atomically(directory / records.MANIFEST, json.dumps(manifest, indent=2) + "\n")


def ids_files(out: pathlib.Path, split: str) -> list[pathlib.Path]:
    """The files of the ids of a split's examples (msllm/data/duplicates.py)."""
    return sorted((out / WORK).glob(f"*.{split}.*.npy"))


class ShardWriter:
    """Writes the packed tables that one split has of a portion to shards, in turns, and counts what it writes."""

    def __init__(
        self,
        directory: pathlib.Path,
        split: str,
        portion: Portion,
        shards: int,
        streams: int,
        tokenizer: Tokenizer,
    ):
        """`shards`: how many the split is to have; every portion has at least one."""
        own = -(-shards // portion.of)
        names = range(portion.number * own, (portion.number + 1) * own)
        self._names = [f"{split}-{i:05d}-of-{own * portion.of:05d}.array_record" for i in names]
        self._directory, self._tokenizer = directory, tokenizer
        self._writers: list[Any] = []
        self.tables = self.rows = 0
        self._ids = Ids(directory / WORK, f"{portion.name}.{split}")
        self.tokens, self.silence = np.zeros(streams, np.int64), np.zeros(streams, np.int64)

    def write(self, table: Packed) -> None:
        """Appends one table."""
        shard = self.tables % len(self._names)
        if shard == len(self._writers):  # opened when needed: a small split has fewer shards
            path = self._temporary(self._names[shard])
            self._writers.append(
                array_record_module.ArrayRecordWriter(str(path), records.WRITER_OPTIONS)
            )
        self._writers[shard].write(records.encode_record(table, self._tokenizer.vocab_size))
        silent = table.present & (table.tokens == self._tokenizer.silence_id)
        self.silence += silent.sum(axis=0)
        self.tokens += (table.present & ~silent).sum(axis=0)
        self.tables += 1
        self.rows += int((table.segment > 0).sum())
        self._ids.add(table.examples)

    def close(self) -> list[dict[str, Any]]:
        """Puts the shards in place; their manifest entries: file, records, bytes, sha256."""
        self._ids.close()
        shards = []
        for i, (name, writer) in enumerate(zip(self._names, self._writers)):
            writer.close()
            path = self._directory / name
            os.replace(self._temporary(name), path)
            tables = len(range(i, self.tables, len(self._names)))
            size = path.stat().st_size
            shards.append(
                {"file": name, "records": tables, "bytes": size, "sha256": records.file_hash(path)}
            )
        return shards

    def _temporary(self, name: str) -> pathlib.Path:
        return (
            self._directory / f"{name}.{os.getpid()}.tmp"
        )  # a process that outlives its run disturbs no other


def _tables(
    config: Config, spec: StreamSpec, tokenizer: Tokenizer, portion: Portion, bad: BadRecords
) -> Iterator[Table]:
    tables = (
        table
        for part in portion.parts
        for table in converters.convert_part(config, spec, tokenizer, part, bad)
    )
    return itertools.islice(tables, portion.examples)


def _is_held_out(config: Config, portion: Portion, number: int, table: Table) -> bool:
    if portion.held_out_from is None:
        return held_out(table.example, config.data.eval_percent)
    return number >= portion.held_out_from


def _report(packer: Packer, writer: ShardWriter) -> dict[str, Any]:
    return {
        "shards": writer.close(),
        **{name: getattr(writer, name) for name in ("tables", "rows")},
        **{name: getattr(packer, name) for name in ("examples", "cut", "cut_rows", "dropped")},
        **{name: getattr(writer, name).tolist() for name in ("tokens", "silence")},
    }


def _report_path(out: pathlib.Path, portion: Portion) -> pathlib.Path:
    return out / WORK / f"{portion.name}.json"
