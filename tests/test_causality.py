"""Causality by gradient: a cell's logits depend on exactly the cells that it may see.

The tests compare the gradients of a model with the visibility rule, which is written again here for
single cells. With one layer, a cell's logits depend on the cells that it sees. Two layers add the
cells that those cells see.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msllm.kernels import cpu as cpu_kernels
from msllm.model.attention.dispatch import get_backend
from msllm.model.attention.gpu import Tile, Tiles
from msllm.model.attention.splash import Blocks
from msllm.model.model import bind
from msllm.streams import NEVER, PRESETS, make_cells, positions

pytestmark = pytest.mark.slow

# Blocks so small that the tables below fill several, if the kernel allows that.
OPTIONS = {
    "reference": {},
    "chunked": {"block_cells": 6},
    **({"cpu": {}} if cpu_kernels.unavailable_reason() is None else {}),
    "splash": {"interpret": True, "blocks": Blocks(128, 128)},
    "gpu": {"interpret": True, "tiles": Tiles(*[Tile(8, 8, 4, 2)] * 3)},
}
BACKENDS = {name: get_backend(name).with_options(**options) for name, options in OPTIONS.items()}
ROWS = 8
SEGMENT = np.array([[1] * ROWS, [1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 2, 2]], np.int32)
LAGS = {
    "block_causal": lambda reader, source: 1,
    "same_row": lambda reader, source: 0,
    "isolated": lambda reader, source: 1 if reader == source else NEVER,
    "random": lambda reader, source: [[1, NEVER, 4], [0, 2, NEVER], [3, 0, 1]][reader][source],
}


def tables(streams):
    """(present, silent) of three tables: full, with absent and silent cells, with silent cells."""
    rng = np.random.default_rng(streams)
    shape = (len(SEGMENT), ROWS, streams)
    absent, silent = rng.random(shape) < 0.25, rng.random(shape) < 0.3
    absent[[0, 2]], silent[0] = False, False
    return ~absent, silent


def sees(visibility, skip_silence, present, silent, query, key):
    """Whether the cell `query` sees the cell `key`; each is (table, row, stream)."""
    if query == key:
        return True
    (table, row, stream), (k_table, k_row, k_stream) = query, key
    if not (present[query] and present[key]):
        return False
    if table != k_table or SEGMENT[table, row] != SEGMENT[k_table, k_row]:
        return False
    if SEGMENT[table, row] == 0 or (skip_silence and silent[key]):
        return False
    return k_row <= row - LAGS[visibility](stream, k_stream)


def dependence(visibility, skip_silence, layers, streams):
    """The expected dependence [cell, cell]: whether the first's logits depend on the second."""
    present, silent = tables(streams)
    cells = list(itertools.product(*map(range, present.shape)))
    seen = np.array(
        [[sees(visibility, skip_silence, present, silent, q, k) for k in cells] for q in cells]
    )
    return np.linalg.matrix_power(seen.astype(np.int64), layers) > 0


def influences(model, backend, cases):
    """Yields the measured dependence [cell, cell] for each of `cases`, (layers, skip_silence).

    Each cell has its own embedding, which is not tied to the head. To compile once for all cases,
    layers are removed by setting their output weights to 0.
    """
    present, silent = tables(model.streams.size)
    tokens = jnp.arange(present.size, dtype=jnp.int32).reshape(present.shape)
    weights = jnp.asarray(np.random.default_rng(0).standard_normal(present.size), jnp.float32)

    @jax.jit
    def run(parameters, present, silent, segment):
        cells = make_cells(present, segment, silent)

        def scalars(embedding):
            """A random projection of each cell's logits."""
            bound = bind(model.graph, parameters | {"embedding": embedding})
            hidden = bound(tokens, cells, positions(segment), backend=backend)
            return bound.logits(hidden).reshape(-1, tokens.size) @ weights

        pull_back = jax.vjp(scalars, parameters["embedding"])[1]
        return jax.lax.map(lambda cell: pull_back(cell)[0], jnp.eye(tokens.size))

    for layers, skip_silence in cases:
        parameters = jax.tree.map(lambda x: x, model.parameters)
        for part, weight in (("attention", "o"), ("mlp", "down")):
            weights_of = parameters["blocks"][part]
            weights_of[weight] = weights_of[weight].at[layers:].set(0)
        # [cell, cell, D]
        jacobian = np.asarray(run(parameters, present, silent & skip_silence, SEGMENT))
        assert np.isfinite(jacobian).all()
        yield np.any(jacobian != 0, axis=-1)


@pytest.mark.parametrize(
    "visibility, streams", [*((name, 3) for name in LAGS), ("block_causal", 1), ("same_row", 1)]
)
@pytest.mark.parametrize("name", BACKENDS)
def test_logits_depend_on_exactly_the_visible_cells(make_model, name, visibility, streams):
    lag_of, indices = LAGS[visibility], range(streams)
    lag = [[lag_of(reader, source) for source in indices] for reader in indices]
    sizes = {
        "vocab_size": SEGMENT.size * streams,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
    }
    model = make_model(streams, lag=lag, tie_embeddings=False, remat="none", **sizes)
    cases = [(1, True), (2, False)]
    for (layers, skip_silence), measured in zip(cases, influences(model, BACKENDS[name], cases)):
        assert_same(measured, dependence(visibility, skip_silence, layers, streams))


def assert_same(measured, expected):
    for wrong, what in (
        (measured & ~expected, "dependence on cells that are not seen"),
        (expected & ~measured, "no dependence on cells that are seen"),
    ):
        assert not wrong.any(), f"{what}: pairs {np.argwhere(wrong)[:5].tolist()} and others"


def test_the_tables_distinguish_the_cases():
    """All presets are tested, and silence and layers make a difference in these tables."""
    assert set(PRESETS) <= set(LAGS)
    for visibility in LAGS:
        assert (dependence(visibility, True, 1, 3) != dependence(visibility, False, 1, 3)).any()
    assert (dependence("random", False, 2, 3) > dependence("random", False, 1, 3)).any()
    assert (dependence("random", True, 2, 3) > dependence("random", True, 1, 3)).any()
