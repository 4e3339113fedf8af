"""Live decoding: sessions that advance row by row while input arrives at any time.

For example::

    engine = Engine(model, sessions=4, window=1024)
    session = engine.open(DecodeOptions(temperature=0.7), stop=Stop(rows=200))
    session.feed("user", "how are you")
    for row in session:
        print(row.text)

An engine holds the caches of its sessions on the device. One compiled step advances any subset of
them by one row, and the sessions may be at different rows. The length of a session is not limited:
when its window is full, its oldest rows fall out. docs/decoding.md is the guide.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from msllm.config import ModelConfig
from msllm.decode.cache import DTYPES
from msllm.decode.program import RUN_ROWS, Controls, RowInputs, State, decode_program
from msllm.decode.sampling import FREE, Sampled, Sampling
from msllm.decode.script import (
    DecodeOptions,
    Row,
    Script,
    Stop,
    Transcript,
    check_tokens,
    per_stream,
)
from msllm.errors import UserError
from msllm.sharding import check_lengths
from msllm.streams import StreamSpec
from msllm.weights.load import LoadedModel

__all__ = [
    "FREE",
    "DecodeOptions",
    "Engine",
    "Generated",
    "Row",
    "Session",
    "Snapshot",
    "Stop",
    "generate",
]

_ROW_PENDING = "a session's next row is already being computed: await it before you ask for another"


class Engine:
    """Runs up to `sessions` sessions of one model on a device or a mesh. Use it from one thread."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        sessions: int = 1,
        window: int = 1024,
        mesh: Mesh | None = None,
        cache_dtype: str = "",
        all_logits: bool = False,
        silence_id: int | None = None,
    ):
        """Allocates all memory. Functions are compiled on first use, or by `warm_up`.

        Args:
          model: the model and its streams.
          sessions: the most sessions that can be open at a time.
          window: the most rows that a session sees. Memory is allocated for all of them.
          mesh: from `sharding.make_mesh`. Sessions are sharded over `data` and `fsdp`, streams over
            `stream`, heads over `tensor`. None: the default device.
          cache_dtype: dtype of the keys and values: float32, bfloat16 or int8. Empty: the model's
            compute dtype.
          all_logits: return the logits of all streams with each row. Without it, the logits of
            input streams are not computed.
          silence_id: the silence token, if the model has no tokenizer.

        Raises UserError.
        """
        if sessions < 1 or window < 2:
            raise UserError(
                f"sessions is {sessions} and window is {window}: must be at least 1 session and 2"
                " rows"
            )
        cache_dtype = cache_dtype or model.config.compute_dtype
        if cache_dtype not in DTYPES:
            raise UserError(f"cache_dtype is {cache_dtype!r}: must be one of {', '.join(DTYPES)}")
        if mesh is not None:
            _check_mesh(model.config, sessions, mesh)
        self.model, self.streams, self.window = model, model.streams, window
        self.silence_id = _silence_of(model, silence_id)

        silence = -1 if self.silence_id is None else self.silence_id
        self._program = decode_program(
            model.config, model.streams, sessions, window, mesh, cache_dtype, all_logits, silence
        )
        layout = "in panels" if self._program.layout.in_panels else "rows last"
        self._kind = _Kind(
            model.config,
            model.streams,
            window,
            f"{cache_dtype}, {layout}",
            silence,
            self._program.streams,
        )
        self._weights, self._state = self._program.prepare(model.parameters), self._program.empty()
        devices = jax.tree.leaves(self._weights)[0].devices()
        if mesh is None and len(devices) == 1:
            # Commit both to the device from the start. The weights of a checkpoint are committed,
            # so the state would be committed after the first row, and every function would be
            # compiled again for it.
            self._weights, self._state = jax.device_put((self._weights, self._state), *devices)

        self._slots: list[Session | None] = [None] * sessions
        self._controls = _neutral_controls(sessions, self._program.streams)
        self._device_controls: Controls | None = None  # a copy of `_controls`; None: outdated
        self._waiting: dict[Session, asyncio.Future] = {}
        self._driver: asyncio.Task | None = None

    @property
    def free(self) -> int:
        """The number of sessions that can still be opened."""
        return self._slots.count(None)

    def open(
        self,
        options: DecodeOptions | None = None,
        *,
        prefill: np.ndarray | None = None,
        present: np.ndarray | None = None,
        keep: int = 0,
        stop: Stop | None = None,
        allowed: Mapping[str, Sequence[int]] | None = None,
    ) -> Session:
        """Opens a session.

        Args:
          options: None: the defaults of `DecodeOptions`.
          prefill: the first rows [P, S], read in one pass. None: the first row holds the tokens
            that are fed or forced before the first step, and silence elsewhere.
          present: [P, S] bool, which cells of the prefill are not absent; None: all.
          keep: the number of first rows that never fall out of the window.
          stop: when iteration ends; None: never.
          allowed: {stream: tokens that the model may sample}. Other streams may sample all tokens.

        Raises UserError if there is no room for the session or its prefill.
        """
        slot = self._free_slot()
        if not 0 <= keep < self.window - 1:
            raise UserError(
                f"keep is {keep}: must be at least 0 and leave two of the window's {self.window}"
                " rows"
            )
        options, stop = options or DecodeOptions(), stop or Stop()
        script = Script(self.model, self.silence_id, options, stop, keep, self.window)
        if prefill is not None:
            prefill, present = self._checked_prefill(prefill, present)
            script.prefill(prefill, present)
        for stream, tokens in (allowed or {}).items():
            script.allow(stream, tokens)
        self._state = self._program.clear(self._state, np.int32(slot))
        if prefill is not None and present is not None and len(prefill) > 1:
            self._read(slot, prefill[:-1], present[:-1])
        session = self._add_session(slot, script)
        if script.allowed:
            self._set_allowed(session)
        return session

    def step(self, sessions: Sequence[Session] | None = None) -> list[Row]:
        """Computes the next row of each session in one step on the device.

        `sessions` is None for all open sessions. Raises UserError.
        """
        return self._collect(self._dispatch(self._checked_sessions(sessions)))

    def run(self, rows: int, sessions: Sequence[Session] | None = None) -> list[list[Row]]:
        """Computes the next `rows` rows of each session without returning to the host in between.

        One call to the device computes up to 32 rows. Stop conditions are ignored, and the rows
        have no logits. Raises UserError.
        """
        if rows < 1:
            raise UserError(f"rows is {rows}: must be at least 1")
        sessions = self._checked_sessions(sessions)
        shown: dict[Session, list[Row]] = {
            session: [] if session.rows else [session._script.first()] for session in sessions
        }
        while True:
            missing = {session: rows - len(shown[session]) for session in sessions}
            wanted = {s: min(RUN_ROWS, count) for s, count in missing.items() if count}
            if not wanted:
                return list(shown.values())
            for session, new in self._run(wanted).items():
                shown[session] += new

    def warm_up(self) -> None:
        """Compiles every function that sessions use. Needs a free slot."""
        session = self.open(allowed={name: [0] for name in self.streams.names})
        session.force(self.streams.names[0], [0])
        session.run(3)
        session.step()
        # The loop reads all lengths to which `_read` pads a prefill.
        slot, length = np.int32(session._slot), 1
        while length < 2 * self.window:
            table = np.zeros((min(length, self.window), self.streams.size), np.int32)
            self._read(session._slot, table, table > 0)
            length *= 2
        self._state = self._program.copy(self._state, slot, slot)
        snapshot = session.snapshot()
        session.close()
        self.restore(snapshot).close()

    def restore(self, snapshot: Snapshot) -> Session:
        """Opens a session that continues from a snapshot.

        The snapshot may come from another engine with the same model, window and cache. Raises
        UserError if they differ, or if no slot is free.
        """
        if snapshot.kind != self._kind:
            ours, theirs = self._kind, snapshot.kind
            raise UserError(
                "the snapshot is from an engine with another model, window or cache (its window is"
                f" {theirs.window} and its cache {theirs.cache}; here they are {ours.window} and"
                f" {ours.cache}): restore it in an engine with the same model, window and cache"
            )
        slot = self._free_slot()
        self._state = self._program.put(self._state, np.int32(slot), snapshot.state)
        return self._add_session(slot, snapshot.script.copy())

    def _add_session(self, slot: int, script: Script) -> Session:
        session = self._slots[slot] = Session(self, slot, script)
        self._controls.keep[slot] = script.keep
        self._set_options(session)
        return session

    def _set_options(self, session: Session) -> None:
        """Sends a session's options to the device with the next step."""
        slot, size, options = session._slot, self.streams.size, session._script.options
        arrays = per_stream(options, self.streams)
        for name, array in self._controls.sampling._asdict().items():
            array[slot, :size] = arrays[name]
        self._controls.presence_penalty[slot, :size] = arrays["presence_penalty"]
        self._controls.seed[slot] = options.seed % (1 << 32)
        self._device_controls = None

    def _set_allowed(self, session: Session) -> None:
        mask = np.ones((self._program.streams, self.model.config.vocab_size), bool)
        for stream, tokens in session._script.allowed.items():
            mask[stream] = False
            mask[stream, tokens] = True
        self._state = self._program.allow(self._state, np.int32(session._slot), mask)

    def _free_slot(self) -> int:
        if None not in self._slots:
            raise UserError(
                f"all {len(self._slots)} sessions are open: close one, or make an engine with more"
            )
        return self._slots.index(None)

    def _checked_prefill(
        self, tokens: np.ndarray, present: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32, present bool), [P, S] each. Raises UserError."""
        tokens, size = np.asarray(tokens), self.streams.size
        if tokens.ndim != 2 or tokens.shape[1] != size or not len(tokens):
            raise UserError(
                f"the prefill has shape {tokens.shape}: must be [rows, {size}], with at least one"
                " row"
            )
        if len(tokens) > self.window:
            raise UserError(
                f"the prefill has {len(tokens)} rows and the window {self.window}: enlarge the"
                " window"
            )
        mask = np.ones(tokens.shape, bool)
        if present is not None:
            mask[:] = present
        check_tokens("the prefill", tokens[mask], self.model.config.vocab_size)
        return np.where(mask, tokens, 0).astype(np.int32), mask

    def _read(self, slot: int, tokens: np.ndarray, present: np.ndarray) -> None:
        """Reads rows [P, S] into an empty slot.

        Pads them to a power of two, so that only a few lengths are compiled.
        """
        rows = len(tokens)
        length = min(1 << (rows - 1).bit_length(), self.window)
        padding = ((0, length - rows), (0, self._program.streams - self.streams.size))
        table = (np.pad(x, padding)[None] for x in (tokens, present))
        self._state = self._program.read(
            self._weights, self._state, np.int32(slot), *table, np.int32(rows)
        )

    def _checked_sessions(self, sessions: Sequence[Session] | None) -> list[Session]:
        """The sessions to advance; None: all open ones. Raises UserError."""
        if sessions is None:
            sessions = [session for session in self._slots if session]
        for session in sessions:
            if session.closed or session._engine is not self:
                raise UserError(
                    "a session is closed or belongs to another engine: open one with engine.open()"
                )
            if session._in_flight:
                raise UserError(_ROW_PENDING)
        if len(set(sessions)) < len(sessions):
            raise UserError("a session is named twice: name each session once")
        return list(sessions)

    def _empty_inputs(self, *rows: int) -> RowInputs:
        """Inputs of one row, or of `rows` rows, in which no session advances."""
        sessions = (*rows, len(self._slots))
        cells = (*sessions, self._program.streams)
        return RowInputs(
            active=np.zeros(sessions, bool),
            row=np.zeros(sessions, np.int32),
            read=np.zeros(cells, np.int32),
            read_present=np.zeros(cells, bool),
            given=np.zeros(cells, np.int32),
            penalty=np.zeros(cells, np.float32),
        )

    def _dispatch(self, sessions: Sequence[Session]) -> _PendingStep:
        """Starts the next row of each session."""
        first_rows = {session: session._script.first() for session in sessions if not session.rows}
        pending = _PendingStep(sessions, first_rows, {}, None)
        if len(first_rows) == len(sessions):
            return pending
        inputs, size = self._empty_inputs(), self.streams.size
        for session in sessions:
            if session in first_rows:
                continue
            slot, script = session._slot, session._script
            inputs.active[slot], inputs.row[slot] = True, script.rows - 1
            inputs.read[slot, :size], inputs.read_present[slot, :size] = script.read()
            inputs.given[slot, :size], pending.present[session] = script.given()
            inputs.penalty[slot, :size] = script.penalty(script.rows)
            session._in_flight = True
        self._state, *out = self._program.advance(
            self._weights, self._state, self._placed_controls(), inputs
        )
        return pending._replace(out=out)

    def _collect(self, pending: _PendingStep) -> list[Row]:
        """The rows of `_dispatch`, in the order of its sessions."""
        if pending.out is None:
            return [pending.first_rows[session] for session in pending.sessions]
        packed, logits = pending.out
        sampled = Sampled.unpacked(np.asarray(packed))
        logits = None if logits is None else np.asarray(logits)
        rows, size = [], self.streams.size
        for session in pending.sessions:
            if session in pending.first_rows:
                rows.append(pending.first_rows[session])
                continue
            session._in_flight = False
            tokens, logprob, entropy = (x[session._slot, :size] for x in sampled)
            own_logits = None if logits is None else logits[session._slot, :size]
            present = pending.present[session]
            rows.append(session._script.show(tokens, present, logprob, entropy, own_logits))
        return rows

    def _run(self, wanted: Mapping[Session, int]) -> dict[Session, list[Row]]:
        """Computes up to RUN_ROWS next rows of each session in one call to the device.

        Args:
          wanted: {session: number of rows}.
        """
        inputs, size = self._empty_inputs(RUN_ROWS), self.streams.size
        inputs.read[1:] = FREE
        present: dict[Session, list[np.ndarray]] = {}
        for session, rows in wanted.items():
            slot, script = session._slot, session._script
            inputs.read[0, slot, :size], here = script.read()
            present[session] = []
            for i in range(rows):
                inputs.active[i, slot], inputs.row[i, slot] = True, script.rows - 1 + i
                inputs.read_present[i, slot, :size] = here
                inputs.given[i, slot, :size], here = script.given(script.rows + i, here)
                inputs.penalty[i, slot, :size] = script.penalty(script.rows + i)
                present[session].append(here)
        most = np.int32(max(wanted.values()))
        self._state, packed = self._program.run(
            self._weights, self._state, self._placed_controls(), inputs, most
        )
        sampled = Sampled.unpacked(np.asarray(packed))

        def show(session: Session, i: int) -> Row:
            tokens, logprob, entropy = (x[i, session._slot, :size] for x in sampled)
            return session._script.show(tokens, present[session][i], logprob, entropy)

        return {
            session: [show(session, i) for i in range(rows)] for session, rows in wanted.items()
        }

    def _placed_controls(self) -> Controls:
        """The controls on the device. They are transferred only after a change."""
        if self._device_controls is None:
            # On a CPU the device may read the host's arrays in place. Copy them, because the next
            # change of an option writes to them.
            self._device_controls = jax.device_put(jax.tree.map(np.copy, self._controls))
        return self._device_controls

    async def _next(self, session: Session) -> Row:
        """The session's next row, computed in one step with all other rows awaited by then."""
        self._checked_sessions([session])
        if session in self._waiting:
            raise UserError(_ROW_PENDING)
        loop = asyncio.get_running_loop()
        future = self._waiting[session] = loop.create_future()
        if self._driver is None or self._driver.done():
            self._driver = loop.create_task(self._drive())
        return await future

    async def _drive(self) -> None:
        """Advances sessions while rows are awaited."""
        while self._waiting:
            await asyncio.sleep(0)  # let all tasks that are ready ask for their next row
            waiting, self._waiting = self._waiting, {}
            waiting = {session: future for session, future in waiting.items() if not session.closed}
            try:
                pending = self._dispatch(list(waiting))
                await asyncio.to_thread(jax.block_until_ready, pending.out)
                rows = self._collect(pending)
            except Exception as error:  # raise it where the rows are awaited
                for future in waiting.values():
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, row in zip(waiting.values(), rows):
                if not future.done():
                    future.set_result(row)


class Session:
    """One conversation in an engine, from `Engine.open`. Iterate over it, or call `step`."""

    def __init__(self, engine: Engine, slot: int, script: Script):
        self._engine, self._slot, self._script = engine, slot, script
        self._in_flight = False  # the device is computing its next row
        self.closed = False

    @property
    def options(self) -> DecodeOptions:
        """The options of decoding. Set them at any time; they apply from the next row on."""
        return self._script.options

    @options.setter
    def options(self, options: DecodeOptions) -> None:
        self._require_open()._script.set_options(options)
        self._engine._set_options(self)

    @property
    def rows(self) -> int:
        """The number of rows so far, including the prefill."""
        return self._script.rows

    @property
    def finished(self) -> str | None:
        """The stop condition that the last row met; None: none."""
        return self._script.finished

    def feed(self, stream: str | int, tokens: Sequence[int] | str) -> None:
        """Appends tokens or a text to the input of a stream, which holds one token per row.

        The first token goes into the next row that the model reads. That is the row shown last,
        unless its cell already holds a token that was fed. Raises UserError.
        """
        self._require_open()._script.feed(stream, tokens)

    def force(self, stream: str | int, tokens: Sequence[int] | str) -> None:
        """Appends tokens or a text that a stream of any kind must say, from the next row on.

        FREE in place of a token lets the model sample that cell. Raises UserError.
        """
        self._require_open()._script.force(stream, tokens)

    def allow(self, stream: str | int, tokens: Sequence[int] | str | None) -> None:
        """Restricts a stream to these tokens from the next row on; None: all. Raises UserError."""
        self._require_open()._script.allow(stream, tokens)
        self._engine._set_allowed(self)

    def step(self) -> Row:
        """Computes the next row. `Engine.step` advances many sessions at the same cost."""
        return self._engine.step([self])[0]

    async def next(self) -> Row:
        """The next row. Rows of sessions that are awaited together share a step on the device."""
        return await self._engine._next(self)

    def run(self, rows: int) -> list[Row]:
        """Computes the next `rows` rows in as few calls to the device as possible."""
        return self._engine.run(rows, [self])[0]

    def __iter__(self) -> Iterator[Row]:
        """Yields rows from `step` until a stop condition holds."""
        while self.finished is None:
            yield self.step()

    async def __aiter__(self) -> AsyncIterator[Row]:
        """Yields rows from `next` until a stop condition holds."""
        while self.finished is None:
            yield await self.next()

    @property
    def waiting(self) -> dict[str, int]:
        """{input stream: number of fed tokens that are not in a row yet}."""
        return self._script.waiting()

    def transcript(self, last: int | None = None) -> Transcript:
        """The rows in the window, or the last `last` of them, as the model reads them."""
        return self._script.transcript(last)

    def fork(self, seed: int | None = None) -> Session:
        """Opens another session of this engine that continues from this one's last row.

        It samples the same tokens as this session, unless it gets another seed. Raises UserError if
        no slot is free.
        """
        engine, slot = self._require_open()._engine, self._engine._free_slot()
        engine._checked_sessions([self])
        engine._state = engine._program.copy(engine._state, np.int32(self._slot), np.int32(slot))
        session = engine._add_session(slot, self._script.copy())
        if seed is not None:
            session.options = dataclasses.replace(self.options, seed=seed)
        return session

    def snapshot(self) -> Snapshot:
        """A copy of the session on the host, from which `Engine.restore` continues."""
        engine = self._require_open()._engine
        engine._checked_sessions([self])
        state = jax.device_get(engine._program.take(engine._state, np.int32(self._slot)))
        return Snapshot(engine._kind, self._script.copy(), state)

    def close(self) -> None:
        """Frees the slot for another session."""
        if not self.closed:
            self._engine._slots[self._slot], self.closed = None, True

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _require_open(self) -> Session:
        """This session. Raises UserError if it is closed."""
        if self.closed:
            raise UserError("the session is closed: open another with engine.open()")
        return self


class _Kind(NamedTuple):
    """The properties of an engine that must match to restore a snapshot."""

    config: ModelConfig
    streams: StreamSpec
    window: int
    cache: str  # dtype and layout
    silence_id: int
    padded_streams: int


class Snapshot(NamedTuple):
    """A copy of a session on the host, from `Session.snapshot`."""

    kind: _Kind
    script: Script
    state: State  # NumPy arrays, with B = 1


class _PendingStep(NamedTuple):
    """A step that the device is computing."""

    sessions: Sequence[Session]
    first_rows: Mapping[Session, Row]  # the first row of a session is computed on the host
    present: dict[Session, np.ndarray]  # [S], the present cells of the row that is sampled
    out: Any  # [packed Sampled, logits]; None: no session needs the device


class Generated(NamedTuple):
    """All rows of several tables, from `generate`. The prefill comes first."""

    shown: np.ndarray  # [B, R, S] int32, the rows as they were shown
    # [B, R, S] int32, the rows as the model read them, with tokens fed after a row was shown
    read: np.ndarray
    present: np.ndarray  # [B, R, S] bool
    logits: list[np.ndarray]  # [B, S, V] per sampled row; empty without `keep_logits`


def generate(
    model: LoadedModel,
    rows: int,
    options: DecodeOptions | None = None,
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
    """Generates `rows` rows of each of several tables.

    Args:
      model: the model and its streams.
      rows: the number of rows to generate, without the prefill.
      options: None: the defaults. The seed of each table is derived from that of the options.
      prefill: the first rows [B, P, S], or [P, S]; None: the first row is silence.
      present: which cells of the prefill are not absent; None: all.
      forced: [rows, S] or [B, rows, S] int32, tokens that are known beforehand, of streams of any
        kind; FREE elsewhere.
      fed: (row, stream, token) of input that arrives after this row of each table was shown.
      silent_rows_to_stop: stop after this many successive rows that are silent in all streams of
        all tables; 0: never.
      keep_logits: return the logits of every row.
      batch: the number of tables, if there is no prefill.
      silence_id: the silence token, if the model has no tokenizer.

    Raises UserError.
    """
    options, size = options or DecodeOptions(), model.streams.size
    start = 0
    if prefill is not None:
        prefill = _checked_tables(prefill, size)
        present = None if present is None else np.broadcast_to(present, prefill.shape)
        batch, start = prefill.shape[:2]
    if forced is not None:
        forced = _checked_forced(forced, (batch, rows, size))
    engine = Engine(
        model,
        sessions=batch,
        window=max(start + rows, 2),
        all_logits=keep_logits,
        silence_id=silence_id,
    )
    sessions = []
    for table in range(batch):
        seed = np.random.SeedSequence((options.seed % (1 << 32), table)).generate_state(1)[0]
        session = engine.open(
            dataclasses.replace(options, seed=int(seed)),
            prefill=None if prefill is None else prefill[table],
            present=None if prefill is None or present is None else present[table],
        )
        if forced is not None:
            for stream in range(size):
                session.force(stream, forced[table, :, stream].tolist())
        sessions.append(session)
    shown, logits = [np.array([session.transcript().tokens for session in sessions])], []
    if not (fed or silent_rows_to_stop or keep_logits):
        tables = engine.run(rows, sessions)
        shown.append(np.array([[row.tokens for row in table] for table in tables]))
    else:
        for number in range(start, start + rows):
            last = engine.step(sessions)
            shown.append(np.array([[row.tokens] for row in last]))
            if last[0].logits is not None:
                logits.append(np.array([row.logits for row in last]))
            for row, stream, token in fed:
                if row == number:
                    for session in sessions:
                        session.feed(stream, [token])
            silent_rows = min(session._script.silent_rows for session in sessions)
            if silent_rows_to_stop and silent_rows >= silent_rows_to_stop:
                break
    read = [session.transcript() for session in sessions]
    return Generated(
        np.concatenate(shown, axis=1),
        np.array([transcript.tokens for transcript in read]),
        np.array([transcript.present for transcript in read]),
        logits,
    )


def _checked_tables(prefill: np.ndarray, streams: int) -> np.ndarray:
    """The prefill of `generate` as [B, P, S]. Raises UserError."""
    prefill = np.asarray(prefill)
    prefill = prefill[None] if prefill.ndim == 2 else prefill
    if prefill.ndim != 3:
        raise UserError(
            f"the prefill has shape {prefill.shape}: must be [tables, rows, {streams}], or [rows,"
            f" {streams}] for one table"
        )
    return prefill


def _checked_forced(forced: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The forced tokens of `generate` as [B, rows, S]. Raises UserError."""
    forced = np.asarray(forced)
    if forced.shape not in (shape[1:], shape):
        raise UserError(
            f"forced has shape {forced.shape}: must be {list(shape[1:])}, or {list(shape)} with a"
            " table each"
        )
    return np.broadcast_to(forced, shape)


def _silence_of(model: LoadedModel, silence_id: int | None) -> int | None:
    """`silence_id`, or else the tokenizer's. Raises UserError if it is needed and unknown."""
    if silence_id is None and model.tokenizer:
        silence_id = model.tokenizer.silence_id
    streams = model.streams
    needed = "input" in streams.kinds or streams.skip_silence or any(streams.delays)
    if silence_id is None and needed:
        raise UserError(
            "the model has no tokenizer: pass the token that means silence as silence_id=..."
        )
    return silence_id


def _neutral_controls(sessions: int, streams: int) -> Controls:
    """Controls without penalties and filters, which pick the most likely token."""
    cells = (sessions, streams)
    return Controls(
        Sampling(
            temperature=np.zeros(cells, np.float32),
            top_k=np.zeros(cells, np.int32),
            top_p=np.ones(cells, np.float32),
            top_p_inside=np.zeros(cells, bool),
            min_p=np.zeros(cells, np.float32),
            min_probability=np.zeros(cells, np.float32),
        ),
        presence_penalty=np.zeros(cells, np.float32),
        seed=np.zeros(sessions, np.uint32),
        keep=np.zeros(sessions, np.int32),
    )


def _check_mesh(config: ModelConfig, sessions: int, mesh: Mesh) -> None:
    """Raises UserError if the size of a mesh axis does not divide an array dimension along it."""
    lengths = {
        "batch": (sessions, "sessions"),
        "heads": (config.num_heads, "model.num_heads"),
        "kv_heads": (config.num_kv_heads, "model.num_kv_heads"),
        "mlp": (config.d_ff, "model.d_ff"),
        "embed": (config.d_model, "model.d_model"),
        "vocab": (config.vocab_size, "model.vocab_size"),
    }
    check_lengths(lengths, mesh)
