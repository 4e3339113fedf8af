"""Cached decoding against the full forward pass, sampling, input while it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_cases
from msllm import decode
from msllm.decode import FREE, DecodeOptions, DecodeSession, filtered_logits, generate
from msllm.errors import UserError
from msllm.model import bind
from msllm.streams import NEVER, make_cells, positions

SILENCE = 3
LAG = np.array([[1, NEVER, 2], [0, 1, NEVER], [3, 0, 1]], np.int32)
WARM = DecodeOptions(temperature=1.0, seed=5)


def full_logits(model, tokens, present):
    """Logits [B, R, S, V] of one pass over all rows."""
    segment = np.ones(tokens.shape[:2], np.int32)
    silent = tokens == SILENCE if model.streams.skip_silence else None
    bound = bind(model.graph, model.parameters)
    return np.asarray(bound.logits(bound(tokens, make_cells(present, segment, silent), positions(segment))))


@pytest.mark.parametrize(
    "settings",
    [
        dict(visibility="block_causal", prefill=5, absent=0.3),
        dict(visibility="same_row", prefill=5),
        dict(visibility="isolated", prefill=0, attention="reference"),
        dict(lag=LAG, prefill=3, absent=0.3, skip_silence=True),
        dict(visibility="block_causal", prefill=0, delays=(0, 2, 1)),
    ],
    ids=lambda s: "-".join(str(k if k == "lag" else v) for k, v in s.items()),
)
def test_cached_equals_full_forward(make_model, settings):
    settings = dict(settings)
    prefill, absent, rows = settings.pop("prefill"), settings.pop("absent", 0.0), 6
    model, rng = make_model(3, **settings), np.random.default_rng(1)
    before = dict(batch=2)
    if prefill:
        before = dict(prefill=rng.integers(0, 32, (2, prefill, 3)), present=rng.random((2, prefill, 3)) >= absent)
    fed = [(prefill, "user", 7), (prefill + 2, "user", 9)]
    result = generate(model, rows, WARM, fed=fed, keep_logits=True, silence_id=SILENCE, **before)
    assert result.read.shape == (2, prefill + rows, 3)
    if settings.get("delays"):
        np.testing.assert_array_equal(result.present[0].argmax(axis=0), settings["delays"])
        assert result.read[0, 2, 1] == result.read[0, 1, 2] == SILENCE
    expected = full_logits(model, result.read, result.present)[:, :-1][:, -len(result.logits) :]
    for row, ours in enumerate(result.logits):
        np.testing.assert_allclose(ours, expected[:, row], rtol=0, atol=1e-4)


def test_changes_do_not_recompile(make_model):
    session = DecodeSession(make_model(3), batch=2, max_rows=16, silence_id=SILENCE)
    session.step(), session.step()
    compiled = decode._advance._cache_size()
    for options in (
        WARM,
        DecodeOptions(temperature=(0.0, 0.5, 2.0), top_k=(0, 3, 5), top_p=0.5, seed=3),
        DecodeOptions(silence_penalty=2.0, penalty_start=1, ablated=("thought",)),
    ):
        session.options = options
        session.feed("user", [4], table=1)
        session.step(np.array([FREE, 8, FREE]))
    assert decode._advance._cache_size() == compiled


@pytest.mark.parametrize("number", range(4))
def test_sampler_probabilities(number):
    case = golden_cases.case("sampler")
    settings = case.meta["row_sampler"][number]
    logits = jnp.asarray(case["logits"])
    fill = lambda name, dtype: jnp.full(len(logits), settings[name], dtype)
    limits = fill("top_k", np.int32), fill("top_p", np.float32)
    filtered = filtered_logits(logits, fill("temperature", np.float32), *limits)
    np.testing.assert_allclose(jax.nn.softmax(filtered), case[f"row_sampler_{number}_probs"], rtol=0, atol=1e-6)


def test_draws_follow_the_probabilities():
    tables, logits = 4000, np.array([[0.0, 1.0, 2.0, -1.0], [1.0, 0.0, 0.0, 0.5]], np.float32)
    shape = (tables, 2)
    full = lambda value, dtype: np.full(shape, value, dtype)
    controls = decode._Controls(
        full(FREE, np.int32), full(1.0, np.float32), full(0, np.int32), full(1.0, np.float32), full(0.0, np.float32),
        np.int32(0), np.uint32(1), np.int32(2),
    )  # fmt: skip
    drawn = np.asarray(decode._choose(jnp.broadcast_to(logits, (tables, 2, 4)), controls))
    for stream in range(2):
        share = np.bincount(drawn[:, stream], minlength=4) / tables
        np.testing.assert_allclose(share, jax.nn.softmax(logits[stream]), rtol=0, atol=0.03)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.1  # streams are drawn independently


def test_sampling_depends_on_seed_and_not_on_other_tables(make_model):
    model = make_model(3)
    run = lambda seed, batch: generate(
        model, 6, DecodeOptions(temperature=2.0, seed=seed), batch=batch, silence_id=SILENCE
    ).read
    np.testing.assert_array_equal(run(1, 2), run(1, 2))
    np.testing.assert_array_equal(run(1, 2)[0], run(1, 1)[0])
    assert np.any(run(1, 2)[0] != run(1, 2)[1])
    assert np.any(run(1, 1) != run(2, 1))


def test_temperature_and_top_k_per_stream(make_model):
    model = make_model(3)
    greedy = generate(model, 6, silence_id=SILENCE).read
    narrow = generate(model, 6, DecodeOptions(temperature=5.0, top_k=1), silence_id=SILENCE).read
    np.testing.assert_array_equal(narrow, greedy)
    mixed = generate(model, 2, DecodeOptions(temperature=(0.0, 50.0, 0.0), seed=1), silence_id=SILENCE).read
    np.testing.assert_array_equal(mixed[0, 1, [0, 2]], greedy[0, 1, [0, 2]])
    assert mixed[0, 1, 1] != greedy[0, 1, 1]


def test_input_enters_the_next_row_that_is_read(make_model):
    session = DecodeSession(make_model(3), max_rows=16, silence_id=SILENCE)
    session.feed("user", [10])
    assert session.step().tokens[0, 0] == 10  # known before the row was shown
    assert session.step().tokens[0, 0] == SILENCE
    session.feed("user", [11, 12, 13])
    assert session.step().tokens[0, 0] == 12  # 11 went into the row before, which had been shown but not read
    session.feed("user", [14])
    assert session.step().tokens[0, 0] == 13
    assert session.step().tokens[0, 0] == 14
    assert session.step().tokens[0, 0] == SILENCE
    assert session.transcript()[0][0, :, 0].tolist() == [10, 11, 12, 13, 14, SILENCE]


def test_input_for_one_table(make_model):
    session = DecodeSession(make_model(3), batch=2, max_rows=4, silence_id=SILENCE)
    session.feed("user", [10], table=1)
    assert session.step().tokens[:, 0].tolist() == [SILENCE, 10]


def test_silence_penalty_starts_after_the_input(make_model):
    model = make_model(3)
    ramp = lambda session: np.asarray(session._controls(np.zeros((1, 3))).penalty)[0, 2]
    session = DecodeSession(model, DecodeOptions(silence_penalty=10.0), max_rows=16, silence_id=SILENCE)
    penalties = []
    for row in range(10):
        session.feed("user", [7] if row == 2 else [])
        session.step()
        penalties.append(float(ramp(session)))
    # Of the row after each step. The token went into row 1, row 2 is chosen from that, row 3 from silent input.
    assert penalties == [0, 0, 2, 4, 6, 8, 10, 10, 10, 10]
    session.options = DecodeOptions(silence_penalty=10.0, penalty_start=9)
    assert float(ramp(session)) == 4  # rows 9 and 10


def test_silent_rows_stop(make_model):
    model = make_model(3)
    loud = DecodeOptions(silence_penalty=-1e4, penalty_start=0, penalty_ramp=1)  # everything is silent
    assert generate(model, 9, loud, silent_rows_to_stop=3, silence_id=SILENCE).read.shape[1] == 3
    forced = np.full((9, 3), FREE)
    forced[1, 2] = 5
    assert generate(model, 9, loud, forced=forced, silent_rows_to_stop=3, silence_id=SILENCE).read.shape[1] == 5


def test_ablated_streams_are_silent(make_model):
    result = generate(make_model(3), 5, DecodeOptions(temperature=3.0, ablated=("thought",)), silence_id=SILENCE)
    assert np.all(result.read[..., 1] == SILENCE) and np.any(result.read[..., 2] != SILENCE)


def test_errors_name_what_is_wrong(make_model):
    model = make_model(3)
    session = DecodeSession(model, max_rows=2, silence_id=SILENCE)
    for message, bad in {
        "no stream 'usr'": lambda: session.feed("usr", [1]),
        "'output' is no input": lambda: session.feed("output", [1]),
        "holds token 99": lambda: session.feed("user", [99]),
        "table 1": lambda: session.feed("user", [1], table=1),
        "top_p is 0.0": lambda: DecodeSession(model, DecodeOptions(top_p=0.0), silence_id=SILENCE),
        "temperature is": lambda: DecodeSession(model, DecodeOptions(temperature=(1.0, 1.0)), silence_id=SILENCE),
        "which token means silence": lambda: DecodeSession(model),
        "must be .1, rows, 3.": lambda: session.prefill(np.zeros((2, 4), int)),
        "forced has shape": lambda: generate(model, 2, forced=np.zeros((3, 3), int), silence_id=SILENCE),
    }.items():
        with pytest.raises(UserError, match=message):
            bad()
    for _ in range(3):  # the third row is shown, never read
        session.step()
    with pytest.raises(UserError, match="max_rows=2"):
        session.step()
