"""Streams that follow from several streams: mixtures and products, in all that uses them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import SILENCE, four_streams, make_program, place, random_tables

from msllm.config import LossConfig
from msllm.evals.score import likelihood, score
from msllm.loss import mixture_loss, targets_and_weights
from msllm.model.combine import next_logits
from msllm.model.model import bind

pytestmark = pytest.mark.usefixtures("compile_fast")
BOTH = (("thought", "product", "user, thought"), ("output", "mixture", "thought, output, user"))


@pytest.mark.parametrize("chunk, parts", [(7, 1), (1000, 3), (2, 1)])
def test_the_loss_of_a_mixture_and_its_gradients_equal_the_definition(chunk, parts):
    rng = np.random.default_rng(0)
    shape, sources, width, vocab = (2, 5), 3, 8, 12
    hidden = jnp.float32(rng.normal(size=(*shape, sources, width)))
    log_weights = jax.nn.log_softmax(jnp.float32(rng.normal(size=(*shape, sources))))
    log_weights = log_weights.at[0, 0, 1].set(-1e30)
    head = jnp.float32(rng.normal(size=(vocab, width)))
    targets = jnp.int32(rng.integers(0, vocab, shape))
    weights = jnp.float32(rng.random(shape) * (rng.random(shape) < 0.7))

    def dense(hidden, log_weights, head):
        log_p = jax.nn.log_softmax(hidden @ head.T)
        mixed = jax.nn.logsumexp(log_weights[..., None] + log_p, axis=-2)
        nll = -jnp.take_along_axis(mixed, targets[..., None], -1)[..., 0]
        return jnp.sum(weights * nll), nll

    options = LossConfig(chunk_tokens=chunk, vocab_chunks=parts)

    def ours(*arrays):
        return mixture_loss(*arrays, targets, weights, options)

    arrays = hidden, log_weights, head
    np.testing.assert_allclose(ours(*arrays)[1], dense(*arrays)[1], rtol=1e-5)
    (loss, nll), found = jax.value_and_grad(ours, (0, 1, 2), has_aux=True)(*arrays)
    (value, each), expected = jax.value_and_grad(dense, (0, 1, 2), has_aux=True)(*arrays)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    np.testing.assert_allclose(nll, each, rtol=1e-5)
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "combine",
    [
        BOTH,
        (("output", "mixture", "thought,user"), ("thought", "mixture", "output")),
        (("output", "product", "thought,user"),),
    ],
)
def test_the_probabilities_of_all_tables_sum_to_one(make_model, combine):
    model = make_model(combine=combine, vocab_size=3)
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
    logits = score(model, {"tokens": tokens, "present": present}, 0).logits
    chosen = jax.nn.log_softmax(logits[:, :-1])
    chosen = np.take_along_axis(np.asarray(chosen), tokens[:, 1:, :, None], -1)[..., 0]
    np.testing.assert_allclose(logprob[:, :-1, 1:], chosen[..., 1:], atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_gradients_of_a_step_equal_those_of_all_logits(parts):
    config = four_streams(
        **{"streams.combine": BOTH, "loss.vocab_chunks": parts, "streams.visibility": "isolated"}
    )
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
