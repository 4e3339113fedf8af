"""The host's side of one session: options, queues of what is fed and forced, rows so far, when it ends. No device here."""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.decode.sampling import FREE
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.weights.load import LoadedModel


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """How rows are chosen. Where a type says so, one value is for all streams, and a tuple has one per stream."""

    temperature: float | tuple[float, ...] = 0.0  # 0: the most likely token
    top_k: int | tuple[int, ...] = 0  # only the k most likely tokens; 0: all
    top_p: float | tuple[float, ...] = (
        1.0  # tokens in descending order until their probabilities exceed p
    )
    top_p_inside: bool | tuple[bool, ...] = False  # the token that crosses top_p is dropped too
    min_p: float | tuple[float, ...] = (
        0.0  # only tokens at least min_p times as likely as the best one
    )
    min_probability: float | tuple[float, ...] = (
        0.0  # only tokens of this probability, after all other filters
    )
    # Subtracted once from the logit of every token that the stream has held before, except silence.
    presence_penalty: float | tuple[float, ...] = 0.0
    silence_penalty: float | tuple[float, ...] = (
        0.0  # subtracted from silence's logit, once the input has ended
    )
    penalty_ramp: int = 5  # rows over which silence_penalty grows linearly to its full value
    # The first row with a silence penalty. None: it follows the input, from the second row after the last token that was
    # fed (other than silence), and there is none before the first such token.
    penalty_start: int | None = None
    ablated: tuple[
        str, ...
    ] = ()  # streams that are silenced whatever the model chooses; what inputs are fed waits
    seed: int = 0


RULES: dict[str, tuple[Any, Callable, str]] = {
    "temperature": (
        np.float32,
        lambda x: (x >= 0) & np.isfinite(x),
        "must be a number >= 0 (0: the best)",
    ),
    "top_k": (np.int32, lambda x: x >= 0, "must be >= 0 (0: all tokens)"),
    "top_p": (np.float32, lambda x: (x > 0) & (x <= 1), "must be in (0, 1]"),
    "top_p_inside": (bool, lambda x: x | True, "must be true or false"),
    "min_p": (np.float32, lambda x: (x >= 0) & (x <= 1), "must be in [0, 1]"),
    "min_probability": (np.float32, lambda x: (x >= 0) & (x <= 1), "must be in [0, 1]"),
    "presence_penalty": (np.float32, np.isfinite, "must be a finite number"),
    "silence_penalty": (np.float32, np.isfinite, "must be a finite number"),
}


def per_stream(options: DecodeOptions, streams: StreamSpec) -> dict[str, np.ndarray]:
    """The options of RULES and `ablated`, [S] each. Raises UserError."""
    arrays = {}
    for name, (dtype, ok, rule) in RULES.items():
        value = getattr(options, name)
        array = np.asarray(value, dtype)
        if array.shape not in ((), (streams.size,)):
            raise UserError(
                f"{name} is {value!r}: must be one value or one for each of the {streams.size} streams"
            )
        if not np.all(ok(array)):
            raise UserError(f"{name} is {value!r}: {rule}")
        arrays[name] = np.broadcast_to(array, (streams.size,))
    if options.penalty_ramp < 1:
        raise UserError(f"penalty_ramp is {options.penalty_ramp}: must be at least one row")
    arrays["ablated"] = np.zeros(streams.size, bool)
    arrays["ablated"][[streams.index(name) for name in options.ablated]] = True
    return arrays


@dataclasses.dataclass(frozen=True)
class Stop:
    """When iterating over a session ends: as soon as one of these holds. `step()` goes on whenever it is called."""

    rows: int = 0  # so many rows are there, the prefill included; 0: no limit
    silent_rows: int = 0  # so many rows in succession were silent in all streams; 0: no limit
    tokens: Mapping[str, Sequence[int]] = dataclasses.field(
        default_factory=dict
    )  # a stream shows one of its tokens
    when: Callable[[Row], bool] | None = None  # it says so of a row


class Row(NamedTuple):
    """One row as it is shown."""

    index: int  # its row in the table
    tokens: np.ndarray  # [S] int32; 0 where absent
    present: np.ndarray  # [S] bool
    logprob: np.ndarray  # [S] float32, nats: of the model itself, without penalties; nan for inputs and in a first row
    entropy: (
        np.ndarray
    )  # [S] float32, nats: of the distribution that the token comes from; nan as above
    text: tuple[str, ...] | None  # what each stream's text grew by; None without a tokenizer
    logits: np.ndarray | None  # [S, V] float32 before penalties, from an engine with all_logits


class Transcript(NamedTuple):
    """Rows that a session has in its window, as the model reads them."""

    row: np.ndarray  # [R] int32: their numbers
    tokens: np.ndarray  # [R, S] int32; 0 where absent
    present: np.ndarray  # [R, S] bool


class Script:
    """What has been shown and what will be said: all that the host must know of a session to ask for its next row."""

    def __init__(
        self,
        model: LoadedModel,
        silence_id: int | None,
        options: DecodeOptions,
        stop: Stop,
        kept: int,
        window: int,
    ):
        """`kept`, `window`: as `keep` and `window` of the engine, rows."""
        self.streams, self.silence_id = model.streams, silence_id
        self._tokenizer, self._vocab_size, size = (
            model.tokenizer,
            model.config.vocab_size,
            model.streams.size,
        )
        self.kept, self.rows, self.heard = (
            kept,
            0,
            -1,
        )  # heard: the row of the last token that was fed, silence aside
        self.tokens, self.present = (
            np.zeros(size, np.int32),
            np.zeros(size, bool),
        )  # of the last row
        self.stop, self.silent_rows, self.finished = stop, 0, None
        self._kept, self._recent = [], collections.deque(maxlen=window - kept)
        self._fed = [collections.deque() for _ in range(size)]
        self._forced = [collections.deque() for _ in range(size)]
        self._taken = np.zeros(
            size, bool
        )  # cells of the last row that were fed (or prefilled): they stay
        self._texts = [_Text(model.tokenizer) for _ in range(size)] if model.tokenizer else None
        self.allowed: dict[
            int, np.ndarray
        ] = {}  # per stream the tokens that may be chosen; not there: all
        self._inputs = np.array([kind == "input" for kind in self.streams.kinds])
        self._delays = np.array(self.streams.delays or (0,) * size)
        self._stop_tokens = [
            (self.streams.index(name), set(tokens)) for name, tokens in stop.tokens.items()
        ]
        self.set_options(options)

    def set_options(self, options: DecodeOptions) -> None:
        """Holds from the next row on. Raises UserError."""
        arrays = per_stream(options, self.streams)
        if self.silence_id is None and (arrays["ablated"].any() or arrays["silence_penalty"].any()):
            raise UserError(
                "ablated streams and silence_penalty need silence: say which token it is, silence_id=..."
            )
        self.options, self._ablated, self._silence_penalty = (
            options,
            arrays["ablated"],
            arrays["silence_penalty"],
        )

    def feed(self, stream: str | int, tokens: Sequence[int] | str) -> None:
        index = self._index(stream)
        if not self._inputs[index]:
            name, inputs = (
                self.streams.names[index],
                [n for n, kind in zip(self.streams.names, self._inputs) if kind],
            )
            raise UserError(
                f"stream {name!r} is no input: inputs are {', '.join(inputs) or 'none'}; `force` takes any"
            )
        self._fed[index].extend(
            self._checked(f"input for stream {self.streams.names[index]!r}", tokens)
        )

    def force(self, stream: str | int, tokens: Sequence[int] | str) -> None:
        index = self._index(stream)
        self._forced[index].extend(
            self._checked(f"what stream {self.streams.names[index]!r} must say", tokens, FREE)
        )

    def allow(self, stream: str | int, tokens: Sequence[int] | str | None) -> None:
        index = self._index(stream)
        if tokens is None:
            self.allowed.pop(index, None)
            return
        tokens = self._checked(f"allowed tokens of stream {self.streams.names[index]!r}", tokens)
        if not tokens:
            name = self.streams.names[index]
            raise UserError(
                f"stream {name!r} is allowed no token: name at least one, or None for all"
            )
        self.allowed[index] = np.array(sorted(set(tokens)))

    def copy(self) -> Script:
        """One that goes on from here on its own."""
        copied, memo = copy.copy(self), {}
        for name in (
            "tokens",
            "present",
            "allowed",
            "_kept",
            "_recent",
            "_fed",
            "_forced",
            "_taken",
            "_texts",
        ):
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        return copied

    def prefill(self, tokens: np.ndarray, present: np.ndarray) -> None:
        """The first rows, [P, S]. The last of them is shown like any other: the model reads it in the step after."""
        for row in zip(tokens, present):
            self._append(*row)
        self._taken = np.ones(self.streams.size, bool)

    def first(self) -> Row:
        """The first row of a session without a prefill: nothing predicts it."""
        given, present = self.given()
        nothing = np.full(self.streams.size, np.nan, np.float32)
        return self.show(
            np.where(given == FREE, self._silence(), given), present, nothing, nothing, None
        )

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The last row as the model reads it, [S] tokens and present: with what was fed since it was shown."""
        for s, fed in enumerate(self._fed):
            if (
                fed
                and self.present[s]
                and self._inputs[s]
                and not (self._taken[s] or self._ablated[s])
            ):
                self._take(s, self.tokens, self.rows - 1)
        return self.tokens, self.present

    def given(
        self, row: int | None = None, last_present: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of the row `row` (the next one): the tokens [S] that are not the model's choice, and which cells are present.

        Takes them from the queues.
        """
        row = self.rows if row is None else row
        last_present = self.present if last_present is None else last_present
        present = row >= self._delays
        given = np.full(self.streams.size, FREE, np.int32)
        silent = (
            self._inputs | self._ablated | (present & ~last_present)
        )  # streams begin with silence
        if np.count_nonzero(silent):
            given[silent] = self._silence()
        self._taken = np.zeros(self.streams.size, bool)
        for s, (forced, fed) in enumerate(zip(self._forced, self._fed)):
            if forced and (token := forced.popleft()) != FREE:
                given[s] = token
            elif fed and present[s] and not self._ablated[s]:
                self._take(s, given, row)
        return given, present

    def penalty(self, row: int) -> np.ndarray:
        """[S] float32: what is subtracted from the logit of silence when row `row` is chosen."""
        options = self.options
        if options.penalty_start is not None:
            counted = row - options.penalty_start + 1
        else:
            counted = row - 1 - self.heard if self.heard >= 0 else 0
        return self._silence_penalty * np.float32(min(max(counted / options.penalty_ramp, 0), 1))

    def show(self, tokens, present, logprob, entropy, logits) -> Row:
        """The next row, of what the device chose."""
        tokens = tokens * present  # what is absent holds token 0
        self._append(tokens, present)
        text, said = None, present & (tokens != self.silence_id)
        if self._texts is not None:
            text = tuple(
                t.grow(int(token)) if here else ""
                for t, token, here in zip(self._texts, tokens, said)
            )
        row = Row(self.rows - 1, tokens.copy(), present, logprob, entropy, text, logits)
        self.silent_rows = 0 if np.count_nonzero(said) else self.silent_rows + 1
        self.finished = self._end(row)
        return row

    def waiting(self) -> dict[str, int]:
        return {
            name: len(self._fed[s]) for s, name in enumerate(self.streams.names) if self._inputs[s]
        }

    def transcript(self, last: int | None = None) -> Transcript:
        kept, recent = len(self._kept), len(self._recent)
        if last is not None:
            kept, recent = max(0, min(kept, last - recent)), min(recent, last)
        first = len(self._kept) - kept
        number = np.r_[first : first + kept, self.rows - recent : self.rows].astype(np.int32)
        rows = [*self._kept[first:], *list(itertools.islice(reversed(self._recent), recent))[::-1]]
        tokens = np.array([tokens for tokens, _ in rows], np.int32).reshape(-1, self.streams.size)
        return Transcript(
            number, tokens, np.array([p for _, p in rows], bool).reshape(tokens.shape)
        )

    def _append(self, tokens: np.ndarray, present: np.ndarray) -> None:
        # The same array in both places: a token that is fed before the row is read is in the transcript too.
        self.tokens, self.present = tokens, present
        (self._kept if self.rows < self.kept else self._recent).append((tokens, present))
        self.rows += 1

    def _take(self, stream: int, row: np.ndarray, number: int) -> None:
        row[stream] = self._fed[stream].popleft()
        self._taken[stream] = True
        if row[stream] != self.silence_id:
            self.heard = number

    def _end(self, row: Row) -> str | None:
        if self.stop.rows and self.rows >= self.stop.rows:
            return f"{self.rows} rows"
        if self.stop.silent_rows and self.silent_rows >= self.stop.silent_rows:
            return f"{self.silent_rows} silent rows"
        for s, tokens in self._stop_tokens:
            if row.present[s] and int(row.tokens[s]) in tokens:
                return f"stream {self.streams.names[s]!r} showed token {row.tokens[s]}"
        return "a condition" if self.stop.when is not None and self.stop.when(row) else None

    def _index(self, stream: str | int) -> int:
        index = self.streams.index(stream) if isinstance(stream, str) else stream
        if not 0 <= index < self.streams.size:
            raise UserError(f"stream {index}: the model has streams 0 to {self.streams.size - 1}")
        return index

    def _checked(self, what: str, tokens: Sequence[int] | str, least: int = 0) -> list[int]:
        if isinstance(tokens, str):
            if self._tokenizer is None:
                raise UserError(
                    f"{what} is text and the model came without a tokenizer: give token ids"
                )
            tokens = self._tokenizer.encode(tokens)
        array = np.asarray(tokens)
        check_tokens(what, array, self._vocab_size, least)
        return array.reshape(-1).tolist()

    def _silence(self) -> int:
        if self.silence_id is None:
            raise UserError(
                "a cell must be silent and the model has no tokenizer: prefill, or give silence_id=..."
            )
        return self.silence_id


def check_tokens(what: str, tokens: np.ndarray, vocab_size: int, least: int = 0) -> None:
    """Raises UserError unless all are integers from `least` and in the vocabulary."""
    if tokens.size and not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{what} has type {tokens.dtype}: must be integers")
    if tokens.size and not (least <= tokens.min() and tokens.max() < vocab_size):
        bad = int(tokens.min() if tokens.min() < least else tokens.max())
        raise UserError(f"{what} holds token {bad}: the vocabulary has ids 0 to {vocab_size - 1}")


class _Text:
    """The text of one stream, token by token: a token's text may depend on those before it, or wait for the next."""

    def __init__(self, tokenizer):
        self._tokenizer, self._tokens, self._shown = tokenizer, [], ""

    def grow(self, token: int) -> str:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if (
            text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._tokens) < 32
        ):  # a character of several tokens
            return ""
        new, self._shown = text[len(self._shown) :], text
        if len(self._tokens) > 16:
            del self._tokens[:-8]
            self._shown = self._tokenizer.decode(self._tokens)
        return new

    def __deepcopy__(self, memo):
        copied = _Text(self._tokenizer)
        copied._tokens, copied._shown = list(self._tokens), self._shown
        return copied
