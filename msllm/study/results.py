"""The results of a study: records and points, and estimates with intervals."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
      by_seed: {seed: the figure of that seed alone}.
      resampled: [R], the resampled values.
    """

    value: float
    low: float
    high: float
    records: int
    units: int
    seeds: int
    by_seed: Mapping[int, float]
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

    def groups(self, metric: Metric) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
        """The records of a metric by the values of `metric.by`, in the order of the values."""
        found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for record in self.select(metric.where, "step" in metric.by):
            found.setdefault(tuple(record.get(name) for name in metric.by), []).append(record)
        return {key: found[key] for key in sorted(found, key=_sort_key)}

    def estimates(
        self,
        metric: Metric,
        records: Sequence[Mapping[str, Any]] | None = None,
        baseline: str = "",
        resamples: int = RESAMPLES,
    ) -> dict[str, tuple[Estimate, Estimate | None]]:
        """Estimates a metric for every arm.

        The bootstrap draws seeds with replacement and, independently, units with replacement. All
        arms use the same draws, so differences are paired.

        Args:
          metric: the metric.
          records: the records, such as one of `groups`; None: all of `metric.where`.
          baseline: the arm to subtract; empty: no differences.
          resamples: the number of draws.

        Returns:
          {arm: (estimate, estimate of the difference to the baseline, or None)}. An arm without
          records has the value nan.
        """
        chosen = list(self.select(metric.where) if records is None else records)
        name = metric.field or metric.name
        if metric.statistic is None:
            chosen = [record for record in chosen if record.get(name) is not None]
        seeds = _index(record["seed"] for record in chosen)
        units = _index(record[self.unit] for record in chosen)
        by_arm: dict[str, list[Mapping[str, Any]]] = {arm: [] for arm in self.arms}
        for record in chosen:
            by_arm[record["arm"]].append(record)
        compute = {
            arm: _statistic(metric, name, part, self.unit, seeds, units)
            for arm, part in by_arm.items()
        }
        drawn: dict[str, list[np.ndarray]] = {arm: [] for arm in self.arms}
        for seed_weights, unit_weights in _draws(len(seeds), len(units), resamples):
            for arm in self.arms:
                drawn[arm].append(compute[arm](seed_weights, unit_weights))
        values, by_seed, resampled = {}, {}, {}
        for arm, function in compute.items():
            values[arm] = float(function(np.ones((1, len(seeds))), np.ones((1, len(units))))[0])
            alone = function(np.eye(len(seeds)), np.ones((len(seeds), len(units))))
            by_seed[arm] = dict(zip(seeds, map(float, alone)))
            resampled[arm] = np.concatenate(drawn[arm]) if drawn[arm] else np.full(1, np.nan)
        result: dict[str, tuple[Estimate, Estimate | None]] = {}
        for arm, part in by_arm.items():
            counts = (len(part), len({r[self.unit] for r in part}), len({r["seed"] for r in part}))
            difference = None
            if baseline and arm != baseline:
                difference = _estimate(
                    values[arm] - values[baseline],
                    resampled[arm] - resampled[baseline],
                    {seed: by_seed[arm][seed] - by_seed[baseline][seed] for seed in seeds},
                    counts,
                )
            estimate = _estimate(values[arm], resampled[arm], by_seed[arm], counts)
            result[arm] = (estimate, difference)
        return result

    def axis(self, name: str, arm: str) -> float | None:
        """The mean over seeds of a fact, setting or option of an arm; None if it has no number."""
        values = []
        for point in self.points:
            if point["arm"] == arm:
                found = point.get(name)
                for section in ("settings", "options"):
                    found = point.get(section, {}).get(name) if found is None else found
                if not isinstance(found, int | float):
                    return None
                values.append(float(found))
        return float(np.mean(values)) if values else None

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
        value, difference = self.estimates(metric, baseline=against)[arm]
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


def _sort_key(values: Sequence[Any]) -> list[tuple[str, Any]]:
    """A key that sorts numbers by value, and values of different types by type."""
    kinds = ["number" if isinstance(x, int | float) else type(x).__name__ for x in values]
    return [(kind, 0 if x is None else x) for kind, x in zip(kinds, values)]


def _index(values: Iterable[Any]) -> dict[Any, int]:
    """{value: its place in sorted order}."""
    ordered = sorted(set(values), key=lambda value: _sort_key([value]))
    return {value: i for i, value in enumerate(ordered)}


def _statistic(
    metric: Metric,
    name: str,
    records: Sequence[Mapping[str, Any]],
    unit_field: str,
    seeds: Mapping[Any, int],
    units: Mapping[Any, int],
) -> _Compute:
    """Returns the function ([r, seeds], [r, units]) -> [r] that computes a metric for draws."""
    seed = np.array([seeds[record["seed"]] for record in records], int)
    unit = np.array([units[record[unit_field]] for record in records], int)
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
    sums = np.zeros((2, len(seeds), len(units)))
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


def mean_of_seeds(
    statistic: Callable[[Mapping[str, np.ndarray], np.ndarray], float],
) -> Callable[[Mapping[str, np.ndarray], np.ndarray], float]:
    """The mean over seeds of a statistic of the records of one seed, for `Metric.statistic`.

    For statistics that compare records with each other, where those of different seeds cannot be
    compared: each seed has a monitor of its own, and their scores have no common scale. A seed
    counts as often as its records.
    """

    @functools.wraps(statistic)
    def mean(columns: Mapping[str, np.ndarray], weights: np.ndarray) -> float:
        values, totals = [], []
        for seed in np.unique(columns["seed"][weights > 0]):
            of_seed = columns["seed"] == seed
            part = {name: column[of_seed] for name, column in columns.items()}
            values.append(statistic(part, weights[of_seed]))
            totals.append(weights[of_seed].sum())
        return float(np.average(values, weights=totals))

    return mean


def _draws(seeds: int, units: int, resamples: int) -> Iterator:
    """Yields (how often each seed, how often each unit is drawn), for parts of the resamples."""
    rng = np.random.default_rng(SEED)
    for start in range(0, resamples if units else 0, _CHUNK):
        size = min(_CHUNK, resamples - start)
        yield _counts(rng, seeds, size), _counts(rng, units, size)


def _counts(rng: np.random.Generator, population: int, size: int) -> np.ndarray:
    """[size, population]: how often each is drawn in `size` draws with replacement."""
    drawn = rng.integers(population, size=(size, population))
    return np.stack([np.bincount(row, minlength=population) for row in drawn]).astype(float)


def _estimate(
    value: float,
    resampled: np.ndarray,
    by_seed: Mapping[int, float],
    counts: tuple[int, int, int],
) -> Estimate:
    finite = resampled[np.isfinite(resampled)]
    low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
    return Estimate(value, float(low), float(high), *counts, by_seed, resampled)
