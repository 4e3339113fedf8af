"""Plays live sessions and recordings at a given pace.

    live = Live(engine, DecodeOptions(temperature=0.7), pace=4)
    live.feed("user", "how are you")     # at any time
    await live.run()                     # rows come until this is cancelled

`Live` runs a session, which can be fed, muted and forked while it runs. `Replay` plays a recording.
Both are a `Player`, which shows the first `rows` rows of `recording.branches[branch]`. The screen
is in msllm/chat/screen.py.
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

from msllm.chat.events import act, record_row
from msllm.chat.recording import Branch, Recording
from msllm.decode.engine import DecodeOptions, Engine, Snapshot
from msllm.errors import UserError

PACES = tuple(digit * 10.0**power for power in range(-1, 4) for digit in (1, 2, 5))  # 0.1 to 5,000
MEASURED_ROWS = 30  # the rate is measured over this many rows
FEWEST_MEASURED = 5  # rows that the rate needs at least
LATE = 0.9  # a player is late if its rate is below this share of the pace


def warm_up(engine: Engine) -> None:
    """Compiles the functions that a live session uses. Needs a free slot of the engine.

    `Engine.warm_up` compiles more, and takes longer.
    """
    session = engine.open()
    for _ in range(2):
        session.step()
    snapshot = session.snapshot()
    session.close()
    engine.restore(snapshot).close()


class Pacer:
    """Decides when the next row is due, and measures the rate of rows.

    All times are in seconds of the same clock. An interval is the time from one row to the next.
    """

    def __init__(self) -> None:
        self._due = -math.inf  # when the last row was due
        self._times: collections.deque[float] = collections.deque(maxlen=MEASURED_ROWS)

    def restart(self) -> None:
        """Makes the next row due at once, for example after a pause."""
        self._due = -math.inf
        self.reset_rate()

    def reset_rate(self) -> None:
        """Starts to measure the rate anew."""
        self._times.clear()

    def wait(self, now: float, interval: float) -> float:
        """Seconds until the next row is due; 0: now; inf: never."""
        return max(0.0, self._due + interval - now) if interval < math.inf else math.inf

    def record(self, now: float, interval: float) -> None:
        """Records that the row that was due after `interval` has arrived."""
        if self._due == -math.inf:
            self._due = now
        else:
            # Count from the time at which the row was due, not from its arrival, so that small
            # delays do not add up. After a long delay, catch up by one row at most.
            self._due = max(self._due + interval, now - interval)
        self._times.append(now)

    @property
    def rate(self) -> float | None:
        """Rows per second; None before FEWEST_MEASURED rows."""
        if len(self._times) < FEWEST_MEASURED or self._times[-1] == self._times[0]:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])


class Player:
    """Shows the rows of a branch one after another.

    Attributes:
      recording: the recording that is shown.
      branch: number of the branch that is shown.
      pace: rows per second; for a recording, a factor on its own pace.
      paused: whether only `step` shows rows.
      on_change: called after every change of what is shown.
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
        self.on_change: Callable[[], None] = _do_nothing
        self._pacer = Pacer()
        self._step_requested = False
        self._woken = asyncio.Event()  # set when the pace or the pause may have changed
        self._advancing = False  # the next row is being computed
        # Actions to run as soon as that row has arrived.
        self._pending: collections.deque[Callable[[], None]] = collections.deque()

    @property
    def current(self) -> Branch:
        """The branch that is shown."""
        return self.recording.branches[self.branch]

    @property
    def rows(self) -> int:
        """The number of rows of the branch that are shown."""
        return self.current.rows

    @property
    def rate(self) -> float | None:
        """Measured rows per second; None after too few rows."""
        return self._pacer.rate

    @property
    def late(self) -> bool:
        """Whether rows arrive more slowly than the pace asks for."""
        return not self.paused and self.rate is not None and self.rate < LATE * self._target_rate()

    @property
    def muted(self) -> frozenset[str]:
        """The streams that are muted."""
        return self.current.muted(self.rows)

    @property
    def ended(self) -> bool:
        """Whether the last row is shown."""
        return self._interval() == math.inf

    def pause(self, paused: bool = True) -> None:
        """Pauses after the row that is being computed, or resumes."""
        self.paused = paused
        self._restart()

    def step(self) -> None:
        """Shows one row of a paused player."""
        if self.paused:
            self._step_requested = True
            self._restart()

    def change_pace(self, steps: int) -> None:
        """Raises the pace by `steps` entries of PACES, or lowers it if `steps` is negative."""
        for _ in range(abs(steps)):
            if steps > 0:
                self.pace = min((pace for pace in PACES if pace > self.pace), default=self.pace)
            else:
                self.pace = max((pace for pace in PACES if pace < self.pace), default=self.pace)
        self._pacer.reset_rate()
        self._woken.set()
        self.on_change()

    def switch(self, branch: int) -> None:
        """Shows another branch. Raises UserError if the branch does not exist."""
        count = len(self.recording.branches)
        if not 0 <= branch < count:
            raise UserError(f"there is no branch {branch}: give a number from 0 to {count - 1}")
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
        """Calls `action` now, or as soon as the row that is being computed has arrived."""
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
        """Seconds from the last row to the next; inf at the end."""
        raise NotImplementedError

    async def _advance(self) -> None:
        """Shows the next row."""
        raise NotImplementedError

    def _switch(self, branch: int) -> None:
        raise NotImplementedError


class Live(Player):
    """Plays a session of an engine.

    Only the branch that is shown advances. Snapshots of the others wait on the host. An action
    while a row is being computed takes effect with the row after it. Call the methods from the
    thread of the event loop.
    """

    def __init__(
        self,
        engine: Engine,
        options: DecodeOptions | None = None,
        pace: float = 4.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Opens a session, which occupies a slot of the engine until `close`.

        Args:
          engine: an engine whose model has a tokenizer.
          options: how cells are sampled; None: the defaults. The streams in `options.ablated` are
            muted at first.
          pace: rows per second.
          clock: returns the time in seconds.

        Raises:
          UserError: the model has no tokenizer, or no slot is free.
        """
        tokenizer, streams = engine.model.tokenizer, engine.streams
        if tokenizer is None:
            raise UserError(
                "the model has no tokenizer, so text cannot be typed: use msllm.Engine with token"
                " ids"
            )
        options = options or DecodeOptions()
        stored = dataclasses.asdict(options)
        recording = Recording(streams.names, streams.kinds, tokenizer, stored)
        super().__init__(recording, pace, clock)
        self._engine, self._session = engine, engine.open(options)
        self._snapshots: dict[int, Snapshot] = {}  # by number, of the branches that are not shown
        self._since = self.clock()  # time of the last row, or of the end of the last pause
        for name in options.ablated:
            self.current.add_event("mute", stream=name)

    @property
    def waiting(self) -> dict[str, int]:
        """{input stream: number of fed tokens that are not in a row yet}."""
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

    def drop(self) -> None:
        """Drops the fed text of all input streams that the model has not read yet."""
        self._between_rows(self._drop)

    def mute(self, stream: str) -> None:
        """Mutes a stream from the next row on, or unmutes it.

        Tokens that are fed to a muted input wait until it is unmuted. Raises UserError for an
        unknown stream.
        """
        self._engine.streams.index(stream)
        self._between_rows(self._mute, stream)

    def fork(self) -> None:
        """Continues in a copy of the branch. The original waits until it is shown again."""
        self._between_rows(self._fork)

    def close(self) -> None:
        """Frees the slot of the engine."""
        self._session.close()

    def _feed(self, stream: str, text: str) -> None:
        act(self._session, self.current, "feed", stream=stream, text=text)

    def _drop(self) -> None:
        if any(self.waiting.values()):
            act(self._session, self.current, "drop")

    def _mute(self, stream: str) -> None:
        what = "unmute" if stream in self.muted else "mute"
        act(self._session, self.current, what, stream=stream)

    def _fork(self) -> None:
        self._snapshots[self.branch] = self._session.snapshot()
        self.branch = self.recording.fork(self.branch)
        self._since = self.clock()

    def _switch(self, branch: int) -> None:
        if branch == self.branch:
            return
        current = self._session.snapshot()
        self._session.close()  # first, because the engine may have no other slot
        try:
            self._session = self._engine.restore(self._snapshots[branch])
        except BaseException:
            self._session = self._engine.restore(current)
            raise
        self._snapshots[self.branch] = current
        del self._snapshots[branch]
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
        record_row(self._session, self.current, now - self._since)
        self._since = now


class Replay(Player):
    """Plays a recording at its own pace, times `pace`."""

    def __init__(
        self, recording: Recording, pace: float = 1.0, clock: Callable[[], float] = time.monotonic
    ):
        """Raises UserError for a pace that is not above 0 and at most PACES[-1]."""
        super().__init__(recording, pace, clock)
        self._rows = [0] * len(recording.branches)  # the number of rows shown of each branch

    @property
    def rows(self) -> int:
        """The number of rows of the branch that are shown."""
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
        """The mean over the rows from which the rate is measured."""
        times = self.current.time[: self.rows][-MEASURED_ROWS:]
        seconds = float(times[-1] - times[0]) if len(times) else 0.0
        return self.pace * (len(times) - 1) / seconds if seconds else 0.0

    async def _advance(self) -> None:
        self._rows[self.branch] += 1


def _do_nothing() -> None:
    pass
