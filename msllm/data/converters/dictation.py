"""Dictated sums (msllm/data/dictation.py), which msllm generates, in three streams or in one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from msllm.data import dictation
from msllm.data.converters.layout import MAX_CLOSING_ROWS, Layout, require_one_stream
from msllm.data.sources import Part
from msllm.data.tables import Placement, Table
from msllm.errors import UserError

CLOSING_ROWS = dictation.REACTION + 4 + MAX_CLOSING_ROWS  # the answer to the last question

# `questions` and `silence` are those of `dictation.converse`.
OPTIONS = {"examples": 20_000, "seed": 0, "questions": 1, "silence": 0}


def convert(layout: Layout, part: Part | None) -> Iterator[Table]:
    """Generates conversations in the streams user, thought and output."""
    del part  # reads no files
    user, thought, output = map(layout.spec.index, ("user", "thought", "output"))
    for conversation in _conversations(layout):
        placements: list[Placement] = []
        row = 0  # the next free row of the user
        thought_free = output_free = 0
        for (question, thoughts, answer), silence in conversation:
            if placements and row + len(question) + sum(silence) + CLOSING_ROWS > layout.rows:
                break  # leave out the questions that do not fit
            rows = []  # of the words of the question
            for pause, word in zip(silence, question):
                rows.append(row + pause)
                placements.append(layout.say_words(user, rows[-1], [word]))
                row = rows[-1] + 1
            for index, words in thoughts:
                # Not before the last thought has ended.
                start = max(rows[index] + dictation.REACTION, thought_free)
                placements.append(layout.say_words(thought, start, words))
                thought_free = placements[-1].end
            # The number is the third word of the answer. It comes REACTION rows after the end of
            # its thought, whose last row is `thought_free - 1`.
            start = max(rows[-1] + dictation.REACTION, thought_free - 1, output_free)
            placements.append(layout.say_words(output, start, answer))
            output_free = placements[-1].end
        yield layout.table(placements, _key(conversation))


def convert_single(layout: Layout, part: Part | None) -> Iterator[Table]:
    """Generates the same conversations in one stream, without the user's pauses.

    Each question is followed by all of its thoughts and its answer.
    """
    del part  # reads no files
    require_one_stream(layout, "dictation_single")
    for conversation in _conversations(layout):
        words: list[str] = []
        for (question, thoughts, answer), _ in conversation:
            words += [*question, *itertools.chain(*(said for _, said in thoughts)), *answer]
        yield layout.table([layout.say_words(0, 0, words)], _key(conversation))


def _conversations(layout: Layout) -> Iterator[list[dictation.Turn]]:
    """Generates the conversations. Raises UserError for options out of range."""
    for option, least in (("examples", 1), ("questions", 1), ("silence", 0)):
        if layout.options[option] < least:
            raise UserError(
                f"config.data.options.{option} is {layout.options[option]}: must be at least"
                f" {least}"
            )
    options = layout.options
    return dictation.converse(
        options["examples"], options["seed"], options["questions"], options["silence"]
    )


def _key(conversation: list[dictation.Turn]) -> str:
    """Returns what identifies a conversation: the words of the user."""
    return " ".join(word for turn in conversation for word in turn.dictation.question)
