"""Batches on the devices of a mesh, as global arrays: each host reads only its own tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from msllm.data.loader import Batch, Loader

AbstractBatch = Mapping[str, jax.ShapeDtypeStruct]  # shapes and shardings: `Program.abstract_batch`


def host_rows(abstract: AbstractBatch) -> range:
    """Returns the range of a batch's tables of which this host's devices hold a part."""
    segment = abstract["segment"]
    indices = segment.sharding.addressable_devices_indices_map(segment.shape).values()
    parts = [index[0].indices(segment.shape[0]) for index in indices]
    return range(min(part[0] for part in parts), max(part[1] for part in parts))


def to_devices(
    abstract: AbstractBatch, tables: Mapping[str, np.ndarray], first_row: int = 0
) -> dict[str, jax.Array]:
    """Returns global arrays made from this host's tables of a batch.

    Args:
      abstract: shapes and shardings of the arrays. They may have more streams than the tables; the
        additional streams are absent.
      tables: tokens and present [b, T, S], segment [b, T]. They are the tables first_row ..
        first_row + b - 1 of the batch, which must include `host_rows(abstract)`. Without weights
        [b, T, S], all loss weights are 1.
      first_row: the place of the first of `tables` in the batch.
    """

    def place(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
        if array.ndim == 3:
            array = np.pad(array, [(0, 0), (0, 0), (0, target.shape[2] - array.shape[2])])

        def shard(index: Any) -> np.ndarray:
            rows, *rest = index
            begin, end, _ = rows.indices(target.shape[0])
            return array[(slice(begin - first_row, end - first_row), *rest)]

        return jax.make_array_from_callback(target.shape, target.sharding, shard)

    if "weights" in abstract and "weights" not in tables:
        tables = {**tables, "weights": np.ones(tables["tokens"].shape, np.float32)}
    if "weights" in tables and "weights" not in abstract:
        raise ValueError("the tables have loss weights, but the Program was made without weights")
    return {name: place(tables[name], target) for name, target in abstract.items()}


def global_batches(
    loader: Loader, abstract: AbstractBatch, steps: Sequence[int]
) -> Iterator[tuple[Batch, dict[str, jax.Array]]]:
    """Yields (this host's tables, global arrays) of each step. Tables are read ahead of time."""
    rows = host_rows(abstract)
    for tables in loader.iterate(steps, rows):
        yield tables, to_devices(abstract, tables, rows.start)
