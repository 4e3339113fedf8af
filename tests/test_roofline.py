"""The estimated cost of a step, against XLA's counts and against cases worked out by hand."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from runs import make_config, make_program, replace

from msllm.pod.collectives import Collective
from msllm.pod.roofline import (
    REMEDIES,
    Shape,
    estimate,
    flops,
    hbm_bytes,
    host_bytes,
    memory_parts,
    remedies,
    transfer_seconds,
)
from msllm.runtime.hardware import TABLE, lookup
from msllm.streams import StreamSpec

ONE = {"data": 1, "fsdp": 1, "stream": 1, "tensor": 1}
CONFIG = make_config(
    **{
        "streams.names": ("a", "b"),
        "streams.kinds": ("output", "output"),
        "streams.visibility": "same_row",
        "model.vocab_size": 64,
        "model.d_model": 64,
        "model.d_ff": 512,
        "model.num_layers": 1,
        "model.attention": "reference",
        "model.head_dim": 16,
        "data.rows": 8,
        "data.batch_size": 4,
    }
)
V5E = TABLE["TPU v5 lite"]


def shape(config=CONFIG, attention="reference", **mesh):
    """The shape of a run on a mesh; axes that are not given have size 1."""
    return Shape(config, StreamSpec.from_config(config.streams), ONE | mesh, attention)


def test_flops_of_remat_equal_those_that_xla_counts():
    def counted(remat):
        config = replace(CONFIG, "model", remat=remat)
        program = make_program(config)
        lowered = program.step.lower(program.abstract_state, program.abstract_batch)
        return lowered.cost_analysis()["flops"]

    work = {
        remat: flops(shape(replace(CONFIG, "model", remat=remat)))["remat"]
        for remat in ("none", "dots", "full")
    }
    assert work["none"] == work["dots"] == 0
    none, dots, full = (counted(remat) for remat in ("none", "dots", "full"))
    # Only XLA counts norms and rotations.
    assert full - none == pytest.approx(work["full"], rel=0.06)
    assert dots - none < 0.1 * work["full"]


def test_only_blockwise_attention_computes_scores_again():
    pairs = 4 * (8 * 9 // 2) * 4  # 4 tables, a triangle of 8 rows, 4 pairs of streams
    blockwise = flops(shape(attention="chunked"))
    assert blockwise["attention_scores_again"] == 2 * 4 * 16 * pairs
    # Each of the two backward kernels computes the scores and the gradients of the weights. These
    # are three products more than in dense attention.
    assert flops(shape(attention="splash"))["attention_scores_again"] == 3 * 2 * 4 * 16 * pairs
    assert flops(shape())["attention_scores_again"] == 0
    assert blockwise["hardware"] == sum(
        value for name, value in blockwise.items() if name != "hardware"
    )


def test_the_head_of_a_stream_without_weight_costs_time_on_a_stream_mesh():
    config = replace(CONFIG, "streams", kinds=("input", "output"))
    assert flops(shape(config))["head_without_weight"] == 0
    # With one stream on each device, both devices run the same program, which includes the head.
    assert flops(shape(config, stream=2))["head_without_weight"] == 6 * 4 * 8 * 64 * 64 / 2


def test_vocabulary_chunks_compute_logits_twice_and_need_less_memory():
    parts = replace(CONFIG, "loss", vocab_chunks=4)
    assert flops(shape(parts))["logits_again"] == 2 * 4 * 8 * 2 * 64 * 64
    assert flops(shape())["logits_again"] == 0
    assert hbm_bytes(shape(parts), 1.0)["head"] > hbm_bytes(shape(), 1.0)["head"]
    assert memory_parts(shape(parts), 1.0)["logits"] == memory_parts(shape(), 1.0)["logits"] / 4
    assert memory_parts(shape(parts), 1.0)["tables"] < memory_parts(shape(), 1.0)["tables"]


def test_streams_that_pad_the_mesh_axis_cost_as_much_as_others():
    # Three streams on two devices are padded to four.
    streams = {"names": ("a", "b", "c"), "kinds": ("output",) * 3}
    three = flops(shape(replace(CONFIG, "streams", **streams), stream=2))
    layer = 2 * 4 * 8 * (64 * (2 * 4 + 2 * 2) * 16 + 3 * 64 * 512)  # forward pass of one stream
    assert three["absent_streams"] == 3 * layer / 2
    assert three["head_without_weight"] == 6 * 4 * 8 * 64 * 64 / 2
    assert flops(shape(stream=2))["absent_streams"] == 0
    assert shape(replace(CONFIG, "streams", **streams), stream=2).cells == 4 * 8 * 2


def test_devices_share_flops_activations_and_state():
    for part in ("useful", "hardware"):
        assert flops(shape(fsdp=2, tensor=2))[part] == flops(shape())[part] / 4
    one, two = hbm_bytes(shape(), 1200.0), hbm_bytes(shape(fsdp=2), 600.0)
    assert two["state"] == one["state"] / 2
    assert two["activations"] == one["activations"] / 2
    assert two["weights"] == one["weights"]  # every device gathers and reads all weights


def test_micro_batches_shrink_activations_and_read_weights_again():
    parts = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, accumulate=2))
    kept, half = (memory_parts(s, 1.0)["kept_activations"] for s in (shape(), shape(parts)))
    assert half == kept / 2
    assert hbm_bytes(shape(parts), 1.0)["weights"] == 2 * hbm_bytes(shape(), 1.0)["weights"]
    assert hbm_bytes(shape(parts), 1.0)["activations"] == hbm_bytes(shape(), 1.0)["activations"]


@pytest.mark.parametrize(
    ("changes", "state", "part"),
    [
        ({"model": {"remat": "none", "num_layers": 100}}, 1e3, "kept_activations"),
        (
            {
                "model": {"vocab_size": 1 << 20},
                "loss": {"chunk_tokens": 1 << 20},
                "data": {"batch_size": 64},
            },
            1e3,
            "logits",
        ),
        ({"model": {"vocab_size": 1 << 20}, "loss": {"chunk_tokens": 2}}, 1e3, "tables"),
        (
            {"model": {"num_heads": 8, "num_kv_heads": 8, "d_ff": 8}, "mesh": {"stream": 32}},
            1e3,
            "gathered_keys",
        ),
        ({}, 1e12, "state"),
        (
            {"model": {"remat": "dots", "d_ff": 1 << 20, "vocab_size": 32}, "data": {"rows": 2}},
            1e3,
            "gathered_weights",
        ),
        ({"data": {"batch_size": 4096}, "model": {"remat": "full"}}, 1e3, "one_layer"),
    ],
)
def test_the_first_remedy_is_for_the_largest_part(changes, state, part):
    config = CONFIG
    for section, values in changes.items():
        config = replace(config, section, **values)
    assert remedies(shape(config, **changes.get("mesh", {})), state)[0].startswith(REMEDIES[part])


def test_a_ring_holds_the_keys_of_two_devices():
    gathered, ring = (
        memory_parts(shape(replace(CONFIG, "model", kv_ring=ring), stream=8), 1.0)["gathered_keys"]
        for ring in (False, True)
    )
    # In float32, the gradients that travel with the keys are as large as the keys.
    assert ring == gathered * (1 + 4 / 4) / 8


def test_remedies_exclude_settings_that_are_in_use():
    kept = replace(CONFIG, "model", remat="full", num_layers=100_000)
    assert remedies(shape(kept), 1.0)[0].startswith("config.model.remat='offload'")
    offloaded = shape(replace(kept, "model", remat="offload"))
    assert not any("remat" in line for line in remedies(offloaded, 1.0))
    assert host_bytes(offloaded) == memory_parts(shape(kept), 1.0)["kept_activations"]
    assert host_bytes(shape(kept)) == 0
    gathered = replace(CONFIG, "model", remat="none", num_layers=100_000, d_ff=1 << 20)
    assert remedies(shape(gathered), 1.0)[0].startswith("config.model.remat='full'")


def places(slices=1, ring=4):
    """Stand-ins for the devices of some slices. Each slice is a ring on one axis of its torus."""
    return [
        SimpleNamespace(id=i, slice_index=i // ring, coords=(i % ring, 0, 0))
        for i in range(slices * ring)
    ]


@pytest.mark.parametrize(
    ("kind", "dcn", "moved"),
    [
        # 8 GB on a ring of four: the bytes that cross each link, with both directions in use.
        ("all-gather", False, 8e9 * 3 / 4 / 2),
        ("reduce-scatter", False, 8e9 * 3 / 4 / 2),
        ("all-reduce", False, 8e9 * 3 / 4),
        ("all-to-all", False, 8e9 * (4 / 4) / 2),
        ("collective-permute", False, 8e9),
        # Between two slices.
        ("all-gather", True, 8e9 / 2),
        ("all-reduce", True, 8e9),
        ("all-to-all", True, 8e9 / 2),
        ("collective-permute", True, 8e9),
    ],
)
def test_transfer_times(kind, dcn, moved):
    groups = np.array([[0, 4]]) if dcn else np.array([[0, 1, 2, 3]])
    collective = Collective(kind, int(8e9), ("f32[2000000000]",), groups, 3, True, dcn)
    bandwidth = V5E.dcn_bandwidth if dcn else V5E.ici_bandwidth
    assert transfer_seconds(collective, places(2), V5E) == pytest.approx(3 * moved / bandwidth)


def test_a_step_takes_its_longest_part_and_its_synchronous_collectives():
    def estimated(*asynchronous):
        """The estimate with one all-gather for each argument: whether it is asynchronous."""
        ring = np.array([[0, 1, 2, 3]])
        collectives = [
            Collective("all-gather", int(1e9), ("u8[1000000000]",), ring, 1, hidden)
            for hidden in asynchronous
        ]
        return estimate(shape(fsdp=4), 1e9, collectives, places(), V5E)

    alone, hidden, exposed = estimated(), estimated(True), estimated(False)
    gather = 1e9 * 3 / 4 / 2 / V5E.ici_bandwidth
    work = max(alone["compute_seconds"], alone["hbm_seconds"])
    assert alone["step_seconds"] == work
    assert hidden["step_seconds"] == max(work, gather)
    assert exposed["step_seconds"] == pytest.approx(work + gather)
    assert exposed["network_seconds"] == {
        "ICI fsdp": {"asynchronous": 0.0, "synchronous": pytest.approx(gather)}
    }
    for result in (alone, hidden, exposed):
        low, high = result["step_seconds_bounds"]
        assert low <= result["step_seconds"] <= high
        useful_seconds = result["flops"]["useful"] / V5E.flops
        assert result["mfu"] == pytest.approx(useful_seconds / result["step_seconds"])


def test_an_unknown_bandwidth_gives_no_estimate():
    between = Collective("all-reduce", 1000, ("u8[1000]",), np.array([[0, 4]]), 1, True, True)
    result = estimate(shape(data=2, fsdp=4), 1e9, [between], places(2), TABLE["TPU v4"])
    assert math.isnan(result["step_seconds"]) and math.isnan(result["mfu"])


def test_hardware_is_looked_up_by_device_kind():
    assert lookup("TPU v5 lite") == V5E and lookup("TPU v5") == lookup("TPU v5p") != V5E
    assert lookup("NVIDIA H100 80GB HBM3").flops == 989.5e12
    assert lookup("NVIDIA H100 PCIe").flops == 756.5e12
    assert lookup("NVIDIA A100-SXM4-80GB").hbm_gib == 80
    assert lookup("NVIDIA A100-SXM4-40GB").hbm_gib == 40
    assert lookup("cpu") is None
