"""How far a long command is: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time

import tqdm

LINE_SECONDS = 10.0  # between lines where there is no terminal
BAR_SECONDS = 0.2


class Progress:
    """The progress of one stage. As a context manager, it removes the bar at the end.

    Args:
      stage: its name. portions: how many there are, 0: unknown. finished: those that were before the stage began.
    """

    def __init__(self, stage: str, portions: int = 0, finished: int = 0):
        self._stage, self._portions, self._before = stage, portions, finished
        self._begin = self._shown = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            form = {"total": portions, "initial": finished, "unit": " portions"}
            form = form if portions else {"bar_format": "{desc}{postfix}"}
            self._bar = tqdm.tqdm(desc=f"prepare: {stage}", leave=False, **form)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, finished: int = 0, **counts: int) -> None:
        """Shows the state if it is time to. counts: what was done since the stage began, such as examples=12."""
        now = time.monotonic()
        if now - self._shown < (LINE_SECONDS if self._bar is None else BAR_SECONDS):
            return
        self._shown = now
        seconds = now - self._begin
        facts = [f"{count:,} {name}" for name, count in counts.items()]
        if counts.get("tokens"):
            facts.append(f"{counts['tokens'] / seconds:,.0f} tokens/s")
        if self._bar is not None:
            self._bar.n = finished
            self._bar.set_postfix_str(", ".join(facts))
            return
        if self._portions:
            facts.insert(0, f"{finished} of {self._portions} portions")
        if finished > self._before:
            left = seconds / (finished - self._before) * (self._portions - finished)
            facts.append(f"{tqdm.tqdm.format_interval(left)} left")
        print(f"prepare: {self._stage}: {', '.join(facts)}", file=sys.stderr, flush=True)
