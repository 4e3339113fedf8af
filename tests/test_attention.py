"""Chunked attention against the dense reference, spread over a mesh, and its memory."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from msllm.attention import attention, backend
from msllm.attention.chunked import chunked_attention
from msllm.attention.reference import reference_attention
from msllm.config import MeshConfig
from msllm.sharding import make_mesh, partition
from msllm.streams import NEVER, PRESETS, Cells, lag_matrix, make_cells

pytestmark = pytest.mark.slow


def random_inputs(seed, batch, rows, streams, heads, kv_heads, head_dim=4, absent=0.2, silent=0.2, segments=3):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, rows, streams, heads, head_dim), np.float32)
    k, v = (rng.standard_normal((batch, rows, streams, kv_heads, head_dim), np.float32) for _ in range(2))
    segment = np.sort(rng.integers(1, segments + 1, (batch, rows)), axis=1).astype(np.int32)
    segment[0, rows - rows // 5 :] = 0  # empty rows at the end of the first table
    present = rng.random((batch, rows, streams)) >= absent
    cells = make_cells(present, segment, rng.random(present.shape) < silent)
    return q, k, v, Cells(*map(jnp.asarray, cells))


def random_lag(seed, streams):
    return np.random.default_rng(seed).choice([0, 1, 2, 5, NEVER], (streams, streams)).astype(np.int32)


def outputs_and_gradients(function, q, k, v):
    """The output, and the gradients of a fixed random projection of it."""
    weight = np.random.default_rng(9).standard_normal(q.shape, np.float32)

    @jax.jit
    def run(q, k, v):
        out, pull_back = jax.vjp(function, q, k, v)
        return out, pull_back(jnp.asarray(weight))

    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, run(q, k, v))


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=1e-5)
    for gradient, expected in zip(ours[1], theirs[1]):
        largest = max(np.abs(expected).max(), 0.1)  # all are 0 where cells see only themselves
        assert np.abs(gradient - expected).max() <= 1e-4 * largest


@settings(max_examples=8, phases=(Phase.explicit, Phase.generate))  # each example compiles twice: no shrinking
@given(
    seed=st.integers(0, 1 << 16),
    rows=st.integers(1, 20),
    streams=st.integers(1, 4),
    groups=st.sampled_from([1, 2, 3]),
    preset=st.sampled_from([*PRESETS, "random"]),
    segments=st.integers(1, 4),
    absent=st.sampled_from([0.0, 0.3, 0.9]),
    silent=st.sampled_from([0.0, 0.5]),
    block_cells=st.sampled_from([1, 5, 16, 1000]),
)
def test_chunked_equals_reference(seed, rows, streams, groups, preset, segments, absent, silent, block_cells):
    q, k, v, cells = random_inputs(seed, 2, rows, streams, 2 * groups, 2, 4, absent, silent, segments)
    lag = random_lag(seed, streams) if preset == "random" else lag_matrix(preset, streams)
    rest = (cells, cells, jnp.asarray(lag), jnp.arange(streams))
    ours = outputs_and_gradients(lambda q, k, v: chunked_attention(q, k, v, *rest, block_cells), q, k, v)
    assert_same(ours, outputs_and_gradients(lambda q, k, v: reference_attention(q, k, v, *rest), q, k, v))


@pytest.mark.parametrize("sizes", [(2, 1, 4, 1), (1, 2, 2, 2), (1, 1, 8, 1)], ids=str)
@pytest.mark.parametrize("name", ["chunked", "reference"])
def test_sharded_equals_unsharded(sizes, name):
    q, k, v, cells = random_inputs(1, 2, 9, 8, 4, 2)
    lag = random_lag(2, 8)
    heads = partition("batch", "row", "stream", "heads", "head_dim")
    table, row = partition("batch", "row", "stream"), partition("batch", "row")
    sharded = jax.shard_map(
        lambda q, k, v, cells: attention(q, k, v, cells, lag, backend(name)),
        mesh=make_mesh(MeshConfig(*sizes)),
        in_specs=(heads, heads, heads, Cells(row, row, table, table)),
        out_specs=heads,
        check_vma=False,
    )
    ours = outputs_and_gradients(lambda q, k, v: sharded(q, k, v, cells), q, k, v)
    assert_same(ours, outputs_and_gradients(lambda q, k, v: attention(q, k, v, cells, lag, backend(name)), q, k, v))


def test_chunked_memory_is_linear_in_rows():
    streams, temporary, largest = 4, {}, {}
    for rows in (64, 128, 256):
        q, k, v, cells = random_inputs(3, 1, rows, streams, 2, 1)
        lag = jnp.ones((streams, streams), jnp.int32)

        def loss(q, k, v):
            return chunked_attention(q, k, v, cells, cells, lag, jnp.arange(streams), 64).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
        temporary[rows] = compiled.memory_analysis().temp_size_in_bytes
        shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
        largest[rows] = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert temporary[256] < 2.2 * temporary[128] < 2.2**2 * temporary[64]
    assert largest[256] < (256 * streams) ** 2 / 8  # no [L, L], by far
