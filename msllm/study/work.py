"""The jobs of a study: preparing data, training and measuring.

A job that is done has left a record, and doing it again only reads the record. A job that was
interrupted continues. A lock keeps two processes, or two machines that share the folder, from doing
the same job at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import numbers
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from msllm.checkpoint import DIRECTORY
from msllm.config import Config, StreamsConfig
from msllm.data.prepare import prepare
from msllm.errors import RunError, UserError
from msllm.hooks import Hook, Run
from msllm.runtime.files import lock_file, write_atomically
from msllm.study.definition import Point
from msllm.study.plan import Data, Plan, Training, code_hash, digest, finite, read_record
from msllm.training import train
from msllm.weights.load import LoadedModel, load
from msllm.weights.warm_start import write_model

STARTED, TRAINED, COST = "study.json", "trained.json", "cost.json"  # in the folder of a run
RECORDS, MEASURED = "records.jsonl", "measured.json"  # in the folder of a point
LOCK_SECONDS = 1.0  # between two attempts to lock a job

log = logging.getLogger("msllm")


class Stopped(RunError):
    """A signal has stopped a job. Its work is saved, and the job continues if it is run again."""


# Jobs, by name: data/ID, shared/SEED, points/FOLDER.


def do(plan: Plan, job: str) -> None:
    """Does a job of a study.

    Args:
      plan: the plan.
      job: "data/ID", "shared/SEED" or "points/FOLDER".

    Raises:
      UserError: there is no such job, its settings are invalid, or its folder holds other work.
      Stopped: a signal has stopped it.
    """
    kind, _, name = job.partition("/")
    with _exclusive(plan.out, job):
        if kind == "data":
            prepare_data(_find_data(plan, name))
            return
        if kind == "shared":
            for seed in plan.study.seeds:
                last = plan.shared(seed)
                if last is not None and str(seed) == name:
                    for run in plan.chain(last):
                        train_run(plan, run)
                    return
        for arm, seed in plan.points():
            if kind == "points" and plan.point_folder(arm, seed).name == name:
                if plan.study.arm(arm).train:
                    for run in plan.chain(plan.training(arm, seed)):
                        train_run(plan, run)
                measure(plan, arm, seed)
                return
    raise UserError(f"the study has no job {job!r}: jobs are data/ID, shared/SEED, points/FOLDER")


def _find_data(plan: Plan, name: str) -> Data:
    for arm, seed in plan.points():
        for data in plan.needed_data(arm, seed):
            if data.id == name:
                return data
    raise UserError(f"the study has no data {name!r}: the config has changed since it was planned")


@contextlib.contextmanager
def _exclusive(out: pathlib.Path, job: str) -> Iterator[None]:
    """Waits until no other process does the job, and keeps others out."""
    path = out / "locks" / job.replace("/", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    while True:
        with lock_file(path) as holder:
            if holder is None:
                yield
                return
        if not waited:
            log.info("%s: waiting for %s, which does the same", job, holder)
        waited = True
        time.sleep(LOCK_SECONDS)


def prepare_data(data: Data) -> None:
    """Prepares data, unless it is there."""
    if not data.is_ready:
        data.folder.parent.mkdir(parents=True, exist_ok=True)
        prepare(data.to_prepare(), data.folder)


# Training.


def trained(plan: Plan, training: Training) -> dict[str, Any] | None:
    """Returns the record of a run that is complete; None if it is not.

    Raises UserError if the folder of the run holds a run with other settings.
    """
    check_unchanged(plan, training)
    return read_record(training.folder / TRAINED)


def changes(plan: Plan, training: Training) -> list[str]:
    """How the settings of a run differ from those that its folder was trained with."""
    record = read_record(training.folder / STARTED)
    if record is None:
        return []
    before, now = record["identity"], plan.identity(training)
    names = sorted(key for key in before | now if before.get(key) != now.get(key))
    return [_change(name, before.get(name), now.get(name)) for name in names]


def _change(name: str, before: Any, now: Any) -> str:
    if name in ("data", "study.start") or name.startswith("the run"):
        return f"{name} has changed"
    return f"{name} was {before!r:.60}, now {now!r:.60}"


def check_unchanged(plan: Plan, training: Training) -> None:
    """Raises UserError if the folder of a run holds a run with other settings."""
    if found := changes(plan, training):
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"{training.folder} was trained with other settings ({'; '.join(found[:3])}{more}):"
            " change them back, choose another --out, or give --redo to delete it and train again"
        )


class _Cost(Hook):
    """Adds up the CPU time of all attempts of a run, up to their last checkpoints."""

    every = 0

    def __init__(self, folder: pathlib.Path):
        self._path = folder / COST
        self._before: dict[str, float] = read_record(self._path) or {}
        self._start = (0.0, 0.0)

    def at_start(self, run: Run) -> None:
        self._start = (time.process_time(), time.monotonic())

    def at_save(self, run: Run, step: int) -> None:
        self._write()

    def at_end(self, run: Run) -> None:
        self._write()

    def _write(self) -> None:
        now = {
            "cpu_seconds": time.process_time() - self._start[0],
            "seconds": time.monotonic() - self._start[1],
        }
        total = {name: self._before.get(name, 0.0) + value for name, value in now.items()}
        write_atomically(self._path, json.dumps(total))


def train_run(plan: Plan, training: Training) -> None:
    """Trains a run up to its last step, unless that is done."""
    if trained(plan, training) is not None:
        return
    config = plan.resolved(training)
    folder = training.folder
    folder.mkdir(parents=True, exist_ok=True)
    if training.before is not None:
        source = training.before.folder
        if training.uses_start:
            source = _changed_start(plan, training, config)
        config = dataclasses.replace(config, init_from=str(source))
    identity = plan.identity(training)
    write_atomically(folder / STARTED, json.dumps({"identity": identity}))
    state = train(config, folder, [_Cost(folder)])
    if int(state.step) < config.steps:
        raise Stopped(f"stopped at step {int(state.step)} of {config.steps} of {folder}")
    record = {"identity": digest(identity), "steps": config.steps}
    write_atomically(folder / TRAINED, json.dumps(record))


def _changed_start(plan: Plan, training: Training, config: Config) -> pathlib.Path:
    """Writes the model that `Study.start` makes for a run. Returns its folder."""
    assert training.before is not None and plan.study.start is not None
    target = training.folder / "start"
    if (target / "config.json").exists():  # written last
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    model = load(training.before.folder, allow_code=True)
    new = plan.study.start(model, plan.point(training.arm, training.seed))
    if not isinstance(new, LoadedModel):
        raise UserError(f"study.start returned {new!r:.40}: must return a LoadedModel")
    assert model.run_config is not None
    streams = model.run_config.streams
    if new.streams.names != model.streams.names:
        streams = StreamsConfig(names=new.streams.names, kinds=new.streams.kinds)
        if new.streams.groups:  # from other numbers of threads
            assert new.streams.settings is not None
            streams = new.streams.settings
    write_model(
        target,
        dataclasses.replace(model.run_config, model=new.config, streams=streams),
        new.parameters,
        new.tokenizer,
    )
    return target


# Measuring.


def measured(plan: Plan, arm: str, seed: int) -> dict[str, Any] | None:
    """Returns the record of the measurement of a point; None if it is not done.

    Raises UserError if its training or its options have changed.
    """
    folder, training = plan.point_folder(arm, seed), plan.training(arm, seed)
    check_unchanged(plan, training)
    record = read_record(folder / MEASURED)
    if record is None:
        return None
    if record["identity"] != digest(plan.identity(training)):
        raise UserError(
            f"{folder} measured a model that has changed since: give --remeasure to measure again"
        )
    if record["options"] != _options(plan.point(arm, seed)):
        raise UserError(
            f"{folder} was measured with options {record['options']}, now"
            f" {_options(plan.point(arm, seed))}: change them back, or give --remeasure to measure"
            " again"
        )
    return record


def measure(plan: Plan, arm: str, seed: int) -> None:
    """Measures a point, unless that is done, and writes its records."""
    if measured(plan, arm, seed) is not None:
        return
    training, folder = plan.training(arm, seed), plan.point_folder(arm, seed)
    if trained(plan, training) is None:
        raise UserError(f"{training.folder} is not trained: train arm {training.arm!r} first")
    folder.mkdir(parents=True, exist_ok=True)
    start, records = time.process_time(), []
    for step in _steps_to_measure(plan, training):
        model = load(training.folder / DIRECTORY / str(step), allow_code=True)
        point = plan.point(arm, seed, step)
        found = plan.study.measure(model, point)
        if not isinstance(found, Iterable):
            raise UserError(f"study.measure returned {found!r:.40}: must return records")
        records += [_record(fields, step, plan.study.unit) for fields in found]
        log.info("measured %s at step %d: %d records so far", folder, step, len(records))
    if not records:
        raise UserError(f"study.measure returned no record for {folder}: must return at least one")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(folder / RECORDS, lines)
    done = {
        "identity": digest(plan.identity(training)),
        "options": _options(plan.point(arm, seed)),
        "code": code_hash(plan.study.measure),
        "records": len(records),
        "step": training_steps(plan, training),
        "facts": plan.facts(arm, seed),
        "measure_cpu_seconds": time.process_time() - start,
    }
    write_atomically(folder / MEASURED, json.dumps(done))


def training_steps(plan: Plan, training: Training) -> int:
    """The last step of a run."""
    return plan.resolved(training).steps


def _steps_to_measure(plan: Plan, training: Training) -> list[int]:
    last, every = training_steps(plan, training), plan.study.measure_every
    return sorted({*(range(every, last, every) if every else ()), last})


def _options(point: Point) -> Any:
    return json.loads(json.dumps(dict(point.options), default=str))


def _record(fields: Any, step: int, unit: str) -> dict[str, Any]:
    """A record as JSON values. Raises UserError if it is not flat or has no unit."""
    if not isinstance(fields, Mapping):
        raise UserError(f"study.measure returned the record {fields!r:.60}: must be a dict")
    if unit not in fields:
        raise UserError(
            f"study.measure returned a record without {unit!r} (it has {', '.join(fields)}): it"
            " must say what is compared between arms, or set study.unit to another field"
        )
    for name in ("arm", "seed", "step"):
        if name in fields:
            raise UserError(f"study.measure returned a field {name!r}: the study sets it itself")
    return {"step": step} | {str(name): _scalar(name, value) for name, value in fields.items()}


def _scalar(name: str, value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, numbers.Real):
        return finite(float(value))
    raise UserError(
        f"study.measure returned {name}={value!r:.40}: must be a number, a text, true, false or"
        " None"
    )


def cost(folder: pathlib.Path) -> dict[str, float]:
    """The CPU-seconds and seconds that the steps of a run took."""
    return read_record(folder / COST) or {"cpu_seconds": 0.0, "seconds": 0.0}


def watch_parent() -> None:
    """Sends this process SIGTERM when its parent has died, from a thread."""
    import signal
    import threading

    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
