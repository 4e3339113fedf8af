"""Votes: several sampled runs of a session, of which the majority decides.

The runs are forks with seeds of their own, so their thoughts differ. Either each run gives its own
answer and the most frequent one wins (self-consistency, Wang et al. 2022, arXiv 2203.11171), or the
runs agree on each token of the output streams and go on with it. `streams.combine` in contrast
combines streams inside of a model, and is trained.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from msllm.combine import VOTED
from msllm.decode.engine import Session
from msllm.decode.script import DecodeOptions, Row, check_number
from msllm.errors import UserError
from msllm.streams import StreamSpec


class Voted(NamedTuple):
    """The result of a vote.

    Attributes:
      session: the run that won, which goes on from its last row. All others are closed.
      rows: its rows.
      votes: the number of runs with the same answer.
      answers: what the streams said in each run: the tokens of each stream, without silence.
    """

    session: Session
    rows: list[Row]
    votes: int
    answers: list[tuple[tuple[int, ...], ...]]


def vote(
    session: Session,
    rows: int,
    votes: int,
    about: str = "answers",
    streams: Sequence[str] = (),
) -> Voted:
    """Runs forks of a session, and returns the one whose answer has the most votes.

    The session itself stays as it is. A tie is won by the fork that was opened first, so the result
    depends on the seed of the session's options only.

    Args:
      session: a session that samples: the temperature of its generated streams is not 0.
      rows: the rows of each run.
      votes: the number of runs. The engine needs a free slot for each.
      about: answers: the majority of the streams' tokens in all rows together. tokens: in each row,
        the streams say the most frequent token of all runs, so that all runs answer the same.
      streams: the streams that the vote is about. Empty: all outputs.

    Raises UserError.
    """
    engine = session._engine
    check_number("votes", votes, int, "[1, 2147483648)")
    check_number("rows", rows, int, "[1, 2147483648)")
    check_about(about)
    check_samples(session.options, votes)
    chosen = streams_of_vote(engine.streams, streams)
    if engine.free < votes:
        raise UserError(
            f"votes is {votes}: the engine has {engine.free} free sessions; close some, or make an"
            " engine with more"
        )
    forks: list[Session] = []
    try:
        forks += (session.fork(seed) for seed in seeds(session.options.seed, votes))
        found = run_groups([forks], rows, chosen, about)[0]
    except BaseException:
        for fork in forks:
            fork.close()
        raise
    silence = engine.silence_id
    answers = [answer_of(of_run, chosen, silence) for of_run in found]
    winner, count = elect(answers)
    for number, fork in enumerate(forks):
        if number != winner:
            fork.close()
    return Voted(forks[winner], found[winner], count, answers)


def run_groups(
    groups: Sequence[Sequence[Session]], rows: int, streams: Sequence[int], about: str
) -> list[list[list[Row]]]:
    """Advances groups of sessions of one engine. With `tokens`, each group agrees row by row.

    Args:
      groups: the runs of each vote.
      rows: the number of rows.
      streams: the streams that the votes are about.
      about: one of VOTED.

    Returns: for each group and each of its sessions, the rows.
    """
    sessions = [session for group in groups for session in group]
    engine = sessions[0]._engine
    if about == "answers":
        of_sessions = dict(zip(sessions, engine.run(rows, sessions)))
        return [[of_sessions[session] for session in group] for group in groups]
    shown: dict[Session, list[Row]] = {session: [] for session in sessions}
    for _ in range(rows):
        last = dict(zip(sessions, engine.step(sessions)))
        for group in groups:
            agreed = _agree([last[session] for session in group], streams)
            for session in group:
                shown[session].append(session._amend(last[session], agreed))
    return [[shown[session] for session in group] for group in groups]


def _agree(rows: Sequence[Row], streams: Sequence[int]) -> dict[int, int]:
    """{stream: the most frequent token} of the present cells."""
    return {
        s: int(rows[elect([int(row.tokens[s]) for row in rows])[0]].tokens[s])
        for s in streams
        if rows[0].present[s]
    }


def elect(answers: Sequence[Hashable]) -> tuple[int, int]:
    """(the first run with the most frequent answer, how many runs gave it)."""
    counts = collections.Counter(answers)
    winner = max(range(len(answers)), key=lambda number: counts[answers[number]])
    return winner, counts[answers[winner]]


def answer_of(
    rows: Sequence[Row], streams: Sequence[int], silence: int | None
) -> tuple[tuple[int, ...], ...]:
    """The tokens of some streams in some rows, without silence."""
    return tuple(
        tuple(int(r.tokens[s]) for r in rows if r.present[s] and r.tokens[s] != silence)
        for s in streams
    )


def seeds(seed: int, votes: int) -> list[int]:
    """The seed of each run."""
    return [
        int(np.random.SeedSequence((seed % (1 << 32), number)).generate_state(1)[0])
        for number in range(votes)
    ]


def streams_of_vote(streams: StreamSpec, names: Sequence[str]) -> list[int]:
    """The indices of the streams that a vote is about. Raises UserError if one is an input."""
    chosen = [streams.index(name) for name in names]
    chosen = chosen or [s for s, kind in enumerate(streams.kinds) if kind == "output"]
    inputs = [streams.names[s] for s in chosen if streams.kinds[s] == "input"]
    if inputs:
        raise UserError(
            f"the vote is about {inputs[0]!r}, which is an input: name streams that the model"
            " generates"
        )
    if not chosen:
        raise UserError(
            f"there is no output among {', '.join(streams.names)}: name the streams of the vote"
        )
    return chosen


def check_about(about: str) -> None:
    """Raises UserError unless `about` is one of VOTED."""
    if about not in VOTED:
        raise UserError(f"a vote is about {about!r}: must be one of {', '.join(VOTED)}")


def check_samples(options: DecodeOptions, votes: int) -> None:
    """Raises UserError if several runs with these options would all be the same."""
    if votes > 1 and not np.any(options.temperature):
        raise UserError(
            f"votes is {votes} and the temperature 0, so all runs would be the same: set a"
            " temperature, such as 1"
        )
