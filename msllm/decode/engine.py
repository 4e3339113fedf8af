"""Live decoding: sessions in which every stream advances by one cell a row, and input may arrive at any time.

For example::

    engine = Engine(model, sessions=4, window=1024)
    session = engine.open(DecodeOptions(temperature=0.7), stop=Stop(rows=200))
    session.feed("user", "how are you")
    for row in session:
        print(row.text)

An engine holds the caches of its sessions on the device and advances any of them by one row in one compiled step, each
at its own row. A session goes on for as long as it is asked to: when its window is full, its oldest rows fall out.
docs/decoding.md is the guide.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from msllm.decode.cache import DTYPES
from msllm.decode.program import RUN_ROWS, Controls, Feed, decode_program
from msllm.decode.sampling import FREE, Sampling, unpacked
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


class Engine:
    """Room for `sessions` sessions of one model on one device or mesh. Use it from one thread."""

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
        """Allocates everything; compiles when it is first used, or in `warm_up`. Raises UserError.

        Args:
          window: rows that a session sees at most; memory is taken for all of them.
          mesh: from `sharding.make_mesh`: sessions over `data` and `fsdp`, streams over `stream`, heads over `tensor`;
            None: the default device.
          cache_dtype: float32, bfloat16 or int8, of keys and values; empty: the model's compute dtype.
          all_logits: rows come with the logits of all streams. Without, input streams compute none.
          silence_id: needed if the model came without a tokenizer.
        """
        if sessions < 1 or window < 2:
            raise UserError(
                f"sessions is {sessions} and window is {window}: needs at least one session and two rows"
            )
        cache_dtype = cache_dtype or model.config.compute_dtype
        if cache_dtype not in DTYPES:
            raise UserError(f"cache_dtype is {cache_dtype!r}: must be one of {', '.join(DTYPES)}")
        self.model, self.streams, self.window = model, model.streams, window
        self.silence_id = (
            silence_id
            if silence_id is not None or not model.tokenizer
            else model.tokenizer.silence_id
        )
        kinds, delays = self.streams.kinds, self.streams.delays
        if self.silence_id is None and (
            "input" in kinds or self.streams.skip_silence or any(delays)
        ):
            raise UserError(
                "the model came without a tokenizer: say which token means silence, silence_id=..."
            )
        if mesh is not None:
            _check_mesh(model, sessions, mesh)
        silence = -1 if self.silence_id is None else self.silence_id
        self._program = decode_program(
            model.config, model.streams, sessions, window, mesh, cache_dtype, all_logits, silence
        )
        cache = (
            f"{cache_dtype}, {'in panels' if 'panel' in self._program.layout.keys else 'rows last'}"
        )
        self._kind = (model.config, model.streams, window, cache, silence, self._program.streams)
        self._weights, self._state = self._program.prepare(model.parameters), self._program.empty()
        devices = jax.tree.leaves(self._weights)[0].devices()
        if mesh is None and len(devices) == 1:
            # Both bound to the device from the beginning. Weights of a checkpoint are, and so is what is computed with
            # them: after the first row everything would be compiled once more, for a state that is bound.
            self._weights, self._state = jax.device_put((self._weights, self._state), *devices)
        self._slots: list[Session | None] = [None] * sessions
        cells = (sessions, self._program.streams)

        def per_cell(value, dtype):
            return np.full(cells, value, dtype)

        sampling = Sampling(
            per_cell(0, np.float32), per_cell(0, np.int32), per_cell(1, np.float32), per_cell(False, bool),
            per_cell(0, np.float32), per_cell(0, np.float32),
        )  # fmt: skip
        self._controls = Controls(
            sampling,
            per_cell(0, np.float32),
            np.zeros(sessions, np.uint32),
            np.zeros(sessions, np.int32),
        )
        self._placed_controls: Controls | None = None
        self._waiting: dict[Session, asyncio.Future] = {}
        self._driver: asyncio.Task | None = None

    @property
    def free(self) -> int:
        """Sessions that can still be opened."""
        return self._slots.count(None)

    def open(
        self,
        options: DecodeOptions = DecodeOptions(),
        *,
        prefill: np.ndarray | None = None,
        present: np.ndarray | None = None,
        keep: int = 0,
        stop: Stop = Stop(),
        allowed: Mapping[str, Sequence[int]] | None = None,
    ) -> Session:
        """A new session.

        Args:
          prefill, present: rows [P, S] that come first, read in one pass, and which of their cells are not absent.
            Without them the first row is silence, and what is fed or forced before it is asked for.
          keep: rows at the beginning that never fall out of the window.
          allowed: per stream the tokens that the model may choose; streams not named: all.

        Raises UserError where there is no room, for the session or for its prefill.
        """
        slot = self._take_slot()
        if not 0 <= keep < self.window - 1:
            raise UserError(
                f"keep is {keep}: must leave at least two of the window's {self.window} rows"
            )
        script = Script(self.model, self.silence_id, options, stop, keep, self.window)
        if prefill is not None:
            prefill, present = self._checked_prefill(prefill, present)
            script.prefill(prefill, present)
        for stream, tokens in (allowed or {}).items():
            script.allow(stream, tokens)
        self._state = self._program.clear(self._state, np.int32(slot))
        if prefill is not None and len(prefill) > 1:
            self._read(slot, prefill[:-1], present[:-1])
        session = self._adopt(slot, script)
        if script.allowed:
            self._allow(session)
        return session

    def step(self, sessions: Sequence[Session] | None = None) -> list[Row]:
        """The next row of each of the sessions (None: of all that are open), all in one step on the device."""
        return self._collect(self._dispatch(self._chosen(sessions)))

    def run(self, rows: int, sessions: Sequence[Session] | None = None) -> list[list[Row]]:
        """The next `rows` rows of each session, without coming back to the host in between.

        Conditions to stop end nothing here, and rows come without logits. Raises UserError.
        """
        if rows < 1:
            raise UserError(f"rows is {rows}: must be at least 1")
        sessions = self._chosen(sessions)
        shown = {session: [session._script.first()] for session in sessions if not session.rows}
        shown = {session: shown.get(session, []) for session in sessions}
        while any(len(done) < rows for done in shown.values()):
            wanted = {
                session: min(RUN_ROWS, rows - len(done))
                for session, done in shown.items()
                if len(done) < rows
            }
            for session, new in self._run(wanted).items():
                shown[session] += new
        return list(shown.values())

    def warm_up(self) -> None:
        """Compiles all that sessions can ask for, so that nothing is compiled while they run. Needs a free slot."""
        session = self.open(allowed={name: [0] for name in self.streams.names})
        session.force(self.streams.names[0], [0])
        session.run(3), session.step()
        slot, length = np.int32(session._slot), 1
        while length < 2 * self.window:
            table = np.zeros((min(length, self.window), self.streams.size), np.int32)
            self._read(slot, table, table > 0)
            length *= 2
        self._state = self._program.copy(self._state, slot, slot)
        snapshot = session.snapshot()
        session.close()
        self.restore(snapshot).close()

    def restore(self, snapshot: Snapshot) -> Session:
        """A session that goes on from a snapshot, also of another engine with the same model, window and cache."""
        if snapshot.kind != self._kind:
            ours, theirs = self._kind[2:4], snapshot.kind[2:4]
            raise UserError(
                f"the snapshot is of an engine with another model, window or cache (window and cache {theirs}, here "
                f"{ours}): restore it in an engine with the same"
            )
        slot = self._take_slot()
        self._state = self._program.put(self._state, np.int32(slot), snapshot.state)
        return self._adopt(slot, snapshot.script.copy())

    def _adopt(self, slot: int, script: Script) -> Session:
        session = self._slots[slot] = Session(self, slot, script)
        self._controls.kept[slot] = script.kept
        self._steer(session)
        return session

    def _steer(self, session: Session) -> None:
        """Puts a session's options where the next step finds them."""
        slot, size, options = session._slot, self.streams.size, session._script.options
        arrays = per_stream(options, self.streams)
        for name, array in self._controls.sampling._asdict().items():
            array[slot, :size] = arrays[name]
        self._controls.presence_penalty[slot, :size] = arrays["presence_penalty"]
        self._controls.seed[slot] = options.seed % (1 << 32)
        self._placed_controls = None

    def _allow(self, session: Session) -> None:
        mask = np.ones((self._program.streams, self.model.config.vocab_size), bool)
        for stream, tokens in session._script.allowed.items():
            mask[stream] = False
            mask[stream, tokens] = True
        self._state = self._program.allow(self._state, np.int32(session._slot), mask)

    def _take_slot(self) -> int:
        if None not in self._slots:
            raise UserError(
                f"all {len(self._slots)} sessions are open: close one, or make the engine with more"
            )
        return self._slots.index(None)

    def _checked_prefill(self, tokens, present) -> tuple[np.ndarray, np.ndarray]:
        tokens, size = np.asarray(tokens), self.streams.size
        if tokens.ndim != 2 or tokens.shape[1] != size or not len(tokens):
            raise UserError(
                f"the prefill has shape {tokens.shape}: must be [rows, {size}], with at least one row"
            )
        if len(tokens) > self.window:
            raise UserError(
                f"the prefill has {len(tokens)} rows and the window {self.window}: make it larger"
            )
        present = np.array(
            np.broadcast_to(True if present is None else present, tokens.shape), bool
        )
        check_tokens("the prefill", tokens[present], self.model.config.vocab_size)
        return np.where(present, tokens, 0).astype(np.int32), present

    def _read(self, slot: int, tokens: np.ndarray, present: np.ndarray) -> None:
        """Rows [P, S] into an empty slot, filled up to a power of two: few lengths, few programs."""
        rows = len(tokens)
        length = min(1 << (rows - 1).bit_length(), self.window)
        fill = ((0, length - rows), (0, self._program.streams - self.streams.size))
        table = (np.pad(x, fill)[None] for x in (tokens, present))
        self._state = self._program.read(
            self._weights, self._state, np.int32(slot), *table, np.int32(rows)
        )

    def _chosen(self, sessions: Sequence[Session] | None) -> list[Session]:
        chosen = (
            [session for session in self._slots if session] if sessions is None else list(sessions)
        )
        for session in chosen:
            if session.closed or session._engine is not self:
                raise UserError(
                    "a session is closed, or another engine's: open one with engine.open()"
                )
            if session._in_flight:
                raise UserError(
                    "a session's next row is on its way already: await it before asking for another"
                )
        if len(set(chosen)) < len(chosen):
            raise UserError("a session is named twice: name each once")
        return chosen

    def _feed(self, *rows: int) -> Feed:
        """Empty arrays for one row, or for many."""
        sessions, cells = (
            (*rows, len(self._slots)),
            (*rows, len(self._slots), self._program.streams),
        )
        return Feed(
            np.zeros(sessions, bool), np.zeros(sessions, np.int32), np.zeros(cells, np.int32), np.zeros(cells, bool),
            np.zeros(cells, np.int32), np.zeros(cells, np.float32),
        )  # fmt: skip

    def _dispatch(self, sessions: Sequence[Session]) -> _Flight:
        """Starts the next row of each session."""
        first = {session: session._script.first() for session in sessions if not session.rows}
        flight = _Flight(sessions, first, {}, None)
        if len(first) == len(sessions):
            return flight
        feed, size = self._feed(), self.streams.size
        for session in sessions:
            if session in first:
                continue
            slot, script = session._slot, session._script
            feed.active[slot], feed.row[slot] = True, script.rows - 1
            feed.read[slot, :size], feed.read_present[slot, :size] = script.read()
            feed.given[slot, :size], flight.present[session] = script.given()
            feed.penalty[slot, :size] = script.penalty(script.rows)
            session._in_flight = True
        self._state, *out = self._program.advance(
            self._weights, self._state, self._device_controls(), feed
        )
        return flight._replace(out=out)

    def _collect(self, flight: _Flight) -> list[Row]:
        """The rows of `_dispatch`, in the order of its sessions."""
        if flight.out is not None:
            packed, logits = flight.out
            chosen, logits = (
                unpacked(np.asarray(packed)),
                None if logits is None else np.asarray(logits),
            )
        rows, size = [], self.streams.size
        for session in flight.sessions:
            if session in flight.first:
                rows.append(flight.first[session])
                continue
            session._in_flight = False
            cells = (x[session._slot, :size] for x in chosen)
            here = None if logits is None else logits[session._slot, :size]
            tokens, *measured = cells
            rows.append(session._script.show(tokens, flight.present[session], *measured, here))
        return rows

    def _run(self, wanted: Mapping[Session, int]) -> dict[Session, list[Row]]:
        feeds, size = self._feed(RUN_ROWS), self.streams.size
        feeds.read[1:] = FREE
        present = {}
        for session, rows in wanted.items():
            slot, script = session._slot, session._script
            feeds.read[0, slot, :size], here = script.read()
            present[session] = [here]
            for i in range(rows):
                feeds.active[i, slot], feeds.row[i, slot] = True, script.rows - 1 + i
                feeds.read_present[i, slot, :size] = here
                feeds.given[i, slot, :size], here = script.given(script.rows + i, here)
                feeds.penalty[i, slot, :size] = script.penalty(script.rows + i)
                present[session].append(here)
        most = np.int32(max(wanted.values()))
        self._state, packed = self._program.run(
            self._weights, self._state, self._device_controls(), feeds, most
        )
        chosen = unpacked(np.asarray(packed))

        def rows_of(session, i):
            return [x[i, session._slot, :size] for x in chosen]

        return {
            session: [
                session._script.show(*_row(rows_of(session, i), present[session][i + 1]))
                for i in range(rows)
            ]
            for session, rows in wanted.items()
        }

    def _device_controls(self) -> Controls:
        """The controls on the device: they change seldom."""
        if self._placed_controls is None:
            # A copy: on a CPU the device would read the arrays that the next change writes.
            self._placed_controls = jax.device_put(jax.tree.map(np.copy, self._controls))
        return self._placed_controls

    async def _next(self, session: Session) -> Row:
        """The session's next row, together with those of all sessions whose rows are awaited at that time."""
        self._chosen([session])
        if session in self._waiting:
            raise UserError(
                "a session's next row is on its way already: await it before asking for another"
            )
        loop = asyncio.get_running_loop()
        future = self._waiting[session] = loop.create_future()
        if self._driver is None or self._driver.done():
            self._driver = loop.create_task(self._drive())
        return await future

    async def _drive(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # whoever is ready to ask may do so
            waiting, self._waiting = self._waiting, {}
            waiting = {session: future for session, future in waiting.items() if not session.closed}
            try:
                flight = self._dispatch(list(waiting))
                await asyncio.to_thread(jax.block_until_ready, flight.out)
                rows = self._collect(flight)
            except Exception as error:  # whoever awaits it gets it
                for future in waiting.values():
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, row in zip(waiting.values(), rows):
                if not future.done():
                    future.set_result(row)


class Session:
    """One conversation in an engine; from `engine.open`. Iterate over it, or call `step`."""

    def __init__(self, engine: Engine, slot: int, script: Script):
        self._engine, self._slot, self._script = engine, slot, script
        self._in_flight = False
        self.closed = False

    @property
    def options(self) -> DecodeOptions:
        """May be set at any time; holds from the next row on."""
        return self._script.options

    @options.setter
    def options(self, options: DecodeOptions) -> None:
        self._open()._script.set_options(options)
        self._engine._steer(self)

    @property
    def rows(self) -> int:
        """Rows so far, read and shown."""
        return self._script.rows

    @property
    def finished(self) -> str | None:
        """Which condition to stop the last row met; None: none of them."""
        return self._script.finished

    def feed(self, stream: str | int, tokens: Sequence[int] | str) -> None:
        """Appends tokens, or a text, to what an input stream will say, one a row, from the next row that is read.

        That is the row shown last, which the model has not read yet, unless its cell holds something that was fed.
        """
        self._open()._script.feed(stream, tokens)

    def force(self, stream: str | int, tokens: Sequence[int] | str) -> None:
        """Appends tokens (FREE: the model's choice) to what a stream of any kind must say, from the next row shown."""
        self._open()._script.force(stream, tokens)

    def allow(self, stream: str | int, tokens: Sequence[int] | str | None) -> None:
        """The tokens that the model may choose for a stream from the next row on; None: all."""
        self._open()._script.allow(stream, tokens)
        self._engine._allow(self)

    def step(self) -> Row:
        """The next row of this session alone; `engine.step` advances many for the same price."""
        return self._engine.step([self])[0]

    async def next(self) -> Row:
        """As `step`, while others run: rows that are awaited at the same time are one step on the device."""
        return await self._engine._next(self)

    def run(self, rows: int) -> list[Row]:
        """The next `rows` rows, in as few calls to the device as can be."""
        return self._engine.run(rows, [self])[0]

    def __iter__(self) -> Iterator[Row]:
        while self.finished is None:
            yield self.step()

    async def __aiter__(self) -> AsyncIterator[Row]:
        """As iteration, with `next`."""
        while self.finished is None:
            yield await self.next()

    @property
    def waiting(self) -> dict[str, int]:
        """{input stream: tokens that it was fed and has not said yet}."""
        return self._script.waiting()

    def transcript(self, last: int | None = None) -> Transcript:
        """The rows that are in the window, or the last of them, as the model reads them."""
        return self._script.transcript(last)

    def fork(self, seed: int | None = None) -> Session:
        """Another session of this engine that goes on from here: as this one would, or with another seed. UserError."""
        engine, slot = self._open()._engine, self._engine._take_slot()
        engine._chosen([self])
        engine._state = engine._program.copy(engine._state, np.int32(self._slot), np.int32(slot))
        session = engine._adopt(slot, self._script.copy())
        if seed is not None:
            session.options = dataclasses.replace(self.options, seed=seed)
        return session

    def snapshot(self) -> Snapshot:
        """All of the session, on the host; `engine.restore` goes on from it."""
        engine = self._open()._engine
        engine._chosen([self])
        state = jax.device_get(engine._program.take(engine._state, np.int32(self._slot)))
        return Snapshot(engine._kind, self._script.copy(), state)

    def close(self) -> None:
        """Gives its place to another session."""
        if not self.closed:
            self._engine._slots[self._slot], self.closed = None, True

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _open(self) -> Session:
        if self.closed:
            raise UserError("the session is closed: open another with engine.open()")
        return self


class Snapshot(NamedTuple):
    """A session on the host."""

    kind: tuple  # of the engine: model, window, cache
    script: Script
    state: Any  # State of one session, numpy arrays


class _Flight(NamedTuple):
    """A step that the device is busy with."""

    sessions: Sequence[Session]
    first: Mapping[Session, Row]  # rows that need no device
    present: dict[Session, np.ndarray]
    out: Any  # (packed Chosen, logits); None: nothing to do


class Generated(NamedTuple):
    """All rows of a run of several tables, the prefill first."""

    shown: np.ndarray  # [B, R, S] int32, as they were shown
    read: (
        np.ndarray
    )  # [B, R, S] int32, as the model read them: with tokens fed after a row was shown
    present: np.ndarray  # [B, R, S] bool
    logits: list[np.ndarray]  # per row that was chosen: [B, S, V]; empty unless asked for


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
    """Generates `rows` rows of several tables in step.

    Args:
      prefill, present: rows [B, P, S] (or [P, S]) that come first, and which of their cells are not absent. Without them
        the first row is silence.
      forced: [rows, S] or [B, rows, S] int32: tokens known beforehand, of any stream; FREE elsewhere.
      fed: (row, stream, token), in the order of rows: input that arrives after the row (of the table) was shown.
      silent_rows_to_stop: stop after so many successive rows that are silent in all streams of all tables; 0: never.
      batch: tables, if there is no prefill. Each draws with a seed of its own, made from that of the options.
      silence_id: needed if the model came without a tokenizer.
    """
    size, start = model.streams.size, 0
    if prefill is not None:
        prefill = np.asarray(prefill)
        prefill = prefill[None] if prefill.ndim == 2 else prefill
        if prefill.ndim != 3:
            shape = f"[tables, rows, {size}]"
            raise UserError(
                f"the prefill has shape {prefill.shape}: must be {shape}, or that of one table"
            )
        present = None if present is None else np.broadcast_to(present, prefill.shape)
        batch, start = prefill.shape[:2]
    if forced is not None:
        forced = np.asarray(forced)
        if forced.shape not in ((rows, size), (batch, rows, size)):
            raise UserError(
                f"forced has shape {forced.shape}: must be [{rows}, {size}], or that of each table"
            )
        forced = np.broadcast_to(forced, (batch, rows, size))
    window = max(start + rows, 2)
    engine = Engine(
        model, sessions=batch, window=window, all_logits=keep_logits, silence_id=silence_id
    )
    sessions = []
    for b in range(batch):
        seed = int(np.random.SeedSequence((options.seed % (1 << 32), b)).generate_state(1)[0])
        first = (
            {}
            if prefill is None
            else {"prefill": prefill[b], "present": None if present is None else present[b]}
        )
        sessions.append(engine.open(dataclasses.replace(options, seed=seed), **first))
        for s in range(size if forced is not None else 0):
            sessions[b].force(s, forced[b, :, s])
    shown, logits = [np.array([session.transcript().tokens for session in sessions])], []
    if not (fed or silent_rows_to_stop or keep_logits):
        tables = engine.run(rows, sessions)
        shown.append(np.array([[row.tokens for row in table] for table in tables]))
    else:
        for number in range(rows):
            last = engine.step(sessions)
            shown.append(np.array([[row.tokens] for row in last]))
            if last[0].logits is not None:
                logits.append(np.array([row.logits for row in last]))
            for _, stream, token in (item for item in fed if item[0] == start + number):
                for session in sessions:
                    session.feed(stream, [token])
            if silent_rows_to_stop and all(
                s._script.silent_rows >= silent_rows_to_stop for s in sessions
            ):
                break
    read = [session.transcript() for session in sessions]
    return Generated(
        np.concatenate(shown, axis=1),
        np.array([t.tokens for t in read]),
        np.array([t.present for t in read]),
        logits,
    )


def _row(cells: Sequence[np.ndarray], present: np.ndarray):
    """Arguments of `Script.show`."""
    tokens, logprob, entropy = cells
    return tokens, present, logprob, entropy, None


def _check_mesh(model: LoadedModel, sessions: int, mesh: Mesh) -> None:
    """Raises UserError when an axis of the mesh does not divide what lies along it."""
    config = model.config
    lengths = {
        "batch": (sessions, "sessions"),
        "heads": (config.num_heads, "model.num_heads"),
        "kv_heads": (config.num_kv_heads, "model.num_kv_heads"),
        "mlp": (config.d_ff, "model.d_ff"),
        "embed": (config.d_model, "model.d_model"),
        "vocab": (config.vocab_size, "model.vocab_size"),
    }
    check_lengths(lengths, mesh)
