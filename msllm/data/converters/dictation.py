"""Dictated sums (msllm/data/dictation.py), which the project makes itself: in three streams, or in one."""

from __future__ import annotations

from collections.abc import Iterator

from msllm.data import dictation
from msllm.data.converters.layout import Layout, one_stream
from msllm.data.sources import Part
from msllm.data.tables import Table

OPTIONS = {"examples": 20_000, "seed": 0}


def convert(layout: Layout, part: Part | None) -> Iterator[Table]:
    """In the streams user, thought and output."""
    del part  # generated
    user, thought, output = map(layout.spec.index, ("user", "thought", "output"))
    for example in dictation.generate(layout.options["examples"], layout.options["seed"]):
        placements, free = [layout.say_words(user, 0, example.question)], 0
        for word, said in example.thoughts:
            start = max(
                word + dictation.REACTION, free
            )  # wait while the thought before it is still being said
            placements.append(layout.say_words(thought, start, said))
            free = placements[-1].end
        # The number, third word of the answer, comes REACTION rows after its thought, which ends in row `free - 1`.
        start = max(len(example.question) - 1 + dictation.REACTION, free - 1)
        placements.append(layout.say_words(output, start, example.answer))
        yield layout.table(placements, " ".join(example.question))


def convert_single(layout: Layout, part: Part | None) -> Iterator[Table]:
    """In one stream: the whole question, then all thoughts, then the answer."""
    del part  # generated
    one_stream(layout, "dictation_single")
    for example in dictation.generate(layout.options["examples"], layout.options["seed"]):
        thoughts = [word for _, said in example.thoughts for word in said]
        words = [*example.question, *thoughts, *example.answer]
        yield layout.table([layout.say_words(0, 0, words)], " ".join(example.question))
