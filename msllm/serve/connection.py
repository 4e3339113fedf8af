"""A WebSocket connection: it opens or continues a session, and carries its frames."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.websockets import WebSocket, WebSocketDisconnect

from msllm.errors import UserError
from msllm.serve import protocol
from msllm.serve.access import Access
from msllm.serve.beat import Beat
from msllm.serve.limits import Bucket
from msllm.serve.log import log_frame
from msllm.serve.outbox import Reader
from msllm.serve.protocol import Refused
from msllm.serve.sessions import Served, Sessions

# How long the server tries to tell a client why its connection ends, which the client may not read.
_FAREWELL_S = 1.0


class Connection:
    """One connection, from its first frame to its last."""

    def __init__(self, websocket: WebSocket, sessions: Sessions, beat: Beat, access: Access):
        self._websocket, self._sessions, self._beat = websocket, sessions, beat
        self._access = access

    async def run(self) -> None:
        """Serves the client until either side ends the connection."""
        await self._websocket.accept()
        try:
            served, reader = await self._begin()
        except Refused as error:
            return await self._say_goodbye(error, "")
        except WebSocketDisconnect:
            return
        try:
            await self._serve(served, reader)
        finally:
            async with self._beat.between_rows:
                self._sessions.leave(served, reader)

    async def _begin(self) -> tuple[Served, Reader]:
        """Reads the first frame. Raises Refused."""
        limits = self._sessions.limits
        try:
            data = await asyncio.wait_for(self._receive(), limits.configure_s)
        except TimeoutError:
            raise Refused(
                "no_configure", f"no frame came within {limits.configure_s:g} s"
            ) from None
        frame = protocol.decode(data)
        if not isinstance(frame, protocol.Configure | protocol.Reconnect):
            raise Refused("out_of_order", "the first frame must be `configure` or `reconnect`")
        if not (
            self._access.admits_header(self._websocket.headers) or self._access.admits(frame.token)
        ):
            raise Refused("unauthorized", "the token is missing or wrong")
        async with self._beat.between_rows:
            try:
                if isinstance(frame, protocol.Configure):
                    served, seen = self._sessions.open(frame), 0
                else:
                    served, seen = self._sessions.find(frame.session), frame.seen
            except UserError as error:
                raise Refused("invalid", str(error)) from None
            reader = self._sessions.connect(served, seen)
            reader.send(served.granted())
        return served, reader

    async def _serve(self, served: Served, reader: Reader) -> None:
        """Sends and receives frames until the session or the connection ends."""
        sending = asyncio.create_task(self._send(served, reader))
        listening = asyncio.create_task(self._listen(served, reader))
        dropped = asyncio.create_task(reader.gone.wait())
        tasks = (sending, listening, dropped)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, WebSocketDisconnect):
                raise result
        if reader.dropped or served.ended:
            await self._say_goodbye(reader.dropped, served.ended)

    async def _send(self, served: Served, reader: Reader) -> None:
        async for content in reader.frames(served.outbox):
            await self._websocket.send_text(content)

    async def _listen(self, served: Served, reader: Reader) -> None:
        limits = self._sessions.limits
        bucket = Bucket(limits.frames_per_s, limits.frames_at_once, time.monotonic())
        while True:
            id = ""
            try:
                data = await self._receive()
                if not bucket.take(time.monotonic()):
                    most = f"{limits.frames_per_s:g} frames per second"
                    reader.drop(Refused("frame_rate", f"more than {most} came: send fewer"))
                    return
                frame = protocol.decode(data)
                id = frame.id
                await self._do(served, reader, frame)
            except Refused as error:  # also `full` for a fork, while this session goes on
                self._report(served, error, id)
            except UserError as error:
                self._report(served, Refused("invalid", str(error)), id)

    async def _do(
        self,
        served: Served,
        reader: Reader,
        frame: protocol.Configure | protocol.Reconnect | protocol.Action,
    ) -> None:
        """Does what a frame asks for. Raises Refused and UserError."""
        async with self._beat.between_rows:
            served.last_frame = time.monotonic()
            if served.ended:
                return
            match frame:
                case protocol.Configure() | protocol.Reconnect():
                    raise Refused("out_of_order", "the session is open already")
                case protocol.Close():
                    return self._sessions.end(served, "closed", "the client closed the session")
                case protocol.Save():
                    log = served.log.copy()
                case _:
                    return served.apply(frame)
        reader.send(await asyncio.to_thread(log_frame, log))

    async def _receive(self) -> str | bytes:
        """The client's next frame. Raises Refused for a long one, and WebSocketDisconnect."""
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        data = message.get("text") or message.get("bytes") or b""
        data = data.encode() if isinstance(data, str) else data
        most = self._sessions.limits.frame_bytes
        if len(data) > most:
            raise Refused(
                "frame_bytes", f"the frame has {len(data)} bytes: at most {most}; send several"
            )
        return data

    def _report(self, served: Served, error: Refused, id: str) -> None:
        """Tells the client that a frame was refused."""
        self._sessions.metrics.errors.labels(error.code).inc()
        served.outbox.push(error.frame(id))

    async def _say_goodbye(self, error: Refused | None, ended: str) -> None:
        """Says why the connection ends, and closes it."""
        code = protocol.REASONS[ended][1] if ended else 1008
        # The client may be gone, or not read.
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
            async with asyncio.timeout(_FAREWELL_S):
                if error:
                    self._sessions.metrics.errors.labels(error.code).inc()
                    code = error.close_code or code
                    await self._websocket.send_text(protocol.encode(error.frame()))
                await self._websocket.close(code, error.code if error else ended)
