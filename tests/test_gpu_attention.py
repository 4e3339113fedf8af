"""The GPU kernels against the dense reference, the blocks that they skip, and their lowering.

All tests but one interpret the kernels or lower them, so they need no GPU.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from test_attention import (
    BFLOAT16_ERROR,
    SMALL_TILES,
    assert_same,
    bfloat16_errors,
    full_visibility,
    outputs_and_gradients,
    random_inputs,
    random_lag,
)

from msllm.model.attention.backend import Case
from msllm.model.attention.dispatch import declines
from msllm.model.attention.gpu import Tile, _blocks_to_visit, _vectors, gpu_attention
from msllm.model.attention.reference import reference_attention
from msllm.streams import NEVER, Cells, Visibility, lag_matrix, make_cells

pytestmark = pytest.mark.slow


def compare(q, k, v, q_cells, k_cells, lag, q_streams):
    """Asserts that the kernels and the reference give the same outputs and gradients.

    The streams of the queries are traced, as they are inside `shard_map`.
    """

    def run(attend, **settings):
        def function(q, k, v):
            visibility = Visibility(q_cells, k_cells, lag, jnp.asarray(q_streams))
            return attend(q, k, v, visibility, **settings)

        return outputs_and_gradients(function, q, k, v)

    ours = run(gpu_attention, interpret=True, tiles=SMALL_TILES)
    assert_same(ours, run(reference_attention))


def make_lag(preset, streams, seed=2):
    return random_lag(seed, streams) if preset == "random" else lag_matrix(preset, streams)


@pytest.mark.parametrize("dense", [True, False], ids=["all present", "absent and silent"])
@pytest.mark.parametrize(
    "streams, rows, preset",
    [(1, 50, "same_row"), (3, 20, "block_causal"), (8, 9, "isolated"), (10, 13, "random")],
)
def test_equals_reference(streams, rows, preset, dense):
    sparsity = {"absent": 0.0, "silent": 0.0, "segments": 2} if dense else {}
    q, k, v, cells = random_inputs(5, 2, rows, streams, 4, 2, 8, **sparsity)
    compare(q, k, v, cells, cells, make_lag(preset, streams), np.arange(streams))


def test_queries_of_some_rows_and_streams_equal_reference():
    q, k, v, cells = random_inputs(6, 2, 20, 6, 4, 2)
    rows, streams = slice(7, 16), np.array([4, 1, 5])
    q_cells = Cells(
        cells.row[:, rows], cells.segment[:, rows], *(x[:, rows][:, :, streams] for x in cells[2:])
    )
    compare(q[:, rows][:, :, streams], k, v, q_cells, cells, random_lag(7, 6), streams)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize(
    "streams, rows, preset", [(1, 1500, "same_row"), (8, 256, "block_causal"), (10, 170, "random")]
)
@pytest.mark.parametrize("dense", [True, False], ids=["all present", "absent and silent"])
def test_compiled_kernels_are_close_to_reference(streams, rows, preset, head_dim, dense):
    """Needs a GPU that the kernels support."""
    device, lag = jax.devices()[0], make_lag(preset, streams)
    case = hopper_case(head_dim, platform=device.platform, device_kind=device.device_kind, lag=lag)
    reason = declines("gpu", case)
    if reason:
        pytest.skip(reason)
    sparsity = {"absent": 0.0, "silent": 0.0, "segments": 2} if dense else {}
    q, k, v, cells = random_inputs(10, 2, rows, streams, 4, 2, head_dim, **sparsity)
    assert max(bfloat16_errors(gpu_attention, q, k, v, cells, lag)) < BFLOAT16_ERROR


def test_blocks_that_no_query_sees_are_never_read():
    """If a kernel read such a block and masked it, 0 * nan would make the result nan."""
    rows, streams = 32, 4  # two segments of 64 cells: full blocks of every kernel
    q, k, v, _ = random_inputs(9, 1, rows, streams, 2, 1)
    segment = np.repeat([[1, 2]], rows // 2, axis=1).astype(np.int32)
    cells = Cells(*map(jnp.asarray, make_cells(np.ones((1, rows, streams), bool), segment)))
    visibility = full_visibility(cells, lag_matrix("block_causal", streams))

    @jax.jit
    def finite(poison):
        """Whether each row of the output and of the gradients of q, k, v is finite."""

        def attend(q, k, v):
            return gpu_attention(q, k, v, visibility, interpret=True, tiles=SMALL_TILES)

        def spoil(x):
            return jnp.where(poison[:, None, None, None], jnp.nan, x)

        out, pull_back = jax.vjp(attend, *map(spoil, (q, k, v)))
        return [
            jnp.isfinite(x[0]).all((1, 2, 3)) for x in (out, *pull_back(spoil(jnp.ones(q.shape))))
        ]

    def finite_rows(poisoned):
        return [np.flatnonzero(x) for x in finite(np.isin(np.arange(rows), poisoned))]

    first, second = np.arange(16), np.arange(16, 32)
    for poisoned, untouched in ((first, second), (second, first)):
        for rows_of in finite_rows(poisoned):
            np.testing.assert_array_equal(rows_of, untouched)
    # Queries never read keys of later blocks.
    out, d_q, _, _ = finite_rows(np.arange(24, 32))
    assert set(range(24)) <= set(out)
    assert set(range(24)) <= set(d_q)
    # Queries read keys of earlier blocks of their segment, and no keys of other segments.
    out, _, d_k, _ = finite_rows(np.arange(16, 24))
    assert not set(range(24, 32)) & set(out)
    assert set(range(16)) <= set(d_k)


def test_most_visible_blocks_need_no_mask():
    """In the triangles of two segments, only the blocks on the diagonal need a mask.

    Each segment is 64 blocks long.
    """
    rows, streams, tile = 512, 8, Tile(32, 32, 4, 2)
    cells = make_cells(np.ones((1, rows, streams), bool), np.repeat([[1, 2]], rows // 2, axis=1))
    queries = _vectors(cells, cells.present, np.arange(streams), -2)
    keys = _vectors(cells, cells.seen, np.arange(streams), -1)
    for of_keys in (False, True):
        spans = _blocks_to_visit(queries, keys, jnp.ones((streams, streams)), tile, of_keys)
        first, full, full_end, end = np.moveaxis(np.asarray(spans[0]), 1, 0)
        assert (end - first).sum() == 2 * 64 * 65 // 2
        assert (full_end - full).sum() == 2 * 64 * 63 // 2


def arrays_in(jaxpr):
    """Yields the shapes of all values, including those inside kernels and loops."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from arrays_in(getattr(inner, "jaxpr", inner))


def hopper_case(head_dim=64, rows=1024, **changes):
    """A case that the kernels accept, with changes."""
    case = Case(
        platform="gpu",
        device_kind="NVIDIA H100 80GB HBM3",
        dtype="bfloat16",
        rows=rows,
        streams=8,
        q_streams=8,
        heads=4,
        kv_heads=2,
        head_dim=head_dim,
        lag=lag_matrix("block_causal", 8),
    )
    return case._replace(**changes)


def gradient(case: Case):
    """The gradient function of the sum of gpu_attention's outputs, and its abstract arguments."""

    def abstract(heads):
        return jax.ShapeDtypeStruct((2, case.rows, case.streams, heads, case.head_dim), case.dtype)

    def loss(q, k, v, present, segment):
        visibility = full_visibility(make_cells(present, segment), case.lag)
        return gpu_attention(q, k, v, visibility).astype(jnp.float32).sum()

    cells = (
        jax.ShapeDtypeStruct((2, case.rows, case.streams), bool),
        jax.ShapeDtypeStruct((2, case.rows), jnp.int32),
    )
    keys = abstract(case.kv_heads)
    return jax.jit(jax.grad(loss, (0, 1, 2))), (abstract(case.heads), keys, keys, *cells)


def test_memory_is_linear_in_rows():
    case = hopper_case(rows=1024)
    function, arguments = gradient(case)
    shapes = list(arrays_in(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert (128, 128) in shapes  # the scores of a block: `arrays_in` looks inside the kernels
    cells, largest = case.rows * case.streams, max(map(math.prod, shapes))
    assert largest == 2 * cells * case.heads * case.head_dim  # the size of q


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lowers_to_triton(head_dim):
    """The three kernels become Triton modules. Compiling these modules would need a GPU."""
    lags = {"block_causal": lag_matrix("block_causal", 8), "random": random_lag(3, 8)}
    gpu = AbstractDevice(device_kind=hopper_case().device_kind, num_cores=132, platform="gpu")
    for lag in lags.values():
        case = hopper_case(rows=100, head_dim=head_dim, lag=lag)
        assert declines("gpu", case) is None
        function, arguments = gradient(case)
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
            lowered = function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert lowered.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 3


def test_declines_unsupported_cases():
    assert declines("gpu", hopper_case()) is None
    grace = hopper_case(device_kind="NVIDIA GH200 480GB", lag=lag_matrix("isolated", 8))
    assert declines("gpu", grace) is None
    for changes, reason in (
        ({"platform": "cpu", "device_kind": "cpu"}, "cpu"),
        ({"device_kind": "NVIDIA A100-SXM4-40GB"}, "NVIDIA A100-SXM4-40GB"),
        ({"dtype": "float32"}, "float32"),
        ({"head_dim": 96}, "head_dim of 16, 32, 64 or 128, not 96"),
        ({"lag": np.arange(64, dtype=np.int32).reshape(8, 8)}, "64"),
        ({"streams": 40, "lag": np.where(np.eye(40, dtype=bool), 1, NEVER)}, "32 streams"),
    ):
        assert reason in declines("gpu", hopper_case(**changes))
