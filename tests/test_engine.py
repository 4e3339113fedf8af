"""Sessions: input while they run, options, stopping, forks, snapshots, concurrency, and errors."""

import asyncio
import dataclasses

import jax
import numpy as np
import pytest
from many_sessions import Check

from msllm import tokenizer
from msllm.config import Config, DataConfig, TokenizerConfig
from msllm.decode import script
from msllm.decode.engine import FREE, DecodeOptions, Engine, Stop
from msllm.errors import UserError

SILENCE = 3
WARM = DecodeOptions(temperature=1.5, seed=5)


@pytest.fixture
def engine(make_model):
    """An engine for three sessions. All have the same shape, so their program is compiled once."""
    model = make_model(3)
    # Parameters from a checkpoint are committed to a device.
    model = dataclasses.replace(
        model, parameters=jax.device_put(model.parameters, jax.devices()[0])
    )
    return Engine(model, sessions=3, window=16, silence_id=SILENCE)


def tokens(rows):
    """The tokens [R, S] of rows."""
    return np.array([row.tokens for row in rows])


def steps(session, count):
    """The tokens [R, S] of `count` single steps."""
    return tokens([session.step() for _ in range(count)])


def test_more_rows_than_in_training_get_one_warning(make_model, caplog):
    data = DataConfig(rows=12)
    trained = dataclasses.replace(make_model(3), step=1, run_config=Config(data=data))
    assert script.default_window(trained) == 12
    assert script.default_window(make_model(3)) == script.DEFAULT_WINDOW
    imported = dataclasses.replace(trained.run_config, init_from="folder")
    for model, window in (
        (trained, 12),
        (dataclasses.replace(trained, run_config=imported), 16),
        (dataclasses.replace(trained, step=0), 16),
    ):
        Engine(model, sessions=1, window=window, silence_id=SILENCE).open().run(20)
    assert not caplog.records
    engine = Engine(trained, sessions=2, window=16, silence_id=SILENCE)
    engine.open().run(15)  # 12 rows and a quarter
    assert not caplog.records
    engine.open()
    engine.run(20)
    (record,) = caplog.records
    assert "trained on tables of 12 rows" in record.message and "window=12" in record.message


def test_input_enters_the_next_row_that_is_read(engine):
    session, other = engine.open(), engine.open()
    session.feed("user", [10])
    assert session.step().tokens[0] == 10  # was fed before the row was shown
    assert session.step().tokens[0] == SILENCE
    session.feed("user", [11, 12, 13])
    # 11 entered the row before, which had been shown but not read.
    assert session.step().tokens[0] == 12
    session.feed("user", [14])
    assert tokens(session.run(3))[:, 0].tolist() == [13, 14, SILENCE]
    whole = session.transcript()
    assert whole.tokens[:, 0].tolist() == [10, 11, 12, 13, 14, SILENCE]
    for name, last in zip(whole._fields, session.transcript(2)):
        np.testing.assert_array_equal(last, getattr(whole, name)[-2:])
    assert other.rows == 0


def test_a_session_does_not_depend_on_other_sessions(engine):
    """In another slot, among others and with `run`, a session gets the same tokens as alone."""
    alone = engine.open(WARM)
    expected = steps(alone, 12)
    alone.close()
    noise = [engine.open(DecodeOptions(temperature=9.0, seed=seed)) for seed in (1, 2)]
    session = engine.open(WARM)
    assert session._slot == 2
    rows = [engine.step([session, noise[0]])[0] for _ in range(4)]
    rows += [engine.step()[2] for _ in range(3)]
    noise[0].close()
    np.testing.assert_array_equal(tokens(rows + engine.run(5)[1]), expected)
    assert np.any(steps(noise[1], 8) != expected[:8])


def test_changes_of_options_do_not_recompile(engine):
    engine.warm_up()
    compiled = []

    def listen(name, *_, **__):
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        session = engine.open(prefill=np.full((5, 3), 4), keep=2)
        for options in (
            WARM,
            DecodeOptions(
                temperature=(0.0, 0.5, 2.0), top_k=(0, 3, 5), top_p=0.5, min_p=0.1, seed=3
            ),
            DecodeOptions(
                silence_penalty=2.0, presence_penalty=1.0, penalty_start=1, ablated=("thought",)
            ),
        ):
            session.options = options
            session.feed("user", [4])
            session.force("output", [FREE, 8])
            session.allow("thought", [1, 2])
            session.step()
            session.run(3)
            session.fork().step()
            engine.restore(session.snapshot()).step()
            for other in engine._slots[1:]:
                other.close()
        assert compiled == []
        jax.jit(lambda x: x + 17)(1.0)
        assert compiled  # the listener works
    finally:
        jax.monitoring.clear_event_listeners()


def test_forced_allowed_and_ablated_cells(engine):
    session = engine.open(
        DecodeOptions(temperature=3.0, ablated=("thought",)), allowed={"output": [20, 21]}
    )
    session.force("output", [9, FREE, 8])
    shown = np.concatenate([steps(session, 4), tokens(session.run(8))])
    assert shown[[0, 2], 2].tolist() == [9, 8]
    assert set(np.delete(shown[:, 2], [0, 2])) == {20, 21}
    assert np.all(shown[:, 1] == SILENCE)
    # Tokens fed to an ablated input wait until it is no longer ablated.
    session.options = DecodeOptions(ablated=("user",))
    session.feed("user", [10, 11])
    assert set(steps(session, 2)[:, 0]) == {SILENCE} and session.waiting == {"user": 2}
    session.options = DecodeOptions()
    session.step()
    assert session.transcript(2).tokens[:, 0].tolist() == [10, 11]
    assert session.waiting == {"user": 0}
    session.allow("output", None)
    session.options = WARM
    shown = tokens(session.run(12))
    assert len(set(shown[:, 2])) > 2 and np.any(shown[:, 1] != SILENCE)


def test_the_presence_penalty_remembers_all_tokens_of_a_stream(engine):
    """With a large penalty no token repeats before all others have appeared. Silence is exempt."""
    for _ in range(2):  # the second session is in the slot of a closed one
        session = engine.open(
            DecodeOptions(
                presence_penalty=1e3, silence_penalty=1e6, penalty_start=0, penalty_ramp=1
            )
        )
        session.force("output", [30])
        assert sorted(tokens(session.run(31))[:, 2]) == sorted({*range(32)} - {SILENCE})
        session.close()
    other = engine.open(DecodeOptions(presence_penalty=1e3), prefill=np.full((4, 3), 11))
    assert np.all(tokens(other.run(20))[:, 1:] != 11)


def test_the_silence_penalty_starts_after_the_input(engine):
    session = engine.open(DecodeOptions(silence_penalty=10.0))
    penalties = []
    for row in range(10):
        session.feed("user", [7] if row == 2 else [])
        session.step()
        penalties.append(session._script.penalty(session.rows)[2])
    # Penalties of the row after each step. The token entered row 1, from which row 2 is chosen.
    # Row 3 is the first that is chosen from silent input.
    assert penalties == [0, 0, 2, 4, 6, 8, 10, 10, 10, 10]
    session.options = DecodeOptions(silence_penalty=10.0, penalty_start=9)
    assert session._script.penalty(session.rows)[2] == 4  # rows 9 and 10
    # A negative penalty makes all rows silent.
    silent = engine.open(DecodeOptions(silence_penalty=-1e6, penalty_start=3, penalty_ramp=1))
    shown = tokens(silent.run(6))
    assert np.all(shown[3:] == SILENCE) and np.any(shown[1:3] != SILENCE)


def test_stop_conditions(engine):
    def run(**conditions):
        """(number of rows, why the session finished)."""
        with engine.open(WARM, stop=Stop(**conditions)) as session:
            return len(list(session)), session.finished

    rows = tokens(engine.open(WARM).run(12))
    token = int(rows[6, 2])
    first = int(np.argmax(rows[:, 2] == token))
    count, reason = run(tokens={"output": [token]})
    assert count == first + 1 and "'output' showed token" in reason
    assert run(rows=4)[0] == 4
    assert run(when=lambda row: row.index == 8)[0] == 9
    silent = engine.open(DecodeOptions(ablated=("thought", "output")), stop=Stop(silent_rows=5))
    silent.force("output", [SILENCE, SILENCE, 8])
    assert len(list(silent)) == 8 and silent.finished == "5 silent rows"
    with pytest.raises(UserError, match="no stream 'out'"):
        engine.open(stop=Stop(tokens={"out": [1]}))


def test_forks_and_snapshots_continue_with_the_same_tokens(engine):
    session = engine.open(WARM, allowed={"thought": [5, 6, 7]})
    session.feed("user", range(8, 28))
    session.run(6)
    fork, snapshot = session.fork(), session.snapshot()
    other_seed = session.fork(seed=6)
    expected = tokens(session.run(20))  # past the window
    other = tokens(other_seed.run(20))
    # A fork has the queues of its parent.
    np.testing.assert_array_equal(other[:14, 0], expected[:14, 0])
    assert np.any(other != expected) and set(other[:, 1]) <= {5, 6, 7}
    other_seed.close()
    session.close()
    np.testing.assert_array_equal(steps(fork, 20), expected)
    again = Engine(engine.model, sessions=2, window=16, silence_id=SILENCE)
    again.open()
    for _ in range(2):  # restoring does not change a snapshot
        restored = again.restore(snapshot)
        np.testing.assert_array_equal(tokens(restored.run(20)), expected)
        np.testing.assert_array_equal(restored.transcript().tokens, fork.transcript().tokens)
        restored.close()
    with pytest.raises(UserError, match="another model, window or cache"):
        Engine(engine.model, window=8, silence_id=SILENCE).restore(snapshot)


def test_awaited_rows_share_a_step(engine):
    expected = [
        tokens(engine.open(dataclasses.replace(WARM, seed=seed)).run(9)) for seed in range(3)
    ]
    for session in list(engine._slots):
        session.close()
    sessions_per_step, dispatch = [], engine._dispatch

    def counting_dispatch(sessions):
        sessions_per_step.append(len(sessions))
        return dispatch(sessions)

    engine._dispatch = counting_dispatch

    async def run_session(seed):
        session = engine.open(dataclasses.replace(WARM, seed=seed), stop=Stop(rows=9))
        return tokens([row async for row in session])

    async def run_all():
        return await asyncio.gather(*(run_session(seed) for seed in range(3)))

    np.testing.assert_array_equal(asyncio.run(run_all()), expected)
    assert sessions_per_step == [3] * 9

    async def await_two_rows():
        session = engine._slots[0]
        return await asyncio.gather(session.next(), session.next(), return_exceptions=True)

    row, error = asyncio.run(await_two_rows())
    assert row.index == 9
    assert isinstance(error, UserError) and "already being computed" in str(error)


def test_text_is_shown_once_its_bytes_are_complete(make_model):
    letters = tokenizer.train(
        ["abc déf ghi"] * 20, TokenizerConfig(model_type="bpe", vocab_size=280)
    )
    model = dataclasses.replace(make_model(3, vocab_size=letters.vocab_size), tokenizer=letters)
    session = Engine(model, window=64).open()
    text = "abc déf 漢字"  # each of the last two characters is three byte tokens
    session.feed("user", text)
    count = len(letters.encode(text))
    shown = [session.step().text[0] for _ in range(count + 3)]
    assert "".join(shown) == text and shown[-1] == ""
    assert len(shown) > len([piece for piece in shown if piece]) + 4
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(shown)
    forced = "ghi" * 20
    session.force("output", forced)
    shown = [session.step().text[2] for _ in letters.encode(forced)]
    assert "".join(shown) == forced


def test_inputs_have_no_log_probability(engine):
    session = engine.open(WARM)
    session.step()
    row = session.step()
    assert np.isnan(row.logprob[0])
    assert np.all(row.logprob[1:] <= 0) and np.all(row.entropy[1:] > 0)
    assert row.logits is None


def test_errors_name_what_is_wrong(engine):
    model, session = engine.model, engine.open()
    closed = engine.open()
    closed.close()
    for message, bad in {
        "no stream 'usr'": lambda: session.feed("usr", [1]),
        "'output' is not an input": lambda: session.feed("output", [1]),
        "holds token 99": lambda: session.feed("user", [99]),
        "holds token -2": lambda: session.force("output", [-2]),
        "must be integers": lambda: session.feed("user", [1.5]),
        "is text, and the model has no tokenizer": lambda: session.feed("user", "hello"),
        "stream 3: the model has streams 0 to 2": lambda: session.force(3, [1]),
        "is allowed no token": lambda: session.allow("output", []),
        "top_p is 0.0": lambda: engine.open(DecodeOptions(top_p=0.0)),
        "temperature is": lambda: engine.open(DecodeOptions(temperature=(1.0, 1.0))),
        "penalty_ramp is 0": lambda: engine.open(DecodeOptions(penalty_ramp=0)),
        "token that means silence": lambda: Engine(model),
        "must be .rows, 3.": lambda: engine.open(prefill=np.zeros((2, 4), int)),
        "has 17 rows and the window 16": lambda: engine.open(prefill=np.zeros((17, 3), int)),
        "keep is 15": lambda: engine.open(keep=15),
        "the session is closed": lambda: closed.feed("user", [1]),
        "session is closed: open another": lambda: closed.step(),
        "named twice": lambda: engine.step([session, session]),
        "rows is 0": lambda: session.run(0),
        "cache_dtype is 'int4'": lambda: Engine(model, cache_dtype="int4", silence_id=SILENCE),
        "window is 1": lambda: Engine(model, window=1, silence_id=SILENCE),
    }.items():
        with pytest.raises(UserError, match=message):
            bad()
    assert engine.free == 2
    engine.open()
    engine.open()
    with pytest.raises(UserError, match="all 3 sessions are open: close one"):
        engine.open()
    with pytest.raises(UserError, match="all 3 sessions are open"):
        session.fork()


@pytest.mark.slow
def test_many_sessions_do_not_mix():
    """Runs tests/many_sessions.py for a few seconds. Both engines share one program."""
    check = Check(sessions=6, seed=1, replay_sessions=6)
    for _ in range(150):
        check.act()
    check.finish()
    assert min(check.counts[what] for what in ("opened", "fed", "forked", "closed", "rows")) >= 4
    assert check.compiled == 0
