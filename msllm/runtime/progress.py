"""The progress of a long command: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import rich.progress

LINE_SECONDS = 10.0  # between lines where there is no terminal
BAR_SECONDS = 0.2  # between refreshes of the bar


class Progress:
    """Shows how far one stage of a command has come.

    If stderr is a terminal, `show` draws a bar there; otherwise it prints lines. As a context
    manager, it ends the bar on exit.

    Args:
      stage: the text before the count, such as "step".
      total: units of work; 0: unknown. A terminal then shows a line of text instead of a bar.
      done: units that were done before the stage began.
      every: seconds between lines, or between refreshes of the bar, which are at most BAR_SECONDS
        apart.
      file: where lines go; None: stderr.
      keep: whether the bar stays on the terminal at the end.
      enabled: False: show nothing. Only the first process of a run shows its progress.
    """

    def __init__(
        self,
        stage: str,
        total: int = 0,
        done: int = 0,
        *,
        every: float = LINE_SECONDS,
        file: TextIO | None = None,
        keep: bool = False,
        enabled: bool = True,
    ):
        self._stage, self._total, self._start = stage, total, done
        self._file, self._keep, self._enabled = file, keep, enabled
        # Without a stderr (2>&-) it is None.
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._terminal = terminal and os.environ.get("TERM") != "dumb"
        self._every = min(every, BAR_SECONDS) if self._terminal else every
        self._began = self._shown = time.monotonic()
        self._bar: rich.progress.Progress | None = None  # started when it is first drawn

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Seconds since the stage began, always positive."""
        return max(time.monotonic() - self._began, 1e-9)

    def show(self, done: int = 0, *facts: str, seconds_left: float | None = None) -> None:
        """Shows the state, unless it was shown less than `every` seconds ago.

        Args:
          done: units done, including those from before the stage began.
          *facts: what else to show, such as "loss 2.31".
          seconds_left: the time to the end; None: estimated from the mean speed of the stage.
        """
        now = time.monotonic()
        if not self._enabled or now - self._shown < self._every:
            return
        self._shown = now
        if seconds_left is None and self._total and done > self._start:
            seconds_left = self.seconds / (done - self._start) * (self._total - done)
        if seconds_left is not None:
            facts += (f"ETA {clock_time(seconds_left)}",)
        if self._terminal:
            self._draw(done, "  ".join(facts))
        else:
            count = f" {done}/{self._total}" if self._total else ""
            line = "  ".join((self._stage + count, *facts))
            _print(line, self._file or sys.stderr)

    def say(self, text: str) -> None:
        """Prints a line to stdout, above the bar."""
        if self._enabled:
            _print(text, sys.stdout)  # while there is a bar, rich moves it out of the way

    def close(self) -> None:
        """Ends the bar, if there is one."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()

    def _draw(self, done: int, facts: str) -> None:
        try:
            if self._bar is None:
                self._bar = self._start_bar(done, facts)
            self._bar.update(self._bar.task_ids[0], completed=done, facts=facts)
            self._bar.refresh()
        except OSError:  # the terminal is gone
            self._enabled = False

    def _start_bar(self, done: int, facts: str) -> rich.progress.Progress:
        # Imported with the first bar: the import takes 0.05 s, which most commands do not need.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        counted = (BarColumn(), MofNCompleteColumn()) if self._total else ()
        bar = Progress(
            TextColumn("{task.description}"),
            *counted,
            TextColumn("{task.fields[facts]}"),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=not self._keep,
            redirect_stdout=sys.stdout.isatty(),  # otherwise rich prints it to stderr
        )
        bar.add_task(self._stage, total=self._total or None, completed=done, facts=facts)
        bar.start()
        # rich hides the cursor, and a process that ends with os._exit would not restore it.
        bar.console.show_cursor()
        return bar


def _print(text: str, file: TextIO | None) -> None:
    """Prints a line, if it can be printed: a reader that is gone must not end the work."""
    if file is not None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the file is closed
            print(text, file=file, flush=True)


def clock_time(seconds: float) -> str:
    """Returns a duration as [H:]MM:SS."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
