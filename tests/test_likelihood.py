"""Likelihoods of prepared data: that probabilities sum to 1, sums over units, and intervals."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from runs import dictation, metrics

from msllm.config import DataConfig
from msllm.data.loader import Loader
from msllm.data.prepare import prepare
from msllm.data.tables import Table, shift, unpack
from msllm.errors import UserError
from msllm.evals.likelihood import (
    Likelihoods,
    _nll,
    best_checkpoint,
    describe,
    difference,
    evaluate,
    report,
)
from msllm.evals.score import score
from msllm.streams import StreamSpec, lag_matrix
from msllm.training import train

SILENCE = 0


@pytest.mark.parametrize("delays", [(0, 0, 0), (0, 1, 2)])
def test_the_probabilities_of_all_tables_sum_to_one(make_model, delays):
    """Sums over all tables of two frames of three voices after a silent row.

    Silence is one of the three pitches.
    """
    pitches, frames = 3, 2
    model = make_model(streams=3, lag=lag_matrix("same_row", 3), vocab_size=pitches)
    tables = []
    for cells in itertools.product(range(pitches), repeat=frames * 3):
        rows = [[SILENCE] * 3, *np.reshape(cells, (frames, 3)).tolist()]
        tables.append(
            shift(Table(np.array(rows, np.int32), np.ones((frames + 1, 3), bool)), delays)
        )
    tokens = np.stack([table.tokens for table in tables])
    present = np.stack([table.present for table in tables])
    batch = {"tokens": tokens, "present": present, "segment": np.ones(tokens.shape[:2], np.int32)}
    nll, _, _, counted = map(np.asarray, _nll(model.graph, SILENCE, model.parameters, batch))
    assert (counted.sum((1, 2)) == frames * 3).all()  # each voice of each frame is predicted once
    probability = np.exp(-(nll * counted).sum((1, 2), dtype=np.float64))
    assert probability.sum() == pytest.approx(1, abs=1e-4)
    assert probability.max() > 2 * probability.min()  # the distribution is not uniform


def test_sums_equal_those_of_score(loaded):
    loader = Loader(loaded.run_config.data, "eval", loaded.streams)
    examples = [t for step in range(loader.num_batches) for t in unpack(loader.batch(step))]
    units = evaluate(loaded)
    assert len(units.nll) == len(examples)
    for i in (0, 1, len(examples) - 1):
        table = examples[i]
        found = score(loaded, {"tokens": table.tokens[None], "present": table.present[None]})
        logprob = np.where(np.isnan(found.logprob[0]), 0, found.logprob[0])
        np.testing.assert_allclose(units.nll[i], -logprob.sum(0), rtol=1e-4)
        assert units.targets[i].tolist() == [len(table.tokens) - 1] * 3
        spoken = table.tokens[1:] != loaded.tokenizer.silence_id
        assert units.targets_spoken[i].tolist() == spoken.sum(0).tolist()
        np.testing.assert_allclose(units.nll_spoken[i], -(logprob[:-1] * spoken).sum(0), rtol=1e-4)
        logits = found.logits[0, :-1].astype(np.float64)
        logits[..., loaded.tokenizer.silence_id] = -np.inf
        chosen = np.take_along_axis(logits, table.tokens[1:, :, None], -1)[..., 0]
        words = np.log(np.exp(logits).sum(-1)) - np.where(spoken, chosen, 0)
        np.testing.assert_allclose(units.nll_words[i], (words * spoken).sum(0), rtol=1e-4)

    blocks = evaluate(loaded, block=4)
    assert len(blocks.nll) > len(units.nll)
    for whole, parts in zip(units, blocks):
        np.testing.assert_allclose(whole.sum(0), parts.sum(0), rtol=1e-6)
    isolated = evaluate(loaded.with_visibility("isolated"))
    assert np.abs(isolated.nll - units.nll).max() > 1e-3
    assert (isolated.targets == units.targets).all()
    assert np.abs(evaluate(loaded.with_streams(skip_silence=True)).nll - units.nll).max() > 1e-3


def test_data_may_differ_from_the_checkpoint_in_rows_and_delays_only(loaded, tmp_path):
    there = loaded.run_config.data.dir
    tokenizer = {"data.tokenizer.path": f"{there}/tokenizer.model", "data.max_examples": 30}
    delayed = {"data.rows": 48, "streams.delays": (0, 0, 1)}
    prepare(dictation(**tokenizer, **delayed), tmp_path / "other")
    units = evaluate(loaded, str(tmp_path / "other"))
    streams = dataclasses.replace(loaded.streams, delays=(0, 0, 1))
    config = dataclasses.replace(loaded.run_config.data, dir=str(tmp_path / "other"), rows=48)
    (batch,) = Loader(config, "eval", streams).iterate([0])
    tables = unpack(batch)
    assert len(units.nll) == len(tables) and not tables[0].present[0, 2]
    assert units.targets[0].tolist() == [len(tables[0].tokens) - 2] * 3
    single = {
        "streams.names": ("text",),
        "streams.kinds": ("output",),
        "data.converter": "dictation_single",
    }
    prepare(dictation(**tokenizer, **single), tmp_path / "single")
    with pytest.raises(
        UserError, match="streams.names is .*'output'.*, but .* was prepared with .*'text'"
    ):
        evaluate(loaded, str(tmp_path / "single"))
    imported = dataclasses.replace(loaded.run_config, data=DataConfig())
    with pytest.raises(UserError, match="no data of its own: .*--data=DIR"):
        evaluate(dataclasses.replace(loaded, run_config=imported))


def test_intervals_and_differences():
    rng = np.random.default_rng(0)
    targets = rng.integers(1, 50, (400, 2)).astype(float)
    nll = targets * rng.normal((1.0, 3.0), 0.5, (400, 2))
    units = Likelihoods(nll, targets, targets, nll, nll, 2 * targets)
    result = report(units, ("a", "b"))
    for s, name in enumerate("ab"):
        mean = nll[:, s].sum() / targets[:, s].sum()
        # The standard error of a ratio of sums.
        error = np.sqrt(np.sum((nll[:, s] - mean * targets[:, s]) ** 2)) / targets[:, s].sum()
        assert result[name]["nll"] == pytest.approx(mean)
        assert result[name]["low"] == pytest.approx(mean - 1.96 * error, abs=0.3 * error)
        assert result[name]["high"] == pytest.approx(mean + 1.96 * error, abs=0.3 * error)
    assert result["row"]["nll"] == pytest.approx(result["a"]["nll"] + result["b"]["nll"])
    assert result["all"]["nll"] == pytest.approx(nll.sum() / targets.sum())
    expected = nll.sum() / np.log(2) / (2 * targets.sum())
    assert result["all"]["bits_per_byte"] == pytest.approx(expected)
    assert "a      " in describe(result) and len(describe(result).splitlines()) == 5

    # A small difference has a narrow interval if it is the same in every unit.
    worse = units._replace(nll=nll + 0.01 * targets)
    found = report(difference(units, worse), ("a", "b"))["all"]
    assert found["low"] == pytest.approx(0.01) and found["high"] == pytest.approx(0.01)
    with pytest.raises(UserError, match="predict different cells"):
        difference(units, Likelihoods(*(x[:5] for x in units)))


def test_the_command_evaluates_the_best_checkpoint(tmp_path, data_dir):
    settings = {"steps": 4, "eval_every": 1, "checkpoint.every": 1, "checkpoint.keep_every": 1}
    config = dictation(**{"data.dir": data_dir}, **settings)
    train(config, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    losses = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    assert best_checkpoint(str(tmp_path / "run")).endswith(f"/{min(losses, key=losses.get)}")
    out = tmp_path / "out.json"
    command = [
        "-m",
        "msllm",
        "likelihood",
        f"--checkpoint={tmp_path / 'run'}",
        "--best",
        f"--json={out}",
    ]
    done = subprocess.run(
        [sys.executable, *command, f"--against={tmp_path / 'run'}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["against"]["worse"]["all"]["nll"] == 0 and "is worse by" in done.stdout
    weights = StreamSpec.from_config(config.streams).loss_weights
    found = [result["nll"][name] for name, weight in zip(config.streams.names, weights) if weight]
    total = sum(entry["nll"] * entry["targets"] for entry in found)
    mean = total / sum(entry["targets"] for entry in found)
    assert mean == pytest.approx(min(losses.values()), rel=1e-4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint of a step that was evaluated"):
        best_checkpoint(str(tmp_path / "empty"))
