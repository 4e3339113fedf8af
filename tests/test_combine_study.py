"""The study of configs/combine: what its arms cost, its fit, and its small form."""

import pathlib

import numpy as np
import pytest
from runs import module_of, run_small_study

from msllm.streams import StreamSpec
from msllm.study import load_results

STUDY = pathlib.Path(__file__).parents[1] / "configs/combine/study.py"


@pytest.fixture(scope="module")
def study():
    """The module of the study."""
    return module_of(STUDY)


def test_arms_of_a_number_of_copies_cost_the_same(study):
    once = study.operations({})
    for number in study.COPIES:
        budget = study.operations(study.copies(number, "product"))
        assert number < budget / once < 1.2 * number
        assert study.operations(study.wider(number)) == pytest.approx(budget, rel=0.01)
        # A mixture needs the head for each copy; the vocabulary of characters is small.
        assert study.operations(study.copies(number, "mixture")) < 1.05 * budget
        longer = study.get_arms()[study.arm_name(f"longer, {number}", study.LEARNING_RATES[0])]
        assert longer.settings["steps"] * once == pytest.approx(study.STEPS * budget, rel=0.01)
    settings = study.get_config()
    settings.update_from_flattened_dict(study.copies(3, "product"))
    spec = StreamSpec.from_config(study.from_config_dict(settings).streams)
    assert spec.names == ("text", "copy1", "copy2") and spec.loss_weights == (1.0, 0.0, 0.0)
    assert [(rule.reader, rule.source, rule.lag) for rule in spec.mail] == [(1, 0, 0), (2, 0, 0)]
    assert spec.combine[0].sources == (0, 1, 2)


def test_the_law_is_found_in_losses_that_follow_it(study):
    sizes = np.array([1e5, 2e5, 4e5, 8e5])
    law = np.array([study.fit_sizes(sizes, 1.2 + 300 / sizes**0.5)])
    np.testing.assert_allclose(law[0], (1.2, 300, 0.5), rtol=0.05)
    log_p = np.log(study.COPIES)
    losses = 1.2 + 300 / (1e5 * (1 + 0.4 * log_p)) ** 0.5
    found = study.equivalent_size(losses[None], law)[0]
    np.testing.assert_allclose(found / 1e5, 1 + 0.4 * log_p, rtol=0.02)
    assert study.equivalent_size(np.array([[1.0]]), law)[0, 0] == np.inf


@pytest.mark.slow
def test_the_small_study_runs(study, tmp_path):
    path = pathlib.Path(study.get_config().data.path)
    if not path.is_file():
        pytest.skip(f"{path} is missing: set MSLLM_SHARED to the folder with the shared data")
    run_small_study(STUDY, tmp_path)
    found = load_results(tmp_path)
    rate = study.LEARNING_RATES[0]
    names = ("one", "mixture, 2", "wider, 2")
    assert found.arms == tuple(study.arm_name(name, rate) for name in names)
    targets = {point["arm"]: point["targets"] for point in found.points}
    assert len(set(targets.values())) == 1  # the copies predict nothing of their own
    cells = {point["arm"]: point["cells"] for point in found.points}
    assert cells[study.arm_name("mixture, 2", rate)] == 2 * cells[study.arm_name("one", rate)]
    table = (tmp_path / "table.md").read_text()
    assert "`mixture, 2` minus `wider, 2`: " in table
    assert "The fit needs the wider models of all P." in table
