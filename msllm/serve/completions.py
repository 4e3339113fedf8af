"""`/v1/chat/completions`: a conversation as messages, and one stream as the answer.

Each request opens a session, which says the messages again, row by row on the beat: the user's in
an input stream, the assistant's in the stream that is read.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from msllm.errors import UserError
from msllm.serve.access import Access
from msllm.serve.answers import Answer, stream_of
from msllm.serve.beat import Beat
from msllm.serve.outbox import Reader
from msllm.serve.protocol import Configure, Refused
from msllm.serve.sessions import Served, Sessions

MODEL = "msllm"  # the name of the model that a server has
_BODY_FRAMES = 16  # a request may be as long as this many frames


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class _StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    """The fields that are supported. Others are refused by name."""

    model: str
    messages: list[_Message]
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    n: Literal[1] | None = None


_DECODER = msgspec.json.Decoder(_Request)


class Completions:
    """The routes of completions."""

    def __init__(self, sessions: Sessions, beat: Beat, access: Access):
        self._sessions, self._beat, self._access = sessions, beat, access

    async def models(self, request: Request) -> Response:
        """Lists the model of the server."""
        if not self._access.admits_header(request.headers):
            return _error(401, "invalid_api_key", "the token is missing or wrong")
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "msllm"}
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(self, request: Request) -> Response:
        """Answers a conversation."""
        if not self._access.admits_header(request.headers):
            return _error(401, "invalid_api_key", "the token is missing or wrong")
        try:
            wanted = _DECODER.decode(await self._body(request))
            served, reader, answer, prompt = await self._open(wanted)
        except (msgspec.MsgspecError, UnicodeError, RecursionError, UserError) as error:
            return _error(400, "invalid_request", str(error))
        except Refused as error:
            if not error.retry_s:
                return _error(400, error.code, error.message)
            headers = {"retry-after": f"{error.retry_s:.0f}"}
            return _error(503, error.code, error.message, headers)
        about = {"id": f"chatcmpl-{served.name}", "created": int(time.time()), "model": MODEL}
        if wanted.stream:
            chunks = self._chunks(served, reader, answer, about, wanted, prompt)
            return StreamingResponse(chunks, media_type="text/event-stream")
        try:
            text = "".join([text async for text in answer.texts()])
        finally:
            await self._close(served, reader)
        if answer.error:
            return _error(503, "failed", answer.error)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": answer.reason,
            "logprobs": None,
        }
        usage = _usage(prompt, answer)
        return JSONResponse(
            {**about, "object": "chat.completion", "choices": [choice], "usage": usage}
        )

    async def _body(self, request: Request) -> bytes:
        """The body of a request. Raises UserError if it is too long or not JSON."""
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise UserError("the content-type must be application/json")
        most = _BODY_FRAMES * self._sessions.limits.frame_bytes
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise UserError(f"the request has more than {most} bytes")
        return body

    async def _open(self, wanted: _Request) -> tuple[Served, Reader, Answer, int]:
        """Opens a session that says the messages. Raises Refused and UserError.

        Returns: the session, its reader, the answer, and the number of tokens of the messages.
        """
        streams = self._sessions.engine.streams
        tokenizer = self._sessions.engine.model.require_tokenizer()
        if not wanted.messages or wanted.messages[-1].role != "user":
            raise UserError("the last of the messages must be the user's")
        output = stream_of("assistant", streams)
        events: list[dict[str, Any]] = []
        said: list[int] = []  # by the assistant, with silence while others speak
        row = tokens = 0
        for message in wanted.messages:
            role = "system" if message.role == "developer" else message.role
            ids = tokenizer.encode(message.text())
            tokens += len(ids)
            if role == "assistant":
                said += ids
            else:
                event = {"row": row, "what": "feed", "stream": stream_of(role, streams)}
                events.append({**event, "text": ids})
                if message is not wanted.messages[-1]:
                    said += [tokenizer.silence_id] * len(ids)
            row += len(ids)
        most_tokens = self._sessions.limits.pending_tokens
        if tokens > most_tokens:
            raise UserError(f"the messages have {tokens} tokens: at most {most_tokens} may wait")
        if said:
            events.insert(0, {"row": 0, "what": "force", "stream": output, "text": said})
        # The stream is silent while the messages before the last one are said.
        start = len(said)
        sampling = {"temperature": 1.0 if wanted.temperature is None else wanted.temperature}
        for name in ("top_p", "presence_penalty", "seed"):
            if (value := getattr(wanted, name)) is not None:
                sampling[name] = value
        frame = Configure(sampling=dict(sampling), events=events)
        most = wanted.max_completion_tokens or wanted.max_tokens
        async with self._beat.between_rows:
            served = self._sessions.open(frame)
            reader = self._sessions.connect(served, 0)
        return served, reader, Answer(served, reader, start, most), tokens

    async def _chunks(
        self,
        served: Served,
        reader: Reader,
        answer: Answer,
        about: dict[str, Any],
        wanted: _Request,
        prompt: int,
    ) -> AsyncIterator[str]:
        """Yields server-sent events."""
        about = {**about, "object": "chat.completion.chunk"}

        def chunk(delta: dict[str, str], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return _event({**about, "choices": [choice]})

        try:
            yield chunk({"role": "assistant", "content": ""})
            async for text in answer.texts():
                yield chunk({"content": text})
            if answer.error:
                yield _event({"error": _describe("failed", answer.error)})
            else:
                yield chunk({}, answer.reason)
                if wanted.stream_options and wanted.stream_options.include_usage:
                    yield _event({**about, "choices": [], "usage": _usage(prompt, answer)})
            yield "data: [DONE]\n\n"
        finally:
            await self._close(served, reader)

    async def _close(self, served: Served, reader: Reader) -> None:
        async with self._beat.between_rows:
            self._sessions.end(served, "closed", "the answer has ended")
            reader.sent = served.outbox.seq
            self._sessions.leave(served, reader)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _usage(prompt: int, answer: Answer) -> dict[str, int]:
    total = prompt + answer.tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer.tokens,
        "total_tokens": total,
    }


def _describe(code: str, message: str) -> dict[str, Any]:
    return {"message": message, "type": "invalid_request_error", "param": None, "code": code}


def _error(
    status: int, code: str, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    return JSONResponse({"error": _describe(code, message)}, status, headers)
