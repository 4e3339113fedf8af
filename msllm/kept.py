"""The compiled step of a run, kept for its next start, which then neither traces, lowers nor compiles it.

JAX's compilation cache is asked with a program, and to trace and lower that takes longer than to load what the cache has.
So the step itself is kept beside it, under the hash of all that decides it. As in that cache, what is loaded is machine
code: who may write there decides what runs here.
"""

from __future__ import annotations

import contextlib
import hashlib
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
from msllm.config import to_config_dict
from msllm.runtime import processes
from msllm.runtime.compiler import settle
from msllm.step import Program

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "ml_dtypes", "libtpu")
ENVIRONMENT = ("XLA_", "LIBTPU_", "PJRT_", "TF_", "NVIDIA_TF32_")  # what compilers read begins so
# Where things lie decides no program: a workdir can be moved.
PLACES = ("jax_compilation_cache_dir",)

log = logging.getLogger("msllm")


def kept_step(program: Program, facts: Mapping[str, Any] | None) -> jax.stages.Compiled:
    """`program.step`, compiled; calling it can never compile again. It is kept in the directory of JAX's compilation cache.

    All processes of a run must call it. All load or all compile: with another program in some of them, they could wait for
    each other for ever. The first one keeps it for all; on CPU, whose fingerprint differs by process, each one its own.
    What JAX's cache had is not kept: XLA:CPU cannot write again what it has read, and the program fails when it runs.

    Args:
      facts: what decides the program besides machine and versions: config, hashes of the code, and the like, which JSON
        can hold. None: nothing is kept, because this process may run other code than that of the files.
    """
    path = _path(program, facts) if facts else None
    step = _load(path, program) if path else None
    names, found = zip(*processes.share([path and path.name, step is not None]))
    if all(found):
        log.info("the step was compiled by an earlier start")
        settle()
        return step
    lowered, hits = program.step.lower(program.abstract_state, program.abstract_batch), []

    def listen(event, **_):
        return hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None

    jax.monitoring.register_event_listener(listen)
    try:
        compiled = lowered.compile()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    if (
        path
        and names.index(path.name) == jax.process_index()
        and not hits
        and not code.changed_since_import()
    ):
        _keep(path, compiled)
    settle()
    return compiled


def _path(program: Program, facts: Mapping[str, Any]) -> epath.Path | None:
    """Where the step is kept, if it is."""
    folder = (
        jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
    )
    if not folder or program.config.compilation_cache == "none":
        return None
    try:
        decisive = json.dumps(_decisive(program, facts), sort_keys=True, default=repr)
    except Exception as error:  # of a platform or version that lacks a part of it
        log.warning("the compiled step is not kept (%s)", _said(error))
        return None
    return epath.Path(folder) / f"msllm-step-{hashlib.sha256(decisive.encode()).hexdigest()}"


def _decisive(program: Program, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the compiled step, on this machine."""
    devices = list(program.mesh.devices.flat)
    return {
        "facts": facts,
        "config": to_config_dict(program.config).to_dict(),
        "silence": program.silence_id,
        "kernel": program.kernel.__module__,
        "mesh": program.mesh.shape,
        "devices": [(device.id, device.process_index, device.device_kind) for device in devices],
        "arrays": (program.abstract_state, program.abstract_batch),
        "platform": (
            devices[0].platform,
            devices[0].client.platform_version,
            _fingerprint(devices),
        ),
        "python": sys.version,
        "packages": {
            name: getattr(sys.modules.get(name), "__version__", None) for name in PACKAGES
        },
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)
        },
        "jax": {name: value for name, value in jax.config.values.items() if name not in PLACES},
    }


def _fingerprint(devices: list[jax.Device]) -> int | None:
    """What JAX's own cache tells machines apart by: for a CPU, its instructions, and the ids of this process' devices."""
    try:
        return xla_client.get_topology_for_devices(devices).fingerprint()
    except jax.errors.JaxRuntimeError:
        if devices[0].platform == "cpu":
            raise
        return None  # as in JAX's own cache: the kinds of the devices suffice


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
    except (
        Exception
    ) as error:  # whatever storage, pickle and the backend say of a file that is damaged
        log.warning(
            "%s, a compiled step, cannot be used (%s): compiling; remove it if it stays so",
            path,
            _said(error),
        )
        return None


def _keep(path: epath.Path, compiled: jax.stages.Compiled) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        stored = pickle.dumps(serialize_executable.serialize(compiled))
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(hashlib.sha256(stored).digest() + stored)
        new.replace(path)
    except (
        Exception
    ) as error:  # a platform that cannot, a full disk: the next start compiles, as this one did
        log.warning("the compiled step is not kept in %s (%s)", path.parent, _said(error))
        with contextlib.suppress(Exception):
            new.unlink(missing_ok=True)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
