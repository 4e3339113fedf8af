"""What a study is: the dataclasses that its config file fills in, and their rules.

A config file defines `get_study()`, which returns a `Study`. docs/studies.md explains the fields
with examples.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from msllm.config import Config, default_config, setting_type
from msllm.errors import UserError

if TYPE_CHECKING:
    import ml_collections

    from msllm.weights.load import LoadedModel

# What is counted of every point. All but the last two can be made equal by `Study.equal`.
FACTS = ("steps", "rows", "cells", "flops", "targets", "parameters")
BUDGETS = ("steps", "rows", "cells", "flops")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the models that a study compares.

    Attributes:
      settings: what differs from the base config, as {dotted key: value}, such as
        {"streams.visibility": "same_row"}.
      after: the arm from whose trained parameters this one starts, with the same seed. Empty: the
        shared run, or random parameters if the study has none.
      train: whether the arm is trained. If not, it measures the model it would have started from.
      options: changes to `Study.options` for the measurement of this arm.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    after: str = ""
    train: bool = True
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure computed from the records of a point: a mean, a ratio, or any statistic.

    Attributes:
      name: its name in tables.
      field: the numeric or boolean field of the records to average. Empty: the metric's name.
      where: only records with these values count, as {field: value, or tuple of values}.
      by: fields; each combination of their values gives a row of the table.
      weight: a field of weights: the figure is the sum of `field` over the sum of `weight`, such as
        nats per token.
      statistic: in place of `field`, a function of (columns, weights) that returns a number.
        `columns` has an array of n values for each field of the records, and `weights` [n] says how
        often each record counts.
    """

    name: str
    field: str = ""
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    by: tuple[str, ...] = ()
    weight: str = ""
    statistic: Callable[[Mapping[str, np.ndarray], np.ndarray], float] | None = None


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture of a metric against something else.

    Attributes:
      x: a fact of a point (steps, rows, cells, flops, targets, parameters, cpu_seconds), a setting
        that arms change, a field in `by` of the metric, or "step" with `Study.measure_every`.
      y: the name of a metric.
      by: a setting that arms change; each of its values is a line. Empty: one line, or a line per
        arm if x is a field of the records.
      log: the axes with a logarithmic scale: "", "x", "y" or "xy".
    """

    x: str
    y: str
    by: str = ""
    log: str = ""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A power law y = offset + factor * x ** exponent through the arms.

    Attributes:
      x: a fact of a point, or a setting that arms change.
      y: the name of a metric.
      arms: the arms to use; empty: all.
      offset: whether to fit an offset; otherwise it is 0.
    """

    x: str
    y: str
    arms: tuple[str, ...] = ()
    offset: bool = False


@dataclasses.dataclass(frozen=True)
class Small:
    """The small form of a study, which `--small` runs in a test.

    Attributes:
      settings: applied after all other settings, to every run.
      seeds: the seeds; empty: the first of the study.
      arms: the arms; empty: all.
      options: changes to `Study.options` and those of all arms.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"steps": 3})
    seeds: tuple[int, ...] = ()
    arms: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Point:
    """One arm with one seed, as the functions of a study see it.

    Attributes:
      arm: the name of the arm.
      seed: the seed.
      settings: what the arm changes, {dotted key: value}.
      options: the options of the measurement.
      config: all settings of the (last) run of the point.
      workdir: the folder of the model.
      step: the step of the checkpoint that is measured.
      small: whether this is the small form of the study.
    """

    arm: str
    seed: int
    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    config: Config
    workdir: pathlib.Path
    step: int = 0
    small: bool = False

    @functools.cached_property
    def rng(self) -> np.random.Generator:
        """A random generator that is the same in all arms of a seed."""
        return np.random.default_rng(self.seed)


@dataclasses.dataclass(frozen=True)
class Study:
    """An experiment: arms and seeds, what to measure, and what to report.

    Settings are applied in this order: `base`, the stage (of `shared` or `stages`), the arm, the
    seed, and the settings of `small`.

    Attributes:
      base: the config that all arms share, from `msllm.config.default_config`. If `data.dir` and
        `data.mixture.dirs` are empty, the study prepares the data.
      arms: {name: settings, or an `Arm`}. `grid` makes the arms of a product.
      measure: a function of (model, point) that returns records: flat dicts of JSON values. The
        value of `item` (or of the field `unit`) identifies what is compared between arms.
      seeds: a point is trained for each arm and seed.
      seeded: the settings that get the seed.
      shared: settings of a base run, one per seed, from whose parameters all arms start; or several
        such mappings, each for a stage that starts from the stage before. None: arms start from
        random parameters.
      stages: stages in which every arm is trained, each with these settings.
      tokenizer: settings whose data trains the only tokenizer of the study. None: those of the
        first stage of `shared` with the first seed; without `shared`, every data has its own.
      start: a function of (model, point) that changes the model from which a trained arm starts; it
        gets the model of the shared run, or of another arm, and returns a model.
      options: anything that `measure` wants to know.
      measure_every: also measure the checkpoints at the multiples of this step; 0: only the last.
      metrics: the figures in the table.
      baseline: the arm that the others are compared with; empty: the first.
      unit: the field of the records that the bootstrap resamples.
      same: facts that must not differ between arms (`FACTS`).
      equal: what the points get the same amount of: steps (as the settings say), or rows, cells or
        flops. The steps of a point then follow from its data and model.
      budget: that amount; None: as much as the first arm uses.
      plots: pictures.
      fits: power laws.
      report: a function of the `Results` that returns Markdown to append to the table.
      small: the small form, for tests.
    """

    base: ml_collections.ConfigDict
    arms: Mapping[str, Mapping[str, Any] | Arm]
    measure: Callable[[LoadedModel, Point], Iterable[Mapping[str, Any]]]
    seeds: Sequence[int] = (0,)
    seeded: tuple[str, ...] = ("seed", "data.seed")
    shared: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    stages: Sequence[Mapping[str, Any]] = ({},)
    tokenizer: Mapping[str, Any] | None = None
    start: Callable[[LoadedModel, Point], LoadedModel] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measure_every: int = 0
    metrics: Sequence[Metric] = ()
    baseline: str = ""
    unit: str = "item"
    same: tuple[str, ...] = ()
    equal: str = "steps"
    budget: float | None = None
    plots: Sequence[Plot] = ()
    fits: Sequence[Fit] = ()
    report: Callable[[Any], str] | None = None  # of msllm.study.Results
    small: Small = dataclasses.field(default_factory=Small)

    def __post_init__(self) -> None:
        _check(self)

    def arm(self, name: str) -> Arm:
        """Returns an arm by its name."""
        arm = self.arms[name]
        return arm if isinstance(arm, Arm) else Arm(arm)

    @property
    def shared_stages(self) -> tuple[Mapping[str, Any], ...]:
        """The settings of the stages of the shared run; () if there is none."""
        if self.shared is None:
            return ()
        return (self.shared,) if isinstance(self.shared, Mapping) else tuple(self.shared)

    @property
    def baseline_arm(self) -> str:
        """The name of the arm that the others are compared with."""
        return self.baseline or next(iter(self.arms))

    def in_small(self) -> Study:
        """Returns the small form of the study.

        The settings of `small` are left to `msllm.study.plan`, which applies them last.
        """
        small = self.small
        arms = {
            name: dataclasses.replace(
                self.arm(name), options={**self.arm(name).options, **small.options}
            )
            for name in (small.arms or self.arms)
        }
        return dataclasses.replace(
            self,
            arms=arms,
            seeds=tuple(small.seeds or self.seeds[:1]),
            options={**self.options, **small.options},
            baseline=self.baseline if self.baseline in arms else "",
            fits=tuple(
                dataclasses.replace(fit, arms=tuple(name for name in fit.arms if name in arms))
                for fit in self.fits
            ),
        )


def grid(axes: Mapping[str, Iterable[Any] | Mapping[str, Mapping[str, Any]]]) -> dict[str, Arm]:
    """Returns the arms of a product of settings.

    Args:
      axes: {dotted key: values of the setting}, or {any name: {label: settings}} where a value of
        the axis changes several settings.

    Returns:
      {"KEY=VALUE KEY=VALUE": Arm}, in the order of the product. KEY is the last part of a dotted
      key.
    """
    parts: list[list[tuple[str, Mapping[str, Any]]]] = []
    for axis, values in axes.items():
        if isinstance(values, Mapping):
            parts.append([(f"{axis}={label}", changes) for label, changes in values.items()])
        else:
            short = axis.rpartition(".")[2]
            values = list(values)
            if not all(isinstance(value, str | int | float) for value in values):
                raise UserError(
                    f"axis {axis!r} of the grid has the values {values!r:.60}: give them labels, as"
                    f" {{'label': {{{axis!r}: value}}}}"
                )
            parts.append([(f"{short}={value}", {axis: value}) for value in values])
    arms: dict[str, Arm] = {}
    for combination in itertools.product(*parts):
        name = " ".join(label for label, _ in combination)
        if name in arms:
            raise UserError(f"two points of the grid are named {name!r}: give an axis labels")
        settings: dict[str, Any] = {}
        for _, changes in combination:
            if clash := settings.keys() & changes.keys():
                raise UserError(f"two axes of the grid set {sorted(clash)[0]}: let one do it")
            settings |= changes
        arms[name] = Arm(settings)
    return arms


def folder_name(name: str) -> str:
    """The name of an arm as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9_.=+-]+", "_", name).strip(".") or "_"


def load_study(file: str | os.PathLike) -> Study:
    """Returns the study of a config file.

    The folder of the file is put on `sys.path`, so that the file can import modules beside it and
    its config can name functions in them.

    Raises UserError if the file cannot be imported, or if `get_study` does not return a `Study`.
    """
    path = pathlib.Path(file).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"CONFIG is {str(file)!r}: there is no such file")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = f"msllm_study_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is no Python file: a study is a file such as study.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of the file look their module up
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_study", None)):
            raise UserError(f"{file} defines no get_study(): it must return a msllm.study.Study")
        study = module.get_study()
    except UserError as error:
        raise UserError(str(error) if str(file) in str(error) else f"{file}: {error}") from error
    except Exception as error:  # the file may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        where = f"{file}: " + (f"line {lines[-1]}: " if lines else "")
        text = " ".join(str(error).split())
        raise UserError(f"{where}{type(error).__name__}: {text}") from error
    if not isinstance(study, Study):
        raise UserError(f"{file}: get_study() returned {study!r:.40}, not a msllm.study.Study")
    return study


def _check(study: Study) -> None:
    """Raises UserError for the first field that breaks a rule."""
    if not study.arms:
        raise UserError("study.arms is empty: name at least one arm")
    if not callable(study.measure):
        raise UserError(
            f"study.measure is {study.measure!r}: must be a function of (model, point) that returns"
            " records"
        )
    _check_arms(study)
    _check_numbers(study)
    every = [
        *study.shared_stages,
        *study.stages,
        study.tokenizer or {},
        study.small.settings,
        dict.fromkeys(study.seeded),
        *(study.arm(name).settings for name in study.arms),
    ]
    known = default_config().to_dict().keys()
    for settings in every:
        for key in settings:
            if key not in known:  # a section or a setting at the top
                setting_type(key)
    names = [metric.name for metric in study.metrics]
    if len(set(names)) < len(names):
        raise UserError(f"study.metrics are named {names}: names must differ")
    shown: list[Plot | Fit] = [*study.plots, *study.fits]
    for what in shown:
        if what.y not in names:
            raise UserError(f"{what} names metric {what.y!r}: must be one of {', '.join(names)}")


def _check_arms(study: Study) -> None:
    folders: dict[str, str] = {}
    for name in study.arms:
        other = folders.setdefault(folder_name(name), name)
        if other != name:
            raise UserError(f"arms {other!r} and {name!r} would share a folder: rename one")
        before, seen = name, {name}
        while before := study.arm(before).after:
            if before not in study.arms:
                raise UserError(
                    f"arm {name!r} comes after {before!r}: must be one of"
                    f" {', '.join(map(repr, study.arms))}"
                )
            if before in seen:
                raise UserError(f"arm {name!r} comes after itself: arms may not form a cycle")
            seen.add(before)
        if not study.arm(name).train and not (study.arm(name).after or study.shared_stages):
            raise UserError(
                f"arm {name!r} is not trained: name the arm whose model it measures (after=...)"
            )
    for field, names in (
        ("baseline", [study.baseline] if study.baseline else []),
        ("small.arms", study.small.arms),
        *(("fits", fit.arms) for fit in study.fits),
    ):
        for name in names:
            if name not in study.arms:
                raise UserError(
                    f"study.{field} names arm {name!r}: must be one of"
                    f" {', '.join(map(repr, study.arms))}"
                )


def _check_numbers(study: Study) -> None:
    seeds = list(study.seeds)
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(s) is int for s in seeds):
        raise UserError(f"study.seeds is {study.seeds!r}: must be different whole numbers")
    if not study.stages:
        raise UserError("study.stages is empty: must have at least one stage, such as {}")
    if study.equal not in BUDGETS:
        raise UserError(f"study.equal is {study.equal!r}: must be one of {', '.join(BUDGETS)}")
    if study.budget is not None and (study.equal == "steps" or not study.budget > 0):
        raise UserError(
            f"study.budget is {study.budget!r}: must be a positive amount of rows, cells or flops,"
            " which study.equal names"
        )
    if study.measure_every < 0:
        raise UserError(f"study.measure_every is {study.measure_every}: must be at least 0")
    for fact in study.same:
        if fact not in FACTS:
            raise UserError(f"study.same names {fact!r}: must be one of {', '.join(FACTS)}")
