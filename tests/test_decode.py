"""Cached decoding equals the full forward pass with every visibility, cache and mesh; sampling."""

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msllm.config import MeshConfig, ModelConfig
from msllm.decode import cache
from msllm.decode.engine import FREE, DecodeOptions, Engine, generate
from msllm.decode.program import decode_program
from msllm.decode.sampling import Sampling, filtered_logits, row_keys, sample
from msllm.errors import UserError
from msllm.kernels import cpu as cpu_kernels
from msllm.model.attention.backend import Backend
from msllm.model.combine import next_logits
from msllm.model.layers import rope_angles, rope_frequencies
from msllm.model.model import bind
from msllm.sharding import make_mesh
from msllm.streams import NEVER, make_cells, positions

SILENCE = 3
LAG = np.array([[1, NEVER, 2], [0, 1, NEVER], [3, 0, 1]], np.int32)
COMBINE = (("thought", "product", "user,thought"), ("output", "mixture", "thought,output,user"))
WARM = DecodeOptions(temperature=1.0, seed=5)


def full_logits(model, transcript, window=0, kept=0):
    """Logits [R, S, V] of a forward pass over all rows of a transcript.

    With a window, a row sees the first `kept` rows and the last `window - kept` rows.
    """

    def dense(q, k, v, visibility):
        """Reference attention, restricted to the window."""
        q_row, k_row = visibility.queries.row, visibility.keys.row
        back = q_row[:, :, None, None, None] - k_row[:, None, None, :, None]
        in_window = (back < window - kept) | (k_row < kept)[:, None, None, :, None]
        mask = visibility.mask() & in_window
        q = q.reshape(*q.shape[:3], k.shape[3], -1, q.shape[-1])
        scores = jnp.einsum("btskgh,bupkh->bkgtsup", q, k) / q.shape[-1] ** 0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=(-2, -1))
        return jnp.einsum("bkgtsup,bupkh->btskgh", weights, v).reshape(
            *q.shape[:3], -1, q.shape[-1]
        )

    tokens, present = transcript.tokens[None], transcript.present[None]
    segment = np.ones(tokens.shape[:2], np.int32)
    silent = tokens == SILENCE if model.streams.skip_silence else None
    bound = bind(model.graph, model.parameters)
    cells = make_cells(present, segment, silent)
    backend = Backend("dense", dense) if window else None
    hidden = bound(tokens, cells, positions(segment), backend=backend)
    return np.asarray(next_logits(bound, hidden, cells.present))[0]


def crowd(model, rows, prefills, absent=0.0, window=16, **settings):
    """Steps sessions of one engine that begin at different times and are fed input.

    Returns (sessions, {session: its first `rows` rows}).
    """
    rng = np.random.default_rng(1)
    engine = Engine(
        model,
        sessions=len(prefills),
        window=window,
        all_logits=True,
        silence_id=SILENCE,
        **settings,
    )
    sessions, shown = [], {}
    for step in range(rows + len(prefills) - 1):
        if step < len(prefills):
            shape = (prefills[step], 3)
            prefill, present = rng.integers(0, 32, shape), rng.random(shape) >= absent
            arguments = {"prefill": prefill, "present": present} if prefills[step] else {}
            sessions.append(engine.open(DecodeOptions(temperature=1.0, seed=step), **arguments))
            shown[sessions[-1]] = []
        active = [
            session
            for session in sessions
            if len(shown[session]) < rows and (step + session._slot) % 3
        ]
        for session, row in zip(active, engine.step(active)):
            shown[session].append(row)
            if row.index % 3 == 1:
                session.feed("user", [7 + row.index % 25])
    return sessions, shown


def check_crowd(model, sessions, shown, tolerance=1e-4):
    """Checks the rows of `crowd` against full forward passes."""
    for session in sessions:
        transcript = session.transcript()
        expected = full_logits(model, transcript)
        assert transcript.present.shape == transcript.tokens.shape
        assert len(transcript.row) == session.rows
        compared = 0
        for row in shown[session]:
            if row.logits is not None:
                np.testing.assert_allclose(
                    row.logits, expected[row.index - 1], rtol=0, atol=tolerance
                )
                compared += 1
                logprobs = jax.nn.log_softmax(row.logits)
                chosen = logprobs[np.arange(3), row.tokens]
                np.testing.assert_allclose(
                    row.logprob[row.present], chosen[row.present], rtol=0, atol=1e-5
                )
                np.testing.assert_allclose(
                    row.entropy, -(np.exp(logprobs) * logprobs).sum(-1), rtol=0, atol=1e-5
                )
        assert compared >= 2


@pytest.mark.parametrize(
    "settings",
    [
        {"visibility": "block_causal", "absent": 0.3},
        {"visibility": "same_row"},
        {"visibility": "isolated", "attention": "reference"},
        {"lag": LAG, "absent": 0.3, "skip_silence": True},
        {"visibility": "block_causal", "delays": (0, 2, 1), "prefills": (0, 1)},
        {"visibility": "isolated", "absent": 0.5, "combine": COMBINE},
    ],
    ids=lambda s: "-".join(str(k if k in ("lag", "combine") else v) for k, v in s.items()),
)
def test_cached_decoding_equals_the_full_forward_pass(make_model, settings):
    settings = dict(settings)
    prefills, absent = settings.pop("prefills", (5, 0)), settings.pop("absent", 0.0)
    model = make_model(3, **settings)
    sessions, shown = crowd(model, 6, prefills, absent)
    check_crowd(model, sessions, shown)
    if settings.get("delays"):
        transcript = sessions[0].transcript()
        np.testing.assert_array_equal(transcript.present.argmax(axis=0), settings["delays"])
        assert transcript.tokens[2, 1] == transcript.tokens[1, 2] == SILENCE


@pytest.mark.parametrize(
    "axes",
    [{"data": 2, "stream": 2, "tensor": 2}, {"fsdp": 2, "stream": 4}],
    ids=lambda axes: "-".join(axes),
)
@pytest.mark.parametrize("combine", [(), COMBINE], ids=["own", "combined"])
def test_sharded_decoding_equals_the_full_forward_pass(make_model, axes, combine):
    """Three streams on two or four devices are padded with absent streams."""
    model = make_model(3, lag=LAG, skip_silence=True, combine=combine)
    mesh = make_mesh(MeshConfig(**({"data": 1, "fsdp": 1, "stream": 1, "tensor": 1} | axes)))
    check_crowd(model, *crowd(model, 4, (2, 3), mesh=mesh))


@pytest.mark.parametrize(
    "layout, block, window, prefills",
    [(cache.ROWS_LAST, 6, 16, (9, 1)), (cache.PANELS, 32, 70, (62, 1, 40))],
    ids=["rows", "panels"],
)
def test_windows_of_several_blocks(make_model, monkeypatch, layout, block, window, prefills):
    """The window has three blocks, the last one smaller. Sessions fill from one to all of them."""
    if layout == cache.PANELS and cpu_kernels.unavailable_reason():
        pytest.skip(f"no kernels in C++: {cpu_kernels.unavailable_reason()}")
    monkeypatch.setattr(cache, "BLOCK_ROWS", block)
    assert cache.block_sizes(window, layout) == (3, block)
    model = make_model(3, d_ff=40 + block)  # a shape that no other test compiles
    if layout == cache.ROWS_LAST:
        monkeypatch.setattr(cpu_kernels, "unavailable_reason", lambda: "not asked for")
    check_crowd(model, *crowd(model, 6, prefills, window=window))

    def run():
        return Engine(model, window=window, silence_id=SILENCE).open(WARM).run(3 * window)

    in_blocks = run()
    monkeypatch.undo()
    decode_program.cache_clear()
    np.testing.assert_array_equal([row.tokens for row in run()], [row.tokens for row in in_blocks])


# With a head_dim of 32, the kernels also round queries and weights.
@pytest.mark.parametrize("head_dim", [8, 32])
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.03), ("int8", 0.08)])
def test_caches_of_few_bits_round_little(make_model, dtype, tolerance, head_dim):
    model = make_model(3, head_dim=head_dim)
    sessions, shown = crowd(model, 6, (5, 0), cache_dtype=dtype)
    check_crowd(model, sessions, shown, tolerance)
    with pytest.raises(AssertionError):  # the cache is not float32
        check_crowd(model, sessions, shown)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "xla"])
def test_decoding_in_bfloat16_is_close_to_float32(make_model, monkeypatch, kernels):
    """The error is less than twice that of a full forward pass in bfloat16.

    Cached decoding rounds as often as the full pass, but other values.
    """
    if not kernels:
        monkeypatch.setattr(cpu_kernels, "unavailable_reason", lambda: "not asked for")
    exact, model = (
        make_model(3, d_ff=56 + kernels, compute_dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    sessions, shown = crowd(model, 6, (5, 0))
    for session in sessions:
        right, rounded = (full_logits(m, session.transcript()) for m in (exact, model))
        rows = [row for row in shown[session] if row.logits is not None]
        ours = np.max([np.abs(row.logits - right[row.index - 1]).max() for row in rows])
        assert 1e-3 < ours < 2 * np.abs(rounded - right).max(), ours
    monkeypatch.undo()
    decode_program.cache_clear()


@pytest.mark.parametrize("kept", [0, 3])
def test_a_long_session_sees_the_rows_in_its_window(make_model, kept):
    """Compares ten windows of rows with a full pass in which each row sees only its window."""
    model, window = make_model(3), 8
    engine = Engine(model, sessions=2, window=window, all_logits=True, silence_id=SILENCE)
    prefill = np.random.default_rng(0).integers(0, 32, (5, 3))
    session = engine.open(WARM, prefill=prefill, keep=kept)
    engine.open()
    tokens, logits = list(prefill), {}
    for number in range(10 * window):
        row = engine.step()[0]
        assert row.index == number + 5
        logits[row.index] = row.logits
        if number % 5 == 0:
            session.feed("user", [9])
            row.tokens[0] = 9
        tokens.append(row.tokens)
    tokens = np.array(tokens)
    transcript = session.transcript()
    every = type(transcript)(np.arange(len(tokens)), tokens, np.ones(tokens.shape, bool))
    expected = full_logits(model, every, window, kept)
    for index, ours in logits.items():
        np.testing.assert_allclose(ours, expected[index - 1], rtol=0, atol=1e-4)
    # The rows outside the window would make a difference.
    assert np.abs(full_logits(model, every)[-2] - logits[index]).max() > 1e-2
    remaining = [*range(kept), *range(len(tokens) - window + kept, len(tokens))]
    assert transcript.row.tolist() == remaining
    np.testing.assert_array_equal(transcript.tokens, tokens[transcript.row])


def sampling(shape, **settings):
    """Sampling settings with arrays of a shape; those not given change nothing."""
    neutral = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "top_p_inside": False,
        "min_p": 0.0,
        "min_probability": 0.0,
    } | settings
    dtypes = {"top_k": np.int32, "top_p_inside": bool}
    return Sampling(
        *(jnp.full(shape, neutral[name], dtypes.get(name, np.float32)) for name in Sampling._fields)
    )


@pytest.mark.parametrize(
    "sampler, number", [("row", n) for n in range(4)] + [("flat", n) for n in range(5)]
)
def test_sampler_probabilities(sampler, number):
    """The probabilities are those of the reference's two samplers.

    With top_p, the flat sampler drops the token that crosses the limit. Its min_p is an absolute
    limit, msllm's min_probability.
    """
    case = golden_cases.case("sampler")
    settings = dict(case.meta[f"{sampler}_sampler"][number])
    logits, penalty = jnp.asarray(case["logits"]), settings.pop("presence_penalty", 0.0)
    logits = logits.at[:, np.unique(case["past_tokens"])].add(-penalty)
    settings = {
        {"min_p": "min_probability"}.get(name, name): value for name, value in settings.items()
    }
    filtered = filtered_logits(
        logits, sampling(len(logits), top_p_inside=sampler == "flat", **settings)
    )
    expected = case[f"{sampler}_sampler_{number}_probs"]
    np.testing.assert_allclose(jax.nn.softmax(filtered), expected, rtol=0, atol=1e-6)


def test_min_p_is_relative_to_the_best():
    logits = jnp.log(jnp.array([[0.5, 0.26, 0.24], [0.1, 0.2, 0.7]]))
    kept = np.isfinite(filtered_logits(logits, sampling(2, min_p=0.5)))
    assert kept.tolist() == [[True, True, False], [False, False, True]]
    kept = np.isfinite(filtered_logits(logits, sampling(2, min_probability=0.6)))
    assert kept.tolist() == [[True, False, False], [False, False, True]]  # the best token stays


def test_draws_follow_the_probabilities():
    tables, logits = 4000, np.array([[0.0, 1.0, 2.0, -1.0], [1.0, 0.0, 0.0, 0.5]], np.float32)
    keys = row_keys(jnp.arange(tables, dtype=jnp.uint32), jnp.full(tables, 2), jnp.arange(2))
    drawn = sample(
        jnp.broadcast_to(logits, (tables, 2, 4)),
        bias=0.0,
        allowed=jnp.ones((tables, 2, 4), bool),
        sampling=sampling((tables, 2)),
        given=jnp.full((tables, 2), FREE),
        keys=keys,
        active=jnp.ones(tables, bool),
    ).tokens
    for stream in range(2):
        share = np.bincount(drawn[:, stream], minlength=4) / tables
        np.testing.assert_allclose(share, jax.nn.softmax(logits[stream]), rtol=0, atol=0.03)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.1  # streams are sampled independently


def test_sampling_depends_on_the_seed_and_not_on_other_tables(make_model):
    model = make_model(3)

    def run(seed, batch):
        return generate(
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
    mixed = generate(
        model, 6, DecodeOptions(temperature=(0.0, 50.0, 0.0), seed=1), silence_id=SILENCE
    ).read
    np.testing.assert_array_equal(mixed[0, 1, [0, 2]], greedy[0, 1, [0, 2]])
    assert mixed[0, 1, 1] != greedy[0, 1, 1]


def test_silent_rows_end_the_generation(make_model):
    model = make_model(3)
    # A negative penalty makes all rows silent.
    silent = DecodeOptions(silence_penalty=-1e4, penalty_start=0, penalty_ramp=1)

    def rows(**arguments):
        generated = generate(
            model, 9, silent, silent_rows_to_stop=3, silence_id=SILENCE, **arguments
        )
        return generated.read.shape[1]

    assert rows() == 3
    forced = np.full((9, 3), FREE)
    forced[1, 2] = 5
    assert rows(forced=forced) == 5


def test_one_call_for_all_rows_equals_single_steps(make_model):
    """Compares rows that stay on the device, with forced cells, to rows made one at a time."""
    model, rng = make_model(3), np.random.default_rng(2)
    forced = np.where(rng.random((2, 40, 3)) < 0.2, rng.integers(0, 32, (2, 40, 3)), FREE)
    at_once = generate(model, 40, WARM, forced=forced, silence_id=SILENCE, batch=2)
    stepwise = generate(
        model, 40, WARM, forced=forced, silence_id=SILENCE, batch=2, silent_rows_to_stop=40
    )
    np.testing.assert_array_equal(at_once.read, stepwise.read)
    given = np.where(forced == FREE, at_once.shown, forced)
    np.testing.assert_array_equal(at_once.shown, given)


def test_wrong_arrays_are_refused(make_model):
    model = make_model(3)
    for message, bad in {
        "forced has shape": lambda: generate(
            model, 2, forced=np.zeros((3, 3), int), silence_id=SILENCE
        ),
        "must be .tables, rows, 3.": lambda: generate(
            model, 2, prefill=np.zeros(3, int), silence_id=SILENCE
        ),
        "must be .rows, 3., with at least": lambda: generate(
            model, 2, prefill=np.zeros((2, 4), int), silence_id=SILENCE
        ),
    }.items():
        with pytest.raises(UserError, match=message):
            bad()


def test_rotary_angles_are_accurate_at_large_rows():
    """Compares with float64. The first 4096 rows equal the plain float32 formula bit by bit."""
    config = ModelConfig(head_dim=64)
    frequencies = rope_frequencies(64, config.rope_theta, config.rope_scaling)
    angles = jax.jit(lambda rows: rope_angles(rows, config))
    for row, limit in ((4095, 1e-4), (100_000, 1e-4), (1_000_000, 2e-4), (10_000_000, 1e-3)):
        exact = row * frequencies.astype(np.float64)
        for ours, right in zip(angles(np.array([[row]])), (np.cos(exact), np.sin(exact))):
            np.testing.assert_allclose(ours.ravel(), right, rtol=0, atol=limit)
    rows = np.arange(4096, dtype=np.int32)[None]
    plain = jax.jit(lambda rows: jnp.cos(rows[..., None].astype(jnp.float32) * frequencies))
    np.testing.assert_array_equal(angles(rows)[0].reshape(1, 4096, -1), plain(rows))
