"""The loader alone: packed tables from disk to batches, by the CPU time of the whole process, and
the memory it keeps.
"""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from msllm.config import DataConfig, MixtureConfig, StreamsConfig, TokenizerConfig
from msllm.data import build, records
from msllm.data.loader import Loader
from msllm.data.packing import Packed
from msllm.streams import StreamSpec
from msllm.tokenizer import FILE_NAMES, Tokenizer, train

EXAMPLE_ROWS = 90  # of an example, on average
SHARDS = 4


def loader_case(case: dict) -> list[dict]:
    """Measures one case in this process: an epoch to warm up, then `epochs` of them through
    `Loader.iterate`.

    Args:
      case: rows (T), batch (B), streams (S), tables (per source), sources, silence (percent of the
        cells; none in a single stream), epochs.
    """
    size = case["streams"]
    config = StreamsConfig(names=tuple(f"s{i}" for i in range(size)), kinds=("output",) * size)
    spec = StreamSpec.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        directories = [f"{folder}/source_{i}" for i in range(case["sources"])]
        for seed, directory in enumerate(directories):
            _prepare(pathlib.Path(directory), case, spec, seed)
        several = MixtureConfig(
            tuple(directories), (), tuple(1.0 + i for i in range(len(directories)))
        )
        data = {"mixture": several} if len(directories) > 1 else {"dir": directories[0]}
        before = _resident_mib()
        begin = time.process_time()
        loader = Loader(
            DataConfig(rows=case["rows"], batch_size=case["batch"], **data), "train", spec
        )
        opening = time.process_time() - begin
        steps = loader.num_batches
        for _ in loader.iterate(range(steps)):
            pass
        warm = _resident_mib()
        begin, begin_wall, last = time.process_time(), time.perf_counter(), None
        for last in loader.iterate(range(steps, (1 + case["epochs"]) * steps)):
            pass
        seconds, wall = time.process_time() - begin, time.perf_counter() - begin_wall
        after = _resident_mib()
        # What the batches hold is counted apart, so that counting is not measured.
        cells = spoken = 0
        for step in range(steps):
            batch = loader.batch(steps + step)
            cells += int(batch["present"].sum())
            spoken += int(
                (batch["present"] & (batch["tokens"] != loader.tokenizer.silence_id)).sum()
            )
        stored = sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*.array_record"))
    del last
    tables = steps * case["batch"]
    result = {
        "benchmark": "loader",
        **case,
        "bytes_per_table": round(stored / loader.num_tables),
        "cells_per_table": round(cells / tables),
        "spoken_per_table": round(spoken / tables),
        "open_cpu_seconds": round(opening, 3),
        "cpu_us_per_table": round(seconds / (tables * case["epochs"]) * 1e6, 1),
        "wall_us_per_table": round(wall / (tables * case["epochs"]) * 1e6, 1),
        "cells_per_cpu_second": round(cells * case["epochs"] / seconds),
        "spoken_tokens_per_cpu_second": round(spoken * case["epochs"] / seconds),
        "resident_mib_before": round(before, 1),
        "resident_mib_first_epoch": round(warm, 1),
        "resident_mib_growth_later": round(after - warm, 1),
    }
    return [result]


def _resident_mib() -> float:
    """Memory of this process; Linux."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024


def _prepare(directory: pathlib.Path, case: dict, spec: StreamSpec, seed: int) -> None:
    """Writes a prepared directory of packed tables with random tokens, as frequent as words are."""
    directory.mkdir()
    words = " ".join(f"w{i}" for i in range(4000))
    tokenizer = train([words], TokenizerConfig(model_type="word", vocab_size=4096))
    tokenizer.save(directory / FILE_NAMES[tokenizer.kind])
    (directory / build.WORK).mkdir()
    writer = build.ShardWriter(
        directory, "train", build.Portion(0, 1, [None]), SHARDS, spec.size, tokenizer
    )
    for table in _tables(case, tokenizer, np.random.default_rng(seed)):
        writer.write(table)
    shards = writer.close()
    stored = {
        "file": FILE_NAMES[tokenizer.kind],
        "sha256": tokenizer.hash,
        "silence": tokenizer.silence,
    }
    split = {
        "tables": writer.tables,
        "tokens": dict(zip(spec.names, writer.tokens.tolist())),
        "shards": shards,
    }
    manifest = {
        "format": records.FORMAT,
        "streams": {"names": spec.names, "kinds": spec.kinds, "delays": spec.delays},
        "rows": case["rows"],
        "tokenizer": stored | {"vocab_size": tokenizer.vocab_size},
        "splits": {"train": split},
    }
    records.write_manifest(directory, manifest)


def _tables(case: dict, tokenizer: Tokenizer, rng: np.random.Generator) -> Iterator[Packed]:
    rows, size = case["rows"], case["streams"]
    share = case["silence"] / 100 if size > 1 else 0.0
    ranks = tokenizer.vocab_size - tokenizer.silence_id - 1
    frequency = 1 / np.arange(3, ranks + 3)
    frequency /= frequency.sum()
    for _ in range(case["tables"]):
        begins = rng.random(rows) < 1 / EXAMPLE_ROWS
        segment = (1 + np.cumsum(begins)).astype(np.int32)
        used = rows - int(rng.integers(0, max(1, rows // 50)))
        segment[used:] = 0
        present = np.repeat((segment > 0)[:, None], size, axis=1)
        tokens = tokenizer.silence_id + 1 + rng.choice(ranks, (rows, size), p=frequency)
        tokens = (
            np.where(rng.random((rows, size)) < share, tokenizer.silence_id, tokens).astype(
                np.int32
            )
            * present
        )
        yield Packed(
            tokens,
            present,
            segment,
            [f"{rng.integers(1 << 62):016x}" for _ in range(segment.max())],
        )
