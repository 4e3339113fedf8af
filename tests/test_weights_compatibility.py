"""Checkpoints, exports and imports of an earlier version load and give the same numbers."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from runs import metrics

from msllm.config import from_config_dict
from msllm.evals import likelihood
from msllm.evals.score import score
from msllm.training import train
from msllm.weights.convert import from_hf, to_hf
from msllm.weights.load import load

BEFORE = pathlib.Path(__file__).parent / "golden" / "before" / "weights"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())


def stored_config(**changes):
    """The config of the stored run, with the current path of its data."""
    settings = json.loads((BEFORE / "run" / "config.json").read_text())
    settings["data"]["dir"] = str(BEFORE / "data")
    return from_config_dict(settings | changes)


def assert_metrics(lines, expected):
    """Compares the lines of a metrics file with recorded lines, which have fewer metrics."""
    assert len(lines) == len(expected)
    for line, recorded in zip(lines, expected, strict=True):
        found = {key: line[key] for key in recorded}
        assert found == pytest.approx(recorded, rel=1e-5), f"step {line['step']}"


@pytest.mark.parametrize("name", ["run", "export", "import"])
def test_scores_are_the_same(name):
    recorded = np.load(BEFORE / "scores.npz")
    model = load(BEFORE / name)
    assert model.tokenizer.silence == "<silence>" and model.config.vocab_size == 58
    assert model.step == {"run": 20, "export": None, "import": 0}[name]
    assert model.streams.names == ("user", "thought", "output")
    found = score(model, {"tokens": recorded["tokens"]})
    np.testing.assert_allclose(found.logprob, recorded["logprob"], rtol=0, atol=1e-5)


def test_likelihoods_are_the_same():
    units = likelihood.evaluate(load(BEFORE / "run"), data=str(BEFORE / "data"))
    assert units.targets.sum(0).tolist() == EXPECTED["targets"]
    np.testing.assert_allclose(units.nll.sum(0), EXPECTED["nll"], rtol=1e-5)


def test_the_run_continues(tmp_path):
    shutil.copytree(BEFORE / "run", tmp_path / "run")
    state = train(stored_config(), tmp_path / "run")
    assert int(state.step) == 24
    lines = metrics(tmp_path / "run")
    before = [line for line in lines if line["step"] <= 20]
    assert before == metrics(BEFORE / "run")
    assert_metrics(lines[len(before) :], EXPECTED["resumed"])


def test_a_run_starts_from_the_import(tmp_path):
    train(stored_config(init_from=str(BEFORE / "import"), steps=1), tmp_path / "run")
    assert_metrics(metrics(tmp_path / "run"), EXPECTED["tuned"])


def test_export_and_import_write_the_same_files(tmp_path):
    to_hf(BEFORE / "run", tmp_path / "export")
    from_hf(tmp_path / "export", tmp_path / "import")
    for folder in ("export", "import/hf"):
        stored = {path.name: path.read_bytes() for path in (BEFORE / folder).iterdir()}
        written = {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        assert written == stored, folder
