"""Studies: resuming, shards, processes, changed settings, and the statistics of their tables."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from runs import SMALL, dictation_settings

from msllm import training
from msllm.cli.main import main
from msllm.config import default_config
from msllm.errors import UserError
from msllm.hooks import Hook
from msllm.sharding import make_mesh
from msllm.study import Arm, Fit, Metric, Plot, Results, Small, Study, grid, load_study, run, work
from msllm.study.curves import draw, fit_power_law, fits
from msllm.study.plan import Plan
from msllm.study.results import RESAMPLES, SEED, mean_of_seeds
from msllm.weights.load import load

FILE = """
import jax
import numpy as np
from msllm.config import default_config
from msllm.sharding import make_mesh
from msllm.study import Arm, Metric, Small, Study

def measure(model, point):
    assert (point.workdir / "checkpoints" / str(point.step)).is_dir()
    for i, leaf in enumerate(jax.tree.leaves(model.parameters)):
        scale = point.options["scale"]
        yield {"item": i, "norm": scale * np.abs(leaf).sum(), "size": leaf.size, "odd": i % 2 == 1}

def get_study(**changes):
    config = default_config()
    config.update_from_flattened_dict(SETTINGS)
    return Study(**dict(
        base=config,
        arms={
            "latent": {},
            "tokens": {"streams.visibility_medium": "tokens"},
            "frozen": {"optim.lr": 1e-30},
            "again": Arm(after="latent", train=False, options={"scale": 2.0}),
        },
        seeds=(0, 1),
        shared={"steps": 2},
        measure=measure,
        options={"scale": 1.0},
        same=("parameters", "steps"),
        metrics=(
            Metric("mean", field="norm", weight="size"),
            Metric("norm", by=("odd",)),
        ),
        small=Small(arms=("tokens", "latent")),
    ) | changes)
"""
SETTINGS = {
    **SMALL,
    **dictation_settings(),
    "data.options": {"examples": 60},
    "data.tokenizer.vocab_size": 0,
    "steps": 3,
    "eval_every": 0,
    "checkpoint.every": 1,
    "monitor.writers": ("jsonl",),
}


def write_study(folder, *edits, **settings):
    """Writes the study with other settings and edited text. Returns the path of its file."""
    cache = str(folder.parent / "compiled")  # so that the tests compile once
    text = f"SETTINGS = {SETTINGS | {'compilation_cache': cache} | settings!r}\n{FILE}"
    for before, after in edits:
        assert before in text
        text = text.replace(before, after)
    path = folder / "study.py"
    path.write_text(text)
    return path


@pytest.fixture(scope="module", autouse=True)
def one_device(compile_fast):
    """Trains on one of the eight devices, which takes a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def file(folder):
    (folder / "files").mkdir()
    return write_study(folder / "files")


@pytest.fixture(scope="module")
def complete(file, folder):
    """The folder of the study after one call."""
    run(file, folder / "complete", jobs=0)
    return folder / "complete"


def results_of(out):
    return (out / "results.jsonl").read_bytes()


def points_of(out):
    """The lines of points.jsonl without times."""
    lines = map(json.loads, (out / "points.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in lines]


def parameters(path):
    return jax.tree.leaves(load(path).parameters)


def equal(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def test_a_study_writes_records_points_and_a_table(complete):
    records = [json.loads(line) for line in results_of(complete).splitlines()]
    assert {(r["arm"], r["seed"], r["step"]) for r in records} == {
        (arm, seed, 3) for arm in ("latent", "tokens", "frozen", "again") for seed in (0, 1)
    }
    latent, again = ([r for r in records if r["arm"] == arm] for arm in ("latent", "again"))
    assert [2 * r["norm"] for r in latent] == pytest.approx([r["norm"] for r in again])
    point = points_of(complete)[1]
    assert point["arm"] == "tokens" and point["steps"] == 3 and point["parameters"] > 1000
    assert point["settings"] == {"streams.visibility_medium": "tokens"}
    assert 0 < point["targets"] < point["cells"] == 3 * point["rows"]
    table = (complete / "table.md").read_text()
    settings = table.partition("## Settings")[2].partition("## Size")[0]
    changed = [line.split("|")[1].strip() for line in settings.splitlines() if "|" in line][2:]
    assert changed == ["optim.lr", "streams.visibility_medium"]
    summary = json.loads((complete / "summary.json").read_text())
    row = next(row for row in summary["metrics"] if row["arm"] == "again")
    base = next(row for row in summary["metrics"] if row["arm"] == "latent")
    assert row["value"] == pytest.approx(2 * base["value"])
    assert row["difference"]["value"] == pytest.approx(base["value"])
    assert row["low"] < row["value"] < row["high"] and set(row["by_seed"]) == {"0", "1"}


def test_arms_start_from_the_shared_parameters(complete):
    for seed in (0, 1):
        shared = parameters(complete / "shared" / str(seed))
        assert equal(shared, parameters(complete / "points" / f"frozen-{seed}"))
        assert not equal(shared, parameters(complete / "points" / f"latent-{seed}"))
    assert not equal(shared, parameters(complete / "shared" / "0"))


def copy(complete, folder, name, without=()):
    """Copies the folder of the study, without some points and, if there are any, the results."""
    shutil.copytree(complete, folder / name)
    for point in without:
        shutil.rmtree(folder / name / "points" / point)
    for file in ("results.jsonl", "points.jsonl") if without else ():
        (folder / name / file).unlink()
    return folder / name


class _Killed(BaseException):
    """Stands for the end of the process."""


def test_a_study_that_was_killed_continues(file, folder, complete, monkeypatch, caplog):
    out = copy(complete, folder, "killed", without=("latent-0", "again-0", "tokens-1"))
    calls = []

    class Kill(Hook):
        def at_step(self, run, step, metrics):
            if len(calls) == 1 and step == 2:
                raise _Killed

    def train(config, workdir, hooks):
        calls.append(workdir.name)
        return original(config, workdir, [*hooks, Kill()])

    original = work.train
    monkeypatch.setattr(work, "train", train)
    with pytest.raises(_Killed):
        run(file, out, jobs=0)
    assert not (out / "results.jsonl").exists()
    caplog.set_level("INFO", "msllm")
    run(file, out, jobs=0)
    assert "continuing at step 2" in caplog.text
    assert results_of(out) == results_of(complete) and points_of(out) == points_of(complete)
    run(file, out, jobs=0)
    assert calls == ["latent-0", "latent-0", "tokens-1"]  # nothing is repeated


def test_shards_give_the_same_results(file, folder, complete, capsys):
    out = copy(complete, folder, "shards", without=("latent-0", "again-0", "again-1"))
    for i in (2, 0, 1):
        assert not (out / "results.jsonl").exists()
        assert main(["study", str(file), f"--out={out}", "--jobs=0", f"--shard={i}/3"]) == 0
        assert ("not collected" in capsys.readouterr().out) == (i != 1)
    assert results_of(out) == results_of(complete) and points_of(out) == points_of(complete)


def test_the_seeds_that_are_done_are_collected_on_request(file, folder, complete, capsys):
    out = copy(complete, folder, "partial", without=("tokens-1",))
    command = ["study", str(file), f"--out={out}", "--jobs=0"]
    assert main([*command, "--collect_only"]) == 0
    table = (out / "partial.md").read_text()
    assert "points are missing of seeds 1." in table and "4 arms, seeds 0;" in table
    assert not (out / "results.jsonl").exists() and not (out / "points" / "tokens-1").exists()
    found = capsys.readouterr().out
    assert main(command) == 0
    assert table.splitlines()[-1] in found and not (out / "partial.md").exists()
    assert results_of(out) == results_of(complete)
    shutil.rmtree(out / "points" / "tokens-1")
    shutil.rmtree(out / "points" / "latent-0")
    assert main([*command, "--collect_only"]) == 2
    assert "no seed whose points are all measured (latent-0, tokens-1" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_that_are_killed_give_the_same_results(file, folder):
    flags = os.environ["XLA_FLAGS"].replace("_device_count=8", "_device_count=1")
    environment = os.environ | {"XLA_FLAGS": flags}

    def command(out, jobs):
        words = ["study", str(file), f"--out={out}", f"--jobs={jobs}", "--small"]
        return [sys.executable, "-m", "msllm", *words]

    out, at_once = folder / "processes", folder / "at_once"
    first = subprocess.Popen(command(out, 2), stdout=subprocess.DEVNULL, env=environment)
    while not (out / "shared" / "0" / "trained.json").exists():
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (out / "results.jsonl").exists()
    done = subprocess.run(command(out, 2), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "started shared/0" not in done.stdout and "started points/latent-0" in done.stdout
    subprocess.run(command(at_once, 0), check=True, stdout=subprocess.DEVNULL, env=environment)
    assert results_of(out) == results_of(at_once) and points_of(out) == points_of(at_once)


def test_changed_settings_are_named_and_redone_when_asked(folder, complete, tmp_path, capsys):
    out = copy(complete, folder, "changed")
    changed = write_study(tmp_path, ("1e-30", "1e-20"))
    with pytest.raises(UserError, match=r"frozen-0 was trained .*optim.lr was 1e-30, now 1e-20"):
        run(changed, out, jobs=0)
    assert results_of(out) == results_of(complete)
    capsys.readouterr()
    before = (out / "points" / "latent-0" / "trained.json").stat().st_mtime_ns
    run(changed, out, jobs=0, redo=True)
    assert capsys.readouterr().out.count("deleted ") == 2
    assert (out / "points" / "latent-0" / "trained.json").stat().st_mtime_ns == before
    assert points_of(out)[2]["settings"] == {"optim.lr": 1e-20}
    # Everything depends on the shared run.
    changed = write_study(tmp_path, ("1e-30", "1e-20"), ('{"steps": 2}', '{"steps": 1}'))
    with pytest.raises(UserError, match="the run it starts from has changed"):
        run(changed, out, jobs=0)


def test_a_changed_measurement_is_noticed(folder, complete, tmp_path, caplog):
    out = copy(complete, folder, "measured")
    other = write_study(tmp_path, ('options={"scale": 1.0}', 'options={"scale": 3.0}'))
    with pytest.raises(UserError, match="options .*'scale': 1.0.* give --remeasure"):
        run(other, out, jobs=0)
    edited = write_study(tmp_path, ("scale * np.abs(leaf).sum()", "scale * leaf.size"))
    run(edited, out, jobs=0)
    assert "8 of 8 points were measured before the code" in caplog.text
    assert results_of(out) == results_of(complete)
    run(edited, out, jobs=0, remeasure=True, only=("again",))
    records = [json.loads(line) for line in results_of(out).splitlines()]
    assert all(r["norm"] == 2 * r["size"] for r in records if r["arm"] == "again")
    assert any(r["norm"] != r["size"] for r in records if r["arm"] == "latent")


def test_the_small_form_keeps_out_of_the_full_one(file, complete):
    with pytest.raises(UserError, match="which holds the full form of a study: choose another"):
        run(file, complete, jobs=0, small=True)
    plan = Plan(load_study(file), complete, small=True)
    assert plan.points() == [("tokens", 0), ("latent", 0)]
    assert plan.training("latent", 0).config.steps == plan.shared(0).config.steps == 3


def test_stages_curves_and_a_start_of_ones_own(folder, tmp_path):
    def start(model, point):
        assert (point.arm, point.seed) == ("frozen", 5)
        return dataclasses.replace(
            model, parameters=jax.tree.map(lambda x: x + 1, model.parameters)
        )

    file = write_study(tmp_path)
    study = load_study(file)
    study = dataclasses.replace(
        study,
        arms={"frozen": Arm({"optim.lr": 1e-30})},
        seeds=(5,),
        seeded=("seed", "data.options.seed"),
        shared=({"steps": 1}, {"steps": 1, "data.options.examples": 50}),
        start=start,
        measure_every=1,
        small=Small(),
        stages=({"steps": 1}, {"steps": 2}),
    )
    plan = Plan(study, tmp_path / "out")
    plan.out.mkdir()
    for data in plan.needed_data("frozen", 5):
        work.do(plan, f"data/{data.id}")
    for job in ("shared/5", "points/frozen-5"):
        work.do(plan, job)
    out = plan.out
    first, second = parameters(out / "shared" / "5-0"), parameters(out / "shared" / "5")
    assert not equal(first, second)
    assert equal([x + 1 for x in second], parameters(out / "stages" / "frozen-5-0"))
    assert equal([x + 1 for x in second], parameters(out / "points" / "frozen-5"))
    lines = (out / "points" / "frozen-5" / "records.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == {1, 2}
    config = load(out / "points" / "frozen-5").run_config
    assert config.data.options == {"examples": 60, "seed": 5, "questions": 1, "silence": 0}
    assert len(list((out / "data").iterdir())) == 2
    assert plan.facts("frozen", 5, ["steps"]) == {"steps": 3}


@pytest.fixture(scope="module")
def data_of_two_sizes(file, folder):
    """A plan whose arms differ in batch size and width, with prepared data."""
    plan = plan_of(file, folder, equal="steps")
    for data in plan.needed_data("small", 0):
        work.do(plan, f"data/{data.id}")


def plan_of(file, folder, **changes):
    arms = {
        "small": {"steps": 30, "data.batch_size": 2},
        "large": {"data.batch_size": 6},
        "wide": {"model.d_ff": 320, "data.batch_size": 2},
    }
    changes = {"arms": arms, "same": (), "shared": None, "small": Small()} | changes
    return Plan(dataclasses.replace(load_study(file), **changes), folder / "sizes")


def test_budgets_give_the_steps(file, folder, data_of_two_sizes):
    def steps(**changes):
        plan = plan_of(file, folder, **changes)
        return {arm: plan.facts(arm, 0, ["steps"])["steps"] for arm in ("small", "large", "wide")}

    assert steps() == {"small": 30, "large": 3, "wide": 3}
    near = {"small": 30, "large": pytest.approx(10, abs=1), "wide": pytest.approx(30, abs=1)}
    assert steps(equal="cells") == near
    assert steps(equal="cells", budget=1e4)["large"] < steps(equal="cells", budget=2e4)["large"]
    flops = plan_of(file, folder, equal="flops")
    used = [flops.facts(arm, 0)["flops"] for arm in ("small", "large", "wide")]
    assert used[2] == pytest.approx(used[0], rel=0.1) and steps(equal="flops")["wide"] < 20
    with pytest.raises(UserError, match="study.same names parameters, .*wide: "):
        plan_of(file, folder, same=("parameters",)).check_same()


# Statistics.


def toy_results(arms=("a", "b"), seeds=3, items=20):
    rng = np.random.default_rng(1)
    records, points = [], []
    for k, arm in enumerate(arms):
        for seed in range(seeds):
            points.append({"arm": arm, "seed": seed, "step": 4, "settings": {}, "options": {}})
            for item in range(items):
                fields = {"nll": float(rng.normal(k + seed, 1)), "n": int(rng.integers(1, 5))}
                records.append({"arm": arm, "seed": seed, "step": 4, "item": item, **fields})
    return Results(records, points)


def test_intervals_equal_a_bootstrap_by_hand():
    results = toy_results()
    found = results.estimates(Metric("m", field="nll", weight="n"), baseline="a")["b"]
    rng = np.random.default_rng(SEED)
    of = {(r["arm"], r["seed"], r["item"]): r for r in results.records}

    def ratio(arm, seeds, items):
        chosen = [of[arm, s, i] for s in seeds for i in items]
        return sum(r["nll"] for r in chosen) / sum(r["n"] for r in chosen)

    values, differences = [], []
    for _ in range(RESAMPLES // 50):  # the draws are made in blocks of 50
        seeds, items = rng.integers(3, size=(50, 3)), rng.integers(20, size=(50, 20))
        for s, i in zip(seeds, items):
            values.append(ratio("b", s, i))
            differences.append(values[-1] - ratio("a", s, i))
    estimate, difference = found
    assert estimate.value == pytest.approx(ratio("b", range(3), range(20)))
    assert (estimate.low, estimate.high) == pytest.approx(np.quantile(values, [0.025, 0.975]))
    low, high = np.quantile(differences, [0.025, 0.975])
    assert (difference.low, difference.high) == pytest.approx((low, high))
    assert estimate.by_seed[1] == pytest.approx(ratio("b", [1], range(20)))
    assert (estimate.records, estimate.units, estimate.seeds) == (60, 20, 3)


def test_pairing_removes_what_items_share():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 200)
    records = [
        {"arm": arm, "seed": 0, "step": 1, "item": i, "x": hard[i] + shift + rng.normal(0, 0.1)}
        for arm, shift in (("a", 0.0), ("b", 0.5))
        for i in range(200)
    ]
    points = [{"arm": arm, "seed": 0, "step": 1} for arm in "ab"]
    results = Results(records, points)
    difference = results.estimate("x", "b", against="a")
    assert difference.low > 0.4 and difference.high < 0.6
    alone = results.estimate("x", "b")
    assert alone.high - alone.low > 1


def test_a_statistic_equals_the_mean_and_groups_are_separate():
    results = toy_results()
    mean = Metric("m", field="nll", by=("n",))
    own = Metric(
        "own", by=("n",), statistic=lambda columns, w: np.average(columns["nll"], weights=w)
    )
    for key, records in results.groups(mean).items():
        assert {record["n"] for record in records} == set(key)
        a, b = (results.estimates(metric, records)["b"][0] for metric in (mean, own))
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high))
    assert list(results.groups(mean)) == [(1,), (2,), (3,), (4,)]


def test_a_statistic_by_seed_does_not_compare_seeds():
    @mean_of_seeds
    def spread(columns, weights):
        return np.ptp(columns["x"][weights > 0])

    x = {0: (1.0, 2.0), 1: (101.0, 105.0)}  # the seeds' values have different scales
    records = [
        {"arm": "a", "seed": seed, "step": 4, "item": item, "x": value}
        for seed, values in x.items()
        for item, value in enumerate(values)
    ]
    points = [{"arm": "a", "seed": seed, "settings": {}, "step": 4} for seed in x]
    (found,) = Results(records, points).estimates(Metric("spread", statistic=spread)).values()
    assert found[0].value == 2.5
    assert found[0].by_seed == {0: 1.0, 1: 4.0}
    assert found[0].high <= 4.0  # as opposed to 104 over both


def test_records_without_a_field_and_earlier_steps_are_left_out():
    results = toy_results(seeds=1, items=2)
    extra = [{"arm": "a", "seed": 0, "step": 2, "item": 0, "nll": 1e6}]
    extra += [{"arm": "a", "seed": 0, "step": 4, "item": 3, "nll": None}]
    more = Results([*results.records, *extra], results.points)
    assert more.estimate("nll", "a") == results.estimate("nll", "a")
    assert more.estimate("nll", "a", step=2).value == 1e6
    with pytest.raises(UserError, match="no arm 'c'"):
        more.estimate("nll", "c")


@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_a_power_law_is_recovered(offset):
    x = np.array([1.0, 4, 16, 64, 256])
    y = offset + 3 * x**-0.5
    noise = np.random.default_rng(0).normal(1, 0.01, (300, 5))
    law = fit_power_law(x, y, y * noise, bool(offset))
    assert law.exponent[0] == pytest.approx(-0.5, abs=0.02)
    assert law.offset[0] == pytest.approx(offset, abs=0.02)
    assert law.exponent[1] < -0.5 < law.exponent[2] and law.error < 0.01
    with pytest.raises(UserError, match="needs"):
        fit_power_law(x[:1], y[:1], y[None, :1], bool(offset))


def test_fits_and_plots_of_a_study(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    arms = grid({"data.rows": (64, 128), "width": {"1": {"model.d_ff": 1}, "2": {"model.d_ff": 2}}})
    names = [f"rows={rows} width={width}" for rows in (64, 128) for width in (1, 2)]
    assert list(arms) == names
    assert arms["rows=128 width=2"].settings == {"data.rows": 128, "model.d_ff": 2}
    points = [
        {"arm": a, "seed": 0, "step": 1, "settings": arms[a].settings, "options": {}} for a in arms
    ]
    records = [
        {"arm": p["arm"], "seed": 0, "step": 1, "item": i, "y": 8 / p["settings"]["data.rows"]}
        for p in points
        for i in range(5)
    ]
    results = Results(records, points)
    study = Study(
        base=default_config(),
        arms=arms,
        measure=lambda model, point: [],
        metrics=(Metric("y"),),
        fits=(Fit("data.rows", "y"),),
    )
    (law,) = fits(study, results)
    assert law["exponent"] == pytest.approx((-1, -1, -1))
    axes = Figure().add_subplot()
    draw(axes, study, results, Plot("data.rows", "y", by="model.d_ff", log="xy"))
    labels = axes.get_legend_handles_labels()[1]
    assert sorted(labels) == ["exponent -1", "model.d_ff=1", "model.d_ff=2"]
    by_item = dataclasses.replace(study, metrics=(Metric("y", by=("item",)),))
    axes = Figure().add_subplot()
    draw(axes, by_item, results, Plot("item", "y"))
    assert sorted(axes.get_legend_handles_labels()[1]) == sorted(arms)
    with pytest.raises(UserError, match="no arm has a number for 'loss'"):
        draw(axes, study, results, Plot("loss", "y"))


# Errors.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arms": {}}, "arms is empty"),
        ({"measure": None}, "measure is None"),
        ({"seeds": ()}, "seeds is"),
        ({"seeds": (1, 1)}, "seeds is"),
        ({"arms": {"a": {"optim.lrr": 1}}}, "config.optim.lrr: did you mean config.optim.lr"),
        ({"shared": {"optim": 1, "model.x": 2}}, "config.model.x"),
        ({"arms": {"a": Arm(after="b")}}, "comes after 'b'"),
        ({"arms": {"a": Arm(after="b"), "b": Arm(after="a")}}, "cycle"),
        ({"arms": {"a": Arm(train=False)}}, "not trained"),
        ({"arms": {"a b": {}, "a/b": {}}}, "would share a folder"),
        ({"baseline": "z"}, "baseline names arm 'z'"),
        ({"small": Small(arms=("z",))}, "small.arms names arm 'z'"),
        ({"equal": "time"}, "equal is 'time'"),
        ({"budget": 5.0}, "budget is 5.0"),
        ({"equal": "cells", "budget": 0.0}, "budget is 0.0"),
        ({"same": ("loss",)}, "same names 'loss'"),
        ({"plots": (Plot("x", "y"),)}, "names metric 'y'"),
        ({"metrics": (Metric("a"), Metric("a"))}, "names must differ"),
        ({"measure_every": -1}, "measure_every is -1"),
        ({"stages": ()}, "stages is empty"),
    ],
)
def test_bad_studies_are_refused(changes, message):
    given = {"base": default_config(), "arms": {"a": {}}, "measure": lambda model, point: []}
    with pytest.raises(UserError, match=message):
        Study(**given | changes)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "defines no get_study"),
        ("x = 1\nraise ValueError('no')", "line 2: ValueError: no"),
        ("def get_study(): return 1", "returned 1, not a"),
        ("from msllm.study import Study\ndef get_study(): return Study(arms={})", "missing"),
    ],
)
def test_bad_files_end_with_status_2(tmp_path, capsys, text, message):
    path = tmp_path / "bad.py"
    path.write_text(text)
    assert main(["study", str(path), f"--out={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--shard=2/2", "must be I/N"),
        ("--shard=a", "must be I/N"),
        ("--shard=0/0", "must be I/N"),
        ("--only=latnt", "--only names arm 'latnt': must be one of 'latent'"),
        ("--jobs=-1", "at least 0"),
    ],
)
def test_bad_flags_end_with_status_2(file, tmp_path, capsys, flag, message):
    assert main(["study", str(file), f"--out={tmp_path / 'out'}", flag]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "edit, message",
    [
        ('{"item": i, "norm"', "a record without 'item'"),
        ('"size": leaf.size', "a field 'seed'"),
        ('"size": leaf.size', r"size=\[1, 2\]"),
        ("for i, leaf", "returned no record"),
    ],
)
def test_bad_records_are_refused(folder, complete, tmp_path, edit, message):
    after = {
        "a record without 'item'": '{"norm"',
        "a field 'seed'": '"seed": 0',
        r"size=\[1, 2\]": '"size": [1, 2]',
        "returned no record": "for i, leaf in ():\n        yield\n    for i, leaf",
    }[message]
    if message == "returned no record":
        changed = write_study(tmp_path, ("jax.tree.leaves(model.parameters)", "[]"))
    else:
        changed = write_study(tmp_path, (edit, after))
    out = tmp_path / "out"
    os.symlink(complete / "data", _made(out) / "data")
    for name in ("shared", "points"):
        shutil.copytree(complete / name, out / name)
    with pytest.raises(UserError, match=message):
        run(changed, out, jobs=0, remeasure=True, only=("frozen",))


def _made(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_the_study_of_the_docs_runs(folder, capsys):
    pytest.importorskip("matplotlib")
    page = (pathlib.Path(__file__).parents[1] / "docs" / "studies.md").read_text()
    file = folder / "docs.py"
    file.write_text(page.partition("```python\n")[2].partition("```")[0])
    results = run(file, folder / "docs", jobs=0, small=True)
    assert results.arms == ("latent", "isolated") and results.seeds == (0,)
    loss = results.estimate(Metric("loss", field="nll", weight="targets"), "latent")
    assert 0.5 < loss.value < 10
    assert list((folder / "docs" / "plots").iterdir())
    assert "The small form" in capsys.readouterr().out
