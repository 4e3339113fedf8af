"""Preparing data: the measuring part of `msllm bench prepare`, on a corpus made for the purpose."""

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
import time
from collections.abc import Iterator

import numpy as np

from msllm import tokenizer as tokenizer_lib
from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data.prepare import prepare

WORDS = 40_000  # of the made language
VOCAB_SIZE = 8192
SAMPLE_BYTES = 1 << 19  # of the corpus, that the tokenizer is trained on
SAMPLE_SECONDS = 0.1  # between two looks at the memory of workers
# Per converter: the streams, and how a record holds two texts.
FORMS = {
    "chat": (
        StreamsConfig(names=("user", "output"), kinds=("input", "output")),
        lambda a, b: {
            "messages": [{"role": "user", "content": a}, {"role": "output", "content": b}]
        },
    ),
    "wait_k": (
        StreamsConfig(names=("user", "output"), kinds=("input", "output")),
        lambda a, b: {"source": a, "target": b},
    ),
    "parallel_documents": (
        StreamsConfig(names=tuple("abcd"), kinds=("output",) * 4),
        lambda a, b: {"text": f"{a}\n{b}"},
    ),
}


def prepare_case(case: dict) -> list[dict]:
    """Makes a corpus of `size_mb` MB and prepares it with a unigram tokenizer that is given.

    CPU-seconds are those of all processes, hashing of input and output included; tokens are those
    that are not silence. Memory is the most that the first process and the largest of the others
    held at any time.
    """
    streams, _ = FORMS[case["converter"]]
    with tempfile.TemporaryDirectory(prefix="msllm-bench-") as name:
        folder = pathlib.Path(name)
        code = "import json, sys; from msllm.bench.prepare import make; make(sys.argv[1], json.loads(sys.argv[2]))"
        # In a process of its own: what it takes is not what is measured.
        subprocess.run([sys.executable, "-c", code, name, json.dumps(case)], check=True)
        data = DataConfig(
            converter=case["converter"],
            path=str(folder / "corpus.jsonl"),
            tokenizer=TokenizerConfig(path=str(folder / "tokenizer.model")),
        )
        size = os.path.getsize(data.path)
        begin, begin_cpu = time.perf_counter(), _cpu_seconds()
        with _Memory() as memory:
            manifest = prepare(
                Config(streams=streams, data=data), folder / "out", case["processes"]
            )
        cpu = _cpu_seconds() - begin_cpu
        wall = time.perf_counter() - begin
        written = sum(file.stat().st_size for file in (folder / "out").iterdir())
    train, parts = manifest["splits"]["train"], manifest["splits"].values()
    tokens = sum(sum(part["tokens"].values()) for part in parts)
    line = {
        "benchmark": "prepare",
        **case,
        "bytes": size,
        "bytes_written": written,
        "shards": len(train["shards"]),
        "examples": sum(part["examples"] for part in parts),
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


def make(folder: str, case: dict) -> None:
    """Writes corpus.jsonl of `size_mb` MB and tokenizer.model, trained on its beginning, to a
    folder.
    """
    path = pathlib.Path(folder) / "corpus.jsonl"
    _, form = FORMS[case["converter"]]
    texts, left = _texts(np.random.default_rng(0)), case["size_mb"] * 1e6
    with path.open("w") as file:
        while left > 0:
            left -= file.write(json.dumps(form(next(texts), next(texts))) + "\n")
    config = TokenizerConfig(model_type="unigram", vocab_size=VOCAB_SIZE)
    tokenizer_lib.train(_sample(path), config).save(path.with_name("tokenizer.model"))


def _texts(rng: np.random.Generator) -> Iterator[str]:
    """Texts of 10 to 200 words, as frequent as those of a language (Zipf), with sentences and
    numbers.
    """
    starts = "b c d f g l m n p r s t v th st".split()
    syllables = [
        start + vowel + end for start in starts for vowel in "aeiou" for end in ("", "n", "r", "s")
    ]
    words = ["".join(rng.choice(syllables, size)) for size in rng.integers(1, 5, WORDS)]
    words = np.array(
        [f"{word}{mark}" for word in words for mark in ("", "", "", "", "", ",", ".", ".\n")],
        object,
    )
    frequency = np.repeat(1 / np.arange(10, WORDS + 10), 8)
    edges = np.cumsum(frequency / frequency.sum())
    while True:
        drawn = words[np.searchsorted(edges, rng.random(1 << 16)).clip(max=len(words) - 1)]
        drawn[:: rng.integers(20, 40)] = str(rng.integers(10_000))
        start = 0
        while start < len(drawn):
            stop = start + int(rng.integers(10, 200))
            yield " ".join(drawn[start:stop])
            start = stop


def _sample(path: pathlib.Path) -> Iterator[str]:
    with path.open() as file:
        read = 0
        for line in file:
            if (read := read + len(line)) > SAMPLE_BYTES:
                return
            value = json.loads(line)
            yield from (
                value.values()
                if "messages" not in value
                else (turn["content"] for turn in value["messages"])
            )


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


class _Memory:
    """The most resident memory, in MiB, that this process (`own`) and the largest of its workers
    held. Needs /proc.
    """

    def __enter__(self) -> _Memory:
        self.own = self.worker = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()
        self.own = _peak_mib(os.getpid())

    def _watch(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            for process in multiprocessing.active_children():
                self.worker = max(self.worker, _peak_mib(process.pid))


def _peak_mib(pid: int) -> float:
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())
    except OSError:  # it has ended
        return 0.0
    return int(found[1]) / 1024 if found else 0.0
