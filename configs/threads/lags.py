"""How late may threads hear one another, and over which edges?

    msllm study configs/threads/lags.py --out=runs/lags

Four threads read two digits each and add all eight, mod 5, over the edges of a ring, a star, a tree
or all to all, through tokens (thread_sum.py). Each round of the exchange lasts 9 rows, enough for
lags of up to 8.

Arms: each topology, trained with a lag of 1, 2, 4 or 8, or with lags that every batch draws from 1,
2 and 8. The measurement runs every model with all lags from 1 to 8. Of these, 3, 4, 5, 6 and 7 are
unseen by models with drawn lags.

Cost: 0.11 M parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import thread_runs
import thread_sum

from msllm.evals.held_out import examples, open_split
from msllm.study import Arm, Metric, Plot, Results, Small, Study

LAGS = {"1": "1", "2": "2", "4": "4", "8": "8", "drawn": "1|2|8"}
SEEN, UNSEEN = (1, 2, 8), (3, 4, 5, 6, 7)  # by models with drawn lags
ANSWERS = Metric("answers", "right", by=("lag",))


def edges(topology: str, lag: str) -> tuple[tuple[str, str, str], ...]:
    """The edges: each thread reads its input at once, and others late, through their tokens."""
    threads = range(thread_sum.THREADS)
    return (
        *((f"thread{i}", f"input@{i}", "0") for i in threads),
        *(
            (f"thread{reader}", f"thread{source}", f"{lag} tokens")
            for reader, source in thread_sum.sources(topology)
        ),
    )


def get_config():
    """Returns the settings that all arms share."""
    config = thread_runs.get_narrow_config()
    config.steps = 300
    names = [f"thread{i}" for i in range(thread_sum.THREADS)]
    config.streams.names = (f"input * {thread_sum.THREADS}", *names)
    config.streams.kinds = ("input", *["output"] * len(names))
    config.streams.visibility = "isolated"
    config.data.converter = "thread_sum:convert"
    config.data.batch_size = 32
    return config


def get_arms() -> dict[str, Arm]:
    """All arms."""
    return {
        f"{topology}, lag {name}": Arm(
            {
                "streams.lags": edges(topology, lag),
                "data.options": {"topology": topology},
                "data.rows": thread_sum.rows_of(topology),
            },
            options={"topology": topology},
        )
        for topology in thread_sum.ROUNDS
        for name, lag in LAGS.items()
    }


def measure(model, point) -> Iterator[dict[str, Any]]:
    """A record per lag and problem: whether the answer is right."""
    tables = list(examples(open_split(model)))[: point.options["problems"]]
    for lag in point.options["lags"]:
        other = model.with_streams(lags=edges(point.options["topology"], str(lag)))
        said = thread_runs.run_freely(other, tables)
        for i, (table, run) in enumerate(zip(tables, said)):
            yield {
                "item": i,
                "topology": point.options["topology"],
                "lag": lag,
                "right": bool(run[-1, thread_sum.THREADS] == table.tokens[-1, thread_sum.THREADS]),
            }


def get_study() -> Study:
    """The study."""
    return Study(
        base=get_config(),
        arms=get_arms(),
        seeds=(0, 1, 2),
        tokenizer={
            "data.options": {"topology": "all", "examples": 20},
            "data.rows": thread_sum.rows_of("all"),
        },
        measure=measure,
        options={"problems": 200, "lags": tuple(range(1, 9))},
        metrics=(ANSWERS,),
        plots=(Plot("lag", "answers"),),
        same=("parameters", "steps"),
        report=report,
        small=Small(
            settings=thread_runs.SMALL | {"data.max_examples": 100},
            arms=("all, lag 4", "all, lag drawn"),
            options={"problems": 4, "lags": (1, 4)},
        ),
    )


def report(results: Results) -> str:
    """Accuracy by the lags of training and of the measurement."""
    groups = {key[0]: found for key, found in results.groups(ANSWERS).items()}
    answers = {
        lag: {arm: pair[0].value for arm, pair in results.estimates(ANSWERS, found).items()}
        for lag, found in groups.items()
    }
    lines = ["## Right answers by lag", "", "In rows: topology and lag of training.", ""]
    lines += [f"| arm | {' | '.join(map(str, groups))} |", "|---|" + "---|" * len(groups)]
    for arm in results.arms:
        cells = [f"{answers[lag][arm]:.1%}" for lag in groups]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines.append("")
    for arm in results.arms:
        seen = [answers[lag][arm] for lag in SEEN if lag in answers]
        unseen = [answers[lag][arm] for lag in UNSEEN if lag in answers]
        if arm.endswith("drawn") and sum(seen) and unseen:
            kept = min(unseen) * len(seen) / sum(seen)
            lines.append(f"- {arm}: at the worst unseen lag, {kept:.1%} of the accuracy is kept")
    return "\n".join(lines) + "\n"
