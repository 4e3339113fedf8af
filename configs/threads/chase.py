"""A negative control: pointers that must be followed one after the other.

    msllm study configs/threads/chase.py --out=runs/chase

One, two or four threads follow 8 pointers in 8, 4 or 2 rows (thread_chase.py). All threads read
all pointers, and each other's cells with lag 0, through latent edges. If each pointer needs the one
before, threads cannot divide the work: accuracy should depend on the rows and not on the threads.

The parameters of all arms are equal but for the vectors of the streams (0.2 %).
Cost: 0.11 M parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import thread_chase
import thread_runs

from msllm.evals.held_out import examples, open_split
from msllm.study import Arm, Metric, Plot, Small, Study

THREADS, ROWS = (1, 2, 4), (8, 4, 2)


def get_arms() -> dict[str, Arm]:
    """All arms."""
    found = {}
    for rows in ROWS:
        for threads in THREADS:
            names = [f"thread{i}" for i in range(threads)]
            options = {"rows": rows}
            found[f"{threads} in {rows} rows"] = Arm(
                {
                    "streams.names": ("from", "to", *names),
                    "streams.kinds": ("input", "input", *["output"] * threads),
                    "data.options": options,
                    "data.rows": thread_chase.rows_of(options),
                },
                options={"threads": threads, "rows": rows},
            )
    return found


def get_config():
    """Returns the settings that all arms share: all cells see all others of their row."""
    config = thread_runs.get_narrow_config()
    config.steps = 400
    config.data.batch_size = 32
    config.streams.visibility = "same_row"
    config.data.converter = "thread_chase:convert"
    return config


def measure(model, point) -> Iterator[dict[str, Any]]:
    """A record per problem: whether the answer is right, and the share of cells that are."""
    tables = list(examples(open_split(model)))[: point.options["problems"]]
    said = thread_runs.run_freely(model, tables)
    begin = len(thread_chase.ITEMS) + 2
    for i, (table, run) in enumerate(zip(tables, said)):
        right = (run == table.tokens)[begin:, 2:]
        yield {
            "item": i,
            "threads": point.options["threads"],
            "rows": point.options["rows"],
            "right": bool(right[-1, -1]),
            "first": bool(right[0, -1]),
            "cells": float(right.mean()),
        }


def get_study() -> Study:
    """The study."""
    return Study(
        base=get_config(),
        arms=get_arms(),
        seeds=(0, 1, 2),
        tokenizer={
            "streams.names": ("from", "to", "thread0"),
            "streams.kinds": ("input", "input", "output"),
            "data.options": {"examples": 20},
            "data.rows": thread_chase.rows_of({"rows": 8}),
        },
        measure=measure,
        options={"problems": 256},
        metrics=(
            Metric("answers", "right", by=("rows",)),
            Metric("first rows", "first", by=("rows",)),
        ),
        plots=(Plot("threads", "answers", by="rows"),),
        same=("steps",),
        small=Small(
            settings=thread_runs.SMALL | {"data.max_examples": 100},
            arms=("1 in 2 rows", "4 in 2 rows"),
            options={"problems": 4},
        ),
    )
