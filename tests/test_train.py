"""Training runs: what they write, how they stop and continue, and errors."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from runs import (
    TIMES,
    assert_same_parameters,
    dictation,
    flip_a_bit,
    host,
    metrics,
    replace,
    reproducible_metrics,
    stop_after,
    write_config_file,
)
from tensorboardX.proto.event_pb2 import Event

from msllm.checkpoint import Checkpoints
from msllm.errors import UserError
from msllm.hooks import EVALUATIONS, held_out_losses
from msllm.training import train
from msllm.weights.load import load

pytestmark = pytest.mark.slow

AGAIN = "run `msllm prepare` again into an empty directory"


@pytest.fixture
def config(data_dir):
    return dictation(**{"data.dir": data_dir, "mesh.data": 2, "mesh.fsdp": 4})


@pytest.fixture
def uninterrupted(config, tmp_path_factory):
    """The workdir of a finished run, shared by all tests of a session. Read only."""
    workdir = tmp_path_factory.getbasetemp() / "uninterrupted"
    if not workdir.exists():
        train(config, workdir)
    return workdir


def test_metrics_of_a_run(uninterrupted):
    lines = metrics(uninterrupted)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["step"] for line in lines if "eval/loss" in line] == [4, 8]
    names = {
        "loss",
        "loss_spoken",
        "nll/thought",
        "nll/output",
        "nll_spoken/thought",
        "nll_spoken/output",
        *TIMES,
    }
    names |= {"gradient_norm", "parameter_norm", "update_norm"}
    names |= {"learning_rate", "skipped_updates", "step"}
    assert set(steps[-1]) == names
    evaluated = {
        f"eval/{kind}/{s}" for kind in ("nll", "nll_spoken") for s in ("user", "thought", "output")
    }
    assert set(lines[-1]) == evaluated | {"eval/loss", "eval/loss_spoken", "step"}
    assert steps[-1]["loss"] < steps[0]["loss"] and lines[-1]["eval/loss"] < steps[0]["loss"]
    assert steps[-1]["tokens_per_second"] > steps[-1]["spoken_tokens_per_second"] > 0


def test_tensorboard_holds_the_same_numbers(uninterrupted):
    (file,) = (uninterrupted / "tensorboard").iterdir()
    found = scalars(file.read_bytes())
    for line in metrics(uninterrupted):
        for name, value in line.items():
            if name != "step":
                assert found[name, line["step"]] == pytest.approx(value, rel=1e-6)


def scalars(content):
    """{(name, step): value} of an event file."""
    result = {}
    while content:  # a record: length, checksum of the length, event, checksum of the event
        size = int.from_bytes(content[:8], "little")
        event, content = Event.FromString(content[12 : 12 + size]), content[16 + size :]
        for value in event.summary.value:
            result[value.tag, event.step] = value.simple_value
    return result


def test_a_stopped_run_continues_bit_for_bit(
    config, uninterrupted, tmp_path, monkeypatch, capsys, caplog
):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        stopped = train(config, tmp_path)
    assert int(stopped.step) == 3
    assert "stopped at step 3, saved; the same command continues here" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finished = train(config, tmp_path)
    assert int(finished.step) == 8
    assert reproducible_metrics(tmp_path) == reproducible_metrics(uninterrupted)
    assert_same_parameters(tmp_path, uninterrupted)
    # Starting a finished run again changes nothing.
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with caplog.at_level("INFO", logger="msllm"):
        again = train(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, host(again), host(finished))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert f"the run in {tmp_path} is at step 8 of 8; increase config.steps" in caplog.text


def test_a_run_continues_on_another_mesh(config, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train(config, tmp_path)
    train(replace(config, "mesh", data=8, fsdp=1), tmp_path)
    lines = zip(reproducible_metrics(tmp_path), reproducible_metrics(uninterrupted), strict=True)
    for line, expected in lines:
        assert line.keys() == expected.keys()
        np.testing.assert_allclose(list(line.values()), list(expected.values()), rtol=2e-5)


def test_a_signal_during_evaluation_saves_after_the_next_step(
    config, tmp_path, monkeypatch, capsys
):
    def interrupting(run):
        signal.raise_signal(signal.SIGINT)
        return held_out_losses(run)

    monkeypatch.setitem(EVALUATIONS, "held_out", interrupting)
    state = train(replace(config, "checkpoint", every=0), tmp_path)
    assert int(state.step) == load(tmp_path).step == 5
    assert "stopped at step 5, saved" in capsys.readouterr().out


def test_a_run_stops_after_too_many_gradients_that_are_not_finite(
    config, tmp_path, monkeypatch, capsys
):
    def poisoned(self, program, tokenizer):
        state = program.init()
        final_norm = state.parameters["final_norm"] * 1e25
        return state._replace(parameters=state.parameters | {"final_norm": final_norm})

    monkeypatch.setattr(Checkpoints, "restore", poisoned)
    rule = (
        r"3 updates in a row were skipped because the gradients of .* not finite "
        r"\(config.optim.max_skipped is 3\)"
    )
    with pytest.raises(UserError, match=rule):
        train(replace(replace(config, "optim", max_skipped=3), "checkpoint", every=1), tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    first = (
        r"step 1: the gradients of blocks/\S+, .* and others were not finite; "
        r"update skipped \(1 in a row, 1 in all\)"
    )
    assert re.fullmatch(first, said[0])
    assert said[2].startswith("step 3:") and len(said) == 3
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]


def command(workdir, config, *options):
    """A command line of `msllm train` with a config file."""
    file = write_config_file(workdir.parent / f"{workdir.name}.py", config)
    arguments = [f"--config={file}", f"--workdir={workdir}", *options]
    return [sys.executable, "-m", "msllm", "train", *arguments]


def test_ctrl_c_saves_and_the_same_command_continues(config, uninterrupted, tmp_path):
    line = command(tmp_path / "run", config)
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for said in process.stdout:
            if said.startswith("step 4/8"):  # the run evaluates now, which takes a while
                locked = f"in which process {process.pid} on .* is training: wait for it"
                with pytest.raises(UserError, match=locked):
                    train(config, tmp_path / "run")
                process.send_signal(signal.SIGINT)
                break
        rest, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "stopped at step 5, saved; the same command continues here" in rest
    assert "step 6/8" not in rest
    assert metrics(tmp_path / "run")[-1]["step"] == 5

    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "continuing at step 5" in done.stderr
    assert "step 8/8" in done.stdout and "step 5/8" not in done.stdout
    for text in done.stdout.splitlines():  # plain lines, because stdout is not a terminal
        progress = r"step \d/8  loss \d+\.\d{4}  [\d,]+ tokens/s  ETA 0:0\d"
        evaluation = r"step 8  evaluation: loss \d+\.\d{4}  nll/user .*  loss_spoken \d+\.\d{4}"
        size = r"(model|data|memory|time): .*"
        assert re.fullmatch(f"{progress}|{evaluation}|{size}", text), text
    assert reproducible_metrics(tmp_path / "run") == reproducible_metrics(uninterrupted)
    assert_same_parameters(tmp_path / "run", uninterrupted)


def test_a_run_without_a_reader_continues_and_saves_on_hang_up(config, tmp_path):
    with subprocess.Popen(
        command(tmp_path / "run", config, "--config.steps=2000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Under nohup, tests inherit that hang-ups are ignored, which a run respects.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    ) as process:
        for said in process.stdout:
            if said.startswith("step 2/"):
                break
        process.stdout.close()  # as `| head` does
        lines = len(metrics(tmp_path / "run"))
        while len(metrics(tmp_path / "run")) < lines + 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        errors = process.stderr.read()
        assert process.wait(timeout=120) == 75, errors
    assert "Traceback" not in errors
    assert load(tmp_path / "run").step == metrics(tmp_path / "run")[-1]["step"]


def test_a_run_needs_neither_stdout_nor_stderr(config, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command(tmp_path / "run", config),
            stdout=full,
            preexec_fn=lambda: os.close(2),
            timeout=120,
        )
    assert done.returncode == 0
    assert load(tmp_path / "run").step == 8 == metrics(tmp_path / "run")[-1]["step"]


def test_a_command_that_cannot_run_prints_one_line(config, data_dir, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data_dir, copy)
    shard = next(copy.glob("train-00002*"))
    shard.unlink()
    line = command(tmp_path / "run", config, f"--config.data.dir={copy}")
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    message = f"{shard} is missing (manifest.json lists it): restore it, or {AGAIN}"
    assert done.stderr == f"error: {message}\n"
    assert not (tmp_path / "run").exists()

    line.append("--config.optim.lrr=1")
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "unknown config key config.optim.lrr: did you mean config.optim.lr?" in done.stderr


def test_a_workdir_that_cannot_be_made_is_refused(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"--workdir is .*file/run, which cannot be created \(.*\): choose another"
    ):
        train(config, tmp_path / "file" / "run")
    (tmp_path / "run" / "lock").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"--workdir is .*run, where lock cannot be written \(.*\): repair that"
    ):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda data: flip_a_bit(next(data.glob("train-00001*"))),
            r"train-00001.* is corrupt \(sha256 differs",
        ),
        (
            lambda data: flip_a_bit(next(data.glob("eval-00000*"))),
            r"eval-00000.* is corrupt \(sha256 differs",
        ),
        (
            lambda data: flip_a_bit(next(data.glob("*.model"))),
            r"is not the tokenizer of this data \(sha256 differs\)",
        ),
        (lambda data: (data / "manifest.json").write_text("{"), r"manifest.json is damaged"),
        (shutil.rmtree, r"data does not exist \(/.* holds? "),
    ],
    ids=["shard", "evaluation shard", "tokenizer", "manifest", "no data"],
)
def test_damaged_data_stops_the_run_before_it_starts(config, data_dir, tmp_path, change, message):
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    change(data)
    with pytest.raises(UserError, match=message):
        train(replace(config, "data", dir=str(data)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "section, changes, message",
    [
        (
            "mesh",
            {"data": 2, "fsdp": 1, "tensor": 4},
            "does not divide model.num_kv_heads .*: 2 over tensor=4",
        ),
        ("mesh", {"data": 16}, "does not fit 8 devices"),
        ("data", {"rows": 48}, r"config.data.rows is 48, but .* was prepared with 32"),
        (
            "streams",
            {"names": ("user", "thought", "answer")},
            r"config.streams.names is .*'answer'.*prepared with",
        ),
        (
            "model",
            {"vocab_size": 20},
            r"vocab_size is 20: the data's tokenizer has \d+ pieces; set it to 0",
        ),
    ],
    ids=["heads", "devices", "rows", "names", "vocabulary"],
)
def test_a_config_that_does_not_fit_stops_the_run_before_it_starts(
    config, tmp_path, section, changes, message
):
    with pytest.raises(UserError, match=message):
        train(replace(config, section, **changes), tmp_path)
