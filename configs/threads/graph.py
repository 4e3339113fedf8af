"""Can threads follow all branches of a proof at once? Problems as in ProsQA.

    msllm study configs/threads/graph.py --out=runs/graph

"Is Tom a lempus or scrompus?" follows from 20 to 50 facts such as "Every terpus is a fompus."
Each fact has a thread of its own, and all are read at once (thread_graph.py). In every row, each
thread says what its fact concludes if its subject is known to follow by then. The output answers
d + 1 rows after the question if the proof has d steps.

Arms:

- `tokens`, `latent`, `none`: the edges between threads, of lag 0.
- `latent, blank`: the model of `latent`, trained further with silent threads, in both stages. Only
  the answer is supervised.

Training begins with small problems, of up to 12 facts. Then come problems of 3 to 6 steps and at
most 40 facts, with the statistics of ProsQA. The measurement takes the 300 problems of ProsQA's
validation split, with more threads if they have more facts, and generated problems of 7 and 8
steps.

Data: data/prosqa/prosqa_valid.json in the folder that MSLLM_SHARED names (default: `shared` beside
the repository).
Cost: 0.22 M parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import thread_graph
import thread_runs

from msllm.data.files import shared_file
from msllm.study import Arm, Metric, Small, Study

MEDIA = {"tokens": "0 tokens", "latent": "0", "none": "never"}
SMALL = {
    "streams.names": ("fact * 12", "thread * 12", "question", "output"),
    "data.options": {
        "nodes": (6, 10),
        "steps": (1, 2, 3),
        "shares": (1, 2, 1),
        "most_facts": 12,
        "examples": 12_800,
    },
    "data.rows": thread_graph.rows_of(3),
    "data.batch_size": 32,
    "steps": 400,
    "optim.schedule": "constant",
}
FULL = {"steps": 150}
SETS = {  # of the measurement, with options of `thread_graph.draw`
    "3 to 6 steps": {"most_facts": 64},
    "7 steps": {"steps": (7,), "shares": (1,), "nodes": (24, 40), "most_facts": 64},
    "8 steps": {"steps": (8,), "shares": (1,), "nodes": (24, 40), "most_facts": 64},
}
AT_ONCE = 50  # problems that are run together


def get_config():
    """Returns the settings that all arms share."""
    config = thread_runs.get_narrow_config()
    config.streams.names = ("fact * 40", "thread * 40", "question", "output")
    config.streams.kinds = ("input", "thought", "input", "output")
    config.streams.loss_weights = (0.0, 1.0, 0.0, 8.0)
    config.streams.visibility = "isolated"
    config.data.converter = "thread_graph:convert"
    config.data.options = {"examples": 5_000}
    config.data.rows = thread_graph.rows_of(8)
    config.data.batch_size = 8
    config.model.num_layers = 4
    return config


def edges(medium: str) -> tuple[tuple[str, str, str], ...]:
    """The edges: threads read their fact, the question and each other; the output reads threads."""
    return (
        ("thread", "fact@i", "0"),
        ("thread", "question", "0"),
        ("thread", "thread", MEDIA[medium]),
        ("output", "question", "0"),
        ("output", "thread", "0 tokens" if medium == "tokens" else "0"),
    )


def get_arms() -> dict[str, Arm]:
    """All arms."""
    found = {medium: Arm({"streams.lags": edges(medium)}) for medium in MEDIA}
    found["latent, blank"] = Arm(
        {"streams.lags": edges("latent"), "data.converter": "thread_graph:convert_blank"},
        after="latent",
    )
    return found


def measure(model, point) -> Iterator[dict[str, Any]]:
    """A record per problem: whether the answer is right, and when it came."""
    ids = thread_runs.word_ids(model, thread_graph.WORDS)
    silence = model.require_tokenizer().silence_id
    for name, settings in point.options["sets"].items():
        if name == "ProsQA":
            problems = thread_graph.read_prosqa(settings)[: point.options["problems"]]
        else:
            problems = list(thread_graph.draw(settings, point.options["problems"], 10**6))
        other = model.with_threads(thread_graph.most_facts(problems))
        rows = thread_graph.rows_of(max(problem.steps for problem in problems))
        for start in range(0, len(problems), AT_ONCE):
            part = problems[start : start + AT_ONCE]
            tables = thread_graph.tables(part, other.streams, rows, ids, silence)
            said = thread_runs.run_freely(other, tables)
            output, threads = other.streams.index("output"), list(other.streams.members("thread"))
            for i, (problem, table, run) in enumerate(zip(part, tables, said), start):
                spoken = run[run[:, output] != silence, output]
                when = thread_graph.READ + problem.steps
                yield {
                    "item": f"{name}, {i}",
                    "set": name,
                    "steps": problem.steps,
                    "facts": len(problem.facts),
                    "right": bool(len(spoken) and spoken[0] == ids[problem.answer]),
                    "in time": bool(run[when, output] == ids[problem.answer]),
                    "thoughts": float((run == table.tokens)[thread_graph.READ :, threads].mean()),
                    "rows": when - thread_graph.READ + 1,
                }


def get_study() -> Study:
    """The study: small problems first, in all arms."""
    prosqa = shared_file("data/prosqa/prosqa_valid.json", __file__)
    return Study(
        base=get_config(),
        arms=get_arms(),
        seeds=(0, 1, 2),
        stages=(SMALL, FULL),
        tokenizer={"data.options": {"examples": 20}},
        measure=measure,
        options={"sets": {"ProsQA": prosqa} | SETS, "problems": 300},
        metrics=(
            Metric("answers", "right", by=("set",)),
            Metric("answers by steps", "right", by=("steps",)),
            Metric("thoughts", "thoughts", by=("set",)),
        ),
        same=("parameters", "steps"),
        small=Small(
            settings=thread_runs.SMALL
            | {
                "data.options": SMALL["data.options"] | {"examples": 60},
                "data.rows": SMALL["data.rows"],
                "streams.names": SMALL["streams.names"],
            },
            arms=("tokens", "latent"),
            options={"sets": {"small": {"nodes": (8, 12), "steps": (2,), "shares": (1,)}}}
            | {"problems": 4},
        ),
    )
