"""The GPU kernels: interpreted, against the reference; what they skip; their Triton modules."""

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
    """Runs both; the streams of the queries are traced, as they are inside `shard_map`."""

    def run(attend, **settings):
        def function(q, k, v):
            visibility = Visibility(q_cells, k_cells, lag, jnp.asarray(q_streams))
            return attend(q, k, v, visibility, **settings)

        return outputs_and_gradients(function, q, k, v)

    ours = run(gpu_attention, interpret=True, tiles=SMALL_TILES)
    assert_same(ours, run(reference_attention))


def lag_of(preset, streams, seed=2):
    return random_lag(seed, streams) if preset == "random" else lag_matrix(preset, streams)


@pytest.mark.parametrize("dense", [True, False], ids=["all present", "absent and silent"])
@pytest.mark.parametrize(
    "streams, rows, preset",
    [(1, 50, "same_row"), (3, 20, "block_causal"), (8, 9, "isolated"), (10, 13, "random")],
)
def test_equals_reference(streams, rows, preset, dense):
    sparsity = {"absent": 0.0, "silent": 0.0, "segments": 2} if dense else {}
    q, k, v, cells = random_inputs(5, 2, rows, streams, 4, 2, 8, **sparsity)
    compare(q, k, v, cells, cells, lag_of(preset, streams), np.arange(streams))


def test_some_rows_and_streams_of_queries():
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
def test_on_a_card(streams, rows, preset, head_dim, dense):
    device, lag = jax.devices()[0], lag_of(preset, streams)
    case = hopper_case(head_dim, platform=device.platform, device_kind=device.device_kind, lag=lag)
    reason = declines("gpu", case)
    if reason:
        pytest.skip(reason)
    sparsity = {"absent": 0.0, "silent": 0.0, "segments": 2} if dense else {}
    q, k, v, cells = random_inputs(10, 2, rows, streams, 4, 2, head_dim, **sparsity)
    assert max(bfloat16_errors(gpu_attention, q, k, v, cells, lag)) < BFLOAT16_ERROR


def test_blocks_that_no_query_sees_are_never_read():
    """A nan in a block that is computed and then masked would reach the result, as 0 * nan."""
    rows, streams = 32, 4  # two segments of 64 cells: full blocks of every kernel
    q, k, v, _ = random_inputs(9, 1, rows, streams, 2, 1)
    segment = np.repeat([[1, 2]], rows // 2, axis=1).astype(np.int32)
    cells = Cells(*map(jnp.asarray, make_cells(np.ones((1, rows, streams), bool), segment)))
    visibility = full_visibility(cells, lag_matrix("block_causal", streams))

    @jax.jit
    def finite(poison):
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
    out, d_q, d_k, d_v = finite_rows(
        np.arange(24, 32)
    )  # causality: earlier queries never meet these keys
    assert set(range(24)) <= set(out) and set(range(24)) <= set(d_q)
    out, d_q, d_k, d_v = finite_rows(np.arange(16, 24))  # nor later keys these queries
    assert not set(range(24, 32)) & set(out) and set(range(16)) <= set(d_k)


def test_most_visible_blocks_need_no_mask():
    """Two segments of 64 blocks each: in their triangles, only those on the diagonal need one."""
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
    """Shapes of all values, those inside kernels and loops as well."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from arrays_in(getattr(inner, "jaxpr", inner))


def hopper_case(head_dim=64, rows=1024, **changes):
    case = Case(
        "gpu",
        "NVIDIA H100 80GB HBM3",
        "bfloat16",
        rows,
        8,
        8,
        4,
        2,
        head_dim,
        lag_matrix("block_causal", 8),
    )
    return case._replace(**changes)


def gradient(case: Case):
    """The gradient of a sum over gpu_attention, and shapes of its arguments, for a case."""

    def shape(heads):
        return jax.ShapeDtypeStruct((2, case.rows, case.streams, heads, case.head_dim), case.dtype)

    def loss(q, k, v, present, segment):
        visibility = full_visibility(make_cells(present, segment), case.lag)
        return gpu_attention(q, k, v, visibility).astype(jnp.float32).sum()

    cells = (
        jax.ShapeDtypeStruct((2, case.rows, case.streams), bool),
        jax.ShapeDtypeStruct((2, case.rows), jnp.int32),
    )
    return jax.jit(jax.grad(loss, (0, 1, 2))), (
        shape(case.heads),
        shape(case.kv_heads),
        shape(case.kv_heads),
        *cells,
    )


def test_memory_is_linear_in_rows():
    case = hopper_case(rows=1024)
    function, arguments = gradient(case)
    shapes = list(arrays_in(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert (128, 128) in shapes  # the scores of a block: the kernels are among them
    cells, largest = case.rows * case.streams, max(map(math.prod, shapes))
    assert largest == 2 * cells * case.heads * case.head_dim  # q


@pytest.mark.parametrize("head_dim", [64, 128])
def test_lowers_to_triton(head_dim):
    """As far as it goes without a card: the three kernels become Triton modules for it."""
    lags = {"block_causal": lag_matrix("block_causal", 8), "random": random_lag(3, 8)}
    card = AbstractDevice(device_kind=hopper_case().device_kind, num_cores=132, platform="gpu")
    for lag in lags.values():
        case = hopper_case(rows=100, head_dim=head_dim, lag=lag)
        assert declines("gpu", case) is None
        function, arguments = gradient(case)
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=card)):
            lowered = function.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert lowered.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 3


def test_declines_what_it_is_not_for():
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
