"""Dictated sums: multi-stream data made by the project, with an answer that can be checked.

The user dictates a small calculation word by word and sometimes takes the last step back; the thought stream works
meanwhile; the output answers after the question mark:

    user     please take 7 then add 3 um subtract 4   no wait add 2    ?
    thought                     =7       +3       =10    -4   =6  undo =10 +2 =12
    output                                                                    that makes 12 .

With the default visibility a word of row r is read in row r + 1 by another stream, and first shows in what that
stream says in row r + 2: so every thought starts `REACTION` rows after the word that it answers, and the answer
`REACTION` rows after the question mark. The number is the answer's third word: by then its thought has been read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

REACTION = 2
LARGEST = 12  # running values stay within 0..LARGEST
OPERANDS = range(1, 5)  # few, so that a small model meets every sum often
CORRECTED = 0.35  # share of the examples in which the user takes a step back
QUESTION_END = "?"
ADD, SUBTRACT = ("add", "plus"), ("subtract", "minus")
OPENINGS = ((), (), ("please",), ("ok",), ("now", "please"))
FILLERS = ((), (), ("then",), ("now",), ("and",), ("um",), ("and", "then"), ("well", "now"))
BACK = "undo"


class Dictation(NamedTuple):
    """One example."""

    question: list[str]  # the user's words, the last of them "?"
    thoughts: list[tuple[int, list[str]]]  # (index of the word that it answers, words)
    answer: list[str]  # the output's words


def generate(count: int, seed: int) -> Iterator[Dictation]:
    """`count` different examples; the same ones for the same seed."""
    rng, seen = random.Random(seed), set()
    while len(seen) < count:
        question = _question(rng)
        if question in seen:
            continue
        seen.add(question)
        words = question.split()
        thoughts, value = work_out(words)
        yield Dictation(words, thoughts, answer_words(value))


def answer_words(value: int) -> list[str]:
    """What the output says."""
    return ["that", "makes", str(value), "."]


def expected_answer(question: Sequence[str]) -> list[str]:
    """The right answer to a question in words: what an evaluator compares with."""
    return answer_words(work_out(question)[1])


def work_out(question: Sequence[str]) -> tuple[list[tuple[int, list[str]]], int]:
    """The thoughts about a question, (index of the word answered, words) each, and its result.

    Raises ValueError where the words are no calculation of this kind.
    """
    thoughts, values, sign = [], [], 0
    for index, word in enumerate(question):
        if word in ADD + SUBTRACT:
            sign = 1 if word in ADD else -1
        elif word == "it":  # double it
            values.append(2 * values[-1])
            thoughts.append((index, ["*2", f"={values[-1]}"]))
        elif word == "wait":  # no wait
            values.pop()
            thoughts.append((index, [BACK, f"={values[-1]}"]))
        elif word.isdigit() and not values:
            values.append(int(word))
            thoughts.append((index, [f"={word}"]))
        elif word.isdigit():
            values.append(values[-1] + sign * int(word))
            thoughts.append((index, [f"{'+' if sign > 0 else '-'}{word}", f"={values[-1]}"]))
    if not values:
        raise ValueError(f"no calculation in {' '.join(question)!r}")
    return thoughts, values[-1]


def question_end(tokens: np.ndarray, end_id: int) -> int:
    """The row of the question mark (id `end_id`) in one stream's tokens [T]: the user's, or the single layout's text.

    In the single layout the rows up to and including it are the prompt. -1: there is none.
    """
    rows = np.flatnonzero(np.asarray(tokens) == end_id)
    return int(rows[0]) if len(rows) else -1


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


def _pick(rng: random.Random, items: Sequence):
    """An item; of `random`'s methods only random() is promised to give the same numbers in every Python."""
    return items[int(rng.random() * len(items))]
