"""Attention maps hold the weights that attention uses, and 0 for cells that are not seen."""

import jax
import numpy as np
import pytest

from msllm.errors import UserError
from msllm.evals import attention_map as attention_map_lib
from msllm.evals.attention_map import attention_map, between_streams
from msllm.model.attention.backend import Backend
from msllm.model.attention.reference import attention_weights, reference_attention
from msllm.model.model import bind
from msllm.streams import Visibility, make_cells, visibility_table

ROWS, SILENCE = 6, 1
NEVER = 1 << 30
LAG = [[1, 1, NEVER], [1, 1, 0], [2, 1, 1]]


@pytest.fixture
def table():
    """(tokens, present) [T, S], with silence and a stream that begins late."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((ROWS, 3)) < 0.3, SILENCE, rng.integers(2, 32, (ROWS, 3)))
    present = np.arange(ROWS)[:, None] >= [0, 2, 0]
    return tokens * present, present


def test_weights_are_those_of_reference_attention():
    """Compares with a loop over queries and heads."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(1, ROWS, 3, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    cells = make_cells(np.ones((1, ROWS, 3), bool), np.ones((1, ROWS), np.int32))
    visibility = Visibility(cells, cells, np.array(LAG), np.arange(3))
    weights, out = attention_weights(q, k, visibility), reference_attention(q, k, v, visibility)
    seen = visibility_table(cells, np.array(LAG))
    assert weights.shape == (1, 4, ROWS, 3, ROWS, 3)
    for t, s, n in np.ndindex(ROWS, 3, 4):
        scores = np.exp(k[0, :, :, n // 2] @ q[0, t, s, n] / 8**0.5) * seen[t, s]
        np.testing.assert_allclose(weights[0, n, t, s], scores / scores.sum(), atol=1e-6)
        taken = np.einsum("us,ush->h", weights[0, n, t, s], v[0, :, :, n // 2])
        np.testing.assert_allclose(out[0, t, s, n], taken, atol=1e-5)


@pytest.mark.parametrize("skip_silence", [False, True])
def test_weights_are_positive_for_visible_cells_alone(make_model, table, skip_silence):
    tokens, present = table
    model = make_model(lag=LAG, skip_silence=skip_silence)
    weights = attention_map(model, tokens, present, silence_id=SILENCE)
    assert weights.shape == (2, 4, ROWS, 3, ROWS, 3)
    np.testing.assert_allclose(weights.sum((-2, -1)), 1, atol=1e-6)
    silent = (tokens == SILENCE)[None] if skip_silence else None
    seen = visibility_table(
        make_cells(present[None], np.ones((1, ROWS), np.int32), silent), np.array(LAG)
    )
    np.testing.assert_array_equal(weights > 0, np.broadcast_to(seen, weights.shape))


def test_the_model_attends_with_the_weights_of_the_map(make_model, table):
    """Compares with a backend that records the weights of each layer in a forward pass."""
    tokens, present = table
    model, found = make_model(lag=LAG, attention_bias=True), []

    def attend(q, k, v, visibility):
        jax.debug.callback(found.append, attention_weights(q, k, visibility), ordered=True)
        return reference_attention(q, k, v, visibility)

    cells = make_cells(present[None], np.ones((1, ROWS), np.int32))
    with jax.default_matmul_precision("highest"):
        backend = Backend("recording", attend)
        bind(model.graph, model.parameters)(tokens[None], cells, np.arange(ROWS)[None], backend)
    jax.effects_barrier()
    assert len(found) == 2
    np.testing.assert_allclose(
        attention_map(model, tokens, present), np.array(found)[:, 0], atol=1e-5
    )


def test_shares_between_streams(table):
    _, present = table
    weights = np.zeros((2, ROWS, 3, ROWS, 3))
    for t, s in np.ndindex(ROWS, 3):
        weights[0, t, s, t, s] = 1  # each cell attends to itself
        # Present cells attend to stream 0 in the first row and to stream 2 in their own.
        weights[1, t, s, 0, 0] = 0.75 if present[t, s] else 0
        weights[1, t, s, t, 2] = 0.25 if present[t, s] else 1
    shares = between_streams(weights, present)
    np.testing.assert_allclose(shares[0], np.eye(3))
    np.testing.assert_allclose(shares[1], [[0.75, 0, 0.25]] * 3)
    assert np.isnan(between_streams(weights, present & [True, False, True])[:, 1]).all()


def test_a_table_that_is_too_long_is_refused(make_model, monkeypatch, table):
    monkeypatch.setattr(attention_map_lib, "MAX_WEIGHTS", 2 * 4 * (3 * ROWS) ** 2 - 1)
    with pytest.raises(UserError, match="6 rows x 3 streams.*fewer rows"):
        attention_map(make_model(), *table)
    with pytest.raises(UserError, match="2 streams: the model has 3"):
        attention_map(make_model(), table[0][:, :2])
