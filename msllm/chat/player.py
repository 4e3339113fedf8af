"""A session that goes on at a pace while one looks at it, types and branches off; and a recording that is shown again.

    live = Live(engine, DecodeOptions(temperature=0.7), pace=4)
    live.feed("user", "how are you")     # from now on at any time
    await live.run()                     # rows come until this is cancelled

Both are players: they show `recording.branches[branch]` up to `rows`. There is no screen here (msllm/chat/screen.py).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable

from msllm.chat.recording import Branch, Recording
from msllm.decode.engine import DecodeOptions, Engine
from msllm.errors import UserError

PACES = tuple(
    digit * 10.0**power for power in range(-1, 4) for digit in (1, 2, 5)
)  # 0.1, 0.2, 0.5, 1, ... 5,000
MEASURED_ROWS = 30  # the rate is that of the last so many rows


def warm_up(engine: Engine) -> None:
    """Compiles all that a live session needs. Takes a free place of the engine for that time."""
    session = engine.open()
    session.step(), session.step()
    snapshot = session.snapshot()
    session.close()
    engine.restore(snapshot).close()


class Pacer:
    """When the next row is due, and how many came. All times are seconds of one clock."""

    def __init__(self):
        self._last, self._came = -math.inf, collections.deque(maxlen=MEASURED_ROWS)

    def restart(self) -> None:
        """After a pause: the next row is due at once."""
        self._last = -math.inf
        self.forget()

    def forget(self) -> None:
        """The rate is measured from here on."""
        self._came.clear()

    def wait(self, now: float, gap: float) -> float:
        """Seconds until a row is due that comes `gap` seconds after the last one; 0: now."""
        return max(0.0, self._last + gap - now) if gap < math.inf else math.inf

    def came(self, now: float, gap: float) -> None:
        """A row that was due after `gap` is there."""
        # From when it was due, not from when it came, so that small delays do not add up; but no more than one row is
        # ever made good.
        self._last = now if self._last == -math.inf else max(self._last + gap, now - gap)
        self._came.append(now)

    @property
    def rate(self) -> float | None:
        """Rows per second; None: too few to say."""
        if len(self._came) < 5 or self._came[-1] == self._came[0]:
            return None
        return (len(self._came) - 1) / (self._came[-1] - self._came[0])


class Player:
    """Shows the rows of a branch one after another.

    Attributes:
      recording, branch: what is shown, and which of its branches.
      rows: how many rows of that branch.
      pace: rows per second, of a replay: times its own pace.
      paused: whether rows come only by `single`.
      changed: is called after everything that changes what is shown.
    """

    def __init__(
        self, recording: Recording, pace: float, clock: Callable[[], float] = time.monotonic
    ):
        if not 0 < pace <= PACES[-1]:
            raise UserError(f"the pace is {pace}: must be above 0 and at most {PACES[-1]:,.0f}")
        self.recording, self.branch, self.pace, self.paused, self.changed = (
            recording,
            0,
            pace,
            False,
            lambda: None,
        )
        self.clock, self._pacer, self._single, self._woken = clock, Pacer(), False, asyncio.Event()
        self._busy, self._actions = False, collections.deque()

    @property
    def shown(self) -> Branch:
        """The branch that is shown."""
        return self.recording.branches[self.branch]

    @property
    def rows(self) -> int:
        return self.shown.rows

    @property
    def rate(self) -> float | None:
        """Rows per second that came; None: too few to say."""
        return self._pacer.rate

    @property
    def late(self) -> bool:
        """Whether the pace cannot be held."""
        return not self.paused and self.rate is not None and self.rate < 0.9 * self._wanted()

    @property
    def muted(self) -> frozenset[str]:
        """Streams that are muted."""
        return self.shown.muted(self.rows)

    @property
    def ended(self) -> bool:
        """Whether no more rows come."""
        return self._gap() == math.inf

    def pause(self, paused: bool = True) -> None:
        """Stops after the row that is under way, or goes on."""
        self.paused = paused
        self._restart()

    def single(self) -> None:
        """Shows one row although it is paused."""
        if self.paused:
            self._single = True
            self._restart()

    def faster(self, steps: int = 1) -> None:
        """So many steps up in PACES, or down."""
        for _ in range(abs(steps)):
            further = [
                pace for pace in PACES if (pace > self.pace if steps > 0 else pace < self.pace)
            ]
            self.pace = (min if steps > 0 else max)(further, default=self.pace)
        self._pacer.forget()
        self._woken.set()
        self.changed()

    def switch(self, branch: int) -> None:
        """Shows another branch. Raises UserError if there is none of that number."""
        if not 0 <= branch < len(self.recording.branches):
            raise UserError(
                f"there is no branch {branch}: there are {len(self.recording.branches)}, from 0 on"
            )
        self._do(lambda: self._switch(branch))

    async def run(self) -> None:
        """Shows rows until it is cancelled."""
        self._restart()
        while True:
            await self._due()
            gap, self._busy = self._gap(), True
            try:
                await self._next()
            finally:
                self._busy = False
            self._pacer.came(self.clock(), gap)
            while self._actions:
                self._actions.popleft()()
            self.changed()

    async def _due(self) -> None:
        """Returns when a row is to come."""
        while True:
            await asyncio.sleep(0)  # even if rows are always late, others have their turn
            self._woken.clear()
            if self._single and not self.ended:
                self._single = False
                return
            left = math.inf if self.paused else self._pacer.wait(self.clock(), self._gap())
            if not left:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), None if left == math.inf else left)

    def _do(self, action: Callable[[], None]) -> None:
        """Does something between two rows: now, or when the row that is under way is there."""
        if self._busy:
            self._actions.append(action)
        else:
            action()
            self.changed()

    def _restart(self) -> None:
        """The next row comes at once, unless it is paused."""
        self._pacer.restart()
        self._woken.set()
        self.changed()

    def _wanted(self) -> float:
        """Rows per second at the pace that is set."""
        return 1 / self._gap()

    def _gap(self) -> float:
        """Seconds from the last row to the next; infinite: there is none."""
        raise NotImplementedError

    async def _next(self) -> None:
        raise NotImplementedError

    def _switch(self, branch: int) -> None:
        raise NotImplementedError


class Live(Player):
    """A session of an engine. Only the branch that is shown goes on: the others wait on the host where they were left.

    What is done while a row is under way holds from the row after it. Use it from the thread of the event loop.
    """

    def __init__(
        self,
        engine: Engine,
        options: DecodeOptions = DecodeOptions(),
        pace: float = 4.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Takes one place of the engine. Raises UserError."""
        if engine.model.tokenizer is None:
            raise UserError(
                "the model came without a tokenizer: nothing can be typed, use msllm.Engine with token ids"
            )
        streams = engine.streams
        super().__init__(
            Recording(
                streams.names, streams.kinds, engine.model.tokenizer, dataclasses.asdict(options)
            ),
            pace,
            clock,
        )
        self._engine, self._session, self._left = engine, engine.open(options), {}
        self._since = self.clock()
        for name in options.ablated:
            self.shown.add("mute", stream=name)

    @property
    def waiting(self) -> dict[str, int]:
        """{input stream: tokens that have not been read}."""
        return self._session.waiting

    def feed(self, stream: str, text: str) -> None:
        """Appends a text to what an input stream says. Raises UserError."""
        streams = self._engine.streams
        if streams.kinds[streams.index(stream)] != "input":
            raise UserError(f"stream {stream!r} is no input: {self._inputs()}")
        if self.recording.tokenizer.encode(text):
            self._do(lambda: self._feed(stream, text))

    def mute(self, stream: str) -> None:
        """Silences a stream from the next row on, or lets it speak again. What a silent input is fed waits. UserError."""
        self._engine.streams.index(stream)
        self._do(lambda: self._mute(stream))

    def fork(self) -> None:
        """Goes on in a copy; the branch that was shown stays as it is until it is shown again."""
        self._do(self._fork)

    def close(self) -> None:
        """Gives the place back."""
        self._session.close()

    def _inputs(self) -> str:
        names = [
            name
            for name, kind in zip(self.recording.names, self.recording.kinds)
            if kind == "input"
        ]
        return f"inputs are {', '.join(names) or 'none'}"

    def _feed(self, stream: str, text: str) -> None:
        self._session.feed(stream, text)
        self.shown.add("feed", stream=stream, text=text)

    def _mute(self, stream: str) -> None:
        muted = self.muted ^ {stream}
        self._session.options = dataclasses.replace(
            self._session.options, ablated=tuple(sorted(muted))
        )
        self.shown.add("mute" if stream in muted else "unmute", stream=stream)

    def _fork(self) -> None:
        self._left[self.branch] = self._session.snapshot()
        self.branch = self.recording.fork(self.branch)
        self._since = self.clock()

    def _switch(self, branch: int) -> None:
        if branch == self.branch:
            return
        self._left[self.branch] = self._session.snapshot()
        self._session.close()
        self._session, self.branch = self._engine.restore(self._left.pop(branch)), branch
        self._restart()

    def _restart(self) -> None:
        self._since = self.clock()
        super()._restart()

    def _gap(self) -> float:
        return 1 / self.pace

    async def _next(self) -> None:
        await self._session.next()
        now = self.clock()
        # The row before, too: what was fed after it was shown has come into it.
        for row, tokens, present in zip(*self._session.transcript(2)):
            self.shown.put(int(row), tokens, present, now - self._since)
        self._since = now


class Replay(Player):
    """A recording at its own pace, times `pace`."""

    def __init__(
        self, recording: Recording, pace: float = 1.0, clock: Callable[[], float] = time.monotonic
    ):
        super().__init__(recording, pace, clock)
        self._rows = [0] * len(recording.branches)

    @property
    def rows(self) -> int:
        return self._rows[self.branch]

    def _switch(self, branch: int) -> None:
        self.branch = branch
        self._restart()

    def _gap(self) -> float:
        time = self.shown.time
        if self.rows >= len(time):
            return math.inf
        return float(time[self.rows] - time[self.rows - 1]) / self.pace if self.rows else 0.0

    def _wanted(self) -> float:
        """That of the rows which the rate is measured over."""
        first, last = max(0, self.rows - MEASURED_ROWS), self.rows - 1
        seconds = float(self.shown.time[last] - self.shown.time[first]) if last > first else 0.0
        return self.pace * (last - first) / seconds if seconds else 0.0

    async def _next(self) -> None:
        self._rows[self.branch] += 1
