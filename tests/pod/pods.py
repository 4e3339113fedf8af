"""Pods on one machine: processes of `msllm train` that talk over the loopback device."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
from runs import metrics, write_config_file

from msllm.config import Config, default_config, from_config_dict
from msllm.data.prepare import prepare

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
STEPS = 24
HEARTBEAT = 10  # seconds
START = 180  # seconds that a start, including compilation, may take on a busy machine
# Statuses of a process that has lost another one: msllm's own, or an abort by JAX's runtime.
PEER_LOST = (76, -signal.SIGABRT)
SETTINGS = {
    "steps": STEPS,
    "log_every": 1,
    "eval_every": STEPS,
    "eval_batches": 1,
    "data.converter": "dictation",
    "data.options": {"examples": 1200},
    "data.tokenizer.model_type": "word",
    "data.tokenizer.vocab_size": 128,
    "data.rows": 96,
    "data.batch_size": 8,
    "data.eval_percent": 5.0,
    "model.d_model": 32,
    "model.num_layers": 1,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.d_ff": 64,
    "model.vocab_size": 128,
    "optim.lr": 1e-3,
    "optim.warmup_steps": 5,
    "mesh.data": 1,
    "mesh.fsdp": -1,  # shards parameters, so that every process writes a part of each checkpoint
    "checkpoint.every": 4,
    "checkpoint.keep_last": 4,
    "monitor.examples": True,
}


def make_config(**dotted) -> Config:
    """The config of all pods, with changes; keys are dotted."""
    result = default_config()
    result.update_from_flattened_dict(SETTINGS | dotted)
    return from_config_dict(result)


def make_files(folder: pathlib.Path, **dotted) -> pathlib.Path:
    """Prepares `folder`/data and writes `folder`/config.py, with paths relative to `folder`."""
    config = make_config(**{"compilation_cache": str(folder / "compiled")} | dotted)
    prepare(config, folder / "data")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, dir="data"))
    write_config_file(folder / "config.py", config)
    return folder


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits for a condition; fails if it does not become true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.002)


class Pod:
    """The processes of one run. A context manager that kills them when it ends."""

    def __init__(
        self,
        files: pathlib.Path,
        workdir: pathlib.Path,
        *options: str,
        processes: int = 2,
        devices: int = 1,
        absent: Sequence[int] = (),
        own: dict[int, Sequence[str]] | None = None,
        folders: dict[int, pathlib.Path] | None = None,
        prefix: Sequence[str] = (),
        limits: Callable[[], None] | None = None,
        wait_seconds: int = 60,
        pipe: int | None = None,
    ):
        """Starts the processes.

        Args:
          files: folder written by `make_files`.
          workdir: workdir of the run.
          options: further arguments of each command.
          processes: number of processes.
          devices: number of devices of each process.
          absent: ids of processes that are not started.
          own: {process id: further arguments}.
          folders: {process id: working folder, instead of `files`}.
          prefix: words before each command.
          limits: called in each process before the command.
          wait_seconds: how long the processes wait for each other.
          pipe: id of the process whose output `hold_output` can hold.
        """
        self.files, self.workdir, self.options = files, workdir, options
        flags = (
            f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        )
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
        environment = inherited | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            "PYTHONPATH": str(ROOT),
        }
        logs = workdir.parent / f"{workdir.name}-logs"
        logs.mkdir(parents=True, exist_ok=True)
        attempt = len({path.name.split("-")[0] for path in logs.iterdir()}) + 1
        self._started, self._pipe = time.time(), None
        self._processes: dict[int, subprocess.Popen] = {}
        self._paths = {i: logs / f"{attempt:03d}-process-{i}.log" for i in range(processes)}
        port = _free_port()
        for i in set(range(processes)) - set(absent):
            command = [*prefix, sys.executable, "-m", "msllm", "train"]
            command += [
                f"--config={files / 'config.py'}",
                f"--workdir={workdir}",
                f"--num_processes={processes}",
                f"--heartbeat_timeout={HEARTBEAT}",
                f"--initialization_timeout={wait_seconds}",
            ]
            if processes > 1:
                command += [f"--coordinator_address=127.0.0.1:{port}", f"--process_id={i}"]
            command += [*options, *(own or {}).get(i, ())]
            with _Pipe(self._paths[i]) if i == pipe else self._paths[i].open("w") as log:
                self._pipe = log if i == pipe else self._pipe
                self._processes[i] = subprocess.Popen(
                    command,
                    cwd=(folders or {}).get(i, files),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=limits,
                )

    def __enter__(self) -> Pod:
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    @property
    def logs(self) -> list[str]:
        """The output (stdout and stderr) of each process."""
        return [path.read_text() if path.exists() else "" for path in self._paths.values()]

    @property
    def alive(self) -> list[int]:
        """Ids of the processes that are running."""
        return [i for i, process in self._processes.items() if process.poll() is None]

    def signal(self, number: int, *which: int) -> None:
        """Sends a signal to the processes with ids `which`; to all if none is given."""
        for i in which or self._processes:
            if self._processes[i].poll() is None:
                self._processes[i].send_signal(number)

    def step(self, process: int) -> int:
        """The last step that a process has dispatched since this start; -1 before the first."""
        path = self.workdir / "examples" / f"process-{process:05d}.jsonl"
        if not path.exists() or path.stat().st_mtime < self._started:
            return -1
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().split(b"\n")
        if len(lines) > 1 and lines[-2].startswith(b'{"step"'):  # the last complete line
            return json.loads(lines[-2])["step"]
        return -1

    def hold_output(self, seconds: float) -> None:
        """Stops reading the output of the process `pipe` for some seconds, so that it blocks."""
        self._pipe.hold(seconds)

    def reach(self, step: int, seconds: float = START, process: int = 0) -> None:
        """Waits until a process has dispatched `step`."""
        self.wait_for(
            lambda: self.step(process) >= step, seconds, f"step {step} in process {process}"
        )

    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        folder = self.workdir / "checkpoints"
        return folder.exists() and any(
            "orbax-checkpoint-tmp" in name for name in os.listdir(folder)
        )

    def stop_while_writing(self) -> None:
        """Stops all processes (SIGSTOP) while a checkpoint is incomplete."""

        def stopped() -> bool:
            self.wait_for(self.writing, 60, "a checkpoint being written")
            self.signal(signal.SIGSTOP)
            time.sleep(0.02)  # the signal takes effect a little later
            if not self.writing():
                self.signal(signal.SIGCONT)
            return self.writing()

        self.wait_for(stopped, 60, "all processes stopped while they write a checkpoint")

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Waits for a condition.

        Fails with the ends of the logs if the condition does not become true in time, or if all
        processes end first.
        """
        try:
            wait_for(lambda: condition() or not self.alive, seconds, what)
            assert condition(), f"all processes ended before {what}"
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_ends()}") from None

    def wait(self, seconds: float = START) -> list[int]:
        """Waits for the end of all processes and returns their exit statuses.

        A negative status is a signal. Fails if a process does not end in time.
        """
        try:
            wait_for(lambda: not self.alive, seconds, f"the end of processes {self.alive}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_ends()}") from None
        return [process.returncode for process in self._processes.values()]

    def log_ends(self) -> str:
        """The status and the last lines of each process."""
        statuses = {i: process.poll() for i, process in self._processes.items()}
        ends = [
            f"--- process {i}, status {statuses.get(i)}:\n{log[-3000:]}"
            for i, log in enumerate(self.logs)
        ]
        return "\n".join(ends)

    def expect_end(self, *statuses: int | tuple[int, ...], seconds: float = START) -> list[str]:
        """Waits for the end of all processes, checks their statuses and returns the logs.

        Args:
          statuses: the expected exit status of each process; a tuple allows several.
          seconds: how long to wait.
        """
        found = self.wait(seconds)
        for status, allowed in zip(found, statuses, strict=True):
            allowed = allowed if isinstance(allowed, tuple) else (allowed,)
            assert status in allowed, f"statuses are {found}, not {statuses}\n{self.log_ends()}"
        return self.logs


class _Pipe:
    """A pipe whose content is copied to a file, except while `hold` fills it up."""

    def __init__(self, path: pathlib.Path):
        self._read, self._write = os.pipe()
        self._path, self._open = path, threading.Event()
        self._open.set()
        threading.Thread(target=self._copy, daemon=True).start()

    def fileno(self) -> int:
        return self._write

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *_) -> None:
        os.close(self._write)  # the process has a duplicate

    def _copy(self) -> None:
        with (
            self._path.open("wb", buffering=0) as file,
            open(self._read, "rb", buffering=0) as pipe,
        ):
            while self._open.wait() and (text := pipe.read(65536)):
                file.write(text.replace(b"\0", b""))

    def hold(self, seconds: float) -> None:
        """Keeps the pipe full, so that the process blocks when it writes."""
        self._open.clear()
        filling = os.open(f"/proc/self/fd/{self._read}", os.O_WRONLY | os.O_NONBLOCK)
        try:
            begin = time.monotonic()
            while time.monotonic() - begin < seconds:
                for size in (4096, 1):  # full pages, then the rest of the last page
                    with contextlib.suppress(BlockingIOError):  # the pipe is full
                        while True:
                            os.write(filling, bytes(size))
                time.sleep(0.01)
        finally:
            os.close(filling)
            self._open.set()


def _free_port() -> int:
    """A free port below the range from which the kernel assigns ports."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port


@dataclasses.dataclass
class Run:
    """The records of a run.

    Attributes:
      examples: {step: {row of the batch: the tuples of example ids that were logged for it}}. A
        correct run has one tuple for each row, however often it repeats the step.
      losses: {step: reported training losses, one for each time that the step was done}.
      evaluations: the same for the held-out losses.
      checksums: checksums of the arrays of the last checkpoint.
    """

    examples: dict[int, dict[int, set[tuple[str, ...]]]]
    losses: dict[int, list[float]]
    evaluations: dict[int, list[float]]
    checksums: dict[str, dict[str, int]]


def saved(workdir: pathlib.Path) -> list[int]:
    """The steps of the complete checkpoints, in ascending order."""
    folder = workdir / "checkpoints"
    if not folder.exists():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def read_run(workdir: pathlib.Path) -> Run:
    """Reads the records of a run."""
    run = Run({}, {}, {}, {})
    for path in sorted((workdir / "examples").iterdir()):
        for line in path.read_text().splitlines():
            logged = json.loads(line)
            rows = run.examples.setdefault(logged["step"], {})
            for row, ids in zip(range(*logged["rows"]), logged["examples"], strict=True):
                rows.setdefault(row, set()).add(tuple(ids))
    for line in metrics(workdir):
        for name, values in (("loss", run.losses), ("eval/loss", run.evaluations)):
            if name in line:
                values.setdefault(line["step"], []).append(line[name])
    last = workdir / "checkpoints" / str(saved(workdir)[-1])
    run.checksums = json.loads((last / "description" / "metadata").read_text())["checksums"]
    return run


def assert_same_run(workdir: pathlib.Path, reference: Run, exact: bool) -> Run:
    """Checks that a finished run has the examples and losses of `reference` at every step.

    Args:
      workdir: workdir of the run.
      reference: the run to compare with.
      exact: compare losses and the arrays of the last checkpoint bit by bit. Otherwise losses may
        differ by as much as another order of summation changes them.

    Returns:
      The records of the run.
    """
    run = read_run(workdir)
    assert run.examples == reference.examples  # also in steps that were repeated
    for name in ("losses", "evaluations"):
        found, expected = getattr(run, name), getattr(reference, name)
        assert found.keys() == expected.keys(), name
        for step, values in found.items():
            np.testing.assert_allclose(
                values,
                expected[step][0],
                rtol=0 if exact else 1e-4,
                err_msg=f"{name} of step {step}",
            )
    if exact:
        assert run.checksums == reference.checksums
    return run
