"""Dictated sums: generated multi-stream data whose answers can be checked.

The user dictates a small calculation word by word, and sometimes takes back the last step. The
thought stream calculates at the same time. The output answers after the question mark:

    user     please take 7 then add 3 um subtract 4   no wait add 2    ?
    thought                     =7       +3       =10    -4   =6  undo-4 =10 +2 =12
    output                                                                      that makes 12 .

With the default visibility, another stream reads a word of row r in row r + 1, and can first react
to it in row r + 2. Every thought therefore starts `REACTION` rows after the word that it answers,
and the answer starts `REACTION` rows after the question mark. The number is the third word of the
answer, so that the output has read the last thought by then.

An example is a conversation: `converse` draws how many questions the user asks, and the silent rows
before, between and inside them. A model that has seen such silences answers whenever it is asked.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

REACTION = 2
LARGEST = 12  # running values stay within 0..LARGEST
OPERANDS = range(1, 5)  # few, so that a small model sees every sum often
CORRECTED = 0.35  # fraction of the examples in which the user takes back a step
QUESTION_END = "?"
ADD, SUBTRACT = ("add", "plus"), ("subtract", "minus")
OPENINGS = ((), (), ("please",), ("ok",), ("now", "please"))
FILLERS = ((), (), ("then",), ("now",), ("and",), ("um",), ("and", "then"), ("well", "now"))
BACK = "undo"  # begins the thought about a correction, e.g. undo-4
UNTIL_NEXT = 0.4  # fraction of the questions before which the user does not pause
HESITATIONS = 0.5  # fraction of the questions inside which the user pauses
HESITATION_ROWS = 5  # rows of the longest pause inside a question, and before the first one


class Dictation(NamedTuple):
    """One question and its answer."""

    question: list[str]  # the user's words, the last of them "?"
    thoughts: list[tuple[int, list[str]]]  # (index of the word that it answers, words)
    answer: list[str]  # the output's words


class Turn(NamedTuple):
    """A question of a conversation."""

    dictation: Dictation
    silence: list[int]  # silent rows before each word of the question, from the word before it on


def generate(count: int, seed: int) -> Iterator[Dictation]:
    """Yields `count` distinct questions, which depend on the seed alone."""
    return itertools.islice(_dictations(seed), count)


def converse(count: int, seed: int, questions: int = 1, silence: int = 0) -> Iterator[list[Turn]]:
    """Yields `count` conversations, in which no question occurs twice.

    Args:
      count: the number of conversations.
      seed: they depend on it and on the other arguments alone.
      questions: the most questions of a conversation. Each conversation draws its number.
      silence: the most rows in which the user pauses, in all of a conversation. How often and how
        long the user pauses before and inside questions is drawn. 0: the user never pauses.
    """
    rng = random.Random(f"conversations {seed}")
    dictations = _dictations(seed)
    for _ in range(count):
        asked = itertools.islice(dictations, _pick(rng, range(1, questions + 1)))
        conversation: list[Turn] = []
        left = silence
        for asked_next in asked:
            before = left if conversation else HESITATION_ROWS
            rows = _silence(rng, len(asked_next.question), before, left)
            conversation.append(Turn(asked_next, rows))
            left -= sum(rows)
        yield conversation


def _dictations(seed: int) -> Iterator[Dictation]:
    """Yields distinct questions without end."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while True:
        question = _question(rng)
        if question in seen:
            continue
        seen.add(question)
        words = question.split()
        thoughts, value = work_out(words)
        yield Dictation(words, thoughts, answer_words(value))


def _silence(rng: random.Random, words: int, before: int, most: int) -> list[int]:
    """Draws the silent rows before each word of a question, at most `most` in all.

    `before` is the longest pause before the question.
    """
    rows = [0] * words
    pauses = []  # (index of a word, the longest pause before it)
    if rng.random() >= UNTIL_NEXT:
        pauses.append((0, before))
    if rng.random() < HESITATIONS:
        pauses += [(_pick(rng, range(1, words)), HESITATION_ROWS) for _ in range(2)]
    for word, longest in pauses:
        longest = min(longest, most - sum(rows))
        if longest > 0:
            rows[word] += _log_uniform(rng, longest)
    return rows


def _log_uniform(rng: random.Random, longest: int) -> int:
    """Returns a random number from 1 to `longest`. Each power of two is about equally likely."""
    return min(int((longest + 1) ** rng.random()), longest)


def answer_words(value: int) -> list[str]:
    """Returns the words of the output for a result."""
    return ["that", "makes", str(value), "."]


def expected_answer(question: Sequence[str]) -> list[str]:
    """Returns the words of the correct answer to a question, for evaluation."""
    return answer_words(work_out(question)[1])


def work_out(question: Sequence[str]) -> tuple[list[tuple[int, list[str]]], int]:
    """Returns (thoughts, result) of a question.

    A thought is (index of the word that it answers, words).

    Raises ValueError if the words hold no calculation.
    """
    thoughts: list[tuple[int, list[str]]] = []
    values: list[int] = []  # after each step
    sign = 0
    for index, word in enumerate(question):
        if word in ADD + SUBTRACT:
            sign = 1 if word in ADD else -1
        elif word == "it":  # double it
            values.append(2 * values[-1])
            thoughts.append((index, ["*2", f"={values[-1]}"]))
        elif word == "wait":  # no wait
            # The thought names the step that it takes back, so that the value before that step
            # follows from the last value, however long the user paused since.
            values.pop()
            thoughts.append((index, [BACK + thoughts[-1][1][0], f"={values[-1]}"]))
        elif word.isdigit() and not values:
            values.append(int(word))
            thoughts.append((index, [f"={word}"]))
        elif word.isdigit():
            values.append(values[-1] + sign * int(word))
            thoughts.append((index, [f"{'+' if sign > 0 else '-'}{word}", f"={values[-1]}"]))
    if not values:
        raise ValueError(f"no calculation in {' '.join(question)!r}")
    return thoughts, values[-1]


def question_ends(tokens: np.ndarray, end_id: int) -> list[int]:
    """Returns the rows of the question marks (id `end_id`) in one stream's tokens [T].

    The stream is the user's or, in the single layout, the only one. In the single layout a question
    ends, and its thoughts begin, after the row of its question mark.
    """
    return np.flatnonzero(np.asarray(tokens) == end_id).tolist()


def _question(rng: random.Random) -> str:
    value = _pick(rng, range(1, 10))
    words = [*_pick(rng, OPENINGS), "take", str(value)]
    steps = 2 + int(rng.random() * 4)
    corrected = int(rng.random() * steps) if rng.random() < CORRECTED else -1
    for step in range(steps):
        said, after = _instruction(rng, value)
        words += [*_pick(rng, FILLERS), *said]
        if step == corrected:
            words += ["no", "wait"]
            said, after = _instruction(rng, value)
            words += said
        value = after
    return " ".join([*words, QUESTION_END])


def _instruction(rng: random.Random, value: int) -> tuple[list[str], int]:
    choices = [(sign, n) for sign in (1, -1) for n in OPERANDS if 0 <= value + sign * n <= LARGEST]
    if 0 < value <= LARGEST // 2 and rng.random() < 0.2:
        return ["double", "it"], 2 * value
    sign, n = _pick(rng, choices)
    return [_pick(rng, ADD if sign > 0 else SUBTRACT), str(n)], value + sign * n


def _pick(rng: random.Random, items: Sequence[Any]) -> Any:
    """Returns a random item.

    Of the methods of `random`, Python guarantees only random() to return the same numbers in every
    version.
    """
    return items[int(rng.random() * len(items))]
