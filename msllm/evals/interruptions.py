"""Interruptions: does the output follow a user who corrects the question, and how soon?

The model gets each held-out dictation with a correction twice. The first time, the user's column is
known beforehand. The second time, a live session is fed word by word, as a user would type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from msllm.data.dictation import BACK, REACTION, expected_answer
from msllm.decode.engine import FREE, Engine, generate
from msllm.errors import UserError
from msllm.evals.exact_match import Case, forced_tables, streams_case
from msllm.evals.held_out import examples as held_out_examples
from msllm.evals.held_out import open_split
from msllm.weights.load import LoadedModel

BATCH = 64  # sessions that are decoded together
LAST = "wait"  # the last word of a correction


@dataclasses.dataclass(frozen=True)
class Reactions:
    """The reactions to corrections. Rows are counted from the user's "wait".

    Attributes:
      cases: number of questions.
      followed: share whose output is exactly the answer to the corrected question.
      ignored: share whose output is the answer to the question without the correction.
      noticed: share whose thought stream takes a step back after the correction.
      rows_to_notice: median number of rows until the step back; None if there is none.
      most_rows_to_notice: the largest number of rows until the step back; 0 if there is none.
    """

    cases: int
    followed: float
    ignored: float
    noticed: float
    rows_to_notice: float | None
    most_rows_to_notice: int


@dataclasses.dataclass(frozen=True)
class Interruptions:
    """The reactions if the user's column is known beforehand, and in live sessions."""

    table: Reactions
    live: Reactions


def evaluate(model: LoadedModel, data: str = "", examples: int = 500) -> Interruptions:
    """Gives a model held-out questions with a correction.

    Args:
      model: a model that was trained on dictations in several streams.
      data: the prepared directory. Empty: the one that the model was trained on.
      examples: the most questions to use.

    Raises UserError if the model was not trained on dictations, or if the data holds no question
    with a correction.
    """
    converter = model.run_config.data.converter if model.run_config else ""
    if converter != "dictation":
        raise UserError(
            f"the checkpoint's data.converter is {converter!r}: must be 'dictation'; evaluate a"
            " model that was trained on dictations"
        )
    cases = _corrected(model, data, examples)
    if not cases:
        raise UserError("no held-out question has a correction: prepare more examples")
    rows = max(case.rows for case in cases)

    def reactions(read: Callable[..., Iterator[np.ndarray]]) -> Reactions:
        tables = read(model, cases, rows)
        verdicts = [v for table, case in zip(tables, cases) for v in judge(table, case, model)]
        return _summarize(verdicts[:examples])

    return Interruptions(table=reactions(_given), live=reactions(_live))


def describe(result: Interruptions) -> str:
    """The result as lines of text."""
    lines = [f"{result.table.cases} held-out questions with a correction"]
    for name, found in (("table", result.table), ("live", result.live)):
        line = (
            f"{name:5}  output follows it {found.followed:.1%}, ignores it {found.ignored:.1%};"
            f" noticed {found.noticed:.1%}"
        )
        if found.rows_to_notice is not None:
            line += f", after {found.rows_to_notice:g} rows (at most {found.most_rows_to_notice})"
        lines.append(line)
    return "\n".join(lines)


class Verdict(NamedTuple):
    """The reaction to one correction, as in `Reactions`.

    `rows_to_notice` is None if the thought stream did not take a step back.
    """

    followed: bool
    ignored: bool
    rows_to_notice: int | None


def judge(table: np.ndarray, case: Case, model: LoadedModel) -> list[Verdict]:
    """The reactions to the corrections of a case, in a table [T, S] of tokens."""
    tokenizer, kinds = model.require_tokenizer(), model.streams.kinds
    user, thought, output = (table[:, kinds.index(kind)] for kind in ("input", "thought", "output"))
    words = {int(token): tokenizer.decode([int(token)]) for token in np.unique(thought)}
    backs = [token for token, word in words.items() if word.strip().startswith(BACK)]
    step_back = np.flatnonzero(np.isin(thought, backs))
    verdicts = []
    start = 0  # of the question
    for number, turn in enumerate(case.turns):
        rows = slice(start, turn.end + 1)
        start = rows.stop
        waits = np.flatnonzero(user[rows] == tokenizer.encode(LAST)[0]) + rows.start
        if not len(waits):
            continue
        wait = int(waits[0])
        said = tokenizer.decode(output[case.rows_of(number)]).split()
        noticed = step_back[(step_back > wait) & (step_back <= turn.end + REACTION)]
        verdicts.append(
            Verdict(
                followed=said == tokenizer.decode(turn.answer[0]).split(),
                ignored=said == _answer_without_correction(tokenizer.decode(user[rows]).split()),
                rows_to_notice=int(noticed[0]) - wait if len(noticed) else None,
            )
        )
    return verdicts


def _answer_without_correction(words: Sequence[str]) -> list[str] | None:
    """The answer to the question without "no wait" and the instruction after it.

    Returns None if that is also the answer to the corrected question.
    """
    at = words.index(LAST)
    without = [*words[: at - 1], *words[at + 3 :]]  # an instruction has two words
    answer = expected_answer(without)
    return answer if answer != expected_answer(words) else None


def _corrected(model: LoadedModel, data: str, examples: int) -> list[Case]:
    """Held-out examples that hold corrections, with at least `examples` of them if there are."""
    wait = model.require_tokenizer().encode(LAST)[0]
    cases, corrections = [], 0
    for table in held_out_examples(open_split(model, data)):
        if corrections >= examples:
            break
        found = int((table.tokens == wait).sum())
        if found:
            cases.append(streams_case(table, model))
            corrections += found
    return cases


def _given(model: LoadedModel, cases: Sequence[Case], rows: int) -> Iterator[np.ndarray]:
    """Generated tables [rows, S] in which the user's column was known beforehand."""
    for start in range(0, len(cases), BATCH):
        part = cases[start : start + BATCH]
        forced = forced_tables(part, model, rows, BATCH)
        yield from generate(model, rows, forced=forced, batch=BATCH).shown[: len(part)]


def _live(model: LoadedModel, cases: Sequence[Case], rows: int) -> Iterator[np.ndarray]:
    """Tables [rows, S] of live sessions, as the model read them.

    Each session is fed a word of the user when it reaches the word's row.
    """
    user = model.streams.kinds.index("input")
    silence = model.require_tokenizer().silence_id
    engine = Engine(model, sessions=min(BATCH, len(cases)), window=rows)
    for start in range(0, len(cases), BATCH):
        part = cases[start : start + BATCH]
        sessions = [engine.open() for _ in part]
        for row in range(rows):
            for session, case in zip(sessions, part):
                if row < len(case.prompt) and case.prompt[row, user] not in (silence, FREE):
                    session.feed(user, [int(case.prompt[row, user])])
            engine.step(sessions)
        for session in sessions:
            yield session.transcript().tokens
            session.close()


def _summarize(verdicts: Sequence[Verdict]) -> Reactions:
    noticed = [v.rows_to_notice for v in verdicts if v.rows_to_notice is not None]
    return Reactions(
        cases=len(verdicts),
        followed=float(np.mean([v.followed for v in verdicts])),
        ignored=float(np.mean([v.ignored for v in verdicts])),
        noticed=len(noticed) / len(verdicts),
        rows_to_notice=float(np.median(noticed)) if noticed else None,
        most_rows_to_notice=max(noticed, default=0),
    )
