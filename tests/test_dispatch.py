"""The choice of an attention backend, and what is logged about it."""

import dataclasses
import logging
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from msllm.config import MeshConfig, ModelConfig
from msllm.errors import UserError
from msllm.kernels import cpu as cpu_kernels
from msllm.model.attention import splash
from msllm.model.attention.dispatch import BACKENDS, choose_backend, get_backend
from msllm.sharding import AXES, make_mesh
from msllm.streams import lag_matrix

MODEL = ModelConfig(num_heads=4, num_kv_heads=2, head_dim=64, compute_dtype="bfloat16")
LAG = lag_matrix("block_causal", 3)
TPU, HOPPER = ("tpu", "TPU v6 lite"), ("gpu", "NVIDIA H100 80GB HBM3")


def mesh_of(platform, device_kind, **axes):
    """A fake mesh with what `choose_backend` reads, for devices that this machine does not have."""
    device = types.SimpleNamespace(platform=platform, device_kind=device_kind)
    return types.SimpleNamespace(
        devices=np.array([device], object), shape=dict.fromkeys(AXES, 1) | axes
    )


def chosen(mesh, caplog, lag=LAG, rows=64, **changes):
    """(name of the chosen backend, logged messages) for MODEL with changes."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="msllm"):
        backend = choose_backend(dataclasses.replace(MODEL, **changes), lag, rows, mesh)
    return backend.name, [record.getMessage() for record in caplog.records]


def test_the_log_says_why_each_backend_declines(caplog):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    name, logged = chosen(mesh, caplog)
    assert name == "chunked"
    assert logged == [
        "attention: chunked; not cpu: it computes in float32, but the model in bfloat16"
    ]


def test_a_cpu_gets_its_kernels_if_they_can_be_compiled(caplog, monkeypatch):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(cpu_kernels, "unavailable_reason", lambda: None)
    name, (line,) = chosen(mesh, caplog, compute_dtype="float32")
    assert name == "cpu" and line == "attention: cpu"  # nothing about other hardware
    monkeypatch.setattr(cpu_kernels, "unavailable_reason", lambda: "there is no C++ compiler")
    name, (line,) = chosen(mesh, caplog, compute_dtype="float32")
    assert name == "chunked" and line.endswith("; not cpu: there is no C++ compiler")


def test_a_tpu_gets_splash_with_its_block_sizes(caplog):
    for kind in ("TPU v6 lite", "TPU v5 lite"):
        mesh = mesh_of("tpu", kind)
        assert chosen(mesh, caplog) == ("splash", ["attention: splash"])
        backend = choose_backend(MODEL, LAG, 64, mesh)
        for function in (backend.attend, *backend.ring_parts):
            assert function.keywords == {"blocks": splash.blocks_for(kind)}


def test_a_hopper_gpu_gets_its_kernels(caplog):
    name, logged = chosen(mesh_of(*HOPPER), caplog)
    assert name == "gpu"
    assert logged == ["attention: gpu"]


@pytest.mark.parametrize(
    "device, changes, reason",
    [
        (
            HOPPER,
            {"head_dim": 96},
            "not gpu: it needs a head_dim of 16, 32, 64 or 128, not 96",
        ),
        (
            HOPPER,
            {"compute_dtype": "float32"},
            "not gpu: it computes in bfloat16, but the model in float32",
        ),
        (
            HOPPER,
            {"lag": np.arange(9, dtype=np.int32).reshape(3, 3)},
            "not gpu: it supports at most 8 distinct lags, .* has 9",
        ),
        (
            ("gpu", "NVIDIA A100-SXM4-40GB"),
            {},
            "not gpu: it supports H100, .* this is NVIDIA A100-SXM4-40GB",
        ),
        (TPU, {"head_dim": 512}, "not splash: it needs a head_dim of at most 256, not 512"),
    ],
    ids=["head_dim", "dtype", "lags", "older GPU", "wide heads on a TPU"],
)
def test_chunked_is_chosen_where_a_kernel_declines(caplog, device, changes, reason):
    name, (line,) = chosen(mesh_of(*device), caplog, **changes)
    assert name == "chunked"
    assert line.startswith("attention: chunked; ") and re.search(reason, line)


def test_backends_are_asked_about_the_share_of_a_device(caplog):
    """Streams are padded to a multiple of their mesh axis, and heads are divided."""
    lag = lag_matrix("block_causal", 10)
    assert chosen(mesh_of(*TPU), caplog, lag, rows=30_000)[0] == "chunked"
    assert chosen(mesh_of(*TPU, stream=4), caplog, lag, rows=30_000)[0] == "splash"
    # Padding adds the lag NEVER, which is one distinct lag too many for the GPU kernel.
    distinct = np.arange(8, dtype=np.int32)[None, :].repeat(8, 0)
    assert chosen(mesh_of(*HOPPER), caplog, distinct)[0] == "gpu"
    assert chosen(mesh_of(*HOPPER, stream=3), caplog, distinct)[0] == "chunked"


def test_the_reference_is_never_chosen_automatically(caplog):
    for device in (
        ("cpu", "cpu"),
        TPU,
        HOPPER,
        ("gpu", "NVIDIA A100-SXM4-40GB"),
        ("rocm", "AMD Instinct"),
    ):
        for changes in ({}, {"head_dim": 1024, "compute_dtype": "float32"}):
            assert chosen(mesh_of(*device), caplog, **changes)[0] != "reference"
            for name in ("reference", "chunked"):
                assert chosen(mesh_of(*device), caplog, attention=name, **changes)[0] == name


@pytest.mark.parametrize(
    "device, changes, message",
    [
        (
            ("cpu", "cpu"),
            {"attention": "splash"},
            "'splash': it needs a TPU, but the devices are of platform cpu",
        ),
        (
            ("cpu", "cpu"),
            {"attention": "cpu"},
            "'cpu': it computes in float32, but the model in bfloat16",
        ),
        (TPU, {"attention": "gpu"}, "'gpu': it needs a GPU, but the devices are of platform tpu"),
        (
            HOPPER,
            {"attention": "gpu", "head_dim": 96},
            "'gpu': it needs a head_dim of .* not 96",
        ),
        (
            TPU,
            {"attention": "splash", "head_dim": 512},
            "'splash': it needs a head_dim of at most 256",
        ),
    ],
    ids=["no TPU", "no float32", "no GPU", "head_dim on a GPU", "head_dim on a TPU"],
)
def test_a_requested_backend_that_declines_is_an_error(device, changes, message):
    with pytest.raises(
        UserError,
        match=f"config.model.attention is {message}.*; set it to 'auto' or another backend",
    ):
        choose_backend(dataclasses.replace(MODEL, **changes), LAG, 64, mesh_of(*device))


def test_the_reference_does_not_support_kv_ring(caplog):
    ring = {"kv_ring": True, "attention": "reference"}
    assert chosen(mesh_of(*TPU), caplog, **ring)[0] == "reference"  # one device has all keys
    with pytest.raises(
        UserError,
        match="config.model.attention is 'reference': it takes all keys at once, .*kv_ring",
    ):
        chosen(mesh_of(*TPU, stream=2), caplog, **ring)
    for device, name in ((TPU, "splash"), (HOPPER, "gpu"), (("cpu", "cpu"), "chunked")):
        assert chosen(mesh_of(*device, stream=2), caplog, kv_ring=True)[0] == name


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_has_the_name_of_its_module(name):
    backend = get_backend(name)
    assert backend.name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        backend.name = "other"


def test_modules_of_other_platforms_are_not_imported():
    """Kernel libraries are slow to import."""
    code = (
        "import sys, jax; from msllm.config import *; from msllm.sharding import make_mesh\n"
        "from msllm.model.attention.dispatch import choose_backend\n"
        "from msllm.streams import lag_matrix\n"
        "mesh = make_mesh(MeshConfig(), jax.devices()[:1])\n"
        "print(choose_backend(ModelConfig(), lag_matrix('isolated', 2), 8, mesh).name)\n"
        "print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, modules = run.stdout.splitlines()
    loaded = {module for module in modules.split() if module.startswith("msllm.model.attention.")}
    assert name in ("cpu", "chunked") and f"msllm.model.attention.{name}" in loaded
    assert not loaded & {f"msllm.model.attention.{other}" for other in ("splash", "gpu")}
    assert "jax.experimental.pallas" not in modules
