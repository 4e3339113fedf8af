"""Who may use the server: the token, and the hosts and origins of requests.

A browser sends requests to the server for any page that its user has open. The origin of such a
request is that page. A page can also get a name of its own resolved to 127.0.0.1 (DNS rebinding),
so without a token the server answers only to names of this machine.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping, Sequence

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from msllm.errors import UserError


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, token: str) -> None:
    """Raises UserError if the server would listen to other machines without a token."""
    if not token and not is_loopback(host):
        raise UserError(
            f"--host={host} lets other machines connect, and there is no token: set --token or"
            " MSLLM_TOKEN, or listen on 127.0.0.1"
        )
    if token and (len(token) < 16 or not token.isascii() or not token.isprintable()):
        raise UserError(
            f"the token has {len(token)} characters: must be at least 16 printable ASCII"
            " characters, such as those of `openssl rand -hex 16`"
        )


class Access:
    """Decides about requests."""

    def __init__(self, token: str = "", origins: Sequence[str] = ()):
        """Makes the rules.

        Args:
          token: what clients must know; empty: nothing.
          origins: further origins whose pages may use the server, such as "https://example.org".
        """
        self._token, self._origins = token.encode(), frozenset(origins)

    def admits(self, token: str) -> bool:
        """Whether a token is right, in time that does not depend on how much of it is."""
        given = token.encode(errors="replace")
        return not self._token or hmac.compare_digest(given, self._token)

    def admits_header(self, headers: Mapping[str, str]) -> bool:
        """Whether the header `Authorization: Bearer TOKEN` has the right token."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        return self.admits(token.strip() if kind.lower() == "bearer" else "")

    def refusal(self, headers: Mapping[str, str]) -> str:
        """Why a request is refused because of where it comes from; "": it is not."""
        host = headers.get("host", "")
        if not self._token and not is_loopback(_without_port(host)):
            return f"the request is for {host!r:.200}: without a token, use 127.0.0.1 or localhost"
        origin = headers.get("origin")
        if origin is None or origin in self._origins:
            return ""
        if origin.partition("://")[2] == host and host:
            return ""
        return f"pages of {origin!r:.200} may not use this server: allow them with --origins"


class Guard:
    """ASGI middleware that refuses requests which `Access.refusal` names."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] in ("http", "websocket"):
            headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
            if why := self._access.refusal(headers):
                response = PlainTextResponse(f"{why}\n", 403)
                if scope["type"] == "http":
                    return await response(scope, receive, send)
                return await WebSocket(scope, receive, send).send_denial_response(response)
        await self._app(scope, receive, send)


def _without_port(host: str) -> str:
    """The name or address of a Host header."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
