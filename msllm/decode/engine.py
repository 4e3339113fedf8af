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
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from msllm.config import ModelConfig
from msllm.decode.cache import DTYPES
from msllm.decode.program import NOWHERE, RUN_ROWS, Controls, RowInputs, State, decode_program
from msllm.decode.sampling import FREE, Sampled, Sampling
from msllm.decode.script import (
    DecodeOptions,
    Plan,
    Row,
    Script,
    Stop,
    Transcript,
    check_number,
    check_tokens,
    per_stream,
)
from msllm.errors import RunError, UserError
from msllm.mail import deliver_to_prefill
from msllm.runtime.interrupts import deferred_signals
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

log = logging.getLogger("msllm")

_ROW_PENDING = "a session's next row is already being computed: await it before you ask for another"


class Engine:
    """Runs up to `sessions` sessions of one model on a device or a mesh. Use it from one thread.

    The compiled functions donate the state of all sessions, so the engine would lose it if an
    interrupt fell between a call and the assignment of its result. Such statements run in
    `_transaction`, which delays signals. A step is done once its plans are committed: whoever next
    uses one of its sessions collects its rows. Before that, nothing has changed.
    """

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
        check_number("sessions", sessions, int, "[1, 2147483648)")
        check_number("window", window, int, f"[2, {NOWHERE}]")
        cache_dtype = cache_dtype or model.config.compute_dtype
        if cache_dtype not in DTYPES:
            raise UserError(f"cache_dtype is {cache_dtype!r}: must be one of {', '.join(DTYPES)}")
        if mesh is not None:
            _check_mesh(model.config, sessions, mesh)
        self.model, self.streams, self.window = model, model.streams, window
        streams = model.streams
        needed = "input" in streams.kinds or any(streams.delays)
        needed |= streams.skip_silence or bool(streams.passing)
        self.silence_id = model.silence_token(silence_id, needed)

        silence = -1 if self.silence_id is None else self.silence_id
        self._program = decode_program(
            model.config,
            # Without the rules, so that engines with other rules share the compiled functions.
            dataclasses.replace(model.streams, mail=()),
            sessions,
            window,
            mesh,
            cache_dtype,
            all_logits,
            silence,
            _decodable(model),
            has_mail=bool(model.streams.mail),
        )
        self._cache_dtype = cache_dtype
        self._weights = self._program.prepare(model.parameters)
        devices = jax.tree.leaves(self._weights)[0].devices()
        # Commit weights and state to the device from the start. The weights of a checkpoint are
        # committed, so the state would be committed after the first row, and every function would
        # be compiled again for it.
        self._device = next(iter(devices)) if mesh is None and len(devices) == 1 else None
        if self._device:
            self._weights = jax.device_put(self._weights, self._device)
        self._state = self._empty_state()

        self._slots: list[Session | None] = [None] * sessions
        self._controls = _neutral_controls(sessions, self._program.streams)
        self._device_controls: Controls | None = None  # a copy of `_controls`; None: outdated
        # The event loop in which rows are awaited, the calls of `Session.next` that wait there, and
        # the task that computes their rows.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[Session, asyncio.Future[None]] = {}
        self._driver: asyncio.Task | None = None

    @property
    def free(self) -> int:
        """The number of sessions that can still be opened."""
        return self._slots.count(None)

    @property
    def sessions(self) -> list[Session]:
        """The open sessions."""
        return [session for session in self._slots if session]

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
          prefill: the first rows [P, S], read in one pass. Its silent cells get their mail. None:
            the first row holds the tokens that are fed or forced before the first step, and silence
            elsewhere.
          present: [P, S] bool, which cells of the prefill are not absent; None: all.
          keep: the number of first rows that never fall out of the window.
          stop: when iteration ends; None: never.
          allowed: {stream: tokens that the model may sample}. Other streams may sample all tokens.

        Raises UserError if there is no room for the session or its prefill.
        """
        options, stop = _default(options, DecodeOptions), _default(stop, Stop)
        check_number("keep", keep, int, "[0, 2147483648)")
        if keep >= self.window - 1:
            raise UserError(
                f"keep is {keep}: must be at least 0 and leave two of the window's {self.window}"
                " rows"
            )
        script = Script(self.model, self.silence_id, options, stop, keep, self.window)
        if prefill is not None:
            prefill, present = self._checked_prefill(prefill, present)
            script.prefill(prefill, present)
        for stream, tokens in (allowed or {}).items():
            script.allow(stream, tokens)

        def fill(slot: int) -> None:
            self._state = self._program.clear(self._state, np.int32(slot))
            if prefill is not None and present is not None and len(prefill) > 1:
                self._read(slot, prefill[:-1], present[:-1])
            if script.allowed:
                self._set_allowed(slot, script)

        return self._add_session(script, fill)

    def step(self, sessions: Sequence[Session] | None = None) -> list[Row]:
        """Computes the next row of each session in one step on the device.

        If the call is interrupted, or if one of the sessions cannot go on, the next call returns
        the rows that were computed. An error of `Stop.when` is not raised here: the session holds
        it (`Session.error`), and `Session.finished` names it.

        `sessions` is None for all open sessions. Raises UserError.
        """
        sessions = self._checked_sessions(sessions)
        errors = self._advance(sessions)
        if errors:
            raise next(iter(errors.values()))
        for session in sessions:
            session._log_error()
        return [session._take_row() for session in sessions]

    async def advance(self, sessions: Sequence[Session]) -> dict[Session, Row | Exception]:
        """Computes the next row of each session in one step, while the event loop goes on.

        Other tasks may feed and force tokens meanwhile. They must not call anything else of these
        sessions before the step is done. If the call is cancelled, the next one returns the rows.

        Returns:
          {session: its row, or why it has none}. An error concerns its session alone.

        Raises UserError if a session cannot advance now, and RunError if the device failed.
        """
        sessions = self._checked_sessions(sessions)
        self._enter_loop()
        errors: dict[Session, Exception] = {}
        await self._fly([session for session in sessions if not session._row], errors)
        result: dict[Session, Row | Exception] = {}
        for session in sessions:
            if session._row:
                session._judge(session._row)
                session._log_error()
                result[session] = session._take_row()
            else:
                result[session] = errors.get(session) or UserError(session._why_closed)
        return result

    def run(self, rows: int, sessions: Sequence[Session] | None = None) -> list[list[Row]]:
        """Computes the next `rows` rows of each session without returning to the host in between.

        One call to the device computes up to 32 rows. Stop conditions are ignored, and the rows
        have no logits. If the call is interrupted, the sessions keep the rows computed so far
        (`Session.transcript`). Raises UserError.
        """
        check_number("rows", rows, int, "[1, 2147483648)")
        sessions = self._checked_sessions(sessions)
        # Rows that no call has returned yet, and first rows, which the device does not compute.
        errors = self._advance([session for session in sessions if not session.rows])
        shown: dict[Session, list[Row]] = {
            session: [session._take_row()] if session._row else []
            for session in sessions
            if session not in errors
        }
        while True:
            missing = {session: rows - len(old) for session, old in shown.items()}
            wanted = {session: min(RUN_ROWS, count) for session, count in missing.items() if count}
            if not wanted:
                break
            flight = self._dispatch_run(wanted)
            for session, error in flight.errors.items():
                errors[session] = error
                del shown[session]
            self._collect(flight)
            for session, new in flight.rows.items():
                shown[session] += new
        if errors:
            raise next(iter(errors.values()))
        return list(shown.values())

    def warm_up(self) -> None:
        """Compiles every function that sessions use. Needs a free slot."""
        with self.open(allowed={name: [0] for name in self.streams.names}) as session:
            session.force(self.streams.names[0], [0])
            session.run(3)
            session.step()
            slot, length = np.int32(session._slot), 1
            while length < 2 * self.window:
                table = np.zeros((min(length, self.window), self.streams.size), np.int32)
                with self._transaction():
                    self._read(session._slot, table, table > 0)
                length *= 2
            with self._transaction():
                self._state = self._program.copy(self._state, slot, slot)
            snapshot = session.snapshot()
        self.restore(snapshot).close()

    def restore(self, snapshot: Snapshot) -> Session:
        """Opens a session that continues from a snapshot.

        The snapshot may come from another engine with the same model, window and cache. Raises
        UserError if they differ, or if no slot is free.
        """
        if differences := snapshot.kind.differences(self._kind):
            raise UserError(
                "the snapshot is from an engine with another model, window or cache"
                f" ({'; '.join(differences)}): restore it in an engine with the same ones"
            )

        def fill(slot: int) -> None:
            self._state = self._program.put(self._state, np.int32(slot), snapshot.state)

        return self._add_session(snapshot.script.copy(), fill)

    @functools.cached_property
    def _kind(self) -> _Kind:
        from msllm.checkpoint import checksums  # imports orbax, which is slow

        model = self.model
        layout = "in panels" if self._program.layout.in_panels else "rows last"
        return _Kind(
            model.config,
            model.streams,
            checksums({"parameters": model.parameters})["parameters"],
            model.tokenizer.hash[:12] if model.tokenizer else None,
            self.window,
            f"{self._cache_dtype}, {layout}",
            self.silence_id,
            self._program.streams,
        )

    def _empty_state(self) -> State:
        state = self._program.empty()
        return jax.device_put(state, self._device) if self._device else state

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """A block that replaces the state. No signal handler runs inside it.

        If the block fails after the state was donated, the sessions are lost, and the engine goes
        on with an empty state.
        """
        with deferred_signals():
            try:
                yield
            except BaseException as error:
                self._recover(error)
                raise

    def _recover(self, error: BaseException) -> None:
        """Closes all sessions if their state is lost. Raises RunError from `error` if it is."""
        try:
            deleted = any(leaf.is_deleted() for leaf in jax.tree.leaves(self._state))
            if not deleted:
                jax.block_until_ready(self._state)  # raises if computing the state has failed
                return
        except Exception:  # the devices' errors have several types
            pass
        cause = f"{type(error).__name__}: {error}".split("\n")[0]
        lost = self.sessions
        for session in lost:
            session._close_because(
                f"the session is lost, because the device failed ({cause}): open another with"
                " engine.open(), or restore a snapshot"
            )
        self._state = self._empty_state()
        if isinstance(error, Exception):
            raise RunError(
                f"the device failed ({cause}), and the {len(lost)} open sessions are lost: open"
                " others, or restore snapshots"
            ) from error

    def _add_session(self, script: Script, fill: Callable[[int], None]) -> Session:
        """Opens a session in a free slot, whose state `fill(slot)` sets. Raises UserError."""
        slot = self._free_slot()
        try:
            with self._transaction():
                fill(slot)
                session = Session(self, slot, script)
                self._controls.keep[slot] = script.keep
                self._set_options(session)
                self._slots[slot] = session
        except BaseException:  # also an interrupt at the end of the transaction
            self._slots[slot] = None
            raise
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

    def _set_allowed(self, slot: int, script: Script) -> None:
        mask = np.ones((self._program.streams, self.model.config.vocab_size), bool)
        mask[:, self._program.decodable :] = False
        for stream, tokens in script.allowed.items():
            mask[stream] = False
            mask[stream, tokens] = True
        self._state = self._program.allow(self._state, np.int32(slot), mask)

    def _free_slot(self) -> int:
        if None not in self._slots:
            raise UserError(
                f"all {len(self._slots)} sessions are open: close one (engine.sessions lists them),"
                " or make an engine with more"
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
            try:
                mask[:] = present
            except ValueError as error:
                raise UserError(
                    f"present has shape {np.shape(present)}: must be that of the prefill,"
                    f" {list(tokens.shape)}"
                ) from error
        check_tokens("the prefill", tokens[mask], self.model.config.vocab_size)
        tokens = np.where(mask, tokens, 0).astype(np.int32)
        deliver_to_prefill(tokens, mask, self.streams.mail, self.silence_id)
        return tokens, mask

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
        """The sessions to advance; None: all open ones. Collects rows of interrupted calls.

        Raises UserError.
        """
        sessions = self.sessions if sessions is None else list(sessions)
        for session in sessions:
            self._check_own(session)
        if len(set(sessions)) < len(sessions):
            raise UserError("a session is named twice: name each session once")
        for session in sessions:
            if session._flight:
                self._collect(session._flight)
            if session._row:
                session._judge(session._row)
        return sessions

    def _check_own(self, session: Session) -> None:
        """Raises UserError if a session cannot advance now."""
        if session._engine is not self:
            raise UserError("a session belongs to another engine: open one with engine.open()")
        session._require_open()
        future = self._waiting.get(session)
        if future and not future.done() and self._loop and self._loop.is_running():
            raise UserError(_ROW_PENDING)

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

    def _advance(self, sessions: Sequence[Session]) -> dict[Session, Exception]:
        """Ensures that each session has a row to return. Returns the errors of those without."""
        missing = [session for session in sessions if not session._row]
        if not missing:
            return {}
        flight = self._dispatch(missing)
        self._collect(flight)
        for session in missing:
            if session._row:
                session._judge(session._row)
        return flight.errors

    def _dispatch(self, sessions: Sequence[Session]) -> _Flight:
        """Starts the next row of each session."""
        flight = self._plan(dict.fromkeys(sessions, 1))
        inputs, size = self._empty_inputs(), self.streams.size
        on_device = False  # the device does not compute a session's first row
        for session, plan in flight.plans.items():
            if not session.rows:
                continue
            slot, on_device = session._slot, True
            inputs.active[slot], inputs.row[slot] = True, session.rows - 1
            inputs.read[slot, :size] = plan.read
            inputs.read_present[slot, :size] = plan.read_present
            inputs.given[slot, :size] = plan.given[0]
            inputs.penalty[slot, :size] = plan.penalty[0]
        if on_device:
            self._launch(flight, self._program.advance, inputs)
        else:
            self._launch(flight)
        return flight

    def _dispatch_run(self, wanted: Mapping[Session, int]) -> _Flight:
        """Starts up to RUN_ROWS next rows of each session, in one call to the device.

        Args:
          wanted: {session: number of rows}. Each session has a row already.
        """
        flight = self._plan(wanted)
        flight.is_run = True
        inputs, size = self._empty_inputs(RUN_ROWS), self.streams.size
        inputs.read[1:] = FREE
        mail = np.full_like(inputs.given, FREE) if self.streams.mail else None
        for session, plan in flight.plans.items():
            slot, count = session._slot, len(plan.given)
            inputs.active[:count, slot] = True
            inputs.row[:count, slot] = session.rows - 1 + np.arange(count)
            inputs.read[0, slot, :size] = plan.read
            inputs.read_present[:count, slot, :size] = [plan.read_present, *plan.present[:-1]]
            inputs.given[:count, slot, :size] = plan.given
            inputs.penalty[:count, slot, :size] = plan.penalty
            if mail is not None:
                mail[:count, slot, :size] = plan.mail
        if flight.plans:
            most = max(len(plan.given) for plan in flight.plans.values())
            inputs = inputs._replace(mail=mail)
            self._launch(flight, self._program.run, inputs, np.int32(most))
        return flight

    def _plan(self, wanted: Mapping[Session, int]) -> _Flight:
        """Plans rows of each session. Changes nothing.

        Args:
          wanted: {session: number of rows}.
        """
        flight = _Flight()
        for session, count in wanted.items():
            try:
                flight.plans[session] = session._script.plan(count)
            except Exception as error:  # it concerns this session alone
                flight.errors[session] = error
        return flight

    def _launch(self, flight: _Flight, function: Callable | None = None, *arguments: Any) -> None:
        """Starts a planned step. From here on it is done, although its rows are not known yet.

        Args:
          function: `advance` or `run` of the program; None: nothing is left to compute.
          arguments: those after the controls.
        """
        controls = self._placed_controls() if function else None
        with self._transaction():
            if function:
                self._state, *flight.out = function(
                    self._weights, self._state, controls, *arguments
                )
            for session, plan in flight.plans.items():
                session._script.commit(plan)
                session._flight = flight

    def _collect(self, flight: _Flight) -> None:
        """Waits for a step and shows its rows to their sessions, unless that has happened."""
        if flight.collected:
            return
        sampled = logits = None
        if flight.out:
            try:
                sampled = Sampled.unpacked(np.asarray(flight.out[0]))
                logits = None if flight.is_run else flight.out[1]
                logits = None if logits is None else np.asarray(logits)
            except Exception as error:  # the devices' errors have several types
                with deferred_signals():
                    self._recover(error)
                raise
        with deferred_signals():
            flight.collected = True
            for session, plan in flight.plans.items():
                session._flight = None
                if session.closed:
                    continue
                try:
                    flight.rows[session] = self._show(session, plan, sampled, logits)
                except Exception as error:
                    # The device is a row ahead of the host, so the session cannot go on.
                    flight.errors[session] = error
                    session._close_because(
                        f"the session is closed, because its row could not be shown"
                        f" ({type(error).__name__}: {error}): open another with engine.open()"
                    )
                    continue
                if not flight.is_run:
                    (session._row,) = flight.rows[session]
        for session, rows in flight.rows.items() if flight.is_run else ():
            for row in rows:
                session._judge(row)
            session._log_error()

    def _show(
        self, session: Session, plan: Plan, sampled: Sampled | None, logits: np.ndarray | None
    ) -> list[Row]:
        """Shows the planned rows of a session.

        Args:
          sampled: arrays [B, S], or [rows, B, S] from `run`; None: there are first rows only.
          logits: [B, S, V] or None.
        """
        script, slot, size = session._script, session._slot, self.streams.size
        if sampled is None or not script.rows:
            nothing = np.full(size, np.nan, np.float32)
            return [script.show(plan.given[0], plan.present[0], nothing, nothing)]
        tokens, logprob, entropy = (x[..., slot, :size].reshape(-1, size) for x in sampled)
        own_logits = None if logits is None else logits[slot, :size]
        for i, mail in enumerate(plan.mail):
            copies = np.flatnonzero((mail != FREE) & (mail // size == i))
            if len(copies):
                tokens, logprob, entropy = tokens.copy(), logprob.copy(), entropy.copy()
                tokens[i, copies] = tokens[i, mail[copies] % size]
                logprob[i, copies] = entropy[i, copies] = np.nan
        return [
            script.show(tokens[i], present, logprob[i], entropy[i], own_logits)
            for i, present in enumerate(plan.present)
        ]

    def _placed_controls(self) -> Controls:
        """The controls on the device. They are transferred only after a change."""
        if self._device_controls is None:
            # On a CPU the device may read the host's arrays in place. Copy them, because the next
            # change of an option writes to them.
            self._device_controls = jax.device_put(jax.tree.map(np.copy, self._controls))
        return self._device_controls

    async def _next(self, session: Session) -> Row:
        """The session's next row, computed in one step with all other rows awaited by then."""
        self._check_own(session)
        loop = self._enter_loop()
        while not session._row:
            session._require_open()
            future = self._waiting[session] = loop.create_future()
            try:
                if self._driver is None or self._driver.done():
                    self._start_driver(loop)
                await future
            finally:
                # The future says that the row is there. A call that is cancelled leaves the row to
                # the next one.
                if self._waiting.get(session) is future:
                    del self._waiting[session]
        session._judge(session._row)
        session._raise_error()
        return session._take_row()

    def _enter_loop(self) -> asyncio.AbstractEventLoop:
        """The running event loop. Forgets calls that wait in a loop that has ended."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop and self._loop.is_running():
                raise UserError(
                    "rows of this engine are awaited in another event loop, in another thread: use"
                    " an engine from one thread"
                )
            for future in self._waiting.values():
                if self._loop and not self._loop.is_closed():
                    future.cancel()
            self._loop, self._waiting, self._driver = loop, {}, None
        return loop

    def _start_driver(self, loop: asyncio.AbstractEventLoop) -> None:
        def go_on(driver: asyncio.Task) -> None:
            """Starts another driver if this one was cancelled while calls wait."""
            if driver is self._driver and not all(f.done() for f in self._waiting.values()):
                self._start_driver(loop)

        self._driver = loop.create_task(self._drive())
        self._driver.add_done_callback(go_on)

    async def _drive(self) -> None:
        """Advances sessions while rows are awaited."""
        while True:
            await asyncio.sleep(0)  # let all tasks that are ready ask for their next row
            waiting = {s: future for s, future in self._waiting.items() if not future.done()}
            if not waiting:
                return
            errors: dict[Session, Exception] = {}
            try:
                await self._fly(list(waiting), errors)
            except Exception as error:  # raise it where the rows are awaited
                errors = dict.fromkeys(waiting, error) | errors
            for session, future in waiting.items():
                if future.done():
                    continue
                if session._row:
                    future.set_result(None)
                elif session in errors:
                    future.set_exception(errors[session])
                elif session.closed:
                    future.set_result(None)  # the call says that it is closed

    async def _fly(self, sessions: Sequence[Session], errors: dict[Session, Exception]) -> None:
        """Computes the next row of each session; adds to `errors` those of single sessions."""
        flights = [session._flight for session in sessions if session._flight]
        needed = [s for s in sessions if not (s._flight or s._row or s.closed)]
        if needed:
            flights.append(self._dispatch(needed))
        out = [flight.out for flight in flights]
        with contextlib.suppress(Exception):  # `_collect` raises it
            await asyncio.to_thread(jax.block_until_ready, out)
        for flight in flights:
            self._collect(flight)
            errors.update(flight.errors)


class Session:
    """One conversation in an engine, from `Engine.open`. Iterate over it, or call `step`.

    Attributes:
      error: the exception that `Stop.when` raised for the last row; None: none.
    """

    def __init__(self, engine: Engine, slot: int, script: Script):
        self._engine, self._slot, self._script = engine, slot, script
        self._flight: _Flight | None = None  # the step that computes its next rows
        self._row: Row | None = None  # the last row, while no call has returned it
        self._judged: Row | None = None  # the last row whose stop conditions were evaluated
        self.error: Exception | None = None
        self._error_to_raise: Exception | None = None
        self._why_closed = "the session is closed: open another with engine.open()"

    @property
    def closed(self) -> bool:
        """Whether the slot was given back."""
        return self._engine._slots[self._slot] is not self

    @property
    def options(self) -> DecodeOptions:
        """The options of decoding. Set them at any time; they apply from the next row on."""
        return self._script.options

    @options.setter
    def options(self, options: DecodeOptions) -> None:
        script, options = self._require_open()._script, _default(options, DecodeOptions)
        with deferred_signals():
            script.set_options(options)
            self._engine._set_options(self)

    @property
    def rows(self) -> int:
        """The number of rows so far, including the prefill."""
        return self._script.rows

    @property
    def finished(self) -> str | None:
        """The stop condition that the last row met, or the error of `Stop.when`; None: neither."""
        return self._script.finished

    def feed(self, stream: str | int, tokens: Sequence[int] | str) -> None:
        """Appends tokens or a text to the input of a stream, which holds one token per row.

        The first token goes into the next row that the model reads. That is the row shown last,
        unless its cell already holds a token that was fed. Tokens wait while the stream gets mail.
        Raises UserError.
        """
        self._require_open()._script.feed(stream, tokens)

    def force(self, stream: str | int, tokens: Sequence[int] | str) -> None:
        """Appends tokens or a text that a stream of any kind must say, from the next row on.

        FREE in place of a token lets the model sample that cell. A token replaces the mail of its
        cell. Raises UserError.
        """
        self._require_open()._script.force(stream, tokens)

    def end(self, stream: str | int) -> None:
        """Ends a stream: it is absent from the last row on, which the model has not read yet.

        The row that was shown keeps its cell. An absent cell is not seen by any other. Raises
        UserError.
        """
        self._require_open()._script.end(stream)

    def allow(self, stream: str | int, tokens: Sequence[int] | str | None) -> None:
        """Restricts a stream to these tokens from the next row on; None: all. Raises UserError."""
        script, engine = self._require_open()._script, self._engine
        before = dict(script.allowed)
        with engine._transaction():
            try:
                script.allow(stream, tokens)
                engine._set_allowed(self._slot, script)
            except BaseException:
                script.allowed = before
                raise

    def drop(self, stream: str | int | None = None) -> dict[str, list[int]]:
        """Drops the fed tokens of an input stream that wait, and returns them.

        `stream` is None for all input streams. Raises UserError if the stream is not an input.
        """
        return self._require_open()._script.drop(stream)

    def step(self) -> Row:
        """Computes the next row. `Engine.step` advances many sessions at the same cost.

        If the call is interrupted, the next call returns the row. An error of `Stop.when` is raised
        once; the next call then returns the row.
        """
        engine = self._engine
        errors = engine._advance(engine._checked_sessions([self]))
        for error in errors.values():
            raise error
        self._raise_error()
        return self._take_row()

    async def next(self) -> Row:
        """The next row. Rows of sessions that are awaited together share a step on the device.

        If the call is cancelled, the next call returns the row.
        """
        return await self._engine._next(self)

    def run(self, rows: int) -> list[Row]:
        """Computes the next `rows` rows in as few calls to the device as possible."""
        return self._engine.run(rows, [self])[0]

    def __iter__(self) -> Session:
        """Iterates over rows from `step` until a stop condition holds."""
        return self

    def __next__(self) -> Row:
        if self._row is None and self.finished is not None:
            raise StopIteration
        return self.step()

    def __aiter__(self) -> Session:
        """Iterates over rows from `next` until a stop condition holds."""
        return self

    async def __anext__(self) -> Row:
        if self._row is None and self.finished is not None:
            raise StopAsyncIteration
        return await self.next()

    @property
    def waiting(self) -> dict[str, int]:
        """{input stream: number of fed tokens that are not in a row yet}."""
        return self._script.waiting()

    @property
    def waiting_forced(self) -> dict[str, int]:
        """{stream: number of forced tokens that are not in a row yet}."""
        return self._script.waiting_forced()

    def transcript(self, last: int | None = None) -> Transcript:
        """The rows in the window, or the last `last` of them, as the model reads them."""
        return self._script.transcript(last)

    def fork(self, seed: int | None = None) -> Session:
        """Opens another session of this engine that continues from this one's last row.

        It samples the same tokens as this session, unless it gets another seed. Raises UserError if
        no slot is free.
        """
        engine, script = self._require_open()._engine, self._script
        engine._checked_sessions([self])
        script = script.copy()
        if seed is not None:
            script.set_options(dataclasses.replace(script.options, seed=seed))

        def fill(slot: int) -> None:
            source, target = np.int32(self._slot), np.int32(slot)
            engine._state = engine._program.copy(engine._state, source, target)

        return engine._add_session(script, fill)

    def _amend(self, row: Row, tokens: Mapping[int, int]) -> Row:
        """Replaces tokens of the last row, which the model has not read yet.

        Args:
          row: the last row.
          tokens: {stream: token} of present cells.

        Returns: the row with these tokens.
        """
        return self._require_open()._script.amend(row, tokens)

    def snapshot(self) -> Snapshot:
        """A copy of the session on the host, from which `Engine.restore` continues."""
        engine = self._require_open()._engine
        engine._checked_sessions([self])
        state = jax.device_get(engine._program.take(engine._state, np.int32(self._slot)))
        return Snapshot(engine._kind, self._script.copy(), state)

    def close(self) -> None:
        """Frees the slot for another session."""
        if not self.closed:
            self._engine._slots[self._slot] = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _require_open(self) -> Session:
        """This session. Raises UserError if it is closed."""
        if self.closed:
            raise UserError(self._why_closed)
        return self

    def _close_because(self, why: str) -> None:
        self._why_closed = why
        self.close()

    def _judge(self, row: Row) -> None:
        """Evaluates the stop conditions of the last row, once. Keeps an error of `Stop.when`."""
        if row is self._judged:
            return
        error = None
        try:
            finished = self._script.stop_reason(row)
        except Exception as raised:  # of a function of the user's
            error = raised
            finished = f"Stop.when raised {type(error).__name__}: {error}"
        self._script.finished = finished
        self.error = self._error_to_raise = error
        self._judged = row

    def _raise_error(self) -> None:
        """Raises the error of `Stop.when` if that has not happened."""
        error, self._error_to_raise = self._error_to_raise, None
        if error:
            raise error

    def _log_error(self) -> None:
        """Logs the error of `Stop.when`, where it is not raised."""
        error, self._error_to_raise = self._error_to_raise, None
        if error:
            log.warning("%s, at row %d of a session", self.finished, self.rows - 1)

    def _take_row(self) -> Row:
        """The row that no call has returned yet."""
        row, self._row = self._row, None
        assert row is not None
        return row


class _Kind(NamedTuple):
    """The properties of an engine that must match to restore a snapshot."""

    config: ModelConfig
    streams: StreamSpec
    weights: dict[str, int]  # the checksum of each parameter
    tokenizer: str | None  # the beginning of its hash
    window: int
    cache: str  # dtype and layout
    silence_id: int | None
    padded_streams: int

    def differences(self, other: _Kind) -> list[str]:
        """What differs in another engine, in words."""
        found = []
        for name, mine, its in zip(self._fields, self, other):
            if mine == its:
                continue
            if isinstance(mine, dict) and isinstance(its, dict):
                names = sorted(key for key in mine.keys() | its if mine.get(key) != its.get(key))
                found.append(f"the weights differ in {len(names)} arrays, such as {names[0]}")
            elif dataclasses.is_dataclass(mine) and dataclasses.is_dataclass(its):
                fields = [field.name for field in dataclasses.fields(mine)]
                values = ((f"{name}.{field}", mine, its, field) for field in fields)
                found += [
                    f"{path} is {getattr(a, field)!r} there and {getattr(b, field)!r} here"
                    for path, a, b, field in values
                    if getattr(a, field) != getattr(b, field)
                ]
            else:
                found.append(f"{name} is {mine!r} there and {its!r} here")
        return found


class Snapshot(NamedTuple):
    """A copy of a session on the host, from `Session.snapshot`."""

    kind: _Kind
    script: Script
    state: State  # NumPy arrays, with B = 1


@dataclasses.dataclass(eq=False)
class _Flight:
    """A step of several sessions, from its plans to its rows.

    Attributes:
      plans: the host's part of the rows.
      errors: why sessions have no row.
      is_run: whether it computes several rows, without logits.
      out: arrays on the device: the packed `Sampled`, and logits or None; empty: all rows are first
        rows, which the device does not compute.
      collected: whether the rows were shown.
      rows: the rows.
    """

    plans: dict[Session, Plan] = dataclasses.field(default_factory=dict)
    errors: dict[Session, Exception] = dataclasses.field(default_factory=dict)
    is_run: bool = False
    out: list[Any] = dataclasses.field(default_factory=list)
    collected: bool = False
    rows: dict[Session, list[Row]] = dataclasses.field(default_factory=dict)


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


def _default(given: Any, kind: type) -> Any:
    """`given`, or an instance of `kind` for None. Raises UserError for other types."""
    given = kind() if given is None else given
    if not isinstance(given, kind):
        raise UserError(f"{given!r} is given for {kind.__name__}: must be a msllm.{kind.__name__}")
    return given


def _decodable(model: LoadedModel) -> int:
    """The number of token ids that may be sampled: those that the tokenizer can decode."""
    size = model.config.vocab_size
    return min(size, model.tokenizer.vocab_size) if model.tokenizer else size


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
