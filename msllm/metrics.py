"""The metrics of a run: computing them from the sums of a step, writing and reading them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any, Protocol

import jax
import numpy as np
from etils import epath

from msllm.config import Config, find_object
from msllm.data.mixture import Plan
from msllm.errors import UserError
from msllm.runtime.files import write_atomically
from msllm.runtime.processes import AsyncAllGather, is_primary
from msllm.streams import StreamSpec

log = logging.getLogger("msllm")

_TAIL_BYTES = 1 << 16
FLUSH_SECONDS = 30.0  # the longest time that metrics stay in memory before they are written


def named_losses(sums: Mapping[str, Any], streams: StreamSpec) -> dict[str, float]:
    """Mean negative log-likelihoods, in nats per target.

    Args:
      sums: sums per stream over a batch, [S] each: nll, targets, nll_spoken, targets_spoken. The
        last two leave out targets that are silence.
      streams: the streams of the model.

    Returns:
      `nll/STREAM` and `nll_spoken/STREAM` for each stream that has targets, and `loss_spoken`, the
      mean over spoken targets weighted by the loss weights of their streams.
    """
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


class MixtureShares:
    """Counts how many tokens of a run come from each source of a mixture, over all processes."""

    def __init__(self, plan: Plan, chosen: Sequence[str], streams: StreamSpec, silence_id: int):
        """Starts counting at zero.

        Args:
          plan: the plan of the mixture.
          chosen: names of the streams whose tokens count; empty: all. Silence never counts.
          streams: the run's streams.
          silence_id: the token that means silence.
        """
        self._plan, self._silence_id = plan, silence_id
        self._columns = [streams.names.index(name) for name in chosen or streams.names]
        self._gather = AsyncAllGather()
        self._counts = np.zeros(len(plan.names))
        self._targets = np.zeros(len(plan.names))
        self._steps = 0

    def count(self, tables: Mapping[str, np.ndarray], sources: Sequence[int]) -> Any:
        """Counts the tokens of a step by source, without waiting for other processes.

        Args:
          tables: `tokens` and `present` of this process, [b, T, S] each.
          sources: [b] the index of each table's source.

        Returns:
          [processes, sources] int32. Read it after the next step has been dispatched.
        """
        spoken = tables["present"] & (tables["tokens"] != self._silence_id)
        counts = np.bincount(
            sources, spoken[:, :, self._columns].sum((1, 2)), len(self._plan.names)
        )
        return self._gather(counts.astype(np.int32)[None])

    def add(self, step: int, counts: np.ndarray) -> None:
        """Adds what `count` returned for a step."""
        self._counts += counts.sum(0)
        self._targets += self._plan.targets(step)
        self._steps += 1

    def values(self, done: int) -> dict[str, float]:
        """Metrics since the last call, named `mixture/SOURCE/KIND`.

        The kinds are `share` (of the tokens), `target` (what the share should be) and `epoch`
        (passes over the source).

        Args:
          done: steps done since the run began.
        """
        share, target = self._counts / max(1, self._counts.sum()), self._targets / self._steps
        kinds = {"share": share, "target": target, "epoch": self._plan.epochs(done)}
        self._counts, self._targets, self._steps = 0 * self._counts, 0 * self._targets, 0
        return {
            f"mixture/{name}/{kind}": float(by_source[k])
            for k, name in enumerate(self._plan.names)
            for kind, by_source in kinds.items()
        }


def weighted_mean(
    parts: Mapping[str, Mapping[str, float]], weights: Mapping[str, float]
) -> dict[str, float]:
    """The mean of the metrics of several sources, weighted by source.

    If some sources lack a metric, the mean is over the others. If these all have weight 0, the
    metric is left out.

    Args:
      parts: {source: {metric: value}}.
      weights: {source: weight}, of any sum.
    """
    result = {}
    for metric in dict.fromkeys(metric for values in parts.values() for metric in values):
        sources = [name for name in parts if metric in parts[name]]
        total = sum(weights[name] for name in sources)
        if total:
            result[metric] = sum(weights[name] * parts[name][metric] for name in sources) / total
    return result


def memory_mib() -> float:
    """Memory in use on the first local device, in MiB.

    CPU devices do not report it. There it is the peak memory of this process.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["bytes_in_use"] / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class MetricsWriter(Protocol):
    """The interface of a metrics writer. `config.monitor.writers` names the classes of a run.

    A run makes an instance from its workdir and config, in process 0 only.
    """

    def __init__(self, workdir: epath.Path, config: Config) -> None: ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes metrics, measured after `step` steps. Values may be nan or inf."""

    def close(self) -> None:
        """Called once, at the end of the run."""


class MetricsWriters:
    """All metrics writers of a run. Only process 0 writes."""

    def __init__(self, workdir: epath.Path, config: Config):
        """Opens the writers that `config.monitor` names.

        Raises UserError if a writer does not exist, or if Weights & Biases is needed but not
        installed.
        """
        names = config.monitor.writers
        if config.monitor.wandb_project and "wandb" not in names:
            names += ("wandb",)
        classes = [find_object(name, WRITERS, "config.monitor.writers") for name in names]
        self._writers: list[MetricsWriter] = []
        self._failed: set[MetricsWriter] = set()  # those whose last write failed
        if is_primary():
            self._writers = [make(workdir, config) for make in classes]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes metrics, measured after `step` steps.

        A writer that cannot write does not end the run: it is reported and tried again next time.
        """
        for writer in self._writers:
            try:
                writer.write(step, values)
            except OSError as error:
                if writer not in self._failed:
                    log.warning(
                        "%s cannot write metrics from step %d on (%s): make room or repair the"
                        " storage; training goes on",
                        type(writer).__name__,
                        step,
                        error,
                    )
                self._failed.add(writer)
            else:
                self._failed.discard(writer)

    def close(self) -> None:
        """Closes all writers."""
        for writer in self._writers:
            try:
                writer.close()
            except OSError as error:
                log.warning("the last metrics are not written (%s)", error)


def append_lines(path: epath.Path) -> IO[str]:
    """Opens a file to append lines to it.

    Removes an incomplete last line, which a full disk may have left.
    """
    end = _end_of_lines(path) if path.exists() else 0
    file = path.open("a")
    file.truncate(end)
    return file


def _end_of_lines(path: epath.Path) -> int:
    """Returns the position after the last line break of a file. Reads only its end."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(end - _TAIL_BYTES, 0)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


class JsonLines:
    """`metrics.jsonl`: one JSON object per line.

    Object stores cannot append to a file. There the whole file is rewritten, at most every 30 s.
    """

    def __init__(self, workdir: epath.Path, config: Config):
        self._path = workdir / "metrics.jsonl"
        self._remote = "://" in str(workdir)
        self._text = self._path.read_text() if self._remote and self._path.exists() else ""
        self._written = 0.0
        self._file = None if self._remote else append_lines(self._path)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line. JSON has no NaN: values that are not finite become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, **finite}) + "\n"
        if self._file:
            if self._file.closed:
                self._file = append_lines(self._path)
            try:
                self._file.write(line)
                self._file.flush()
            except OSError:
                # The next call opens the file again, and removes what was written of the line.
                with contextlib.suppress(OSError):
                    self._file.close()
                raise
            return
        self._text += line
        if time.monotonic() - self._written > FLUSH_SECONDS:
            self._upload()

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()
        else:
            self._upload()

    def _upload(self) -> None:
        write_atomically(self._path, self._text)
        self._written = time.monotonic()


class TensorBoard:
    """TensorBoard event files in `tensorboard/`.

    Events are written directly, not by tensorboardX's thread. If that thread could not write, the
    run would wait for it forever.
    """

    def __init__(self, workdir: epath.Path, config: Config):
        self._path, self._flushed = workdir / "tensorboard", time.monotonic()

    @functools.cached_property
    def _writer(self) -> Any:
        # Imported with the first metrics, because the devices are busy by then.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.record_writer import directory_check

        directory_check(str(self._path))
        return EventsWriter(str(self._path / "events"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes an event for each value."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for name, value in values.items():
            self._writer.write_event(
                Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            )
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Closes the event file."""
        if "_writer" in vars(self):
            self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, in the project `config.monitor.wandb_project`."""

    def __init__(self, workdir: epath.Path, config: Config):
        """Raises UserError if wandb is not installed."""
        project = config.monitor.wandb_project
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"config.monitor.wandb_project is {project!r}, and wandb is not installed:"
                " `pip install wandb`, or leave it empty"
            ) from error
        # The id depends only on the workdir, so that the same command continues the same run.
        run_id = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
        self._run = wandb.init(project=project, name=workdir.name, id=run_id, resume="allow")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


WRITERS: dict[str, type] = {
    "jsonl": JsonLines,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def read(workdir: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads `metrics.jsonl` of a run.

    If a step was repeated after a crash, its last metrics count.

    Returns:
      {metric: (steps [n] int, values [n] float)}; values that are not finite are nan.

    Raises:
      UserError: the file cannot be read.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    try:
        lines = path.read_text().split("\n")[:-1]  # the last line may be incomplete
    except OSError as error:
        raise UserError(
            f"there are no metrics in {workdir} ({error}): give a workdir of `msllm train`"
        ) from error
    found: dict[str, dict[int, float]] = {}
    for values in map(json.loads, lines):
        step = values.pop("step")
        for name, value in values.items():
            found.setdefault(name, {})[step] = math.nan if value is None else value
    return {
        name: (np.array(sorted(by_step)), np.array([by_step[step] for step in sorted(by_step)]))
        for name, by_step in found.items()
    }
