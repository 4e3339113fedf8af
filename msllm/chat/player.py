"""Sessions and recordings that play at a pace while they are watched.

    live = Live(engine, DecodeOptions(temperature=0.7), pace=4)
    live.feed("user", "how are you")     # at any time
    await live.run()                     # rows come until this is cancelled

`Live` runs a session, which can be fed, muted and forked meanwhile; `Replay` shows a recording.
Both are players: what they show is `recording.branches[branch]`, up to `rows`. The screen is in
msllm/chat/screen.py.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

from msllm.chat.recording import Branch, Recording
from msllm.decode.engine import DecodeOptions, Engine
from msllm.errors import UserError

PACES = tuple(digit * 10.0**power for power in range(-1, 4) for digit in (1, 2, 5))  # 0.1 to 5,000
MEASURED_ROWS = 30  # the rate is measured over this many rows
FEWEST_MEASURED = 5  # rows that a rate needs
LATE = 0.9  # share of the pace below which a player is late


def warm_up(engine: Engine) -> None:
    """Compiles everything that a live session needs, in a free place of the engine."""
    session = engine.open()
    for _ in range(2):
        session.step()
    snapshot = session.snapshot()
    session.close()
    engine.restore(snapshot).close()


class Pacer:
    """Decides when the next row is due and measures the rate of rows.

    All times are seconds of one clock. An interval is the time from one row to the next.
    """

    def __init__(self):
        self._due = -math.inf  # when the last row was due
        self._times: collections.deque[float] = collections.deque(maxlen=MEASURED_ROWS)

    def restart(self) -> None:
        """Makes the next row due at once, as after a pause."""
        self._due = -math.inf
        self.reset_rate()

    def reset_rate(self) -> None:
        """Measures the rate from here on."""
        self._times.clear()

    def wait(self, now: float, interval: float) -> float:
        """Seconds until the next row is due; 0: now; infinite: never."""
        return max(0.0, self._due + interval - now) if interval < math.inf else math.inf

    def record(self, now: float, interval: float) -> None:
        """Notes that the row that was due after `interval` is there."""
        if self._due == -math.inf:
            self._due = now
        else:
            # Count from when the row was due, not from when it came, so that small delays do not
            # add up. After a long delay, catch up by one row at most.
            self._due = max(self._due + interval, now - interval)
        self._times.append(now)

    @property
    def rate(self) -> float | None:
        """Rows per second, or None before there are FEWEST_MEASURED."""
        if len(self._times) < FEWEST_MEASURED or self._times[-1] == self._times[0]:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])


class Player:
    """Shows the rows of a branch one after another.

    Attributes:
      recording: what is shown.
      branch: number of the branch that is shown.
      pace: rows per second; for a recording, a factor on its own pace.
      paused: whether only `step` shows rows.
      on_change: called after everything that changes what is shown.
      clock: returns the time in seconds.
    """

    def __init__(
        self, recording: Recording, pace: float, clock: Callable[[], float] = time.monotonic
    ):
        """Raises UserError for a pace that is not above 0 and at most PACES[-1]."""
        if not 0 < pace <= PACES[-1]:
            raise UserError(f"the pace is {pace}: must be above 0 and at most {PACES[-1]:,.0f}")
        self.recording, self.branch = recording, 0
        self.pace, self.paused, self.clock = pace, False, clock
        self.on_change: Callable[[], None] = _nothing
        self._pacer = Pacer()
        self._step_requested = False
        self._woken = asyncio.Event()  # pace or pause may have changed
        self._advancing = False  # a row is under way
        self._pending: collections.deque[Callable[[], None]] = collections.deque()

    @property
    def current(self) -> Branch:
        """The branch that is shown."""
        return self.recording.branches[self.branch]

    @property
    def rows(self) -> int:
        """How many rows of the branch are shown."""
        return self.current.rows

    @property
    def rate(self) -> float | None:
        """Measured rows per second, or None after too few rows."""
        return self._pacer.rate

    @property
    def late(self) -> bool:
        """Whether rows come more slowly than the pace asks for."""
        return not self.paused and self.rate is not None and self.rate < LATE * self._target_rate()

    @property
    def muted(self) -> frozenset[str]:
        """The streams that are muted."""
        return self.current.muted(self.rows)

    @property
    def ended(self) -> bool:
        """Whether there are no more rows."""
        return self._interval() == math.inf

    def pause(self, paused: bool = True) -> None:
        """Stops after the row that is under way, or goes on."""
        self.paused = paused
        self._restart()

    def step(self) -> None:
        """Shows one row of a paused player."""
        if self.paused:
            self._step_requested = True
            self._restart()

    def change_pace(self, steps: int) -> None:
        """Moves the pace up by that many entries of PACES, or down if `steps` is negative."""
        for _ in range(abs(steps)):
            if steps > 0:
                self.pace = min((pace for pace in PACES if pace > self.pace), default=self.pace)
            else:
                self.pace = max((pace for pace in PACES if pace < self.pace), default=self.pace)
        self._pacer.reset_rate()
        self._woken.set()
        self.on_change()

    def switch(self, branch: int) -> None:
        """Shows another branch. Raises UserError if there is none of that number."""
        count = len(self.recording.branches)
        if not 0 <= branch < count:
            raise UserError(f"there is no branch {branch}: there are {count}, from 0 on")
        self._between_rows(self._switch, branch)

    async def run(self) -> None:
        """Shows rows until it is cancelled."""
        self._restart()
        while True:
            await self._wait_until_due()
            interval, self._advancing = self._interval(), True
            try:
                await self._advance()
            finally:
                self._advancing = False
            self._pacer.record(self.clock(), interval)
            while self._pending:
                self._pending.popleft()()
            self.on_change()

    async def _wait_until_due(self) -> None:
        while True:
            await asyncio.sleep(0)  # let other tasks run even if rows are always late
            self._woken.clear()
            if self._step_requested and not self.ended:
                self._step_requested = False
                return
            left = math.inf
            if not self.paused:
                left = self._pacer.wait(self.clock(), self._interval())
            if left == 0:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), None if left == math.inf else left)

    def _between_rows(self, action: Callable[..., None], *arguments: Any) -> None:
        """Calls `action` now, or as soon as the row that is under way is there."""
        if self._advancing:
            self._pending.append(functools.partial(action, *arguments))
        else:
            action(*arguments)
            self.on_change()

    def _restart(self) -> None:
        """Makes the next row due at once."""
        self._pacer.restart()
        self._woken.set()
        self.on_change()

    def _target_rate(self) -> float:
        """Rows per second that the pace asks for."""
        return 1 / self._interval()

    def _interval(self) -> float:
        """Seconds from the last row to the next, infinite at the end."""
        raise NotImplementedError

    async def _advance(self) -> None:
        """Adds the next row to those that are shown."""
        raise NotImplementedError

    def _switch(self, branch: int) -> None:
        raise NotImplementedError


class Live(Player):
    """A session of an engine.

    Only the branch that is shown goes on; the others wait on the host. What is done while a row is
    under way takes effect with the row after it. Call the methods from the thread of the event
    loop.
    """

    def __init__(
        self,
        engine: Engine,
        options: DecodeOptions | None = None,
        pace: float = 4.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Opens a session, which takes one place of the engine until `close`.

        Args:
          engine: of a model with a tokenizer.
          options: how cells are sampled, None: the defaults; `options.ablated` streams begin muted.
          pace: rows per second.
          clock: returns the time in seconds.

        Raises:
          UserError: the model has no tokenizer, or no place is free.
        """
        tokenizer, streams = engine.model.tokenizer, engine.streams
        if tokenizer is None:
            raise UserError(
                "the model came without a tokenizer: nothing can be typed, "
                "use msllm.Engine with token ids"
            )
        options = options or DecodeOptions()
        stored = dataclasses.asdict(options)
        recording = Recording(streams.names, streams.kinds, tokenizer, stored)
        super().__init__(recording, pace, clock)
        self._engine, self._session = engine, engine.open(options)
        self._snapshots: dict[int, Any] = {}  # of the branches that are not shown
        self._since = self.clock()  # the last row, or the end of the last pause
        for name in options.ablated:
            self.current.add_event("mute", stream=name)

    @property
    def waiting(self) -> dict[str, int]:
        """{input stream: number of tokens that the model has not read yet}."""
        return self._session.waiting

    def feed(self, stream: str, text: str) -> None:
        """Appends text to an input stream. Raises UserError if the stream is not an input."""
        streams = self._engine.streams
        if streams.kinds[streams.index(stream)] != "input":
            inputs = [name for name, kind in zip(streams.names, streams.kinds) if kind == "input"]
            raise UserError(
                f"stream {stream!r} is not an input: inputs are {', '.join(inputs) or 'none'}"
            )
        if self.recording.tokenizer.encode(text):
            self._between_rows(self._feed, stream, text)

    def mute(self, stream: str) -> None:
        """Silences a stream from the next row on, or lets it speak again.

        What a muted input is fed waits until it may speak. Raises UserError for an unknown stream.
        """
        self._engine.streams.index(stream)
        self._between_rows(self._mute, stream)

    def fork(self) -> None:
        """Goes on in a copy. The branch that was shown waits until it is shown again."""
        self._between_rows(self._fork)

    def close(self) -> None:
        """Gives the place of the engine back."""
        self._session.close()

    def _feed(self, stream: str, text: str) -> None:
        self._session.feed(stream, text)
        self.current.add_event("feed", stream=stream, text=text)

    def _mute(self, stream: str) -> None:
        muted = self.muted ^ {stream}
        ablated = tuple(sorted(muted))
        self._session.options = dataclasses.replace(self._session.options, ablated=ablated)
        self.current.add_event("mute" if stream in muted else "unmute", stream=stream)

    def _fork(self) -> None:
        self._snapshots[self.branch] = self._session.snapshot()
        self.branch = self.recording.fork(self.branch)
        self._since = self.clock()

    def _switch(self, branch: int) -> None:
        if branch == self.branch:
            return
        self._snapshots[self.branch] = self._session.snapshot()
        self._session.close()
        self._session = self._engine.restore(self._snapshots.pop(branch))
        self.branch = branch
        self._restart()

    def _restart(self) -> None:
        self._since = self.clock()
        super()._restart()

    def _interval(self) -> float:
        return 1 / self.pace

    async def _advance(self) -> None:
        await self._session.next()
        now = self.clock()
        # Write the row before as well: text that was fed after it was shown has changed its inputs.
        for row, tokens, present in zip(*self._session.transcript(2), strict=True):
            self.current.put(int(row), tokens, present, now - self._since)
        self._since = now


class Replay(Player):
    """A recording at its own pace, times `pace`."""

    def __init__(
        self, recording: Recording, pace: float = 1.0, clock: Callable[[], float] = time.monotonic
    ):
        """Raises UserError for a pace that is not above 0 and at most PACES[-1]."""
        super().__init__(recording, pace, clock)
        self._rows = [0] * len(recording.branches)  # shown, of each branch

    @property
    def rows(self) -> int:
        """How many rows of the branch are shown."""
        return self._rows[self.branch]

    def _switch(self, branch: int) -> None:
        self.branch = branch
        self._restart()

    def _interval(self) -> float:
        times, row = self.current.time, self.rows
        if row >= len(times):
            return math.inf
        return float(times[row] - times[row - 1]) / self.pace if row else 0.0

    def _target_rate(self) -> float:
        """The mean over the rows that the rate is measured over."""
        times = self.current.time[: self.rows][-MEASURED_ROWS:]
        seconds = float(times[-1] - times[0]) if len(times) else 0.0
        return self.pace * (len(times) - 1) / seconds if seconds else 0.0

    async def _advance(self) -> None:
        self._rows[self.branch] += 1


def _nothing() -> None:
    pass
