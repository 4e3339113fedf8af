"""Time measurement for benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

_Result = TypeVar("_Result")


class Times(NamedTuple):
    """Times in seconds: CPU time of this process (user and system), and wall time."""

    cpu: float
    wall: float


def timed(call: Callable[..., _Result], *arguments: Any) -> tuple[_Result, float, float]:
    """Returns the result of `call(*arguments)`, its CPU-seconds and its wall seconds."""
    begin_cpu, begin = time.process_time(), time.perf_counter()
    result = call(*arguments)
    return result, time.process_time() - begin_cpu, time.perf_counter() - begin


def median_times(times: Sequence[Times]) -> Times:
    """Returns the median of each component."""
    cpu, wall = zip(*times, strict=True)
    return Times(statistics.median(cpu), statistics.median(wall))
