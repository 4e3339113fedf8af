"""Collects the results of a study: records, points, a summary and a table."""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msllm.runtime.files import write_atomically
from msllm.study import curves, work
from msllm.study.definition import FACTS
from msllm.study.plan import Plan, differing_settings, finite
from msllm.study.results import POINTS, RESAMPLES, RESULTS, Estimate, Results

SUMMARY, TABLE, PARTIAL = "summary.json", "table.md", "partial.md"

log = logging.getLogger("msllm")


def collect(plan: Plan, name: str, seeds: Sequence[int] | None = None) -> Results:
    """Writes the files of results of a study. Returns the results.

    Args:
      plan: the plan.
      name: the file of the study, as a title.
      seeds: the seeds whose points are all done; None: all. If there are others, only a table of
        these seeds is written, to `PARTIAL`.
    """
    seeds = plan.study.seeds if seeds is None else seeds
    others = [seed for seed in plan.study.seeds if seed not in seeds]
    records, points = [], []
    for arm, seed in plan.points():
        if seed in others:
            continue
        folder = plan.point_folder(arm, seed)
        for line in (folder / work.RECORDS).read_text().splitlines():
            records.append({"arm": arm, "seed": seed, **json.loads(line)})
        points.append(_point(plan, arm, seed))
    results = Results(records, points, plan.study.unit)
    metrics = _metrics(plan, results)
    laws = curves.fits(plan.study, results)
    table = _table(plan, results, metrics, name, others)
    if laws:
        head = ["metric", "x", "power law [95 %]", "largest error"]
        table += "\n".join(["", "## Fits", "", *markdown(head, curves.describe(laws)), ""])
    report = ""
    if plan.study.report is not None:
        report = f"\n{plan.study.report(results).rstrip()}\n"
    if others:
        write_atomically(plan.out / PARTIAL, table + report)
        print(f"{table}{report}\nwritten: {plan.out / PARTIAL}")
        return results
    for file, lines in ((RESULTS, records), (POINTS, points)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(plan.out / file, text)
    summary = {
        "study": name,
        "small": plan.small,
        "arms": list(results.arms),
        "seeds": list(results.seeds),
        "baseline": plan.study.baseline_arm,
        "metrics": metrics,
        "fits": laws,
    }
    write_atomically(plan.out / SUMMARY, json.dumps(summary, indent=1) + "\n")
    plots = _plots(plan, results)
    if plots:
        pictures = [f"![{path.stem}]({path.relative_to(plan.out)})" for path in plots]
        table += "\n".join(["", "## Plots", "", *pictures, ""])
    table += report
    write_atomically(plan.out / TABLE, table)
    (plan.out / PARTIAL).unlink(missing_ok=True)
    print(table)
    written = [plan.out / name for name in (RESULTS, POINTS, SUMMARY, TABLE)] + plots
    print(f"written: {', '.join(map(str, written))}")
    return results


def _plots(plan: Plan, results: Results) -> list[pathlib.Path]:
    """Draws the plots, if matplotlib is installed."""
    if not plan.study.plots:
        return []
    try:
        return curves.write_plots(plan.study, results, plan.out / "plots")
    except ImportError:
        log.warning("plots are left out: install msllm[study] for matplotlib")
        return []


def _point(plan: Plan, arm: str, seed: int) -> dict[str, Any]:
    """The line of a point."""
    training, given = plan.training(arm, seed), plan.study.arm(arm)
    done = work.measured(plan, arm, seed) or {}
    chain = plan.chain(training) if given.train else []
    costs = [work.cost(run.folder) for run in chain]
    return {
        "arm": arm,
        "seed": seed,
        "settings": json.loads(json.dumps(given.settings)),
        "options": done["options"],
        "step": done["step"],
        **done["facts"],
        "records": done["records"],
        "workdir": str(training.folder.relative_to(plan.out)),
        "cpu_seconds": round(sum(cost["cpu_seconds"] for cost in costs), 2),
        "seconds": round(sum(cost["seconds"] for cost in costs), 2),
        "measure_cpu_seconds": round(done["measure_cpu_seconds"], 2),
    }


def _metrics(plan: Plan, results: Results) -> list[dict[str, Any]]:
    """A row per metric, group and arm."""
    rows = []
    for metric in plan.study.metrics:
        for key, records in results.groups(metric).items():
            found = results.estimates(metric, records, plan.study.baseline_arm)
            group = dict(zip(metric.by, key))
            for arm, (estimate, difference) in found.items():
                if not estimate.records:
                    continue
                row = {"metric": metric.name, **group, "arm": arm, **_values(estimate)}
                if difference is not None:
                    row["difference"] = _values(difference)
                rows.append(row)
    return rows


def _values(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": finite(estimate.value),
        "low": finite(estimate.low),
        "high": finite(estimate.high),
        "records": estimate.records,
        "units": estimate.units,
        "seeds": estimate.seeds,
        "by_seed": {str(seed): finite(value) for seed, value in estimate.by_seed.items()},
    }


def _table(
    plan: Plan,
    results: Results,
    rows: Sequence[Mapping[str, Any]],
    name: str,
    missing: Sequence[int],
) -> str:
    study = plan.study
    seeds = ", ".join(map(str, results.seeds))
    lines = [f"# {name}", ""]
    if plan.small:
        lines += ["The small form of the study: its figures mean nothing.", ""]
    if missing:
        listed = ", ".join(map(str, missing))
        lines += [f"**Not complete**: points are missing of seeds {listed}.", ""]
    lines += [
        f"{len(results.arms)} arms, seeds {seeds}; baseline: {study.baseline_arm}. Intervals hold"
        f" the middle 95 % of {RESAMPLES:,} resamples of seeds and of the values of `{study.unit}`;"
        " differences are paired.",
        "",
        "## Settings in which the arms differ",
        "",
        *markdown(
            ["setting", *results.arms],
            [[key, *values] for key, values in differing_settings(plan).items()],
        ),
        "",
        "## Size and cost of a point (mean over seeds)",
        "",
        *markdown(
            ["arm", *FACTS, "CPU-s"],
            [
                [arm, *(_mean(results, arm, fact) for fact in (*FACTS, "cpu_seconds"))]
                for arm in results.arms
            ],
        ),
        "",
    ]
    for metric in study.metrics:
        table = []
        for row in rows:
            if row["metric"] == metric.name:
                group = [row[field] for field in metric.by]
                cells = [*group, row["arm"], *_interval(row), *_interval(row.get("difference"))]
                table.append([*cells, f"{row['records']:,}"])
        head = [*metric.by, "arm", metric.name, "95 %", "minus baseline", "95 %", "records"]
        lines += [f"## {metric.name}", "", *markdown(head, table), ""]
    return "\n".join(lines)


def _mean(results: Results, arm: str, fact: str) -> str:
    values = [point[fact] for point in results.points if point["arm"] == arm]
    mean = sum(values) / len(values)
    if mean >= 1e7:
        return f"{mean:.3g}"
    return f"{mean:,.1f}" if fact == "cpu_seconds" else f"{mean:,.0f}"


def _interval(values: Mapping[str, Any] | None) -> list[str]:
    if values is None or values["value"] is None:
        return ["", ""]
    if values["low"] is None:
        return [f"{values['value']:.4g}", ""]
    return [f"{values['value']:.4g}", f"{values['low']:.4g} .. {values['high']:.4g}"]


def markdown(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return [
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines
    ]
