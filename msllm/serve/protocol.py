"""The frames between a client and the server. docs/serving.md shows them in examples.

A frame is a JSON object whose `type` is the name of its class below in lower case. The client sends
`configure` or `reconnect` first, and the server answers `granted`. All later frames of the server
have a sequence number `seq`, which counts up by one, so a client that lost its connection can say
which frame it saw last. The exceptions are `log`, and an `error` before `granted`.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

VERSION = 1  # of the protocol

# What a row frame may show besides the text.
DETAILS = ("entropy", "logprob", "tokens")

# {code of an error: (what it means, the code with which the connection is closed; 0: it stays)}.
ERRORS: dict[str, tuple[str, int]] = {
    "bad_frame": ("the frame is not JSON, or not a frame of the protocol", 0),
    "invalid": ("a value of the frame is refused; the message names the rule", 0),
    "out_of_order": ("the frame is not allowed now, such as a second `configure`", 0),
    "frame_bytes": ("the frame has too many bytes", 0),
    "pending_tokens": ("too many tokens wait to be read; the frame is not applied", 0),
    "full": ("all sessions are in use; `retry_s` says when to try again", 1013),
    "not_ready": ("the server is still compiling; `retry_s` says when to try again", 1013),
    "draining": ("the server is shutting down and opens no session", 1013),
    "unauthorized": ("the token is missing or wrong", 1008),
    "frame_rate": ("the client sends too many frames per second", 1008),
    "no_configure": ("the first frame did not come in time", 1008),
    "slow_reader": ("the client does not read its rows", 1008),
    "replaced": ("another connection has taken over the session", 1008),
    "unknown_session": ("no session has this key, or its time to reconnect is over", 1008),
    "missed": ("the server no longer holds the frames after `seen`", 1008),
}
# {reason in a `done` frame: (what it means, the code with which the connection is closed)}.
REASONS: dict[str, tuple[str, int]] = {
    "closed": ("the client sent `close`", 1000),
    "stop": ("a condition of `stop` holds", 1000),
    "rows": ("the session has as many rows as the server allows", 1000),
    "idle": ("the client sent no frame for too long", 1000),
    "expired": ("the client did not reconnect in time", 1000),
    "draining": ("the server is shutting down", 1012),
    "failed": ("the session cannot go on; the message says why", 1011),
}

Name = Annotated[str, msgspec.Meta(max_length=200)]
Token = Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)]
# A text, or tokens. In `force`, the token -1 leaves a row to the model.
Text = str | list[Token]
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
# A number for all streams, or one for each of some streams.
Number = bool | int | float
PerStream = Number | list[Number] | dict[str, Number] | None


def _name_of(cls: str) -> str:
    return cls.lower()


class ClientFrame(msgspec.Struct, tag_field="type", tag=_name_of, forbid_unknown_fields=True):
    """A frame from a client. An error that it causes repeats its `id`."""

    id: Name = msgspec.field(default="", name="id")


class Stop(msgspec.Struct, forbid_unknown_fields=True):
    """When a session ends: after `rows` rows, or after `silent_rows` silent rows; 0: never."""

    rows: Count = 0
    silent_rows: Count = 0


class Configure(ClientFrame, kw_only=True):
    """Opens a session.

    Attributes:
      token: the token of the server, if it needs one and the request had no Authorization header.
      sampling: fields of `DecodeOptions`, each for all streams or {stream: value}.
      allow: {stream: text or tokens that it may sample}.
      show: some of DETAILS.
      stop: when the session ends.
      paused: whether the session waits for `resume` before its first row.
      events: of a log; they are applied again at their rows.
    """

    token: str = ""
    sampling: dict[str, PerStream] = {}
    allow: dict[str, Text] = {}
    show: list[str] = []
    stop: Stop = msgspec.field(default_factory=Stop)
    paused: bool = False
    events: list[dict[str, Any]] = []


class Reconnect(ClientFrame, kw_only=True):
    """Continues a session after a lost connection, or takes over a fork.

    Attributes:
      session: the key from `granted` or `forked`.
      seen: the last sequence number that the client has seen; 0: none.
      token: as in `Configure`.
    """

    session: str
    seen: Count = 0
    token: str = ""


class Feed(ClientFrame, kw_only=True):
    """Appends to an input stream, one token per row, from the next row that the model reads."""

    stream: Name
    text: Text


class Force(ClientFrame, kw_only=True):
    """Sets what a stream of any kind says, from the next row on."""

    stream: Name
    text: Text


class Allow(ClientFrame, kw_only=True):
    """Restricts a stream to the tokens of a text; null: all tokens."""

    stream: Name
    text: Text | None


class Drop(ClientFrame, kw_only=True):
    """Drops fed tokens that the model has not read, of one input or of all."""

    stream: Name | None = None


class Mute(ClientFrame, kw_only=True):
    """Silences a stream, or lets it speak again."""

    stream: Name
    muted: bool = True


class Sample(ClientFrame, kw_only=True):
    """Changes sampling options; others stay as they are."""

    sampling: dict[str, PerStream]


class Show(ClientFrame, kw_only=True):
    """Sets what row frames show besides the text."""

    show: list[str]


class Fork(ClientFrame, kw_only=True):
    """Opens a copy of the session. The answer `forked` has the key for `reconnect`."""

    seed: Count | None = None


class Pause(ClientFrame, kw_only=True):
    """Stops the rows after the current one."""


class Resume(ClientFrame, kw_only=True):
    """Goes on with the rows, and pauses again after `rows` rows; 0: never."""

    rows: Count = 0


class Save(ClientFrame, kw_only=True):
    """Asks for the `log` of the session."""


class Close(ClientFrame, kw_only=True):
    """Ends the session."""


Action = Feed | Force | Allow | Drop | Mute | Sample | Show | Fork | Pause | Resume | Save | Close
_DECODER = msgspec.json.Decoder(Configure | Reconnect | Action)


class ServerFrame(msgspec.Struct, tag_field="type", tag=_name_of, omit_defaults=True, kw_only=True):
    """A frame from the server. `seq` is set when it is sent, see the top of this file."""

    seq: int = 0


class Stream(msgspec.Struct):
    """A stream of the model."""

    name: str
    kind: str


class Granted(ServerFrame):
    """The session is open.

    Attributes:
      session: the secret key for `reconnect`.
      name: the name of the session in the logs of the server.
      streams: the streams of the model.
      row: the number of rows so far.
      beat_ms: the time from one row to the next.
      window: the number of rows that the model sees.
      grace_s: how long the session waits for `reconnect`.
      muted: the streams that are muted.
      paused: whether the session waits for `resume`.
      options: all sampling options.
    """

    session: str
    name: str
    streams: list[Stream]
    row: int
    beat_ms: float
    window: int
    grace_s: float
    muted: list[str]
    paused: bool
    options: dict[str, Any]
    version: int = msgspec.field(default_factory=lambda: VERSION)


class Row(ServerFrame):
    """One row.

    Attributes:
      row: its number, from 0 on.
      text: {stream: text that it gains}. A stream without an entry is silent. The text is empty
        where a character is incomplete; the row that completes it has all of it.
      before: {stream: text} of cells of the row before that input has changed since it was shown.
      absent: streams that have not begun or have ended.
      waiting: {input stream: number of fed tokens that are not in a row yet}.
      late_ms: by how much the row missed its beat.
      entropy, logprob: {stream: nats}, where the model sampled, on request.
      tokens: {stream: token}, on request.
      tokens_before: {stream: token} of the cells in `before`, on request.
    """

    row: int
    text: dict[str, str]
    before: dict[str, str] = {}
    absent: list[str] = []
    waiting: dict[str, int] = {}
    late_ms: float = 0.0
    entropy: dict[str, float] = {}
    logprob: dict[str, float] = {}
    tokens: dict[str, int] = {}
    tokens_before: dict[str, int] = {}


class Forked(ServerFrame):
    """A fork is open and waits for `reconnect`: `session` is its key, `row` its rows so far."""

    session: str
    name: str
    row: int


class Log(ServerFrame):
    """The log of the session.

    Attributes:
      rows: the number of rows.
      options: the options that the session began with.
      events: what the client did, and at which rows.
      file: an npz file for `msllm chat --replay` and `msllm score --tables`, in base64.
    """

    rows: int
    options: dict[str, Any]
    events: list[dict[str, Any]]
    file: bytes


class Notice(ServerFrame):
    """Something that the client should know: `draining` or `unknown_words`."""

    code: str
    message: str


class Error(ServerFrame):
    """A frame was refused, or the connection is closed. `code` is one of ERRORS."""

    code: str
    message: str
    id: str = ""
    retry_s: float = 0.0


class Done(ServerFrame):
    """The session has ended. `reason` is one of REASONS."""

    reason: str
    message: str
    rows: int


_SERVER_DECODER = msgspec.json.Decoder(Granted | Row | Forked | Log | Notice | Error | Done)


class Refused(Exception):
    """A frame, or a connection, is refused with an error of the protocol."""

    def __init__(self, code: str, message: str, retry_s: float = 0.0):
        """`code` is one of ERRORS."""
        assert code in ERRORS
        super().__init__(message)
        self.code, self.message, self.retry_s = code, message, retry_s

    @property
    def close_code(self) -> int:
        """The code with which the connection is closed; 0: it stays."""
        return ERRORS[self.code][1]

    def frame(self, id: str = "") -> Error:
        """The frame that says so."""
        return Error(code=self.code, message=self.message, id=id, retry_s=self.retry_s)


def decode(data: str | bytes) -> Configure | Reconnect | Action:
    """Reads a client's frame. Raises Refused."""
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Refused("bad_frame", f"the frame cannot be read: {error}") from None


def decode_server(data: str | bytes) -> Any:
    """Reads a frame of the server, for clients. Raises msgspec.MsgspecError."""
    return _SERVER_DECODER.decode(data)


def encode(frame: ServerFrame) -> str:
    """The frame as JSON."""
    return msgspec.json.encode(frame).decode()
