"""Studies: experiments of one config file, with arms, seeds, baselines and intervals.

A study trains a base config in several arms and seeds, measures every trained model with a function
of its own, and compares the arms (docs/studies.md). `msllm study CONFIG --out=DIR` runs it.
"""

from msllm.study.definition import (
    Arm,
    Fit,
    Metric,
    Plot,
    Point,
    Small,
    Study,
    grid,
    load_study,
)
from msllm.study.results import Estimate, Results, load_results, mean_of_seeds
from msllm.study.runner import run

__all__ = [
    "Arm",
    "Estimate",
    "Fit",
    "Metric",
    "Plot",
    "Point",
    "Results",
    "Small",
    "Study",
    "grid",
    "load_results",
    "load_study",
    "mean_of_seeds",
    "run",
]
