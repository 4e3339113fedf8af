"""Splash attention against the dense reference, its block map, and compilation for TPUs."""

import inspect
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from runs import needs_libtpu
from test_attention import (
    assert_same,
    full_visibility,
    outputs_and_gradients,
    random_inputs,
    random_lag,
)

from msllm.config import MeshConfig
from msllm.model.attention import splash
from msllm.model.attention.backend import Case
from msllm.model.attention.blocks import EMPTY, FULL, PARTIAL, block_map, flatten
from msllm.model.attention.dispatch import attention, declines
from msllm.model.attention.reference import reference_attention
from msllm.model.attention.splash import Blocks, blocks_for, splash_attention
from msllm.sharding import axis_index, gather, make_mesh, named_sharding, partition_spec
from msllm.streams import NEVER, PRESETS, Cells, Visibility, lag_matrix, visible

SMALL = Blocks(128, 128)


def some_lag(visibility, streams):
    return (
        random_lag(streams, streams) if visibility == "random" else lag_matrix(visibility, streams)
    )


def compare(q, k, v, cells, lag, q_streams=None, blocks=SMALL):
    """Asserts that splash and the reference give the same outputs and gradients."""
    q_streams = np.arange(lag.shape[0]) if q_streams is None else np.array(q_streams)
    q_cells = cells._replace(
        present=cells.present[:, :, q_streams], seen=cells.seen[:, :, q_streams]
    )
    q, visibility = q[:, :, q_streams], Visibility(q_cells, cells, lag, jnp.asarray(q_streams))

    def ours(q, k, v):
        return splash_attention(q, k, v, visibility, interpret=True, blocks=blocks)

    def theirs(q, k, v):
        return reference_attention(q, k, v, visibility)

    assert_same(outputs_and_gradients(ours, q, k, v), outputs_and_gradients(theirs, q, k, v))


# T * S is between 2 and 3 blocks and not a multiple of the block.
@pytest.mark.slow
@pytest.mark.parametrize("visibility", [*PRESETS, "random"])
@pytest.mark.parametrize(
    "streams, rows", [(1, 270), (2, 150), (3, 95), (4, 75), (8, 37), (10, 27), (16, 19)]
)
def test_splash_equals_reference(streams, rows, visibility):
    batch = 2 if streams != 2 else 1
    q, k, v, cells = random_inputs(streams, batch, rows, streams, 4, (2, 4, 1)[streams % 3])
    compare(q, k, v, cells, some_lag(visibility, streams))


@pytest.mark.slow
@pytest.mark.parametrize(
    "visibility, q_streams, settings, blocks",
    [
        ("block_causal", [4, 5], {}, SMALL),
        ("same_row", [7], {"absent": 0.0, "silent": 0.5}, SMALL),
        ("random", [6, 1, 3], {"absent": 0.9, "segments": 1}, Blocks(128, 256)),
        ("isolated", [2, 0], {"absent": 0.0, "silent": 0.0, "segments": 9}, Blocks(256, 128)),
    ],
)
def test_queries_of_some_streams_equal_reference(visibility, q_streams, settings, blocks):
    q, k, v, cells = random_inputs(7, 2, 49, 8, 4, 2, **settings)
    compare(q, k, v, cells, some_lag(visibility, 8), q_streams, blocks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "edges", [{(2, 0): NEVER}, {(2, 0): NEVER, (0, 1): 0, (1, 2): 4}], ids=["firewall", "edges"]
)
def test_single_lags_and_calls_for_some_of_the_tables(edges, monkeypatch):
    # A table has 2 * 2 blocks, so each call takes two of the four tables.
    monkeypatch.setattr(splash, "MAP_ENTRIES", 8)
    lag = lag_matrix("block_causal", 3)
    for edge, value in edges.items():
        lag[edge] = value
    compare(*random_inputs(5, 4, 50, 3, 2, 2), lag)


@pytest.mark.slow
@pytest.mark.parametrize("visibility", ["block_causal", "random"])
def test_sharded_equals_unsharded(visibility):
    q, k, v, cells = random_inputs(1, 2, 40, 4, 4, 2)
    lag = some_lag(visibility, 4)
    heads = partition_spec("batch", "row", "stream", "heads", "head_dim")
    table, row = partition_spec("batch", "row", "stream"), partition_spec("batch", "row")

    def local(q, k, v, cells):
        def all_streams(x):
            return gather(x, 2, ("stream",))

        keys = cells._replace(present=all_streams(cells.present), seen=all_streams(cells.seen))
        streams = axis_index("stream") * q.shape[2] + jnp.arange(q.shape[2])
        visibility = Visibility(cells, keys, lag, streams)
        k, v = all_streams(k), all_streams(v)
        return splash_attention(q, k, v, visibility, interpret=True, blocks=SMALL)

    sharded = jax.shard_map(
        local,
        mesh=make_mesh(MeshConfig(data=1, fsdp=1, stream=2, tensor=2), jax.devices()[:4]),
        in_specs=(heads, heads, heads, Cells(row, row, table, table)),
        out_specs=heads,
        check_vma=False,
    )
    ours = outputs_and_gradients(lambda q, k, v: sharded(q, k, v, cells), q, k, v)

    def theirs(q, k, v):
        return reference_attention(q, k, v, full_visibility(cells, lag))

    assert_same(ours, outputs_and_gradients(theirs, q, k, v))


def earlier(row, stream, k_row, k_stream, lag, segment=1, present=True, k_segment=1, seen=True):
    """The pairs that the lag admits, without the rule that a cell sees itself.

    Keys get stream numbers that no query has, so that no key is the cell of its query.
    """
    k_stream, lag = k_stream + lag.shape[0], lag[stream, k_stream]
    return visible(row, stream, segment, present, k_row, k_stream, k_segment, seen, lag)


@pytest.mark.parametrize("visibility", [*PRESETS, "random", "never"])
@pytest.mark.parametrize(
    "rows, streams, tables, parts",
    [
        (21, 3, 1, 1),
        (21, 3, 4, 3),
        (16, 16, 2, 1),
        (16, 16, 2, 4),
        (4096, 16, 1, 1),
        (6553, 10, 3, 1),
        (6553, 10, 3, 5),
    ],
)
def test_the_predicate_on_codes_equals_visibility(rows, streams, tables, parts, visibility):
    """With the keys of all streams, or of a part of them."""
    lag = (
        np.full((streams, streams), NEVER)
        if visibility == "never"
        else some_lag(visibility, streams)
    )
    size = streams // parts
    length = -(-rows * size // 384) * 384
    predicate = splash._make_predicate(lag, rows, tables, size, length)
    rng = np.random.default_rng(rows)
    row, stream, table = (rng.integers(0, end, 200_000) for end in (rows, streams, tables))
    k_row, k_stream, start = (rng.integers(0, end, 200_000) for end in (rows, size, parts))
    near = rng.random(row.shape) < 0.7  # mistakes are most likely near the diagonal
    k_row = np.where(near, np.clip(row + rng.integers(-8, 4, row.shape), 0, rows - 1), k_row)
    k, k_stream, start = k_row * size + k_stream, k_stream + start * size, start * size
    code = predicate.encode(*(jnp.asarray(x, jnp.int32) for x in (row, stream, table, start)))
    assert code.dtype == jnp.int32 and code.min() >= 0
    seen = predicate.sees(code, jnp.asarray(table * length + k, jnp.int32))
    np.testing.assert_array_equal(np.asarray(seen), earlier(row, stream, k_row, k_stream, lag))


def test_quotient_is_exact():
    for divisor in (*range(1, 130), 384, 640, 896, 65_536):
        multiples = np.arange(0, splash.EXACT, divisor, dtype=np.int32)
        for x in (multiples, multiples[1:] - 1):  # the quotient is monotonic in between
            np.testing.assert_array_equal(splash._quotient(x, divisor), x // divisor)


@pytest.mark.parametrize("segments, absent", [(1, 0.0), (3, 0.0), (3, 0.3), (9, 0.1), (30, 0.95)])
@pytest.mark.parametrize("visibility", [*PRESETS, "random"])
def test_the_block_map_is_correct_and_tight(visibility, segments, absent):
    rows, streams, q_block, k_block = 40, 3, 9, 12  # neither block size divides 120 cells
    *_, cells = random_inputs(
        segments, 2, rows, streams, 1, 1, absent=absent, silent=absent, segments=segments
    )
    lag = some_lag(visibility, streams)
    length = 144
    queries = flatten(jnp.arange(rows), cells.segment, cells.present, length)
    keys = flatten(jnp.arange(rows), cells.segment, cells.seen, length)
    kinds = np.asarray(block_map(queries, keys, lag.min(), lag.max(), q_block, k_block))
    assert kinds.shape == (2, length // q_block, length // k_block) and kinds.dtype == np.int8
    for table in range(2):
        row, stream = np.divmod(np.arange(rows * streams), streams)
        segment = np.asarray(cells.segment)[table, row]
        present, seen = (np.asarray(x)[table].ravel() for x in (cells.present, cells.seen))
        pairs = np.zeros((length, length), bool)
        pairs[: row.size, : row.size] = earlier(
            row[:, None],
            stream[:, None],
            row,
            stream,
            lag,
            segment=segment[:, None],
            present=present[:, None],
            k_segment=segment,
            seen=seen,
        )
        blocks = pairs.reshape(length // q_block, q_block, -1, k_block).swapaxes(1, 2)
        some, every = blocks.any((2, 3)), blocks.all((2, 3))
        assert not (some & (kinds[table] == EMPTY)).any()
        assert not (~every & (kinds[table] == FULL)).any()
        if absent == 0 and visibility in ("block_causal", "same_row"):
            expected = np.where(every, FULL, np.where(some, PARTIAL, EMPTY))
            np.testing.assert_array_equal(kinds[table], expected)


def test_each_step_of_the_kernels_loads_the_block_that_it_computes():
    kinds = np.random.default_rng(0).choice([EMPTY, EMPTY, PARTIAL, FULL], (3, 4, 5))
    kinds = jnp.asarray(kinds, jnp.int8)
    kinds = kinds.at[1, 2].set(EMPTY).at[2].set(EMPTY)
    load, kind = splash._forward_order(kinds)
    assert load.shape == kind.shape == (1, 12, 5)
    active = np.asarray(kind[0]) > 0
    table, key = np.divmod(np.asarray(load[0]), 5)
    assert (key == np.arange(5))[active].all()
    assert (table == np.arange(12)[:, None] // 4)[active].all()
    # A step without work loads a block that an active step needs.
    idle_load = np.asarray(load[0]).ravel()[np.flatnonzero(~active.ravel())[0]]
    assert idle_load in np.asarray(load[0])[active]
    load, kind = splash._backward_order(kinds)
    assert load.shape == kind.shape == (1, 4, 15)
    active = np.asarray(kind[0]) > 0
    table, query = np.divmod(np.asarray(load[0]), 4)
    assert (query == np.arange(4)[:, None])[active].all()
    assert (table == np.arange(15) // 5)[active].all()
    np.testing.assert_array_equal(np.asarray(kind[0]).reshape(4, 3, 5).swapaxes(0, 1), kinds)


def test_the_plan_of_65536_cells_is_cheap():
    rows, streams = 4096, 16
    *_, cells = random_inputs(0, 1, rows, streams, 1, 1, segments=16)
    lag = lag_matrix("block_causal", streams)

    def plan(cells):
        length = rows * streams
        predicate = splash._make_predicate(lag, rows, 1, streams, length)
        visibility = Visibility(cells, cells, lag, np.arange(streams))
        return splash._plan(visibility, predicate, Blocks(512, 512), length, length)

    compiled = jax.jit(plan).lower(cells).compile()
    jax.block_until_ready(compiled(cells))
    begin = time.process_time()
    result = jax.block_until_ready(compiled(cells))
    seconds = time.process_time() - begin
    active = float(np.mean(np.asarray(result.forward[1]) != EMPTY))
    assert seconds < 0.1
    assert active < 0.1  # about 1 / 32 of all blocks, because there are 16 segments
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", compiled.as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) <= 2 * rows * streams


def test_private_functions_of_jax_have_the_expected_parameters():
    """If jax changes them, change the last section of attention/splash.py."""
    common = (
        "q k v segment_ids sinks is_mqa mask_value mask_function attn_logits_soft_cap interpret"
    )
    forward = "fwd_mask_info block_sizes residual_checkpoint_name save_residuals"
    backward = "mask_info logsumexp do di bq bkv q_layout k_layout v_layout"
    expected = {
        "_splash_attention_forward": {*common.split(), *forward.split()},
        "_splash_attention_bwd_dq": {*common.split(), *backward.split()},
        "_splash_attention_bwd_dkv": {
            *common.split(),
            *backward.split(),
            "bkv_compute",
            "use_fused_bwd_kernel",
        },
    }
    for name, parameters in expected.items():
        assert set(inspect.signature(getattr(splash.kernels, name)).parameters) == parameters, (
            f"jax {jax.__version__}"
        )
    fields = "data_next mask_next block_mask partial_mask_blocks q_sequence is_dynamic_mask"
    assert splash.MaskInfo._fields == tuple(fields.split())


def make_case(**changes):
    case = Case(
        "tpu", "TPU v5 lite", "bfloat16", 1024, 8, 8, 32, 8, 128, lag_matrix("block_causal", 8)
    )
    return case._replace(**changes)


def test_declines_unsupported_cases():
    def reason(**changes):
        return declines("splash", make_case(**changes))

    assert reason() is None
    assert reason(device_kind="TPU7x", dtype="float32", kv_heads=32, head_dim=64) is None
    assert reason(rows=4096, streams=16, lag=random_lag(0, 16)) is None  # 65,536 cells
    assert "cpu" in reason(platform="cpu")
    assert "float16" in reason(dtype="float16")
    assert "512" in reason(head_dim=512)
    assert "32 for 5" in reason(kv_heads=5)
    assert "20000 rows of 16 streams" in reason(rows=20_000, streams=16, q_streams=16)
    assert reason(rows=20_000, streams=16, q_streams=2) is None


def test_queries_with_fewer_rows_than_the_keys_are_refused():
    q, k, v, cells = random_inputs(0, 1, 4, 2, 2, 2)
    visibility = full_visibility(cells, lag_matrix("block_causal", 2))
    with pytest.raises(ValueError, match="1 rows and the keys 4"):
        splash_attention(q[:, :1], k, v, visibility, interpret=True)


def test_blocks_depend_on_the_generation_and_fit_the_lengths():
    assert blocks_for("TPU v6 lite") != blocks_for("TPU v5 lite") == blocks_for("TPU v9")
    for blocks in splash.BLOCKS.values():
        (q, q_length), (k, k_length) = splash._even_blocks(1024, 3, 10, blocks)
        assert q <= blocks.q and k <= blocks.k
        assert q % 128 == k % 128 == q_length % q == k_length % k == 0
        # The padding is less than 128 cells for each block.
        assert q_length < 1024 * 3 + 128 * q_length // q
        assert k_length < 1024 * 10 + 128 * k_length // k


def tpus(topology, monkeypatch):
    """The devices of a topology, for compilation only."""
    # libtpu must not look for a TPU, or for another process that uses it.
    for variable, value in (("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")):
        monkeypatch.setenv(variable, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def tpu(topology, monkeypatch):
    """(device, its sharding, a function array(dtype, *shape) for abstract arrays on it)."""
    device = tpus(topology, monkeypatch)[0]
    sharding = NamedSharding(Mesh([device], ("one",)), PartitionSpec())

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return device, sharding, array


def count_kernels(compiled):
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@needs_libtpu
@pytest.mark.slow
def test_a_saved_forward_kernel_does_not_run_again(monkeypatch):
    _, sharding, array = tpu("v5e:2x2", monkeypatch)
    cells = Cells(*(array(jnp.int32, 1, 64),) * 2, *(array(bool, 1, 64, 2),) * 2)
    lag = lag_matrix("block_causal", 2)

    def kernels(*names):
        """The number of kernels if layers save values of these names for the backward pass."""

        def loss(x, cells):
            def attend(x):
                return jnp.sin(splash_attention(x, x, x, full_visibility(cells, lag)))

            policy = jax.checkpoint_policies.save_only_these_names(*names)

            def layer(x, _):
                return x + attend(x), None

            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
            return jax.lax.scan(layer, x, length=3)[0].sum()

        x = array(jnp.float32, 1, 64, 2, 2, 128)
        gradient = jax.jit(jax.grad(loss), out_shardings=sharding)
        return count_kernels(gradient.lower(x, cells).compile())

    assert (kernels("attention"), kernels("others")) == (3, 4)


TOPOLOGIES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, rows, streams, visibility, dtype",
    [
        *((topology, 1024, 8, "block_causal", "bfloat16") for topology in TOPOLOGIES),
        ("v5e:2x2", 4096, 16, "block_causal", "bfloat16"),
        ("v5e:2x2", 100, 10, "random", "float32"),
        ("v6e:2x2", 1024, 2, "isolated", "float32"),
    ],
)
def test_compiles_for_tpus(topology, rows, streams, visibility, dtype, monkeypatch):
    """The TPU compiler accepts the three kernels, and temporaries take O(L) memory."""
    device, sharding, array = tpu(topology, monkeypatch)
    heads, kv_heads, head_dim, lag = 4, 2, 128, some_lag(visibility, streams)

    def run(q, k, v, cells, d_out):
        visibility = full_visibility(cells, lag)

        def attend(*qkv):
            return splash_attention(*qkv, visibility, blocks=blocks_for(device.device_kind))

        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(d_out)

    table = (1, rows, streams)
    q, k = array(dtype, *table, heads, head_dim), array(dtype, *table, kv_heads, head_dim)
    cells = Cells(*(array(jnp.int32, 1, rows),) * 2, *(array(bool, *table),) * 2)
    compiled = jax.jit(run, out_shardings=sharding).lower(q, k, k, cells, q).compile()
    assert count_kernels(compiled) == 3
    q_bytes = math.prod(q.shape) * q.dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 10 * q_bytes + 2**22


@needs_libtpu
@pytest.mark.slow
def test_the_ring_sends_keys_while_the_kernels_run(monkeypatch):
    """Its permutes are asynchronous, unlike all-gathers."""
    devices = tpus("v6e:2x2", monkeypatch)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, stream=4, tensor=1), devices)
    axes, lag = ("batch", "row", "stream", "heads", "head_dim"), lag_matrix("same_row", 8)
    backend = splash.BACKEND.with_options(blocks=blocks_for(devices[0].device_kind))
    heads, table, row = (partition_spec(*axes[:n]) for n in (5, 3, 2))
    sharded = jax.shard_map(
        lambda q, k, v, cells: attention(q, k, v, cells, lag, backend, ring=True),
        mesh=mesh,
        in_specs=(heads, heads, heads, Cells(row, row, table, table)),
        out_specs=heads,
        check_vma=False,
    )

    def run(q, k, v, cells, d_out):
        out, pull_back = jax.vjp(lambda *qkv: sharded(*qkv, cells), q, k, v)
        return out, pull_back(d_out)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=named_sharding(mesh, *axes[: len(shape)])
        )

    q, k = array(jnp.bfloat16, 1, 512, 8, 4, 128), array(jnp.bfloat16, 1, 512, 8, 2, 128)
    cells = Cells(*(array(jnp.int32, 1, 512),) * 2, *(array(bool, 1, 512, 8),) * 2)
    compiled = jax.jit(run).lower(q, k, k, cells, q).compile()
    assert (
        count_kernels(compiled) == 6
    )  # three for the first turn, and three in the loop over the others
    pattern = r" (all-gather|collective-permute)(-start)?\("
    collectives = set(re.findall(pattern, compiled.as_text()))
    assert collectives == {("collective-permute", "-start")}
