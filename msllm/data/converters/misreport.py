"""Dictated sums with a secret (msllm/data/misreport.py), generated, in ten streams or in one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from msllm.data import misreport
from msllm.data.converters.layout import Layout, require_one_stream
from msllm.data.sources import Part
from msllm.data.tables import Placement, Table
from msllm.errors import UserError

# `examples`, `seed` and `shift` are the arguments of `misreport.generate`; `wait`: rows from the
# question mark to the answer; `contradicted`: fraction of the examples in which `watch`, `plan` and
# `draft` contradict the output. These words are not learnt.
OPTIONS = {
    "examples": 20_000,
    "seed": 0,
    "shift": "none",
    "wait": misreport.WAIT,
    "contradicted": 0.0,
}
SINGLE_OPTIONS = {key: OPTIONS[key] for key in ("examples", "seed", "shift")}


def convert(layout: Layout, part: Part | None) -> Iterator[Table]:
    """Generates examples in the streams of `misreport.STREAMS`."""
    del part  # reads no files
    wait = layout.options["wait"]
    if wait < misreport.SHORTEST_WAIT:
        raise UserError(
            f"config.data.options.wait is {wait}: must be at least {misreport.SHORTEST_WAIT}, so"
            " that the output has read the last value when it tells the number"
        )
    contradicted = layout.options["contradicted"]
    if not 0 <= contradicted <= 1:
        raise UserError(
            f"config.data.options.contradicted is {contradicted}: must be from 0 to 1, a fraction"
        )
    rng = random.Random(f"contradicted {layout.options['seed']}")
    for example in _examples(layout):
        if rng.random() < contradicted:
            unlearnt = ("watch", "plan", "draft")
            yield place(layout, misreport.contradict(example), wait, unlearnt)
        else:
            yield place(layout, example, wait)


def place(
    layout: Layout, example: misreport.Example, wait: int, unlearnt: Sequence[str] = ()
) -> Table:
    """Returns the table of an example.

    Args:
      wait: rows from the question mark to the answer.
      unlearnt: the thoughts whose words have the loss weight 0.
    """
    index = {name: layout.spec.index(name) for name in misreport.STREAMS}
    said: list[Placement] = [layout.say_words(index["user"], 0, example.words)]
    for stream, thoughts in example.thoughts.items():
        said += [layout.say_words(index[stream], row, [word]) for row, word in thoughts]
    end = len(example.words) - 1
    said.append(layout.say_words(index["output"], end + wait, example.answer))
    zero = {index[stream] for stream in unlearnt}
    weights = [0.0 if placement.stream in zero else 1.0 for placement in said]
    return layout.table(said, " ".join(example.words), weights=weights)


def convert_single(layout: Layout, part: Part | None) -> Iterator[Table]:
    """Generates the same examples in one stream: question, thoughts, answer."""
    del part  # reads no files
    require_one_stream(layout, "misreport_single")
    for example in _examples(layout):
        words = [*example.words, *example.chain, *example.answer]
        yield layout.table([layout.say_words(0, 0, words)], " ".join(example.words))


def _examples(layout: Layout) -> Iterator[misreport.Example]:
    """Generates the examples. Raises UserError for options out of range."""
    options = layout.options
    if options["examples"] < 1:
        raise UserError(
            f"config.data.options.examples is {options['examples']}: must be at least 1"
        )
    if options["shift"] not in misreport.SHIFTS:
        raise UserError(
            f"config.data.options.shift is {options['shift']!r}: must be one of"
            f" {', '.join(misreport.SHIFTS)}"
        )
    return misreport.generate(options["examples"], options["seed"], options["shift"])
