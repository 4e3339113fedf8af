"""Answers of a session as the text of one stream, for the OpenAI routes.

Those interfaces know messages and one text at a time. Here the texts of the user and the system go
into input streams, one output stream is read, and an answer ends when that stream has been silent
for a while.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from msllm.errors import UserError
from msllm.serve.outbox import Reader
from msllm.serve.protocol import Done, Row, decode_server
from msllm.serve.sessions import Served
from msllm.streams import StreamSpec

QUIET_ROWS = 8  # silent rows of the stream after which an answer has ended
PATIENCE_ROWS = 64  # silent rows after which there is no answer
MOST_ROWS = 4096  # of an answer

# Streams that may speak for a role, in the order in which they are tried.
_NAMES = {
    "system": ("system", "instruction"),
    "user": ("user", "data", "observer"),
    "assistant": ("output", "assistant"),
}
_KINDS = {"system": "input", "user": "input", "assistant": "output"}


def stream_of(role: str, streams: StreamSpec) -> str:
    """The stream of a role: user, system (otherwise the user's) or assistant. Raises UserError."""
    kinds = dict(zip(streams.names, streams.kinds))
    names = [name for name in _NAMES[role] if kinds.get(name) == _KINDS[role]]
    if role == "system" and not names:
        return stream_of("user", streams)
    names += [name for name, kind in kinds.items() if kind == _KINDS[role]]
    if not names:
        raise UserError(
            f"the model has no {_KINDS[role]} stream for the role {role!r}: use /v1/sessions"
        )
    return names[0]


class Answer:
    """An answer while it is read.

    Attributes:
      tokens: the number of its tokens so far.
      reason: why it has ended: stop, length or cancelled; "": it has not.
      error: what happened to the session; "": nothing.
    """

    def __init__(self, served: Served, reader: Reader, start: int, most_tokens: int | None):
        """Reads from row `start` on, at most `most_tokens` tokens; None: no limit."""
        self._served, self._reader, self._start = served, reader, start
        self._most = most_tokens
        self._stream = stream_of("assistant", served.streams)
        self.tokens, self.reason, self.error = 0, "", ""

    async def texts(self) -> AsyncIterator[str]:
        """Yields the text of the answer as it comes."""
        quiet = rows = 0
        async for content in self._reader.frames(self._served.outbox):
            frame = decode_server(content)
            if isinstance(frame, Done):
                self.reason, self.error = "length", "" if frame.reason == "rows" else frame.message
                return
            if not isinstance(frame, Row) or frame.row < self._start:
                continue
            rows += 1
            text = frame.text.get(self._stream)
            if text is None:
                waits = frame.waiting or self._served.script
                quiet = 0 if waits else quiet + 1
            else:
                quiet = 0
                self.tokens += 1
                if text:
                    yield text
            if self.reason:  # cancelled
                return
            if quiet >= (QUIET_ROWS if self.tokens else PATIENCE_ROWS):
                self.reason = "stop"
                return
            if rows >= MOST_ROWS or (self._most is not None and self.tokens >= self._most):
                self.reason = "length"
                return
        self.reason = self.reason or "length"
        self.error = self._reader.dropped.message if self._reader.dropped else ""
