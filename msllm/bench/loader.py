"""Measures the loader alone: reading packed tables from disk into batches.

Reports the CPU time and the resident memory of the process.
"""

from __future__ import annotations

import collections
import pathlib
import resource
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from msllm.bench.timing import timed
from msllm.config import DataConfig, MixtureConfig, StreamsConfig, TokenizerConfig
from msllm.data import build, records
from msllm.data.loader import Loader
from msllm.data.packing import Packed
from msllm.streams import StreamSpec
from msllm.tokenizer import FILE_NAMES, Tokenizer, train

EXAMPLE_ROWS = 90  # mean length of an example
SHARDS = 4


def loader_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures `epochs` epochs of `Loader.iterate` after a warm-up epoch.

    Args:
      case: the settings of `runner.SETTINGS["loader"]`, with rows (T), batch (B) and streams (S).
        `tables` is the number per source, and `silence` the percentage of silent cells (none with a
        single stream).
    """
    size, epochs = case["streams"], case["epochs"]
    config = StreamsConfig(names=tuple(f"s{i}" for i in range(size)), kinds=("output",) * size)
    spec = StreamSpec.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        data = _write_sources(pathlib.Path(folder), case, spec)
        stored = sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*.array_record"))
        before = _resident_mib()
        loader, opening, _ = timed(Loader, data, "train", spec)
        steps = loader.num_batches
        _exhaust(loader.iterate(range(steps)))
        warm = _resident_mib()
        last = (1 + epochs) * steps
        cpu, wall = timed(_exhaust, loader.iterate(range(steps, last)))[1:]
        after = _resident_mib()
        cells, spoken = _count_cells(loader, range(steps, 2 * steps))
    tables = steps * case["batch"]
    result = {
        "benchmark": "loader",
        **case,
        "bytes_per_table": round(stored / loader.num_tables),
        "cells_per_table": round(cells / tables),
        "spoken_per_table": round(spoken / tables),
        "open_cpu_seconds": round(opening, 3),
        "cpu_us_per_table": round(cpu / (tables * epochs) * 1e6, 1),
        "wall_us_per_table": round(wall / (tables * epochs) * 1e6, 1),
        "cells_per_cpu_second": round(cells * epochs / cpu),
        "spoken_tokens_per_cpu_second": round(spoken * epochs / cpu),
        "resident_mib_before": round(before, 1),
        "resident_mib_first_epoch": round(warm, 1),
        "resident_mib_growth_later": round(after - warm, 1),
    }
    return [result]


def _exhaust(batches: Iterator[Any]) -> None:
    collections.deque(batches, maxlen=0)


def _resident_mib() -> float:
    """Returns the resident memory of this process in MiB. Works on Linux only."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _count_cells(loader: Loader, steps: range) -> tuple[int, int]:
    """Returns the number of present cells, and of present cells without silence, in batches."""
    cells = spoken = 0
    for step in steps:
        batch = loader.batch(step)
        cells += int(batch["present"].sum())
        is_spoken = batch["present"] & (batch["tokens"] != loader.tokenizer.silence_id)
        spoken += int(is_spoken.sum())
    return cells, spoken


def _write_sources(folder: pathlib.Path, case: dict[str, Any], spec: StreamSpec) -> DataConfig:
    """Writes prepared directories for a case and returns a config that reads them."""
    directories = [folder / f"source_{i}" for i in range(case["sources"])]
    for seed, directory in enumerate(directories):
        _write_prepared(directory, case, spec, seed)
    sizes = {"rows": case["rows"], "batch_size": case["batch"]}
    if len(directories) == 1:
        return DataConfig(dir=str(directories[0]), **sizes)
    weights = tuple(1.0 + i for i in range(len(directories)))
    mixture = MixtureConfig(dirs=tuple(map(str, directories)), weights=weights)
    return DataConfig(mixture=mixture, **sizes)


def _write_prepared(
    directory: pathlib.Path, case: dict[str, Any], spec: StreamSpec, seed: int
) -> None:
    """Writes a prepared directory of packed random tables, with Zipf-distributed tokens."""
    (directory / build.WORK).mkdir(parents=True)
    words = " ".join(f"w{i}" for i in range(4000))
    tokenizer = train([words], TokenizerConfig(model_type="word", vocab_size=4096))
    (directory / FILE_NAMES[tokenizer.kind]).write_bytes(tokenizer.to_bytes())
    portion = build.Portion(0, 1, [None])
    writer = build.ShardWriter(directory, "train", portion, SHARDS, spec.size, tokenizer)
    for table in _random_tables(case, tokenizer, np.random.default_rng(seed)):
        writer.write(table)
    split = {
        "shards": writer.close(),
        "tables": writer.tables,
        "tokens": dict(zip(spec.names, writer.tokens.tolist())),
    }
    manifest = {
        "format": records.FORMAT,
        "streams": {"names": spec.names, "kinds": spec.kinds, "delays": spec.delays},
        "rows": case["rows"],
        "tokenizer": {
            "file": FILE_NAMES[tokenizer.kind],
            "sha256": tokenizer.hash,
            "silence": tokenizer.silence,
            "vocab_size": tokenizer.vocab_size,
        },
        "splits": {"train": split},
    }
    records.write_manifest(directory, manifest)


def _random_tables(
    case: dict[str, Any], tokenizer: Tokenizer, rng: np.random.Generator
) -> Iterator[Packed]:
    rows, size = case["rows"], case["streams"]
    share = case["silence"] / 100 if size > 1 else 0.0
    first = tokenizer.silence_id + 1  # id of the first word
    ranks = tokenizer.vocab_size - first
    frequency = 1 / np.arange(3, ranks + 3)
    frequency /= frequency.sum()
    for _ in range(case["tables"]):
        begins = rng.random(rows) < 1 / EXAMPLE_ROWS
        segment = (1 + np.cumsum(begins)).astype(np.int32)
        used = rows - int(rng.integers(0, max(1, rows // 50)))
        segment[used:] = 0
        present = np.repeat((segment > 0)[:, None], size, axis=1)
        words = first + rng.choice(ranks, (rows, size), p=frequency)
        silent = rng.random((rows, size)) < share
        tokens = np.where(silent, tokenizer.silence_id, words).astype(np.int32) * present
        examples = [f"{rng.integers(1 << 62):016x}" for _ in range(segment.max())]
        yield Packed(tokens, present, segment, examples)
