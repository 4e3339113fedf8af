"""The compiled step of a run, kept for its next start, which then neither traces, lowers nor compiles it.

JAX's compilation cache is asked with a program, and to trace and lower that takes longer than to load what the cache has.
So the step itself is kept beside it, under the hash of all that decides it. As in that cache, what is loaded is machine
code: who may write there decides what runs here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import pickle
import sys
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable
from jaxlib import xla_client

from msllm import code
from msllm.compiler import compile_step, settle
from msllm.config import to_config_dict
from msllm.step import Program

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "ml-dtypes", "libtpu")
ENVIRONMENT = ("XLA_", "LIBTPU_", "PJRT_", "TF_", "NVIDIA_TF32_")  # what compilers read begins so
# Where things lie decides no program: a workdir can be moved.
PLACES = ("jax_compilation_cache_dir",)

log = logging.getLogger("msllm")


def kept_step(program: Program, facts: Mapping[str, Any] | None) -> jax.stages.Compiled:
    """`program.step`, compiled; calling it can never compile again. It is kept in the directory of JAX's compilation cache.

    Only for a command, whose functions are what the files of this package say, and a single process: several have to
    run the same program, and on CPU an executable is of no use to another process. What JAX's cache had is not kept,
    since XLA:CPU can't write again what it has read: such a program fails when it runs.

    Args:
      facts: what decides the program besides this process: config, hashes of the code, and the like. JSON can hold it.
    """
    path = _path(program, facts) if facts else None
    if path is None:
        return compile_step(program.step, program.abstract_state, program.abstract_batch)
    if (step := _load(path, program)) is not None:
        settle()
        return step
    lowered, hits = program.step.lower(program.abstract_state, program.abstract_batch), []
    listen = lambda event, **_: hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None
    jax.monitoring.register_event_listener(listen)
    try:
        compiled = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    if not hits and not code.changed_since_import():
        _keep(path, compiled)
    settle()
    return compiled


def _path(program: Program, facts: Mapping[str, Any]) -> epath.Path | None:
    """Where the step is kept, if it is."""
    folder = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
    if not folder or program.config.compilation_cache == "none" or jax.process_count() > 1:
        return None
    devices = list(program.mesh.devices.flat)
    try:
        topology = xla_client.get_topology_for_devices(devices).fingerprint()  # of a CPU's features too, as in JAX's own key
    except Exception as error:  # whatever a backend says that has no such thing
        log.info("the compiled step is not kept: this platform has no fingerprint (%s)", type(error).__name__)
        return None
    decisive = {
        "facts": facts,
        "config": to_config_dict(program.config).to_dict(),
        "silence": program.silence_id,
        "kernel": program.kernel.__module__,
        "mesh": program.mesh.shape,
        "devices": [(device.id, device.process_index, device.device_kind) for device in devices],
        "arrays": (program.abstract_state, program.abstract_batch),
        "platform": (devices[0].platform, devices[0].client.platform_version, topology),
        "python": sys.version,
        "packages": {name: _version(name) for name in PACKAGES},
        "environment": {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)},
        "jax": {name: value for name, value in jax.config.values.items() if name not in PLACES},
    }
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=repr).encode()).hexdigest()
    return epath.Path(folder) / f"msllm-step-{key}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _load(path: epath.Path, program: Program) -> jax.stages.Compiled | None:
    try:
        content = path.read_bytes()
        digest, stored = content[:32], content[32:]
        if hashlib.sha256(stored).digest() != digest:
            raise ValueError("its checksum differs")
        devices = list(program.mesh.devices.flat)
        load = serialize_executable.deserialize_and_load
        return load(*pickle.loads(stored), backend=devices[0].client, execution_devices=devices)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever storage, pickle and the backend say of a file that is damaged
        log.warning("%s, a compiled step, is of no use (%s): compiling anew", path, _said(error))
        return None


def _keep(path: epath.Path, compiled: jax.stages.Compiled) -> None:
    try:
        stored = pickle.dumps(serialize_executable.serialize(compiled))
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(hashlib.sha256(stored).digest() + stored)
        new.replace(path)
    except Exception as error:  # a platform that cannot, a full disk: the next start compiles, as this one did
        log.warning("the compiled step is not kept in %s (%s)", path.parent, _said(error))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
