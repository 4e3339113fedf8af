"""The runs of a study: their settings, data and folders, and what identifies them.

A `Plan` is a function of the study and the folder that it is run in. Every process of a study makes
its own, so nothing but files is shared between processes and machines.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import pathlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from msllm.config import Config, from_config_dict, setting_type, to_json
from msllm.data import identity, records
from msllm.data.loader import Loader, spread
from msllm.data.mixture import by_source
from msllm.errors import UserError
from msllm.loss import targets_and_weights
from msllm.model.model import abstract_model
from msllm.runtime.files import read_object
from msllm.runtime.flops import batch_pairs, combine_flops, step_flops
from msllm.streams import StreamSpec, resolve_visibility
from msllm.study.definition import FACTS, Point, Study, folder_name
from msllm.training import with_vocabulary

COUNTED_BATCHES = 64  # batches from which the cells of a run are estimated, if it has more
# Settings that do not change what is learned.
_IRRELEVANT = ("data.dir", "data.prefetch", "compilation_cache", "log_every", "monitor.")
# Settings that were added later, with their defaults: runs from before them are the same runs.
_ADDED = {"config.streams.identities": 0}


@dataclasses.dataclass(frozen=True)
class Data:
    """Prepared data of a study.

    Attributes:
      id: the hash of everything that its bytes depend on; "" for a directory that the config names.
      folder: the directory.
      config: the config to prepare it with. Its tokenizer is trained, or at a path.
      tokenizer: the data whose tokenizer it uses; None: its own.
    """

    id: str
    folder: pathlib.Path
    config: Config
    tokenizer: Data | None = None

    @property
    def is_ready(self) -> bool:
        """Whether nothing must be prepared."""
        return not self.id or (self.folder / records.MANIFEST).is_file()

    def to_prepare(self) -> Config:
        """The config for `msllm.prepare`, once the tokenizer exists."""
        if self.tokenizer is None:
            return self.config
        stored = records.read_manifest(self.tokenizer.folder)["tokenizer"]
        path = str(self.tokenizer.folder / stored["file"])
        # The pieces that a trained tokenizer reserves are in its file.
        tokenizer = dataclasses.replace(self.config.data.tokenizer, path=path, reserved=())
        return _replace(
            self.config, data=dataclasses.replace(self.config.data, tokenizer=tokenizer)
        )


@dataclasses.dataclass(frozen=True)
class Training:
    """One run of a study: a stage of a shared run or of a point.

    Attributes:
      folder: the workdir.
      config: its settings, with the data and without `init_from`, which the study sets.
      data: the data.
      before: the run from whose parameters it starts; None: random ones, or `config.init_from`.
      arm, seed: the point it belongs to; arm is "" for a shared run.
      uses_start: whether `Study.start` changes the parameters.
    """

    folder: pathlib.Path
    config: Config
    data: Data
    before: Training | None
    arm: str
    seed: int
    uses_start: bool = False


class Plan:
    """All runs and points of a study in a folder.

    Attributes:
      study: the study, in its small form if asked for.
      out: the folder.
      small: whether it is the small form.
    """

    def __init__(self, study: Study, out: pathlib.Path, small: bool = False):
        """Makes the plan. Nothing is read or written before it is needed."""
        self.study = study.in_small() if small else study
        self.out, self.small = out, small
        self._last = dict(study.small.settings) if small else {}
        self._base = study.base.to_dict()
        self._data: dict[str, Data] = {}
        self._trainings: dict[tuple[str, int, int], Training] = {}
        self._counts: dict[str, dict[str, float]] = {}
        self._identities: dict[str, dict[str, Any]] = {}

    # Names.

    def points(self) -> list[tuple[str, int]]:
        """(arm, seed) of every point, all arms of a seed together."""
        return [(arm, seed) for seed in self.study.seeds for arm in self.study.arms]

    def point_folder(self, arm: str, seed: int) -> pathlib.Path:
        """The folder of a point, which is the workdir of its last run."""
        return self.out / "points" / f"{folder_name(arm)}-{seed}"

    # Runs.

    def shared(self, seed: int, stage: int | None = None) -> Training | None:
        """The last (or one) stage of the shared run of a seed; None if there is none."""
        stages = self.study.shared_stages
        if not stages:
            return None
        stage = len(stages) - 1 if stage is None else stage
        if (found := self._trainings.get(("", seed, stage))) is None:
            before = self.shared(seed, stage - 1) if stage else None
            name = f"{seed}-{stage}" if stage < len(stages) - 1 else str(seed)
            folder = self.out / "shared" / name
            found = self._training(folder, [stages[stage]], before, "", seed)
            self._trainings["", seed, stage] = found
        return found

    def training(self, arm: str, seed: int, stage: int | None = None) -> Training:
        """The last (or one) stage of a point. For an arm that is not trained, of another point."""
        given, stages = self.study.arm(arm), self.study.stages
        parent = self.training(given.after, seed) if given.after else self.shared(seed)
        if not given.train:
            assert parent is not None  # checked by the study
            return parent
        stage = len(stages) - 1 if stage is None else stage
        if (found := self._trainings.get((arm, seed, stage))) is None:
            before = self.training(arm, seed, stage - 1) if stage else parent
            folder = self.point_folder(arm, seed)
            if stage < len(stages) - 1:
                folder = self.out / "stages" / f"{folder.name}-{stage}"
            uses_start = not stage and parent is not None and self.study.start is not None
            settings = [stages[stage], given.settings]
            found = self._training(folder, settings, before, arm, seed, uses_start)
            self._trainings[arm, seed, stage] = found
        return found

    def chain(self, training: Training) -> list[Training]:
        """The stages of the same shared run or point up to `training`, first to last."""
        chain = [training]
        while (before := chain[0].before) is not None and before.arm == training.arm:
            chain.insert(0, before)
        return chain

    def settings(self, *changes: Mapping[str, Any], seed: int) -> Config:
        """The config of `base` with changes, the seed and the settings of the small form."""
        values = json_copy(self._base)
        seeded = dict.fromkeys(self.study.seeded, seed)
        for settings in (*changes, seeded, self._last):
            for key, value in settings.items():
                set_key(values, key, value)
        every = self.study.measure_every
        if every:
            values["checkpoint"] |= {"every": every, "keep_every": every}
        if values["compilation_cache"] == "auto":
            values["compilation_cache"] = str(self.out / f"compiled-{_machine()}")
        return from_config_dict(values)

    def _training(
        self,
        folder: pathlib.Path,
        changes: list[Mapping[str, Any]],
        before: Training | None,
        arm: str,
        seed: int,
        uses_start: bool = False,
    ) -> Training:
        config = self.settings(*changes, seed=seed)
        data = self._data_of(config)
        if data.id:
            config = _replace(config, data=dataclasses.replace(config.data, dir=str(data.folder)))
        return Training(folder, config, data, before, arm, seed, uses_start)

    # Data.

    @functools.cached_property
    def _tokenizer(self) -> Data | None:
        """The data whose tokenizer all runs use; None: every data has its own."""
        changes = self.study.tokenizer
        if changes is None:
            changes = next(iter(self.study.shared_stages), None)
        if changes is None:
            return None
        config = self.settings(changes, seed=self.study.seeds[0])
        if config.data.dir or config.data.mixture.dirs or config.data.tokenizer.path:
            return None
        return self._prepared(config, None)

    def _data_of(self, config: Config) -> Data:
        if config.data.dir or config.data.mixture.dirs:
            return Data("", pathlib.Path(config.data.dir), config)
        if not config.data.converter:
            raise UserError(
                "study.base.data names no data: set data.converter (the study prepares the data),"
                " data.dir or data.mixture.dirs"
            )
        return self._prepared(config, None if config.data.tokenizer.path else self._tokenizer)

    def _prepared(self, config: Config, tokenizer: Data | None) -> Data:
        config = resolve_visibility(config)
        spec = StreamSpec.from_config(config.streams)
        key = json.dumps(
            [dataclasses.asdict(config.data), spec.names, spec.kinds, spec.delays, spec.mail],
            default=str,
        )
        if (found := self._data.get(key)) is None:
            settings = identity.get_settings(config, spec)
            name = digest(settings)[:16]
            if tokenizer is not None and tokenizer.id == name:  # it is this data
                tokenizer = None
            if tokenizer is not None:
                name = digest(settings | {"tokenizer": tokenizer.id})[:16]
            found = Data(name, self.out / "data" / name, config, tokenizer)
            self._data[key] = found
        return found

    # What depends on prepared data.

    def resolved(self, training: Training) -> Config:
        """All settings of a run, with its vocabulary, and with its steps if they are derived."""
        config = resolve_visibility(training.config)
        config = with_vocabulary(config, self._vocabulary(training))
        if training.arm and training.folder == self.point_folder(training.arm, training.seed):
            config = _replace(config, steps=self._steps(training, config))
        return config

    def _vocabulary(self, training: Training) -> int:
        directory = next(iter(by_source(training.config.data).values())).dir
        return records.read_manifest(directory)["tokenizer"]["vocab_size"]

    def _steps(self, training: Training, config: Config) -> int:
        """The steps of the last stage of a point, so that it gets its budget."""
        study = self.study
        if study.equal == "steps":
            return config.steps
        budget = study.budget
        if budget is None:
            first = self.training(next(iter(study.arms)), training.seed)
            if first is training:
                return config.steps
            reference = with_vocabulary(resolve_visibility(first.config), self._vocabulary(first))
            budget = self.counts(reference)[study.equal]
        sample = self.counts(_replace(config, steps=COUNTED_BATCHES))
        return max(1, round(budget / sample[study.equal] * COUNTED_BATCHES))

    def counts(self, config: Config) -> dict[str, float]:
        """What a run computes: steps, rows, cells, targets and floating-point operations.

        Rows are those of the packed tables that hold an example; targets are the cells with a loss.
        Runs of more than COUNTED_BATCHES steps are estimated from that many batches.
        """
        key = to_json(config)
        if key not in self._counts:
            self._counts[key] = self._count(config)
        return self._counts[key]

    def _count(self, config: Config) -> dict[str, float]:
        spec = StreamSpec.from_config(config.streams)
        loader = Loader(config.data, "train", spec)
        silence = loader.tokenizer.silence_id
        steps = spread(config.steps, COUNTED_BATCHES)
        rows = cells = pairs = 0
        targets = np.zeros(spec.size)
        for step in steps:
            batch = loader.batch(step)
            inside = batch["segment"] > 0
            present = batch["present"] & inside[:, :, None]
            seen = present & (batch["tokens"] != silence) if spec.skip_silence else present
            weights = targets_and_weights(batch, spec.loss_weights)[2]
            rows += int(inside.sum())
            cells += int(present.sum())
            targets += (np.asarray(weights) > 0).sum((0, 1))
            pairs += batch_pairs(spec.nearest_lag_array, present, seen, batch["segment"])
        scale = config.steps / len(steps)
        flops = step_flops(config.model, cells, targets.sum(), pairs)
        flops += combine_flops(config.model, spec, targets.tolist())
        counted = {"rows": rows, "cells": cells, "targets": int(targets.sum()), "flops": flops}
        return {"steps": config.steps, **{name: x * scale for name, x in counted.items()}}

    def parameters(self, config: Config) -> int:
        """The number of parameters of a model."""
        shapes = abstract_model(config.model, StreamSpec.from_config(config.streams))[1]
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    def facts(self, arm: str, seed: int, names: Sequence[str] = FACTS) -> dict[str, float]:
        """What is counted of a point (`definition.FACTS`), summed over its stages."""
        training = self.training(arm, seed)
        chain = self.chain(training) if self.study.arm(arm).train else []
        configs = [self.resolved(run) for run in chain]
        total: dict[str, float] = {}
        for name in names:
            if name == "parameters":
                total[name] = self.parameters(self.resolved(training))
            elif name == "steps":  # no need to read data
                total[name] = sum(config.steps for config in configs)
            else:
                total[name] = sum(self.counts(config)[name] for config in configs)
        return total

    def check_same(self) -> None:
        """Raises UserError if arms differ in a fact that the study wants to be equal."""
        for fact in self.study.same:
            values = {
                arm: self.facts(arm, self.study.seeds[0], [fact])[fact]
                for arm in self.study.arms
                if self.study.arm(arm).train
            }
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{arm}: {value:,.0f}" for arm, value in values.items())
                raise UserError(
                    f"study.same names {fact}, in which arms differ ({listed}): change their"
                    " settings, set study.equal, or take it out of study.same"
                )

    # Identity.

    def identity(self, training: Training) -> dict[str, Any]:
        """What the parameters of a run depend on: {setting: JSON value}."""
        key = str(training.folder)
        if key not in self._identities:
            self._identities[key] = self._identity(training)
        return self._identities[key]

    def _identity(self, training: Training) -> dict[str, Any]:
        config = self.resolved(training)
        found = {f"config.{key}": value for key, value in flatten(config_values(config)).items()}
        found = {
            key: value
            for key, value in found.items()
            if not key.removeprefix("config.").startswith(_IRRELEVANT)
            and not (key in _ADDED and value == _ADDED[key])
        }
        found["data"] = training.data.id or self._manifest_ids(config)
        if training.before is not None:
            found["the run it starts from"] = digest(self.identity(training.before))
        if training.uses_start:
            found["study.start"] = code_hash(self.study.start)
        return json.loads(json.dumps(found))

    def _manifest_ids(self, config: Config) -> list[str]:
        parts = by_source(config.data).values()
        return [digest(records.read_manifest(part.dir)) for part in parts]

    def point(self, arm: str, seed: int, step: int = 0) -> Point:
        """A point as the functions of the study see it."""
        given, training = self.study.arm(arm), self.training(arm, seed)
        return Point(
            arm,
            seed,
            given.settings,
            {**self.study.options, **given.options},
            self.resolved(training),
            training.folder,
            step,
            self.small,
        )

    def needed_data(self, arm: str, seed: int) -> Iterator[Data]:
        """The data that a point and the runs before it need, tokenizers first."""
        training: Training | None = self.training(arm, seed)
        needed = []
        while training is not None:
            needed += [training.data, *([t] if (t := training.data.tokenizer) else [])]
            training = training.before
        yield from reversed(needed)


def differing_settings(plan: Plan) -> dict[str, list[Any]]:
    """The settings in which the last runs of the arms differ: {key: value per arm}."""
    study = plan.study
    flat = []
    for arm in study.arms:
        training = plan.training(arm, study.seeds[0])
        config = plan.resolved(training)
        flat.append(flatten(config_values(config)) | {"data.dir": ""})
    keys = sorted({key for values in flat for key in values})
    table = {key: [values.get(key) for values in flat] for key in keys}
    return {key: row for key, row in table.items() if any(value != row[0] for value in row)}


@functools.cache
def _machine() -> str:
    """Identifies the kind of machine: programs compiled for one kind do not run on another."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return digest([platform.machine(), platform.system(), flags])[:8]


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested dicts. A mapping changes the keys of a section one by one."""
    hint = setting_type(key)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        for name, inner in value.items():
            set_key(values, f"{key}.{name}", inner)
        return
    *sections, last = key.split(".")
    for i, section in enumerate(sections):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            name = ".".join(sections[: i + 1])
            raise UserError(f"{key} cannot be set: {name} is {values!r}, not a section")
    values[last] = json_copy(value) if isinstance(value, Mapping) else value


def json_copy(value: Any) -> Any:
    """A copy of nested mappings as dicts."""
    if isinstance(value, Mapping):
        return {key: json_copy(inner) for key, inner in value.items()}
    return value


def config_values(config: Config) -> dict[str, Any]:
    """A config as nested dicts."""
    return dataclasses.asdict(config)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def digest(value: Any) -> str:
    """The sha256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def code_hash(function: Any) -> str:
    """The sha256 (hex) of the file that defines a function; "" if there is none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        file = inspect.getsourcefile(type(function))
    if file is None or not pathlib.Path(file).is_file():
        return ""
    return records.file_hash(file)


def read_record(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns a JSON object that a study wrote; None if it does not exist."""
    try:
        return read_object(path, "remove it and run the study again")
    except FileNotFoundError:
        return None


def _replace(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, **changes)


def finite(value: float) -> float | None:
    """A number for JSON: None if it is not finite."""
    return value if math.isfinite(value) else None
