"""Held-out dictations in which the user takes a step back midway: whether the output follows, and how soon it is noticed.

Each question comes to the model twice: as a column that is known beforehand, and word by word through a live session,
as a user would type it. The output follows if it says exactly the answer to the question as it was corrected; it ignores
the correction if it says the answer to the question without it. The correction is noticed when a thought takes the step
back; rows are counted from the user's "wait".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from msllm.data.dictation import BACK, expected_answer
from msllm.data.tables import unpack
from msllm.decode.engine import Engine, generate
from msllm.errors import UserError
from msllm.evals.exact_match import SLACK, Case, open_data, streams_case
from msllm.weights.load import LoadedModel

BATCH = 64  # sessions at a time
FIRST, LAST = "no", "wait"  # the words that take a step back


class Verdict(NamedTuple):
    """What became of one question."""

    followed: bool
    ignored: bool
    rows_to_notice: int | None  # None: no thought took the step back


def interruptions(
    loaded: LoadedModel, data: str = "", examples: int = 500
) -> dict[str, dict[str, float | int]]:
    """{"table": figures, "live": figures} of at most `examples` held-out questions with a correction.

    Figures: cases; followed and ignored, shares of them; noticed, the share in which a thought takes the step back, and
    rows_to_notice, median and highest over these. Raises UserError where the data are no dictations in streams.
    """
    converter = loaded.run_config.data.converter if loaded.run_config else ""
    if converter != "dictation":
        raise UserError(f"the checkpoint's data.converter is {converter!r}: must be 'dictation'")
    cases = list(_corrected(loaded, data, examples))
    if not cases:
        raise UserError("no held-out question has a correction: prepare more examples")
    model = loaded
    rows = max(len(case.prompt) for case in cases) + SLACK
    return {
        "table": _figures(
            [judge(table, case, model) for table, case in zip(_given(model, cases, rows), cases)]
        ),
        "live": _figures(
            [judge(table, case, model) for table, case in zip(_live(model, cases, rows), cases)]
        ),
    }


def judge(table: np.ndarray, case: Case, model: LoadedModel) -> Verdict:
    """What a table [T, S] says to a case."""
    encode, silence = model.tokenizer.encode, model.tokenizer.silence_id
    user, thought, output = (
        table[:, model.streams.kinds.index(kind)] for kind in ("input", "thought", "output")
    )
    said = model.tokenizer.decode(output[output != silence].tolist()).split()
    words = model.tokenizer.decode(user[user != silence].tolist()).split()
    wait = int(np.flatnonzero(user == encode(LAST)[0])[0])
    noticed = np.flatnonzero((thought == encode(BACK)[0]) & (np.arange(len(table)) > wait))
    return Verdict(
        said == model.tokenizer.decode(case.answer[0]).split(),
        said == _answer_without_correction(words),
        int(noticed[0]) - wait if len(noticed) else None,
    )


def _answer_without_correction(words: Sequence[str]) -> list[str] | None:
    """The answer if "no wait" and the instruction after it had not been said; None: it is the same."""
    at = words.index(LAST)
    without = [*words[: at - 1], *words[at + 3 :]]  # an instruction has two words
    answer = expected_answer(without)
    return answer if answer != expected_answer(words) else None


def _corrected(loaded: LoadedModel, data: str, examples: int) -> Iterator[Case]:
    """The held-out questions that hold a correction."""
    loader, found = open_data(loaded, data), 0
    first, last = (loaded.tokenizer.encode(word)[0] for word in (FIRST, LAST))
    for step in range(loader.num_batches):
        for table in unpack(loader.batch(step)):
            case = streams_case(table, loaded)
            if {first, last} <= set(case.prompt.ravel().tolist()) and found < examples:
                found += 1
                yield case


def _given(model: LoadedModel, cases: Sequence[Case], rows: int) -> Iterator[np.ndarray]:
    """Tables in which the user's column was known beforehand."""
    silence, inputs = model.tokenizer.silence_id, np.array(model.streams.kinds) == "input"
    for i in range(0, len(cases), BATCH):
        some = cases[i : i + BATCH]
        forced = np.where(inputs, silence, -1) * np.ones(
            (BATCH, rows, 1), int
        )  # one shape: decoding compiles once
        for table, case in zip(forced, some):
            table[: len(case.prompt)] = case.prompt
        forced[:, 0] = np.where(forced[:, 0] < 0, silence, forced[:, 0])
        yield from generate(model, rows, forced=forced, batch=BATCH).shown[: len(some)]


def _live(model: LoadedModel, cases: Sequence[Case], rows: int) -> Iterator[np.ndarray]:
    """Tables of live sessions that were fed each word when its row came, as they were read."""
    user, silence = model.streams.kinds.index("input"), model.tokenizer.silence_id
    engine = Engine(model, sessions=min(BATCH, len(cases)), window=rows)
    for i in range(0, len(cases), BATCH):
        some = cases[i : i + BATCH]
        sessions = [engine.open() for _ in some]
        for row in range(rows):
            for session, case in zip(sessions, some):
                if row < len(case.prompt) and case.prompt[row, user] != silence:
                    session.feed(user, [int(case.prompt[row, user])])
            engine.step(sessions)
        for session in sessions:
            yield session.transcript().tokens
            session.close()


def _figures(verdicts: Sequence[Verdict]) -> dict[str, float | int]:
    noticed = [v.rows_to_notice for v in verdicts if v.rows_to_notice is not None]

    def share(values):
        return float(np.mean(list(values)))

    return {
        "cases": len(verdicts),
        "followed": share(v.followed for v in verdicts),
        "ignored": share(v.ignored for v in verdicts),
        "noticed": len(noticed) / len(verdicts),
        "rows_to_notice": float(np.median(noticed)) if noticed else float("nan"),
        "most_rows_to_notice": max(noticed, default=0),
    }


def describe(result: dict[str, dict[str, float | int]]) -> str:
    """The result of `interruptions` as lines of text."""
    lines = [f"{result['table']['cases']} held-out questions with a correction"]
    for name, figures in result.items():
        lines.append(
            f"{name:5}  output follows it {figures['followed']:.1%}, ignores it "
            f"{figures['ignored']:.1%}; noticed {figures['noticed']:.1%}, after "
            f"{figures['rows_to_notice']:g} rows (at most {figures['most_rows_to_notice']})"
        )
    return "\n".join(lines)
