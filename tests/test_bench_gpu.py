"""`msllm bench gpu` without a GPU: its smallest form, lost workers, and lowering for CUDA."""

import json
import re
import subprocess
import sys
from unittest import mock

import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from msllm.bench import gpu, gpu_parts
from msllm.errors import UserError

pytestmark = pytest.mark.slow

FAKE_WORKER = """
import json, os, sys, time
for name in map(str.strip, sys.stdin):
    if name == "decode":  # ends with the process
        print(json.dumps({"line": "before the crash"}), flush=True)
        print("the GPU burns", file=sys.stderr, flush=True)
        os._exit(3)
    if name == "attention":
        time.sleep(60)
    if name == "numerics":
        print(json.dumps({"passed": False, "error": "Traceback"}), flush=True)
    print(json.dumps({"pid": os.getpid(), "line": "x"}), flush=True)
    print(json.dumps({"end": ""}), flush=True)
"""


def test_a_part_that_fails_costs_only_itself(tmp_path, monkeypatch, capsys):
    worker, file = tmp_path / "worker.py", tmp_path / "out.json"
    worker.write_text(FAKE_WORKER)
    monkeypatch.setattr(gpu, "WORKER", [sys.executable, str(worker)])
    monkeypatch.setitem(gpu.PARTS, "attention", 1)
    monkeypatch.setattr(gpu, "_LEAST_SECONDS", 0.5)
    parts = ["numerics", "decode", "attention", "tiles"]
    settings = {"small": False, "parts": parts, "minutes": 5.0, "json": file}
    with pytest.raises(UserError, match="^numerics, decode, attention: failed or not finished"):
        gpu.run(settings)
    found = json.loads(file.read_text())["parts"]
    statuses = {name: part["status"] for name, part in found.items()}
    assert statuses == {
        "device": "ok",
        "numerics": "failed",
        "decode": "failed",
        "attention": "timeout",
        "tiles": "ok",
    }
    assert found["decode"]["results"] == [{"line": "before the crash"}]
    assert "status 3" in found["decode"]["error"] and "GPU burns" in found["decode"]["error"]
    assert found["tiles"]["results"][0]["pid"] != found["device"]["results"][0]["pid"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == list(statuses)


def test_wrong_settings_are_refused(tmp_path):
    settings = {"small": True, "parts": ["device"], "minutes": 1.0, "json": tmp_path / "x.json"}
    with pytest.raises(UserError, match="--minutes is nan: must be above 0"):
        gpu.run(settings | {"minutes": float("nan")})
    with pytest.raises(UserError, match="--parts holds 'sleep': must be some of device,"):
        gpu.run(settings | {"parts": ["sleep"]})


def test_the_smallest_form_runs_without_a_gpu(tmp_path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "msllm", "bench", "gpu", "--small", "--minutes=12"]
    done = subprocess.run([*command, f"--json={file}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    assert report["finished"]
    assert {part["status"] for part in report["parts"].values()} == {"ok"}
    checks = [x for x in report["parts"]["numerics"]["results"] if "errors" in x]
    assert {x["backend"] for x in checks} == set(gpu_parts.LIMITS)
    losses = {
        name: part["results"][2]["loss"]
        for name, part in report["parts"].items()
        if name in ("train_gpu_s8", "train_dense_s8")
    }
    assert losses["train_gpu_s8"] == pytest.approx(losses["train_dense_s8"], rel=1e-2)


@pytest.mark.parametrize(
    "form, streams, calls",
    [
        ("gpu", 8, {"d_q_kernel", "d_kv_kernel", "forward_kernel"}),
        ("cudnn", 1, {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}),
        ("cudnn_mask", 8, {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"}),
    ],
)
def test_the_full_train_step_lowers_for_cuda(form, streams, calls):
    """jax checks cuDNN's version and the card when it traces; the test answers for them."""
    with (
        mock.patch.object(gpu_parts, "on_gpu", lambda: True),
        mock.patch.object(cudnn, "check_cudnn_version", lambda: 91900),
        mock.patch.object(cudnn, "check_compute_capability", lambda _: True),
        mock.patch.object(cudnn, "is_cuda_compute_capability_equal", lambda _: False),
    ):
        program = gpu_parts.train_program(gpu_parts.FULL, form, streams)
        traced = program.step.trace(program.abstract_state, program.abstract_batch)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r'name = "(\w+_kernel)"|custom_call @(__cudnn[\w$]+)', text)
    names = ["".join(pair) for pair in found]
    assert set(names) == calls
    if form != "gpu":
        assert len(names) == 2  # the backward pass does not compute the forward pass again
