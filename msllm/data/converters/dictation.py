"""Dictated sums (msllm/data/dictation.py), which msllm generates, in three streams or in one."""

from __future__ import annotations

from collections.abc import Iterator

from msllm.data import dictation
from msllm.data.converters.layout import Layout, require_one_stream
from msllm.data.sources import Part
from msllm.data.tables import Table

OPTIONS = {"examples": 20_000, "seed": 0}


def convert(layout: Layout, part: Part | None) -> Iterator[Table]:
    """Generates examples in the streams user, thought and output."""
    del part  # reads no files
    user, thought, output = map(layout.spec.index, ("user", "thought", "output"))
    for example in dictation.generate(layout.options["examples"], layout.options["seed"]):
        placements, free = [layout.say_words(user, 0, example.question)], 0
        for index, words in example.thoughts:
            start = max(index + dictation.REACTION, free)  # not before the last thought has ended
            placements.append(layout.say_words(thought, start, words))
            free = placements[-1].end
        # The number is the third word of the answer. It comes REACTION rows after the end of its
        # thought, whose last row is `free - 1`.
        start = max(len(example.question) - 1 + dictation.REACTION, free - 1)
        placements.append(layout.say_words(output, start, example.answer))
        yield layout.table(placements, " ".join(example.question))


def convert_single(layout: Layout, part: Part | None) -> Iterator[Table]:
    """Generates examples in one stream: the question, then all thoughts, then the answer."""
    del part  # reads no files
    require_one_stream(layout, "dictation_single")
    for example in dictation.generate(layout.options["examples"], layout.options["seed"]):
        thoughts = [word for _, thought in example.thoughts for word in thought]
        words = [*example.question, *thoughts, *example.answer]
        yield layout.table([layout.say_words(0, 0, words)], " ".join(example.question))
