"""docs/extending: optimizers, evaluations, metrics writers and hooks from outside the package."""

import ast
import json
import pathlib
import re
import shlex
import sys

import jax
import numpy as np
import optax
import pytest
from outside.hooks import LogCheckpoints, Sample, StopBelow
from outside.optimizer import lion
from runs import dictation, four_streams, host, make_program, metrics, place, random_tables, replace

import msllm
from msllm.config import from_config_dict
from msllm.errors import UserError
from msllm.hooks import Hook
from msllm.training import train

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ("optimizer", "evaluation", "metrics_writer", "hooks")


@pytest.fixture
def config(data_dir):
    return dictation(**{"data.dir": data_dir, "mesh.data": 2, "mesh.fsdp": 4, "steps": 4})


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_show_the_tested_modules(page):
    text = (ROOT / f"docs/extending/{page}.md").read_text()
    code, *_ = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert (ROOT / f"tests/outside/{page}.py").read_text() == code


@pytest.mark.parametrize("page", PAGES[:-1])
def test_the_commands_on_the_pages_are_valid(page):
    text = (ROOT / f"docs/extending/{page}.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^    PYTHONPATH=. msllm train .*", text, flags=re.M)
    settings = dict(re.findall(r"--config\.(\S+?)=(.*?)(?= --|$)", " ".join(shlex.split(command))))
    for name, value in settings.items():
        settings[name] = ast.literal_eval(value) if name != "optim.optimizer" else value
    config = four_streams(**settings)
    assert "mine:" in repr(config)


# Optimizers.


def test_a_step_applies_the_users_optimizer():
    config = four_streams(**{"optim.optimizer": "outside.optimizer:lion", "optim.lr": 0.01})
    config = replace(config, "optim", schedule="constant")
    program = make_program(config, 8, data=2, fsdp=4)
    batch, state = place(program, random_tables(config)), program.init()
    before = host(state)
    gradients = host(jax.jit(program._gradients)(state.parameters, batch)[0])
    state, values = program.step(state, batch)
    assert jax.tree.map(lambda x: x.sharding, state) == program.state_shardings
    reference = lion(config.optim, config.steps)
    updates, opt_state = reference.update(gradients, before.opt_state, before.parameters)
    expected = optax.apply_updates(before.parameters, updates)

    def assert_close(ours, theirs):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)

    jax.tree.map(assert_close, host(state.parameters), expected)
    jax.tree.map(assert_close, host(state.opt_state), opt_state)
    assert values["learning_rate"] == np.float32(0.01)


def test_the_state_of_a_users_optimizer_is_sharded_like_the_parameters():
    config = four_streams(**{"optim.optimizer": "outside.optimizer:lion"})
    program = make_program(config, 8, data=2, fsdp=4)
    moments = program.state_shardings.opt_state[1][0].mu
    assert moments == program.state_shardings.parameters
    assert any(sharding.spec for sharding in jax.tree.leaves(moments))


def test_a_skipped_update_keeps_the_state_of_a_users_optimizer():
    config = four_streams(**{"optim.optimizer": "outside.optimizer:lion"})
    program = make_program(config)
    batch = place(program, random_tables(config))
    state, _ = program.step(program.init(), batch)
    good = host(state)
    state = state._replace(
        parameters=state.parameters | {"final_norm": state.parameters["final_norm"] * np.nan}
    )
    state, values = program.step(state, batch)
    assert int(values["skipped"]) == 1
    jax.tree.map(np.testing.assert_array_equal, host(state.opt_state), good.opt_state)
    jax.tree.map(
        np.testing.assert_array_equal, host(state.parameters)["blocks"], good.parameters["blocks"]
    )


@pytest.mark.slow
def test_a_run_continues_bit_for_bit_with_the_same_optimizer(config, tmp_path, make_unimportable):
    config = replace(config, "optim", optimizer="outside.optimizer:lion")
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", [StopAt(1)])
    parts = train(config, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, host(parts), host(whole))
    rule = "state of another optimizer .*'outside.optimizer:lion' there and 'adamw' here"
    with pytest.raises(UserError, match=rule):
        train(replace(config, "optim", optimizer="adamw"), tmp_path / "parts")

    # Loading the checkpoint does not need the optimizer.
    make_unimportable("outside.optimizer")
    loaded = msllm.load(tmp_path / "parts")
    assert loaded.run_config.optim.optimizer == "outside.optimizer:lion"
    assert "outside.optimizer" not in sys.modules


class StopAt(Hook):
    """Asks for a stop after a step, which ends the run after the next step."""

    def __init__(self, step):
        self.step = step

    def at_step(self, run, step, metrics):
        run.stop_requested = step >= self.step


# Evaluations and metrics writers.


@pytest.mark.slow
def test_user_evaluations_and_writers_are_called(config, tmp_path):
    evaluations = ("held_out", "outside.evaluation:answers", "outside.evaluation:seen_tables")
    settings = {"evaluations": evaluations, "eval_every": 2}
    config = from_config_dict({**json.loads(msllm.config.to_json(config)), **settings})
    config = replace(config, "monitor", writers=("outside.metrics_writer:LossCsv", "jsonl"))
    train(config, tmp_path)
    lines = [line for line in metrics(tmp_path) if "eval/loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert 0 <= line["eval/exact_match"] <= 1
        assert 0 < line["eval/seen/loss"] != line["eval/loss"]
    rows = [line.split(",") for line in (tmp_path / "losses.csv").read_text().splitlines()]
    written = metrics(tmp_path)
    assert [int(row[0]) for row in rows] == [1, 2, 2, 3, 4, 4]
    assert [float(row[1] or row[2]) for row in rows] == [
        line.get("loss", line.get("eval/loss")) for line in written
    ]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.slow
def test_the_model_of_a_run_is_the_one_that_is_saved(config, tmp_path):
    class KeepModel(Hook):
        every = 3

        def at_step(self, run, step, metrics):
            if step == 3:
                self.model, self.parameters = run.model(), host(run.model().parameters)

    hook = KeepModel()
    train(replace(config, "checkpoint", every=3, keep_last=9), tmp_path, [hook])
    loaded = msllm.load(tmp_path / "checkpoints" / "3")
    model, parameters = hook.model, hook.parameters
    assert (model.config, model.streams, model.step) == (loaded.config, loaded.streams, 3)
    jax.tree.map(np.testing.assert_array_equal, host(loaded.parameters), parameters)


@pytest.mark.slow
def test_two_evaluations_must_not_share_a_name(config, tmp_path):
    both = ("held_out", "outside.evaluation:seen_tables", "test_extending_training:loss_again")
    settings = {"evaluations": both, "eval_every": 2}
    config = from_config_dict({**json.loads(msllm.config.to_json(config)), **settings})
    with pytest.raises(
        UserError, match=r"test_extending_training:loss_again returns eval/loss, which"
    ):
        train(config, tmp_path)


def loss_again(run):
    """An evaluation whose result has the same name as that of `held_out`."""
    return {"loss": 0.0}


@pytest.mark.parametrize(
    "setting, value, message",
    [
        (
            "optim.optimizer",
            "sgd",
            r"optimizer is 'sgd': must be one of adamw, muon, or package",
        ),
        ("optim.optimizer", "outside.optimizer:sgd", "optim.optimizer is '.*:sgd': cannot be imp"),
        ("evaluations", ("held",), "config.evaluations is 'held': must be one of held_out, or"),
        ("monitor.writers", ("csv",), "monitor.writers is 'csv': must be one of jsonl, tensorb"),
    ],
)
def test_an_unknown_name_ends_a_run_before_it_compiles(
    config, tmp_path, monkeypatch, setting, value, message
):
    monkeypatch.setattr("msllm.training.compile_step", None)
    settings = msllm.config.to_config_dict(config)
    settings.update_from_flattened_dict({setting: value})
    with pytest.raises(UserError, match=message):
        train(from_config_dict(settings), tmp_path)


def test_reading_a_config_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    from_config_dict(
        {
            "optim": {"optimizer": "trap:function"},
            "evaluations": ["trap:function"],
            "monitor": {"writers": ["trap:Class"]},
        }
    )
    assert "trap" not in sys.modules


# Hooks.


@pytest.mark.slow
def test_hooks_from_python(config, tmp_path, capsys):
    sample = Sample()
    sample.every = 3
    train(config, tmp_path, [sample, LogCheckpoints()])
    assert (tmp_path / "saved.txt").read_text().split() == ["2", "4"]
    lines = [line for line in metrics(tmp_path) if "sample/silence" in line]
    assert [line["step"] for line in lines] == [3, 4]  # every 3 steps, and after the last one
    assert all(0 <= line["sample/silence"] <= 1 for line in lines)
    printed = capsys.readouterr().out
    assert re.search(r"step 3  user: .*\nstep 3  thought: .*\nstep 3  output: ", printed)


@pytest.mark.slow
def test_a_hook_ends_a_run_and_the_same_call_continues(config, tmp_path, capsys):
    state = train(config, tmp_path, [StopBelow(1e9)])
    # The loss of step 1 is read after step 2; the run then ends after the next step.
    assert int(state.step) == msllm.load(tmp_path).step == 3
    assert "stopped at step 3, saved; the same command continues here" in capsys.readouterr().out
    assert int(train(config, tmp_path, [StopBelow(0.0)]).step) == 4


class Record(Hook):
    """Records every call."""

    def __init__(self, every):
        self.every, self.calls = every, []

    def at_start(self, run):
        self.calls.append(("start", run.step))

    def at_step(self, run, step, metrics):
        assert run.step == step == int(run.state.step)
        self.calls.append(("step", step))

    def at_save(self, run, step):
        self.calls.append(("save", step))

    def at_end(self, run):
        self.calls.append(("end", run.step))


@pytest.mark.slow
def test_the_order_of_calls(config, tmp_path):
    config = replace(config, "checkpoint", every=2)
    never, third, always = Record(0), Record(3), Record(1)
    train(config, tmp_path, [never, third, always])
    saves = [("save", 2), ("save", 4)]
    assert never.calls == [("start", 0), *saves, ("end", 4)]
    # A checkpoint is saved before the caller's hooks run.
    assert third.calls == [
        ("start", 0), ("save", 2), ("step", 3), ("save", 4), ("step", 4), ("end", 4)
    ]  # fmt: skip
    assert [call for call in always.calls if call[0] == "step"] == [
        ("step", n + 1) for n in range(4)
    ]


@pytest.mark.slow
def test_at_end_is_not_called_after_an_error(config, tmp_path):
    class Fail(Hook):
        def at_step(self, run, step, metrics):
            raise ZeroDivisionError("a mistake in a hook")

    record = Record(1)
    with pytest.raises(ZeroDivisionError, match="a mistake in a hook"):
        train(config, tmp_path, [record, Fail()])
    assert ("end", 1) not in record.calls and ("step", 1) in record.calls
