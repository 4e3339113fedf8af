"""What training draws: identities of threads, and lags."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from msllm import flow
from msllm.config import ModelConfig, StreamsConfig
from msllm.decode.engine import Engine
from msllm.errors import UserError
from msllm.evals.score import score
from msllm.kernels import cpu as cpu_kernels
from msllm.model.attention import chunked
from msllm.model.attention.backend import LagChoices
from msllm.model.attention.dispatch import (
    MAX_MATRICES,
    attention,
    attention_of_draw,
    choose_backend,
    get_backend,
)
from msllm.model.attention.reference import reference_attention
from msllm.model.draws import EXAMPLES, draw
from msllm.model.model import abstract_model, bind, init_parameters
from msllm.model.relays import columns_of
from msllm.sharding import make_mesh
from msllm.streams import NEVER, StreamSpec, Visibility, make_cells
from msllm.weights.load import LoadedModel

LAGS = (
    ("thread", "input@i", "0"),
    ("thread", "thread", "1|2|5 tokens"),
    ("input", "thread@i", "1|3"),
)
GROUPS = {
    "streams.names": ("input * 2", "thread * 2"),
    "streams.kinds": ("input", "thought"),
    "streams.visibility": "isolated",
    "streams.lags": LAGS,
    "streams.identities": 5,
    "model.vocab_size": 32,
    "model.num_layers": 1,
    "data.rows": 16,
    "data.batch_size": 4,
    "steps": 100,
}
SPEC = StreamSpec.from_config(runs.make_config(**GROUPS).streams)


SEGMENT = np.repeat([[1] * 5 + [2] * 6 + [3] * 5], 4, 0)
jitted = jax.jit(draw, static_argnums=(0, 1))


def drawn(step, seed=0, spec=SPEC, segment=SEGMENT):
    return jax.tree.map(np.asarray, jitted(spec, seed, step, segment))


# Identities.


def test_identities_are_distinct_and_belong_to_an_example():
    found = np.stack([drawn(step)["identity"] for step in range(40)])  # [steps, B, T, members]
    assert found.shape == (40, 4, 16, 2) and (found[..., 0] != found[..., 1]).all()
    for number, first in ((1, 0), (2, 5), (3, 11)):
        of_example = found[:, :, SEGMENT[0] == number]
        assert (of_example == found[:, :, first : first + 1]).all()
    assert (found[:, :, 0] != found[:, :, 5]).any(-1).mean() > 0.5
    assert (found[:, 0] != found[:, 1]).any(-1).mean() > 0.5
    of_examples = found[:, :, [0, 5, 11]].reshape(-1, 2)
    # All 20 ordered pairs of 5 identities occur, and about equally often.
    counts = np.unique(of_examples @ [5, 1], return_counts=True)[1]
    assert len(counts) == 20 and counts.min() > 8 and counts.max() < 45
    np.testing.assert_array_equal(drawn(3)["identity"], found[3])
    assert (drawn(3, seed=1)["identity"] != found[3]).any()
    many = drawn(0, segment=np.arange(1, 2 * EXAMPLES + 1)[None])["identity"][0]
    np.testing.assert_array_equal(many[:EXAMPLES], many[EXAMPLES:])


@functools.cache
def model_of(spec=SPEC):
    config = runs.make_config(**GROUPS).model
    parameters = init_parameters(config, SPEC, 0)
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)]
    return LoadedModel(config, spec, jax.tree.unflatten(tree, noisy))


@functools.cache
def compiled(spec):
    model = model_of()
    bound = bind(abstract_model(model.config, spec)[0], model.parameters)
    return jax.jit(lambda tables: bound.read(tables, 1, get_backend("reference")))


def hidden(spec, tables):
    with jax.default_matmul_precision("highest"):
        return np.asarray(compiled(spec)(tables))


def tables_of(seed=0, batch=2):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 6, (batch, 16, 4)).astype(np.int32)
    segment = np.repeat([[1] * 8 + [2] * 8], batch, 0).astype(np.int32)
    return {"tokens": tokens, "present": np.ones(tokens.shape, bool), "segment": segment}


def test_packed_examples_with_identities_equal_the_same_alone():
    """Relays compute a token once per column, and the identity changes between examples."""
    tables = tables_of()
    identity = np.where(tables["segment"][..., None] == 1, [0, 1], [4, 2]).astype(np.int32)
    packed = hidden(SPEC, {**tables, "identity": identity})
    for rows in (slice(0, 8), slice(8, 16)):
        alone = {name: x[:, rows] for name, x in {**tables, "identity": identity}.items()}
        found = hidden(SPEC, alone | {"segment": np.ones_like(alone["segment"])})
        np.testing.assert_allclose(packed[:, rows], found, rtol=0, atol=5e-6)
    plain = hidden(SPEC, {**tables, "identity": np.broadcast_to(np.int32([0, 1]), identity.shape)})
    np.testing.assert_array_equal(hidden(SPEC, tables), plain)  # nothing drawn: 0, 1, ...
    assert np.abs(packed - plain)[:, 8:, 2:].max() > 1e-2


# Lags.


def with_lags(*lags):
    return StreamSpec.from_config(
        dataclasses.replace(runs.make_config(**GROUPS).streams, lags=lags)
    )


STATIC = dataclasses.replace(get_backend("chunked"), traced_lag=False)  # as a TPU's
BACKENDS = ["reference", "chunked", STATIC] + ["cpu"] * (cpu_kernels.unavailable_reason() is None)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_by_a_drawn_lag_is_attention_by_that_lag(backend, apart):
    """Outputs and gradients: if lags are traced, and if a kernel is compiled for each matrix."""
    backend = get_backend(backend) if isinstance(backend, str) else backend
    lag = np.full((4, 4), NEVER, np.int32) if apart else np.ones((4, 4), np.int32)
    lag[np.arange(3), np.arange(3)] = 1
    lag[:, 3] = [0, 1, NEVER, NEVER]  # column 3 is a relay
    tokens_edge, latent_edge = np.zeros((2, 4, 4), bool)
    tokens_edge[0, 3] = latent_edge[1, 2] = True
    drawn = ((tokens_edge, (0, 2, 5)), *[(latent_edge, (1, 3))] * (not apart))
    choices = LagChoices(lag, drawn)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 9, n, 2, 8)).astype(np.float32) for n in (3, 4, 4))
    present, segment = rng.random((2, 9, 4)) < 0.8, np.repeat([[1] * 6 + [2] * 3], 2, 0)
    key_cells = make_cells(present, segment)
    cells = make_cells(present[..., :3], segment)

    def loss(qkv, draw, attend):
        def one(q, k, v, lag, traced_lag=None):
            return attention(
                q, k, v, cells, lag, attend, key_cells=key_cells, traced_lag=traced_lag
            )

        out = attention_of_draw(choices, draw, attend, one, *qkv)
        return (jnp.sin(out) * present[..., :3, None, None]).sum()

    policy = jax.checkpoint_policies.save_only_these_names("attention")
    with jax.default_matmul_precision("highest"):
        found = jax.jit(
            jax.value_and_grad(
                jax.checkpoint(lambda qkv, draw: loss(qkv, draw, backend), policy=policy)
            )
        )
        values = set()
        for number, matrix in enumerate(choices.matrices()):
            places = np.unravel_index(number, [len(values) for _, values in drawn])
            value, gradients = found((q, k, v), jnp.int32(places))
            fixed = choices._replace(lag=matrix, drawn=())
            mask = Visibility(cells, key_cells, matrix, np.arange(3))

            def plain(qkv, mask=mask):
                out = reference_attention(*qkv, mask)
                return (jnp.sin(out) * present[..., :3, None, None]).sum()

            assert fixed.num_matrices == 1
            expected, other = jax.value_and_grad(plain)((q, k, v))
            assert value == pytest.approx(float(expected), rel=1e-5)
            for one, two in zip(gradients, other):
                np.testing.assert_allclose(one, two, rtol=0, atol=2e-5)
            values.add(round(float(value), 4))
        assert len(values) == choices.num_matrices


def test_a_drawn_lag_of_a_model_is_that_lag():
    tables = tables_of(1)
    for places, tokens, latent in (([2, 1], 5, 3), ([1, 0], 2, 1)):
        found = hidden(SPEC, {**tables, "lag_draw": np.int32([places] * 2)})
        fixed = with_lags(
            LAGS[0], ("thread", "thread", f"{tokens} tokens"), ("input", "thread@i", f"{latent}")
        )
        np.testing.assert_allclose(found, hidden(fixed, tables), rtol=0, atol=1e-5)
    assert np.abs(hidden(SPEC, tables) - found).max() > 1e-3


def test_one_draw_for_each_setting_and_step():
    assert [(x.medium, x.values, len(x.edges)) for x in SPEC.drawn_lags] == [
        ("tokens", (1, 2, 5), 2),
        ("latent", (1, 3), 2),
    ]
    found = np.stack([drawn(step)["lag_draw"] for step in range(60)])  # [steps, B, draws]
    assert (found == found[:, :1]).all()
    pairs, counts = np.unique(found[:, 0], axis=0, return_counts=True)
    assert len(pairs) == 6 and counts.min() >= 3
    # Settings that come later take edges away.
    later = with_lags(*LAGS, ("thread.0", "thread.1", "never"), ("input", "thread", "1"))
    (only,) = later.drawn_lags
    assert only.edges == ((3, 2),) and later.token_lag_array[2, 3] == NEVER
    assert set(draw(with_lags(LAGS[0]), 0, jnp.int32(0), np.ones((1, 4), np.int32))) == {"identity"}


def test_the_choices_are_numbered_like_their_matrices():
    choices = columns_of(SPEC, 2).lag_choices
    matrices = list(choices.matrices())
    assert choices.num_matrices == len(matrices) == 6
    for a in range(3):
        for b in range(2):
            places = jnp.int32([a, b])
            expected = matrices[int(choices.number(places))]
            np.testing.assert_array_equal(choices.matrix(places), expected)
    np.testing.assert_array_equal(choices.largest(), np.max(matrices, axis=0))
    np.testing.assert_array_equal(choices.lag, matrices[0])


def test_backends_that_compile_lags_in_take_few_matrices(monkeypatch):
    config, mesh = (
        ModelConfig(attention="chunked"),
        make_mesh(runs.make_config().mesh, jax.devices()[:1]),
    )
    pairs = np.eye(2, dtype=bool)
    few = LagChoices(np.ones((2, 2), np.int32), ((pairs, tuple(range(MAX_MATRICES))),))
    many = few._replace(drawn=(*few.drawn, (~pairs, (1, 2))))
    assert choose_backend(config, many, 8, mesh).name == "chunked"
    picky = dataclasses.replace(
        STATIC, declines=lambda case: "no lag 7" if (case.lag == 7).any() else None
    )
    monkeypatch.setattr(chunked, "BACKEND", STATIC)
    assert choose_backend(config, few, 8, mesh).name == "chunked"
    with pytest.raises(UserError, match="at most 16, and config.streams.lags gives 32"):
        choose_backend(config, many, 8, mesh)
    monkeypatch.setattr(chunked, "BACKEND", picky)
    with pytest.raises(UserError, match="no lag 7"):
        choose_backend(config, few, 8, mesh)


def train_steps(program, state=None, steps=3):
    """The states and metrics after some steps on the same batch."""
    batch = runs.place(program, runs.random_tables(program.config))
    state = program.init() if state is None else state
    found = []
    for _ in range(steps):
        state, metrics = program.step(state, batch)
        copy = jax.tree.map(np.asarray, state)
        found.append((copy, {name: float(metrics[name]) for name in ("loss", "gradient_norm")}))
    return found


def test_draws_depend_on_the_step_and_not_on_the_mesh(compile_fast):
    # Without relays, which compile for longer.
    latent = {**GROUPS, "streams.lags": (LAGS[0], ("thread", "thread", "1|2|5"), LAGS[2])}
    program = runs.make_program(runs.make_config(**latent), 1)
    unsharded = train_steps(program)
    # A run that continues draws what it would have drawn.
    state = jax.tree.map(jax.device_put, unsharded[0][0], program.state_shardings)
    assert train_steps(program, state, 2)[1][1] == unsharded[2][1]
    # The same parameters and tables have another loss in another step.
    other = train_steps(program, program.init()._replace(step=jnp.int32(5)), 1)
    assert abs(other[0][1]["loss"] - unsharded[0][1]["loss"]) > 1e-5
    fields = {"model.kv_ring": True, "optim.accumulate": 2}
    sharded = runs.make_program(runs.make_config(**latent, **fields), 4, data=2, stream=2)
    for (_, found), (_, expected) in zip(train_steps(sharded), unsharded):
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=3e-5), name


def test_evaluation_and_decoding_take_the_first_lag():
    model, tables = model_of(), tables_of(2, batch=1)
    tables["segment"] = np.ones_like(tables["segment"])
    first = model.with_streams(
        lags=(LAGS[0], ("thread", "thread", "1 tokens"), ("input", "thread@i", "1"))
    )
    expected = score(first, tables, 1).logits
    np.testing.assert_array_equal(score(model, tables, 1).logits, expected)
    engine = Engine(model, window=16, all_logits=True, silence_id=1)
    session = engine.open()
    for stream, tokens in zip(SPEC.names, tables["tokens"][0].T):
        session.force(stream, tokens.tolist())
    session.step()
    for row in range(9):
        found = session.step().logits
        np.testing.assert_allclose(found, expected[0, row], rtol=0, atol=2e-5)


def test_the_certificate_takes_the_smallest_lag():
    spec = with_lags(("thread", "thread", "4|2|3 tokens"), ("input", "thread@i", "3|1"))
    least = with_lags(("thread", "thread", "2 tokens"), ("input", "thread@i", "1"))
    assert spec.lag_array[0, 2] == 3 and spec.with_least_lags() == least
    assert flow.certificate(spec, 32) == flow.certificate(least, 32)
    assert flow.certificate(spec, 32).flow("thread.0", "thread.1").rows == 2


@pytest.mark.parametrize("value", ["1|", "|2", "1|x", "1|never", "1|2 text", f"1|{NEVER}", "1 | 2"])
def test_bad_draws_are_refused(value):
    with pytest.raises(UserError, match="config.streams.lags holds lag"):
        with_lags(("thread", "thread", value))


def test_streams_without_groups_may_draw_lags():
    streams = StreamsConfig(("a", "b"), ("input", "output"), lags=(("b", "a", "1|2"),))
    spec = StreamSpec.from_config(streams)
    assert set(drawn(0, spec=spec)) == {"lag_draw"}
    assert spec.num_classes == 2 and spec.lag_array[1, 0] == 1
