"""Batches as a pure function of the step (design: contract 4): no state, any host computes any part of any batch."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import grain
import numpy as np

from msllm.config import DataConfig
from msllm.data import records
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


class Loader:
    """Reads one split of a prepared directory.

    Row i of batch `step` has the flat index `step * B + i`. Split `train`: every run of N indices that starts at a
    multiple of N (an epoch) is a permutation of the N tables, another one each epoch, given by `config.seed`. Other
    splits: the tables as stored, once; the last batch is filled up with empty tables (segment 0).

    Attributes:
      manifest: the prepared directory's manifest.
      tokenizer: the tokenizer it was made with.
      num_tables: N.
      num_batches: batches that hold all tables once, the last of them perhaps in part.
    """

    def __init__(self, config: DataConfig, split: str, spec: StreamSpec):
        """Opens and checks the data. Raises UserError where it is damaged, empty, or does not fit the config."""
        self._config, self._split = config, split
        self.manifest, paths = records.open_prepared(config.dir, split)
        self._check(spec)
        stored = self.manifest["tokenizer"]
        self.tokenizer = Tokenizer.load(pathlib.Path(config.dir) / stored["file"], stored["silence"])
        self.num_tables = self.manifest["splits"][split]["tables"]
        if not self.num_tables:
            raise UserError(
                f"split {split!r} of {config.dir} holds no table: prepare more examples, or change"
                f" config.data.eval_percent ({self.manifest['settings']['eval_percent']} held out)"
            )
        self.num_batches = -(-self.num_tables // config.batch_size)
        self._source = grain.sources.ArrayRecordDataSource(paths)
        order = grain.MapDataset.range(self.num_tables)
        self._order = order.shuffle(seed=config.seed).repeat() if split == "train" else order

    def batch(self, step: int, rows: range | slice | None = None) -> Batch:
        """The batch of a step, or the part `rows` (of step 1, within 0..B) of it.

        Returns: tokens [b, T, S] int32 (0 where absent), present [b, T, S] bool, segment [b, T] int32.
        """
        indices = self._indices(step, rows)
        length, streams = self._config.rows, len(self.manifest["streams"]["names"])
        batch = {
            "tokens": np.zeros((len(indices), length, streams), np.int32),
            "present": np.zeros((len(indices), length, streams), bool),
            "segment": np.zeros((len(indices), length), np.int32),
        }
        for i, index in enumerate(indices):
            if self._holds(index):
                table = self._read(index)
                for name, array in batch.items():
                    array[i] = getattr(table, name)
        return batch

    def example_ids(self, step: int, rows: range | slice | None = None) -> list[list[str]]:
        """The ids of the examples in each table of a batch, in the order of their segments."""
        return [self._read(index).examples if self._holds(index) else [] for index in self._indices(step, rows)]

    def iterate(self, start_step: int, stop_step: int, rows: range | slice | None = None) -> Iterator[Batch]:
        """`batch(step, rows)` for each step, made ahead of time in threads; abandoning the iterator ends them."""
        if start_step >= stop_step:
            return
        ahead = self._config.prefetch
        # One thread: more of them only wait for the interpreter's lock, and cost twice the CPU time.
        options = grain.ReadOptions(num_threads=min(ahead, 1), prefetch_buffer_size=ahead)
        steps = grain.MapDataset.range(start_step, stop_step).map(lambda step: self.batch(int(step), rows))
        batches = iter(steps.to_iter_dataset(options))
        try:
            yield from batches
        finally:
            batches.close()

    def _indices(self, step: int, rows: range | slice | None) -> range:
        size = self._config.batch_size
        if step < 0 or (self._split != "train" and step >= self.num_batches):
            raise ValueError(f"step is {step}: split {self._split!r} has batches 0..{self.num_batches - 1}")
        if rows is None:
            rows = range(size)
        elif isinstance(rows, slice):
            rows = range(size)[rows]
        if rows.step != 1 or rows.start < 0 or rows.stop > size:
            raise ValueError(f"rows is {rows}: must lie in the batch, 0..{size}, with step 1")
        return range(step * size + rows.start, step * size + rows.stop)

    def _holds(self, index: int) -> bool:
        return self._split == "train" or index < self.num_tables

    def _read(self, index: int):
        names, tokenizer = self.manifest["streams"]["names"], self.manifest["tokenizer"]
        return records.decode_record(self._source[self._order[index]], len(names), tokenizer["vocab_size"])

    def _check(self, spec: StreamSpec) -> None:
        """Raises UserError where the config is not the one that the data was prepared with."""
        wanted = {"data.rows": self._config.rows}
        stored = {"data.rows": self.manifest["rows"]}
        for field in ("names", "kinds", "delays"):
            wanted[f"streams.{field}"] = tuple(getattr(spec, field))
            stored[f"streams.{field}"] = tuple(self.manifest["streams"][field])
        for name, value in stored.items():
            if wanted[name] != value:
                raise UserError(
                    f"config.{name} is {wanted[name]}, but {self._config.dir} was prepared with {value}: change it, or"
                    " prepare into another config.data.dir"
                )
