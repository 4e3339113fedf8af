"""Tiny configs, batches, meshes and files for the tests of steps, runs and checkpoints."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import types
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from msllm.config import Config, MeshConfig, default_config, from_config_dict, to_json
from msllm.data.global_batch import to_devices
from msllm.monitor import KINDS, PAST, Monitor
from msllm.sharding import make_mesh
from msllm.step import Program
from msllm.streams import StreamSpec
from msllm.weights.load import load

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='the TPU compiler is not installed: pip install "jax[tpu]"',
)
SILENCE = 1
SMALL = {
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.d_ff": 32,
    "model.rope_theta": 1e4,
    "optim.warmup_steps": 0,
    "loss.chunk_tokens": 32,
}
# Metrics of speed and memory, which differ between equal runs.
TIMES = (
    "tokens_per_second",
    "spoken_tokens_per_second",
    "step_seconds",
    "data_wait_share",
    "memory_mib",
    "goodput",
    *(f"time/{kind}" for kind in (*KINDS, *PAST)),
)
FOUR_STREAMS = {
    "streams.names": ("user", "tool", "thought", "output"),
    "streams.kinds": ("input", "input", "thought", "output"),
    "model.vocab_size": 32,
    "data.rows": 16,
    "data.batch_size": 8,
    "steps": 100,
}


def settings(**dotted) -> ml_collections.ConfigDict:
    """The default settings with tiny sizes and changes, e.g. **{"optim.lr": 0.1}."""
    result = default_config()
    result.update_from_flattened_dict(SMALL | dotted)
    return result


def make_config(**dotted) -> Config:
    """`settings` as a Config."""
    return from_config_dict(settings(**dotted))


def four_streams(**dotted) -> Config:
    """A config for synthetic batches of four streams."""
    return make_config(**FOUR_STREAMS | dotted)


def make_program(config: Config, devices: int = 1, weighted: bool = False, **axes: int) -> Program:
    """Makes the program of a config on a mesh of the first `devices` devices.

    Axes that are not given have size 1. `weighted`: batches have loss weights of cells.
    """
    sizes = {"data": 1, "fsdp": 1, "stream": 1, "tensor": 1} | axes
    mesh = make_mesh(MeshConfig(**sizes), jax.devices()[:devices])
    streams = StreamSpec.from_config(config.streams)
    return Program(config, streams, mesh, SILENCE, weighted)


def random_tables(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch with silence, absent cells, several segments and empty rows.

    The tables hold different numbers of cells.
    """
    rng = np.random.default_rng(seed)
    streams = StreamSpec.from_config(config.streams).size
    shape = (config.data.batch_size, config.data.rows, streams)
    tokens = rng.integers(2, config.model.vocab_size, shape)
    tokens = np.where(rng.random(shape) < 0.3, SILENCE, tokens).astype(np.int32)
    row = np.arange(shape[1])
    first, used = rng.integers(3, shape[1] - 3, (2, shape[0], 1))
    segment = np.where(row < first, 1, 2) * (row < np.maximum(used, 5))
    segment[0] = 1
    begin = rng.integers(0, 4, (shape[0], 1, shape[2]))
    present = (row[:, None] >= begin) & (segment > 0)[:, :, None]
    return {"tokens": tokens * present, "present": present, "segment": segment.astype(np.int32)}


def place(program: Program, tables: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Moves tables to the program's mesh."""
    return to_devices(program.abstract_batch, tables)


def host(tree: Any) -> Any:
    """Copies arrays to numpy, so that they stay readable after their buffers are donated."""
    return jax.tree.map(lambda x: np.array(x), tree)


def dictation(**dotted) -> Config:
    """A config for a run on dictation examples."""
    return make_config(**dictation_settings() | dotted)


def dictation_settings() -> dict:
    """The settings of `dictation`, with dotted keys."""
    return {
        "data.converter": "dictation",
        "data.options": {"examples": 200},
        "data.tokenizer.model_type": "word",
        "data.tokenizer.vocab_size": 128,
        "data.rows": 32,
        "data.batch_size": 8,
        "data.eval_percent": 10.0,
        "steps": 8,
        "log_every": 1,
        "eval_every": 4,
        "checkpoint.every": 2,
    }


def replace(config: Config, section: str, **changes: Any) -> Config:
    """Changes fields of one section of a config."""
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **changes)}
    )


def metrics(workdir: pathlib.Path) -> list[dict]:
    """Reads the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def reproducible_metrics(workdir: pathlib.Path) -> list[dict]:
    """Reads metrics.jsonl without times and other values that differ between equal runs."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(workdir)]


def assert_same_parameters(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """Asserts that the last checkpoints of two runs hold equal parameters, bit for bit."""
    parameters, expected = (host(load(path).parameters) for path in (workdir, other))
    jax.tree.map(np.testing.assert_array_equal, parameters, expected)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Presses Ctrl-C when `step` has been dispatched."""
    after_dispatch = Monitor.after_dispatch

    def interrupting(self, done, *rest):
        if done == step:
            signal.raise_signal(signal.SIGINT)
        after_dispatch(self, done, *rest)

    monkeypatch.setattr(Monitor, "after_dispatch", interrupting)


def assert_same_batch(batch: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Asserts that two batches hold equal arrays."""
    assert batch.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, batch, expected)


def concatenate(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins parts of a batch."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def table_keys(batch: dict[str, np.ndarray]) -> list[bytes]:
    """The contents of each table of a batch, as keys for sets and comparisons."""
    arrays = [batch[name] for name in ("tokens", "present", "segment")]
    return [b"".join(array[i].tobytes() for array in arrays) for i in range(len(arrays[0]))]


def flip_a_bit(path: pathlib.Path) -> None:
    """Damages a file by changing one bit in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def write_config_file(path: pathlib.Path, config: Config) -> str:
    """Writes a file for --config that gives this config, and returns its path."""
    path.write_text(
        "import json\nfrom msllm.config import from_config_dict, to_config_dict\n\n\n"
        "def get_config():\n"
        f"    return to_config_dict(from_config_dict(json.loads({to_json(config)!r})))\n"
    )
    return str(path)


def module_of(file: pathlib.Path) -> types.ModuleType:
    """Imports a Python file that is in no package."""
    spec = importlib.util.spec_from_file_location(f"{file.parent.name}_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def streams_with(base: ml_collections.ConfigDict, settings: dict[str, Any]) -> StreamSpec:
    """The streams of a config with changes."""
    config = base.copy_and_resolve_references()
    config.update_from_flattened_dict(settings)
    return StreamSpec.from_config(from_config_dict(config).streams)


def run_small_study(file: pathlib.Path, out: pathlib.Path) -> None:
    """Runs the small form of a study in one process with one device.

    With the eight devices of the tests it would take several times as long.
    """
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    line = [
        sys.executable,
        "-m",
        "msllm",
        "study",
        str(file),
        f"--out={out}",
        "--small",
        "--jobs=0",
    ]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
