"""Runs benchmarks. Each case runs in a new process, which prints its results as JSON lines."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from msllm.bench import gpu
from msllm.config import import_object
from msllm.errors import UserError
from msllm.runtime import environment

_CACHE_DTYPES = ["int8", "bfloat16", "float32"]
_TABLES = {"rows": [102, 512], "batch": [4, 1], "streams": 10, "steps": 5}
_HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "compute_dtype": "float32"}
_SIZES = {"vocab_size": 8192, "d_model": 256, "d_ff": 768, "num_layers": 4, **_HEADS}

# For each benchmark, the function that measures a case and returns its results. The case's process
# imports only the function that it needs, because imports count towards the time to the first train
# step.
_MEASURE = {
    "train": "msllm.bench.train:train_case",
    "attention": "msllm.bench.attention:attention_case",
    "decode": "msllm.bench.decode:decode_case",
    "prepare": "msllm.bench.prepare:prepare_case",
    "loader": "msllm.bench.loader:loader_case",
    "tokenizer": "msllm.bench.tokenizer:tokenizer_case",
    "serve": "msllm.bench.serve:serve_case",
}
# The settings of each benchmark and their defaults. A list has one value for each case.
SETTINGS: dict[str, dict[str, Any]] = {
    "train": {
        **_TABLES,
        **_SIZES,
        "remat": "dots",
        "attention": "auto",
        "chunk_tokens": 1024,
        "medium": "latent",
        "silence": 60,
        "torch": False,
    },
    "attention": {**_TABLES, **_HEADS, "backends": [], "memory_gib": 4.0},
    "decode": {
        **_TABLES,
        **_SIZES,
        # 29.4 M parameters.
        **{"d_model": 512, "d_ff": 1536, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4},
        **{"rows": [400], "batch": [1], "steps": 32},
        "prefill": 100,
        "cache_dtype": _CACHE_DTYPES,
        "medium": "latent",
        "torch": False,
    },
    "prepare": {"size_mb": [64, 256], "converter": "chat", "processes": 2},
    "loader": {"tables": 4000, "sources": 1, "silence": 60, "epochs": 4},
    "tokenizer": {"texts": [], "model_types": ["unigram", "bpe"], "vocab_sizes": [4096, 0]},
    "serve": {
        **_SIZES,
        # 5.3 M parameters.
        **{"streams": 3, "sessions": 100, "window": 512, "beat_ms": 100.0},
        **{"seconds": 60.0, "churn": 10.0},
    },
    "gpu": {"small": False, "parts": list(gpu.PARTS), "minutes": 8.5, "json": "gpu_bench.json"},
}


def make_cases(benchmark: str, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the cases of a benchmark. Each case is a dictionary of settings.

    Args:
      benchmark: name of the benchmark.
      given: settings that replace the defaults in `SETTINGS`.

    Raises:
      UserError: the settings contradict each other.
    """
    settings = {**SETTINGS[benchmark], **given}
    if settings.get("torch"):
        _check_torch(settings)
    if benchmark == "prepare":
        return [{**settings, "size_mb": size} for size in settings["size_mb"]]
    if benchmark in ("gpu", "serve"):
        return [settings]
    if benchmark == "tokenizer":
        from msllm.bench import texts  # here, because train times its imports

        return [{**settings, "texts": name} for name in settings["texts"] or texts.names()]
    if benchmark == "loader":
        return [{"rows": 512, "batch": 32, "streams": size, **settings} for size in (1, 3, 10)]
    rows, batches = settings["rows"], settings["batch"]
    if len(rows) != len(batches):
        raise UserError(
            f"--rows has {len(rows)} numbers and --batch has {len(batches)}: both need one "
            "number for each case"
        )
    cases = [
        {**settings, "rows": row, "batch": batch} for row, batch in zip(rows, batches, strict=True)
    ]
    if benchmark != "decode":
        return cases
    dtypes = settings["cache_dtype"]
    if not dtypes or not set(dtypes) <= set(_CACHE_DTYPES):
        raise UserError(f"--cache_dtype is {dtypes}: must be some of {', '.join(_CACHE_DTYPES)}")
    return [{**case, "cache_dtype": dtype} for case in cases for dtype in dtypes]


def run_case(benchmark: str, case: dict[str, Any]) -> None:
    """Runs a case in a new process, with the memory allocator settings of launch/env.sh.

    The case of `gpu` starts its own processes.

    Raises:
      UserError: the process failed.
    """
    if benchmark == "gpu":
        return gpu.run(case)
    defaults = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1",
        # Without this setting, idle threads of torch spin while jax works.
        "OMP_WAIT_POLICY": "passive",
    }
    code = (
        "import json, sys; from msllm.bench.runner import measure; "
        "measure(sys.argv[1], json.loads(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, benchmark, json.dumps(case)]
    status = subprocess.run(command, env=defaults | dict(os.environ)).returncode
    if status:
        raise UserError(f"the case {case} exited with status {status}: see its output above")


def measure(benchmark: str, case: dict[str, Any]) -> None:
    """Measures one case in this process, which should be new, and prints its results."""
    environment.configure_jax()
    if benchmark == "train":
        gc.disable()  # until the step is compiled, as `msllm train` does
    for result in import_object(_MEASURE[benchmark], f"bench {benchmark}")(case):
        print(json.dumps(result), flush=True)


def _check_torch(settings: Mapping[str, Any]) -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--torch: {' and '.join(missing)} not installed: pip install {' '.join(missing)}"
        )
    if settings["compute_dtype"] != "float32":
        raise UserError(
            f"--compute_dtype is {settings['compute_dtype']}: must be float32 with --torch"
        )
