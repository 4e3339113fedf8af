"""Power laws through the arms of a study, and plots of its metrics."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from msllm.errors import UserError
from msllm.study.definition import Fit, Metric, Plot, Study, folder_name
from msllm.study.results import Estimate, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger("msllm")

_OFFSETS = 200  # offsets that a fit tries, from 0 to the smallest value


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = offset + factor * x ** exponent, each with the interval of its resampled values.

    Attributes:
      factor, exponent, offset: (value, low, high).
      error: the largest relative difference between the law and the value of an arm.
    """

    factor: tuple[float, float, float]
    exponent: tuple[float, float, float]
    offset: tuple[float, float, float]
    error: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The values of the law."""
        return self.offset[0] + self.factor[0] * x ** self.exponent[0]

    def __str__(self) -> str:
        def shown(value: tuple[float, float, float]) -> str:
            return f"{value[0]:.4g} [{value[1]:.4g}, {value[2]:.4g}]"

        offset = f"{shown(self.offset)} + " if any(self.offset) else ""
        return f"{offset}{shown(self.factor)} x ^ {shown(self.exponent)}"


def fit_power_law(x: np.ndarray, y: np.ndarray, resampled: np.ndarray, offset: bool) -> PowerLaw:
    """Fits a power law by least squares of relative errors.

    Without an offset this is linear regression of log y on log x. With one, the regression is done
    for `_OFFSETS` offsets below the smallest value, and the best is taken.

    Args:
      x: [A] positive.
      y: [A] positive, the values of the arms.
      resampled: [R, A], resampled values; the law is fitted to each row for the intervals.
      offset: whether to fit an offset.

    Raises UserError if there are too few arms, or values that are not positive.
    """
    needed = 3 if offset else 2
    if len(np.unique(x)) < needed:
        raise UserError(f"a fit needs {needed} arms with different x, got {len(np.unique(x))}")
    if not (np.all(x > 0) and np.all(y > 0)):
        raise UserError("a fit of a power law needs positive x and y")
    usable = resampled[np.all(np.isfinite(resampled) & (resampled > 0), axis=1)]
    factor, exponent, offsets = _fit(x, np.concatenate([y[None], usable]), offset)

    def interval(values: np.ndarray) -> tuple[float, float, float]:
        rest = values[1:] if len(values) > 1 else np.full(1, np.nan)
        low, high = np.quantile(rest, [0.025, 0.975])
        return float(values[0]), float(low), float(high)

    fitted = offsets[0] + factor[0] * x ** exponent[0]
    error = float(np.max(np.abs(fitted / y - 1)))
    return PowerLaw(interval(factor), interval(exponent), interval(offsets), error)


def _fit(x: np.ndarray, y: np.ndarray, offset: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(factor, exponent, offset), [n] each, for y [n, A]."""
    share = np.linspace(0, 1, _OFFSETS, endpoint=False) if offset else np.zeros(1)
    tried = share * y.min(axis=1, keepdims=True)  # [n, offsets]
    log_x = np.log(x) - np.mean(np.log(x))
    log_y = np.log(y[:, None, :] - tried[:, :, None])  # [n, offsets, A]
    exponent = (log_y @ log_x) / (log_x @ log_x)
    mean = log_y.mean(axis=2) - exponent * np.mean(np.log(x))
    law = tried[:, :, None] + np.exp(mean)[:, :, None] * x ** exponent[:, :, None]
    best = np.argmin(np.sum((law / y[:, None, :] - 1) ** 2, axis=2), axis=1)
    rows = np.arange(len(y))
    return np.exp(mean[rows, best]), exponent[rows, best], tried[rows, best]


def fits(study: Study, results: Results) -> list[dict[str, Any]]:
    """The fits of a study, by group of their metric, as JSON values."""
    found = []
    for fit in study.fits:
        metric = _metric(study, fit.y)
        for key, records in results.groups(metric).items():
            estimates = {arm: pair[0] for arm, pair in results.estimates(metric, records).items()}
            entry: dict[str, Any] = {"x": fit.x, "y": fit.y, **dict(zip(metric.by, key))}
            try:
                law = _fit_arms(fit, results, estimates)
            except UserError as error:
                found.append({**entry, "problem": str(error)})
                continue
            found.append({**entry, **dataclasses.asdict(law), "law": str(law)})
    return found


def _fit_arms(fit: Fit, results: Results, estimates: Mapping[str, Estimate]) -> PowerLaw:
    arms = [
        arm
        for arm in (fit.arms or results.arms)
        if results.axis(fit.x, arm) is not None and np.isfinite(estimates[arm].value)
    ]
    if not arms:
        raise UserError(f"no arm has both {fit.x} and {fit.y}")
    x = np.array([results.axis(fit.x, arm) for arm in arms], float)
    y = np.array([estimates[arm].value for arm in arms])
    resampled = np.stack([estimates[arm].resampled for arm in arms], axis=1)
    return fit_power_law(x, y, resampled, fit.offset)


def draw(axes: Axes, study: Study, results: Results, plot: Plot) -> None:
    """Draws a plot of a study on matplotlib axes.

    Raises UserError if no arm has a value for x.
    """
    metric = _metric(study, plot.y)
    lines: dict[str, list[tuple[Any, Estimate]]] = {}
    for key, records in results.groups(metric).items():
        group = dict(zip(metric.by, key))
        for arm, (estimate, _) in results.estimates(metric, records).items():
            x, label = _place(results, plot, group, arm)
            if x is not None and np.isfinite(estimate.value):
                lines.setdefault(label, []).append((x, estimate))
    if not lines:
        raise UserError(
            f"{plot}: no arm has a number for {plot.x!r}: name a fact, or a setting, an option or a"
            " field of the metric's `by` that is a number"
        )
    for label, places in lines.items():
        if not any(isinstance(x, str) for x, _ in places):
            places.sort(key=lambda place: place[0])
        x = [place for place, _ in places]
        y = np.array([estimate.value for _, estimate in places])
        low = y - [estimate.low for _, estimate in places]
        high = np.array([estimate.high for _, estimate in places]) - y
        error = np.nan_to_num(np.maximum([low, high], 0))
        line = "" if isinstance(x[0], str) else "-"
        axes.errorbar(x, y, yerr=error, fmt="o", linestyle=line, capsize=2, label=label or None)
    for fit in study.fits:
        if (fit.x, fit.y) == (plot.x, plot.y) and not metric.by:
            _draw_law(axes, fit, results, metric)
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    if "x" in plot.log:
        axes.set_xscale("log")
    if "y" in plot.log:
        axes.set_yscale("log")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")


def _draw_law(axes: Axes, fit: Fit, results: Results, metric: Metric) -> None:
    estimates = {arm: pair[0] for arm, pair in results.estimates(metric).items()}
    try:
        law = _fit_arms(fit, results, estimates)
    except UserError:  # `fits` reports it
        return
    places = [results.axis(fit.x, arm) for arm in (fit.arms or results.arms)]
    known = [x for x in places if x is not None]
    x = np.geomspace(min(known), max(known), 50)
    axes.plot(x, law(x), "--", color="0.5", label=f"exponent {law.exponent[0]:.3g}")


def _place(
    results: Results, plot: Plot, group: Mapping[str, Any], arm: str
) -> tuple[float | str | None, str]:
    """(x, the label of the line) of an arm and a group."""
    others = [f"{name}={value}" for name, value in group.items() if name != plot.x]
    if plot.x in group:
        x = group[plot.x]
        return (x if type(x) in (int, float) else str(x)), " ".join([arm, *others])
    if plot.by:
        point = next(point for point in results.points if point["arm"] == arm)
        settings = {**point["settings"], **point["options"]}
        others.insert(0, f"{plot.by}={settings.get(plot.by, 'as in base')}")
    return results.axis(plot.x, arm), " ".join(others)


def write_plots(study: Study, results: Results, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws the plots of a study as PNG files in a folder, and returns their paths.

    A plot that has nothing to show is left out with a warning, since all results are written.

    Raises ImportError if matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    folder.mkdir(exist_ok=True)
    for plot in study.plots:
        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        try:
            draw(figure.add_subplot(), study, results, plot)
        except UserError as error:
            log.warning("a plot is left out: %s", error)
            continue
        name = "-".join(filter(None, (plot.y, plot.x, plot.by)))
        paths.append(folder / f"{folder_name(name)}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _metric(study: Study, name: str) -> Metric:
    return next(metric for metric in study.metrics if metric.name == name)


def describe(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of a table of fits."""
    rows = []
    for entry in entries:
        text = entry.get("law") or entry["problem"]
        error = f"{entry['error']:.2%}" if "error" in entry else ""
        known = ("x", "y", "factor", "exponent", "offset", "error", "law", "problem")
        group = " ".join(f"{k}={v}" for k, v in entry.items() if k not in known)
        rows.append([f"{entry['y']} {group}".strip(), entry["x"], text, error])
    return rows
