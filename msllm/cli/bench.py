"""Measure speed and memory, and print the results as JSON lines.

train      the train step (forward, backward, AdamW) on random tokens
attention  each attention backend alone, forward and forward with backward
decode     one session row by row, with all streams and with one stream
prepare    preparation of a synthetic corpus: time and memory
loader     reading prepared tables from disk into batches (T = 512, B = 32,
           S = 1, 3 and 10)
tokenizer  types of tokenizers on corpora of different kinds: tokens per word,
           and how well a trigram model predicts held-out text
serve      many sessions of `msllm serve` over loopback: rows on time, latency
gpu        one NVIDIA GPU in one command, within --minutes: numerics of the
           attention kernels, training of 1.7 B parameters beside cuDNN and
           a dense mask, and decoding; one line per part, results in --json

Each case runs in a new process, on the devices that jax finds. CPU-seconds are
user and system time of that process (for prepare, also of its workers), so they
depend less on other work on the machine than wall time does. With
--compute_dtype=bfloat16, results on an accelerator include the share of its
peak (msllm/runtime/hardware.py). docs/benchmarks.md has results.

With --torch, train and decode alternate with the same model in torch
(transformers' Qwen3 with a dense mask, on CPU). Both start from the same
parameters, and the results say how far they agree.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from msllm.cli.base import (
    Parser,
    Switch,
    comma_list,
    given_flags,
    non_negative_int,
    output_file,
    positive_int,
)

EXAMPLES = """
msllm bench train --rows=102,512 --batch=4,1 --d_model=512
msllm bench decode --cache_dtype=int8 --streams=3
msllm bench gpu --json=results.json
"""


class _Flag(NamedTuple):
    """A flag. It has a type, or choices, or neither if it is a Switch."""

    help: str
    metavar: str = ""
    type: Callable[[str], Any] | None = None
    choices: tuple[str, ...] = ()


_FLAGS = {
    "rows": _Flag("Rows T of each case.", "N,...", comma_list(positive_int)),
    "batch": _Flag("Tables B of each case.", "N,...", comma_list(positive_int)),
    "streams": _Flag("Streams S.", "N", positive_int),
    "steps": _Flag("Measured steps or repetitions, after a warm-up.", "N", positive_int),
    "vocab_size": _Flag("Vocabulary size V.", "N", positive_int),
    "d_model": _Flag("Model width D.", "N", positive_int),
    "d_ff": _Flag("Width F of the feed-forward layer.", "N", positive_int),
    "num_layers": _Flag("Number of layers.", "N", positive_int),
    "num_heads": _Flag("Number of query heads N.", "N", positive_int),
    "num_kv_heads": _Flag("Number of key and value heads K.", "N", positive_int),
    "head_dim": _Flag("Head width H.", "N", positive_int),
    "compute_dtype": _Flag(
        "Data type of matrix products and activations.", choices=("float32", "bfloat16")
    ),
    "remat": _Flag("Remat policy.", choices=("none", "dots", "full", "offload")),
    "attention": _Flag("Backend, as in config.model.attention.", "NAME", str),
    "chunk_tokens": _Flag("Number of cells per chunk of the loss.", "N", positive_int),
    "medium": _Flag(
        "What edges between two streams carry (config.streams.visibility_medium).",
        choices=("latent", "tokens"),
    ),
    "torch": _Flag("Alternate with the same model in torch."),
    "backends": _Flag("Backends to measure.", "NAME,...", comma_list(str)),
    "memory_gib": _Flag(
        "Do not run a backend whose temporary buffers exceed this size.", "GIB", float
    ),
    "prefill": _Flag("Rows that are read before the first decoded row.", "N", non_negative_int),
    "cache_dtype": _Flag(
        "Data types of the cached keys and values, one case each.", "NAME,...", comma_list(str)
    ),
    "size_mb": _Flag("Corpus size of each case in MB.", "MB,...", comma_list(positive_int)),
    "converter": _Flag(
        "Converter from records to tables.", choices=("chat", "wait_k", "parallel_documents")
    ),
    "processes": _Flag("Number of worker processes.", "N", positive_int),
    "tables": _Flag("Number of tables per source.", "N", positive_int),
    "sources": _Flag("Number of sources; several are mixed.", "N", positive_int),
    "silence": _Flag("Share of silent cells if S > 1.", "PERCENT", non_negative_int),
    "texts": _Flag(
        "Corpora to train tokenizers on: names of msllm/bench/texts.py, or files whose lines are "
        "texts.",
        "NAME,...",
        comma_list(str),
    ),
    "model_types": _Flag("Types of tokenizers.", "NAME,...", comma_list(str)),
    "vocab_sizes": _Flag(
        "Sizes of their vocabularies; 0 fits the corpus.", "N,...", comma_list(non_negative_int)
    ),
    "epochs": _Flag("Measured epochs, after a warm-up.", "N", positive_int),
    "sessions": _Flag("Sessions, each with a client.", "N", positive_int),
    "window": _Flag("Rows that a session sees.", "ROWS", positive_int),
    "beat_ms": _Flag("Time from one row to the next.", "MS", float),
    "seconds": _Flag("Measured time.", "N", float),
    "churn": _Flag("Share of sessions that is replaced each minute.", "PERCENT", float),
    "small": _Flag("Smallest sizes, to try the command. They need no GPU."),
    "parts": _Flag("Parts to run.", "NAME,...", comma_list(str)),
    "minutes": _Flag("Parts that do not fit into this time are left out.", "N", float),
    "json": _Flag("File of the results. It is written after every result.", "FILE", output_file),
}


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    from msllm.bench import runner

    names = list(runner.SETTINGS)
    parser.add_argument("benchmark", metavar="BENCHMARK", choices=names, help="One of the above.")
    for name, flag in _FLAGS.items():
        options: dict[str, Any] = {"help": f"{flag.help} {_defaults(name)}"}
        if flag.choices:
            options["choices"] = flag.choices
        elif flag.type is not None:
            options |= {"type": flag.type, "metavar": flag.metavar}
        else:
            options["action"] = Switch
        parser.add_argument(f"--{name}", **options)


def _defaults(name: str) -> str:
    """Returns a flag's default per benchmark, e.g. "Default: 4 (train), 8 (decode)."."""
    from msllm.bench import runner

    users: dict[str, list[str]] = {}
    for benchmark, settings in runner.SETTINGS.items():
        if name in settings:
            users.setdefault(_shown(settings[name]), []).append(benchmark)
    return "Default: " + ", ".join(f"{x} ({', '.join(users[x])})" for x in users) + "."


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "all that run here"
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def run(flags: argparse.Namespace) -> None:
    """Runs each case."""
    from msllm.bench import runner

    allowed = list(runner.SETTINGS[flags.benchmark])
    given = given_flags(flags, _FLAGS, allowed, f"bench {flags.benchmark}")
    for case in runner.make_cases(flags.benchmark, given):
        runner.run_case(flags.benchmark, case)
