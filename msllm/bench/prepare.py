"""Measures data preparation on a synthetic corpus: time, memory and bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from msllm import tokenizer as tokenizer_lib
from msllm.bench.timing import timed
from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data.prepare import prepare

WORDS = 40_000  # number of words in the synthetic language
VOCAB_SIZE = 8192
SAMPLE_BYTES = 1 << 19  # part of the corpus that trains the tokenizer
POLL_SECONDS = 0.1  # time between two measurements of the workers' memory


class _Form(NamedTuple):
    """The streams that a converter writes, and a function that makes its records from two texts."""

    streams: StreamsConfig
    record: Callable[[str, str], dict[str, Any]]


def _chat_record(a: str, b: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": a}, {"role": "output", "content": b}]}


def _pair_record(a: str, b: str) -> dict[str, Any]:
    return {"source": a, "target": b}


def _text_record(a: str, b: str) -> dict[str, Any]:
    return {"text": f"{a}\n{b}"}


_USER_OUTPUT = StreamsConfig(names=("user", "output"), kinds=("input", "output"))
_FOUR_OUTPUTS = StreamsConfig(names=tuple("abcd"), kinds=("output",) * 4)
FORMS = {
    "chat": _Form(_USER_OUTPUT, _chat_record),
    "wait_k": _Form(_USER_OUTPUT, _pair_record),
    "parallel_documents": _Form(_FOUR_OUTPUTS, _text_record),
}


def prepare_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Writes a synthetic corpus and measures its preparation with a given unigram tokenizer.

    CPU-seconds are those of all processes and include hashing the input and output. Token counts
    exclude silence. The memory figures are the peaks of the first process and of the largest
    worker.

    Args:
      case: the settings of `runner.SETTINGS["prepare"]`, with one value of size_mb.
    """
    with tempfile.TemporaryDirectory(prefix="msllm-bench-") as name:
        folder = pathlib.Path(name)
        _make_corpus_in_new_process(folder, case)
        data = DataConfig(
            converter=case["converter"],
            path=str(folder / "corpus.jsonl"),
            tokenizer=TokenizerConfig(path=str(folder / "tokenizer.model")),
        )
        config = Config(streams=FORMS[case["converter"]].streams, data=data)
        size = os.path.getsize(data.path)
        cpu = _cpu_seconds()
        with _Memory() as memory:
            manifest, _, wall = timed(prepare, config, folder / "out", case["processes"])
        cpu = _cpu_seconds() - cpu
        written = sum(file.stat().st_size for file in (folder / "out").iterdir())
    train, splits = manifest["splits"]["train"], manifest["splits"].values()
    tokens = sum(sum(split["tokens"].values()) for split in splits)
    line = {
        "benchmark": "prepare",
        **case,
        "bytes": size,
        "bytes_written": written,
        "shards": len(train["shards"]),
        "examples": sum(split["examples"] for split in splits),
        "tokens": tokens,
        "silence_rate": train["silence_rate"],
        "packing_efficiency": train["packing_efficiency"],
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall, 1),
        "tokens_per_cpu_minute": round(60 * tokens / cpu),
        "first_process_peak_mib": round(memory.own, 1),
        "worker_peak_mib": round(memory.worker, 1),
    }
    return [line]


def _make_corpus_in_new_process(folder: pathlib.Path, case: dict[str, Any]) -> None:
    """Calls `make_corpus` in a new process, so that its time and memory are not measured."""
    code = (
        "import json, sys; from msllm.bench.prepare import make_corpus; "
        "make_corpus(sys.argv[1], json.loads(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), json.dumps(case)], check=True)


def make_corpus(folder: str, case: dict[str, Any]) -> None:
    """Writes a corpus, and a tokenizer trained on its beginning.

    Args:
      folder: where to write corpus.jsonl and tokenizer.model.
      case: the settings of the benchmark. The corpus has `size_mb` MB.
    """
    path = pathlib.Path(folder) / "corpus.jsonl"
    record = FORMS[case["converter"]].record
    texts, left = _texts(np.random.default_rng(0)), case["size_mb"] * 1e6
    with path.open("w") as file:
        while left > 0:
            left -= file.write(json.dumps(record(next(texts), next(texts))) + "\n")
    config = TokenizerConfig(model_type="unigram", vocab_size=VOCAB_SIZE)
    tokenizer = tokenizer_lib.train(_sample(path), config)
    path.with_name("tokenizer.model").write_bytes(tokenizer.to_bytes())


def _texts(rng: np.random.Generator) -> Iterator[str]:
    """Yields texts of 10 to 200 words, with punctuation and numbers.

    The frequencies of words follow Zipf's law, as in a natural language.
    """
    words = _words(rng)
    frequency = np.repeat(1 / np.arange(10, WORDS + 10), len(words) // WORDS)
    edges = np.cumsum(frequency / frequency.sum())
    while True:
        drawn = words[np.searchsorted(edges, rng.random(1 << 16)).clip(max=len(words) - 1)]
        drawn[:: rng.integers(20, 40)] = str(rng.integers(10_000))
        start = 0
        while start < len(drawn):
            stop = start + int(rng.integers(10, 200))
            yield " ".join(drawn[start:stop])
            start = stop


def _words(rng: np.random.Generator) -> np.ndarray:
    """Returns WORDS random words, each several times, with and without a punctuation mark."""
    starts = "b c d f g l m n p r s t v th st".split()
    syllables = [
        start + vowel + end for start in starts for vowel in "aeiou" for end in ("", "n", "r", "s")
    ]
    words = ["".join(rng.choice(syllables, size)) for size in rng.integers(1, 5, WORDS)]
    marks = ("", "", "", "", "", ",", ".", ".\n")
    return np.array([f"{word}{mark}" for word in words for mark in marks], object)


def _sample(path: pathlib.Path) -> Iterator[str]:
    """Yields the texts in the first SAMPLE_BYTES of a corpus."""
    with path.open() as file:
        read = 0
        for line in file:
            read += len(line)
            if read > SAMPLE_BYTES:
                return
            record = json.loads(line)
            if "messages" in record:
                yield from (message["content"] for message in record["messages"])
            else:
                yield from record.values()


def _cpu_seconds() -> float:
    """Returns the CPU time of this process and of its finished children, in seconds."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


class _Memory:
    """Measures peak resident memory during a `with` block. Needs /proc.

    Attributes:
      own: peak of this process in MiB.
      worker: peak of its largest worker in MiB.
    """

    def __enter__(self) -> _Memory:
        self.own = self.worker = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.own = _peak_mib(os.getpid())

    def _watch(self) -> None:
        while not self._end.wait(POLL_SECONDS):
            for process in multiprocessing.active_children():
                self.worker = max(self.worker, _peak_mib(process.pid))


def _peak_mib(pid: int | None) -> float:
    """Returns the peak resident memory of a process in MiB, or 0 if it has ended."""
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0
