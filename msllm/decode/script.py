"""The host side of a session: options, input queues, the rows so far and stop conditions.

Nothing here runs on the device.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.decode.sampling import FREE
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer
from msllm.weights.load import LoadedModel

log = logging.getLogger("msllm")

# A session that sees more than this many times the rows that its model was trained on gets a
# warning.
FAR = 1.25
DEFAULT_WINDOW = 1024  # rows, for models whose number of training rows is unknown


def default_window(model: LoadedModel) -> int:
    """The window of the commands: as many rows as the model was trained on, if that is known."""
    return max(model.trained_rows or DEFAULT_WINDOW, 2)


def check_rows(trained: int | None, rows: int) -> None:
    """Warns, once, if a session sees `rows` rows and its model was trained on far fewer."""
    if trained is not None and rows > FAR * trained:
        _warn_once(
            f"the model was trained on tables of {trained} rows, and sessions see more than"
            f" {int(FAR * trained)}: attention over longer distances is untrained, and answers may"
            f" become wrong; open the engine with window={trained}, or train with a"
            " larger config.data.rows"
        )


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """How rows are sampled.

    An option whose type allows a tuple takes one value for all streams, or one value per stream.
    """

    temperature: float | tuple[float, ...] = 0.0  # 0: the most likely token
    top_k: int | tuple[int, ...] = 0  # only the k most likely tokens; 0: all
    # only the most likely tokens, until their probabilities exceed p
    top_p: float | tuple[float, ...] = 1.0
    top_p_inside: bool | tuple[bool, ...] = False  # also drop the token that crosses top_p
    # only tokens at least min_p times as likely as the most likely one
    min_p: float | tuple[float, ...] = 0.0
    # only tokens of at least this probability, after all other filters
    min_probability: float | tuple[float, ...] = 0.0
    # subtracted once from the logit of every token that the stream has held before, except silence
    presence_penalty: float | tuple[float, ...] = 0.0
    # subtracted from the logit of silence after the input has ended
    silence_penalty: float | tuple[float, ...] = 0.0
    penalty_ramp: int = 5  # rows over which silence_penalty grows linearly to its full value
    # The first row with a silence penalty. None: the penalty follows the input. It begins in the
    # second row after the last fed token that is not silence, and is off before the first one.
    penalty_start: int | None = None
    # streams that are forced to be silent; tokens that are fed to them wait in the queue
    ablated: tuple[str, ...] = ()
    seed: int = 0


class _Constraint(NamedTuple):
    """The type and the valid values of an option."""

    dtype: Any
    holds: Callable[[np.ndarray], Any]
    text: str


_NON_NEGATIVE = _Constraint(
    np.float32, lambda x: (x >= 0) & np.isfinite(x), "must be a number >= 0 (0: the best)"
)
_PROBABILITY = _Constraint(np.float32, lambda x: (x >= 0) & (x <= 1), "must be in [0, 1]")
_FINITE = _Constraint(np.float32, np.isfinite, "must be a finite number")
# The options with one value per stream.
_CONSTRAINTS = {
    "temperature": _NON_NEGATIVE,
    "top_k": _Constraint(np.int32, lambda x: x >= 0, "must be >= 0 (0: all tokens)"),
    "top_p": _Constraint(np.float32, lambda x: (x > 0) & (x <= 1), "must be in (0, 1]"),
    "top_p_inside": _Constraint(bool, np.isfinite, "must be true or false"),
    "min_p": _PROBABILITY,
    "min_probability": _PROBABILITY,
    "presence_penalty": _FINITE,
    "silence_penalty": _FINITE,
}


def per_stream(options: DecodeOptions, streams: StreamSpec) -> dict[str, np.ndarray]:
    """The options that have one value per stream, and `ablated`: {name: [S]}. Raises UserError."""
    arrays = {}
    for name, constraint in _CONSTRAINTS.items():
        value = getattr(options, name)
        array = np.asarray(value, constraint.dtype)
        if array.shape not in ((), (streams.size,)):
            raise UserError(
                f"{name} is {value!r}: must be one value, or one for each of the {streams.size}"
                " streams"
            )
        if not np.all(constraint.holds(array)):
            raise UserError(f"{name} is {value!r}: {constraint.text}")
        arrays[name] = np.broadcast_to(array, (streams.size,))
    if options.penalty_ramp < 1:
        raise UserError(f"penalty_ramp is {options.penalty_ramp}: must be at least one row")
    arrays["ablated"] = np.zeros(streams.size, bool)
    arrays["ablated"][[streams.index(name) for name in options.ablated]] = True
    return arrays


@dataclasses.dataclass(frozen=True)
class Stop:
    """Conditions that end the iteration over a session. One of them is enough.

    `Session.step` and `Session.run` ignore them.
    """

    rows: int = 0  # the session has this many rows, including the prefill; 0: no limit
    silent_rows: int = 0  # this many rows in succession were silent in all streams; 0: no limit
    # {stream: tokens}: the stream shows one of the tokens
    tokens: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    when: Callable[[Row], bool] | None = None  # the function returns True for a row


class Row(NamedTuple):
    """One row as the session shows it."""

    index: int  # type: ignore[assignment]  # the number of the row in the session
    tokens: np.ndarray  # [S] int32; 0 where absent
    present: np.ndarray  # [S] bool
    # [S] float32, nats: the log-probability of the tokens in the unmodified distribution, before
    # penalties and filters; nan for inputs and in a first row
    logprob: np.ndarray
    entropy: np.ndarray  # [S] float32, nats: of the unmodified distribution; nan as above
    text: tuple[str, ...] | None  # the text that each stream gains; None without a tokenizer
    logits: np.ndarray | None  # [S, V] float32 before penalties, from an engine with all_logits


class Transcript(NamedTuple):
    """The rows in a session's window, as the model reads them."""

    row: np.ndarray  # [R] int32: the numbers of the rows
    tokens: np.ndarray  # [R, S] int32; 0 where absent
    present: np.ndarray  # [R, S] bool


class Script:
    """The host's record of a session, which determines the inputs of its next row.

    Attributes:
      options: change them with `set_options`.
      rows: the number of rows so far.
      tokens, present: [S], the last row.
      silent_rows: the number of rows at the end that are silent in all streams.
      finished: the condition of `stop` that the last row met; None: none.
      allowed: {stream index: tokens that may be sampled}; streams without an entry: all.
    """

    def __init__(
        self,
        model: LoadedModel,
        silence_id: int | None,
        options: DecodeOptions,
        stop: Stop,
        keep: int,
        window: int,
    ):
        """`keep` and `window` are those of the engine, in rows. Raises UserError."""
        size = model.streams.size
        self.streams, self.silence_id, self.stop, self.keep = model.streams, silence_id, stop, keep
        self._trained_rows = model.trained_rows
        # The row with which the session sees too many rows; 0: it never does.
        far = int(FAR * (self._trained_rows or window)) + 1
        self._far_row = far if far <= window else 0
        self._tokenizer, self._vocab_size = model.tokenizer, model.config.vocab_size
        self._is_input = np.array([kind == "input" for kind in self.streams.kinds])
        self._delays = np.array(self.streams.delays or (0,) * size)
        self._stop_tokens = [
            (self.streams.index(name), set(tokens)) for name, tokens in stop.tokens.items()
        ]

        self.rows, self.silent_rows = 0, 0
        self.finished: str | None = None
        self.tokens, self.present = np.zeros(size, np.int32), np.zeros(size, bool)
        self.allowed: dict[int, np.ndarray] = {}
        self._kept_rows: list[tuple[np.ndarray, np.ndarray]] = []  # the first `keep` rows
        self._recent_rows: collections.deque = collections.deque(maxlen=window - keep)
        self._fed: list[collections.deque[int]] = [collections.deque() for _ in range(size)]
        self._forced: list[collections.deque[int]] = [collections.deque() for _ in range(size)]
        self._is_fed = np.zeros(size, bool)  # cells of the last row that were fed or prefilled
        self._last_fed_row = -1  # the row of the last fed token that is not silence
        self._detokenizers: list[_Detokenizer] | None = None
        if model.tokenizer:
            self._detokenizers = [_Detokenizer(model.tokenizer) for _ in range(size)]
        self.set_options(options)

    def set_options(self, options: DecodeOptions) -> None:
        """Sets the options from the next row on. Raises UserError."""
        arrays = per_stream(options, self.streams)
        ablated, silence_penalty = arrays["ablated"], arrays["silence_penalty"]
        if self.silence_id is None and (ablated.any() or silence_penalty.any()):
            raise UserError(
                "ablated streams and silence_penalty need a silence token: pass it as"
                " silence_id=..."
            )
        self.options, self._ablated, self._silence_penalty = options, ablated, silence_penalty

    def feed(self, stream: str | int, tokens: Sequence[int] | str) -> None:
        """See `Session.feed`."""
        index = self._index(stream)
        name = self.streams.names[index]
        if not self._is_input[index]:
            names = [n for n, is_input in zip(self.streams.names, self._is_input) if is_input]
            raise UserError(
                f"stream {name!r} is not an input: inputs are {', '.join(names) or 'none'}; use"
                " `force` for other streams"
            )
        self._fed[index].extend(self._checked(f"input for stream {name!r}", tokens))

    def force(self, stream: str | int, tokens: Sequence[int] | str) -> None:
        """See `Session.force`."""
        index = self._index(stream)
        what = f"forced input of stream {self.streams.names[index]!r}"
        self._forced[index].extend(self._checked(what, tokens, least=FREE))

    def allow(self, stream: str | int, tokens: Sequence[int] | str | None) -> None:
        """See `Session.allow`."""
        index = self._index(stream)
        if tokens is None:
            self.allowed.pop(index, None)
            return
        name = self.streams.names[index]
        tokens = self._checked(f"allowed tokens of stream {name!r}", tokens)
        if not tokens:
            raise UserError(
                f"stream {name!r} is allowed no token: give at least one, or None to allow all"
            )
        self.allowed[index] = np.array(sorted(set(tokens)))

    def copy(self) -> Script:
        """An independent copy."""
        copied = copy.copy(self)
        # One memo for all attributes: `tokens` and `_recent_rows` share arrays, see `_append`.
        memo: dict[int, Any] = {}
        for name in (
            "tokens",
            "present",
            "allowed",
            "_kept_rows",
            "_recent_rows",
            "_fed",
            "_forced",
            "_is_fed",
            "_detokenizers",
        ):
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        return copied

    def prefill(self, tokens: np.ndarray, present: np.ndarray) -> None:
        """Sets the first rows, [P, S]. The model reads the last one in the next step."""
        for row in zip(tokens, present):
            self._append(*row)
        self._is_fed = np.ones(self.streams.size, bool)

    def first(self) -> Row:
        """Shows the first row of a session without a prefill. No row predicts it."""
        given, present = self.given()
        nothing = np.full(self.streams.size, np.nan, np.float32)
        tokens = np.where(given == FREE, self._silence(), given)
        return self.show(tokens, present, nothing, nothing)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The last row as the model reads it: tokens [S] and present [S].

        It includes tokens that were fed after the row was shown.
        """
        for stream, fed in enumerate(self._fed):
            waits = self._ablated[stream] or self._is_fed[stream]
            if fed and self.present[stream] and self._is_input[stream] and not waits:
                self._take(stream, self.tokens, self.rows - 1)
        return self.tokens, self.present

    def given(
        self, row: int | None = None, last_present: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The given tokens of a row, and which of its cells are present; [S] each.

        The tokens are FREE where the model samples. Tokens that come from a queue are removed from
        it.

        Args:
          row: the number of the row; None: the next row.
          last_present: which cells of the row before it are present; None: those of the last row.
        """
        row = self.rows if row is None else row
        last_present = self.present if last_present is None else last_present
        present = row >= self._delays
        given = np.full(self.streams.size, FREE, np.int32)
        starts = present & ~last_present  # a stream starts with silence
        silent = self._is_input | self._ablated | starts
        if np.count_nonzero(silent):
            given[silent] = self._silence()
        self._is_fed = np.zeros(self.streams.size, bool)
        for stream, (forced, fed) in enumerate(zip(self._forced, self._fed)):
            if forced and (token := forced.popleft()) != FREE:
                given[stream] = token
            elif fed and present[stream] and not self._ablated[stream]:
                self._take(stream, given, row)
        return given, present

    def penalty(self, row: int) -> np.ndarray:
        """[S] float32: subtracted from the logit of silence when row `row` is sampled."""
        options = self.options
        if options.penalty_start is not None:
            count = row - options.penalty_start + 1
        else:
            count = row - 1 - self._last_fed_row if self._last_fed_row >= 0 else 0
        return self._silence_penalty * np.float32(min(max(count / options.penalty_ramp, 0), 1))

    def show(
        self,
        tokens: np.ndarray,
        present: np.ndarray,
        logprob: np.ndarray,
        entropy: np.ndarray,
        logits: np.ndarray | None = None,
    ) -> Row:
        """Appends the row that the device sampled. The arguments are as in `Row`."""
        tokens = tokens * present  # absent cells hold token 0
        self._append(tokens, present)
        spoken = present & (tokens != self.silence_id)
        text = None
        if self._detokenizers is not None:
            cells = zip(self._detokenizers, tokens, spoken)
            text = tuple(
                detokenizer.add(int(token)) if is_spoken else ""
                for detokenizer, token, is_spoken in cells
            )
        row = Row(self.rows - 1, tokens.copy(), present, logprob, entropy, text, logits)
        self.silent_rows = 0 if np.count_nonzero(spoken) else self.silent_rows + 1
        self.finished = self._stop_reason(row)
        return row

    def waiting(self) -> dict[str, int]:
        """{input stream: number of fed tokens that are not in a row yet}."""
        queues = zip(self.streams.names, self._is_input, self._fed)
        return {name: len(fed) for name, is_input, fed in queues if is_input}

    def transcript(self, last: int | None = None) -> Transcript:
        """The rows in the window, or the last `last` of them."""
        kept, recent = len(self._kept_rows), len(self._recent_rows)
        if last is not None:
            kept, recent = max(0, min(kept, last - recent)), min(recent, last)
        first = len(self._kept_rows) - kept
        number = np.r_[first : first + kept, self.rows - recent : self.rows].astype(np.int32)
        newest_first = itertools.islice(reversed(self._recent_rows), recent)
        rows = [*self._kept_rows[first:], *reversed(list(newest_first))]
        tokens = np.array([tokens for tokens, _ in rows], np.int32).reshape(-1, self.streams.size)
        present = np.array([present for _, present in rows], bool).reshape(tokens.shape)
        return Transcript(number, tokens, present)

    def _append(self, tokens: np.ndarray, present: np.ndarray) -> None:
        # `self.tokens` and the transcript share this array, so a token that is fed before the
        # model reads the row appears in both.
        self.tokens, self.present = tokens, present
        rows = self._kept_rows if self.rows < self.keep else self._recent_rows
        rows.append((tokens, present))
        self.rows += 1
        if self.rows == self._far_row:
            check_rows(self._trained_rows, self.rows)

    def _take(self, stream: int, tokens: np.ndarray, row: int) -> None:
        """Moves a token from the stream's input queue into `tokens`, those of row `row`."""
        tokens[stream] = self._fed[stream].popleft()
        self._is_fed[stream] = True
        if tokens[stream] != self.silence_id:
            self._last_fed_row = row

    def _stop_reason(self, row: Row) -> str | None:
        if self.stop.rows and self.rows >= self.stop.rows:
            return f"{self.rows} rows"
        if self.stop.silent_rows and self.silent_rows >= self.stop.silent_rows:
            return f"{self.silent_rows} silent rows"
        for stream, tokens in self._stop_tokens:
            if row.present[stream] and int(row.tokens[stream]) in tokens:
                return f"stream {self.streams.names[stream]!r} showed token {row.tokens[stream]}"
        return "a condition" if self.stop.when is not None and self.stop.when(row) else None

    def _index(self, stream: str | int) -> int:
        index = self.streams.index(stream) if isinstance(stream, str) else stream
        if not 0 <= index < self.streams.size:
            raise UserError(f"stream {index}: the model has streams 0 to {self.streams.size - 1}")
        return index

    def _checked(self, what: str, tokens: Sequence[int] | str, least: int = 0) -> list[int]:
        """The ids of tokens or of a text. Raises UserError, in which `what` names the argument."""
        if isinstance(tokens, str):
            if self._tokenizer is None:
                raise UserError(f"{what} is text, and the model has no tokenizer: give token ids")
            tokens = self._tokenizer.encode(tokens)
        array = np.asarray(tokens)
        check_tokens(what, array, self._vocab_size, least)
        return array.reshape(-1).tolist()

    def _silence(self) -> int:
        if self.silence_id is None:
            raise UserError(
                "a cell must be silent, and the model has no tokenizer: pass the silence token as"
                " silence_id=..., or a prefill"
            )
        return self.silence_id


def check_tokens(what: str, tokens: np.ndarray, vocab_size: int, least: int = 0) -> None:
    """Raises UserError unless all tokens are integers from `least` to `vocab_size - 1`."""
    if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{what} has type {tokens.dtype}: must be integers")
    if tokens.size and not (least <= tokens.min() and tokens.max() < vocab_size):
        bad = int(tokens.min() if tokens.min() < least else tokens.max())
        raise UserError(f"{what} holds token {bad}: the vocabulary has ids 0 to {vocab_size - 1}")


class _Detokenizer:
    """Decodes the tokens of one stream one at a time.

    The text of a token may depend on the tokens before it. A token that ends inside a character
    has no text until the next tokens complete the character.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._shown = tokenizer, ""
        self._tokens: list[int] = []

    def add(self, token: int) -> str:
        """The text that this token adds."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        # The bytes of an unfinished character decode to the replacement character.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._tokens) < 32:
            return ""
        new, self._shown = text[len(self._shown) :], text
        if len(self._tokens) > 16:
            del self._tokens[:-8]
            self._shown = self._tokenizer.decode(self._tokens)
        return new

    def __deepcopy__(self, memo: dict) -> _Detokenizer:
        copied = _Detokenizer(self._tokenizer)
        copied._tokens, copied._shown = list(self._tokens), self._shown
        return copied
