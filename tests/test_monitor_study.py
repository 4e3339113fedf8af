"""The study of configs/monitor runs in its small form."""

import pathlib

import pytest
from runs import run_small_study

from msllm.evals import misreport as organism
from msllm.study import load_results

STUDY = pathlib.Path(__file__).parents[1] / "configs/monitor/study.py"


@pytest.mark.slow
def test_the_small_study_runs(tmp_path):
    pytest.importorskip("sklearn")
    run_small_study(STUDY, tmp_path)
    found = load_results(tmp_path)
    assert found.arms == ("tokens", "single", "tokens, pressure")
    kinds = {arm: set() for arm in found.arms}
    for record in found.records:
        kinds[record["arm"]].add(record["kind"])
    assert kinds["single"] == {"behaviour"}  # an untrained model never tells the result
    for arm in ("tokens", "tokens, pressure"):
        assert kinds[arm] == {"behaviour", "ablated", "rows", "replay"}
    assert found.estimate("replayed", "tokens", kind="replay").value == 1.0
    assert found.estimate("rows", "tokens", kind="rows").value == 7.0
    where = {"kind": "behaviour", "set": organism.HELD_OUT, "arm": "tokens"}
    held_out = found.select(where)
    assert len(held_out) == 8
    assert "as taught" in (tmp_path / "table.md").read_text()
