"""Shuffled cards: the thought may work while the user is silent.

The user tells how a pack of cards is shuffled, says which cards the questions may be about, and is
silent for a while. A question names the place of a card before the shuffle, and the answer is its
place after it. The moves that the user tells are made in turn, `steps` times in all. The thought
follows a card through one step a row. With 8 cards, 2 moves and 3 steps:

    user     flip1 cut2 soon 2 c                        ask d
    thought                        c0 f1 a2 h3 d0 e1 h2 a3
    output                                                      a .

"flip1 cut2" are the first and the second move, and "soon 2 c" announces that all questions are
about the two cards from c on, in alphabetical order. With one such card the question is certain.
The thought uses the silence to follow these cards in order, and "c0 f1 a2 h3" means that the card
at c is at f after the first step, then at a, and in the end at h.

The thought and the output react `REACTION` rows after what they read, as in
`msllm.data.dictation`. When a question comes while the thought follows a card, the thought goes on
if the question is about this card, and otherwise drops it. It follows the card of the question,
unless it has done so before. The output answers as soon as it has read the question and the last
place of the card. After the first question the thought follows no card that is not asked for.

The thought may be kept silent for some rows, although the user is silent (`Example.held`). Such
examples have no loss there. They show the model what to do if it could not think ahead.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from msllm.data.dictation import REACTION

LETTERS = string.ascii_lowercase
# {move: the place to which it takes the card at place i of n}; n is a multiple of 4.
MOVES: Mapping[str, Callable[[int, int], int]] = MappingProxyType(
    {
        "cut": lambda i, n: (i + n // 4 + 1) % n,
        "flip": lambda i, n: n - 1 - i,
        "swap": lambda i, n: i ^ 1,  # each pair of neighbours
        "fold": lambda i, n: n // 2 - 1 - i if i < n // 2 else i,  # the first half, turned over
        "riffle": lambda i, n: 2 * i % n + (2 * i >= n),  # the halves, card by card
        "deal": lambda i, n: i % 4 * (n // 4) + i // 4,  # into four piles
    }
)
QUESTION_ROWS = 2  # ask, card
ANSWER_ROWS = 2  # place, full stop
LEFT_ALONE = 0.5  # fraction of the examples in which the thought may speak from the first row on
KEPT_SILENT = 0.25  # fraction of the examples in which it may not speak before the question
PATIENCE = 6  # the most rows by which a later question waits longer than it has to

Said = list[tuple[int, str]]  # (row, word), in order


class Example(NamedTuple):
    """What the user says, and how long the thought is kept silent.

    Attributes:
      moves: the names of the moves that the user tells.
      steps: the number of moves that are made, in turn: after the last one the first one again.
      cards: the number of cards. A card is called after its place before the shuffle.
      first: the first card that the questions may be about.
      choices: the number of cards that they may be about.
      asked: the card of each question.
      silence: for each question, the silent rows before it. They are counted from the end of the
        announcement, or of the question before.
      held: the rows in which the thought is kept silent, from the first one in which it could
        speak on. `held_to_the_question` is the number of all rows until it has read the question.
    """

    moves: tuple[str, ...]
    steps: int
    cards: int
    first: str
    choices: int
    asked: tuple[str, ...]
    silence: tuple[int, ...]
    held: int = 0

    @property
    def announced(self) -> int:
        """The last row of the announcement."""
        return len(self.moves) + 2

    @property
    def held_to_the_question(self) -> int:
        """The value of `held` with which the thought says nothing before it has read a question."""
        return self.silence[0] + QUESTION_ROWS

    @property
    def question_ends(self) -> list[int]:
        """The row of the last word of each question."""
        ends, row = [], self.announced
        for silence in self.silence:
            row += silence + QUESTION_ROWS
            ends.append(row)
        return ends

    @property
    def candidates(self) -> list[str]:
        """The cards that the questions may be about. a comes after the last card."""
        start = LETTERS.index(self.first)
        return [LETTERS[(start + i) % self.cards] for i in range(self.choices)]

    def follow(self, card: str) -> list[str]:
        """The words of the thought about a card: its place before the shuffle and after each step.

        A word is a place and the number of the step, such as h1.
        """
        place = LETTERS.index(card)
        words = [f"{card}0"]
        for number in range(1, self.steps + 1):
            move = self.moves[(number - 1) % len(self.moves)]
            place = MOVES[move](place, self.cards)
            words.append(f"{LETTERS[place]}{number}")
        return words

    def answer(self, card: str) -> list[str]:
        """The words of the answer to a question about a card."""
        return [self.follow(card)[-1][0], "."]


class Play(NamedTuple):
    """What is said in an example, and in which rows the thought is kept silent."""

    user: Said
    thought: Said
    output: Said
    held: range


def longest_answer(steps: int) -> int:
    """The rows from the end of a question to that of its answer, if nothing was thought ahead."""
    return REACTION + steps + REACTION + ANSWER_ROWS - 1


def generate(
    count: int,
    seed: int,
    *,
    cards: int = 16,
    moves: Sequence[int] = (2,),
    steps: int = 7,
    choices: Sequence[int] = (1, 4, 16),
    silence: int = 16,
    questions: int = 3,
) -> Iterator[Example]:
    """Yields `count` examples, which depend on the arguments alone.

    Args:
      count: the number of examples.
      seed: of the random choices.
      cards: the number of cards, a multiple of 4.
      moves: the numbers of moves that the user tells; each example draws one.
      steps: the number of moves that are made.
      choices: the numbers of cards that the questions may be about; each example draws one.
      silence: the most silent rows between the announcement and the first question.
      questions: the most questions of an example. Each example draws its number.
    """
    rng = random.Random(f"shuffles {seed}")

    def below(number: int) -> int:
        """A random number in 0 .. number - 1 that is the same in every version of Python."""
        return int(rng.random() * number)

    names = list(MOVES)
    for _ in range(count):
        told = tuple(names[below(len(names))] for _ in range(moves[below(len(moves))]))
        first, about = LETTERS[below(cards)], choices[below(len(choices))]
        drawn = Example(told, steps, cards, first, about, (), ())
        asked, silences = [], []
        for number in range(1 + below(questions)):
            asked.append(drawn.candidates[below(about)])
            silences.append(
                longest_answer(steps) + below(PATIENCE + 1) if number else below(silence + 1)
            )
        example = drawn._replace(asked=tuple(asked), silence=tuple(silences))
        kind, most = rng.random(), example.held_to_the_question
        if kind >= LEFT_ALONE + KEPT_SILENT:
            example = example._replace(held=1 + below(most))
        elif kind >= LEFT_ALONE:
            example = example._replace(held=most)
        yield example


def user_words(example: Example) -> Said:
    """What the user says."""
    words = [f"{move}{number}" for number, move in enumerate(example.moves, 1)]
    said = list(enumerate([*words, "soon", str(example.choices), example.first]))
    for end, card in zip(example.question_ends, example.asked, strict=True):
        said += [(end - 1, "ask"), (end, card)]
    return said


def play(example: Example) -> Play:
    """Works out what the thought and the output say in an example."""
    thought: Said = []
    output: Said = []
    ends: dict[str, int] = {}  # the row in which the thought has followed a card to the end
    start = example.announced + REACTION
    row = start + example.held
    stop = example.question_ends[0] + REACTION  # the thought has read the first question
    held = range(start, min(row, stop))
    for card in example.candidates:
        if row >= stop:
            break
        words = example.follow(card)
        if card != example.asked[0]:
            words = words[: stop - row]  # dropped, unless it ends in time
        thought += enumerate(words, row)
        row += len(words)
        if len(words) == example.steps + 1:
            ends[card] = row - 1
    for end, card in zip(example.question_ends, example.asked, strict=True):
        if card not in ends:
            thought += enumerate(example.follow(card), end + REACTION)
            ends[card] = end + REACTION + example.steps
        output += enumerate(example.answer(card), max(end, ends[card]) + REACTION)
    return Play(user_words(example), thought, output, held)
