"""Streams that follow from several streams: mixtures and products, in all that uses them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import SILENCE, four_streams, make_program, place, random_tables

from msllm.combine import Combine
from msllm.config import LossConfig, StreamsConfig
from msllm.decode.engine import DecodeOptions, Engine
from msllm.errors import UserError
from msllm.evals import adaptive
from msllm.evals.ablate import hide
from msllm.evals.score import likelihood, score
from msllm.flow import certificate
from msllm.loss import mixture_loss, targets_and_weights
from msllm.model.combine import next_logits
from msllm.model.model import bind, init_parameters
from msllm.streams import NEVER, StreamSpec
from msllm.weights.convert import to_hf
from msllm.weights.load import LoadedModel
from msllm.weights.warm_start import initial_parameters, write_model

pytestmark = pytest.mark.usefixtures("compile_fast")
BOTH = (("thought", "product", "user, thought"), ("output", "mixture", "thought, output, user"))


@pytest.mark.parametrize("chunk, parts", [(7, 1), (1000, 3)])
def test_the_loss_of_a_mixture_and_its_gradients_equal_the_definition(chunk, parts):
    rng = np.random.default_rng(0)
    shape, sources, width, vocab = (2, 5), 3, 8, 12
    hidden = jnp.float32(rng.normal(size=(*shape, sources, width)))
    log_weights = jax.nn.log_softmax(jnp.float32(rng.normal(size=(*shape, sources))))
    log_weights = log_weights.at[0, 0, 1].set(-1e30)
    head = jnp.float32(rng.normal(size=(vocab, width)))
    targets = jnp.int32(rng.integers(0, vocab, shape))
    weights = jnp.float32(rng.random(shape) * (rng.random(shape) < 0.7))

    @jax.jit
    def dense(hidden, log_weights, head):
        log_p = jax.nn.log_softmax(hidden @ head.T)
        mixed = jax.nn.logsumexp(log_weights[..., None] + log_p, axis=-2)
        nll = -jnp.take_along_axis(mixed, targets[..., None], -1)[..., 0]
        return jnp.sum(weights * nll), nll

    options = LossConfig(chunk_tokens=chunk, vocab_chunks=parts)

    @jax.jit
    def ours(*arrays):
        return mixture_loss(*arrays, targets, weights, options)

    arrays = hidden, log_weights, head
    np.testing.assert_allclose(ours(*arrays)[1], dense(*arrays)[1], rtol=1e-5)

    def twice(loss):
        return jax.value_and_grad(
            lambda *arrays: (2 * loss(*arrays)[0], loss(*arrays)[1]), (0, 1, 2), has_aux=True
        )

    (loss, nll), found = twice(ours)(*arrays)
    (value, each), expected = twice(dense)(*arrays)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    np.testing.assert_allclose(nll, each, rtol=1e-5)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)


def defined(model, tables):
    """The log-probabilities [B, T, S, V] of the next tokens by the definition, in NumPy."""
    bound = bind(model.graph, model.parameters)
    segment = np.ones(tables["tokens"].shape[:2], np.int32)
    hidden = np.asarray(bound.read({**tables, "segment": segment}, 3))
    head, weights = np.asarray(bound.head_table()), model.parameters["combine"]
    up, up_bias, down, down_bias = (
        np.asarray(weights[name]) for name in ("up", "up_bias", "down", "down_bias")
    )
    part = model.streams.combine_smoothing
    result, pair = log_softmax(hidden @ head.T), 0
    for number, rule in enumerate(model.streams.combine):
        pairs = range(pair, pair + len(rule.sources))
        pair += len(rule.sources)
        for row in np.ndindex(hidden.shape[:2]):
            there = [
                (s, one) for s, one in zip(rule.sources, pairs) if tables["present"][(*row, s)]
            ]
            if not there:
                continue
            states = np.array([hidden[(*row, s)] for s, _ in there])
            x = sum(state @ up[one] for state, (_, one) in zip(states, there)) + up_bias[number]
            x = x / (1 + np.exp(-x))
            w = np.exp(log_softmax(np.array([x @ down[one] + down_bias[one] for _, one in there])))
            w = (1 - part) * w + part / len(there)
            each = log_softmax(states @ head.T)
            log_p = np.log(w @ np.exp(each)) if rule.mode == "mixture" else log_softmax(w @ each)
            result[(*row, rule.stream)] = log_p
    return result


def log_softmax(x):
    x = np.float64(x) - np.max(x, axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


PRODUCTS = (("thought", "product", "user, thought"), ("output", "product", "thought, user"))


@pytest.mark.parametrize("combine, smoothing", [(BOTH, 0.0), (PRODUCTS, 0.3)])
def test_the_prediction_is_that_of_the_definition(make_model, combine, smoothing):
    """Also where some or all sources are absent. An absent one has no influence at all."""
    model = make_model(combine=combine, num_layers=1).with_streams(combine_smoothing=smoothing)
    rng = np.random.default_rng(0)
    tokens, present = rng.integers(0, 32, (2, 6, 3)), rng.random((2, 6, 3)) < 0.5
    tables = {"tokens": np.int32(tokens * present), "present": present}
    assert (~present[..., :2]).all(-1).any() and (~present).all(-1).any()
    logits = score(model, tables, 3).logits
    np.testing.assert_allclose(log_softmax(logits), defined(model, tables), atol=1e-5)


@pytest.mark.parametrize(
    "combine",
    [BOTH, (("output", "mixture", "thought,user"), ("thought", "mixture", "output"))],
)
def test_the_probabilities_of_all_tables_sum_to_one(make_model, combine):
    model = make_model(combine=combine, vocab_size=3, num_layers=1)
    rows, names = 3, ("thought", "output")
    cells = list(itertools.product(range(3), repeat=(rows - 1) * len(names)))
    tokens = np.zeros((len(cells), rows, 3), np.int32)
    tokens[:, 1:, 1:] = np.reshape(cells, (-1, rows - 1, len(names)))
    tokens[:, :, 0] = (1, 0, 2)  # the input is given
    present = np.ones(tokens.shape, bool)
    present[:, 1, 0] = False  # a source may be absent
    logprob = likelihood(model, {"tokens": tokens, "present": present}, 0).logprob
    total = np.exp(np.float64(logprob[:, : rows - 1, 1:]).sum((1, 2))).sum()
    assert total == pytest.approx(1, abs=1e-5)
    if combine is not BOTH:
        return
    logits = score(model, {"tokens": tokens, "present": present}, 0).logits
    chosen = jax.nn.log_softmax(logits[:, :-1])
    chosen = np.take_along_axis(np.asarray(chosen), tokens[:, 1:, :, None], -1)[..., 0]
    np.testing.assert_allclose(logprob[:, :-1, 1:], chosen[..., 1:], atol=1e-5)


def test_the_gradients_of_a_step_equal_those_of_all_logits():
    config = four_streams(**{"streams.combine": BOTH, "streams.visibility": "isolated"})
    program = make_program(config)
    parameters = program.init().parameters
    batch = place(program, random_tables(config))

    def dense(parameters):
        model = bind(program.graph, parameters)
        hidden = model.read(batch, SILENCE, program.backend)
        logits = next_logits(model, hidden, model.cells(batch, SILENCE).present)
        targets, _, weights = targets_and_weights(batch, program.streams.loss_weights)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return -jnp.sum(weights * chosen) / weights.sum()

    found, loss, sums = jax.jit(program._gradients)(parameters, batch)
    value, expected = jax.jit(jax.value_and_grad(dense))(parameters)
    assert float(loss) == pytest.approx(float(value), abs=1e-5)
    leaves = jax.tree_util.tree_leaves_with_path(expected)
    for (path, theirs), ours in zip(leaves, jax.tree.leaves(found), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6, err_msg=name)
        assert np.any(theirs), name
    # What is reported of a mixture is its loss as well.
    total = sums["nll"].sum() / sums["targets"].sum()
    assert float(total) == pytest.approx(float(value), abs=1e-5)


COPIES = StreamsConfig(
    names=("text", "copy1", "copy2"),
    kinds=("output", "input", "input"),
    visibility="isolated",
    mail=(("copy1", "text", "0", "0:"), ("copy2", "text", "0", "0:")),
)


def parallel(make_model, mode, **settings):
    """Three streams that read the same text and predict it together, as in ParScale."""
    spec = StreamSpec.from_config(
        dataclasses.replace(COPIES, combine=(("text", mode, "text,copy1,copy2"),))
    )
    model = make_model(3, combine=(("output", mode, "user,thought,output"),), **settings)
    return dataclasses.replace(model, streams=spec)


@pytest.mark.parametrize("mode", ["mixture", "product"])
def test_parallel_copies_of_a_text(make_model, mode):
    """All texts sum to one; decoding feeds the token to every copy and equals the forward pass."""
    model = parallel(make_model, mode, vocab_size=4)
    texts = np.array([(0, *rest) for rest in itertools.product(range(4), repeat=3)], np.int32)
    tables = {"tokens": np.repeat(texts[:, :, None], 3, axis=2)}
    logprob = likelihood(model, tables, 3).logprob[:, :-1, 0]
    assert np.exp(np.float64(logprob).sum(1)).sum() == pytest.approx(1, abs=1e-5)
    # Every copy matters: without one, or with a copy that reads something else, it is another text.
    for stream in (1, 2):
        changed = tables["tokens"].copy()
        changed[:, 1:, stream] = (changed[:, 1:, stream] + 1) % 4
        other = likelihood(model, {"tokens": changed}, 3).logprob[:, 1, 0]
        assert not np.allclose(other, logprob[:, 1], atol=1e-3)

    if mode == "product":  # tests/test_decode.py decodes it
        return
    options = DecodeOptions(temperature=1.0, seed=3)
    engine = Engine(model, sessions=2, window=32, silence_id=3)
    session = engine.open(options)
    shown = [session.step() for _ in range(3)] + session.run(10)
    fork, snapshot = session.fork(), session.snapshot()
    session.close()
    other = engine.restore(snapshot)
    more = fork.run(5)
    np.testing.assert_array_equal([row.tokens for row in other.run(5)], [r.tokens for r in more])
    tokens = fork.transcript().tokens
    assert (tokens == tokens[:, :1]).all() and len(set(tokens[:, 0])) > 2
    expected = likelihood(model, {"tokens": tokens[None]}, 3).logprob[0, :-1, 0]
    found = [row.logprob[0] for row in [*shown, *more]][1:]
    np.testing.assert_allclose(found, expected, atol=1e-5)


GROUP = StreamsConfig(
    names=("user", "thread * 2", "output"),
    kinds=("input", "thought", "output"),
    visibility="isolated",
    combine=(("output", "mixture", "thread, output"),),
)


@pytest.mark.parametrize("mode", ["mixture", "product"])
def test_a_group_of_threads_as_a_source(make_model, mode):
    """Its members are interchangeable, and their number may be another one."""
    config = dataclasses.replace(GROUP, combine=(("output", mode, "thread, output"),))
    sizes = make_model(3, num_layers=1).config
    spec = StreamSpec.from_config(config)
    parameters = init_parameters(sizes, spec, 1)
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [x + 0.5 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves)]
    model = LoadedModel(sizes, spec, jax.tree.unflatten(tree, noise))
    assert parameters["combine"]["up"].shape[0] == 2 and "own" in parameters["combine"]

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (1, 5, 6))
    more = model.with_threads(4)
    logits = score(more, {"tokens": tokens}, 3).logits[0, :, 5]
    moved = score(more, {"tokens": tokens[:, :, [0, 3, 1, 4, 2, 5]]}, 3).logits[0, :, 5]
    np.testing.assert_allclose(moved, logits, atol=1e-5)
    # Members that are absent have no part: four of which two are absent are two.
    present = np.ones(tokens.shape, bool)
    present[:, :, 3:5] = False
    four = score(more, {"tokens": tokens, "present": present}, 3).logits[0, :, [0, 1, 2, 5]]
    two = score(model, {"tokens": tokens[:, :, [0, 1, 2, 5]]}, 3).logits[0].swapaxes(0, 1)
    np.testing.assert_allclose(four, two, atol=1e-5)
    # And members differ by what they hold.
    same = tokens.copy()
    same[:, :, 2] = same[:, :, 1]
    assert not np.allclose(score(more, {"tokens": same}, 3).logits[0, :, 5], logits, atol=1e-3)


def test_packed_examples_equal_the_same_examples_alone(make_model):
    model = make_model(combine=BOTH, num_layers=1)
    rng = np.random.default_rng(0)
    tokens, segment = rng.integers(0, 32, (1, 8, 3)), np.repeat([[1, 2]], 4, axis=1)
    packed = likelihood(model, {"tokens": tokens, "segment": segment}, 3).logprob[0]
    for rows in (slice(0, 4), slice(4, 8)):
        alone = likelihood(model, {"tokens": tokens[:, rows]}, 3).logprob[0]
        np.testing.assert_allclose(packed[rows], alone, atol=1e-5)


def test_what_the_certificate_excludes_changes_no_bit(make_model):
    """A source influences what the stream says in the same row, but not its hidden states."""
    combine = (("output", "mixture", "tool,output"), ("thought", "product", "tool,system"))
    lags = (("system", "output", "0"), ("user", "thought", "2 tokens"))
    model = make_model(5, visibility="isolated", lags=lags, combine=combine)
    found = certificate(model.streams, 32, generated=False)
    assert str(found.flow("tool", "output")) == "latent, 0 rows"
    assert found.flow("output", "thought").path == ("output", "system", "thought")
    assert found.flow("tool", "system") is None  # although the system sees the output's states
    generated = certificate(model.streams, 32).flow("tool", "system")
    assert (generated.medium, generated.rows, generated.cut) == ("tokens", 1, ("output",))
    rng = np.random.default_rng(0)
    tokens, first = rng.integers(4, 32, (1, 6, 5)), 2
    logits = score(model, {"tokens": tokens}, 3).logits
    for source, row in enumerate(found.flows):
        changed = tokens.copy()
        changed[0, first, source] = 4 + (changed[0, first, source] - 3) % 28
        differs = (score(model, {"tokens": changed}, 3).logits != logits).any(-1)[0]
        for reader, flow in enumerate(row):
            if reader != source:
                begin = 6 if flow is None else first + flow.rows
                assert not differs[:begin, reader].any()
                assert begin == 6 or differs[begin, reader]


REFUSED = [
    ({"combine": (("x", "mixture", "a"),)}, "names 'x': the streams are a, b, out"),
    ({"combine": (("out", "mixture", "a,x"),)}, "names 'x'"),
    ({"combine": (("out", "attend", "a"),)}, "the mode 'attend': must be one of own, mixture, pro"),
    ({"combine": (("out", "own", "a"),)}, "the mode own with sources 'a': leave"),
    ({"combine": (("out", "mixture", ""),)}, "the sources '': must be one or more"),
    ({"combine": (("out", "product", "a,a"),)}, "the sources 'a,a': must be one or more"),
    ({"combine": (("a", "mixture", "b"),)}, "'a', which is of kind input: inputs are given"),
    ({"combine": (("out", "own", ""), ("out", "mixture", "a"))}, "names 'out' twice"),
    (
        {"combine": (("out", "mixture", "a,b"),), "lags": (("out", "b", "never"),)},
        r"follow from the hidden states of 'b', and config.streams.lags lists the edge as 'never': "
        r"remove the source, or list the edge as latent, such as \('out', 'b', '1'\)",
    ),
    (
        {"combine": (("out", "product", "b"),), "lags": (("out", "b", "1 tokens"),)},
        "lists the edge as '1 tokens'",
    ),
    (
        {"names": ("a", "b * 2", "out"), "combine": (("out", "mixture", "b"),)}
        | {"lags": (("out", "b@1", "never"),)},
        "from the hidden states of 'b.1', and config.streams.lags lists the edge as 'never'",
    ),
    (
        {"combine": (("out", "mixture", "out,a"),), "visibility_medium": "tokens"},
        "of 'a', and config.streams.visibility_medium=tokens",
    ),
]


@pytest.mark.parametrize("fields, message", REFUSED)
def test_rules_that_are_refused(fields, message):
    given = {"names": ("a", "b", "out"), "kinds": ("input", "input", "output")} | fields
    with pytest.raises(UserError, match=message):
        StreamSpec.from_config(StreamsConfig(**given))


def test_a_prediction_sees_in_time_what_its_sources_see():
    streams = StreamsConfig(
        names=("a", "b", "out"),
        kinds=("input", "input", "output"),
        visibility="isolated",
        lags=(("b", "a", "2"),),
        combine=(("out", "mixture", "b"),),
    )
    spec = StreamSpec.from_config(streams)
    assert spec.prediction_lag_array.tolist() == [[1, NEVER, NEVER], [2, 1, NEVER], [2, 0, NEVER]]
    plain = dataclasses.replace(spec, combine=())
    np.testing.assert_array_equal(plain.prediction_lag_array, spec.nearest_lag_array)


def test_a_rule_of_mode_own_changes_nothing():
    streams = StreamsConfig(names=("a", "b"), kinds=("input", "output"))
    own = dataclasses.replace(streams, combine=(("b", "own", ""),))
    assert StreamSpec.from_config(own) == StreamSpec.from_config(streams)
    latent = dataclasses.replace(
        streams,
        visibility_medium="tokens",
        lags=(("b", "a", "1"),),
        combine=(("b", "mixture", "b, a"),),
    )
    assert StreamSpec.from_config(latent).combine == (Combine(1, "mixture", (1, 0)),)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("loss.objective", "a:b"),
        ("loss.label_smoothing", 0.1),
        ("loss.z_loss", 0.1),
        ("penalty.function", "a:b"),
        ("streams.combine_smoothing", 1.0),
    ],
)
def test_settings_that_do_not_go_with_a_mixture(setting, value):
    with pytest.raises(UserError, match=f"config.{setting} is {value!r}: "):
        four_streams(**{"streams.combine": (("output", "mixture", "tool"),), setting: value})


def test_what_needs_the_logits_of_one_hidden_state_is_refused(make_model, tmp_path):
    model = make_model(combine=BOTH)
    with pytest.raises(UserError, match="combine predicts thought, output from several streams"):
        adaptive.search(model, [adaptive.Target(np.zeros((2, 3)), [(0, 0)], [(1, 2)])])
    with pytest.raises(UserError, match="'user' cannot be hidden: .*predicts 'thought' from it"):
        hide(model, "user")
    config = four_streams(**{"streams.combine": (("output", "mixture", "tool"),)})
    spec = StreamSpec.from_config(config.streams)
    write_model(tmp_path / "model", config, init_parameters(config.model, spec, 0), None)
    with pytest.raises(UserError, match="no Hugging Face family predicts a stream from several"):
        to_hf(tmp_path / "model", tmp_path / "out")


def test_a_run_may_start_from_a_model_without_rules(tmp_path):
    old = four_streams()
    spec = StreamSpec.from_config(old.streams)
    write_model(tmp_path / "old", old, init_parameters(old.model, spec, 1), None)
    program = make_program(four_streams(**{"streams.combine": BOTH}))
    found = initial_parameters(tmp_path / "old", program, None)
    np.testing.assert_array_equal(
        found["embedding"], init_parameters(old.model, spec, 1)["embedding"]
    )
    assert np.any(found["combine"]["up"])
    new = program.config
    write_model(tmp_path / "new", new, found, None)
    same = initial_parameters(tmp_path / "new", program, None)
    np.testing.assert_array_equal(same["combine"]["up"], found["combine"]["up"])
    other = make_program(four_streams(**{"streams.combine": (("output", "mixture", "tool"),)}))
    with pytest.raises(UserError, match=r"combine has the \(stream, source\) pairs"):
        initial_parameters(tmp_path / "new", other, None)
