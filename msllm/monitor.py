"""Reads the metrics of a step once the next one is under way: writes them with speed, MFU and goodput, reports steps
that were slow and updates that were skipped, and stops a run that has gone wrong."""

from __future__ import annotations

import collections
import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from msllm.errors import UserError
from msllm.goodput import Goodput
from msllm.metrics import Shares, Writer, memory_mib, named_losses
from msllm.runtime.flops import batch_pairs, step_flops
from msllm.runtime.hardware import lookup
from msllm.runtime.processes import DispatchClocks
from msllm.runtime.progress import Progress
from msllm.step import Program

log = logging.getLogger("msllm")


class Meter:
    """The metrics of a run, step by step.

    Attributes:
      clock: milliseconds since the start by the clock of process 0, when it dispatched the last step that was read:
        the same in all processes.
    """

    def __init__(
        self,
        program: Program,
        writer: Writer,
        progress: Progress,
        goodput: Goodput,
        clocks: DispatchClocks,
        shares: Shares | None = None,
    ):
        """`shares`: of a mixture."""
        self._program, self._writer, self._progress = program, writer, progress
        self._goodput, self._clocks, self._shares = goodput, clocks, shares
        self._pending: tuple | None = None
        hardware = lookup(jax.devices()[0].device_kind)
        self._peak = hardware.flops * jax.device_count() if hardware else None
        self._kept = {kind: goodput.seconds[kind] for kind in ("steps", "data")}
        self._counts: collections.Counter[str] = collections.Counter()
        self._started = False
        self._ready: float | None = None  # when the step before was done
        self._durations: collections.deque[float] = collections.deque(maxlen=101)
        self._slow: tuple[int, float, np.ndarray] | None = None
        self.clock = 0

    def dispatched(
        self,
        step: int,
        metrics: Any,
        tables: Mapping[str, np.ndarray],
        sources: Sequence[int] | None = None,
    ) -> None:
        """Takes the metrics of a step that is under way and this host's tables; reads those of the step before.

        Args:
          sources: the number of each table's source in a mixture.
        """
        counts = self._shares.read(tables, sources) if self._shares else None
        pending, self._pending = self._pending, (step, metrics, tables, self._clocks.read(), counts)
        if pending:
            self._read(*pending)

    def flush(self) -> None:
        """Reads what is pending. What comes next is not part of a step."""
        pending, self._pending = self._pending, None
        if pending:
            self._read(*pending)
        self._ready = None

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
        goodput, counts = self._goodput.values(), self._counts
        passed = {kind: goodput[f"time/{kind}"] - before for kind, before in self._kept.items()}
        seconds = sum(passed.values())
        values = {
            "loss": float(metrics["loss"]),
            **named_losses(metrics, self._program.streams),
            **{
                k: float(metrics[k])
                for k in ("gradient_norm", "parameter_norm", "update_norm", "learning_rate")
            },
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
            values |= {
                name: flops / seconds / self._peak for name, flops in self._flops(tables).items()
            }
        self._writer.write(step, values)
        self._progress.show(
            step,
            f"loss {values['loss']:.4f}",
            f"{values['tokens_per_second']:,.0f} tokens/s",
            seconds_left=(self._program.config.steps - step) * values["step_seconds"],
        )
        self._goodput.write()
        self._kept = {kind: goodput[f"time/{kind}"] for kind in passed}
        self._counts.clear()

    def _flops(self, tables: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Operations since the last report: all, and those of cells that are not silent.

        Pairs are counted in the tables of this step on this host, and taken for typical of the others.
        """
        program, counts = self._program, self._counts
        present = tables["present"] & (tables["segment"] > 0)[:, :, None]
        seen = (
            present & (tables["tokens"] != program.silence_id)
            if program.streams.skip_silence
            else present
        )
        pairs = batch_pairs(program.streams.lag_array, present, seen, tables["segment"]) / max(
            1, present.sum()
        )

        def flops(cells, targets):
            return step_flops(program.config.model, cells, targets, pairs * cells)

        return {
            "mfu": flops(counts["cells"], counts["targets"]),
            "mfu_spoken": flops(counts["spoken"], counts["targets_spoken"]),
        }

    def _time(self, step: int, times: np.ndarray) -> None:
        """Reports a step that took far longer than others, once it is known who was late for it or the one after it."""
        now, before = time.monotonic(), self._ready
        self._ready = now
        if not self._started:
            self._started = True
            passed = now - self._goodput.began
            log.info(
                "first step done %.1f s after the start (%.1f CPU-s)", passed, time.process_time()
            )
        if self._slow:
            at, seconds, then = self._slow
            self._slow = None
            self._report_slow(
                at,
                seconds,
                max(self._clocks.latest(then), self._clocks.latest(times), key=lambda x: x[1]),
            )
        if before is None:
            return
        seconds = now - before
        if len(self._durations) >= 5:
            limit = self._program.config.monitor.slow_step * statistics.median(self._durations)
            if seconds > limit:
                self._slow = (step, seconds, times)
        self._durations.append(seconds)

    def _report_slow(self, step: int, seconds: float, latest: tuple[str, float]) -> None:
        usual, (name, late) = statistics.median(self._durations), latest
        if len(self._clocks.hosts) == 1:
            who = "see data_wait_share for the share of the data in it"
        elif late > seconds / 2:
            who = f"{name} gave it to its devices {late:.1f} s after the others"
        else:
            who = "all processes gave it to their devices in time: devices or network were slow"
        self._progress.say(
            f"step {step} took {seconds:.1f} s, {seconds / usual:.0f} times the median: {who}"
        )

    def _report_skip(self, step: int, metrics: Any) -> None:
        norms = metrics["gradient_norms"]
        bad = [
            name
            for name, norm in zip(self._program.parameter_names, norms)
            if not math.isfinite(norm)
        ]
        what = (
            f"the gradients of {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''} were"
            if bad
            else "the loss was"
        )
        in_row, limit = int(metrics["skipped_in_row"]), self._program.config.optim.max_skipped
        self._progress.say(
            f"step {step}: {what} not finite; update skipped ({in_row} in a row, {metrics['skipped']} in all)"
        )
        if in_row >= limit:
            raise UserError(
                f"{in_row} updates in a row were skipped because {what} not finite (config.optim.max_skipped is "
                f"{limit}); the last one was step {step}: lower config.optim.lr or look at the data of these steps"
            )
