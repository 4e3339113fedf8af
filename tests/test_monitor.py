"""Monitoring of a run: goodput, MFU, slow steps, traces, metrics writers, and hosts that differ."""

import io
import json
import logging
import os
import sys
import types

import jax
import numpy as np
import pytest
from etils import epath
from runs import SILENCE, dictation, four_streams, make_program, metrics

from msllm.errors import UserError
from msllm.hooks import Announce, Hook, LogExamples
from msllm.metrics import MetricsWriters, append_lines
from msllm.monitor import KINDS, PAST, Goodput, Monitor
from msllm.runtime import processes
from msllm.runtime.flops import train_flops
from msllm.runtime.hardware import Hardware
from msllm.runtime.progress import Progress
from msllm.training import train


def test_goodput_accounts_for_every_second_of_all_attempts(clock, tmp_path):
    path = epath.Path(tmp_path / "goodput.json")
    first = Goodput(path, seconds_before=2.0)
    first.restored(0)
    clock.now += 3  # startup
    first.begin("steps")
    clock.now += 10
    with first.inside("checkpoint"):
        clock.now += 1
    first.saved(5)
    clock.now += 20
    with first.inside("data"):
        clock.now += 4
    first.write()

    clock.now += 7  # no process runs for 6 s; then the second one takes 1 s to start
    second = Goodput(path, seconds_before=1.0)
    second.restored(5)
    expected = dict.fromkeys((*KINDS, *PAST), 0.0)
    expected |= {
        "startup": 6.0,
        "steps": 10.0,
        "checkpoint": 1.0,
        "data": 4.0,
        "lost": 20.0,
        "down": 6.0,
    }
    assert second.seconds == expected and second.attempts == 2
    clock.now += 13
    values = second.values()
    assert values["time/startup"] == 19 and values["goodput"] == pytest.approx(10 / 60)
    assert sum(second.seconds.values()) == clock.now - 1000.0 + 2.0


class FakeClocks:
    """Stands in for the clocks of two processes, of which the second is 9 s late for some steps."""

    hosts = ["a", "b"]
    latest = processes.DispatchClocks.latest

    def __init__(self, *late_steps):
        self._late_steps, self._step = late_steps, 0

    def read(self):
        self._step += 1
        return np.array([0, 9000 * (self._step in self._late_steps)], np.int32)  # ms


def make_monitor(tmp_path, clocks, **settings):
    """(monitor, program) of a small run that has begun its steps."""
    config = four_streams(**{"data.batch_size": 2, **settings})
    program = make_program(config)
    workdir = epath.Path(tmp_path)
    goodput = Goodput(workdir / "goodput.json")
    goodput.begin("steps")
    progress = Progress("step", config.steps, every=0, file=sys.stdout)
    writers = MetricsWriters(workdir, config)
    return Monitor(program, writers, progress, goodput, clocks), program


def fake_metrics(program, cells=128.0, targets=30.0):
    """Metrics of a step with these numbers of cells and, in each stream, half of these targets."""
    per_stream = ("nll", "nll_spoken", "targets", "targets_spoken")
    sums = {name: np.full(program.streams.size, targets / 2) for name in per_stream}
    scalars = (
        "loss",
        "gradient_norm",
        "parameter_norm",
        "update_norm",
        "learning_rate",
        "skipped",
        "skipped_in_row",
    )
    counts = {"cells": np.float32(cells), "spoken": np.float32(cells / 2)}
    return sums | dict.fromkeys(scalars, np.float32(0)) | counts


def full_tables(program):
    """Tables without absent cells, all silent."""
    shape = program.abstract_batch["tokens"].shape
    return {
        "tokens": np.full(shape, SILENCE, np.int32),
        "present": np.ones(shape, bool),
        "segment": np.ones(shape[:2], np.int32),
    }


@pytest.mark.parametrize(
    "late_step, cause",
    [
        (9, "process 1 on b dispatched it 9.0 s after the others"),
        # Step 9 is read after the dispatch of step 10, which is late.
        (10, "process 1 on b dispatched it 9.0 s after the others"),
        (None, "all processes dispatched it in time: devices or network were slow"),
    ],
)
def test_a_slow_step_is_reported_with_its_cause(clock, tmp_path, capsys, late_step, cause):
    monitor, program = make_monitor(tmp_path, FakeClocks(late_step))
    for step in range(1, 15):
        clock.now += 10.0 if step == 10 else 1.0  # step 9 is read when step 10 has been dispatched
        monitor.after_dispatch(step, fake_metrics(program), full_tables(program))
    reports = [line for line in capsys.readouterr().out.splitlines() if "times the median" in line]
    assert reports == [f"step 9 took 10.0 s, 10 times the median: {cause}"]


def test_steps_after_an_evaluation_are_not_slow(clock, tmp_path, capsys):
    monitor, program = make_monitor(tmp_path, processes.DispatchClocks())
    for step in range(1, 12):
        clock.now += 1
        monitor.after_dispatch(step, fake_metrics(program), full_tables(program))
    monitor.flush()
    clock.now += 50
    for step in range(12, 15):
        clock.now += 1
        monitor.after_dispatch(step, fake_metrics(program), full_tables(program))
    assert "times the median" not in capsys.readouterr().out


def test_mfu_is_flops_over_time_and_peak(clock, tmp_path, monkeypatch):
    hardware = Hardware(flops=1e9, hbm_gib=1, hbm_bandwidth=1)
    monkeypatch.setattr("msllm.monitor.lookup", lambda kind: hardware)
    monitor, program = make_monitor(tmp_path, processes.DispatchClocks(), log_every=2)
    config, streams = program.config, program.streams
    cells = config.data.batch_size * config.data.rows * streams.size
    targets = config.data.batch_size * config.data.rows * 2  # of the two streams with a loss
    for step in (1, 2, 3):
        clock.now += 0.5
        monitor.after_dispatch(step, fake_metrics(program, cells, targets), full_tables(program))
    (line,) = metrics(tmp_path)
    flops = train_flops(config.model, streams, config.data.batch_size, config.data.rows)
    assert line["mfu"] == pytest.approx(2 * flops / 1.5 / (1e9 * jax.device_count()))
    assert line["mfu_spoken"] < line["mfu"]


def test_weights_and_biases_gets_the_same_numbers(tmp_path, monkeypatch):
    config = four_streams(**{"monitor.wandb_project": "mine"})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb_project is 'mine', and wandb is not installed"):
        MetricsWriters(epath.Path(tmp_path), config)

    logged, started = [], {}

    def init(**arguments):
        started.update(arguments)
        return types.SimpleNamespace(
            log=lambda values, step: logged.append((step, values)),
            finish=lambda: logged.append("end"),
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    writer = MetricsWriters(epath.Path(tmp_path), config)
    writer.write(3, {"loss": 1.5})
    writer.close()
    assert logged == [(3, {"loss": 1.5}), "end"]
    assert started["project"] == "mine" and started["resume"] == "allow"
    assert metrics(tmp_path) == [{"step": 3, "loss": 1.5}]


@pytest.mark.slow
def test_a_run_writes_a_trace_and_the_ids_of_its_examples(data_dir, tmp_path):
    changes = {
        "monitor.profile_start": 2,
        "monitor.profile_steps": 2,
        "monitor.examples": True,
        "checkpoint.every": 3,
    }
    config = dictation(
        **{"data.dir": data_dir, "steps": 5, "eval_every": 0, "mesh.data": 8, **changes}
    )
    train(config, tmp_path)
    assert list((tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb"))
    (file,) = (tmp_path / "examples").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5))
    for line in lines:
        assert line["rows"] == [0, 8]
        assert len(line["examples"]) == 8 and line["examples"][0]


@pytest.mark.parametrize(
    "content, kept", [(None, ""), ("", ""), ("a\nb\n", "a\nb\n"), ("a\nb", "a\n"), ("a", "")]
)
def test_appending_drops_a_last_line_that_is_incomplete(tmp_path, content, kept):
    path = epath.Path(tmp_path / "lines")
    if content is not None:
        path.write_text(content)
    with append_lines(path) as file:
        file.write("new\n")
    assert path.read_text() == kept + "new\n"


def test_appending_reads_only_the_end_of_a_long_file(tmp_path, monkeypatch):
    path = tmp_path / "lines"
    path.write_text("a line\n" * 20_000 + "x" * 70_000)  # more than one part has no line break
    read = []

    class Counted(io.FileIO):
        def read(self, size=-1):
            content = super().read(size)
            read.append(len(content))
            return content

    class Path(type(path)):
        def open(self, mode="r", **options):
            return Counted(self) if mode == "rb" else super().open(mode, **options)

    with append_lines(Path(path)) as file:
        file.write("new\n")
    assert path.read_text() == "a line\n" * 20_000 + "new\n"
    assert 0 < sum(read) < path.stat().st_size


def test_hooks_are_closed_if_a_run_fails(tmp_path, data_dir):
    class Fails(Hook):
        closed = False

        def at_step(self, run, step, metrics):
            self.hooks = run.hooks
            raise ZeroDivisionError

        def close(self, run):
            self.closed = True

    config = dictation(**{"data.dir": data_dir, "steps": 5, "monitor.examples": True})
    hook = Fails()
    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path, hooks=[hook])
    (log,) = (each for each in hook.hooks if isinstance(each, LogExamples))
    assert hook.closed and log._file.closed
    assert (tmp_path / "examples/process-00000.jsonl").read_text().count("\n") == 1


def test_a_process_that_differs_is_named(monkeypatch):
    gathered = []
    monkeypatch.setattr(processes, "all_gather_json", lambda value: gathered)
    facts = {"config": {"optim": {"lr": 0.1, "b1": 0.9}}, "tokenizer": "abc"}

    def message(host, facts, error=None):
        return {"host": host, "facts": facts, "error": error}

    gathered[:] = [message("a", facts), message("b", facts)]
    processes.check_same_everywhere(facts)
    other = {**facts, "config": {"optim": {"lr": 0.2, "b1": 0.9}}}
    gathered[:] = [message("a", facts), message("b", other)]
    rule = r"process 1 on b has another config than process 0 on a: \w{12} there, \w{12} here "
    rule += r"\(optim.lr is 0.2 there, 0.1 here\)"
    with pytest.raises(UserError, match=rule):
        processes.check_same_everywhere(facts)
    gathered[:] = [message("a", facts), message("b", {}, "no data")]
    with pytest.raises(UserError, match="process 1 on b: no data"):
        processes.check_same_everywhere(facts)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"address": "localhost:1"},
            "--num_processes is not set: give all of --coordinator_address, --num_processes",
        ),
        (
            {"address": "localhost:1", "num_processes": 2, "process_id": 2},
            r"--process_id is 2: must be in 0..1",
        ),
    ],
)
def test_invalid_cluster_settings_are_refused(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        processes.connect(tmp_path, **arguments)


def test_a_writer_that_cannot_write_does_not_end_the_run(tmp_path, caplog):
    config = dictation(**{"monitor.writers": ("tensorboard", "jsonl")})
    (tmp_path / "tensorboard").write_text("")  # in the place of the folder
    writers = MetricsWriters(epath.Path(tmp_path), config)
    with caplog.at_level(logging.WARNING, "msllm"):
        writers.write(1, {"loss": 3.0})
        writers.write(2, {"loss": 2.0})
    assert caplog.text.count("TensorBoard cannot write metrics from step 1 on") == 1
    (tmp_path / "tensorboard").unlink()
    writers.write(3, {"loss": 1.0})
    writers.close()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    writers = MetricsWriters(epath.Path(tmp_path), dictation(**{"monitor.writers": ("jsonl",)}))
    writers.write(1, {"loss": 3.0})
    file = writers._writers[0]._file

    def fill(line):
        os.write(file.fileno(), line[:5].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers._writers[0], "_file", Wrapped(file, fill))
    writers.write(2, {"loss": 2.0})
    writers.write(3, {"loss": 1.0})
    writers.close()
    assert [line["step"] for line in metrics(tmp_path)] == [1, 3]


class Wrapped:
    """An open file whose `write` is replaced."""

    def __init__(self, file, write):
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)


def announced(sources: int, durations: list[float], plan: object = None) -> list[str]:
    """What `Announce` says in a run with these durations of steps so far."""
    said: list[str] = []
    config = four_streams(**{"steps": 1000, "data.rows": 16, "data.batch_size": 8})
    sizes = types.SimpleNamespace(argument_size_in_bytes=3 << 20, temp_size_in_bytes=50 << 20)
    timed: list[float] = []
    run = types.SimpleNamespace(
        config=config,
        program=make_program(config),
        loader=types.SimpleNamespace(
            num_tables=500,
            plan=plan,
            manifests=range(sources),
            tokenizer=types.SimpleNamespace(vocab_size=32),
        ),
        say=said.append,
        monitor=types.SimpleNamespace(
            step_seconds=lambda least: timed[-1] if len(timed) >= least else None
        ),
    )
    hook = Announce(types.SimpleNamespace(memory_analysis=lambda: sizes))
    hook.at_start(run)
    for step, seconds in enumerate(durations, 1):
        timed.append(seconds)
        if hook.every:
            hook.at_step(run, step, {})
    return said


def test_a_run_says_how_large_it_is_and_once_how_long_it_takes():
    model, data, memory, *time = announced(1, [0.5] * 9)
    assert model == "model: 6,832 parameters, 32 pieces, streams user, tool, thought, output"
    assert data == "data: 500 tables of 16 rows; 1,000 steps of 8 tables are 16.0 epochs"
    assert memory.startswith("memory: 3.0 MiB for parameters and optimizer, 50 MiB for a step")
    assert time == [
        "time: about 8:17 for the 995 steps that are left, at 0.5 s a step, without evaluations"
        " and checkpoints"
    ]
    assert len(announced(1, [0.5] * 4)) == 3
    assert announced(2, [], plan=object())[1].endswith("8 tables from 2 sources are 8,000 tables")
