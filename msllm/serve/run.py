"""Runs a server on a port until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import FrameType

import uvicorn

from msllm.errors import UserError
from msllm.serve.app import Server

logger = logging.getLogger("msllm")

# Linux drops a connection whose client has acknowledged nothing for this long.
_UNACKNOWLEDGED_MS = 30_000
# A client that does not read fills this buffer first; then its rows wait and are counted.
_SEND_BUFFER_BYTES = 65_536


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on a port; 0: any free one. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit these options.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            option = socket.TCP_USER_TIMEOUT
            listening.setsockopt(socket.IPPROTO_TCP, option, _UNACKNOWLEDGED_MS)
        listening.bind((host, port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise UserError(
            f"--host={host} --port={port}: cannot listen there ({error.strerror}): give another"
            " address or port"
        ) from error
    return listening


class Uvicorn(uvicorn.Server):
    """Serves a `Server`. The first signal drains it, and the second ends it at once."""

    def __init__(self, server: Server, drain_seconds: float = 20.0):
        """`drain_seconds` is how long sessions may go on after the first signal."""
        super().__init__(
            uvicorn.Config(
                server.app,
                log_config=None,
                access_log=False,
                ws="websockets-sansio",
                ws_per_message_deflate=False,
                # Longer frames end the connection; shorter ones that are too long get an error.
                ws_max_size=8 * server.sessions.limits.frame_bytes,
                timeout_graceful_shutdown=2,
                server_header=False,
            )
        )
        self._server, self._drain_seconds = server, drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to serve. Uvicorn calls it."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles a signal. Uvicorn installs it."""
        if self._loop is None or self._draining:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self.begin_to_drain)

    def begin_to_drain(self) -> None:
        """Opens no more sessions, and exits when all have ended."""
        if not self._draining:
            self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self._server.drain(self._drain_seconds)
        finally:
            self.should_exit = True


def run(server: Server, host: str, port: int, drain_seconds: float) -> None:
    """Serves until a signal ends it. Raises UserError if the port cannot be used."""
    listening = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    logger.info("listening on http://%s:%d/", shown, listening.getsockname()[1])
    Uvicorn(server, drain_seconds).run(sockets=[listening])
