"""The next-row loss: its value, its custom gradient in chunks, its options, its targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msllm.config import LossConfig
from msllm.loss import next_row_loss, targets_and_weights

B, T, S, D, V = 2, 5, 3, 8, 12
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2},
    "z": {"z_loss": 0.1},
    "both": {"label_smoothing": 0.1, "z_loss": 0.05},
}


def inputs(seed=0, scale=1.0):
    """hidden [B, T, S, D], table [V, D], targets [B, T, S], weights [B, T, S] with zeros."""
    rng = np.random.default_rng(seed)
    weights = rng.random((B, T, S)) * (rng.random((B, T, S)) < 0.7)
    hidden, table = scale * rng.normal(size=(B, T, S, D)), rng.normal(size=(V, D))
    return (
        jnp.float32(hidden),
        jnp.float32(table),
        jnp.int32(rng.integers(0, V, (B, T, S))),
        jnp.float32(weights),
    )


def dense(hidden, table, targets, weights, options):
    """The definition of the loss, with all logits in memory."""
    logits = hidden @ table.T
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    smooth = options.label_smoothing
    loss = (
        (1 - smooth) * nll
        - smooth * log_p.mean(-1)
        + options.z_loss * jax.nn.logsumexp(logits, -1) ** 2
    )
    return jnp.sum(weights * loss), nll


@pytest.mark.parametrize("chunk, parts", [(7, 1), (1000, 1), (7, 3), (1000, 4)])
@pytest.mark.parametrize("name", OPTIONS)
def test_value_and_gradients_equal_the_definition(name, chunk, parts):
    options = LossConfig(chunk_tokens=chunk, vocab_chunks=parts, **OPTIONS[name])
    arguments = inputs()

    def run(f):
        return jax.value_and_grad(lambda *xs: f(*xs, options), (0, 1), has_aux=True)(*arguments)

    (loss, nll), gradients = run(next_row_loss)
    (expected, expected_nll), expected_gradients = run(dense)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    value = next_row_loss(*arguments, options)  # a separate code path computes no gradient
    np.testing.assert_allclose(value[0], loss, rtol=1e-6)


def test_the_gradient_scales_with_the_incoming_gradient():
    arguments = inputs()

    def gradient(factor):
        def loss(hidden):
            return factor * next_row_loss(hidden, *arguments[1:], LossConfig())[0]

        return jax.grad(loss)(arguments[0])

    np.testing.assert_allclose(gradient(-3.0), -3.0 * gradient(1.0), rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 3])
def test_large_logits_do_not_overflow(parts):
    arguments, options = inputs(scale=1e4), LossConfig(chunk_tokens=7, vocab_chunks=parts)
    (loss, nll), gradient = jax.value_and_grad(next_row_loss, has_aux=True)(*arguments, options)
    np.testing.assert_allclose(loss, dense(*arguments, LossConfig())[0], rtol=1e-5)
    assert np.isfinite(nll).all() and np.isfinite(gradient).all()


def test_cells_without_weight_have_no_gradient():
    hidden, table, targets, weights = inputs()
    gradient = jax.grad(
        lambda h: next_row_loss(h, table, targets, weights, LossConfig(z_loss=0.1))[0]
    )(hidden)
    np.testing.assert_array_equal(np.any(np.asarray(gradient), axis=-1), np.asarray(weights) > 0)


def test_bfloat16_sums_in_float32():
    hidden, table, targets, weights = inputs()
    half = hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16)
    run = jax.value_and_grad(next_row_loss, (0, 1), has_aux=True)
    (loss, nll), gradients = run(*half, targets, weights, LossConfig())
    assert loss.dtype == nll.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2
    exact = dense(
        half[0].astype(jnp.float32), half[1].astype(jnp.float32), targets, weights, LossConfig()
    )[0]
    np.testing.assert_allclose(loss, exact, rtol=1e-3)


def test_targets_and_weights():
    tokens = np.arange(2 * 4 * 2).reshape(2, 4, 2)
    present = np.ones((2, 4, 2), bool)
    present[0, 2, 1] = False
    batch = {
        "tokens": tokens,
        "present": present,
        "segment": np.array([[1, 1, 2, 2], [1, 1, 1, 0]]),
    }
    targets, counted, weights = targets_and_weights(batch, (0.0, 2.0))
    np.testing.assert_array_equal(targets[:, :-1], tokens[:, 1:])
    expected = np.zeros((2, 4, 2), bool)
    expected[0, 0] = True  # the row after row 1 belongs to another segment
    expected[0, 2] = (True, False)  # an absent cell predicts nothing
    expected[1, :2] = True  # the row after row 2 is empty
    np.testing.assert_array_equal(counted, expected)
    np.testing.assert_array_equal(weights, expected * np.array([0.0, 2.0]))
    masked = targets_and_weights(batch, (1.0, 2.0), np.arange(4)[:, None] >= 1)[1]
    np.testing.assert_array_equal(masked, expected & (np.arange(4)[:, None] >= 1))
