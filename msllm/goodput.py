"""Where the time of a run goes: training, and everything else by name, over all its attempts."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator

from etils import epath

from msllm.runtime.files import write_atomically
from msllm.runtime.processes import is_primary

# What this process does, second by second: nothing is counted twice or left out. `steps` is the productive part.
KINDS = ("startup", "restore", "compile", "steps", "data", "checkpoint", "evaluation")
PAST = (
    "lost",
    "down",
)  # of earlier attempts: steps that had to be repeated; time in which no process ran

log = logging.getLogger("msllm")


class Goodput:
    """A stopwatch with one hand and several scales, kept in a file beside the metrics.

    Attributes:
      seconds: {kind: seconds}, of all attempts so far. attempts: how often the run was started.
      began: when this attempt did, by `time.monotonic`.
    """

    def __init__(self, path: epath.Path, before: float = 0.0):
        """`path`: where earlier attempts left their times. `before`: seconds that this process has run already."""
        self._path, self._now = path, time.monotonic()
        self.began = self._now - before
        self._kind = "startup"
        past = _read(path)
        self.seconds = dict.fromkeys((*KINDS, *PAST), 0.0) | past.get("seconds", {})
        self.attempts = past.get("attempts", 0) + 1
        self._marks = past.get(
            "steps_seconds_at", {}
        )  # {step: seconds of `steps` when it was saved}
        self.seconds["startup"] += before
        if "time" in past:
            self.seconds["down"] += max(0.0, time.time() - before - past["time"])

    def restored(self, step: int) -> None:
        """The run goes on from `step`: what earlier attempts did after it is lost."""
        kept = min(self._marks.get(str(step), 0.0), self.seconds["steps"])
        self.seconds["lost"] += self.seconds["steps"] - kept
        self.seconds["steps"] = kept
        self._marks = {at: seconds for at, seconds in self._marks.items() if int(at) <= step}

    @contextlib.contextmanager
    def inside(self, kind: str) -> Iterator[None]:
        """Counts the time inside as `kind`, one of KINDS."""
        outer = self._switch(kind)
        try:
            yield
        finally:
            self._switch(outer)

    def begin(self, kind: str) -> None:
        """Counts the time from now on as `kind`."""
        self._switch(kind)

    def _switch(self, kind: str) -> str:
        now, outer = time.monotonic(), self._kind
        self.seconds[outer] += now - self._now
        self._now, self._kind = now, kind
        return outer

    def saved(self, step: int) -> None:
        """A checkpoint of `step` is on its way."""
        self._switch(self._kind)
        self._marks[str(step)] = self.seconds["steps"]

    def values(self) -> dict[str, float]:
        """`goodput`, the productive share of all time, and `time/KIND` in seconds."""
        self._switch(self._kind)
        total = sum(self.seconds.values())
        return {
            "goodput": self.seconds["steps"] / total,
            **{f"time/{kind}": s for kind, s in self.seconds.items()},
        }

    def write(self) -> None:
        """Keeps the times for the next attempt. In a run of several processes, those of the first one."""
        if not is_primary():
            return
        self._switch(self._kind)
        state = {
            "seconds": self.seconds,
            "attempts": self.attempts,
            "steps_seconds_at": self._marks,
            "time": time.time(),
        }
        write_atomically(self._path, json.dumps(state))


def _read(path: epath.Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (TypeError, ValueError):
        log.warning("%s is damaged: the times of earlier attempts are lost", path)
        return {}
