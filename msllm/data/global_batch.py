"""Batches on the devices of a mesh: each host reads its tables, and all together form one array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from msllm.data.loader import Batch, Loader

AbstractBatch = Mapping[str, jax.ShapeDtypeStruct]  # shapes and shardings: `Program.abstract_batch`


def host_rows(abstract: AbstractBatch) -> range:
    """The tables of a batch of which this host's devices hold a part."""
    segment = abstract["segment"]
    indices = segment.sharding.addressable_devices_indices_map(segment.shape).values()
    parts = [index[0].indices(segment.shape[0]) for index in indices]
    return range(min(part[0] for part in parts), max(part[1] for part in parts))


def to_devices(
    abstract: AbstractBatch, tables: Mapping[str, np.ndarray], first_row: int = 0
) -> dict[str, jax.Array]:
    """Global arrays from this host's tables of a batch.

    Args:
      abstract: shapes and shardings of the arrays. They may have more streams than the tables: the
        further ones are absent.
      tables: tokens and present [b, T, S], segment [b, T]: rows first_row .. first_row + b - 1 of
        the batch, which must include `host_rows(abstract)`.
      first_row: see `tables`.
    """

    def place(array: np.ndarray, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        if array.ndim == 3:
            array = np.pad(array, [(0, 0), (0, 0), (0, abstract.shape[2] - array.shape[2])])

        def shard(index: Any) -> np.ndarray:
            rows, *rest = index
            begin, end, _ = rows.indices(abstract.shape[0])
            return array[(slice(begin - first_row, end - first_row), *rest)]

        return jax.make_array_from_callback(abstract.shape, abstract.sharding, shard)

    return {name: place(tables[name], shape) for name, shape in abstract.items()}


def global_batches(
    loader: Loader, abstract: AbstractBatch, steps: Sequence[int]
) -> Iterator[tuple[Batch, dict[str, jax.Array]]]:
    """(this host's tables, global arrays) of each step. The tables are read ahead of time."""
    rows = host_rows(abstract)
    for tables in loader.iterate(steps, rows):
        yield tables, to_devices(abstract, tables, rows.start)
