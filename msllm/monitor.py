"""Monitoring of a run: where its time goes, its speed, slow steps and skipped updates."""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from msllm.errors import UserError
from msllm.metrics import MetricsWriters, MixtureShares, memory_mib, named_losses
from msllm.runtime.files import digest_differs, read_object, with_digest, write_atomically
from msllm.runtime.flops import batch_pairs, combine_flops, step_flops
from msllm.runtime.hardware import lookup
from msllm.runtime.processes import DispatchClocks, is_primary
from msllm.runtime.progress import Progress
from msllm.step import Program

# What a process spends its time on. `steps` is the productive part.
KINDS = ("startup", "restore", "compile", "steps", "data", "checkpoint", "evaluation")
# Time of earlier attempts: steps that had to be repeated, and time in which no process ran.
PAST = ("lost", "down")

log = logging.getLogger("msllm")


class Goodput:
    """A stopwatch over all attempts of a run. Each start of the run's command is an attempt.

    Every moment counts for exactly one of KINDS. The times are saved in a file for the next
    attempt.

    Attributes:
      seconds: {kind: seconds} over all attempts so far.
      attempts: number of attempts, including this one.
      began: when this attempt began, by `time.monotonic`.
    """

    def __init__(self, path: epath.Path, seconds_before: float = 0.0):
        """Reads the times of earlier attempts, and starts counting for `startup`.

        Args:
          path: the file with the times of earlier attempts, if there were any.
          seconds_before: how long this process has been running already.
        """
        self._path, self._now = path, time.monotonic()
        self.began = self._now - seconds_before
        self._kind = "startup"
        past = _read_times(path)
        self.seconds = dict.fromkeys((*KINDS, *PAST), 0.0) | past.get("seconds", {})
        self.attempts = past.get("attempts", 0) + 1
        # {step: seconds of `steps` when its checkpoint was saved}
        self._marks = past.get("steps_seconds_at", {})
        self.seconds["startup"] += seconds_before
        if "time" in past:
            self.seconds["down"] += max(0.0, time.time() - seconds_before - past["time"])

    def restored(self, step: int) -> None:
        """Notes that the run continues at `step`. Later steps of earlier attempts are lost."""
        kept = min(self._marks.get(str(step), 0.0), self.seconds["steps"])
        self.seconds["lost"] += self.seconds["steps"] - kept
        self.seconds["steps"] = kept
        self._marks = {at: seconds for at, seconds in self._marks.items() if int(at) <= step}

    @contextlib.contextmanager
    def inside(self, kind: str) -> Iterator[None]:
        """Counts the time inside the context for `kind`, one of KINDS."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def begin(self, kind: str) -> None:
        """Counts the time from now on for `kind`."""
        self._switch(kind)

    def _switch(self, kind: str) -> str:
        now, outer = time.monotonic(), self._kind
        self.seconds[outer] += now - self._now
        self._now, self._kind = now, kind
        return outer

    def saved(self, step: int) -> None:
        """Notes that a checkpoint of `step` is being written."""
        self._switch(self._kind)
        self._marks[str(step)] = self.seconds["steps"]

    def values(self) -> dict[str, float]:
        """Metrics: `goodput`, the productive share of all time, and `time/KIND` in seconds."""
        self._switch(self._kind)
        total = sum(self.seconds.values())
        times = {f"time/{kind}": seconds for kind, seconds in self.seconds.items()}
        return {"goodput": self.seconds["steps"] / total, **times}

    def write(self) -> None:
        """Saves the times for the next attempt, in process 0 only."""
        if not is_primary():
            return
        self._switch(self._kind)
        state = {
            "seconds": self.seconds,
            "attempts": self.attempts,
            "steps_seconds_at": self._marks,
            "time": time.time(),
        }
        write_atomically(self._path, json.dumps(with_digest(state)))


def _read_times(path: epath.Path) -> dict[str, Any]:
    try:
        times = read_object(path, "")
    except FileNotFoundError:
        return {}
    except UserError:
        times = None
    # Earlier versions wrote no digest.
    if times is None or ("digest" in times and digest_differs(times)):
        log.warning("%s is damaged: the times of earlier attempts are lost", path)
        return {}
    return times


class Monitor:
    """Reads the metrics of each step after the next one has been dispatched, and reports them.

    Every `config.log_every` steps it writes metrics with speed, MFU and goodput. It reports slow
    steps and skipped updates, and stops a run after too many skipped updates in a row.

    Attributes:
      writers: the metrics writers.
      progress: shows the progress of the run, and prints lines.
      goodput: accounts for the time.
      clock: milliseconds from the start to the dispatch of the last step whose metrics were read,
        by the clock of process 0. It is the same number in all processes.
    """

    def __init__(
        self,
        program: Program,
        writers: MetricsWriters,
        progress: Progress,
        goodput: Goodput,
        clocks: DispatchClocks,
        shares: MixtureShares | None = None,
    ):
        """`clocks` times the dispatches of all processes; `shares` counts a mixture's sources."""
        self.writers, self.progress, self.goodput = writers, progress, goodput
        self._program, self._clocks, self._shares = program, clocks, shares
        self._pending: tuple[Any, ...] | None = None  # the step whose metrics have not been read
        hardware = lookup(jax.devices()[0].device_kind)
        self._peak = hardware.flops * jax.device_count() if hardware else None
        # Since the last report:
        self._seconds_before = {kind: goodput.seconds[kind] for kind in ("steps", "data")}
        self._counts: dict[str, float] = collections.defaultdict(float)
        self._first_step_done = False
        self._ready: float | None = None  # when the last step ended; None after other work
        self._durations: collections.deque[float] = collections.deque(maxlen=101)
        self._slow: tuple[int, float, np.ndarray] | None = None  # a slow step to report
        self.clock = 0

    def after_dispatch(
        self,
        step: int,
        metrics: Any,
        tables: Mapping[str, np.ndarray],
        sources: Sequence[int] | None = None,
    ) -> None:
        """Keeps the metrics of a step that is running, and reads those of the step before it.

        The device therefore has work while the host waits for metrics.

        Args:
          step: number of the step, from 1.
          metrics: what `Program.step` returned.
          tables: this host's part of the batch.
          sources: the index of each table's source in a mixture.
        """
        counts = None
        if self._shares and sources is not None:
            counts = self._shares.count(tables, sources)
        pending = (step, metrics, tables, self._clocks.read(), counts)
        pending, self._pending = self._pending, pending
        if pending:
            self._read(*pending)

    def step_seconds(self, least: int) -> float | None:
        """Returns the median duration of recent steps; None before `least` of them were timed."""
        return statistics.median(self._durations) if len(self._durations) >= least else None

    def flush(self) -> None:
        """Waits for the last step and reads its metrics. Call it before work that is not a step."""
        pending, self._pending = self._pending, None
        if pending:
            self._read(*pending)
        self._ready = None

    @contextlib.contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Counts the time inside the context for `kind` (one of KINDS), not as part of a step."""
        self.flush()
        with self.goodput.inside(kind):
            yield

    def _read(
        self, step: int, metrics: Any, tables: Mapping[str, np.ndarray], times: Any, counts: Any
    ) -> None:
        metrics, times, counts = jax.device_get((metrics, times, counts))
        if self._shares:
            self._shares.add(step - 1, counts)
        self.clock = int(times[0])
        self._time(step, times)
        trained = np.array(self._program.streams.loss_weights) > 0
        for name in ("cells", "spoken"):
            self._counts[name] += float(metrics[name])
        for name in ("targets", "targets_spoken"):
            self._counts[name] += float(np.sum(metrics[name][trained]))
        self._counts["steps"] += 1
        if metrics["skipped_in_row"]:
            self._report_skip(step, metrics)
        config = self._program.config
        if step % config.log_every == 0 or step == config.steps:
            self._write(step, metrics, tables)

    def _write(self, step: int, metrics: Any, tables: Mapping[str, np.ndarray]) -> None:
        goodput, counts = self.goodput.values(), self._counts
        passed = {
            kind: goodput[f"time/{kind}"] - before for kind, before in self._seconds_before.items()
        }
        seconds = sum(passed.values())
        norms = ("gradient_norm", "parameter_norm", "update_norm", "learning_rate")
        values = {
            "loss": float(metrics["loss"]),
            **({"penalty": float(metrics["penalty"])} if "penalty" in metrics else {}),
            **named_losses(metrics, self._program.streams),
            **{name: float(metrics[name]) for name in norms},
            "skipped_updates": float(metrics["skipped"]),
            "tokens_per_second": counts["cells"] / seconds,
            "spoken_tokens_per_second": counts["spoken"] / seconds,
            "step_seconds": seconds / counts["steps"],
            "data_wait_share": passed["data"] / seconds,
            "memory_mib": memory_mib(),
            **goodput,
            **(self._shares.values(step) if self._shares else {}),
        }
        if self._peak:
            for name, flops in self._flops(tables).items():
                values[name] = flops / seconds / self._peak
        self.writers.write(step, values)
        self.progress.show(
            step,
            f"loss {values['loss']:.4f}",
            f"{values['tokens_per_second']:,.0f} tokens/s",
            seconds_left=(self._program.config.steps - step) * values["step_seconds"],
        )
        self.goodput.write()
        self._seconds_before = {kind: goodput[f"time/{kind}"] for kind in passed}
        self._counts.clear()

    def _flops(self, tables: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Operations since the last report, for all cells and for cells that are not silent.

        The number of visible pairs per cell is taken from one step's tables on this host, and the
        targets are divided evenly among the streams that have a loss.
        """
        program, counts = self._program, self._counts
        present = tables["present"] & (tables["segment"] > 0)[:, :, None]
        silent = tables["tokens"] == program.silence_id
        seen = present & ~silent if program.streams.skip_silence else present
        pairs = batch_pairs(program.streams.nearest_lag_array, present, seen, tables["segment"])
        pairs_per_cell = pairs / max(1, present.sum())
        trained = sum(weight > 0 for weight in program.streams.loss_weights)

        def flops(cells: float, targets: float) -> float:
            model, streams = program.config.model, program.streams
            added = combine_flops(model, streams, [targets / trained] * streams.size)
            return step_flops(model, cells, targets, pairs_per_cell * cells) + added

        return {
            "mfu": flops(counts["cells"], counts["targets"]),
            "mfu_spoken": flops(counts["spoken"], counts["targets_spoken"]),
        }

    def _time(self, step: int, times: np.ndarray) -> None:
        """Records how long a step took.

        A slow step is reported only after the next step, because a late dispatch of either step can
        be the cause.
        """
        now, before = time.monotonic(), self._ready
        self._ready = now
        if not self._first_step_done:
            self._first_step_done = True
            passed = now - self.goodput.began
            log.info(
                "first step done %.1f s after the start (%.1f CPU-s)", passed, time.process_time()
            )
        if self._slow:
            slow_step, seconds, slow_times = self._slow
            self._slow = None
            candidates = self._clocks.latest(slow_times), self._clocks.latest(times)
            self._report_slow(slow_step, seconds, *max(candidates, key=lambda late: late[1]))
        if before is None:
            return
        seconds = now - before
        if len(self._durations) >= 5:
            limit = self._program.config.monitor.slow_step * statistics.median(self._durations)
            if seconds > limit:
                self._slow = (step, seconds, times)
        self._durations.append(seconds)

    def _report_slow(self, step: int, seconds: float, process: str, late: float) -> None:
        """Reports a slow step, which `process` dispatched `late` seconds after the others."""
        median = statistics.median(self._durations)
        if len(self._clocks.hosts) == 1:
            reason = "data_wait_share shows how much of the time it waited for data"
        elif late > seconds / 2:
            reason = f"{process} dispatched it {late:.1f} s after the others"
        else:
            reason = "all processes dispatched it in time: devices or network were slow"
        self.progress.say(
            f"step {step} took {seconds:.1f} s, {seconds / median:.0f} times the median: {reason}"
        )

    def _report_skip(self, step: int, metrics: Any) -> None:
        """Reports a skipped update, with the parameters whose gradients are not finite.

        Raises UserError after `config.optim.max_skipped` skipped updates in a row.
        """
        names = [
            name
            for name, norm in zip(self._program.parameter_names, metrics["gradient_norms"])
            if not math.isfinite(norm)
        ]
        if names:
            more = " and others" if len(names) > 5 else ""
            problem = f"the gradients of {', '.join(names[:5])}{more} were"
        else:
            problem = "the loss was"
        in_row, limit = int(metrics["skipped_in_row"]), self._program.config.optim.max_skipped
        self.progress.say(
            f"step {step}: {problem} not finite; update skipped ({in_row} in a row,"
            f" {metrics['skipped']} in all)"
        )
        if in_row >= limit:
            raise UserError(
                f"{in_row} updates in a row were skipped because {problem} not finite"
                f" (config.optim.max_skipped is {limit}); the last one was step {step}: lower"
                " config.optim.lr or look at the data of these steps"
            )
