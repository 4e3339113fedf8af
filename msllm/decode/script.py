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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.config import describe_interval, is_inside
from msllm.decode.sampling import FREE
from msllm.errors import UserError
from msllm.flow import latent_influence
from msllm.mail import Cell, mail_in
from msllm.streams import NEVER, StreamSpec
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
    Raises UserError for values outside their ranges (`OPTION_RANGES`).
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
    # second row after the last fed token that is not silence, and is off before the first one. It
    # is refused if that would tell a stream of an input that it may not know (docs/flow.md).
    penalty_start: int | None = None
    # streams that are forced to be silent; tokens that are fed to them wait in the queue
    ablated: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (kind, interval) in OPTION_RANGES.items():
            value = getattr(self, name)
            value = value.tolist() if hasattr(value, "tolist") else value
            if name == "penalty_start" and value is None:
                continue
            several = name in _PER_STREAM and isinstance(value, tuple | list)
            for number in value if several else [value]:
                check_number(name, number, kind, interval)
                if name == "temperature" and 0 < number < _LEAST_TEMPERATURE:
                    raise UserError(
                        f"temperature is {number!r}: must be 0, for the most likely token, or at"
                        f" least {_LEAST_TEMPERATURE}"
                    )
        if isinstance(self.ablated, str) or not isinstance(self.ablated, Iterable):
            raise UserError(
                f"ablated is {self.ablated!r}: must be a tuple of streams, such as ('thought',)"
            )


_LEAST_TEMPERATURE = 1e-6  # logits divided by less than this may overflow float32
_ROWS = "[0, 2147483648)"  # the devices count rows in int32
# Penalties are added to logits in float32, whose steps are 0.06 at 1e6. Larger penalties would
# erase the differences between logits.
_PENALTY = "[-1000000, 1000000]"
# The type and the range of every number in `DecodeOptions` and `Stop`.
OPTION_RANGES: dict[str, tuple[type, str]] = {
    "temperature": (float, "[0, 1000000]"),  # and not below _LEAST_TEMPERATURE, unless it is 0
    "top_k": (int, "[0, 2147483648)"),  # more than the vocabulary has: all tokens
    "top_p": (float, "(0, 1]"),
    "top_p_inside": (bool, "[0, 1]"),
    "min_p": (float, "[0, 1]"),
    "min_probability": (float, "[0, 1]"),
    "presence_penalty": (float, _PENALTY),
    "silence_penalty": (float, _PENALTY),
    "penalty_ramp": (int, "[1, 2147483648)"),
    "penalty_start": (int, _ROWS),
    "seed": (int, "[0, 4294967296)"),  # the devices' seeds have 32 bits
}
STOP_RANGES: dict[str, tuple[type, str]] = {"rows": (int, _ROWS), "silent_rows": (int, _ROWS)}
_DTYPES = {float: np.float32, int: np.int32, bool: np.bool_}
_PER_STREAM = (
    "temperature",
    "top_k",
    "top_p",
    "top_p_inside",
    "min_p",
    "min_probability",
    "presence_penalty",
    "silence_penalty",
)


def check_number(name: str, value: Any, kind: type, interval: str) -> None:
    """Raises UserError unless the value is of this kind and inside the interval.

    Args:
      name: what to call the value in the message.
      value: a number of Python or NumPy.
      kind: float (which admits integers), int or bool.
      interval: such as "[0, 1)".
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    is_bool = isinstance(value, bool)
    if kind is bool:
        if not is_bool:
            raise UserError(f"{name} is {value!r}: must be True or False")
        return
    numbers = (int,) if kind is int else (int, float)
    if is_bool or not isinstance(value, numbers):
        what = "an integer" if kind is int else "a number"
        raise UserError(f"{name} is {value!r}: must be {what}")
    if not is_inside(value, interval):
        raise UserError(f"{name} is {value!r}: must be {describe_interval(interval, value)}")


def per_stream(options: DecodeOptions, streams: StreamSpec) -> dict[str, np.ndarray]:
    """The options that have one value per stream, and `ablated`: {name: [S]}. Raises UserError."""
    arrays: dict[str, np.ndarray] = {}
    for name in _PER_STREAM:
        value = getattr(options, name)
        array: np.ndarray = np.asarray(value, _DTYPES[OPTION_RANGES[name][0]])
        if array.shape not in ((), (streams.size,)):
            raise UserError(
                f"{name} is {value!r}: must be one value, or one for each of the {streams.size}"
                " streams"
            )
        arrays[name] = np.broadcast_to(array, (streams.size,))
    arrays["ablated"] = np.zeros(streams.size, bool)
    for name in options.ablated:
        arrays["ablated"][streams.members(name)] = True
    return arrays


@dataclasses.dataclass(frozen=True)
class Stop:
    """Conditions that end the iteration over a session. One of them is enough.

    `Session.step` and `Session.run` ignore them. Raises UserError for values outside their ranges.
    """

    rows: int = 0  # the session has this many rows, including the prefill; 0: no limit
    silent_rows: int = 0  # this many rows in succession were silent in all streams; 0: no limit
    # {stream: tokens}: the stream shows one of the tokens
    tokens: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    # The function returns True for a row. If it raises, that error ends the iteration.
    when: Callable[[Row], bool] | None = None

    def __post_init__(self) -> None:
        for name, (kind, interval) in STOP_RANGES.items():
            check_number(name, getattr(self, name), kind, interval)
        if not isinstance(self.tokens, Mapping):
            raise UserError(
                f"tokens is {self.tokens!r}: must be a mapping from streams to lists of tokens"
            )
        if self.when is not None and not callable(self.when):
            raise UserError(f"when is {self.when!r}: must be a function of a row, or None")


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


class Plan(NamedTuple):
    """The host's part of the next rows of a session, and what it takes from the queues.

    Attributes:
      read: [S] int32, the row shown last with the tokens that were fed since.
      read_present: [S] bool, the cells of that row that are present.
      given: for each row, [S] int32: the tokens that are set and not sampled; FREE elsewhere.
      present: for each row, [S] bool: the cells that are present.
      penalty: for each row, [S] float32: subtracted from the logit of silence.
      fed, forced: for each stream, how many tokens leave the queue of fed or forced tokens.
      is_fed: [S] bool, the cells of the last row that were fed or get mail.
      last_fed_row: the row of the last fed token that is not silence; -1: none.
      mail: for each row, [S] int32: the cell of this plan whose token is copied, as row * S +
        stream; FREE elsewhere. Other mail is in `given`. Empty without rules.
      copied: {reader: source} of the cells of the last row that copy a cell of that row.
    """

    read: np.ndarray
    read_present: np.ndarray
    given: list[np.ndarray]
    present: list[np.ndarray]
    penalty: list[np.ndarray]
    fed: list[int]
    forced: list[int]
    is_fed: np.ndarray
    last_fed_row: int
    mail: list[np.ndarray]
    copied: dict[int, int]


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
        # [S], the row from which a stream that has ended is absent. Replaced, not modified, because
        # copies share it.
        self._ends = np.full(size, NEVER)
        self._stop_tokens = [
            (
                self.streams.index(name),
                set(self._checked(f"stop tokens of stream {name!r}", tokens)),
            )
            for name, tokens in stop.tokens.items()
        ]

        self.rows, self.silent_rows = 0, 0
        self._silent_before = 0  # `silent_rows` without the last row
        self.finished: str | None = None
        self.tokens, self.present = np.zeros(size, np.int32), np.zeros(size, bool)
        self.allowed: dict[int, np.ndarray] = {}
        self._kept_rows: list[tuple[np.ndarray, np.ndarray]] = []  # the first `keep` rows
        self._recent_rows: collections.deque = collections.deque(maxlen=window - keep)
        self._fed: list[collections.deque[int]] = [collections.deque() for _ in range(size)]
        self._forced: list[collections.deque[int]] = [collections.deque() for _ in range(size)]
        # cells of the last row that were fed or prefilled, or get mail
        self._is_fed = np.zeros(size, bool)
        self._mail = self.streams.mail
        self._copied = dict[int, int]()  # as in `Plan`, of the row shown last
        # As many rows as mail looks back, (tokens, present).
        self._mail_rows: collections.deque = collections.deque(
            maxlen=max((rule.lag for rule in self._mail), default=0)
        )
        self._last_fed_row = -1  # the row of the last fed token that is not silence
        self._detokenizers: list[Detokenizer] | None = None
        if model.tokenizer:
            self._detokenizers = [Detokenizer(model.tokenizer) for _ in range(size)]
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
        if options.penalty_start is None:
            self._refuse_to_tell_of_inputs(np.flatnonzero(silence_penalty))
        self.options, self._ablated, self._silence_penalty = options, ablated, silence_penalty

    def _refuse_to_tell_of_inputs(self, streams: Iterable[int]) -> None:
        """Raises UserError if a penalty that follows the input would tell a stream of its timing.

        Over latent edges, streams may learn anything of an input. Of any other input, this would
        be more than the flow certificate allows.
        """
        names = self.streams.names
        for reader, source in itertools.product(streams, np.flatnonzero(self._is_input)):
            if not self._is_input[reader] and not latent_influence(self.streams)[source, reader]:
                raise UserError(
                    f"silence_penalty follows the timing of the input {names[source]!r}, which"
                    f" stream {names[reader]!r} does not see over latent edges (docs/flow.md): set"
                    " penalty_start, or no penalty for this stream"
                )

    def feed(self, stream: str | int, tokens: Sequence[int] | str) -> None:
        """See `Session.feed`."""
        index = self._input(stream)
        what = f"input for stream {self.streams.names[index]!r}"
        self._fed[index].extend(self._checked(what, tokens))

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
        if self._tokenizer:
            size = self._tokenizer.vocab_size
            check_tokens(f"allowed tokens of stream {name!r}", np.asarray(tokens), size)
        if not tokens:
            raise UserError(
                f"stream {name!r} is allowed no token: give at least one, or None to allow all"
            )
        self.allowed[index] = np.array(sorted(set(tokens)))

    def end(self, stream: str | int) -> None:
        """See `Session.end`."""
        index, last = self._index(stream), max(self.rows - 1, 0)
        if self._ends[index] <= last:
            return
        self._ends = np.where(np.arange(self.streams.size) == index, last, self._ends)
        # In place: the transcript shares these arrays.
        self.tokens[index], self.present[index] = 0, False

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
            "_mail_rows",
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

    def plan(self, count: int = 1) -> Plan:
        """Plans the next `count` rows. Nothing changes before `commit`.

        The first row of a session without a prefill must be planned alone: all its tokens are
        given.

        Raises UserError if a cell must be silent and there is no silence token.
        """
        size = self.streams.size
        fed, forced = [0] * size, [0] * size
        is_fed, last_fed_row = self._is_fed, self._last_fed_row
        read, last_present = self.tokens, self.present
        given, penalty, mail = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
        present = list[np.ndarray]()

        def take(stream: int, tokens: np.ndarray, row: int) -> None:
            """Moves a fed token into `tokens`, those of row `row`."""
            nonlocal last_fed_row
            tokens[stream] = self._fed[stream][fed[stream]]
            fed[stream] += 1
            if tokens[stream] != self.silence_id:
                last_fed_row = row

        for stream, queue in enumerate(self._fed):
            waits = self._ablated[stream] or is_fed[stream]
            if queue and last_present[stream] and not waits:
                read = read.copy() if read is self.tokens else read
                take(stream, read, self.rows - 1)
        for reader, source in self._copied.items():
            if fed[source]:
                read[reader] = read[source]
        copied = self._copied
        for row in range(self.rows, self.rows + count):
            here = (row >= self._delays) & (row < self._ends)
            tokens = np.full(size, FREE, np.int32)
            starts = here & ~last_present  # a stream starts with silence
            is_fed = np.zeros(size, bool)
            mailed, copied = dict[int, Cell](), dict[int, int]()
            if self._mail:
                mailed = {cell.reader: cell for cell in mail_in(self._mail, row)}
                is_fed[list(mailed)] = True  # a token that is fed waits for the next row
                mail.append(np.full(size, FREE, np.int32))
            for stream, (known, queue) in enumerate(zip(self._forced, self._fed)):
                if len(known) > forced[stream]:
                    token = known[forced[stream]]
                    forced[stream] += 1
                    if token != FREE:
                        tokens[stream] = token
                        continue
                if stream in mailed:
                    if here[stream] and not self._ablated[stream]:
                        cell = mailed[stream]
                        at = cell.source_row - self.rows
                        if cell.is_copy:
                            copied[stream] = cell.source
                        elif at >= 0:
                            here[stream] = present[at][cell.source]
                            mail[-1][stream] = at * size + cell.source
                        else:
                            said = (read, self.present) if at == -1 else self._mail_rows[at]
                            tokens[stream], here[stream] = (x[cell.source] for x in said)
                    continue
                if len(queue) > fed[stream] and here[stream] and not self._ablated[stream]:
                    take(stream, tokens, row)
                    is_fed[stream] = True
            # No row predicts the first one.
            silent = self._is_input | self._ablated | starts | (row == 0)
            silent &= tokens == FREE
            silent[list(copied)] = False
            if np.count_nonzero(silent):
                tokens[silent] = self.require_silence()
            for stream, source in copied.items():
                tokens[stream], here[stream] = tokens[source], here[source]
                if tokens[source] == FREE:  # the device copies it
                    tokens[stream] = 0
                    mail[-1][stream] = (row - self.rows) * size + source
            given.append(tokens)
            present.append(here)
            penalty.append(self.penalty(row, last_fed_row))
            last_present = here
        return Plan(
            read,
            self.present,
            given,
            present,
            penalty,
            fed,
            forced,
            is_fed,
            last_fed_row,
            mail,
            copied,
        )

    def commit(self, plan: Plan) -> None:
        """Takes the tokens of a plan from the queues, so that the next plan follows this one."""
        for queues, counts in ((self._fed, plan.fed), (self._forced, plan.forced)):
            for queue, taken in zip(queues, counts):
                for _ in range(taken):
                    queue.popleft()
        # In place: the transcript shares this array.
        self.tokens[:] = plan.read
        self._is_fed, self._last_fed_row = plan.is_fed, plan.last_fed_row
        self._copied = plan.copied

    def penalty(self, row: int, last_fed_row: int | None = None) -> np.ndarray:
        """[S] float32: subtracted from the logit of silence when row `row` is sampled.

        `last_fed_row` is the row of the last fed token that is not silence; None: as of now.
        """
        last_fed_row = self._last_fed_row if last_fed_row is None else last_fed_row
        options = self.options
        if options.penalty_start is not None:
            count = row - options.penalty_start + 1
        else:
            count = row - 1 - last_fed_row if last_fed_row >= 0 else 0
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
        spoken = present & (tokens != self.silence_id)
        text = None
        if self._detokenizers is not None:
            cells = zip(self._detokenizers, tokens, spoken)
            text = tuple(
                detokenizer.add(int(token)) if is_spoken else ""
                for detokenizer, token, is_spoken in cells
            )
        # Last, so that a row whose text cannot be decoded is not shown.
        self._silent_before = self.silent_rows
        self._append(tokens, present)
        self.silent_rows = 0 if np.count_nonzero(spoken) else self.silent_rows + 1
        shown = tokens.copy(), present.copy()
        return Row(self.rows - 1, *shown, logprob, entropy, text, logits)

    def amend(self, row: Row, tokens: Mapping[int, int]) -> Row:
        """See `Session._amend`."""
        changed = dict(tokens)
        changed |= {r: changed[s] for r, s in self._copied.items() if s in changed}
        after, text = row.tokens.copy(), list(row.text or ())
        for stream, token in changed.items():
            old, after[stream] = int(row.tokens[stream]), token
            if token == old or self._detokenizers is None:
                continue
            detokenizer = self._detokenizers[stream]
            if old != self.silence_id:
                detokenizer.undo()
            text[stream] = detokenizer.add(token) if token != self.silence_id else ""
        self.tokens[:] = after  # in place: the transcript shares this array
        spoken = row.present & (after != self.silence_id)
        self.silent_rows = 0 if np.count_nonzero(spoken) else self._silent_before + 1
        return row._replace(
            tokens=after,
            text=None if row.text is None else tuple(text),
            logprob=np.where(after == row.tokens, row.logprob, np.float32(np.nan)),
        )

    def stop_reason(self, row: Row) -> str | None:
        """The condition of `stop` that the row, which is the last one, meets; None: none.

        Raises whatever the function `Stop.when` raises.
        """
        if self.stop.rows and self.rows >= self.stop.rows:
            return f"{self.rows} rows"
        if self.stop.silent_rows and self.silent_rows >= self.stop.silent_rows:
            return f"{self.silent_rows} silent rows"
        for stream, tokens in self._stop_tokens:
            if row.present[stream] and int(row.tokens[stream]) in tokens:
                return f"stream {self.streams.names[stream]!r} showed token {row.tokens[stream]}"
        return "a condition" if self.stop.when is not None and self.stop.when(row) else None

    def drop(self, stream: str | int | None = None) -> dict[str, list[int]]:
        """See `Session.drop`."""
        inputs = np.flatnonzero(self._is_input) if stream is None else [self._input(stream)]
        dropped = {}
        for index in inputs:
            # Replaced, not emptied: an interrupt leaves either all tokens or none.
            fed, self._fed[index] = self._fed[index], collections.deque()
            dropped[self.streams.names[index]] = list(fed)
        return dropped

    def waiting(self) -> dict[str, int]:
        """{input stream: number of fed tokens that are not in a row yet}."""
        queues = zip(self.streams.names, self._is_input, self._fed)
        return {name: len(fed) for name, is_input, fed in queues if is_input}

    def waiting_forced(self) -> dict[str, int]:
        """{stream: number of forced tokens that are not in a row yet}."""
        return dict(zip(self.streams.names, map(len, self._forced)))

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
        if self._mail:
            self._mail_rows.append((tokens, present))
        self.rows += 1
        if self.rows == self._far_row:
            check_rows(self._trained_rows, self.rows)

    def _index(self, stream: str | int) -> int:
        index = self.streams.index(stream) if isinstance(stream, str) else stream
        if not 0 <= index < self.streams.size:
            raise UserError(f"stream {index}: the model has streams 0 to {self.streams.size - 1}")
        return index

    def _input(self, stream: str | int) -> int:
        """The index of an input stream. Raises UserError for other streams."""
        index = self._index(stream)
        if not self._is_input[index]:
            names = [n for n, is_input in zip(self.streams.names, self._is_input) if is_input]
            raise UserError(
                f"stream {self.streams.names[index]!r} is not an input: inputs are"
                f" {', '.join(names) or 'none'}; use `force` for other streams"
            )
        return index

    def _checked(self, what: str, tokens: Sequence[int] | str, least: int = 0) -> list[int]:
        """The ids of tokens or of a text. Raises UserError, in which `what` names the argument."""
        if isinstance(tokens, str):
            if self._tokenizer is None:
                raise UserError(f"{what} is text, and the model has no tokenizer: give token ids")
            tokens = self._tokenizer.encode(tokens)
        array = np.asarray(tokens)
        if not array.size:
            return []
        check_tokens(what, array, self._vocab_size, least)
        return array.reshape(-1).tolist()

    def require_silence(self) -> int:
        """The silence token. Raises UserError if there is none."""
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


class Detokenizer:
    """Decodes the tokens of one stream one at a time.

    The text of a token may depend on the tokens before it. A token that ends inside a character
    has no text until the next tokens complete the character.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._shown = tokenizer, ""
        self._tokens: list[int] = []
        self._before = self._tokens, self._shown  # the state before the last token

    def add(self, token: int) -> str:
        """The text that this token adds."""
        self._before = self._tokens.copy(), self._shown
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

    def undo(self) -> None:
        """Forgets the last token."""
        self._tokens, self._shown = self._before

    def __deepcopy__(self, memo: dict) -> Detokenizer:
        copied = Detokenizer(self._tokenizer)
        copied._tokens, copied._shown = list(self._tokens), self._shown
        copied._before = list(self._before[0]), self._before[1]
        return copied
