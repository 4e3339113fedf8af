"""What the server allows. docs/serving.md lists the limits with the error of each."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a server. Raises UserError for values outside their ranges."""

    rows: int = 100_000  # of a session
    pending_tokens: int = 4096  # fed or forced tokens of a session that are not in a row yet
    frame_bytes: int = 65_536  # of a client's frame
    frames_per_s: float = 50.0  # of a connection, on average
    frames_at_once: int = 200  # that may exceed frames_per_s
    unsent_frames: int = 256  # behind which a connection may fall before it is dropped
    held_frames: int = 1024  # that the server can send again after a lost connection
    idle_s: float = 900.0  # without a frame from the client
    grace_s: float = 60.0  # for which a session without a connection is kept
    configure_s: float = 10.0  # until the first frame of a connection
    # Connections that the server accepts beyond one for each session, so that clients can be told
    # that it is full.
    spare_connections: int = 32
    retry_s: float = 5.0  # after which a client that was refused should try again

    def __post_init__(self) -> None:
        # Here, because it imports jax, and `msllm serve --help` shows the defaults above.
        from msllm.decode.script import check_number

        for field in dataclasses.fields(self):
            kind = float if field.type == "float" else int
            check_number(field.name, getattr(self, field.name), kind, "(0, 2147483648)")
        # A frame that was not sent must still be held.
        check_number("held_frames", self.held_frames, int, f"[{self.unsent_frames}, 2147483648)")


class Bucket:
    """Limits a rate: a bucket of `size` frames that fills at `per_s` frames a second."""

    def __init__(self, per_s: float, size: int, now: float):
        self._per_s, self._size = per_s, size
        self._left, self._at = float(size), now

    def take(self, now: float) -> bool:
        """Takes one frame out. Returns whether there was one."""
        self._left = min(self._size, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
