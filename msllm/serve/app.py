"""The HTTP and WebSocket routes of the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from msllm.decode.engine import Engine
from msllm.serve import metrics as metrics_lib
from msllm.serve.access import Access, Guard
from msllm.serve.beat import Beat
from msllm.serve.completions import Completions
from msllm.serve.connection import Connection
from msllm.serve.limits import Limits
from msllm.serve.log import LogFolder
from msllm.serve.metrics import Metrics
from msllm.serve.page import page_response
from msllm.serve.protocol import Refused
from msllm.serve.realtime import Realtime
from msllm.serve.sessions import Sessions

logger = logging.getLogger("msllm")


class Server:
    """The state that all routes share.

    Attributes:
      sessions: the sessions.
      beat: the task that advances them.
      metrics: what is counted.
      app: the ASGI application.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        beat_seconds: float = 0.1,
        limits: Limits | None = None,
        access: Access | None = None,
        logs: LogFolder | None = None,
    ):
        """Makes a server for an engine whose model has a tokenizer.

        Args:
          engine: an engine that nothing else uses.
          beat_seconds: the time from one row to the next.
          limits: None: the defaults.
          access: who may use the server; None: everyone on this machine.
          logs: where the logs of sessions are saved; None: nowhere.
        """
        self.metrics = Metrics()
        self.sessions = Sessions(engine, limits or Limits(), self.metrics, beat_seconds, logs)
        self.beat = Beat(self.sessions)
        self._access, self._connections = access or Access(), 0
        self._most_connections = engine.free + self.sessions.limits.spare_connections
        completions = Completions(self.sessions, self.beat, self._access)
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                WebSocketRoute("/v1/sessions", self._session),
                Route("/v1/chat/completions", completions.complete, methods=["POST"]),
                Route("/v1/models", completions.models),
                WebSocketRoute("/v1/realtime", self._realtime),
                Route("/metrics", self._show_metrics),
                Route("/healthz", self._health),
                Route("/readyz", self._ready),
            ],
            middleware=[Middleware(Guard, access=self._access)],
            lifespan=self._lifespan,
        )

    async def drain(self, seconds: float) -> None:
        """Waits until all sessions have ended, at most this long, and saves all logs."""
        sessions, loop = self.sessions, asyncio.get_running_loop()
        end = loop.time() + seconds
        logger.info("draining: %d sessions are open", len(sessions.open_ones))
        async with self.beat.between_rows:
            sessions.begin_to_drain(seconds)
        while sessions.open_ones and loop.time() < end:
            await asyncio.sleep(0.05)
        async with self.beat.between_rows:
            for served in sessions.open_ones:
                sessions.end(served, "draining", "the server is shutting down")
        await sessions.saved()
        end = loop.time() + 1.0  # for the last frames
        while self._connections and loop.time() < end:
            await asyncio.sleep(0.02)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(self._run())
        running.add_done_callback(_report_crash)
        yield
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await self.sessions.saved()

    async def _run(self) -> None:
        """Compiles everything, and then advances the sessions."""
        # In a thread, so that the server can say that it is not ready.
        await asyncio.to_thread(self.sessions.engine.warm_up)
        self.sessions.ready = True
        logger.info("ready")
        await self.beat.run()

    async def _session(self, websocket: WebSocket) -> None:
        async with self._admitted(websocket) as admitted:
            if admitted:
                await Connection(websocket, self.sessions, self.beat, self._access).run()

    async def _realtime(self, websocket: WebSocket) -> None:
        if not self._access.admits_header(websocket.headers):
            response = PlainTextResponse("the token is missing or wrong\n", 401)
            return await websocket.send_denial_response(response)
        async with self._admitted(websocket) as admitted:
            if admitted:
                await Realtime(websocket, self.sessions, self.beat).run()

    @contextlib.asynccontextmanager
    async def _admitted(self, websocket: WebSocket) -> AsyncIterator[bool]:
        """Counts a connection, or refuses it and yields False if there are too many."""
        if self._connections >= self._most_connections:
            headers = {"retry-after": f"{self.sessions.limits.retry_s:.0f}"}
            response = PlainTextResponse("too many connections\n", 503, headers=headers)
            await websocket.send_denial_response(response)
            yield False
            return
        self._connections += 1
        self.metrics.connections.inc()
        try:
            yield True
        finally:
            self._connections -= 1
            self.metrics.connections.dec()

    async def _page(self, request: Request) -> Response:
        return page_response()

    async def _show_metrics(self, request: Request) -> Response:
        if not self._access.admits_header(request.headers):
            return PlainTextResponse("the token is missing or wrong\n", 401)
        return Response(self.metrics.text(), media_type=metrics_lib.CONTENT_TYPE)

    async def _health(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _ready(self, request: Request) -> Response:
        """200 if a session can be opened, or could be if one were free."""
        try:
            self.sessions.check_room()
        except Refused as error:
            if error.code != "full":
                return PlainTextResponse(f"{error.message}\n", 503)
        return PlainTextResponse("ready\n")


def _report_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.error("the server cannot go on", exc_info=error)
