"""Can threads that were trained as 8 work as 2, 4, 16 and 32?

    msllm study configs/threads/mail.py --out=runs/mail

Eight threads multiply 64 permutations of five things (S5, 120 elements, the smallest group whose
products no circuit of constant depth computes). Each reads 8 of them, one a row. Then the threads
merge their products in three rounds, through mail: the input of a thread holds what its partner
said. A merge is the same operation in the same place as a step of reading, and threads see nothing
of one another but their mail. The answer comes in row 12 instead of row 65.

The measurement runs the same parameters with other numbers of threads. A sequence has as many
permutations as fit into the 12 rows of training, or 64 of them. Some need more rows than that.

Cost: 0.44 M parameters; 12 CPU-minutes for a seed, on a machine with many other processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import thread_fold
import thread_runs

from msllm.study import Arm, Metric, Small, Study

THREADS, SHARE, ROWS = 8, 8, 12  # of training
STEPS = 450
# Threads, and permutations that each reads. From a share of SHARE + 1 on, there are more rows than
# in training, unless there are fewer rounds.
SHAPES = (
    *((2, share) for share in (8, 10, 12)),
    *((4, share) for share in (8, 9, 16)),
    *((8, share) for share in (6, 8, 10)),
    *((16, share) for share in (4, 7, 8)),
    *((32, share) for share in (2, 6)),
)


def mail(threads: int, share: int) -> tuple[tuple[str, str, str, str], ...]:
    """The rules of mail: in each round, an input holds what a partner of its thread says."""
    rounds = range(int(math.log2(threads)))
    return tuple(("input", f"thread@i+{2**k}", "0", str(share + k)) for k in rounds)


def get_config():
    """Returns the settings of training."""
    config = thread_runs.get_config()
    config.steps = STEPS
    config.streams.names = (f"input * {THREADS}", f"thread * {THREADS}")
    config.streams.kinds = ("input", "output")
    config.streams.visibility = "isolated"
    config.streams.lags = (("thread", "input@i", "0"),)
    config.streams.mail = mail(THREADS, SHARE)
    config.data.converter = "thread_fold:convert"
    config.data.options = {
        "group": "S5",
        "length": THREADS * SHARE,
        "merge": "mail",
        "examples": 30_000,
    }
    config.data.rows = ROWS
    return config


def measure(model, point) -> Iterator[dict[str, Any]]:
    """A record per problem: whether the answer is right, and the share of cells that are."""
    trained = point.config.data.options
    words = thread_fold.words_of(trained)
    ids = thread_runs.word_ids(model, words)
    silence = model.require_tokenizer().silence_id
    for threads, share in point.options["shapes"]:
        options = dict(trained) | {"length": threads * share}
        other = model.with_threads(threads).with_streams(mail=mail(threads, share))
        tables = list(
            thread_fold.tables(
                options, other.streams, ids, silence, point.options["problems"], 10**6
            )
        )
        said = thread_runs.run_freely(other, tables)
        columns = thread_fold.shape_of(other.streams)[1]
        for i, (table, run) in enumerate(zip(tables, said)):
            right = (run == table.tokens)[1:, columns]
            yield {
                "item": f"{threads} x {share}, {i}",
                "threads": threads,
                "length": threads * share,
                "rows": len(run),
                "as trained": len(run) <= ROWS,
                "right": bool(right[-1, 0]),
                "own": float(right[:share].mean()),
            }


def get_study() -> Study:
    """The study: one model, and many numbers of threads to run it with."""
    return Study(
        base=get_config(),
        arms={"mail": Arm({})},
        seeds=(0, 1, 2),
        measure=measure,
        options={"shapes": SHAPES, "problems": 256},
        metrics=(
            Metric("answers", "right", by=("threads", "length", "rows")),
            Metric("products of shares", "own", by=("threads", "length")),
        ),
        small=Small(
            settings=thread_runs.SMALL
            | {"data.options": {"group": "S3", "length": 64, "merge": "mail", "examples": 200}},
            options={"shapes": ((4, 2), (8, 3)), "problems": 4},
        ),
    )
