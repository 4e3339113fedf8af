"""A stopwatch for benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """(what `call()` returns, CPU-seconds of the process, seconds that passed)."""
    begin_cpu, begin = time.process_time(), time.perf_counter()
    result = call()
    return result, time.process_time() - begin_cpu, time.perf_counter() - begin
