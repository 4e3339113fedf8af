"""Collects the results of a study: records, points, a summary and a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msllm.runtime.files import write_atomically
from msllm.study import work
from msllm.study.definition import FACTS
from msllm.study.plan import Plan, differing_settings, finite
from msllm.study.results import POINTS, RESULTS, Estimate, Results

SUMMARY, TABLE = "summary.json", "table.md"


def collect(plan: Plan, name: str) -> Results:
    """Writes the files of results of a study whose points are all done. Returns the results."""
    records, points = [], []
    for arm, seed in plan.points():
        folder = plan.point_folder(arm, seed)
        for line in (folder / work.RECORDS).read_text().splitlines():
            records.append({"arm": arm, "seed": seed, **json.loads(line)})
        points.append(_point(plan, arm, seed))
    results = Results(records, points, plan.study.unit)
    for file, lines in ((RESULTS, records), (POINTS, points)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(plan.out / file, text)
    metrics = _metrics(plan, results)
    summary = {
        "study": name,
        "small": plan.small,
        "arms": list(results.arms),
        "seeds": list(results.seeds),
        "baseline": plan.study.baseline_arm,
        "metrics": metrics,
    }
    write_atomically(plan.out / SUMMARY, json.dumps(summary, indent=1) + "\n")
    table = _table(plan, results, metrics, name)
    write_atomically(plan.out / TABLE, table)
    print(table)
    print(f"written: {', '.join(str(plan.out / f) for f in (RESULTS, POINTS, SUMMARY, TABLE))}")
    return results


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
        "step": done["step"],
        **plan.facts(arm, seed),
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
        for group in results.groups(metric):
            found = results.estimates(metric, group, plan.study.baseline_arm)
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
    }


def _table(plan: Plan, results: Results, rows: Sequence[Mapping[str, Any]], name: str) -> str:
    study = plan.study
    seeds = ", ".join(map(str, results.seeds))
    lines = [f"# {name}", ""]
    if plan.small:
        lines += ["The small form of the study: its figures mean nothing.", ""]
    lines += [
        f"{len(results.arms)} arms, seeds {seeds}; baseline: {study.baseline_arm}. Intervals hold"
        f" the middle 95 % of {1000:,} resamples of seeds and of the values of `{study.unit}`;"
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
    if study.report is not None:
        lines += [study.report(results).rstrip(), ""]
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
