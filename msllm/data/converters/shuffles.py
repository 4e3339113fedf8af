"""Shuffled cards (msllm/data/shuffles.py), which msllm generates, in three streams."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from msllm.data import shuffles
from msllm.data.converters.layout import MAX_WEIGHT, Layout
from msllm.data.dictation import REACTION
from msllm.data.sources import Part
from msllm.data.tables import Placement, Table
from msllm.errors import UserError

# The arguments of `shuffles.generate`; `examples` is its `count`. `emphasis` is the loss weight of
# the cells in which thought and output can first react to a question.
OPTIONS = {
    "examples": 20_000,
    "seed": 0,
    "cards": 16,
    "moves": [2],
    "steps": 7,
    "choices": [1, 4, 16],
    "silence": 16,
    "questions": 3,
    "emphasis": 1.0,
}


def convert(layout: Layout, part: Part | None) -> Iterator[Table]:
    """Generates examples in the streams user, thought and output."""
    del part  # reads no files
    options = dict(layout.options)
    _check(options)
    emphasis = options.pop("emphasis")
    for example in shuffles.generate(options.pop("examples"), options.pop("seed"), **options):
        yield place(layout, example, emphasis)


def place(layout: Layout, example: shuffles.Example, emphasis: float = 1.0) -> Table:
    """Returns the table of an example.

    The thought's cells in rows in which it is held have the loss weight 0. Those in which thought
    and output can first react to a question have the weight `emphasis`.
    """
    said = shuffles.play(example)
    index = {name: layout.spec.index(name) for name in ("user", "thought", "output")}
    placements: list[Placement] = []
    for name, stream in index.items():
        placements += [layout.say_words(stream, row, [word]) for row, word in getattr(said, name)]
    key = " ".join(word for _, word in said.user)
    table = layout.table(placements, f"{key} {example.silence} {example.held}")
    weights = np.ones(table.tokens.shape, np.float32)
    reactions = [end + REACTION for end in example.question_ends]
    for name in ("thought", "output"):
        weights[reactions, index[name]] = emphasis
    weights[said.held.start : said.held.stop, index["thought"]] = 0
    return table._replace(weights=None if (weights == 1).all() else weights)


def _check(options: dict) -> None:
    """Raises UserError for an option out of range."""
    for option in ("examples", "steps", "silence", "questions"):
        least = 0 if option == "silence" else 1
        if options[option] < least:
            raise UserError(
                f"config.data.options.{option} is {options[option]}: must be at least {least}"
            )
    if not 0 <= options["emphasis"] <= MAX_WEIGHT:
        raise UserError(
            f"config.data.options.emphasis is {options['emphasis']}: must be from 0 to"
            f" {MAX_WEIGHT}, a loss weight"
        )
    cards, choices = options["cards"], options["choices"]
    if cards not in range(4, len(shuffles.LETTERS), 4):
        raise UserError(
            f"config.data.options.cards is {cards}: must be a multiple of 4 from 4 to"
            f" {len(shuffles.LETTERS) // 4 * 4}"
        )
    moves = options["moves"]
    if not moves or not all(type(told) is int and told >= 1 for told in moves):
        raise UserError(
            f"config.data.options.moves is {moves}: must be a list of numbers from 1 on"
        )
    if not choices or not all(type(m) is int and 1 <= m <= cards for m in choices):
        raise UserError(
            f"config.data.options.choices is {choices}: must be a list of numbers from 1 to"
            f" {cards}, the number of cards"
        )
