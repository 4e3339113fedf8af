"""The studies of configs/combine: what their arms cost, their fit, and their small forms."""

import json
import pathlib
import sys

import numpy as np
import pytest
from runs import module_of, run_small_study, streams_with

from msllm.study import load_results

FOLDER = pathlib.Path(__file__).parents[1] / "configs/combine"
sys.path.insert(0, str(FOLDER))

import music  # noqa: E402
import parallel_copies as study  # noqa: E402
import part_music  # noqa: E402

shakespeare = module_of(FOLDER / "study.py")


@pytest.mark.parametrize("vocabulary", [shakespeare.VOCABULARY, music.VOCABULARY])
def test_arms_of_a_number_of_copies_cost_the_same(vocabulary):
    once = study.operations({}, vocabulary)
    for number in study.COPIES:
        budget = study.operations(study.copies(number, "product"), vocabulary)
        assert number < budget / once < 1.2 * number
        wider = study.wider(number, vocabulary)
        assert study.operations(wider, vocabulary) == pytest.approx(budget, rel=0.01)
        # A mixture needs the head for each copy; the vocabulary is small.
        assert study.operations(study.copies(number, "mixture"), vocabulary) < 1.05 * budget
        arms = study.get_arms(vocabulary)
        longer = arms[study.arm_name(f"longer, {number}", study.LEARNING_RATES[0])]
        assert longer.settings["steps"] * once == pytest.approx(study.STEPS * budget, rel=0.01)
    spec = streams_with(study.get_config(), study.copies(3, "product"))
    assert spec.names == ("text", "copy1", "copy2") and spec.loss_weights == (1.0, 0.0, 0.0)
    assert [(rule.reader, rule.source, rule.lag) for rule in spec.mail] == [(1, 0, 0), (2, 0, 0)]
    assert spec.combine[0].sources == (0, 1, 2)


def test_the_law_is_found_in_losses_that_follow_it():
    sizes = np.array([1e5, 2e5, 4e5, 8e5])
    law = np.array([study.fit_sizes(sizes, 1.2 + 300 / sizes**0.5)])
    np.testing.assert_allclose(law[0], (1.2, 300, 0.5), rtol=0.05)
    log_p = np.log(study.COPIES)
    losses = 1.2 + 300 / (1e5 * (1 + 0.4 * log_p)) ** 0.5
    found = study.equivalent_size(losses[None], law)[0]
    np.testing.assert_allclose(found / 1e5, 1 + 0.4 * log_p, rtol=0.02)
    assert study.equivalent_size(np.array([[1.0]]), law)[0, 0] == np.inf


@pytest.mark.slow
def test_the_small_study_runs(tmp_path):
    path = pathlib.Path(shakespeare.get_config().data.path)
    if not path.is_file():
        pytest.skip(f"{path} is missing: set MSLLM_SHARED to the folder with the shared data")
    check_small_study(FOLDER / "study.py", tmp_path)


@pytest.mark.slow
def test_the_small_study_of_music_runs(tmp_path, monkeypatch):
    voices = [[part_music.Note(i, i + 1, f"{60 + i % 7}") for i in range(300)]] * 2
    record = json.dumps({"text": part_music.to_text(voices)})
    for split in ("train", "held_out"):
        (tmp_path / f"{split}.jsonl").write_text(f"{record}\n")
    monkeypatch.setenv("MSLLM_PART_MUSIC", str(tmp_path))
    check_small_study(FOLDER / "music.py", tmp_path / "out")


def check_small_study(file, out):
    """Runs the small form of a study of copies. Its arms must differ in what they should."""
    run_small_study(file, out)
    found = load_results(out)
    rate = study.LEARNING_RATES[0]
    names = ("one", "mixture, 2", "wider, 2")
    assert found.arms == tuple(study.arm_name(name, rate) for name in names)
    targets = {point["arm"]: point["targets"] for point in found.points}
    assert len(set(targets.values())) == 1  # the copies predict nothing of their own
    cells = {point["arm"]: point["cells"] for point in found.points}
    assert cells[study.arm_name("mixture, 2", rate)] == 2 * cells[study.arm_name("one", rate)]
    table = (out / "table.md").read_text()
    assert "`mixture, 2` minus `wider, 2`: " in table
    assert "The fit needs the wider models of all P." in table
