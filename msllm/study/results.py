"""The results of a study: records and points, and estimates with intervals."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from msllm.errors import UserError
from msllm.study.definition import Metric

RESULTS, POINTS = "results.jsonl", "points.jsonl"  # in the folder of a study
RESAMPLES = 1000
SEED = 0  # of the resampling
_CHUNK = 50  # resamples computed at a time


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with the interval that holds the middle 95 % of its resampled values.

    Attributes:
      value: the figure; nan if there is no record.
      low, high: the interval.
      records, units, seeds: how many of them it is computed from.
      resampled: [R] the resampled values.
    """

    value: float
    low: float
    high: float
    records: int
    units: int
    seeds: int
    resampled: np.ndarray = dataclasses.field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclasses.dataclass(frozen=True)
class Results:
    """All records and points of a study.

    Attributes:
      records: dicts with arm, seed, step and the fields of the measurement.
      points: dicts with arm, seed, settings and what was counted.
      unit: the field of the records that the bootstrap resamples.
    """

    records: Sequence[Mapping[str, Any]]
    points: Sequence[Mapping[str, Any]]
    unit: str = "item"

    @functools.cached_property
    def arms(self) -> tuple[str, ...]:
        """The names of the arms, in the order of the study."""
        return tuple(dict.fromkeys(point["arm"] for point in self.points))

    @functools.cached_property
    def seeds(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(dict.fromkeys(point["seed"] for point in self.points))

    @functools.cached_property
    def last_step(self) -> dict[tuple[str, int], int]:
        """{(arm, seed): the last step that was measured}."""
        return {(point["arm"], point["seed"]): point["step"] for point in self.points}

    def select(self, where: Mapping[str, Any], all_steps: bool = False) -> list[Mapping[str, Any]]:
        """Returns the records with given values, {field: value, or tuple of values}.

        Unless `where` names "step" or `all_steps` is set, only those of the last step.
        """
        wanted = {
            name: tuple(value) if isinstance(value, tuple | list | set) else (value,)
            for name, value in where.items()
        }
        return [
            record
            for record in self.records
            if (
                all_steps
                or "step" in wanted
                or record["step"] == self.last_step[record["arm"], record["seed"]]
            )
            and all(record.get(name) in values for name, values in wanted.items())
        ]

    def groups(self, metric: Metric) -> list[dict[str, Any]]:
        """The combinations of values of `metric.by`, in the order of the records."""
        found = {
            tuple(record.get(name) for name in metric.by)
            for record in self.select(metric.where, "step" in metric.by)
        }
        ordered = sorted(found, key=lambda values: [(str(type(x)), x) for x in values])
        return [dict(zip(metric.by, values)) for values in ordered]

    def estimates(
        self,
        metric: Metric,
        group: Mapping[str, Any] | None = None,
        baseline: str = "",
        resamples: int = RESAMPLES,
    ) -> dict[str, tuple[Estimate, Estimate | None]]:
        """Estimates a metric for every arm.

        The bootstrap draws seeds with replacement and, independently, units with replacement. All
        arms use the same draws, so differences are paired.

        Args:
          metric: the metric.
          group: values of `metric.by`; None: all records of `metric.where`.
          baseline: the arm to subtract; empty: no differences.
          resamples: the number of draws.

        Returns:
          {arm: (estimate, estimate of the difference to the baseline, or None)}.
        """
        group = dict(group or {})
        chosen = self.select({**metric.where, **group}, "step" in metric.by)
        name = metric.field or metric.name
        if metric.statistic is None:
            chosen = [r for r in chosen if r.get(name) is not None]
        seeds = {seed: i for i, seed in enumerate(sorted({r["seed"] for r in chosen}))}
        names = sorted({r[self.unit] for r in chosen}, key=lambda unit: (str(type(unit)), unit))
        units = {unit: i for i, unit in enumerate(names)}
        by_arm: dict[str, list[Mapping[str, Any]]] = {arm: [] for arm in self.arms}
        for record in chosen:
            by_arm[record["arm"]].append(record)
        values: dict[str, tuple[float, np.ndarray]] = {}
        for arm, records in by_arm.items():
            s = np.array([seeds[r["seed"]] for r in records], int)
            u = np.array([units[r[self.unit]] for r in records], int)
            compute = _statistic(metric, name, records, s, u, len(seeds), len(units))
            value = float(compute(np.ones((1, len(seeds))), np.ones((1, len(units))))[0])
            drawn = [
                compute(seed_weights, unit_weights)
                for seed_weights, unit_weights in _draws(len(seeds), len(units), resamples)
            ]
            values[arm] = (value, np.concatenate(drawn) if drawn else np.full(1, np.nan))
        result: dict[str, tuple[Estimate, Estimate | None]] = {}
        for arm, (value, resampled) in values.items():
            counts = (
                len(by_arm[arm]),
                len({r[self.unit] for r in by_arm[arm]}),
                len({r["seed"] for r in by_arm[arm]}),
            )
            difference = None
            if baseline and arm != baseline:
                base_value, base_resampled = values[baseline]
                difference = _estimate(value - base_value, resampled - base_resampled, counts)
            result[arm] = (_estimate(value, resampled, counts), difference)
        return result

    def estimate(self, metric: Metric | str, arm: str, against: str = "", **where: Any) -> Estimate:
        """Estimates one figure.

        Args:
          metric: a metric, or the name of a field to average.
          arm: the arm.
          against: subtract the figure of this arm.
          **where: only records with these values.
        """
        if isinstance(metric, str):
            metric = Metric(metric)
        metric = dataclasses.replace(metric, where={**metric.where, **where}, by=())
        for name in (arm, *([against] if against else [])):
            if name not in self.arms:
                raise UserError(f"no arm {name!r}: must be one of {', '.join(self.arms)}")
        value, difference = self.estimates(metric, None, against)[arm]
        return difference if difference is not None else value


def load_results(folder: str | os.PathLike, unit: str = "item") -> Results:
    """Returns the results in the folder of a study. Raises UserError if they are not there."""
    found = []
    for name in (RESULTS, POINTS):
        path = pathlib.Path(folder) / name
        try:
            found.append([json.loads(line) for line in path.read_text().splitlines()])
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({error}): run `msllm study` until it has collected"
            ) from error
    return Results(found[0], found[1], unit)


_Compute = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _statistic(
    metric: Metric,
    name: str,
    records: Sequence[Mapping[str, Any]],
    seed: np.ndarray,
    unit: np.ndarray,
    num_seeds: int,
    num_units: int,
) -> _Compute:
    """Returns the function ([r, seeds], [r, units]) -> [r] that computes a metric for draws."""
    if metric.statistic is not None:
        statistic = metric.statistic
        names = dict.fromkeys(name for record in records for name in record)
        columns = {name: np.array([record.get(name) for record in records]) for name in names}

        def compute(seed_weights: np.ndarray, unit_weights: np.ndarray) -> np.ndarray:
            if not records:
                return np.full(len(seed_weights), np.nan)
            weights = seed_weights[:, seed] * unit_weights[:, unit]
            return np.array([float(statistic(columns, w)) if w.any() else np.nan for w in weights])

        return compute
    # Sums over the records of a seed and a unit: numerator and denominator, [2, seeds, units].
    sums = np.zeros((2, num_seeds, num_units))
    value = np.array([float(record[name]) for record in records])
    if metric.weight:
        weight = np.array([float(record[metric.weight] or 0) for record in records])
    else:
        weight = np.ones(len(records))
    np.add.at(sums[0], (seed, unit), value)
    np.add.at(sums[1], (seed, unit), weight)

    def compute_ratio(seed_weights: np.ndarray, unit_weights: np.ndarray) -> np.ndarray:
        top, bottom = (np.sum((seed_weights @ part) * unit_weights, axis=1) for part in sums)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(bottom == 0, np.nan, top / bottom)

    return compute_ratio


def _draws(seeds: int, units: int, resamples: int) -> Any:
    """Yields (how often each seed, how often each unit is drawn), for parts of the resamples."""
    rng = np.random.default_rng(SEED)
    for start in range(0, resamples if units else 0, _CHUNK):
        size = min(_CHUNK, resamples - start)
        yield _counts(rng, seeds, size), _counts(rng, units, size)


def _counts(rng: np.random.Generator, population: int, size: int) -> np.ndarray:
    """[size, population]: how often each is drawn in `size` draws with replacement."""
    drawn = rng.integers(population, size=(size, population))
    return np.stack([np.bincount(row, minlength=population) for row in drawn]).astype(float)


def _estimate(value: float, resampled: np.ndarray, counts: tuple[int, int, int]) -> Estimate:
    finite = resampled[np.isfinite(resampled)]
    low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
    return Estimate(value, float(low), float(high), *counts, resampled=resampled)
