"""What a step costs by formula, against what XLA counts and against cases worked out by hand."""

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
    return Shape(config, StreamSpec.from_config(config.streams), ONE | mesh, attention)


def test_remat_recomputes_what_xla_counts():
    def counted(remat):
        config = replace(CONFIG, "model", remat=remat)
        program = make_program(config)
        return program.step.lower(program.abstract_state, program.abstract_batch).cost_analysis()[
            "flops"
        ]

    work = {
        remat: flops(shape(replace(CONFIG, "model", remat=remat)))["remat"]
        for remat in ("none", "dots", "full")
    }
    assert work["none"] == work["dots"] == 0
    none, dots, full = (counted(remat) for remat in ("none", "dots", "full"))
    assert full - none == pytest.approx(
        work["full"], rel=0.06
    )  # norms and rotations are in XLA's count only
    assert dots - none < 0.1 * work["full"]


def test_scores_are_computed_again_by_blockwise_attention_only():
    pairs = 4 * (8 * 9 // 2) * 4  # four tables, a triangle of rows for each pair of streams
    blockwise = flops(shape(attention="chunked"))
    assert blockwise["attention_scores_again"] == 2 * 4 * 16 * pairs
    # Two backward kernels: each computes the scores and the gradients of the softmax's weights.
    assert flops(shape(attention="splash"))["attention_scores_again"] == 3 * 2 * 4 * 16 * pairs
    assert flops(shape())["attention_scores_again"] == 0
    assert blockwise["hardware"] == sum(
        value for name, value in blockwise.items() if name != "hardware"
    )


def test_the_head_of_a_stream_without_weight_counts_where_it_shares_a_program():
    config = replace(CONFIG, "streams", kinds=("input", "output"))
    assert flops(shape(config))["head_without_weight"] == 0
    # One stream on each device: both run the program that has the head.
    assert flops(shape(config, stream=2))["head_without_weight"] == 6 * 4 * 8 * 64 * 64 / 2


def test_a_head_in_parts_computes_logits_twice_and_holds_less():
    parts = replace(CONFIG, "loss", vocab_chunks=4)
    assert (
        flops(shape(parts))["logits_again"] == 2 * 4 * 8 * 2 * 64 * 64
        and flops(shape())["logits_again"] == 0
    )
    assert hbm_bytes(shape(parts), 1.0)["head"] > hbm_bytes(shape(), 1.0)["head"]
    assert memory_parts(shape(parts), 1.0)["logits"] == memory_parts(shape(), 1.0)["logits"] / 4
    assert memory_parts(shape(parts), 1.0)["tables"] < memory_parts(shape(), 1.0)["tables"]


def test_streams_that_fill_up_the_mesh_axis_cost_as_others_do():
    # Three streams on two devices are four.
    streams = {"names": ("a", "b", "c"), "kinds": ("output",) * 3}
    three = flops(shape(replace(CONFIG, "streams", **streams), stream=2))
    layer = 2 * 4 * 8 * (64 * (2 * 4 + 2 * 2) * 16 + 3 * 64 * 512)  # forward, of one stream
    assert three["absent_streams"] == 3 * layer / 2
    assert three["head_without_weight"] == 6 * 4 * 8 * 64 * 64 / 2
    assert flops(shape(stream=2))["absent_streams"] == 0
    assert shape(replace(CONFIG, "streams", **streams), stream=2).cells == 4 * 8 * 2


def test_devices_share_flops_activations_and_weights():
    for part in ("useful", "hardware"):
        assert flops(shape(fsdp=2, tensor=2))[part] == flops(shape())[part] / 4
    whole, spread = hbm_bytes(shape(), 1200.0), hbm_bytes(shape(fsdp=2), 600.0)
    assert (
        spread["state"] == whole["state"] / 2 and spread["activations"] == whole["activations"] / 2
    )
    assert spread["weights"] == whole["weights"]  # every device gathers and reads all of them


def test_micro_batches_shrink_activations_and_read_weights_again():
    parts = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, accumulate=2))
    assert (
        memory_parts(shape(parts), 1.0)["kept_activations"]
        == memory_parts(shape(), 1.0)["kept_activations"] / 2
    )
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
def test_the_first_remedy_is_that_of_the_largest_part(changes, state, part):
    config = CONFIG
    for section, values in changes.items():
        config = replace(config, section, **values)
    assert remedies(shape(config, **changes.get("mesh", {})), state)[0].startswith(REMEDIES[part])


def test_keys_in_a_ring_are_those_of_two_devices():
    gathered, ring = (
        memory_parts(shape(replace(CONFIG, "model", kv_ring=ring), stream=8), 1.0)["gathered_keys"]
        for ring in (False, True)
    )
    assert (
        ring == gathered * (1 + 4 / 4) / 8
    )  # float32: gradients are no larger than what they are of


def test_a_remedy_is_not_what_is_already_so():
    kept = replace(CONFIG, "model", remat="full", num_layers=100_000)
    assert remedies(shape(kept), 1.0)[0].startswith("config.model.remat='offload'")
    offloaded = shape(replace(kept, "model", remat="offload"))
    assert not any("remat" in line for line in remedies(offloaded, 1.0))
    assert (
        host_bytes(offloaded) == memory_parts(shape(kept), 1.0)["kept_activations"]
        and host_bytes(shape(kept)) == 0
    )
    gathered = replace(CONFIG, "model", remat="none", num_layers=100_000, d_ff=1 << 20)
    assert remedies(shape(gathered), 1.0)[0].startswith("config.model.remat='full'")


def places(slices=1, ring=4):
    """Devices of a mesh of `slices` x `ring`, each ring on one axis of its torus."""
    return [
        SimpleNamespace(id=i, slice_index=i // ring, coords=(i % ring, 0, 0))
        for i in range(slices * ring)
    ]


@pytest.mark.parametrize(
    ("kind", "dcn", "moved"),
    [
        # Of 8 GB on a ring of four: bytes that cross a link, both directions in use.
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


def test_a_step_takes_its_longest_part_and_what_nothing_hides():
    def seconds(*asynchronous):
        ring = np.array([[0, 1, 2, 3]])
        found = [
            Collective("all-gather", int(1e9), ("u8[1000000000]",), ring, 1, hidden)
            for hidden in asynchronous
        ]
        return estimate(shape(fsdp=4), 1e9, found, places(), V5E)

    alone, hidden, exposed = seconds(), seconds(True), seconds(False)
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
        assert result["mfu"] == pytest.approx(
            result["flops"]["useful"] / V5E.flops / result["step_seconds"]
        )


def test_a_bandwidth_that_is_not_known_makes_no_estimate():
    between = Collective("all-reduce", 1000, ("u8[1000]",), np.array([[0, 4]]), 1, True, True)
    result = estimate(shape(data=2, fsdp=4), 1e9, [between], places(2), TABLE["TPU v4"])
    assert math.isnan(result["step_seconds"]) and math.isnan(result["mfu"])


def test_devices_are_found_by_the_kind_that_the_runtime_names():
    assert lookup("TPU v5 lite") == V5E and lookup("TPU v5") == lookup("TPU v5p") != V5E
    assert (
        lookup("NVIDIA H100 80GB HBM3").flops == 989.5e12
        and lookup("NVIDIA H100 PCIe").flops == 756.5e12
    )
    assert (
        lookup("NVIDIA A100-SXM4-80GB").hbm_gib == 80
        and lookup("NVIDIA A100-SXM4-40GB").hbm_gib == 40
    )
    assert lookup("cpu") is None
