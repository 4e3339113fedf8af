"""The page: one HTML file whose scripts and styles the browser may run, and no others."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re

from starlette.responses import HTMLResponse


def page_response() -> HTMLResponse:
    """The page, with a policy that admits its own script and style by their hashes."""
    content = importlib.resources.files("msllm.serve").joinpath("page.html").read_text("utf-8")
    policy = [
        "default-src 'none'",
        "connect-src 'self'",
        "img-src data:",
        f"script-src {_hash('script', content)}",
        f"style-src {_hash('style', content)}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return HTMLResponse(
        content,
        headers={
            "content-security-policy": "; ".join(policy),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        },
    )


def _hash(tag: str, content: str) -> str:
    """The hash of the text of the page's only element with this tag."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", content, flags=re.S)
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
