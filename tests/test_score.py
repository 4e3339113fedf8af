"""Scoring: a golden case on the command line, packing, batches, and invalid tables."""

import subprocess
import sys

import golden_cases
import numpy as np
import pytest

from msllm.errors import UserError
from msllm.evals import score as score_module
from msllm.evals.score import check_tables, score, score_batches
from msllm.weights.load import load


def run(*arguments):
    """Runs `msllm score`."""
    command = [sys.executable, "-m", "msllm", "score", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=golden_cases.HERE.parent)


def test_the_command_reproduces_a_golden_case(tmp_path):
    case = golden_cases.case("s7_c10_skip")
    tokens, rows = case["tokens"], np.arange(case["tokens"].shape[1])
    present = np.broadcast_to((rows < case["num_rows"][:, None])[:, :, None], tokens.shape)
    np.savez(tmp_path / "in.npz", tokens=tokens, present=present)
    arguments = [
        f"--checkpoint={case.path}",
        f"--tables={tmp_path / 'in.npz'}",
        f"--out={tmp_path / 'out.npz'}",
    ]
    done = run(*arguments, "--visibility=block_causal", "--skip_silence", "--silence_id=5")
    assert done.returncode == 0, done.stderr
    out = np.load(tmp_path / "out.npz")
    difference = golden_cases.thin("logits", out["logits"]) - case["logits"]
    assert np.abs(difference[present]).max() < 1e-4
    counted = np.isfinite(out["logprob"])
    np.testing.assert_array_equal(counted, case["labels"] != -100)
    np.testing.assert_allclose(-out["logprob"][counted].mean(), case["loss_ce"], rtol=0, atol=1e-5)

    done = run(*arguments, "--skip_silence")
    assert done.returncode == 2 and "--silence_id" in done.stderr and "Traceback" not in done.stderr
    done = run(*arguments[1:], f"--checkpoint={tmp_path / 'none'}")
    assert done.returncode == 2 and "there is no checkpoint in" in done.stderr


def test_packed_examples_score_like_single_ones(make_model):
    model, rng = make_model(3), np.random.default_rng(0)
    first, second = rng.integers(0, 32, (4, 3)), rng.integers(0, 32, (5, 3))
    packed = np.concatenate([first, second, np.zeros((2, 3), int)])[None]
    segment = np.array([[7] * 4 + [2] * 5 + [0] * 2])
    ours = score(model, {"tokens": packed, "segment": segment})
    for part, rows in ((first, slice(0, 4)), (second, slice(4, 9))):
        alone = score(model, {"tokens": part[None]})
        np.testing.assert_allclose(ours.logits[0, rows], alone.logits[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(ours.logprob[0, rows], alone.logprob[0], rtol=0, atol=1e-5)
    assert np.isnan(ours.logprob[0, [3, 8, 9, 10]]).all()


def test_batches_are_as_large_as_their_logits_allow(make_model, monkeypatch):
    model, tokens = make_model(3), np.random.default_rng(0).integers(0, 32, (5, 4, 3))
    whole = score(model, {"tokens": tokens})
    monkeypatch.setattr(score_module, "LOGITS_AT_ONCE", 2 * 4 * 3 * 32)
    parts = list(score_batches(model, {"tokens": tokens}))
    assert [len(part.logits) for part in parts] == [2, 2, 1]
    again = score(model, {"tokens": tokens})
    np.testing.assert_allclose(again.logits, whole.logits, rtol=0, atol=1e-5)


def test_visibility_changes_logits(make_model):
    model, tokens = make_model(3), np.random.default_rng(0).integers(0, 32, (1, 4, 3))
    logits = score(model, {"tokens": tokens}).logits
    other = score(model.with_visibility("same_row"), {"tokens": tokens}).logits
    assert np.abs(logits - other).max() > 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": np.zeros((1, 4, 2), int)}, "2 streams: the model has 3"),
        ({"tokens": np.zeros((4, 3), int)}, r"must be \[B, T, S\]"),
        ({"tokens": np.zeros((1, 4, 3))}, "must be integers"),
        ({"tokens": np.full((1, 4, 3), 32)}, r"tokens\[0, 0, 0\] is 32"),
        ({"tokens": np.full((1, 4, 3), -1)}, "is -1: the vocabulary"),
        ({"present": np.ones((1, 4, 3), int)}, "present is int64"),
        ({"present": np.ones((1, 3, 3), bool)}, "present is bool"),
        ({"segment": np.ones((1, 3), int)}, "segment is int64"),
        ({"segment": np.array([[1, 2, 1, 0]])}, "id 1 has several runs"),
        ({"segment": np.array([[1, 1, -1, 0]])}, "it holds -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_tables_are_refused(change, message):
    tables = {"tokens": np.zeros((1, 4, 3), int), "present": np.ones((1, 4, 3), bool)} | change
    if "tokens" in change:
        tables.pop("present")
    with pytest.raises(UserError, match=message):
        check_tables(tables, 3, 32)


def test_absent_cells_may_hold_any_token(make_model):
    tokens = np.full((1, 4, 3), -1)
    tokens[:, :2] = 5
    present = tokens >= 0
    found = score(make_model(3), {"tokens": tokens, "present": present})
    assert np.isfinite(found.logits[present]).all()


def test_load_names_a_missing_checkpoint(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint in"):
        load(tmp_path / "none")
