"""The sessions of a server: what their clients do to them, and the rows that they get."""

from __future__ import annotations

import asyncio
import collections
import copy
import hashlib
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from msllm.chat.events import KINDS, act, record_row
from msllm.chat.recording import Branch, Recording
from msllm.decode.engine import DecodeOptions, Engine, Row, Session, Stop
from msllm.decode.script import Detokenizer
from msllm.errors import UserError
from msllm.serve import protocol
from msllm.serve.limits import Limits
from msllm.serve.log import LogFolder, forked_log, new_log
from msllm.serve.metrics import Metrics
from msllm.serve.outbox import Outbox, Reader
from msllm.serve.protocol import Action, Configure, Refused
from msllm.serve.sampling import changed_options, stored

logger = logging.getLogger("msllm")


class Served:
    """A session of an engine that belongs to a client. Change it between rows only.

    Attributes:
      name: what the server calls it; not a secret.
      key: the client's key to it; a secret.
      session: the session of the engine.
      streams: the streams of the model.
      log: its log.
      outbox: the frames for the client.
      show: what rows show besides the text.
      paused: whether the client has paused it.
      ended: why it has ended; "": it has not.
    """

    def __init__(
        self,
        sessions: Sessions,
        session: Session,
        log: Recording,
        show: frozenset[str],
        texts: CellTexts | None = None,
    ):
        limits = sessions.limits
        self.name, self.key = secrets.token_hex(4), secrets.token_urlsafe(24)
        self.session, self.log, self.show = session, log, show
        self.paused, self.ended = False, ""
        self.outbox = Outbox(
            limits.held_frames, limits.unsent_frames, sessions.metrics.queue.observe
        )
        self.script: collections.deque[Mapping[str, Any]] = collections.deque()
        self.last_frame = self.since = time.monotonic()
        self.without_client: float | None = self.since  # since when there is no connection
        self._sessions, self._metrics = sessions, sessions.metrics
        self.streams = streams = sessions.engine.streams
        self._texts = texts or CellTexts(sessions.engine)
        self._rows_until_pause = 0
        self._unanswered: int | None = None  # the row of the first input without an answer
        self._outputs = [i for i, kind in enumerate(streams.kinds) if kind == "output"]

    @property
    def branch(self) -> Branch:
        """The rows and events of the log."""
        return self.log.branches[0]

    @property
    def advances(self) -> bool:
        """Whether the next beat computes a row of this session."""
        return not (self.ended or self.paused or self.outbox.reader is None)

    def granted(self) -> protocol.Granted:
        """The frame that tells a client about the session."""
        sessions, streams = self._sessions, self.streams
        return protocol.Granted(
            session=self.key,
            name=self.name,
            streams=[protocol.Stream(*each) for each in zip(streams.names, streams.kinds)],
            row=self.branch.rows,
            beat_ms=1e3 * sessions.beat_seconds,
            window=sessions.engine.window,
            grace_s=sessions.limits.grace_s,
            muted=sorted(self.session.options.ablated),
            paused=self.paused,
            options=stored(self.session.options),
        )

    def apply(self, frame: Action) -> None:
        """Does what a client asks for, except `Save` and `Close`. Raises Refused and UserError."""
        match frame:
            case protocol.Feed() | protocol.Force():
                self._add(type(frame).__name__.lower(), frame.stream, frame.text)
            case protocol.Allow():
                self._act("allow", stream=frame.stream, text=frame.text)
            case protocol.Drop():
                self._act("drop", stream=frame.stream)
            case protocol.Mute():
                self.streams.members(frame.stream)
                what = "mute" if frame.muted else "unmute"
                self._act(what, stream=frame.stream)
            case protocol.Sample():
                before = self.session.options
                self._act_options(changed_options(before, frame.sampling, self.streams))
            case protocol.Show():
                self.show = checked_details(frame.show)
            case protocol.Fork():
                self.outbox.push(self._sessions.fork(self, frame.seed))
            case protocol.Pause():
                self.pause()
            case protocol.Resume():
                if self.paused:
                    self.since = time.monotonic()
                self.paused, self._rows_until_pause = False, frame.rows

    def pause(self) -> None:
        """Stops the rows."""
        self.paused, self._rows_until_pause = True, 0

    def apply_script(self) -> None:
        """Applies the events of a log that are due before the next row."""
        while self.script and self.script[0]["row"] <= self.session.rows:
            event = dict(self.script.popleft())
            event.pop("row")
            try:
                self._check_pending(event.get("text"))
                act(self.session, self.branch, **event)
            except (UserError, Refused) as error:
                self._sessions.end(self, "failed", f"an event of the log is refused: {error}")
                return

    def take(self, row: Row, late: float, beat_seconds: float) -> None:
        """Takes the session's next row, `late` seconds after it was due."""
        now = time.monotonic()
        seconds, self.since = now - self.since, now
        record_row(self.session, self.branch, seconds)
        if row.index:
            self._metrics.gap.observe(seconds)
        before, text = self._texts.add(row, self.branch.tokens)
        frame = protocol.Row(
            row=row.index,
            text=text,
            before=before,
            waiting={name: count for name, count in self.session.waiting.items() if count},
        )
        if late > beat_seconds:
            frame.late_ms = round(1e3 * late, 1)
        names = self.streams.names
        if not row.present.all():
            frame.absent = [names[s] for s in np.flatnonzero(~row.present)]
        if self.show:
            for detail in ("entropy", "logprob"):
                if detail in self.show:
                    values = getattr(row, detail).tolist()
                    setattr(frame, detail, {n: v for n, v in zip(names, values) if v == v})
            if "tokens" in self.show:
                here = zip(names, row.tokens.tolist(), row.present)
                frame.tokens = {name: token for name, token, present in here if present}
                if before:
                    read = self.branch.tokens[row.index - 1]
                    frame.tokens_before = {n: int(read[names.index(n)]) for n in before}
        self.outbox.push(frame)
        self._measure_response(row.index, before, text)
        if self.session.finished:
            self._sessions.end(self, "stop", self.session.finished)
        elif self.session.rows >= self._sessions.limits.rows:
            self._sessions.end(self, "rows", f"a session has at most {self.session.rows} rows")
        elif self._rows_until_pause:
            self._rows_until_pause -= 1
            self.paused = not self._rows_until_pause

    def _measure_response(self, row: int, before: Mapping, text: Mapping) -> None:
        names, kinds = self.streams.names, self.streams.kinds
        if self._unanswered is not None and any(names[s] in text for s in self._outputs):
            self._metrics.response_rows.observe(row - self._unanswered)
            self._unanswered = None
        if self._unanswered is None:
            inputs = {name for name, kind in zip(names, kinds) if kind == "input"}
            fed = [row - 1] * bool(inputs & before.keys()) + [row] * bool(inputs & text.keys())
            self._unanswered = fed[0] if fed else None

    def _act(self, what: str, **details: Any) -> None:
        act(self.session, self.branch, what, **details)

    def _act_options(self, options: DecodeOptions) -> None:
        changed = stored(options)
        del changed["ablated"]
        self._act("options", options=changed)

    def _add(self, what: str, stream: str, text: str | list[int]) -> None:
        """Feeds or forces a text, or tokens."""
        self._check_pending(text)
        self._act(what, stream=stream, text=text)
        if isinstance(text, str) and (words := self._texts.tokenizer.unknown_words(text)):
            shown = ", ".join(repr(word) for word in words[:5])
            message = f"unknown to the model: {shown}"
            self.outbox.push(protocol.Notice(code="unknown_words", message=message))

    def _check_pending(self, text: str | list[int] | None) -> None:
        """Raises Refused if too many tokens would wait together with those of a text."""
        if text is None:
            return
        new = len(self._texts.tokenizer.encode(text) if isinstance(text, str) else text)
        waiting = sum(self.session.waiting.values()) + sum(self.session.waiting_forced.values())
        most = self._sessions.limits.pending_tokens
        if waiting + new > most:
            raise Refused(
                "pending_tokens",
                f"{waiting} tokens wait and {new} more were sent: at most {most} may wait; send"
                " them later",
            )


class CellTexts:
    """The text that each cell adds to its stream.

    Input may still change the row that was shown last, so the texts of inputs follow from the rows
    as the model reads them. An incomplete character has no text until a later token completes it.
    """

    def __init__(self, engine: Engine):
        self.tokenizer = engine.model.require_tokenizer()
        self._names, self._silence = engine.streams.names, engine.silence_id
        self._inputs = {
            stream: Detokenizer(self.tokenizer)
            for stream, kind in enumerate(engine.streams.kinds)
            if kind == "input"
        }
        self._shown: np.ndarray | None = None  # the row before, as it was shown

    def add(self, row: Row, tokens: np.ndarray) -> tuple[dict[str, str], dict[str, str]]:
        """The texts of the cells of the row before that have changed, and of those of a row.

        Args:
          row: the row.
          tokens: [rows, S], all rows as the model reads them.
        """
        before: dict[str, str] = {}
        if self._shown is not None:
            read = tokens[row.index - 1]
            for stream in np.flatnonzero(read != self._shown).tolist():
                if stream in self._inputs and self._shown[stream] != self._silence:
                    self._inputs[stream].undo()
                before[self._names[stream]] = self._text(stream, int(read[stream]))
        self._shown = row.tokens
        texts: dict[str, str] = {}
        assert row.text is not None
        for stream in np.flatnonzero(row.present & (row.tokens != self._silence)).tolist():
            is_input = stream in self._inputs
            text = self._text(stream, int(row.tokens[stream])) if is_input else row.text[stream]
            texts[self._names[stream]] = text
        return before, texts

    def copy(self) -> CellTexts:
        """An independent copy."""
        copied = copy.copy(self)
        copied._inputs = copy.deepcopy(self._inputs)
        return copied

    def _text(self, stream: int, token: int) -> str:
        if token == self._silence:
            return ""
        if stream in self._inputs:
            return self._inputs[stream].add(token)
        return self.tokenizer.decode([token])


class Sessions:
    """All sessions of a server.

    Attributes:
      draining: whether no more sessions are opened, because the server is shutting down.
      ready: whether everything is compiled.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        metrics: Metrics,
        beat_seconds: float,
        logs: LogFolder | None = None,
    ):
        """`logs` is where the logs of sessions are saved when they end; None: nowhere."""
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self.beat_seconds = beat_seconds
        self.draining, self.ready = False, False
        self._logs = logs
        self._most = engine.free  # sessions that have ended and are kept
        self._by_key: dict[bytes, Served] = {}
        self._saving: set[asyncio.Future[None]] = set()

    @property
    def all(self) -> list[Served]:
        """All sessions, with those whose last frames a client may still fetch."""
        return list(self._by_key.values())

    @property
    def open_ones(self) -> list[Served]:
        """The sessions that have not ended."""
        return [served for served in self._by_key.values() if not served.ended]

    def open(self, frame: Configure, defaults: DecodeOptions | None = None) -> Served:
        """Opens a session. Raises Refused and UserError."""
        self.check_room()
        streams = self.engine.streams
        options = changed_options(defaults or DecodeOptions(), frame.sampling, streams)
        show = checked_details(frame.show)
        script = checked_events(frame.events)
        stop = Stop(rows=frame.stop.rows, silent_rows=frame.stop.silent_rows)
        session = self.engine.open(options, stop=stop)
        try:
            served = Served(self, session, new_log(self.engine, options), show)
            for stream, text in frame.allow.items():
                act(session, served.branch, "allow", stream=stream, text=text)
        except BaseException:
            session.close()
            raise
        served.paused = frame.paused
        served.script.extend(script)
        self._add(served, "configure")
        return served

    def check_room(self) -> None:
        """Raises Refused if no session can be opened now."""
        retry = self.limits.retry_s
        if self.draining:
            raise Refused("draining", "the server is shutting down: try another one", retry)
        if not self.ready:
            raise Refused("not_ready", "the server is still starting: try again later", retry)
        if not self.engine.free:
            count = len(self.engine.sessions)
            raise Refused(
                "full", f"all {count} sessions of the server are in use: try again later", retry
            )

    def fork(self, parent: Served, seed: int | None = None) -> protocol.Forked:
        """Opens a copy of a session, which waits for a client. Raises Refused and UserError."""
        self.check_room()
        session = parent.session.fork()
        try:
            texts = parent._texts.copy()
            served = Served(self, session, forked_log(parent.log), parent.show, texts)
            served.paused, served._unanswered = parent.paused, parent._unanswered
            served.script.extend(parent.script)
            if seed is not None:
                served.apply(protocol.Sample(sampling={"seed": seed}))
        except BaseException:
            session.close()
            raise
        self._add(served, "fork")
        return protocol.Forked(session=served.key, name=served.name, row=served.branch.rows)

    def find(self, key: str) -> Served:
        """The session with a key. Raises Refused."""
        served = self._by_key.get(_digest(key))
        if served is None:
            raise Refused(
                "unknown_session",
                "no session has this key: it has ended, or its time to reconnect is over; open"
                " another with `configure`",
            )
        return served

    def end(self, served: Served, reason: str, message: str) -> None:
        """Ends a session and saves its log. Its client can still fetch the last frames."""
        if served.ended:
            return
        assert reason in protocol.REASONS
        served.ended = reason
        served.session.close()
        rows = served.branch.rows
        served.outbox.push(protocol.Done(reason=reason, message=message, rows=rows))
        served.outbox.close()
        if served.outbox.reader is None and served.without_client is None:
            served.without_client = time.monotonic()
        self.metrics.ended.labels(reason).inc()
        self.metrics.sessions.dec()
        logger.info("session %s ended after %d rows: %s", served.name, rows, message)
        if self._logs:
            work = asyncio.get_running_loop().run_in_executor(
                None, self._logs.save, served.log, served.name
            )
            self._saving.add(work)
            work.add_done_callback(self._saving.discard)

    def connect(self, served: Served, seen: int) -> Reader:
        """Gives a session to a connection, whose reader it returns. Raises Refused."""
        reader = served.outbox.connect(seen)
        served.since = served.last_frame = time.monotonic()
        served.without_client = None
        return reader

    def leave(self, served: Served, reader: Reader) -> None:
        """Says that a connection is gone. The session waits for another one."""
        if served.outbox.reader is reader:
            served.outbox.reader = None
        if served.outbox.reader is None and served.without_client is None:
            served.without_client = time.monotonic()
        if served.ended and reader.sent >= served.outbox.seq:
            self._by_key.pop(_digest(served.key), None)

    def sweep(self) -> None:
        """Ends sessions that nobody uses, and forgets those that have ended."""
        now, limits = time.monotonic(), self.limits
        # Clients that end many sessions and leave must not fill the memory.
        for served in [served for served in self.all if served.ended][: -self._most]:
            self._by_key.pop(_digest(served.key), None)
        for served in self.all:
            gone = served.without_client
            if gone is not None and now - gone > limits.grace_s:
                seconds = f"{limits.grace_s:g} s"
                self.end(served, "expired", f"no client has reconnected within {seconds}")
                self._by_key.pop(_digest(served.key), None)
            elif not served.ended and now - served.last_frame > limits.idle_s:
                self.end(served, "idle", f"no frame came for {limits.idle_s:g} s")

    def begin_to_drain(self, seconds: float) -> None:
        """Opens no more sessions, and tells all clients."""
        self.draining = True
        message = f"the server shuts down in at most {seconds:g} s, and its sessions end then"
        for served in self.open_ones:
            served.outbox.push(protocol.Notice(code="draining", message=message))

    async def saved(self) -> None:
        """Waits until all logs are saved."""
        while self._saving:
            await asyncio.wait(self._saving)

    def _add(self, served: Served, how: str) -> None:
        self._by_key[_digest(served.key)] = served
        self.metrics.opened.labels(how).inc()
        self.metrics.sessions.inc()


def checked_details(show: list[str]) -> frozenset[str]:
    """The details that rows show. Raises UserError for unknown ones."""
    for name in show:
        if name not in protocol.DETAILS:
            known = ", ".join(protocol.DETAILS)
            raise UserError(f"show has {name!r}: must be some of {known}")
    return frozenset(show)


def checked_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of a log, in order. Raises UserError if one is no event."""
    last = 0
    for event in events:
        what, row = event.get("what"), event.get("row")
        keys = {"row", "what", *KINDS.get(str(what), ())}
        if what not in KINDS or not event.keys() <= keys:
            raise UserError(
                f"{event!r:.100} is no event: it has `row`, `what` ({', '.join(KINDS)}), and what"
                " docs/chat.md lists for it"
            )
        if isinstance(row, bool) or not isinstance(row, int) or row < last:
            raise UserError(f"the row of an event is {row!r}: must be an integer, {last} or more")
        last = row
    return events


def _digest(key: str) -> bytes:
    """Stands for a key, so that the time of a look-up says nothing about the keys."""
    return hashlib.sha256(key.encode(errors="replace")).digest()
