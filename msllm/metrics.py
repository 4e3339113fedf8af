"""Metrics of a run: from the step's sums to named numbers, and where they are written."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

import jax
import numpy as np
from etils import epath

from msllm.data.mixture import Plan
from msllm.errors import UserError
from msllm.runtime.files import write_atomically
from msllm.runtime.processes import AsyncAllGather, is_primary
from msllm.streams import StreamSpec


def named_losses(sums: Mapping[str, Any], streams: StreamSpec) -> dict[str, float]:
    """Mean negative log-likelihood (nats per target) of each stream that was computed, over all targets and over those
    that are not silence: `nll/output`, `nll_spoken/output`; and `loss_spoken`, the weighted mean of the latter."""
    result = {}
    for kind, count in (("nll", "targets"), ("nll_spoken", "targets_spoken")):
        totals, counts = np.asarray(sums[kind]), np.asarray(sums[count])
        for s, name in enumerate(streams.names):
            if counts[s] > 0:
                result[f"{kind}/{name}"] = float(totals[s] / counts[s])
    weights = np.array(streams.loss_weights)
    spoken = float(np.sum(weights * np.asarray(sums["targets_spoken"])))
    if spoken > 0:
        result["loss_spoken"] = float(np.sum(weights * np.asarray(sums["nll_spoken"]))) / spoken
    return result


class Shares:
    """Counts which source of a mixture the chosen tokens of the steps come from, over all processes."""

    def __init__(self, plan: Plan, chosen: Sequence[str], streams: StreamSpec, silence_id: int):
        """`chosen`: the streams whose tokens count; empty: all."""
        self._plan, self._silence_id = plan, silence_id
        self._columns = [streams.names.index(name) for name in chosen or streams.names]
        self._gather = AsyncAllGather()
        self._counts, self._targets, self._steps = (
            np.zeros(len(plan.names)),
            np.zeros(len(plan.names)),
            0,
        )

    def read(self, tables: Mapping[str, np.ndarray], sources: Sequence[int]) -> Any:
        """[processes, sources] int32: chosen tokens of a step by source, on their way.

        Args:
          tables: tokens and present [b, T, S], those of this process. sources: [b] the number of each one's source.
        """
        spoken = tables["present"] & (tables["tokens"] != self._silence_id)
        counts = np.bincount(
            sources, spoken[:, :, self._columns].sum((1, 2)), len(self._plan.names)
        )
        return self._gather(counts.astype(np.int32)[None])

    def add(self, step: int, counts: np.ndarray) -> None:
        """Takes what `read` gave for a step."""
        self._counts += counts.sum(0)
        self._targets += self._plan.targets(step)
        self._steps += 1

    def values(self, done: int) -> dict[str, float]:
        """Of each source: its share of the chosen tokens of the steps since the last call, what that should be, and how
        often it has been read after `done` steps."""
        share, target = self._counts / max(1, self._counts.sum()), self._targets / self._steps
        per_source = {"share": share, "target": target, "epoch": self._plan.epochs(done)}
        self._counts, self._targets, self._steps = 0 * self._counts, 0 * self._targets, 0
        names = self._plan.names
        return {
            f"mixture/{name}/{kind}": float(x[k])
            for k, name in enumerate(names)
            for kind, x in per_source.items()
        }


def weighted_mean(
    parts: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]
) -> dict[str, float]:
    """The mean of the values of several sources {name: {metric: value}} by their weights. A metric that not all have is
    the mean of those that have it; one for which all weights are 0 is left out."""
    result = {}
    for metric in dict.fromkeys(metric for values in parts.values() for metric in values):
        having = [name for name in parts if metric in parts[name]]
        total = sum(weights[name] for name in having)
        if total:
            result[metric] = sum(weights[name] * parts[name][metric] for name in having) / total
    return result


def memory_mib() -> float:
    """Memory of the first local device in MiB, or of this process where the device does not tell (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["bytes_in_use"] / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Writer:
    """Writes named numbers to TensorBoard event files and to `metrics.jsonl`, one line a call, in a workdir; and to
    Weights & Biases if asked to. In a run of several processes, the first one writes."""

    def __init__(self, workdir: epath.Path, wandb_project: str = ""):
        """Raises UserError if Weights & Biases is asked for and not installed."""
        self._sinks = []
        if is_primary():
            self._sinks = [_Lines(workdir / "metrics.jsonl"), _TensorBoard(workdir / "tensorboard")]
            self._sinks += [_Wandb(wandb_project, workdir)] if wandb_project else []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """`step`: steps done when the values were measured."""
        for sink in self._sinks:
            sink.write(step, values)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def append_lines(path: epath.Path) -> IO[str]:
    """A file that is opened to append lines. A last line that was not written whole, on a full disk say, is left out."""
    content = path.read_bytes() if path.exists() else b""
    file = path.open("a")
    file.truncate(content.rfind(b"\n") + 1)
    return file


class _Lines:
    """A file of JSON lines. Object stores cannot append: there it is written anew, now and then."""

    def __init__(self, path: epath.Path, seconds: float = 30.0):
        self._path, self._remote = path, "://" in str(path)
        self._text = path.read_text() if self._remote and path.exists() else ""
        self._seconds, self._written = seconds, 0.0
        self._file = None if self._remote else append_lines(path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # JSON has no NaN: what is not finite becomes null.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, **finite}) + "\n"
        if self._file:
            self._file.write(line)
            self._file.flush()
            return
        self._text += line
        if time.monotonic() - self._written > self._seconds:
            self.close()

    def close(self) -> None:
        if self._file:
            self._file.close()
        else:
            write_atomically(self._path, self._text)
            self._written = time.monotonic()


class _TensorBoard:
    """Written at once and not in tensorboardX's thread: when that cannot write, the run waits for it for ever."""

    def __init__(self, path: epath.Path, seconds: float = 30.0):
        self._path, self._seconds, self._flushed = path, seconds, time.monotonic()

    @functools.cached_property
    def _writer(self):
        # Imported with the first numbers: by then the devices are at work, and need not wait for it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.record_writer import directory_check

        directory_check(str(self._path))
        return EventsWriter(str(self._path / "events"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._writer.write_event(
                Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            )
        if time.monotonic() - self._flushed > self._seconds:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        if "_writer" in vars(self):
            self._writer.close()


class _Wandb:
    def __init__(self, project: str, workdir: epath.Path):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"config.monitor.wandb_project is {project!r}, and wandb is not installed: `pip install wandb`, or leave "
                "it empty"
            ) from error
        # The workdir names the run: the same command continues it there, too.
        name = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
        self._run = wandb.init(project=project, name=workdir.name, id=name, resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def read(workdir: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What a run has written to `metrics.jsonl`: by metric (steps [n] int, values [n] float, nan where not finite).

    Steps that were repeated after a crash count once, as they were done last. Raises UserError if there is no such file.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    try:
        lines = path.read_text().split("\n")[:-1]  # the last one may not be whole yet
    except OSError as error:
        raise UserError(
            f"there are no metrics in {workdir} ({error}): give a workdir of `msllm train`"
        ) from error
    found: dict[str, dict[int, float]] = {}
    for values in map(json.loads, lines):
        step = values.pop("step")
        for name, value in values.items():
            found.setdefault(name, {})[step] = math.nan if value is None else value
    order = {name: sorted(values) for name, values in found.items()}
    return {
        name: (np.array(steps), np.array([found[name][step] for step in steps]))
        for name, steps in order.items()
    }
