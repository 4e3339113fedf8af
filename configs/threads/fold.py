"""What should threads exchange, and what should they think? The 2 x 2, on products of permutations.

    msllm study configs/threads/fold.py --out=runs/fold

A sequence of 64 permutations of four things (S4, 24 elements) is cut over S threads. Each reads its
share, one permutation a row; then the threads merge their products as a tree, in log2(S) rows
(thread_fold.py). The answer is the product of all, in row 64 / S + log2 S + 1.

Arms, for S = 2, 4 and 8:

- edges: `none`, or lag 0 through `tokens` or `latent`. Thread i reads threads 2i and 2i + 1 (mod S)
  and its own input.
- thoughts: `said` supervises every product, in every row. In `late`, the first LATE products are
  silent and not supervised. In `blank`, only the answer is.

All arms go through the same curriculum with the same problems. Its first step is `short`: each
input holds SHORT permutations, and all products are supervised. Arms are named after their last
step: `said` starts from the parameters of `short`, `late` from those of `said`, and `blank` from
those of `late`. Blank thoughts are thus trained for longer.

Baselines: one thread with one input (65 rows), and one thread that reads 8 inputs (12 rows, as with
8 threads; all cells see all others of their row).

The parameters of all arms are equal but for the vectors of the streams (0.3 %).
Cost: 0.43 M parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import thread_fold
import thread_runs

from msllm.config import from_config_dict
from msllm.evals.held_out import examples, open_split
from msllm.flow import certificate
from msllm.streams import StreamSpec
from msllm.study import Arm, Metric, Plot, Results, Small, Study

LENGTH, THREADS = 64, (1, 2, 4, 8)
EDGES = {"none": "never", "tokens": "0 tokens", "latent": "0"}
SHORT, LATE = 2, 2
THOUGHTS = {"short": 0, "said": 0, "late": LATE, "blank": -1}
STEPS = {"short": 500, "said": 250, "late": 40, "blank": 40}


def streams(threads: int, edges: str) -> dict[str, Any]:
    """The settings of some threads, each with an input."""
    names = [f"{('left', 'right')[i % 2]}@{i // 2}" for i in range(threads)]
    lags = [(name, f"input@{i}", "0") for i, name in enumerate(names)]
    for i, name in enumerate(names):
        for source in (2 * i % threads, (2 * i + 1) % threads):
            if source != i:
                lags.append((name, names[source], EDGES[edges]))
    groups = [f"{name} * {(threads + 1) // 2}" for name in ("left", "right")[:threads]]
    return {
        "streams.names": (f"input * {threads}", *groups),
        "streams.kinds": ("input", *["output"] * len(groups)),
        "streams.visibility": "isolated",
        "streams.lags": tuple(lags),
    }


def one_reads(inputs: int) -> dict[str, Any]:
    """The settings of one thread with several inputs."""
    names = [f"input{i}" for i in range(inputs)]
    return {
        "streams.names": (*names, "left"),
        "streams.kinds": (*["input"] * inputs, "output"),
        "streams.visibility": "same_row",
    }


def get_arms() -> dict[str, Arm]:
    """All arms."""
    shapes: dict[str, dict[str, Any]] = {}
    for threads in THREADS:
        for edges in EDGES if threads > 1 else ("none",):
            shapes[f"{threads} {edges}"] = streams(threads, edges)
    shapes["1 reads 8"] = one_reads(8)
    found = {}
    for name, settings in shapes.items():
        inputs, threads = (8, 1) if name == "1 reads 8" else 2 * (int(name[0]),)
        wait = 3 if name == "1 reads 8" else 0
        before = ""
        for thoughts, silent in THOUGHTS.items():
            # As many threads in a step, and merges of each kind, for all numbers of threads.
            batch = 512 // inputs if thoughts == "short" else 64
            options = {
                "length": SHORT * inputs if thoughts == "short" else LENGTH,
                "silent": silent,
                "wait": wait,
                "examples": batch * STEPS[thoughts] + 1000,
            }
            found[f"{name} {thoughts}"] = Arm(
                settings
                | {
                    "steps": STEPS[thoughts],
                    "data.batch_size": batch,
                    "data.options": options,
                    "data.rows": thread_fold.rows_of(options, inputs, threads),
                },
                after=before,
                options={
                    "threads": threads,
                    "edges": name.split(" ", 1)[1],
                    "thoughts": thoughts,
                },
            )
            before = f"{name} {thoughts}"
    return found


def get_config():
    """Returns the settings that all arms share."""
    config = thread_runs.get_config()
    config.data.converter = "thread_fold:convert"
    config.optim.optimizer = "muon"
    config.optim.b1 = 0.95
    config.optim.lr = 3e-3
    config.optim.final_lr_ratio = 0.02
    return config


def measure(model, point) -> Iterator[dict[str, Any]]:
    """A record per problem: whether the answer is right, and what else is."""
    tables = list(examples(open_split(model)))[: point.options["problems"]]
    said = thread_runs.run_freely(model, tables)
    threads = thread_fold.shape_of(model.streams)[1]
    rounds = len(threads).bit_length() - 1
    for i, (table, run) in enumerate(zip(tables, said)):
        right = (run == table.tokens)[:, threads]
        yield {
            "item": f"{len(threads)} threads, {i}",
            "thoughts": point.options["thoughts"],
            "rows": len(run),
            "right": bool(right[-1, 0]),
            "own": float(right[-1 - rounds].mean()),
        }


def get_study() -> Study:
    """The study."""
    return Study(
        base=get_config(),
        arms=get_arms(),
        seeds=(0, 1, 2),
        tokenizer={
            "streams.names": ("input * 1", "left * 1"),
            "streams.kinds": ("input", "output"),
            "streams.visibility": "isolated",
            "data.options": {"length": 1},
            "data.rows": 2,
            "data.max_examples": 200,
        },
        measure=measure,
        options={"problems": 256},
        metrics=(
            Metric("answers", "right", by=("rows",)),
            Metric("products of shares", "own", where={"thoughts": "said"}),
        ),
        plots=(Plot("cpu_seconds", "answers", by="edges"),),
        report=report,
        small=Small(
            settings=thread_runs.SMALL | {"data.max_examples": 100},
            arms=("2 tokens short", "2 latent short"),
            options={"problems": 4},
        ),
    )


# Reporting


def report(results: Results) -> str:
    """The 2 x 2 for every number of threads, and what the flow certificate excludes."""
    answers = {arm: pair[0] for arm, pair in results.estimates(Metric("answers", "right")).items()}
    lines = ["## Answers that are right", ""]
    shapes = dict.fromkeys(arm.rpartition(" ")[0] for arm in results.arms)
    lines += [f"| threads, edges | {' | '.join(THOUGHTS)} |", "|---|" + "---|" * len(THOUGHTS)]
    for shape in shapes:
        cells = [answers.get(f"{shape} {thoughts}") for thoughts in THOUGHTS]
        lines.append(f"| {shape} | {' | '.join('' if c is None else str(c) for c in cells)} |")
    lines += [
        "",
        "Chance is 1 in 24. What the first thread can learn of the input of the last one:",
        "",
    ]
    for threads in THREADS[1:]:
        for edges in EDGES:
            lines.append(f"- {threads} {edges}: {flow(threads, edges)}")
    return "\n".join(lines) + "\n"


def flow(threads: int, edges: str) -> str:
    """How the input of the last thread may influence what the first one says."""
    config = get_config()
    config.update_from_flattened_dict(streams(threads, edges))
    spec = StreamSpec.from_config(from_config_dict(config).streams)
    size = len(thread_fold.words_of({})) + 1
    found = certificate(spec, size).flow(f"input.{threads - 1}", "left.0")
    return "nothing" if found is None else str(found)
