"""Measure speed and memory and print JSON lines.

train      the train step (forward, backward, AdamW) on random tokens
attention  the attention backends alone, forward and with the backward pass
decode     rows of one session, with all streams and with one, for each type
           of cache
prepare    preparing a synthetic corpus of each size: time and memory
loader     prepared tables from disk to batches, T = 512, B = 32, S = 1, 3, 10

Each case runs in a new process, on whatever devices jax finds. CPU-seconds are
those of the process (user + system, for prepare also of its workers), so that
other work on the machine matters less than in wall time. With
--compute_dtype=bfloat16, what an accelerator reaches is also given as a share
of its peak (msllm/runtime/hardware.py). docs/benchmarks.md has results.

With --torch, train and decode take turns with the same model in torch
(transformers' Qwen3 with a dense mask, on CPU), from the same parameters, and
print how far loss and gradient norm differ, or which rows agree.
"""

from __future__ import annotations

import argparse
from typing import Any

from msllm.cli.base import Parser, Switch, comma_list, given_flags, whole

EXAMPLES = """
msllm bench train --rows=102,512 --batch=4,1 --d_model=512
msllm bench attention --backends=chunked,reference --head_dim=128
msllm bench decode --cache_dtype=int8 --streams=3
"""

# Type and help of each flag, and what stands for its value.
_FLAGS: dict[str, tuple[Any, str, str]] = {
    "rows": (comma_list(whole(1)), "N,...", "T of each case."),
    "batch": (comma_list(whole(1)), "N,...", "Tables B of each case."),
    "streams": (whole(1), "N", "Streams S."),
    "steps": (whole(1), "N", "Steps or repetitions measured, after the first."),
    "vocab_size": (whole(1), "N", "Vocabulary V."),
    "d_model": (whole(1), "N", "Width D."),
    "d_ff": (whole(1), "N", "Width F of the feed-forward layer."),
    "num_layers": (whole(1), "N", "Layers."),
    "num_heads": (whole(1), "N", "Query heads N."),
    "num_kv_heads": (whole(1), "N", "Key and value heads K."),
    "head_dim": (whole(1), "N", "Width H of a head."),
    "compute_dtype": (["float32", "bfloat16"], "", "Type of matrix products and activations."),
    "remat": (["none", "dots", "full", "offload"], "", "Remat policy."),
    "attention": (str, "NAME", "Backend, as in config.model.attention."),
    "chunk_tokens": (whole(1), "N", "Cells whose logits exist at one time."),
    "torch": (Switch, "", "Take turns with the same model in torch."),
    "backends": (comma_list(str), "NAME,...", "Backends to measure."),
    "memory_gib": (float, "GIB", "Do not run backends whose temporaries take more."),
    "prefill": (whole(0), "N", "Rows of each table that are read before."),
    "cache_dtype": (comma_list(str), "NAME,...", "Types of keys and values, one for each case."),
    "size_mb": (comma_list(whole(1)), "MB,...", "Text of each case."),
    "converter": (["chat", "wait_k", "parallel_documents"], "", "What makes streams of the text."),
    "processes": (whole(1), "N", "Worker processes."),
    "tables": (whole(1), "N", "Tables of each source."),
    "sources": (whole(1), "N", "Sources; several are mixed."),
    "silence": (whole(0), "PERCENT", "Share of silent cells where there are several streams."),
    "epochs": (whole(1), "N", "Epochs measured, after the first."),
}


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    from msllm.bench import runner

    names = list(runner.SETTINGS)
    parser.add_argument("benchmark", metavar="|".join(names), choices=names, help="What to run.")
    for name, (kind, metavar, text) in _FLAGS.items():
        options: dict[str, Any] = {"help": f"{text} {_defaults(name)}"}
        if kind is Switch:
            options["action"] = Switch
        elif isinstance(kind, list):
            options["choices"] = kind
        else:
            options |= {"type": kind, "metavar": metavar}
        parser.add_argument(f"--{name}", **options)


def _defaults(name: str) -> str:
    """The default of a flag with the benchmarks that have it: "Default: 4 (train), 8 (decode)."."""
    from msllm.bench import runner

    users: dict[str, list[str]] = {}
    for benchmark, settings in runner.SETTINGS.items():
        if name in settings:
            value = settings[name]
            shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            users.setdefault(shown or "all that run here", []).append(benchmark)
    return "Default: " + ", ".join(f"{x} ({', '.join(users[x])})" for x in users) + "."


def run(flags: argparse.Namespace) -> None:
    """Runs each case."""
    from msllm.bench import runner

    allowed = list(runner.SETTINGS[flags.benchmark])
    given = given_flags(flags, _FLAGS, allowed, f"bench {flags.benchmark}")
    for case in runner.make_cases(flags.benchmark, given):
        runner.run_case(flags.benchmark, case)
