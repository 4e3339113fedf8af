"""The beat: one task that advances all sessions of a server together, one row at a time.

Between two rows, and only then, the tasks of the connections may change sessions. They take the
lock `between_rows` for that. The lock is fair: a client that floods the server changes its session
at most once per row while others wait, and never delays a row by more than one frame of each
client.
"""

from __future__ import annotations

import asyncio
import logging
import time

from msllm.errors import RunError
from msllm.serve.sessions import Sessions

logger = logging.getLogger("msllm")

SWEEP_S = 0.5  # between two looks for sessions that nobody uses


class Beat:
    """Advances the sessions on a beat.

    Attributes:
      between_rows: the lock that guards all changes of sessions.
    """

    def __init__(self, sessions: Sessions):
        self._sessions = sessions
        self.between_rows = asyncio.Lock()

    async def run(self) -> None:
        """Advances sessions until it is cancelled."""
        seconds = self._sessions.beat_seconds
        due = swept = time.monotonic()
        while True:
            await asyncio.sleep(max(due - time.monotonic(), 0))
            async with self.between_rows:
                await self._step(due)
                now = time.monotonic()
                if now - swept > SWEEP_S:
                    self._sessions.sweep()
                    swept = now
            # After a long delay, catch up by one row at most.
            due = max(due + seconds, now - seconds)

    async def _step(self, due: float) -> None:
        """Advances all sessions that are not paused by one row."""
        sessions, metrics = self._sessions, self._sessions.metrics
        for served in sessions.open_ones:
            if served.script and served.advances:
                served.apply_script()
        advancing = {served.session: served for served in sessions.open_ones if served.advances}
        if not advancing:
            return
        start = time.monotonic()
        try:
            rows = await sessions.engine.advance(list(advancing))
        except RunError as error:  # the device failed, and all sessions are lost
            logger.error("%s", error)
            for served in sessions.open_ones:
                if served.session.closed:
                    sessions.end(served, "failed", str(error))
            return
        metrics.compute.observe(time.monotonic() - start)
        for session, row in rows.items():
            served = advancing[session]
            if isinstance(row, Exception):
                sessions.end(served, "failed", f"{row}")
                continue
            late = time.monotonic() - due
            served.take(row, late, sessions.beat_seconds)
            metrics.rows.inc()
            metrics.late.observe(late)
            if late <= sessions.beat_seconds:
                metrics.rows_on_time.inc()
