"""What a user does to a session, as events that can be recorded and applied again.

An event is a dict that JSON can express: {"row": rows so far, "what": kind, ...}. docs/chat.md
lists the kinds. `act` applies an event to a session and records it, so a recording holds exactly
what happened, and `replay` repeats it with the same tokens, log-probabilities and entropies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msllm.chat.recording import Branch
from msllm.decode.engine import DecodeOptions, Engine, Row, Session
from msllm.errors import UserError

# The kinds of events, and the keys that each has besides `row` and `what`.
KINDS: dict[str, tuple[str, ...]] = {
    "feed": ("stream", "text"),
    "force": ("stream", "text"),
    "allow": ("stream", "text"),
    "drop": ("stream",),
    "mute": ("stream",),
    "unmute": ("stream",),
    "options": ("options",),
}


def act(session: Session, branch: Branch, what: str, **details: Any) -> None:
    """Does something to a session between two rows, and records it after the branch's last row.

    Args:
      session: the session.
      branch: the recording of the session.
      what: one of KINDS.
      details: the event's other keys. `text` is a text or a list of tokens.

    Raises UserError; nothing is recorded then.
    """
    apply(session, {"what": what, **details})
    branch.add_event(what, **details)


def apply(session: Session, event: Mapping[str, Any]) -> None:
    """Does to a session what an event says. Raises UserError."""
    what, stream = event.get("what"), event.get("stream")
    if what not in KINDS:
        raise UserError(f"an event is {what!r}: must be one of {', '.join(KINDS)}")
    if what == "drop":
        session.drop(stream)
    elif what == "options":
        options = stored_options(event.get("options", {}))
        session.options = dataclasses.replace(options, ablated=session.options.ablated)
    elif not isinstance(stream, str):
        raise UserError(f"the stream of a {what!r} is {stream!r}: must be a name")
    elif what in ("mute", "unmute"):
        ablated = {*session.options.ablated, stream} - ({stream} if what == "unmute" else set())
        session.options = dataclasses.replace(session.options, ablated=tuple(sorted(ablated)))
    else:
        getattr(session, what)(stream, event.get("text"))


def stored_options(stored: Mapping[str, Any]) -> DecodeOptions:
    """The options whose fields JSON has stored. Raises UserError for unknown fields."""
    fields = [field.name for field in dataclasses.fields(DecodeOptions)]
    for name in stored:
        if name not in fields:
            raise UserError(f"unknown option {name!r}: options are {', '.join(fields)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return DecodeOptions(**values)


def record_row(session: Session, branch: Branch, seconds: float) -> None:
    """Records the row that a session has just shown, `seconds` after the one before it.

    Also writes the row before it again: text that was fed after it was shown has changed its
    inputs.
    """
    for row, tokens, present in zip(*session.transcript(2), strict=True):
        branch.put(int(row), tokens, present, seconds)


def replay(
    engine: Engine, options: Mapping[str, Any], events: Sequence[Mapping[str, Any]], rows: int
) -> Iterator[Row]:
    """Repeats a session, for example that of a branch of a recording, in a slot of an engine.

    Args:
      engine: an engine of the same model, window and cache.
      options: the `options` of the recording.
      events: the events of the branch.
      rows: the number of rows.

    Yields its rows. Raises UserError.
    """
    left = list(events)
    with engine.open(stored_options(options)) as session:
        while session.rows < rows:
            while left and left[0]["row"] <= session.rows:
                apply(session, left.pop(0))
            yield session.step()
