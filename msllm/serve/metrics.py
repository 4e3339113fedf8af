"""What the server counts and times, for Prometheus."""

from __future__ import annotations

from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.5, 1.0, 2.0, 5.0)
_ROWS = (1, 2, 3, 5, 8, 12, 20, 50, 100, 200)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self.registry, "namespace": "msllm"}
        self.rows = Counter("rows", "Rows of all sessions.", **kept)
        self.rows_on_time = Counter(
            "rows_on_time", "Rows that were ready before the next beat was due.", **kept
        )
        self.compute = Histogram(
            "compute_seconds", "Time of a step of the engine.", buckets=_SECONDS, **kept
        )
        self.late = Histogram(
            "row_late_seconds",
            "Time from the moment a row is due until it is ready.",
            buckets=_SECONDS,
            **kept,
        )
        self.queue = Histogram(
            "queue_seconds",
            "Time that a frame waits until it is handed to the connection.",
            buckets=_SECONDS,
            **kept,
        )
        self.gap = Histogram(
            "row_gap_seconds",
            "Time from one row of a session to the next, without pauses.",
            buckets=_SECONDS,
            **kept,
        )
        self.response_rows = Histogram(
            "response_rows",
            "Rows from the first input that has no answer to the first output after it.",
            buckets=_ROWS,
            **kept,
        )
        self.sessions = Gauge("sessions", "Open sessions.", **kept)
        self.connections = Gauge("connections", "Open WebSocket connections.", **kept)
        self.opened = Counter("sessions_opened", "Sessions that were opened.", ["how"], **kept)
        self.ended = Counter("sessions_ended", "Sessions that ended.", ["reason"], **kept)
        self.errors = Counter("errors", "Errors sent to clients.", ["code"], **kept)

    def text(self) -> bytes:
        """All metrics in Prometheus's format."""
        return prometheus_client.generate_latest(self.registry)


CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
