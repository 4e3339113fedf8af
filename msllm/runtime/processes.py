"""Runs of several processes: joining, agreeing, stopping together, and failing.

This module builds on JAX's multi-controller runtime (`jax.distributed` and
`jax.experimental.multihost_utils`). In a run of one process the same calls return at once.
"""

from __future__ import annotations

import contextlib
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
from types import FrameType
from typing import Any, NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msllm.errors import RunError, UserError
from msllm.runtime.environment import jax_has_started
from msllm.runtime.files import STORAGE_ERRORS, lock_file

# Exit statuses besides 0 (complete), 1 (failed) and 2 (invalid input). After these two the same
# command continues the run. The numbers are EX_TEMPFAIL and EX_PROTOCOL of sysexits.h.
EXIT_STOPPED = 75  # stopped early (SIGTERM, preemption), after saving a checkpoint
EXIT_PEER_LOST = 76  # another process did not join, or was lost


def connect(
    workdir: str | os.PathLike,
    address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wait_seconds: int = 300,
    heartbeat_seconds: int = 100,
) -> None:
    """Joins the other processes of the run.

    JAX detects them on TPU VMs, GKE, Slurm and Open MPI. Elsewhere the arguments describe them.
    Without arguments and outside a cluster, the run is this process alone. Call this before any
    other function of JAX. If some processes have not joined after `wait_seconds`, this process
    names them and ends with status EXIT_PEER_LOST.

    Args:
      workdir: a folder that all processes share. Waiting processes show there that they are alive.
      address: HOST:PORT of process 0.
      num_processes: number of processes; 1: this process alone, even on a cluster.
      process_id: index of this process.
      wait_seconds: how long to wait for the others.
      heartbeat_seconds: a process that has been silent for this long counts as lost.

    Raises:
      UserError: the arguments contradict each other, the address cannot be used, or JAX has
        already started.
    """
    given: dict[str, Any] = {
        "coordinator_address": address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if num_processes == 1:
        return
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        names = ", ".join("--" + name for name in given)
        raise UserError(f"--{missing[0]} is not set: give all of {names}, or none")
    if process_id is not None and num_processes and not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id is {process_id}: must be in 0..{num_processes - 1}"
            f" (--num_processes={num_processes})"
        )
    if jax_has_started():
        raise UserError(
            "jax has already started in this process, so it cannot join others: give"
            " --num_processes=1 to train in this process alone, or run the command in a new process"
        )
    with _JoinWatch(epath.Path(workdir) / "waiting", wait_seconds):
        try:
            jax.distributed.initialize(
                **given,
                cluster_detection_method=None if missing else "deactivate",
                # _JoinWatch gives up first, with a message that names the missing processes.
                initialization_timeout=wait_seconds + 30,
                heartbeat_timeout_seconds=heartbeat_seconds,
            )
        except ValueError as error:
            no_cluster = missing and "coordinator_address should be defined" in str(error)
            if not no_cluster:
                raise UserError(f"cannot join the processes of this run: {error}") from error


class _JoinWatch:
    """Names the processes that do not join.

    When JAX's own timeout expires, JAX aborts with "Deadline Exceeded" and does not say which
    process is missing. So each waiting process keeps rewriting a file in a shared folder. A process
    whose file does not change is missing.
    """

    def __init__(self, folder: epath.Path, seconds: float):
        self._folder, self._seconds = folder, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        # On a cluster `jax.distributed.initialize` detects the number of processes and the index of
        # this one. There is no public way to read them before all processes have joined.
        from jax._src.distributed import global_state as state

        begin, beat = time.monotonic(), 0
        last_text: dict[str, str] = {}  # of the file of each process
        hosts: dict[str, str] = {}  # of each process whose file has changed
        own_file = None
        while not self._done.wait(1.0):
            if not state.num_processes or state.num_processes == 1:
                continue
            self._folder.mkdir(parents=True, exist_ok=True)
            own_file, beat = self._folder / str(state.process_id), beat + 1
            own_file.write_text(f"{socket.gethostname()} {os.getpid()} {beat}")
            for path in self._folder.iterdir():
                text = _read_text(path)
                if text and last_text.setdefault(path.name, text) != text:
                    hosts[path.name] = text.split()[0]
                last_text[path.name] = text
            if time.monotonic() - begin > self._seconds:
                self._give_up(state, hosts | {own_file.name: socket.gethostname()})
        if own_file is not None:
            own_file.unlink(missing_ok=True)

    def _give_up(self, state: Any, hosts: dict[str, str]) -> None:
        count = state.num_processes
        missing = [str(i) for i in range(count) if str(i) not in hosts]
        joined = ", ".join(f"{i} on {hosts[i]}" for i in sorted(hosts, key=int))
        if missing:
            problem = (
                f"of {count} processes these did not join: {', '.join(missing)}"
                f" (waiting: {joined}): look at their logs"
            )
        else:
            problem = (
                f"all {count} processes are waiting ({joined}), but do not reach"
                f" {state.coordinator_address}: is its port open?"
            )
        exit_process(f"gave up after {self._seconds:.0f} s: {problem}", EXIT_PEER_LOST)


def _read_text(path: epath.Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:  # the process has joined and removed its file
        return ""


def exit_process(message: str, status: int) -> NoReturn:
    """Prints an error and ends this process at once, without waiting for other processes."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def is_primary() -> bool:
    """Whether this is process 0, which writes the files that a run has only once."""
    return jax.process_index() == 0


def all_gather_json(value: Any) -> list[Any]:
    """The values of all processes, in the order of their indices. All processes must call this.

    Args:
      value: the value of this process, anything that JSON can hold.
    """
    if jax.process_count() == 1:
        return [value]
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(content.size, np.int32))
    padded = np.pad(content, (0, int(sizes.max()) - content.size))
    gathered = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:size])) for row, size in zip(gathered, sizes)]


def check_same_everywhere(facts: Mapping[str, Any], error: str | None = None) -> None:
    """Checks that all processes have the same facts and that none has an error.

    All processes must call this.

    Args:
      facts: values that JSON can hold, by name.
      error: why this process cannot continue. Its facts are then ignored.

    Raises:
      UserError: in every process, if one has an error or different facts. The message names the
        process, its host, the hashes of both values and what differs.
    """
    everyone = all_gather_json({"host": socket.gethostname(), "facts": dict(facts), "error": error})
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
                    f"process {i} on {other['host']} has another {name} than process 0 on"
                    f" {first['host']}: {_digest(there)} there, {_digest(here)}"
                    f" here{_differences(there, here)}; start all with the same"
                )


@contextlib.contextmanager
def exclusive_workdir(workdir: epath.Path) -> Iterator[None]:
    """Keeps other runs out of a workdir with a lock file. All processes must call this.

    Object stores have no locks, so nothing is checked there.

    Raises:
      UserError: in all processes, if another run holds the lock.
    """
    with contextlib.ExitStack() as stack:
        error = None
        if is_primary() and "://" not in str(workdir):
            error = _lock(workdir, stack)
        check_same_everywhere({}, error)
        yield


def _lock(workdir: epath.Path, stack: contextlib.ExitStack) -> str | None:
    """Locks a workdir until `stack` closes or the process ends. Returns the error if it cannot."""
    try:
        holder = stack.enter_context(lock_file(workdir / "lock"))
    except OSError as error:
        return (
            f"--workdir is {workdir}, where lock cannot be written ({error}): repair that, or"
            " choose another"
        )
    if holder is None:
        return None
    return (
        f"--workdir is {workdir}, in which {holder} is training: wait for it, stop it, or choose"
        " another"
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _differences(there: Any, here: Any) -> str:
    there, here = _flatten(there), _flatten(here)
    names = [
        name
        for name in sorted(there.keys() | here.keys())
        if name and there.get(name) != here.get(name)
    ]
    shown = [f"{name} is {there.get(name)!r} there, {here.get(name)!r} here" for name in names[:3]]
    return f" ({'; '.join(shown)}{'; and more' if len(names) > 3 else ''})" if shown else ""


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    result: dict[str, Any] = {}
    for key in value:
        result |= _flatten(value[key], f"{path}.{key}" if path else key)
    return result


def is_peer_failure(error: BaseException | None) -> bool:
    """Whether an error says that a computation or barrier of several processes did not complete.

    The most likely cause is that another process was lost.
    """
    while error is not None and jax.process_count() > 1:
        # On CPU a jitted function may fail at once, inside Gloo, with another type of error.
        if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error):
            # These two come from this process: out of device memory, or a bug.
            return not str(error).startswith(("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"))
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """In a run of several processes, ends this process at once if an error is raised inside.

    Python's ordinary exit would first clean up, and wait for processes that wait for this one or
    are lost. In a run of one process, the error is raised.

    Raises:
      RunError: in place of a storage error, in a run of one process.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        index = jax.process_index()
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            error = RunError(
                f"process {index} could not write ({error}): make room or repair the storage, and"
                " the same command continues from the last checkpoint"
            )
        if jax.process_count() == 1:
            raise error
        if isinstance(error, KeyboardInterrupt):
            exit_process(f"process {index} was interrupted", 128 + signal.SIGINT)
        if isinstance(error, UserError | RunError):
            exit_process(str(error), 2 if isinstance(error, UserError) else 1)
        if not is_peer_failure(error):
            traceback.print_exc()
            exit_process(f"{type(error).__name__} in process {index}: see above", 1)
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        exit_process(
            f"process {index}: a step was not completed ({reason}): most likely another process is"
            " gone, see their logs; the same command continues from the last checkpoint",
            EXIT_PEER_LOST,
        )


class StopSignal:
    """Decides when a run stops early: on Ctrl-C, SIGTERM, a hang-up or a preemption notice.

    Any process may get it. This is a context manager. Inside it these signals do not interrupt the
    program, except for a second Ctrl-C.

    Attributes:
      interrupted: whether Ctrl-C was pressed in any process. A launcher should not restart such a
        run.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._requested = False
        self._previous: dict[int, Any] = {}  # handlers

    def __enter__(self) -> StopSignal:
        try:
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
                self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._hang_up)
            if jax.process_count() == 1:
                self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminate)
            # With several processes, JAX's preemption service handles SIGTERM.
        except ValueError:  # outside the main thread, as in some notebooks
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.kill(os.getpid(), signal.SIGTERM)

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def should_stop(self, step: int) -> bool:
        """Whether all processes stop after `step`. Every process must call this once per step."""
        if jax.process_count() == 1:
            return self._requested
        stopping = multihost_utils.reached_preemption_sync_point(step)
        if stopping:
            self.interrupted = any(all_gather_json(self.interrupted))
        return stopping


class AsyncAllGather:
    """Gathers small arrays from all processes without waiting.

    The gather is a small computation of its own. The devices run it after the step that was
    dispatched before it.
    """

    def __init__(self) -> None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        grid = np.array(devices).reshape(jax.process_count(), -1)
        mesh = Mesh(grid, ("process", "device"))
        self._local = NamedSharding(mesh, PartitionSpec("process"))
        replicated = NamedSharding(mesh, PartitionSpec())
        self._gather = jax.jit(lambda x: x, out_shardings=replicated)

    def __call__(self, local: np.ndarray) -> jax.Array | np.ndarray:
        """[1, ...] of this process -> [processes, ...]. Read it after the next step's dispatch."""
        count = jax.process_count()
        if count == 1:
            return local
        shape = (count, *local.shape[1:])
        return self._gather(jax.make_array_from_process_local_data(self._local, local, shape))


class DispatchClocks:
    """When each process dispatched a step to its devices.

    Attributes:
      hosts: the host name of each process.
    """

    def __init__(self) -> None:
        """Starts the clocks of all processes, which must call this at the same time."""
        self.hosts = all_gather_json(socket.gethostname())
        self._gather = AsyncAllGather()
        self._start = time.monotonic()

    def read(self) -> jax.Array | np.ndarray:
        """Reads the clocks of all processes.

        Returns:
          [processes] int32, milliseconds since the start. Read it after the next step's dispatch.
        """
        return self._gather(np.array([(time.monotonic() - self._start) * 1000], np.int32))

    def latest(self, times: np.ndarray) -> tuple[str, float]:
        """The process that was last, and how many seconds after the median of the others."""
        last = int(np.argmax(times))
        others = np.delete(times, last)
        late = float(times[last] - np.median(others)) / 1000 if len(others) else 0.0
        return f"process {last} on {self.hosts[last]}", late
