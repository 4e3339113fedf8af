"""`msllm bench gpu`: all measurements on one NVIDIA GPU, in one command with a time limit.

This module runs the parts one after another and keeps their results. It never uses the GPU itself:
a worker process does (msllm/bench/gpu_parts.py). The file with the results is written after every
result. A part that fails, or exceeds its time, ends with the worker, and the next part gets a new
one. So a crash of the compiler, a part that hangs or a GPU error costs one part.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msllm.errors import UserError
from msllm.runtime.files import write_atomically

# The parts, most important first, and the most seconds that each may take. A part gets less if the
# command has less left. The names of the training parts are backend_streams.
PARTS: dict[str, int] = {
    "device": 60,  # versions; rates of a matmul and of a copy
    "numerics": 120,  # the attention kernels against the reference
    "train_gpu_s8": 100,
    "train_cudnn_s1": 90,
    "decode": 100,
    "train_dense_s8": 80,
    "attention": 80,  # attention alone: the kernels, cuDNN and the dense mask
    "train_cudnn_mask_s8": 70,
    "train_gpu_s1": 70,
    "tiles": 90,  # other block sizes of the kernels
}
# With small sizes, other parts run the same code.
_NOT_SMALL = {"train_gpu_s1", "train_cudnn_mask_s8"}
# With less time than this left, a part is not started.
_LEAST_SECONDS = 10.0
_STDERR_LINES = 30  # lines of a dead worker's standard error that are kept

WORKER = [
    sys.executable,
    "-c",
    "import sys; from msllm.bench.gpu_parts import main; sys.exit(main())",
]
# What the project aims at.
GOALS = {"mfu": 0.5, "gpu_s8_to_cudnn_s1": 0.9}

_Emit = Callable[[dict[str, Any]], None]


def run(settings: Mapping[str, Any]) -> None:
    """Runs parts, prints a line for each, and writes the results.

    Args:
      settings: those of `runner.SETTINGS["gpu"]`.

    Raises:
      UserError: a setting is wrong, there is no suitable GPU, or a part failed. The results are
        written before.
    """
    minutes, names = settings["minutes"], _parts(settings["parts"], settings["small"])
    if not 0 < minutes <= 24 * 60:
        raise UserError(f"--minutes is {minutes}: must be above 0 and at most {24 * 60}")
    # Resolved now: the file must not depend on what the working directory is later.
    report = _Report(pathlib.Path(settings["json"]).expanduser().resolve(), settings)
    deadline = time.monotonic() + 60 * minutes
    with contextlib.ExitStack() as stack:
        worker: _Worker | None = None
        for name in names:
            seconds = min(PARTS[name], deadline - time.monotonic())
            part = report.begin(name)
            if seconds < _LEAST_SECONDS:
                report.end(part, "skipped", f"--minutes={minutes:g} leaves no time for it")
                continue
            worker = worker or stack.enter_context(_Worker(settings["small"]))
            status, reason = worker.run(name, seconds, report.adder(part))
            report.end(part, status, reason)
            if not worker.usable:
                worker.close()
                worker = None
            if name == "device" and status != "ok":
                raise UserError(f"{_last_line(reason)} (all of it is in {report.path})")
    report.finish()
    if bad := report.failed():
        raise UserError(f"{', '.join(bad)}: failed or not finished; see {report.path}")


def _parts(names: Sequence[str], small: bool) -> list[str]:
    """Returns the named parts in the order of PARTS, with `device` as the first."""
    for name in names:
        if name not in PARTS:
            raise UserError(f"--parts holds {name!r}: must be some of {', '.join(PARTS)}")
    return [
        name for name in PARTS if name in (*names, "device") and not (small and name in _NOT_SMALL)
    ]


class _Worker:
    """A process that runs parts (`gpu_parts.serve`). A context manager that ends the process."""

    def __init__(self, small: bool) -> None:
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")
        command = [*WORKER, json.dumps(small)]
        # The largest part needs more than the share of the memory that jax takes by default.
        defaults = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "TF_CPP_MIN_LOG_LEVEL": "1"}
        self._process = subprocess.Popen(
            command,
            env=defaults | dict(os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            start_new_session=True,  # so that `close` also ends compilers that it started
        )
        # False after an error: the process may be dead, or the GPU's context damaged.
        self.usable = True
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def run(self, name: str, seconds: float, add: _Emit) -> tuple[str, str | None]:
        """Runs a part for at most `seconds`, and passes its results to `add` as they come.

        Returns:
          The status, and the reason of a failure. The status is "failed" with no reason if the part
          ran to its end and a check in it failed.
        """
        deadline, passed = time.monotonic() + seconds, True
        assert self._process.stdin is not None
        # If the process is dead, `_lines` ends.
        with contextlib.suppress(OSError):
            self._process.stdin.write(name + "\n")
            self._process.stdin.flush()
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                self.usable = False
                return "timeout", f"it took more than {seconds:.0f} s\n{self._errors()}"
            if line is None:
                self.usable = False
                status = self._process.wait()
                return "failed", f"its process ended with status {status}\n{self._errors()}"
            result = json.loads(line)
            if "end" in result:
                error = result["end"]
                self.usable = self.usable and not error
                return ("failed", error) if error else ("ok" if passed else "failed", None)
            passed = passed and result.get("passed", True)
            self.usable = self.usable and "error" not in result
            add(result)

    def _errors(self) -> str:
        """Returns the last lines of the process's standard error."""
        self._stderr.flush()
        self._stderr.seek(0)
        return "".join(self._stderr.readlines()[-_STDERR_LINES:])

    def close(self) -> None:
        """Ends the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Report:
    """The results, in a file that is written after every change."""

    def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._begin = time.monotonic()
        self._all: dict[str, Any] = {
            "benchmark": "gpu",
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "small": settings["small"],
            "minutes": settings["minutes"],
            "finished": False,
            "seconds": 0.0,
            "goals": GOALS,
            "summary": {},
            "parts": {},
        }
        self._write()

    def begin(self, name: str) -> dict[str, Any]:
        """Adds a part, and returns its entry."""
        part: dict[str, Any] = {"status": "running", "seconds": 0.0, "results": []}
        self._part_begin = time.monotonic()
        self._all["parts"][name] = part
        self._write()
        return part

    def adder(self, part: dict[str, Any]) -> _Emit:
        """Returns a function that adds a result to a part."""

        def add(result: dict[str, Any]) -> None:
            part["results"].append(result)
            self._write()

        return add

    def end(self, part: dict[str, Any], status: str, reason: str | None) -> None:
        """Ends a part, and prints its line."""
        part["status"] = status
        part["seconds"] = round(time.monotonic() - self._part_begin, 1)
        if reason is not None:
            part["error"] = reason
        (name,) = (name for name, other in self._all["parts"].items() if other is part)
        self._all["summary"] = summarise(self._all["parts"])
        self._write()
        found = [result["line"] for result in part["results"] if "line" in result]
        if reason is not None:
            found.append(_last_line(reason))
        print(f"{name:20}{status:8}{part['seconds']:6.1f} s  {'; '.join(found)}", flush=True)

    def failed(self) -> list[str]:
        """Returns the names of the parts that failed or were not finished."""
        return [name for name, part in self._all["parts"].items() if part["status"] != "ok"]

    def finish(self) -> None:
        """Prints the summary."""
        self._all["finished"] = True
        self._write()
        for name, value in {} if self._all["small"] else self._all["summary"].items():
            goal = f" (goal: {GOALS[name]})" if name in GOALS else ""
            print(f"{name}: {value}{goal}", flush=True)
        print(f"results: {self.path}", flush=True)

    def _write(self) -> None:
        self._all["seconds"] = round(time.monotonic() - self._begin, 1)
        write_atomically(self.path, json.dumps(self._all, indent=1) + "\n")


def _last_line(text: str | None) -> str:
    """Returns the last line of a traceback or an explanation that is not empty."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    # What explains the end of a process comes first; a traceback ends with its error.
    return (lines[-1] if lines[0].startswith("Traceback") else lines[0]) if lines else ""


def summarise(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the figures that the benchmark is for, as far as the parts have them.

    Args:
      parts: the entry of each part that has begun, with its `results`.
    """

    def figure(part: str, name: str) -> Any:
        results = parts.get(part, {}).get("results", ())
        return next((result[name] for result in results if name in result), None)

    summary: dict[str, Any] = {"mfu": figure("train_gpu_s8", "mfu")}
    ours = figure("train_gpu_s8", "tokens_per_second")
    for other in ("cudnn_s1", "dense_s8", "cudnn_mask_s8", "gpu_s1"):
        theirs = figure(f"train_{other}", "tokens_per_second")
        if ours and theirs:
            summary[f"gpu_s8_to_{other}"] = round(ours / theirs, 3)
    for name, result in (
        (f"decode_bandwidth_share_s{result['streams']}", result)
        for result in parts.get("decode", {}).get("results", ())
        if "streams" in result
    ):
        summary[name] = result.get("bandwidth_share")
    return {name: value for name, value in summary.items() if value is not None}
