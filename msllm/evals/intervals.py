"""Intervals of shares and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959964  # of a 95 % interval
RESAMPLES = 2000
SEED = 0  # of the resampling


class Estimate(NamedTuple):
    """A value with its 95 % interval.

    Attributes:
      value, low, high: nan if there is nothing to estimate from.
      items: the number of items.
    """

    value: float
    low: float
    high: float
    items: int


def share(hits: Sequence[bool] | np.ndarray) -> Estimate:
    """A share with the Wilson score interval, which is right for rare events as well."""
    n = len(hits)
    if not n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    p = float(np.mean(np.asarray(hits, bool)))
    centre, scale = p + Z * Z / (2 * n), 1 + Z * Z / n
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Estimate(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale), n)


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """A mean, such as that of paired differences, with the interval of a bootstrap over items."""
    array = np.asarray(values, np.float64)
    if not len(array):
        return Estimate(math.nan, math.nan, math.nan, 0)
    generator = np.random.default_rng(SEED)
    count = len(array)
    drawn = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    low, high = np.percentile(drawn @ array / count, (2.5, 97.5))
    return Estimate(float(array.mean()), float(low), float(high), count)


def statistic(
    function: Callable[[np.ndarray], float], items: int, resamples: int = RESAMPLES
) -> Estimate:
    """Any figure of a sample, such as the area under a curve, with a bootstrap over items.

    Args:
      function: function(weights) returns the figure if item i counts weights[i] times; nan if there
        is none.
      items: the number of items.
      resamples: 0: no interval.
    """
    if not items:
        return Estimate(math.nan, math.nan, math.nan, 0)
    generator = np.random.default_rng(SEED)
    drawn = generator.multinomial(items, np.full(items, 1 / items), resamples)
    found = np.array([function(weights) for weights in drawn])
    found = found[np.isfinite(found)]
    low, high = np.percentile(found, (2.5, 97.5)) if len(found) else (math.nan, math.nan)
    return Estimate(float(function(np.ones(items))), float(low), float(high), items)


def percent(estimate: Estimate) -> str:
    """A share as text, such as "3.1 % (2.5 to 4.0)"."""
    if not estimate.items:
        return "no items"
    value, low, high = (100 * x for x in estimate[:3])
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def number(estimate: Estimate) -> str:
    """A mean as text, such as "0.31 (0.25 to 0.40)"."""
    if not estimate.items:
        return "no items"
    if math.isnan(estimate.low):
        return "none" if math.isnan(estimate.value) else f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
