"""`/v1/realtime`: the part of OpenAI's Realtime API that concerns text.

A connection is a session. It advances while a response is read, and waits otherwise. Items that the
client creates during a response are input while the model speaks, so it can be interrupted. What is
not supported (audio, tools, deleting items) gets an error event that names it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from typing import Any

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from msllm.errors import UserError
from msllm.serve.answers import Answer, stream_of
from msllm.serve.beat import Beat
from msllm.serve.completions import MODEL
from msllm.serve.limits import Bucket
from msllm.serve.outbox import Reader
from msllm.serve.protocol import Configure, Feed, Pause, Refused, Resume
from msllm.serve.sessions import Served, Sessions


class _Refused(Exception):
    """An event is refused."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Realtime:
    """One connection."""

    def __init__(self, websocket: WebSocket, sessions: Sessions, beat: Beat):
        self._websocket, self._sessions, self._beat = websocket, sessions, beat
        self._numbers = itertools.count(1)
        self._response: asyncio.Task[None] | None = None
        self._answer: Answer | None = None
        self._instructions = ""

    async def run(self) -> None:
        """Serves the client until it leaves."""
        await self._websocket.accept()
        try:
            async with self._beat.between_rows:
                served = self._sessions.open(Configure(paused=True))
                reader = self._sessions.connect(served, 0)
        except (Refused, UserError) as error:
            await self._error(getattr(error, "code", "invalid"), str(error), None)
            return await self._websocket.close(1013)
        with contextlib.suppress(WebSocketDisconnect):
            try:
                await self._send("session.created", session=self._session(served))
                await self._listen(served, reader)
            finally:
                if self._response:
                    self._response.cancel()
                    await asyncio.gather(self._response, return_exceptions=True)
                async with self._beat.between_rows:
                    self._sessions.end(served, "closed", "the client has left")
                    reader.sent = served.outbox.seq
                    self._sessions.leave(served, reader)

    async def _listen(self, served: Served, reader: Reader) -> None:
        limits = self._sessions.limits
        bucket = Bucket(limits.frames_per_s, limits.frames_at_once, time.monotonic())
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if served.ended or not bucket.take(time.monotonic()):
                code = served.ended or "frame_rate"
                await self._error(code, "the session has ended, or too many events came", None)
                return await self._websocket.close(1008)
            data, id = message.get("text") or message.get("bytes") or b"", None
            try:
                if len(data.encode() if isinstance(data, str) else data) > limits.frame_bytes:
                    raise _Refused(
                        "frame_bytes", f"an event has at most {limits.frame_bytes} bytes"
                    )
                event = msgspec.json.decode(data, type=dict[str, Any])
                id = event.get("event_id")
                served.last_frame = time.monotonic()
                await self._do(served, reader, event)
            except (_Refused, Refused) as error:
                await self._error(error.code, str(error), id)
            except (UserError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
                await self._error("invalid", str(error), id)

    async def _do(self, served: Served, reader: Reader, event: dict[str, Any]) -> None:
        """Does what an event asks for. Raises _Refused, Refused and UserError."""
        kind = event.get("type")
        if kind == "session.update":
            await self._update(served, event.get("session"))
        elif kind == "conversation.item.create":
            await self._create_item(served, event.get("item"))
        elif kind == "response.create":
            self._check_response(event.get("response") or {})
            if self._response and not self._response.done():
                raise _Refused("conversation_already_has_active_response", "a response is active")
            self._response = asyncio.create_task(self._respond(served, reader))
        elif kind == "response.cancel":
            if self._answer is None:
                raise _Refused("response_cancel_not_active", "no response is active")
            self._answer.reason = "cancelled"
        else:
            raise _Refused("unsupported", f"{kind!r:.80} is not supported: only text is")

    async def _update(self, served: Served, session: Any) -> None:
        allowed = {"type", "model", "instructions", "output_modalities"}
        if not isinstance(session, dict) or not session.keys() <= allowed:
            unknown = sorted(set(session) - allowed) if isinstance(session, dict) else "no session"
            raise _Refused("unsupported", f"{unknown} is not supported in session.update")
        self._check_response({k: v for k, v in session.items() if k in ("output_modalities",)})
        text = session.get("instructions", "")
        if text and text != self._instructions:
            await self._feed(served, "system", text)
            self._instructions = text
        await self._send("session.updated", session=self._session(served))

    async def _create_item(self, served: Served, item: Any) -> None:
        try:
            role, content = item["role"], item["content"]
            text = "".join(part["text"] for part in content if part["type"] == "input_text")
            known = item["type"] == "message" and role in ("user", "system")
            known &= all(part["type"] == "input_text" for part in content)
        except (KeyError, TypeError):
            known = False
        if not known:
            raise _Refused("unsupported", "an item must be a message of input_text of the user")
        await self._feed(served, role, text)
        shown = {
            "id": f"item_{next(self._numbers)}",
            "object": "realtime.item",
            "type": "message",
            "status": "completed",
            "role": role,
            "content": [{"type": "input_text", "text": text}],
        }
        for kind in ("conversation.item.added", "conversation.item.done"):
            await self._send(kind, item=shown, previous_item_id=None)

    async def _feed(self, served: Served, role: str, text: Any) -> None:
        if not isinstance(text, str):
            raise UserError(f"a text is {text!r:.80}: must be a string")
        async with self._beat.between_rows:
            served.apply(Feed(stream=stream_of(role, served.streams), text=text))

    async def _respond(self, served: Served, reader: Reader) -> None:
        """Reads one response."""
        number = next(self._numbers)
        item_id, response_id = f"item_{number}", f"resp_{number}"
        place = {"response_id": response_id, "item_id": item_id, "output_index": 0}
        part = {**place, "content_index": 0}

        def response(status: str, output: list[Any]) -> dict[str, Any]:
            about = {"id": response_id, "object": "realtime.response", "status": status}
            return {**about, "output": output, "output_modalities": ["text"]}

        def item(status: str, content: list[Any]) -> dict[str, Any]:
            about = {"id": item_id, "object": "realtime.item", "type": "message"}
            return {**about, "role": "assistant", "status": status, "content": content}

        async with self._beat.between_rows:
            answer = self._answer = Answer(served, reader, served.session.rows, None)
            served.apply(Resume())
        try:
            with contextlib.suppress(WebSocketDisconnect):
                await self._send("response.created", response=response("in_progress", []))
                shown = item("in_progress", [])
                where = {"response_id": response_id, "output_index": 0}
                await self._send("response.output_item.added", item=shown, **where)
                begun = {"type": "text", "text": ""}
                await self._send("response.content_part.added", part=begun, **part)
                texts = []
                async for text in answer.texts():
                    texts.append(text)
                    await self._send("response.output_text.delta", delta=text, **part)
                whole = "".join(texts)
                await self._send("response.output_text.done", text=whole, **part)
                done = {"type": "text", "text": whole}
                await self._send("response.content_part.done", part=done, **part)
                cancelled = answer.reason == "cancelled"
                status = "incomplete" if cancelled or answer.error else "completed"
                shown = item(status, [{"type": "output_text", "text": whole}])
                await self._send("response.output_item.done", item=shown, **where)
                status = "failed" if answer.error else "cancelled" if cancelled else "completed"
                await self._send("response.done", response=response(status, [shown]))
        finally:
            self._answer = None
            async with self._beat.between_rows:
                if not served.ended:
                    served.apply(Pause())

    def _check_response(self, response: Any) -> None:
        if not isinstance(response, dict) or not response.keys() <= {"output_modalities"}:
            raise _Refused("unsupported", "options of a response are not supported")
        if response.get("output_modalities", ["text"]) != ["text"]:
            raise _Refused("unsupported", "only the output modality text is supported")

    def _session(self, served: Served) -> dict[str, Any]:
        return {
            "id": f"sess_{served.name}",
            "type": "realtime",
            "object": "realtime.session",
            "model": MODEL,
            "output_modalities": ["text"],
            "instructions": self._instructions,
        }

    async def _send(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "event_id": f"event_{next(self._numbers)}", **fields}
        await self._websocket.send_text(json.dumps(event))

    async def _error(self, code: str, message: str, id: str | None) -> None:
        self._sessions.metrics.errors.labels("realtime").inc()
        error = {"type": "invalid_request_error", "code": code, "message": message}
        await self._send("error", error={**error, "param": None, "event_id": id})
