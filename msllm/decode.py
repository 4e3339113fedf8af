"""Decoding row by row with a cache: every stream advances by one cell per step, and input may arrive at any time.

`DecodeSession` is the loop, one `step()` per row; `generate` runs it to the end. Everything that a user may change
while it runs (sampling, penalties, forced or fed tokens) enters the compiled step as arrays: no change recompiles.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msllm.errors import UserError
from msllm.load import LoadedModel
from msllm.model import Cache, bind
from msllm.streams import Cells

FREE = -1  # in an array of forced tokens: the model chooses


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
    """How rows are chosen. Where a type says so, one value is for all streams, and a tuple has one per stream."""

    temperature: float | tuple[float, ...] = 0.0  # 0: the most likely token
    top_k: int | tuple[int, ...] = 0  # only the k most likely tokens; 0: all
    top_p: float | tuple[float, ...] = 1.0  # tokens in descending order until their probabilities exceed p
    silence_penalty: float | tuple[float, ...] = 0.0  # subtracted from silence's logit, once the input has ended
    penalty_ramp: int = 5  # rows over which the penalty grows linearly to its full value
    # The first row with a penalty. None: it follows the input, from the second row after the last token that was fed
    # (other than silence), and there is none before the first such token.
    penalty_start: int | None = None
    ablated: tuple[str, ...] = ()  # streams that are silenced whatever the model chooses
    seed: int = 0


class Row(NamedTuple):
    """One row as it is shown."""

    index: int  # its row in the table
    tokens: np.ndarray  # [B, S] int32; 0 where absent
    present: np.ndarray  # [B, S] bool
    logits: jax.Array | None  # [B, S, V] float32 before penalties; None for a first row, which nothing predicts


class Generated(NamedTuple):
    """All rows of a run, the prefill first."""

    shown: np.ndarray  # [B, R, S] int32, as they were shown
    read: np.ndarray  # [B, R, S] int32, as the model read them: with tokens fed after a row was shown
    present: np.ndarray  # [B, R, S] bool
    logits: list[jax.Array]  # per generated row: [B, S, V]


class _Controls(NamedTuple):
    """Arrays that steer one step: [B, S] unless noted."""

    given: Any  # int32: the token, or FREE
    temperature: Any  # float32
    top_k: Any  # int32
    top_p: Any  # float32
    penalty: Any  # float32
    silence: Any  # [] int32
    seed: Any  # [] uint32
    row: Any  # [] int32


class DecodeSession:
    """Decodes `batch` tables in step.

    Each `step()` shows one more row. The model reads a row only in the step after: a token that is fed in between goes
    into the row just shown. Cells of input streams are silence unless fed; a stream with a delay is absent until it
    begins, and begins with silence; a stream that is absent at the end of the prefill goes on with silence.
    """

    def __init__(
        self,
        model: LoadedModel,
        options: DecodeOptions = DecodeOptions(),
        *,
        batch: int = 1,
        max_rows: int = 1024,
        silence_id: int | None = None,
    ):
        """`max_rows`: rows that the cache holds. `silence_id`: needed if the model came without a tokenizer."""
        if batch < 1 or max_rows < 1:
            raise UserError(f"batch is {batch} and max_rows is {max_rows}: both must be positive")
        self.model, self.streams, self.max_rows = model, model.streams, max_rows
        self.silence_id = silence_id if silence_id is not None or not model.tokenizer else model.tokenizer.silence_id
        self._batch, self._shape = batch, (batch, self.streams.size)
        self._queues = [[collections.deque() for _ in range(self.streams.size)] for _ in range(batch)]
        self._last_heard = np.full(batch, -1)  # row of the last token that was fed; -1: none
        self._cache = bind(model.graph, model.parameters).empty_cache(batch, max_rows)
        self._logits: jax.Array | None = None  # of the prefill's last row, until it is used
        self._rows: list[np.ndarray] = []
        self._present: list[np.ndarray] = []
        self._pending = False  # the last row has been shown but not read
        self._from_queue = np.zeros(self._shape, bool)  # cells of the last row that were fed
        self._delays = np.array(self.streams.delays or (0,) * self.streams.size)
        if self.silence_id is None and (self._inputs().any() or self.streams.skip_silence or self._delays.any()):
            raise UserError("the model came without a tokenizer: say which token means silence, silence_id=...")
        self.options = options

    @property
    def options(self) -> DecodeOptions:
        """May be set at any time; holds from the next row on."""
        return self._options

    @options.setter
    def options(self, options: DecodeOptions) -> None:
        size = self.streams.size

        def per_stream(name: str, dtype, ok, rule: str) -> np.ndarray:
            value = getattr(options, name)
            array = np.asarray(value, dtype)
            if array.shape not in ((), (size,)):
                raise UserError(f"{name} is {value!r}: must be one value or one for each of the {size} streams")
            if not np.all(ok(array)):
                raise UserError(f"{name} is {value!r}: {rule}")
            return np.broadcast_to(array, self._shape)

        self._temperature = per_stream("temperature", np.float32, lambda x: x >= 0, "must be >= 0 (0: the best)")
        self._top_k = per_stream("top_k", np.int32, lambda x: x >= 0, "must be >= 0 (0: all tokens)")
        self._top_p = per_stream("top_p", np.float32, lambda x: (x > 0) & (x <= 1), "must be in (0, 1]")
        self._penalty = per_stream("silence_penalty", np.float32, np.isfinite, "must be a finite number")
        if options.penalty_ramp < 1:
            raise UserError(f"penalty_ramp is {options.penalty_ramp}: must be at least one row")
        self._ablated = np.zeros(size, bool)
        self._ablated[[self.streams.index(name) for name in options.ablated]] = True
        if self.silence_id is None and (self._ablated.any() or self._penalty.any()):
            raise UserError("ablated streams and silence_penalty need silence: say which token it is, silence_id=...")
        self._options = options

    @property
    def rows(self) -> int:
        """Rows so far, read and shown."""
        return len(self._rows)

    def transcript(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [B, R, S] int32, present [B, R, S] bool): all rows so far, as the model reads them."""
        empty = np.zeros((self._batch, 0, self.streams.size))
        if not self._rows:
            return empty.astype(np.int32), empty.astype(bool)
        return np.stack(self._rows, axis=1), np.stack(self._present, axis=1)

    def prefill(self, tokens: np.ndarray, present: np.ndarray | None = None) -> None:
        """Reads rows [B, P, S] (or [P, S] for all tables) in one pass, at the beginning. Raises UserError."""
        tokens = np.asarray(tokens)
        if tokens.ndim == 2:
            tokens = np.broadcast_to(tokens, (self._batch, *tokens.shape))
        present = np.ones(tokens.shape, bool) if present is None else np.broadcast_to(present, tokens.shape)
        if tokens.ndim != 3 or (tokens.shape[0], tokens.shape[2]) != self._shape or tokens.shape[1] == 0:
            raise UserError(f"the prefill has shape {tokens.shape}: must be [{self._batch}, rows, {self.streams.size}]")
        if self._rows:
            raise UserError(f"prefill after {self.rows} rows: a session begins with it; feed tokens later instead")
        self._check_tokens("the prefill", tokens[present])
        self._check_room(tokens.shape[1])
        tokens = np.where(present, tokens, 0).astype(np.int32)
        self._cache, self._logits = _read(
            self.model.graph, self.model.parameters, self._cache, tokens, present, self._silence()
        )
        self._rows, self._present = list(tokens.swapaxes(0, 1)), list(present.swapaxes(0, 1))

    def feed(self, stream: str | int, tokens: Sequence[int], table: int | None = None) -> None:
        """Appends tokens to what an input stream will say, one a row, from the next row that the model reads.

        Args:
          stream: name or index, of kind `input`. table: which of the batch; None: all of them.
        """
        index = self.streams.index(stream) if isinstance(stream, str) else stream
        if not 0 <= index < self.streams.size:
            raise UserError(f"stream {index}: the model has streams 0 to {self.streams.size - 1}")
        if self.streams.kinds[index] != "input":
            inputs = [name for name, kind in zip(self.streams.names, self.streams.kinds) if kind == "input"]
            name, known = self.streams.names[index], ", ".join(inputs) or "none"
            raise UserError(f"stream {name!r} is no input: inputs are {known}")
        if table is not None and not 0 <= table < self._batch:
            raise UserError(f"table {table}: the session has tables 0 to {self._batch - 1}")
        tokens = np.asarray(tokens, np.int64).reshape(-1)
        self._check_tokens(f"input for stream {self.streams.names[index]!r}", tokens)
        for b in range(self._batch) if table is None else [table]:
            self._queues[b][index].extend(tokens.tolist())

    def step(self, forced: np.ndarray | None = None) -> Row:
        """Reads the last row, if the model has not yet, and shows the next.

        Args:
          forced: [B, S] or [S] int32: tokens that replace the model's choice (and inputs), FREE elsewhere.
        """
        present = np.broadcast_to(self.rows >= self._delays, self._shape)
        if not self._rows:
            logits, tokens = None, self._given(present, forced)
            tokens = np.where(tokens == FREE, self._silence_or_fail(), tokens)
        else:
            if self._pending:
                self._feed_last_row()
                self._check_room(1)
            controls = self._controls(self._given(present, forced))
            model = self.model
            if self._pending:
                last = (self._rows[-1], self._present[-1])
                self._cache, logits, tokens = _advance(model.graph, model.parameters, self._cache, *last, controls)
            else:
                logits, tokens = self._logits, _choose(self._logits, controls)
                self._logits = None
        tokens = np.where(present, np.asarray(tokens), 0).astype(np.int32)
        self._rows.append(tokens)
        self._present.append(present)
        self._pending = True
        return Row(self.rows - 1, tokens.copy(), present, logits)

    def _given(self, present: np.ndarray, forced) -> np.ndarray:
        """Tokens of the next row that are not the model's choice, [B, S]; takes input from the queues."""
        given = np.full(self._shape, FREE, np.int32)
        starts = present & ~(self._present[-1] if self._rows else np.zeros(self._shape, bool))
        silent = self._inputs() | self._ablated | starts
        if silent.any():
            given = np.where(silent, self._silence_or_fail(), given)
        self._from_queue = np.zeros(self._shape, bool)
        for b, s in np.argwhere(present & self._inputs()):
            if self._queues[b][s]:
                self._take(b, s, given, self.rows)
        if forced is not None:
            forced = np.broadcast_to(np.asarray(forced), self._shape)
            self._check_tokens("forced", forced[forced != FREE])
            given = np.where(forced != FREE, forced, given)
        return given.astype(np.int32)

    def _feed_last_row(self) -> None:
        """Input that came after the last row was shown goes into it, unless that cell holds earlier input already."""
        row = self._rows[-1].copy()
        for b, s in np.argwhere(self._present[-1] & ~self._from_queue):
            if self._queues[b][s]:
                self._take(b, s, row, self.rows - 1)
        self._rows[-1] = row

    def _take(self, table: int, stream: int, row: np.ndarray, index: int) -> None:
        row[table, stream] = self._queues[table][stream].popleft()
        self._from_queue[table, stream] = True
        if row[table, stream] != self.silence_id:
            self._last_heard[table] = index

    def _controls(self, given: np.ndarray) -> _Controls:
        options, row = self._options, self.rows
        if options.penalty_start is None:
            counted = np.where(self._last_heard >= 0, row - 1 - self._last_heard, 0)
        else:
            counted = np.full(self._batch, row - options.penalty_start + 1)
        ramp = np.clip(counted / options.penalty_ramp, 0, 1).astype(np.float32)
        return _Controls(
            given,
            self._temperature,
            self._top_k,
            self._top_p,
            self._penalty * ramp[:, None],
            self._silence(),
            np.uint32(options.seed % (1 << 32)),
            np.int32(row),
        )

    def _inputs(self) -> np.ndarray:
        return np.array([kind == "input" for kind in self.streams.kinds])

    def _silence(self) -> np.int32:
        return np.int32(0 if self.silence_id is None else self.silence_id)

    def _silence_or_fail(self) -> int:
        if self.silence_id is None:
            raise UserError("a cell must be silent and the model has no tokenizer: prefill, or give silence_id=...")
        return self.silence_id

    def _check_tokens(self, what: str, tokens: np.ndarray) -> None:
        vocab_size = self.model.config.vocab_size
        if not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"{what} has type {tokens.dtype}: must be integers")
        if tokens.size and not (0 <= tokens.min() and tokens.max() < vocab_size):
            bad = int(tokens.min() if tokens.min() < 0 else tokens.max())
            raise UserError(f"{what} holds token {bad}: the vocabulary has ids 0 to {vocab_size - 1}")

    def _check_room(self, rows: int) -> None:
        read = self.rows - self._pending
        if read + rows > self.max_rows:
            raise UserError(f"the session is full: it has room for max_rows={self.max_rows} rows and has read {read}")


def generate(
    model: LoadedModel,
    rows: int,
    options: DecodeOptions = DecodeOptions(),
    *,
    prefill: np.ndarray | None = None,
    present: np.ndarray | None = None,
    forced: np.ndarray | None = None,
    fed: Sequence[tuple[int, str | int, int]] = (),
    silent_rows_to_stop: int = 0,
    keep_logits: bool = False,
    batch: int = 1,
    silence_id: int | None = None,
) -> Generated:
    """Generates `rows` rows.

    Args:
      prefill, present: rows [B, P, S] that come first, and which of their cells are not absent. Without them the first
        row is silence.
      forced: [rows, S] or [B, rows, S] int32: tokens known beforehand, of any stream; FREE elsewhere.
      fed: (row, stream, token), in the order of rows: input that arrives after the row (of the table) was shown.
      silent_rows_to_stop: stop after so many successive rows that are silent in all streams; 0: never.
      batch: tables, if there is no prefill.
      silence_id: needed if the model came without a tokenizer.
    """
    if prefill is not None:
        prefill = np.asarray(prefill)
        batch, start = (1 if prefill.ndim == 2 else len(prefill)), prefill.shape[-2]
    else:
        start = 0
    session = DecodeSession(model, options, batch=batch, max_rows=start + rows, silence_id=silence_id)
    if forced is not None:
        forced = np.asarray(forced)
        if forced.shape not in ((rows, session.streams.size), (batch, rows, session.streams.size)):
            shape = f"[{rows}, {session.streams.size}]"
            raise UserError(f"forced has shape {forced.shape}: must be {shape}, or that of each table")
    if prefill is not None:
        session.prefill(prefill, present)
    shown, logits, silent_rows = list(session.transcript()[0].swapaxes(0, 1)), [], 0
    for number in range(rows):
        row = session.step(None if forced is None else forced[..., number, :])
        shown.append(row.tokens)
        if keep_logits and row.logits is not None:
            logits.append(row.logits)
        for _, stream, token in (item for item in fed if item[0] == row.index):
            session.feed(stream, [token])
        silent = np.all((row.tokens == session.silence_id) | ~row.present)
        silent_rows = silent_rows + 1 if silent else 0
        if silent_rows_to_stop and silent_rows >= silent_rows_to_stop:
            break
    read, is_present = session.transcript()
    return Generated(np.stack(shown, axis=1), read, is_present, logits)


def filtered_logits(logits: jax.Array, temperature, top_k, top_p) -> jax.Array:
    """Logits [..., V] float32 over the temperature, -inf where top-k or top-p drops the token.

    Of the `top_k` most likely tokens (0: all), in descending order, those are kept whose predecessors' probabilities
    sum to at most `top_p` (nucleus sampling, Holtzman et al. 2019, arXiv 1904.09751). The three have shape [...].
    """
    logits = logits / jnp.where(temperature > 0, temperature, 1.0)[..., None]
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    keep = (rank < top_k[..., None]) | (top_k[..., None] == 0)
    total = jnp.cumsum(jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1), axis=-1)
    before = jnp.concatenate([jnp.zeros_like(total[..., :1]), total[..., :-1]], axis=-1)
    # A sum that rounding takes above 1 must not drop anything.
    keep &= (before <= top_p[..., None]) | (top_p[..., None] >= 1)
    keep = jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)


@jax.jit
def _choose(logits: jax.Array, controls: _Controls) -> jax.Array:
    """The next row's tokens [B, S] of logits [B, S, V]."""
    is_silence = jnp.arange(logits.shape[-1]) == controls.silence
    logits = logits - jnp.where(is_silence, controls.penalty[..., None], 0.0)
    best = jnp.argmax(logits, axis=-1)

    def sample():
        # One key per table and row: a draw depends neither on the other tables nor on when it is made.
        row_key = jax.random.fold_in(jax.random.key(controls.seed), controls.row)
        keys = jax.vmap(lambda b: jax.random.fold_in(row_key, b))(jnp.arange(logits.shape[0]))
        filtered = filtered_logits(logits, controls.temperature, controls.top_k, controls.top_p)
        drawn = jax.vmap(jax.random.categorical)(keys, filtered)
        return jnp.where(controls.temperature > 0, drawn, best)

    # Sorting the vocabulary costs more than a small model: not when all streams take the most likely token.
    chosen = jax.lax.cond(jnp.any(controls.temperature > 0), sample, lambda: best)
    return jnp.where(controls.given != FREE, controls.given, chosen)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _read(graph, parameters, cache: Cache, tokens, present, silence) -> tuple[Cache, jax.Array]:
    """Appends rows [B, P, S] to the cache; logits [B, S, V] of the last."""
    model = bind(graph, parameters)
    row = jnp.broadcast_to(cache.length + jnp.arange(tokens.shape[1]), tokens.shape[:2])
    seen = present & (tokens != silence) if model.streams.skip_silence else present
    hidden, cache = model(tokens, Cells(row, jnp.ones_like(row), present, seen), row, cache)
    return cache, model.logits(hidden[:, -1])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(graph, parameters, cache: Cache, row, present, controls: _Controls):
    """Reads one row [B, S]: (cache, logits [B, S, V], the next row's tokens [B, S])."""
    cache, logits = _read(graph, parameters, cache, row[:, None], present[:, None], controls.silence)
    return cache, logits, _choose(logits, controls)
