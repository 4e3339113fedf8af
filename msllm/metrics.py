"""Metrics of a run: from the step's sums to named numbers, and where they are written."""

from __future__ import annotations

import json
import math
import pathlib
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

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


def memory_mib() -> float:
    """Memory of the first local device in MiB, or of this process where the device does not tell (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["bytes_in_use"] / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Writer:
    """Writes named numbers to TensorBoard event files and to `metrics.jsonl`, one line a call, in a workdir."""

    def __init__(self, workdir: pathlib.Path):
        from tensorboardX import SummaryWriter  # imported here: only a run needs it

        workdir.mkdir(parents=True, exist_ok=True)
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))
        self._file = open(workdir / "metrics.jsonl", "a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """`step`: steps done when the values were measured."""
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        # JSON has no NaN: what is not finite becomes null.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._tensorboard.close()
        self._file.close()


class Progress:
    """A progress bar with loss, tokens/s and ETA on a terminal; plain lines elsewhere."""

    def __init__(self, start: int, stop: int):
        self._stop, self._bar = stop, None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=stop, initial=start, unit="step", dynamic_ncols=True)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the state after `step` steps. `values`: loss, tokens_per_second, step_seconds."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s")
            self._bar.update(step - self._bar.n)
        else:
            minutes, seconds = divmod(int((self._stop - step) * values["step_seconds"]), 60)
            print(
                f"step {step}/{self._stop}  loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s  "
                f"ETA {minutes}:{seconds:02d}",
                flush=True,
            )

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        self._bar.write(text) if self._bar is not None else print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
