"""Keeps signals from interrupting a few statements that belong together.

Python calls signal handlers between two bytecodes of the main thread, and a handler may raise:
Ctrl-C raises KeyboardInterrupt there. Where the result of a call must not be lost, such as the
successor of arrays that the call has donated, `deferred_signals` delays the handlers.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

# Signals whose handlers commonly raise. Not every platform has all of them.
_NAMES = ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGBREAK")
_SIGNALS = tuple(int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name))
# The functions of `signal` convert every argument and result to an enum, which takes ten times as
# long as the functions that they wrap.
_get_handler: Any = getattr(signal.getsignal, "__wrapped__", signal.getsignal)
_set_handler: Any = getattr(signal.signal, "__wrapped__", signal.signal)


class _Deferral:
    """A handler that notes signals while it is active, and later passes them on."""

    def __init__(self) -> None:
        self.active = True
        self.arrived: dict[int, FrameType | None] = {}
        found = {number: _get_handler(number) for number in _SIGNALS}
        self._handlers = {number: old for number, old in found.items() if callable(old)}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.active:
            self.arrived[number] = frame
        else:  # it could not be uninstalled, because another handler raised in between
            self._handlers[number](number, frame)

    def install(self) -> None:
        for number in self._handlers:
            _set_handler(number, self)

    def uninstall(self) -> None:
        """Restores the handlers and calls those whose signals arrived. They may raise."""
        self.active = False
        try:
            for number, handler in self._handlers.items():
                _set_handler(number, handler)
        finally:
            for number, frame in self.arrived.items():
                self._handlers[number](number, frame)


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Delays signal handlers written in Python until the end of the block.

    In threads other than the main thread it does nothing, because no handler runs there. Keep the
    block short: it cannot be interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deferral = _Deferral()
    try:
        deferral.install()
        yield
    finally:
        deferral.uninstall()
