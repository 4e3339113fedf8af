"""Batches as a pure function of the step: any host can compute any part of any batch."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from msllm.config import DataConfig
from msllm.data import mixture, records
from msllm.data.packing import Packed
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


def spread(total: int, count: int) -> list[int]:
    """Returns at most `count` of the numbers below `total`, evenly spread.

    Evaluation on a part of a split uses such numbers, because the first batches do not represent
    the split: packing puts the longest examples there.
    """
    return [i * total // count for i in range(count)] if count < total else list(range(total))


class Loader:
    """Reads one split of a prepared directory, or the training tables of a mixture of them.

    Table i of batch `step` has the flat index `step * B + i`. In the split `train`, an epoch is N
    consecutive indices that start at a multiple of N. Each epoch is another permutation of the N
    tables, given by `config.seed`. In a mixture this holds for each source and its own tables;
    `plan` says which indices belong to which source. Other splits have each table once, in stored
    order, and their last batch is filled up with empty tables (segment 0).

    Attributes:
      manifests: {name: manifest} of each source; without a mixture the name is "".
      manifest: the first of `manifests`.
      plan: the `mixture.Plan` of a mixture; None without a mixture.
      tokenizer: the tokenizer of all sources.
      has_weights: whether a cell of any source has a loss weight other than 1.
      num_tables: N, over all sources.
      num_batches: the number of batches that N tables fill; the last may be partly filled.
    """

    def __init__(
        self, config: DataConfig, split: str, spec: StreamSpec, part: tuple[int, int] = (0, 1)
    ):
        """Opens and checks the data.

        Args:
          config: the settings of the data.
          split: the name of the split.
          spec: the streams that the data must have.
          part: (i, n) for process i of n that share the checking (`records.open_prepared`).

        Raises UserError if the data is damaged, empty, or does not fit the config.
        """
        if config.mixture.dirs and split != "train":
            raise ValueError(
                f"split is {split!r}: a mixture has only the split 'train'; open the split of each"
                " source (mixture.by_source)"
            )
        self._config, self._split, self._streams = config, split, spec.size
        sources = {
            name: _Source(alone, split, spec, part)
            for name, alone in mixture.by_source(config).items()
        }
        self._sources = list(sources.values())
        self.manifests = {name: source.manifest for name, source in sources.items()}
        self.manifest = self._sources[0].manifest
        mixture.check_tokenizers({source.directory: source.manifest for source in self._sources})
        self.plan = mixture.Plan(config, self.manifests) if config.mixture.dirs else None
        stored = self.manifest["tokenizer"]
        self.tokenizer = Tokenizer.load(
            pathlib.Path(self._sources[0].directory) / stored["file"], stored["silence"]
        )
        self.has_weights = any(map(records.has_weights, self.manifests.values()))
        self.num_tables = sum(source.num_tables for source in self._sources)
        self.num_batches = -(-self.num_tables // config.batch_size)

    def batch(self, step: int, rows: range | slice | None = None) -> Batch:
        """Returns the batch of a step, or its tables `rows` (within 0..B, with step 1).

        Returns:
          tokens: [b, T, S] int32, 0 where absent.
          present: [b, T, S] bool.
          segment: [b, T] int32.
          weights: [b, T, S] float32, the loss weights of the cells; only with `has_weights`.
        """
        indices, length = self._indices(step, rows), self._config.rows
        batch = {
            "tokens": np.zeros((len(indices), length, self._streams), np.int32),
            "present": np.zeros((len(indices), length, self._streams), bool),
            "segment": np.zeros((len(indices), length), np.int32),
        }
        if self.has_weights:
            batch["weights"] = np.ones_like(batch["tokens"], np.float32)
        for i, index in enumerate(indices):
            if self._has_table(index):
                table = self._read(index)
                for name, array in batch.items():
                    value = getattr(table, name)
                    if value is not None:
                        array[i] = value
        return batch

    def example_ids(self, step: int, rows: range | slice | None = None) -> list[list[str]]:
        """Returns the ids of the examples in each table of a batch, in segment order."""
        return [
            self._read(index).examples if self._has_table(index) else []
            for index in self._indices(step, rows)
        ]

    def sources(self, step: int, rows: range | slice | None = None) -> list[int]:
        """Returns the number of the source of each table of a batch; without a mixture, 0."""
        return [self._place(index)[0] for index in self._indices(step, rows)]

    def iterate(self, steps: Sequence[int], rows: range | slice | None = None) -> Iterator[Batch]:
        """Yields `batch(step, rows)` for each step.

        A thread makes batches ahead of time. It ends when the iterator is exhausted or closed.
        """
        if not steps:
            return

        def make(step: int) -> Batch:
            return self.batch(step, rows)

        ahead = self._config.prefetch
        # One thread: more threads only wait for the interpreter's lock, at twice the CPU time.
        options = grain.ReadOptions(num_threads=min(ahead, 1), prefetch_buffer_size=ahead)
        batches = iter(grain.MapDataset.source(steps).map(make).to_iter_dataset(options))
        try:
            yield from batches
        finally:
            batches.close()

    def _indices(self, step: int, rows: range | slice | None) -> range:
        """Returns the flat indices of a part of a batch."""
        size = self._config.batch_size
        if step < 0 or (self._split != "train" and step >= self.num_batches):
            raise ValueError(
                f"step is {step}: split {self._split!r} has batches 0..{self.num_batches - 1}"
            )
        if rows is None:
            rows = range(size)
        elif isinstance(rows, slice):
            rows = range(size)[rows]
        if rows.step != 1 or rows.start < 0 or rows.stop > size:
            raise ValueError(f"rows is {rows}: must lie in the batch, 0..{size}, with step 1")
        return range(step * size + rows.start, step * size + rows.stop)

    def _has_table(self, index: int) -> bool:
        return self._split == "train" or index < self.num_tables

    def _place(self, index: int) -> tuple[int, int]:
        """Returns (source, index among the tables of that source) of a flat index."""
        return self.plan.place(index) if self.plan else (0, index)

    def _read(self, index: int) -> Packed:
        source, rank = self._place(index)
        return self._sources[source].read(rank)


class _Source:
    """The tables of one split of a prepared directory, in reading order."""

    def __init__(self, config: DataConfig, split: str, spec: StreamSpec, part: tuple[int, int]):
        if not config.dir:
            raise UserError(
                "config.data.dir is empty: name prepared data with --config.data.dir=DIR (`msllm"
                " prepare` writes it)"
            )
        self.directory, self._streams = config.dir, spec.size
        self.manifest, paths = records.open_prepared(config.dir, split, part)
        _check(config, self.manifest, spec)
        self.num_tables = self.manifest["splits"][split]["tables"]
        if not self.num_tables:
            percent = self.manifest["settings"]["eval_percent"]
            raise UserError(
                f"split {split!r} of {config.dir} holds no table: prepare more examples, or change"
                f" config.data.eval_percent (it was {percent})"
            )
        self._vocab_size = self.manifest["tokenizer"]["vocab_size"]
        self._records = records.Reader(paths)
        order = grain.MapDataset.range(self.num_tables)
        self._order = order.shuffle(seed=config.seed).repeat() if split == "train" else order

    def read(self, rank: int) -> Packed:
        """Returns table number `rank` in reading order, counted over all epochs."""
        index = self._order[rank]
        try:
            return records.decode_record(self._records[index], self._streams, self._vocab_size)
        except records.Damaged as error:
            raise UserError(
                f"{self.directory}: table {index} is damaged ({error}): prepare the data again"
            ) from error


def _check(config: DataConfig, manifest: Mapping[str, Any], spec: StreamSpec) -> None:
    """Raises UserError if the data was prepared with other rows or streams than the config's."""
    wanted: dict[str, Any] = {"data.rows": config.rows}
    stored: dict[str, Any] = {"data.rows": manifest["rows"]}
    for field in ("names", "kinds", "delays"):
        wanted[f"streams.{field}"] = tuple(getattr(spec, field))
        stored[f"streams.{field}"] = tuple(manifest["streams"][field])
    wanted["streams.mail"] = tuple(spec.mail_settings)
    stored["streams.mail"] = tuple(map(tuple, manifest["streams"].get("mail", ())))
    for name, value in stored.items():
        if wanted[name] != value:
            raise UserError(
                f"config.{name} is {wanted[name]}, but {config.dir} was prepared with {value}:"
                " change it, or prepare the data again, into another config.data.dir"
            )
