"""Errors, interrupts and ended event loops reach one session alone, and the engine goes on."""

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import threading
import time

import jax
import numpy as np
import pytest

from msllm import tokenizer
from msllm.config import TokenizerConfig
from msllm.decode.engine import FREE, DecodeOptions, Engine, Stop
from msllm.decode.script import OPTION_RANGES, STOP_RANGES
from msllm.errors import RunError, UserError
from msllm.runtime.interrupts import deferred_signals

SILENCE = 3
SEEDS = (5, 6, 7)


@pytest.fixture
def engine(make_model):
    """An engine for three sessions. All have the same shape, so their program is compiled once."""
    return Engine(make_model(3), sessions=3, window=16, silence_id=SILENCE)


@pytest.fixture(autouse=True)
def handler_of_interrupts():
    """Ctrl-C raises KeyboardInterrupt, and the engine leaves the handler as it was."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after is signal.default_int_handler


def warm(seed=5):
    return DecodeOptions(temperature=1.5, seed=seed)


def expected_rows(engine, count, seeds=SEEDS):
    """The tokens of undisturbed sessions: {seed: [count, S]}."""
    rows = {}
    for seed in seeds:
        with engine.open(warm(seed)) as session:
            rows[seed] = np.array([row.tokens for row in session.run(count)])
    return rows


def boom_at(index):
    def when(row):
        if row.index == index:
            raise RuntimeError("callback")
        return False

    return Stop(when=when)


def interrupting(engine, monkeypatch, name):
    """Makes a function of the engine's program send SIGINT once, after it has donated the state."""
    function = getattr(engine._program, name)

    def call(*arguments):
        result = function(*arguments)
        monkeypatch.setattr(engine._program, name, function)
        signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(engine._program, name, call)


# Errors of one session


def test_error_of_a_stop_condition_stays_in_its_session(engine, caplog):
    bad, good = engine.open(warm(), stop=boom_at(2)), engine.open(warm(6))
    rows = [engine.step() for _ in range(4)]
    assert [row.index for row in rows[2]] == [2, 2]
    assert "Stop.when raised RuntimeError: callback" in caplog.text
    assert bad.rows == good.rows == 4 and bad.finished is None
    with engine.open(warm(), stop=boom_at(2)) as session:
        session.step()
        with pytest.raises(RuntimeError, match="callback"):
            for _ in session:
                pass
        assert session.finished == "Stop.when raised RuntimeError: callback"
        assert isinstance(session.error, RuntimeError)
        # Its row is not lost, and the error ends the iteration.
        assert [row.index for row in session] == [2]
        assert session.step().index == 3 and session.error is None


def test_error_of_a_stop_condition_stays_in_its_session_when_rows_are_awaited(engine):
    async def use(session):
        return [row.index async for row in session]

    async def both():
        bad = engine.open(warm(), stop=boom_at(2))
        good = engine.open(warm(6), stop=Stop(rows=5))
        return await asyncio.gather(use(bad), use(good), return_exceptions=True)

    error, rows = asyncio.run(both())
    assert isinstance(error, RuntimeError) and rows == [0, 1, 2, 3, 4]


def test_session_that_cannot_go_on_does_not_stop_the_others(make_model):
    """Without a silence token, a first row must be given."""
    model = make_model(1)
    engine = Engine(model, sessions=2, window=16)
    bad, good = engine.open(), engine.open(prefill=np.zeros((2, 1), int))
    with pytest.raises(UserError, match="must be silent"):
        engine.step()
    assert good.rows == 3 and bad.rows == 0
    bad.force(0, [4])
    assert [row.index for row in engine.step()] == [0, 2]  # the row of `good` was not lost


def test_bad_arguments_take_no_slot(engine):
    session = engine.open()
    session.step()
    snapshot = session.snapshot()
    for bad in (
        lambda: engine.open(DecodeOptions(seed=None)),
        lambda: engine.open({"seed": 1}),
        lambda: engine.open(stop=5),
        lambda: engine.open(stop=Stop(tokens={"output": [99]})),
        lambda: engine.open(keep=1.5),
        lambda: engine.open(allowed={"output": [99]}),
        lambda: engine.open(prefill=np.zeros((2, 3), int), present=np.ones((4, 4), bool)),
        lambda: session.fork(seed="x"),
        lambda: session.fork(seed=-1),
        lambda: engine.restore(snapshot._replace(kind=snapshot.kind._replace(window=99))),
        lambda: setattr(session, "options", 5),
        lambda: Engine(engine.model, silence_id=32),
        lambda: session.run("3"),
    ):
        with pytest.raises(UserError):
            bad()
        assert engine.free == 2
    assert engine.sessions == [session] and session.step().index == 1


# Interrupts


def test_interrupt_between_a_call_and_its_result(engine, monkeypatch):
    """The state is donated by then, so an interrupt there would lose it."""
    expected = expected_rows(engine, 12)
    session, other = engine.open(warm(5)), engine.open(warm(6))
    engine.step()
    interrupting(engine, monkeypatch, "advance")
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [row.index for row in engine.step()] == [1, 1]
    interrupting(engine, monkeypatch, "run")
    with pytest.raises(KeyboardInterrupt):
        session.run(3)
    assert session.step().index == 5  # the rows of `run` are in the transcript
    np.testing.assert_array_equal(session.transcript().tokens[:6, 1:], expected[5][:6, 1:])
    snapshot = session.snapshot()
    for name, act in {
        "clear": engine.open,
        "copy": session.fork,
        "put": lambda: engine.restore(snapshot),
    }.items():
        interrupting(engine, monkeypatch, name)
        with pytest.raises(KeyboardInterrupt):
            act()
        assert engine.sessions == [session, other]
    interrupting(engine, monkeypatch, "allow")
    with pytest.raises(KeyboardInterrupt):
        session.allow("output", [8])
    assert session.step().tokens[2] in (8, expected[5][6, 2])
    assert np.array_equal(other.step().tokens, expected[6][2])


def test_interrupts_at_random_moments(engine):
    """Real signals while sessions step: every row that is returned is the right one."""
    engine.warm_up()
    expected = expected_rows(engine, 300)
    rng, deadline = random.Random(0), time.monotonic() + 4
    interrupts = 0
    returned: dict[int, list] = {seed: [] for seed in SEEDS}
    sessions = {seed: engine.open(warm(seed)) for seed in SEEDS}
    first = sessions[SEEDS[0]]

    def act():
        if rng.random() < 0.5:
            for seed, row in zip(SEEDS, engine.step()):
                returned[seed].append(row)
        elif rng.random() < 0.8:
            seed = rng.choice(SEEDS)
            returned[seed].append(next(sessions[seed]))
        else:
            first.options = warm(SEEDS[0])
            first.snapshot()

    while time.monotonic() < deadline and max(s.rows for s in sessions.values()) < 290:
        kill = threading.Timer(0.02 * rng.random(), os.kill, (os.getpid(), signal.SIGINT))
        with contextlib.suppress(KeyboardInterrupt):
            try:
                kill.start()
                for _ in range(10):
                    act()
                kill.join()
                time.sleep(0.001)  # the handler runs here
            except KeyboardInterrupt:
                interrupts += 1
        kill.join()
    assert interrupts > 5
    assert engine.sessions == list(sessions.values()) and engine.free == 0
    for seed, rows in returned.items():
        indices = [row.index for row in rows]
        assert indices == sorted(set(indices))
        np.testing.assert_array_equal([row.tokens for row in rows], expected[seed][indices])
        # At most the result of a finished call is lost, between its return and its assignment.
        assert sessions[seed].rows - len(indices) <= 2 + interrupts // 10


def test_stop_conditions_can_be_interrupted(engine):
    def when(row):
        if row.index == 1 and not interrupted:
            interrupted.append(row)
            signal.raise_signal(signal.SIGINT)
        return row.index == 2

    interrupted: list = []
    session, other = engine.open(stop=Stop(when=when)), engine.open()
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [row.index for row in session] == [1, 2] and session.finished == "a condition"
    assert other.step().index == 1


def test_deferred_signals():
    order = []

    def handler(number, frame):
        order.append(number)
        raise ZeroDivisionError

    with pytest.raises(KeyboardInterrupt), deferred_signals():
        signal.raise_signal(signal.SIGINT)
        order.append("end")
    assert order == ["end"]
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(ZeroDivisionError), deferred_signals(), deferred_signals():
            signal.raise_signal(signal.SIGTERM)
            order.append("inner")
        assert order == ["end", "inner", signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is handler
        with pytest.raises(ValueError, match="of the block"), deferred_signals():
            raise ValueError("of the block")
    finally:
        signal.signal(signal.SIGTERM, before)
    thread = threading.Thread(target=lambda: deferred_signals().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Event loops


def test_event_loop_ends_while_a_row_is_computed(engine):
    expected = expected_rows(engine, 6)[5]
    session = engine.open(warm())
    session.step()

    async def leave():
        asyncio.create_task(session.next())
        for _ in range(3):
            await asyncio.sleep(0)

    for index in (1, 2):
        asyncio.run(leave())
        assert session.rows == index
        row = session.step()
        assert row.index == index and np.array_equal(row.tokens, expected[index])
    asyncio.run(leave())

    async def go_on():
        return [await session.next() for _ in range(2)]

    assert [row.index for row in asyncio.run(go_on())] == [3, 4]


def test_event_loop_that_stops_with_a_call_that_waits(engine):
    """The loop is neither closed nor are its tasks cancelled."""
    session = engine.open()
    loop = asyncio.new_event_loop()
    task = loop.create_task(session.next())
    loop.run_until_complete(asyncio.sleep(0))
    assert session.step().index == 0
    assert asyncio.run(asyncio.wait_for(session.next(), 60)).index == 1
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)
    loop.close()


def test_cancelled_calls_lose_no_row(engine):
    async def impatient():
        session, other = engine.open(), engine.open()
        rows = []
        for wait in (0, 0.001, 0.003, 60) * 4:
            waiting = asyncio.ensure_future(other.next())
            with contextlib.suppress(TimeoutError):
                rows.append((await asyncio.wait_for(session.next(), wait)).index)
            await waiting
        assert rows == list(range(len(rows))) and len(rows) >= 4
        assert other.rows == 16

    asyncio.run(impatient())


def test_all_tasks_are_cancelled_and_the_loop_goes_on(engine):
    async def main():
        session, other = engine.open(), engine.open()
        tasks = [asyncio.create_task(s.next()) for s in (session, other)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task(), tasks[1]}:
            task.cancel()
        assert (await asyncio.wait_for(tasks[1], 60)).index == 0
        assert (await asyncio.wait_for(session.next(), 60)).index == 0

    asyncio.run(main())


def test_session_that_is_closed_while_its_row_is_awaited(engine):
    async def main():
        session = engine.open()
        task = asyncio.create_task(session.next())
        await asyncio.sleep(0)
        session.close()
        with pytest.raises(UserError, match="the session is closed"):
            await asyncio.wait_for(task, 60)
        return engine.free

    assert asyncio.run(main()) == 3


# Failures of the device


def test_failed_call_that_has_not_donated_the_state_changes_nothing(engine, monkeypatch):
    expected = expected_rows(engine, 4)[5]
    session = engine.open(warm())
    session.feed("user", [8, 9])
    session.step()

    def fail(*_):
        raise MemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._program, "advance", fail)
        with pytest.raises(MemoryError):
            session.step()
    assert session.waiting == {"user": 1}
    rows = [session.step() for _ in range(3)]
    assert rows[0].tokens[0] == 9 and [row.index for row in rows] == [1, 2, 3]
    assert expected.shape == (4, 3)


def test_engine_goes_on_after_the_device_lost_the_state(engine, monkeypatch):
    session, advance = engine.open(), engine._program.advance
    snapshot = (session.step(), session.snapshot())[1]

    def fail(*arguments):
        advance(*arguments)
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(engine._program, "advance", fail)
        with pytest.raises(RunError, match="device lost.*1 open sessions are lost"):
            session.step()
    assert engine.free == 3
    with pytest.raises(UserError, match="because the device failed .RuntimeError: device lost"):
        session.step()
    assert engine.open().step().index == 0
    assert engine.restore(snapshot).step().index == 1


# Ranges, and what must fit


def numeric_fields(cls):
    """The names of the fields whose type is a number, or a tuple of numbers."""
    return {
        field.name
        for field in dataclasses.fields(cls)
        if any(word in str(field.type) for word in ("int", "float", "bool"))
        and field.name not in ("tokens", "when")
    }


@pytest.mark.parametrize(
    "cls, ranges", [(DecodeOptions, OPTION_RANGES), (Stop, STOP_RANGES)], ids=["options", "stop"]
)
def test_every_number_has_a_range(cls, ranges):
    assert numeric_fields(cls) == set(ranges)
    for name, (kind, interval) in ranges.items():
        low, high = (float(bound) for bound in interval[1:-1].split(","))
        inside, outside = {low + 1e-3, high - 1e-3}, {low - 1, high + 1, 1e300}
        if kind is int:
            inside, outside = {int(low), int(high) - 1}, {int(low) - 1, int(high) + 1, 1 << 70}
        if kind is bool:
            inside, outside = {True, False}, {2}
        for value in inside:
            cls(**{name: value})
        for value in (*outside, float("nan"), "1", [None], 1j):
            with pytest.raises(UserError, match=f"{name} is"):
                cls(**{name: value})
        if kind is not bool:
            with pytest.raises(UserError, match=f"{name} is True"):
                cls(**{name: True})


def test_options_of_other_types():
    for bad, message in {
        (("temperature", 1e-9),): "must be 0, for the most likely token, or at least 1e-06",
        (("temperature", (1.0, -1.0)),): "temperature is -1.0",
        (("top_k", 2.5),): "top_k is 2.5: must be an integer",
        (("top_p_inside", "no"),): "must be True or False",
        (("ablated", "thought"),): "must be a tuple of streams",
    }.items():
        with pytest.raises(UserError, match=message):
            DecodeOptions(**dict(bad))
    DecodeOptions(temperature=np.float32(0.5), top_k=np.int64(3), top_p=np.array([0.5, 1.0]))
    with pytest.raises(UserError, match="must be a mapping"):
        Stop(tokens=[1])
    with pytest.raises(UserError, match="must be a function"):
        Stop(when=True)


def test_snapshot_of_other_weights_or_streams_says_what_differs(engine, make_model):
    session = engine.open()
    session.step()
    snapshot = session.snapshot()

    def engine_of(model, window=16):
        return Engine(model, window=window, silence_id=SILENCE)

    engine_of(make_model(3)).restore(snapshot)
    for other, message in {
        engine_of(make_model(3, seed=9)): "the weights differ in .* arrays, such as",
        engine_of(make_model(3, d_ff=48)): "config.d_ff is 32 there and 48 here",
        engine_of(make_model(3, visibility="isolated")): "streams.lag is",
        engine_of(make_model(3), window=8): "window is 16 there and 8 here",
    }.items():
        with pytest.raises(UserError, match=message):
            other.restore(snapshot)
        assert other.free == 1


def test_parameters_of_other_streams_are_refused(make_model):
    model = make_model(4)
    more = make_model(5)
    with pytest.raises(UserError, match=r"stream_embedding is \(4, 16\) and has to be \(5, 16\)"):
        dataclasses.replace(more, parameters=model.parameters)
    parameters = {**more.parameters, "stream_embedding": model.parameters["stream_embedding"]}
    object.__setattr__(more, "parameters", parameters)  # past the check
    engine = Engine(more, window=8, silence_id=SILENCE)
    with pytest.raises(UserError, match="those of 4 streams, and there are 5"):
        engine.open().run(2)


@pytest.fixture
def padded(make_model):
    """A model whose vocabulary has ids that its tokenizer cannot decode."""
    letters = tokenizer.train(
        ["abc def ghi"] * 20, TokenizerConfig(model_type="char", vocab_size=16)
    )
    model = make_model(3, vocab_size=letters.vocab_size + 40)
    return dataclasses.replace(model, tokenizer=letters)


def test_ids_that_the_tokenizer_lacks_are_never_sampled(padded):
    engine, size = Engine(padded, sessions=2, window=64), padded.tokenizer.vocab_size
    session = engine.open(DecodeOptions(temperature=1000.0))
    restricted = engine.open(DecodeOptions(temperature=1000.0), allowed={"thought": [1]})
    tokens = np.array([[row.tokens for row in rows] for rows in engine.run(60)])
    assert tokens.max() < size and len(np.unique(tokens)) > 5
    with pytest.raises(UserError, match="allowed tokens of stream 'output' holds token"):
        session.allow("output", [size])
    session.allow("output", None)
    assert max(row.tokens.max() for row in session.run(40)) < size
    # They can be fed and forced, because the model has embeddings of them.
    restricted.force("output", [size, FREE, size + 1])
    assert restricted.step().text[2] == f"<id {size}>"
    assert padded.tokenizer.piece(size + 1) == f"<id {size + 1}>"
    a, b = padded.tokenizer.encode("ab")
    assert padded.tokenizer.decode([a, size, size + 1, b]) == f"a<id {size}><id {size + 1}>b"


def test_weights_that_are_not_finite_sample_ids_that_can_be_decoded(padded):
    parameters = jax.tree.map(lambda x: x * np.nan, padded.parameters)
    engine = Engine(dataclasses.replace(padded, parameters=parameters), window=16)
    for options in (DecodeOptions(), DecodeOptions(temperature=1.0)):
        with engine.open(options) as session:
            tokens = np.array([row.tokens for row in session.run(5)])
            assert tokens.max() < padded.tokenizer.vocab_size


# Input that waits, and single rows


def test_waiting_input_can_be_dropped(engine):
    session = engine.open()
    session.feed("user", [10, 11, 12])
    session.step()
    assert session.drop() == {"user": [11, 12]} and session.waiting == {"user": 0}
    assert session.step().tokens[0] == SILENCE
    session.feed("user", [13, 14])
    session.force("output", [7, 8])
    session.step()
    assert session.drop("user") == {"user": []}
    assert session.waiting_forced == {"user": 0, "thought": 0, "output": 1}
    with pytest.raises(UserError, match="'output' is not an input"):
        session.drop("output")


def test_next_of_a_session(engine):
    session = engine.open(stop=Stop(rows=3))
    assert next(session).index == 0
    assert [row.index for row in session] == [1, 2]
    with pytest.raises(StopIteration):
        next(session)
    other = engine.open(stop=Stop(rows=2))

    async def rows():
        first = await anext(other)
        return [first.index] + [row.index async for row in other]

    assert asyncio.run(rows()) == [0, 1]
