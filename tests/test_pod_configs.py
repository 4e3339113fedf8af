"""The configs for pods: their headers, their budgets, and the stored report."""

import json
import math
import os
import pathlib
import re
import runpy
import subprocess
import sys

import pytest
from runs import needs_libtpu

from msllm.config import from_config_dict
from msllm.pod import aot

ROOT = pathlib.Path(__file__).resolve().parents[1]
WITHOUT_BUDGET = ["1b_h100_8"]  # compiling for a GPU needs a GPU


def pod_configs():
    """{name: (docstring of the file, Config)} of the configs for several devices."""
    found = {}
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = runpy.run_path(str(path))
        if "BASE" in module:  # fine-tunes an imported model on one device
            continue
        config = from_config_dict(module["get_config"]())
        if max(config.mesh.fsdp, config.mesh.stream, config.mesh.tensor) > 1:
            found[path.stem] = (module["__doc__"], config)
    return found


PODS = pod_configs()


def budget_of(name):
    return json.loads((ROOT / f"configs/budgets/{name}.json").read_text())


def test_budgets_belong_to_pod_configs():
    budgets = {path.stem for path in (ROOT / "configs/budgets").iterdir()}
    assert len(PODS) > 5 and budgets == set(PODS) - set(WITHOUT_BUDGET)
    assert all("Budget: none" in PODS[name][0] for name in WITHOUT_BUDGET)


@pytest.mark.parametrize("name", PODS)
def test_the_header_of_a_config_is_right(name):
    header, config = PODS[name]
    mesh, data = config.mesh, config.data
    devices = mesh.data * mesh.fsdp * mesh.stream * mesh.tensor
    cells = data.batch_size * data.rows * len(config.streams.names)
    assert f"--config=configs/{name}.py" in header
    text = " ".join(header.split())
    streams = len(config.streams.names)
    tables = f"{data.batch_size:,} tables x {data.rows:,} rows x {streams} streams"
    assert f"Tokens per step: {tables} = {cells:,}, {cells // devices:,} per " in text
    assert "Mesh: " in header and config.model.vocab_size > 0
    if name in WITHOUT_BUDGET:
        return
    budget = budget_of(name)
    topology, slices = budget["topology"], budget["num_slices"]
    place = topology if slices == 1 else f"{slices} slices of {topology}"
    assert f"Topology: {place}." in header
    assert math.prod(map(int, re.findall(r"\d+", topology.split(":")[1]))) * slices == devices
    assert mesh.data % slices == 0
    memory = rf"Expected memory: {budget['peak_gib']:.1f} of [\d.]+ GiB per chip at the peak\."
    assert re.search(memory, text)


@pytest.mark.parametrize("name", sorted(set(PODS) - set(WITHOUT_BUDGET)))
def test_a_budget_excludes_all_reduces_of_unsharded_gradients(name):
    """Gradients are reduce-scattered first, and all-reduced over `data` only in shards.

    The other all-reduces are those of norms and counts.
    """
    config = PODS[name][1]
    model, mesh = config.model, config.mesh
    layer = model.d_model * (
        2 * (model.num_heads + model.num_kv_heads) * model.head_dim + 3 * model.d_ff
    )
    tables = (2 - model.tie_embeddings) * model.vocab_size * model.d_model
    scattered = 4 * (model.num_layers * layer + tables) / (mesh.fsdp * mesh.stream)
    replicas = mesh.data // budget_of(name)["num_slices"]
    allowed = 2 * model.d_model * model.d_ff + (1.01 * scattered if replicas > 1 else 0)
    assert budget_of(name)["collective_bytes"]["all-reduce"] < allowed


def test_the_stored_report_matches_its_budget_and_config():
    """notebooks/pod_report.ipynb reads this report."""
    report = json.loads((ROOT / "configs/reports/1b_v5e_16.json").read_text())
    assert report["config"] == "1b_v5e_16.py"
    remedy = (
        "make the report again: msllm aot --config=configs/1b_v5e_16.py --topology=v5e:4x4 "
        "--json=configs/reports/1b_v5e_16.json"
    )
    assert aot.budget_of(report, report["topology"]) == budget_of("1b_v5e_16"), remedy
    config = PODS["1b_v5e_16"][1]
    assert report["rows"] == config.data.rows
    assert report["batch_size"] == config.data.batch_size
    assert report["remat"] == config.model.remat


@needs_libtpu
@pytest.mark.slow
@pytest.mark.long
def test_a_pod_config_compiles_within_its_budget(tmp_path):
    """Compiles the largest config that takes two minutes. `launch/check_budgets.sh` checks all."""
    name = "8b_v5e_256"
    options = [
        f"--config=configs/{name}.py",
        f"--json={tmp_path / 'report.json'}",
        f"--topology={budget_of(name)['topology']}",
        f"--budget=configs/budgets/{name}.json",
    ]
    line = [sys.executable, "-m", "msllm", "aot", *options]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["attention"] == "splash" and report["memory"]["peak"] < 4.5 * 2**30
    collectives = report["collectives"]
    assert collectives["largest_all_reduce"]["bytes"] < 2**20
    assert collectives["whole_embedding_tables"] == []
