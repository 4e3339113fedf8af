"""Serve a model to many people at once, over WebSockets.

All sessions advance together, one row per beat, in one compiled step. The
server listens on this machine only, unless --host says otherwise; then clients
need a token. Ctrl-C or SIGTERM drains it: it opens no more sessions, and exits
when all have ended, after --drain seconds at most. docs/serving.md describes
the protocol and the limits. The server needs the extra "serve":
pip install "msllm[serve]".
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any

from msllm.cli.base import Parser, comma_list, load_model, non_negative_int, positive_int
from msllm.errors import UserError
from msllm.serve.limits import Limits

EXAMPLES = """
msllm serve --checkpoint=runs/quickstart
msllm serve --checkpoint=runs/quickstart --sessions=100 --beat_ms=100 --logs=logs
msllm serve --checkpoint=runs/quickstart --host=0.0.0.0 --token=$TOKEN
"""

_EXTRA = ("starlette", "uvicorn", "websockets", "msgspec", "prometheus_client")
# The limits that have a flag: {flag: (type, metavar, help)}.
_LIMITS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "rows": (positive_int, "N", "Rows after which a session ends."),
    "pending_tokens": (positive_int, "N", "Tokens of a session that may wait to be read."),
    "frame_bytes": (positive_int, "N", "Bytes of a client's frame."),
    "idle_s": (float, "SECONDS", "Time without a frame after which a session ends."),
    "grace_s": (float, "SECONDS", "Time for which a session waits for its client to reconnect."),
}


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_checkpoint()
    parser.add_argument("--host", metavar="HOST", default="127.0.0.1", help="Address to listen on.")
    parser.add_argument(
        "--port", metavar="N", type=non_negative_int, default=8000, help="Port; 0: any free one."
    )
    parser.add_argument(
        "--sessions", metavar="N", type=positive_int, default=16, help="Most open sessions."
    )
    parser.add_argument(
        "--beat_ms",
        metavar="MS",
        type=float,
        default=100.0,
        help="Time from one row to the next.",
    )
    parser.add_argument(
        "--window",
        metavar="ROWS",
        type=positive_int,
        help="Number of past rows that the model sees. Default: as many rows as the model was "
        "trained on, or 1024 if that is unknown.",
    )
    parser.add_argument(
        "--token",
        metavar="TOKEN",
        default="",
        help="Secret that clients need. Other users of this machine can see it in the list of "
        "processes, so prefer the environment variable MSLLM_TOKEN.",
    )
    parser.add_argument(
        "--origins",
        metavar="ORIGIN,...",
        type=comma_list(str),
        default=[],
        help="Other web sites whose pages may use the server, e.g. https://example.org.",
    )
    parser.add_argument(
        "--logs", metavar="DIR", help="Folder for the logs of sessions. Default: none are saved."
    )
    parser.add_argument(
        "--drain",
        metavar="SECONDS",
        type=float,
        default=20.0,
        help="Time for which sessions go on after SIGTERM or Ctrl-C.",
    )
    for name, (kind, metavar, text) in _LIMITS.items():
        text = f"{text} Default: {getattr(Limits, name):g}."
        parser.add_argument(f"--{name}", metavar=metavar, type=kind, help=text)


def run(flags: argparse.Namespace) -> None:
    """Serves until a signal ends it."""
    try:
        from msllm.serve.access import Access, check_exposure
        from msllm.serve.app import Server
        from msllm.serve.run import run as run_server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise UserError(
            f"the server needs the package {error.name}: pip install 'msllm[serve]'"
        ) from error
    from msllm.decode.engine import Engine
    from msllm.decode.script import check_number, check_rows, default_window
    from msllm.serve.log import LogFolder

    token = flags.token or os.environ.get("MSLLM_TOKEN", "")
    check_exposure(flags.host, token)
    check_number("--beat_ms", flags.beat_ms, float, "[1, 60000]")
    check_number("--drain", flags.drain, float, "[0, 86400]")
    given = {name: getattr(flags, name) for name in _LIMITS if getattr(flags, name) is not None}
    limits = dataclasses.replace(Limits(), **given)
    logs = LogFolder(flags.logs) if flags.logs else None
    model = load_model(flags)
    model.require_tokenizer()
    window = flags.window or default_window(model)
    check_rows(model.trained_rows, window)
    engine = Engine(model, sessions=flags.sessions, window=window)
    server = Server(
        engine,
        beat_seconds=flags.beat_ms / 1e3,
        limits=limits,
        access=Access(token, flags.origins),
        logs=logs,
    )
    run_server(server, flags.host, flags.port, flags.drain)
