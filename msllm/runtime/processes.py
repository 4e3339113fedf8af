"""Several processes, one run: they find each other, agree on what they run, stop together and know who is late.

Built on JAX's multi-controller runtime (`jax.distributed`, `jax.experimental.multihost_utils`). In one process all of
it is nearly nothing: the same calls, no waiting.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msllm.errors import RunError, UserError

# Exit statuses besides 0 (complete) and 2 (bad input): after both, the same command continues the run. Out of sysexits.h.
STOPPED = 75  # asked to stop (SIGTERM, preemption): the step was finished and saved
LOST = 76  # another process did not come, or is gone

# Errors of storage that is full, gone or broken: nothing is wrong with the program.
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)


def connect(
    workdir: str | os.PathLike,
    address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wait_seconds: int = 300,
    heartbeat_seconds: int = 100,
) -> None:
    """Joins the processes of the run: those that JAX detects (TPU VMs and GKE, Slurm, Open MPI), or those of the arguments.

    Call it before anything else of JAX. Where nothing is given and no cluster is found, the run is this process alone.
    If not all are there after `wait_seconds`, the process says who is missing and ends with status `LOST`.

    Args:
      workdir: shared by all processes; while they wait, each shows there that it is alive.
      address: HOST:PORT of process 0. num_processes: 1 for this process alone, whatever the cluster.
      heartbeat_seconds: after so long without a sign of life of one process, the others end.
    """
    given = {
        "coordinator_address": address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if num_processes == 1:
        return
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            f"--{missing[0]} is not set: give all of {', '.join('--' + name for name in given)}, or none"
        )
    if process_id is not None and not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id is {process_id}: must be in 0..{num_processes - 1} (--num_processes={num_processes})"
        )
    with _RollCall(epath.Path(workdir) / "waiting", wait_seconds):
        try:
            jax.distributed.initialize(
                **given,
                cluster_detection_method=None if missing else "deactivate",
                initialization_timeout=wait_seconds
                + 30,  # the roll call says more, so it goes first
                heartbeat_timeout_seconds=heartbeat_seconds,
            )
        except ValueError as error:
            if not missing or "coordinator_address should be defined" not in str(error):
                raise UserError(f"cannot join the processes of this run: {error}") from error


class _RollCall:
    """While this process waits for the others, each one keeps changing a file of its own; whose file rests is missing."""

    def __init__(self, folder: epath.Path, seconds: float):
        self._folder, self._seconds = folder, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        # Who this process is, and who else there should be, JAX finds out inside `initialize`, and tells nowhere else.
        from jax._src.distributed import global_state as state

        begin, beat, seen, alive = time.monotonic(), 0, {}, {}
        mine = None
        while not self._done.wait(1.0):
            if not (count := state.num_processes) or count == 1:
                continue
            self._folder.mkdir(parents=True, exist_ok=True)
            mine, beat = self._folder / str(state.process_id), beat + 1
            mine.write_text(f"{socket.gethostname()} {os.getpid()} {beat}")
            for path in self._folder.iterdir():
                said = _text(path)
                if said and seen.setdefault(path.name, said) != said:
                    alive[path.name] = said.split()[0]
                seen[path.name] = said
            if time.monotonic() - begin > self._seconds:
                self._give_up(count, state, alive | {mine.name: socket.gethostname()})
        if mine is not None:
            mine.unlink(missing_ok=True)

    def _give_up(self, count: int, state, alive: dict[str, str]) -> None:
        missing = [str(i) for i in range(count) if str(i) not in alive]
        here = ", ".join(f"{i} on {alive[i]}" for i in sorted(alive, key=int))
        if missing:
            what = f"of {count} processes these have not come: {', '.join(missing)} (here: {here}): look at their logs"
        else:
            what = f"all {count} processes are here ({here}) but do not reach {state.coordinator_address}: is its port open?"
        leave(f"waited {self._seconds:.0f} s in vain: {what}", LOST)


def _text(path: epath.Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:  # whose owner has just joined
        return ""


def leave(message: str, status: int) -> None:
    """Ends this process at once, without waiting for others that may be gone."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def share(value: Any) -> list[Any]:
    """What every process says, in their order. `value`: anything that JSON can hold. All processes must call it."""
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(content.size, np.int32))
    padded = np.pad(content, (0, int(sizes.max()) - content.size))
    everyone = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(everyone, sizes)]


def agree(facts: Mapping[str, Any], error: str | None = None) -> None:
    """Checks that all processes have the same facts, and that none has an error; all must call it.

    Raises UserError in every one of them, naming the process, its host, the hashes of both values, and what differs.

    Args:
      facts: anything that JSON can hold, by name. error: why this process cannot go on; it needs no facts then.
    """
    everyone = share({"host": socket.gethostname(), "facts": dict(facts), "error": error})
    if error:
        raise UserError(error)
    for i, other in enumerate(everyone):
        if other["error"]:
            raise UserError(f"process {i} on {other['host']}: {other['error']}")
    first = everyone[0]
    for i, other in enumerate(everyone):
        for name, here in first["facts"].items():
            there = other["facts"][name]
            if there != here:
                raise UserError(
                    f"process {i} on {other['host']} has another {name} than process 0 on {first['host']}: "
                    f"{_digest(there)} there, {_digest(here)} here{_differences(there, here)}; start all with the same"
                )


@contextlib.contextmanager
def alone_in(workdir: epath.Path) -> Iterator[None]:
    """Keeps other runs out of a workdir. Raises UserError in all processes if one is there."""
    with contextlib.ExitStack() as stack:
        error = None
        if is_first() and "://" not in str(workdir):  # an object store knows no locks
            error = _lock(workdir / "lock", stack)
        agree({}, error)
        yield


def _lock(path: epath.Path, stack: contextlib.ExitStack) -> str | None:
    """Locks a file until `stack` closes or the process ends, however it ends. Returns why it cannot."""
    try:
        file = stack.enter_context(open(path, "a+"))
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        return f"--workdir is {path.parent}, in which {holder} is training: wait for it, stop it, or name another"
    except OSError as error:
        if error.errno in (*STORAGE, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return None  # without room, which is said where it matters, or without locks
        return f"--workdir is {path.parent}, where {path.name} cannot be written ({error}): repair that, or name another"
    with contextlib.suppress(OSError):
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _differences(there: Any, here: Any) -> str:
    there, here = _flat(there), _flat(here)
    names = [
        name
        for name in sorted(there.keys() | here.keys())
        if name and there.get(name) != here.get(name)
    ]
    told = [f"{name} is {there.get(name)!r} there, {here.get(name)!r} here" for name in names[:3]]
    return f" ({'; '.join(told)}{'; and more' if len(names) > 3 else ''})" if told else ""


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {
        name: leaf
        for key in value
        for name, leaf in _flat(value[key], f"{path}.{key}" if path else key).items()
    }


def is_of_others(error: BaseException | None) -> bool:
    """Whether an error comes from a computation or a barrier of several processes that did not come about."""
    while error is not None and jax.process_count() > 1:
        # On CPU a jitted function may fail at once, in Gloo, and with another type.
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            # These two are of this process: devices that are too small, and mistakes.
            return not str(error).startswith(("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"))
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def errors_end_this_process() -> Iterator[None]:
    """In a run of several processes, an error inside ends this process at once: to clean up, as Python does on its way
    out, would be to wait for others, who wait for this one or are gone."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, OSError) and error.errno in STORAGE:
            advice = "make room or repair the storage, and the same command continues from the last checkpoint"
            error = RunError(f"process {jax.process_index()} could not write ({error}): {advice}")
        if jax.process_count() == 1:
            raise error
        if isinstance(error, KeyboardInterrupt):
            leave(f"process {jax.process_index()} was interrupted", 128 + signal.SIGINT)
        if isinstance(error, UserError | RunError):
            leave(str(error), 2 if isinstance(error, UserError) else 1)
        if not is_of_others(error):
            traceback.print_exc()
            leave(f"{type(error).__name__} in process {jax.process_index()}: see above", 1)
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        leave(
            f"process {jax.process_index()}: a step was not completed ({reason}): most likely another process is gone, see "
            "their logs; the same command continues from the last checkpoint",
            LOST,
        )


class Stop:
    """The wish to stop: Ctrl-C, SIGTERM, or a preemption notice, in any of the processes.

    A context manager: inside it, signals are heard and not obeyed; a second Ctrl-C interrupts at once.

    Attributes:
      interrupted: somebody pressed Ctrl-C, in any of the processes, so nobody should start the run again.
    """

    def __init__(self):
        self.interrupted = False
        self._heard, self._previous = False, {}

    def __enter__(self) -> Stop:
        try:
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if jax.process_count() == 1:
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminate)
            # Among several processes, JAX's preemption service has its own handler of SIGTERM.
        except ValueError:  # not in the main thread (a notebook's worker): no handlers
            pass
        return self

    def __exit__(self, *_) -> None:
        for number, old in self._previous.items():
            signal.signal(number, old)

    def _interrupt(self, number, frame) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    def _terminate(self, number, frame) -> None:
        self._heard = True

    def at(self, step: int) -> bool:
        """Whether the run stops after `step`: the same answer in all processes. To be called once for every step."""
        if jax.process_count() == 1:
            return self._heard
        reached = multihost_utils.reached_preemption_sync_point(step)
        if reached:
            self.interrupted = any(share(self.interrupted))
        return reached


class Gather:
    """Small arrays of every process, for every process. They travel as a small computation of their own behind the step
    that was given to the devices before, so that nobody waits for them."""

    def __init__(self):
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("process", "device"))
        self._mine = NamedSharding(mesh, PartitionSpec("process"))
        self._gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, mine: np.ndarray) -> jax.Array | np.ndarray:
        """[1, ...] of this process -> [processes, ...], on its way: read it after the next step is dispatched."""
        count = jax.process_count()
        if count == 1:
            return mine
        return self._gather(
            jax.make_array_from_process_local_data(self._mine, mine, (count, *mine.shape[1:]))
        )


class Clocks:
    """When each process gave a step to its devices."""

    def __init__(self):
        """All processes must call it, at the same time: their clocks start here."""
        self.hosts = share(socket.gethostname())
        self._gather = Gather()
        self._zero = time.monotonic()

    def read(self) -> jax.Array | np.ndarray:
        """[processes] int32 milliseconds since the start; on its way, so read it after the next step is dispatched."""
        return self._gather(np.array([(time.monotonic() - self._zero) * 1000], np.int32))

    def latest(self, times: np.ndarray) -> tuple[str, float]:
        """(name of the last process, seconds it came after the median of the others)."""
        last = int(np.argmax(times))
        others = np.delete(times, last)
        late = float(times[last] - np.median(others)) / 1000 if len(others) else 0.0
        return f"process {last} on {self.hosts[last]}", late
