"""Attention backends: equal to the dense reference, alone and sharded; memory of `chunked`.

Pallas kernels run in interpret mode. Tests of single kernel libraries are in test_splash.py and
test_gpu_attention.py.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from msllm.config import MeshConfig
from msllm.kernels import cpu as cpu_kernels
from msllm.model.attention import chunked, cpu, reference
from msllm.model.attention.dispatch import attention, get_backend
from msllm.model.attention.gpu import Tile, Tiles
from msllm.model.attention.splash import Blocks
from msllm.sharding import make_mesh, partition_spec
from msllm.streams import NEVER, PRESETS, Cells, Visibility, lag_matrix, make_cells

pytestmark = pytest.mark.slow


def random_inputs(
    seed, batch, rows, streams, heads, kv_heads, head_dim=4, absent=0.2, silent=0.2, segments=3
):
    """q, k, v and cells, with absent and silent cells, segments and empty rows."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, rows, streams, heads, head_dim), np.float32)
    k, v = (
        rng.standard_normal((batch, rows, streams, kv_heads, head_dim), np.float32)
        for _ in range(2)
    )
    segment = np.sort(rng.integers(1, segments + 1, (batch, rows)), axis=1).astype(np.int32)
    segment[0, rows - rows // 5 :] = 0  # empty rows at the end of the first table
    present = rng.random((batch, rows, streams)) >= absent
    cells = make_cells(present, segment, rng.random(present.shape) < silent)
    return q, k, v, Cells(*map(jnp.asarray, cells))


def random_lag(seed, streams):
    rng = np.random.default_rng(seed)
    return rng.choice([0, 1, 2, 5, NEVER], (streams, streams)).astype(np.int32)


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
        largest = max(np.abs(expected).max(), 0.1)  # all are 0 if cells see only themselves
        assert np.abs(gradient - expected).max() <= 1e-4 * largest


def full_visibility(cells, lag):
    """Visibility with the cells of all streams as queries and as keys."""
    return Visibility(cells, cells, lag, jnp.arange(lag.shape[0]))


def compare(ours, theirs, q, k, v, visibility):
    """Asserts that two backends give the same output and gradients."""

    def run(backend):
        return outputs_and_gradients(lambda *qkv: backend.attend(*qkv, visibility), q, k, v)

    assert_same(run(ours), run(theirs))


SMALL_TILES = Tiles(Tile(16, 8, 4, 2), Tile(8, 16, 4, 2), Tile(16, 32, 4, 2))
needs_cpu_kernels = pytest.mark.skipif(
    cpu_kernels.unavailable_reason() is not None,
    reason=f"no kernels in C++: {cpu_kernels.unavailable_reason()}",
)
# Options of each backend, with blocks so small that the tests' tables fill several.
OPTIONS = {
    "chunked": [{"block_cells": cells} for cells in (5, 1, 16, 1000)],
    "cpu": [{}],
    "splash": [
        {"interpret": True, "blocks": blocks} for blocks in (Blocks(128, 128), Blocks(256, 128))
    ],
    "gpu": [
        {"interpret": True, "tiles": tiles}
        for tiles in (SMALL_TILES, Tiles(Tile(8, 8, 4, 2), Tile(8, 8, 4, 2), Tile(4, 4, 4, 2)))
    ],
}
BACKENDS = [
    pytest.param(name, marks=needs_cpu_kernels if name == "cpu" else ()) for name in OPTIONS
]


@pytest.mark.parametrize("name", BACKENDS)
# Without shrinking, because each example compiles twice.
@settings(max_examples=8, phases=(Phase.explicit, Phase.generate))
@given(
    seed=st.integers(0, 1 << 16),
    rows=st.integers(1, 20),
    streams=st.sampled_from([1, 2, 3, 4, 10]),
    groups=st.sampled_from([1, 2, 3]),
    preset=st.sampled_from([*PRESETS, "random"]),
    segments=st.integers(1, 4),
    absent=st.sampled_from([0.0, 0.3, 0.9]),
    silent=st.sampled_from([0.0, 0.5]),
    data=st.data(),
)
def test_equals_reference_on_random_tables(
    name, seed, rows, streams, groups, preset, segments, absent, silent, data
):
    backend = get_backend(name).with_options(**data.draw(st.sampled_from(OPTIONS[name])))
    q, k, v, cells = random_inputs(
        seed, 2, rows, streams, 2 * groups, 2, 4, absent, silent, segments
    )
    lag = random_lag(seed, streams) if preset == "random" else lag_matrix(preset, streams)
    compare(backend, reference.BACKEND, q, k, v, full_visibility(cells, lag))


@needs_cpu_kernels
@pytest.mark.parametrize(
    "rows, streams, heads, kv_heads, head_dim, visibility",
    [
        (130, 10, 4, 2, 16, "block_causal"),
        (200, 3, 3, 1, 20, "random"),  # the head dimension does not fill whole vectors
        (700, 1, 2, 2, 32, "block_causal"),
        (90, 4, 8, 2, 64, "isolated"),
        (45, 16, 2, 1, 8, "same_row"),
    ],
    ids=str,
)
def test_cpu_kernels_with_many_blocks(rows, streams, heads, kv_heads, head_dim, visibility):
    lag = random_lag(rows, streams) if visibility == "random" else lag_matrix(visibility, streams)
    for absent, silent, segments in ((0.0, 0.0, 1), (0.3, 0.3, 4)):
        q, k, v, cells = random_inputs(
            rows, 2, rows, streams, heads, kv_heads, head_dim, absent, silent, segments
        )
        compare(cpu.BACKEND, chunked.BACKEND, q, k, v, full_visibility(cells, lag))


def bfloat16_errors(attend, q, k, v, cells, lag):
    """Compares `attend(q, k, v, visibility)` in bfloat16 with the reference in float32.

    Returns the largest error of the output and of each gradient, relative to the largest value.
    """
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    weight = jnp.asarray(np.random.default_rng(9).standard_normal(q.shape), jnp.bfloat16)

    def run(attend, dtype):
        @jax.jit
        def outputs(q, k, v, query_streams):
            visibility = Visibility(cells, cells, lag, query_streams)
            inputs = (x.astype(dtype) for x in (q, k, v))
            out, pull_back = jax.vjp(lambda *qkv: attend(*qkv, visibility), *inputs)
            results = out, *pull_back(weight.astype(dtype))
            assert all(x.dtype == dtype for x in results)
            return results

        with jax.default_matmul_precision("highest"):
            return [np.asarray(x, np.float32) for x in outputs(q, k, v, jnp.arange(lag.shape[0]))]

    pairs = zip(run(attend, jnp.bfloat16), run(reference.reference_attention, jnp.float32))
    return [np.abs(ours - expected).max() / np.abs(expected).max() for ours, expected in pairs]


# bfloat16 has 8 bits (0.4 %), and both operands (q / sqrt(H), weights) and results are rounded.
BFLOAT16_ERROR = 0.01


@pytest.mark.parametrize("visibility", ["block_causal", "random"])
@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"cpu"}))  # `cpu` has no bfloat16
def test_bfloat16_rounds_little(name, visibility):
    q, k, v, cells = random_inputs(8, 2, 24, 4, 4, 2, 16)
    lag = random_lag(4, 4) if visibility == "random" else lag_matrix(visibility, 4)
    backend = get_backend(name).with_options(**OPTIONS[name][0])
    assert max(bfloat16_errors(backend.attend, q, k, v, cells, lag)) < BFLOAT16_ERROR


@pytest.mark.parametrize("sizes", [(2, 1, 4, 1), (1, 2, 2, 2), (1, 1, 8, 1)], ids=str)
@pytest.mark.parametrize(
    "name", ["chunked", "reference", "gpu", pytest.param("cpu", marks=needs_cpu_kernels)]
)
def test_sharded_equals_unsharded(sizes, name):
    compare_sharded(sizes, name, "random", ring=False)


@pytest.mark.parametrize(
    ("sizes", "name", "visibility"),
    [
        ((1, 1, 8, 1), "chunked", "random"),
        ((1, 1, 4, 2), "chunked", "isolated"),  # no query sees a key of another device
        ((1, 2, 4, 1), "gpu", "random"),
        pytest.param((1, 1, 4, 2), "cpu", "random", marks=needs_cpu_kernels),
        pytest.param((1, 1, 8, 1), "cpu", "isolated", marks=needs_cpu_kernels),
        ((1, 1, 4, 2), "splash", "block_causal"),  # splash has three forms of its mask
        ((2, 1, 4, 1), "splash", "isolated"),
        ((1, 1, 4, 1), "splash", "random"),
    ],
    ids=str,
)
def test_ring_equals_gathering(sizes, name, visibility):
    compare_sharded(sizes, name, visibility, ring=True)


def sharded_attention(sizes, backend, lag, ring):
    """`attention` on a mesh of the given sizes, as a function of q, k, v and cells."""
    heads = partition_spec("batch", "row", "stream", "heads", "head_dim")
    table, row = partition_spec("batch", "row", "stream"), partition_spec("batch", "row")
    return jax.shard_map(
        lambda q, k, v, cells: attention(q, k, v, cells, lag, backend, ring=ring),
        mesh=make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)]),
        in_specs=(heads, heads, heads, Cells(row, row, table, table)),
        out_specs=heads,
        check_vma=False,
    )


def compare_sharded(sizes, name, visibility, ring):
    """Asserts that a backend gives the same output and gradients on a mesh and on one device."""
    backend = get_backend(name).with_options(**OPTIONS.get(name, [{}])[0])
    q, k, v, cells = random_inputs(1, 2, 9, 8, 4, 2)
    lag = random_lag(2, 8) if visibility == "random" else lag_matrix(visibility, 8)
    sharded = sharded_attention(sizes, backend, lag, ring)

    def unsharded(q, k, v):
        return attention(q, k, v, cells, lag, backend)

    ours = outputs_and_gradients(lambda q, k, v: sharded(q, k, v, cells), q, k, v)
    assert_same(ours, outputs_and_gradients(unsharded, q, k, v))


def test_a_ring_gathers_nothing():
    q, k, v, cells = random_inputs(1, 2, 9, 8, 4, 2)

    def collectives(ring):
        sharded = jax.jit(sharded_attention((1, 1, 8, 1), chunked.BACKEND, random_lag(2, 8), ring))
        text = sharded.lower(q, k, v, cells).compile().as_text()
        return set(re.findall(r"\b(all-gather|collective-permute)\(", text))

    assert collectives(ring=True) == {"collective-permute"}
    assert collectives(ring=False) == {"all-gather"}


def test_a_ring_rounds_little_more_than_gathering():
    q, k, v, cells = random_inputs(8, 2, 24, 8, 4, 2, 16)

    def errors(ring):
        def attend(q, k, v, visibility):
            sharded = sharded_attention((1, 1, 8, 1), chunked.BACKEND, visibility.lag, ring)
            return sharded(q, k, v, visibility.queries)

        return bfloat16_errors(attend, q, k, v, cells, lag_matrix("block_causal", 8))

    gathered, ring = errors(ring=False), errors(ring=True)
    assert max(ring) < BFLOAT16_ERROR and ring[0] < 2 * gathered[0]


def test_chunked_memory_is_linear_in_rows():
    streams, temporary, largest = 4, {}, {}
    for rows in (64, 128, 256):
        q, k, v, cells = random_inputs(3, 1, rows, streams, 2, 1)
        visibility = full_visibility(cells, jnp.ones((streams, streams), jnp.int32))

        def loss(q, k, v, visibility):
            return chunked.chunked_attention(q, k, v, visibility, block_cells=64).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v, visibility).compile()
        temporary[rows] = compiled.memory_analysis().temp_size_in_bytes
        shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
        largest[rows] = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert temporary[256] < 2.2 * temporary[128] < 2.2**2 * temporary[64]
    assert largest[256] < (256 * streams) ** 2 / 8  # far smaller than [L, L]
