"""Reads tables and examples of prepared data on demand, by number or id."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

import numpy as np

from msllm.data import records
from msllm.data.packing import Packed
from msllm.data.tables import Table, unpack
from msllm.errors import UserError
from msllm.runtime.progress import Progress
from msllm.tokenizer import Tokenizer
from msllm.view.tables import Columns


class Split:
    """One split of a prepared directory.

    A shard is opened, and its size is checked, when one of its tables is read.

    Attributes:
      directory: the prepared directory.
      split: name of the split.
      manifest: the manifest of the directory.
      part: the manifest's entry for the split.
      columns: names and kinds of the streams, and the tokenizer.
    """

    def __init__(self, directory: str | pathlib.Path, split: str):
        """Opens the split. Raises UserError if the data does not exist or the split is empty."""
        self.directory, self.split = pathlib.Path(directory), split
        self.manifest, self._paths = records.open_prepared(directory, split, part=None)
        self.part = self.manifest["splits"][split]
        stored, streams = self.manifest["tokenizer"], self.manifest["streams"]
        tokenizer = Tokenizer.load(self.directory / stored["file"], stored["silence"])
        self.columns = Columns(streams["names"], streams["kinds"], tokenizer)
        self._starts = np.cumsum([0, *(shard["records"] for shard in self.part["shards"])])
        self._opened: tuple[int, records.Reader] | None = None  # number and reader of a shard
        if not len(self):
            others = [name for name, part in self.manifest["splits"].items() if part["tables"]]
            raise UserError(
                f"--split={split}: this split of {directory} has no tables; "
                f"give --split={' or '.join(others)}"
            )

    def __len__(self) -> int:
        """The number of packed tables."""
        return self.part["tables"]

    def table(self, number: int) -> Packed:
        """A packed table by its number in stored order. Raises UserError if it cannot be read."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        if self._opened is None or self._opened[0] != shard:
            self._opened = None
            self._opened = shard, self._open(shard)
        record = self._opened[1][number - int(self._starts[shard])]
        streams, size = len(self.columns.names), self.columns.tokenizer.vocab_size
        return records.decode_record(record, streams, size)

    def _open(self, shard: int) -> records.Reader:
        stored = self.part["shards"][shard]
        records.check_shard(self.directory, stored, read=False)
        reader = records.Reader([self._paths[shard]])
        if len(reader) != stored["records"]:
            raise UserError(
                f"{self._paths[shard]} is corrupt (it has {len(reader)} records, the manifest says "
                f"{stored['records']}): restore it, or prepare again"
            )
        return reader

    def tables(self) -> Iterator[tuple[int, Packed]]:
        """Yields (number of its first example, table) for all packed tables in stored order."""
        first = 0
        for number in range(len(self)):
            packed = self.table(number)
            yield first, packed
            first += len(packed.examples)

    def example(self, wanted: str) -> tuple[int, Table]:
        """Finds an example by reading the tables in stored order.

        Args:
          wanted: number of the example in stored order, or its id (16 hex digits).

        Returns:
          The number and the table of the example.

        Raises:
          UserError: there is no such example.
        """
        by_id = re.fullmatch(r"[0-9a-f]{16}", wanted)
        number = None if by_id else self._checked_number(wanted)
        with Progress("inspect: tables", len(self)) as progress:
            for done, (first, packed) in enumerate(self.tables()):
                progress.show(done)
                if number is None and wanted in packed.examples:
                    number = first + packed.examples.index(wanted)
                if number is not None and number < first + len(packed.examples):
                    examples = unpack(packed._asdict(), packed.examples)
                    return number, examples[number - first]
        raise UserError(
            f"--example={wanted}: split {self.split!r} of {self.directory} does not hold it; an "
            "example that was held out is in the other split (--split=train or --split=eval)"
        )

    def _checked_number(self, wanted: str) -> int:
        total = self.part["examples"]
        if not wanted.isdecimal():
            raise UserError(
                f"--example={wanted!r}: give a number from 0 to {total - 1}, "
                "or an id of 16 hex digits"
            )
        if int(wanted) >= total:
            raise UserError(
                f"--example={wanted}: split {self.split!r} of {self.directory} holds the "
                f"examples 0 to {total - 1}"
            )
        return int(wanted)
