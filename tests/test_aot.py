"""`msllm aot`: reports on compiled programs, budgets, sweeps, and errors for bad input."""

import html
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from runs import four_streams, make_config, needs_libtpu, replace, write_config_file

from msllm.config import MeshConfig
from msllm.errors import UserError
from msllm.pod import aot, collectives
from msllm.pod import report as pages
from msllm.sharding import RULES, gather, make_mesh, partition_spec

SIZES = {
    "model.vocab_size": 160,
    "model.compute_dtype": "bfloat16",
    "mesh.fsdp": 2,
    "mesh.stream": 2,
}


def command(path, *arguments):
    """Runs `msllm aot` on a small config."""
    config = write_config_file(path / "config.py", four_streams(**SIZES))
    line = [sys.executable, "-m", "msllm", "aot", f"--config={config}", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)


@needs_libtpu
@pytest.mark.slow
def test_a_program_that_fits_is_reported_in_all_forms_and_held_to_its_budget(tmp_path):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "html", "hlo")}
    budget = tmp_path / "budget.json"
    outputs = [f"--{name}={path}" for name, path in files.items()]
    done = command(tmp_path, "--topology=v5e:2x2", *outputs, f"--budget={budget}", "--write_budget")
    assert done.returncode == 0, done.stderr
    report = json.loads(files["json"].read_text())
    assert report["topology"] == "v5e:2x2" and report["devices"] == 4
    assert report["device_kind"] == "TPU v5 lite"
    assert report["mesh"] == {"data": 1, "fsdp": 2, "fsdp_inner": 1, "stream": 2, "tensor": 1}
    assert report["attention"] == "splash"
    assert report["jax"] == jax.__version__ and report["compile_cpu_seconds"] > 0

    memory = report["memory"]
    assert memory["fits"] and memory["limit"] == 15.75 * 2**30
    parts = [memory[name] for name in ("arguments", "outputs", "temporaries", "code")]
    assert all(part > 0 for part in parts) and memory["total"] == sum(parts) - memory["aliased"]
    assert memory["arguments"] < memory["peak"] < memory["limit"]
    # The donated state, which four devices share, is three float32 numbers for each parameter.
    assert memory["aliased"] >= 3 * 4 * report["parameters"] / 4

    collectives = report["collectives"]

    def axes(*kinds):
        return {row["axes"] for row in collectives["rows"] if row["kind"] in kinds}

    # Weights are gathered and gradients are reduced over both axes.
    for axis in ("fsdp", "stream"):
        assert axis in axes("all-gather") and axis in axes("reduce-scatter")
    assert all(set(row["axes"].split("+")) <= {"fsdp", "stream"} for row in collectives["rows"])
    assert sum(collectives["bytes_by_kind"].values()) == sum(
        row["bytes"] for row in collectives["rows"]
    )
    assert collectives["largest_all_reduce"]["bytes"] > 0 and collectives["not_counted"] == []
    assert 0 < report["estimate"]["mfu"] < 1 and report["assumptions"]

    assert "all-gather" in files["hlo"].read_text()
    for word in ("fits", "all-gather", "fsdp", "MFU", "Assumptions", "libtpu"):
        assert word in done.stdout
    check_page(files["html"].read_text(), report)

    limits = json.loads(budget.read_text())
    assert limits["collective_bytes"] == collectives["bytes_by_kind"]
    limits["collective_bytes"]["all-gather"] *= 0.97
    budget.write_text(json.dumps(limits))
    done = command(tmp_path, "--topology=v5e:2x2", f"--budget={budget}")
    assert done.returncode == 1
    over = [line for line in done.stdout.splitlines() if line.startswith("over budget: ")]
    assert len(over) == 1 and "all-gather" in over[0]


CHARTS = [
    "memory of one device by use",
    "memory by formula",
    "bytes of collectives",
    "time by resource",
]


def check_page(page, report):
    """Checks that a page has all charts and collectives, loads nothing and shows no nan."""
    assert re.findall(r'<figure class="\w+" aria-label="(.*?)">', page) == CHARTS
    assert "prefers-color-scheme: dark" in page and "nan" not in page
    assert not re.search(r"<script|<link|https?:|url\(|@import|src=", page)
    for row in report["collectives"]["rows"]:
        assert f">{row['kind']}</td><td>{row['axes']}</td>" in page
    for width in re.findall(r"width: ([\d.]+)%", page):
        assert float(width) <= 100


@pytest.fixture
def stored_report():
    """A report in the repository."""
    (path,) = (pathlib.Path(__file__).parents[1] / "configs").rglob("reports/1b_v5e_16.json")
    return json.loads(path.read_text())


def test_a_page_has_every_number_of_the_text(stored_report):
    page = pages.html(stored_report)
    check_page(page, stored_report)
    shown = html.unescape(re.sub("<.*?>", " ", page))
    for number in re.findall(r"\d[\d.,]*\w*", pages.text(stored_report)):
        assert number in shown, number
    for assumption in stored_report["assumptions"]:
        assert assumption in shown


def test_names_in_a_report_are_escaped(stored_report):
    stored_report["config"] = "<script>alert(1)</script>.py"
    stored_report["collectives"]["rows"][0]["axes"] = "<b>&"
    page = pages.html(stored_report)
    assert "<script" not in page and "<b>&" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.py on v5e:4x4</h1>" in page
    assert "<td>&lt;b&gt;&amp;</td>" in page


def test_the_page_of_a_program_that_does_not_fit_lists_remedies(stored_report):
    memory = {name: stored_report["memory"][name] for name in ("limit", "parts_by_formula")}
    memory |= {"fits": False, "compiler_says": "Ran out of memory: 1 < 2", "remedies": ["x", "y"]}
    report = stored_report | {"memory": memory}
    for key in ("collectives", "estimate", "assumptions"):
        del report[key]
    page = pages.html(report)
    assert re.findall('aria-label="(.*?)"', page) == ["memory by formula"]
    assert '<p class="bad">does not fit' in page
    assert "<pre>Ran out of memory: 1 &lt; 2</pre>" in page
    assert "change first: x" in page and "change then: y" in page
    assert "change then: y" in pages.text(report)


@needs_libtpu
@pytest.mark.slow
def test_a_program_that_does_not_fit_says_what_to_change(tmp_path):
    done = command(
        tmp_path, "--topology=v5e:2x2", "--config.model.d_model=16384", "--config.model.d_ff=65536"
    )
    assert done.returncode == 1, done.stderr
    assert "does not fit" in done.stdout
    assert "change first: more devices along mesh.fsdp" in done.stdout


@needs_libtpu
@pytest.mark.slow
def test_slices_communicate_over_the_data_centre_network(tmp_path):
    done = command(
        tmp_path, "--topology=v5e:2x2", "--num_slices=2", f"--json={tmp_path / 'out.json'}"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["slices"] == 2 and report["mesh"]["data"] == 2
    networks = {(row["network"], row["axes"]) for row in report["collectives"]["rows"]}
    assert ("DCN", "data") in networks
    assert all("data" not in axes for network, axes in networks if network == "ICI")
    assert report["estimate"]["network_seconds"]["DCN"]["asynchronous"] > 0


@needs_libtpu
@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:3x7"])
def test_the_error_for_an_unknown_topology_gives_examples(name):
    with pytest.raises(UserError, match=f"{name}.*examples: v5e:2x2"):
        aot.topology_devices(name)


@needs_libtpu
def test_topologies_have_the_devices_of_the_pod():
    assert len(aot.topology_devices("v5e:16x16")) == 256
    assert len(aot.topology_devices("v4:2x2x1")) == 4  # a v4 chip is one device
    assert len(aot.topology_devices("v5e:1x1")) == 1
    assert len({device.slice_index for device in aot.topology_devices("v5e:2x2", 2)}) == 2
    with pytest.raises(UserError, match="num_slices is 0"):
        aot.topology_devices("v5e:2x2", 0)


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "axes", "stages"),
    [
        ("v5e:4x4", {"fsdp": 16}, (4, 4)),
        ("v5e:4x4", {"fsdp": 4, "stream": 4}, (4, 1)),
        ("v5e:16x16", {"fsdp": 32, "stream": 8}, (16, 2)),
        ("v5e:16x16", {"fsdp": 256}, (16, 16)),
        ("v5p:4x4x4", {"fsdp": 64}, (16, 4)),
    ],
)
def test_the_stages_of_a_gather_use_different_physical_axes(topology, axes, stages):
    mesh = make_mesh(MeshConfig(**{"data": 1} | axes), aot.topology_devices(topology))
    assert (mesh.shape["fsdp"], mesh.shape["fsdp_inner"]) == stages
    places = np.vectorize(lambda device: tuple(device.coords), otypes=[object])(mesh.devices)

    def varies(group):
        """The physical axes along which the devices of a group differ."""
        return {i for i in range(3) if len({place[i] for place in group.flat}) > 1}

    outer, inner = varies(places[0, :, 0, 0, 0]), varies(places[0, 0])
    assert len(inner) == 1 and not outer & inner


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:4x4", "v6e:4x4"])
def test_the_gradient_of_a_gathered_weight_is_scattered(topology):
    # On a v6e, the gradient of the transposed weight `down` has a column-major layout.
    mesh = make_mesh(MeshConfig(data=1, fsdp=16), aot.topology_devices(topology))

    def loss(x, up, down):
        up, down = (gather(weight.astype("bfloat16"), 0, RULES["embed"]) for weight in (up, down))
        return jnp.square((x + jax.nn.silu(x @ up) @ down.T).astype("float32")).sum()

    weight, rows = partition_spec("embed"), partition_spec("batch")
    gradients = jax.shard_map(
        lambda *xs: jax.grad(loss, (1, 2))(*xs),
        mesh=mesh,
        in_specs=(rows, weight, weight),
        out_specs=weight,
    )

    def shaped(*shape, dtype="float32", spec=weight):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    arguments = (
        shaped(16 * 512, 2048, dtype="bfloat16", spec=rows),
        shaped(2048, 1024),
        shaped(2048, 1024),
    )
    text = jax.jit(gradients).lower(*arguments).compile().as_text()
    found = collectives.read(text, list(mesh.devices.flat)).collectives
    scattered = sorted(
        collectives.axes_of(one.groups, mesh.shape) for one in found if one.kind == "reduce-scatter"
    )
    assert scattered == [("fsdp",)] * 2 + [("fsdp_inner",)] * 2
    assert not [one for one in found if one.kind == "all-reduce"]


def test_the_error_for_a_missing_compiler_names_its_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"jax\[tpu\]"):
        aot.topology_devices("v5e:2x2")


@needs_libtpu
def test_a_config_that_cannot_be_compiled_is_refused():
    devices = aot.topology_devices("v5e:2x2")
    with pytest.raises(UserError, match="vocab_size is 0"):
        aot.analyse(make_config(), devices)
    with pytest.raises(UserError, match="does not fit 4 devices"):
        aot.analyse(replace(four_streams(), "mesh", fsdp=3, data=1), devices)
    with pytest.raises(UserError, match="no figures for the device 'abacus'"):
        aot.analyse(four_streams(), [SimpleNamespace(device_kind="abacus")])


def test_a_budget_allows_two_percent():
    report = {
        "slices": 1,
        "memory": {"peak": 2**29, "total": 2**30},
        "collectives": {"bytes_by_kind": {"all-gather": 1000, "all-reduce": 10}},
    }
    budget = aot.budget_of(report, "v5e:2x2")
    assert budget == {
        "topology": "v5e:2x2",
        "num_slices": 1,
        "peak_gib": 0.5,
        "sum_gib": 1.0,
        "collective_bytes": {"all-gather": 1000, "all-reduce": 10},
    }
    assert aot.over_budget(report, "v5e:2x2", budget) == []
    report["memory"]["total"] = int(1.019 * 2**30)
    report["collectives"]["bytes_by_kind"]["all-gather"] = 1019
    assert aot.over_budget(report, "v5e:2x2", budget) == []
    report["memory"] = {"peak": int(1.03 * 2**29), "total": int(1.03 * 2**30)}
    report["collectives"]["bytes_by_kind"] |= {"all-gather": 1030, "all-to-all": 1}
    lines = aot.over_budget(report, "v5e:2x2", budget)
    assert [line.split(":")[0] for line in lines] == [
        "memory, peak",
        "memory, sum",
        "all-gather",
        "all-to-all",
    ]
    with pytest.raises(UserError, match="topology"):
        aot.over_budget(report, "v5e:4x4", budget)


@needs_libtpu
@pytest.mark.slow
def test_inputs_of_layers_are_offloaded_to_host_memory(tmp_path):
    files = {name: tmp_path / f"out.{name}" for name in ("json", "hlo")}
    outputs = [f"--{name}={path}" for name, path in files.items()]
    done = command(
        tmp_path,
        "--topology=v5e:2x2",
        "--config.model.remat=offload",
        "--config.model.num_layers=5",
        *outputs,
    )
    assert done.returncode == 0, done.stderr
    # The host is memory space 5.
    on_host = re.findall(r"= bf16\[(5,[\d,]+)\]\S*S\(5\)", files["hlo"].read_text())
    sizes = {math.prod(map(int, shape.split(","))) for shape in on_host}
    assert sizes == {json.loads(files["json"].read_text())["estimate"]["host_bytes"] / 2}
    assert "to the host and back" in done.stdout


def test_a_sweep_continues_after_programs_that_do_not_fit(monkeypatch):
    def analyse(config, devices):
        if config.data.batch_size > 16:
            raise UserError("the batch is too large")
        fits = config.model.remat != "none"
        report = {"memory": {"fits": fits, "peak": 2**30}, "compile_seconds": 1.0}
        report["estimate"] = {"step_seconds": 0.1, "mfu": 0.4, "tokens_per_second_and_device": 5.0}
        return SimpleNamespace(report=report)

    monkeypatch.setattr(aot, "analyse", analyse)
    reported = []
    rows = aot.sweep(four_streams(), [], on_row=reported.append)
    assert reported == rows
    assert [(row["remat"], row["batch_size"], row["fits"]) for row in rows] == [
        (remat, batch, remat != "none" and batch <= 16)
        for remat in ("none", "dots", "full", "offload")
        for batch in (8, 16, 32)
    ]
    # A larger batch is not compiled after one that does not fit.
    assert "not tried" in rows[1]["error"] and "the batch is too large" in rows[5]["error"]
    lines = [pages.sweep_line(row) for row in rows]
    assert "40.0%" in lines[3] and "the batch is too large" in lines[5]
