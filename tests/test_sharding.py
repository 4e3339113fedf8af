"""Every mesh computes the same as one device, and a mesh that does not fit is refused."""

import functools
import itertools

import jax
import numpy as np
import pytest
from runs import four_streams, host, make_program, place, random_tables

from msllm import sharding
from msllm.config import MeshConfig
from msllm.errors import UserError
from msllm.sharding import AXES, make_mesh, mesh_axes, partition_spec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_fast")]
STEPS = 5
ADAM = {"optim.lr": 1e-2, "optim.eps": 1e-5}
LAYOUTS = {
    "lags": {
        "streams.loss_weights": (0.0, 0.0, 0.5, 2.0),
        "streams.lags": (
            ("output", "tool", "never"),
            ("thought", "user", "0"),
            ("output", "thought", "3"),
        ),
        "streams.skip_silence": True,
        "model.tie_embeddings": False,
        "model.attention_bias": True,
        "model.kv_ring": True,  # the other layout gathers keys and values
    },
    "accumulated": {
        "data.batch_size": 16,
        "optim.accumulate": 2,
        "loss.label_smoothing": 0.1,
        "loss.z_loss": 1e-2,
        "streams.loss_weights": (1.0, 0.0, 1.0, 1.0),
        "model.attention": "reference",
        "model.kv_parts": 2,
        "model.remat": "full",
    },
    "combined": {
        "streams.loss_weights": (0.0, 0.5, 1.0, 2.0),
        "streams.combine": (
            ("output", "mixture", "thought,tool,output"),
            ("thought", "product", "output,user,tool"),
        ),
    },
    "muon": {"optim.optimizer": "muon", "optim.lr": 1e-3, "model.attention_bias": True},
}
MESHES = [
    ("lags", {"data": 2, "fsdp": 2, "stream": 2}),
    ("lags", {"stream": 4, "tensor": 2}),
    ("lags", {"fsdp": 2, "stream": 2, "tensor": 2}),
    ("accumulated", {"data": 8}),
    ("accumulated", {"fsdp": 8}),
    ("accumulated", {"data": 2, "fsdp": 2, "stream": 2}),
    ("combined", {"fsdp": 2, "stream": 2, "tensor": 2}),
    ("combined", {"data": 2, "stream": 4}),
    ("muon", {"fsdp": 2, "stream": 2, "tensor": 2}),
]


def run(program, state):
    """Takes a few steps.

    Returns (losses of all steps, metrics and parameters of the last step, last state).
    """
    losses = []
    for seed in range(STEPS):
        batch = place(program, random_tables(program.config, seed))
        # Wait for each step. Otherwise the virtual devices of a busy machine may wait for each
        # other until XLA gives up.
        state, metrics = jax.block_until_ready(program.step(state, batch))
        losses.append(float(metrics["loss"]))
    return losses, host(metrics), host(state.parameters), state


@functools.cache
def one_device(layout):
    """(initial state, losses, metrics, parameters) of `run` on one device."""
    program = make_program(four_streams(**ADAM | LAYOUTS[layout]))
    state = program.init()
    return host(state), *run(program, state)[:3]


def mesh_name(value):
    if isinstance(value, str):
        return value
    return "-".join(f"{axis}{size}" for axis, size in value.items())


@pytest.mark.parametrize("layout, axes", MESHES, ids=mesh_name)
def test_a_mesh_computes_what_one_device_computes(layout, axes):
    state, losses, metrics, parameters = one_device(layout)
    program = make_program(four_streams(**ADAM | LAYOUTS[layout]), 8, **axes)
    state = jax.device_put(state, program.state_shardings)
    sharded_losses, sharded_metrics, sharded_parameters, state = run(program, state)
    np.testing.assert_allclose(sharded_losses, losses, rtol=0, atol=1e-5)
    assert losses[-1] < losses[0]
    for name, value in metrics.items():
        np.testing.assert_allclose(sharded_metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    for (path, expected), found in zip(leaves, jax.tree.leaves(sharded_parameters), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5, err_msg=name)
    assert_sharded_by_rules(program, state)


def test_splitting_the_fsdp_axis_changes_nothing(monkeypatch):
    """On a TPU torus, `fsdp` can be two axes of the mesh."""
    monkeypatch.setattr(sharding, "_shared_fsdp", lambda devices, fsdp, within: 2 - fsdp % 2)
    layout, axes = "lags", {"fsdp": 4, "stream": 2}
    assert dict(make_mesh(MeshConfig(**{"data": 1} | axes)).shape)["fsdp_inner"] == 2
    test_a_mesh_computes_what_one_device_computes(layout, axes)


FACTORS = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]
THREE_STREAMS = {
    # No mesh axis divides three streams, so absent streams pad them.
    "streams.names": ("user", "thought", "output"),
    "streams.kinds": ("input", "thought", "output"),
    "streams.lags": (("output", "user", "2"),),
    "model.num_heads": 8,
    "model.num_kv_heads": 8,
    "model.num_layers": 1,
    "loss.vocab_chunks": 2,
    "loss.chunk_tokens": 24,
}


def losses_of_20_steps(sizes):
    """[20, 7]: the loss, and the nll and targets of each stream, of every step."""
    config = four_streams(**ADAM | THREE_STREAMS)
    axes = dict(zip(("data", "fsdp", "stream", "tensor"), sizes))
    program = make_program(config, int(np.prod(sizes)), **axes)
    state, losses = program.init(), []
    for step in range(20):
        batch = place(program, random_tables(config, step % 4))
        state, metrics = jax.block_until_ready(program.step(state, batch))
        losses.append([float(metrics["loss"]), *metrics["nll"], *metrics["targets"]])
    return np.array(losses)


@functools.cache
def losses_on_one_device():
    return losses_of_20_steps((1, 1, 1, 1))


@pytest.mark.parametrize("sizes", FACTORS, ids=lambda sizes: "x".join(map(str, sizes)))
def test_every_factorisation_of_eight_devices_gives_the_losses_of_one_device(sizes):
    expected = losses_on_one_device()
    assert expected.shape == (20, 7) and expected[-1, 0] < expected[0, 0]
    np.testing.assert_allclose(losses_of_20_steps(sizes), expected, rtol=1e-5, atol=1e-5)


def test_initial_parameters_do_not_depend_on_the_mesh():
    layout = "lags"
    program = make_program(four_streams(**ADAM | LAYOUTS[layout]), 8, fsdp=2, stream=2, tensor=2)
    jax.tree.map(np.testing.assert_array_equal, host(program.init()), one_device(layout)[0])


def assert_sharded_by_rules(program, state):
    """Asserts that parameters and their moments are sharded as the table of rules says."""
    shape = program.mesh.shape

    def parts(*axes):
        """The number of shards of an array with these logical axes."""
        return int(np.prod([shape[mesh_axis] for axis in axes for mesh_axis in mesh_axes(axis)]))

    axes_of = {
        "['embedding']": ("vocab", "embed"),
        "['stream_embedding']": ("embed",),
        "['final_norm']": ("embed",),
        "['attention']['q']": ("embed", "heads"),
        "['attention']['k']": ("embed", "kv_heads"),
        "['attention']['o']": ("heads", "embed"),
        "['mlp']['down']": ("mlp", "embed"),
    }
    arrays = dict.fromkeys(axes_of, 0)
    for path, array in jax.tree_util.tree_leaves_with_path((state.parameters, state.opt_state)):
        name = next((name for name in axes_of if jax.tree_util.keystr(path).endswith(name)), None)
        if name is not None:
            shard = array.addressable_shards[0].data
            assert array.size == shard.size * parts(*axes_of[name]), path
            arrays[name] += 1
    assert min(arrays.values()) >= 2  # a parameter and at least one moment


def test_make_mesh_infers_the_size_of_an_axis():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "fsdp_inner": 1, "stream": 1, "tensor": 2}
    assert mesh.axis_names == AXES


@pytest.mark.parametrize("axes", [{"data": 3}, {"data": -1, "stream": 3}, {"data": 16}])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(axes):
    with pytest.raises(
        UserError, match=r"config\.mesh \(data=.*\) does not fit 8 devices.*set one axis to -1"
    ):
        make_mesh(MeshConfig(**axes))


@pytest.mark.parametrize(
    "axes, changes, length, name",
    [
        (
            {"data": 8},
            {"optim.accumulate": 2},
            "4 over data=8 x fsdp=1",
            "data.batch_size / optim.accumulate",
        ),
        (
            {"data": 4, "fsdp": 2},
            {"data.batch_size": 12},
            "12 over data=4 x fsdp=2",
            "data.batch_size",
        ),
        (
            {"data": 4, "tensor": 2},
            {"model.num_kv_heads": 1},
            "1 over tensor=2",
            "model.num_kv_heads",
        ),
        ({"tensor": 8}, {"model.num_kv_heads": 4}, "4 over tensor=8", "model.num_heads"),
        (
            {"data": 4, "tensor": 2},
            {"model.vocab_size": 31},
            "31 over tensor=2",
            "model.vocab_size",
        ),
        ({"data": 4, "tensor": 2}, {"model.d_ff": 33}, "33 over tensor=2", "model.d_ff"),
        (
            {"fsdp": 4, "stream": 2},
            {"model.d_model": 20},
            "20 over fsdp=4 x fsdp_inner=1 x stream=2",
            "model.d_model",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_a_length_is_refused(axes, changes, length, name):
    with pytest.raises(UserError) as error:
        make_program(four_streams(**changes), 8, **axes)
    assert f"does not divide {name}" in str(error.value) and length in str(error.value)
    assert "choose mesh axes" in str(error.value)


def test_partition_spec_refuses_to_use_a_mesh_axis_twice():
    assert partition_spec("vocab", "embed") == jax.sharding.PartitionSpec(
        ("tensor",), ("fsdp", "fsdp_inner", "stream")
    )
    with pytest.raises(ValueError, match="use a mesh axis twice.*tensor"):
        partition_spec("heads", "vocab")
    with pytest.raises(ValueError, match="stream"):
        partition_spec("batch", "stream", "embed")
