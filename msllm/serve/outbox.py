"""The frames of a session on their way to its client.

The beat pushes frames and never waits. The task of the connection sends them at the client's own
speed. A client that falls behind by too many frames is dropped. The last frames are held, so that a
client can reconnect without a gap.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import AsyncIterator, Callable

from msllm.serve.protocol import Refused, ServerFrame, encode


class Reader:
    """A connection's place in an outbox.

    Attributes:
      sent: the last sequence number that was handed to the connection.
      dropped: why the connection must end; None: it goes on.
      gone: set when the connection must end.
    """

    def __init__(self, sent: int):
        self.sent = sent
        self.dropped: Refused | None = None
        self.gone = asyncio.Event()
        self._woken = asyncio.Event()
        self._direct: collections.deque[str] = collections.deque()

    def send(self, frame: ServerFrame) -> None:
        """Sends a frame without a sequence number before all others."""
        self._direct.append(encode(frame))
        self.wake()

    def drop(self, why: Refused) -> None:
        """Ends the connection."""
        self.dropped = self.dropped or why
        self.gone.set()
        self.wake()

    def wake(self) -> None:
        """Lets the task of the connection look for frames."""
        self._woken.set()

    async def frames(self, outbox: Outbox) -> AsyncIterator[str]:
        """Yields frames as JSON until the reader is dropped or the outbox is closed and empty."""
        while not self.dropped:
            self._woken.clear()
            while self._direct:
                yield self._direct.popleft()
            while self.sent < outbox.seq and not self.dropped:
                self.sent += 1
                yield outbox.frame(self.sent)
            if self.dropped or (outbox.closed and not self._direct and self.sent >= outbox.seq):
                return
            await self._woken.wait()


class Outbox:
    """The last frames of a session.

    Attributes:
      seq: the sequence number of the newest frame; 0: there is none.
      reader: the connection; None: there is none.
      closed: whether no frame will follow.
    """

    def __init__(self, held: int, unsent: int, on_sent: Callable[[float], None]):
        """Makes an empty outbox.

        Args:
          held: the number of frames that can be sent again.
          unsent: the most frames by which a connection may fall behind; at most `held`.
          on_sent: called with the seconds that each frame waited before it was first sent.
        """
        self.seq, self.closed = 0, False
        self.reader: Reader | None = None
        self._frames: collections.deque[tuple[str, float]] = collections.deque(maxlen=held)
        self._unsent, self._on_sent, self._measured = unsent, on_sent, 0

    def push(self, frame: ServerFrame) -> None:
        """Numbers and appends a frame. Drops the reader if it has fallen behind too far."""
        self.seq += 1
        frame.seq = self.seq
        self._frames.append((encode(frame), time.monotonic()))
        if self.reader is None:
            return
        if self.seq - self.reader.sent > self._unsent:
            self.disconnect(
                Refused(
                    "slow_reader",
                    f"{self._unsent} frames wait for the client: read faster, and reconnect",
                )
            )
        else:
            self.reader.wake()

    def frame(self, seq: int) -> str:
        """The frame with a sequence number, which must be held."""
        content, pushed = self._frames[seq - self.seq - 1]
        if seq > self._measured:
            self._measured = seq
            self._on_sent(time.monotonic() - pushed)
        return content

    def connect(self, seen: int) -> Reader:
        """Lets a connection continue after the frame `seen`, in place of any other one.

        Raises Refused if that frame does not exist, or if frames after it are no longer held.
        """
        if not self.seq - len(self._frames) <= seen <= self.seq:
            raise Refused(
                "missed",
                f"seen is {seen}: the server holds frames {self.seq - len(self._frames) + 1} to"
                f" {self.seq}; reconnect with seen={self.seq - len(self._frames)} or more, or open"
                " another session",
            )
        self.disconnect(Refused("replaced", "another connection has taken over the session"))
        self.reader = Reader(seen)
        return self.reader

    def disconnect(self, why: Refused) -> None:
        """Drops the reader, if there is one."""
        reader, self.reader = self.reader, None
        if reader:
            reader.drop(why)

    def close(self) -> None:
        """Says that no frame will follow."""
        self.closed = True
        if self.reader:
            self.reader.wake()
