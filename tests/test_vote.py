"""Votes: the most frequent answer of sampled runs, or the most frequent token in each row."""

import collections
import dataclasses

import numpy as np
import pytest

from msllm.cli.evaluate import run
from msllm.cli.main import parser_of
from msllm.decode.engine import DecodeOptions, Engine
from msllm.decode.vote import elect, seeds, vote
from msllm.errors import UserError
from msllm.evals import exact_match
from msllm.evals.exact_match import Vote
from msllm.evals.score import likelihood
from msllm.mail import parse_mail

pytestmark = pytest.mark.usefixtures("compile_fast")
OPTIONS = DecodeOptions(temperature=1.0, seed=3)
VOTES, ROWS, OUTPUT = 5, 4, 2


@pytest.fixture
def engine(make_model, letters):
    """An engine with a tokenizer, and a copy of the output in the column of an input."""
    model = dataclasses.replace(make_model(4, num_layers=1, vocab_size=16), tokenizer=letters)
    names, kinds = model.streams.names, model.streams.kinds
    model = model.with_streams(mail=parse_mail([("tool", "output", "0", "0:")], names, kinds))
    return Engine(model, sessions=VOTES + 1, window=16)


def tokens(rows):
    return np.array([row.tokens for row in rows])


def test_a_tie_is_won_by_the_first():
    assert elect("abcbcd") == (1, 2)
    assert elect("cab") == (0, 1)


def test_the_most_frequent_answer_wins(engine):
    session = engine.open(OPTIONS)
    session.run(2)
    # A short answer of few tokens, so that runs agree.
    session.allow("output", [4, 5])
    voted = vote(session, 2, VOTES)
    assert session.rows == 2 and engine.free == VOTES - 1
    silence = engine.silence_id
    said = []
    for number, seed in enumerate(seeds(OPTIONS.seed, VOTES)):
        with session.fork(seed) as fork:
            rows = tokens(fork.run(2))
        said.append(((*(int(t) for t in rows[:, OUTPUT] if t != silence),),))
        if said[-1] == voted.answers[number] and (rows == tokens(voted.rows)).all():
            winner = number
    assert voted.answers == said
    counts = collections.Counter(said)
    assert voted.votes == counts[said[winner]] == max(counts.values()) > 1
    assert len(counts) > 1
    np.testing.assert_array_equal(tokens(voted.rows), voted.session.transcript().tokens[2:])
    voted.session.step()


def test_runs_that_vote_on_tokens_go_on_with_the_most_frequent_one(engine):
    """Runs that agree row by row: their outputs and their copies are the same, other cells not."""
    session = engine.open(OPTIONS)
    session.run(2)
    before = session.transcript().tokens
    voted = vote(session, ROWS, VOTES, "tokens")
    assert voted.votes == VOTES and len(set(voted.answers)) == 1
    table = voted.session.transcript().tokens
    np.testing.assert_array_equal(table[2:], tokens(voted.rows))
    np.testing.assert_array_equal(table[2:, 3], table[2:, OUTPUT])

    # By hand: the first run is the one that wins. Each row is sampled after the one agreed on.
    forks = [session.fork(seed) for seed in seeds(OPTIONS.seed, VOTES - 1)]
    voted.session.close()
    forks.append(session.fork(seeds(OPTIONS.seed, VOTES)[-1]))
    said, others = "", set()
    for row in voted.rows:
        shown = [fork.step() for fork in forks]
        drawn = [int(one.tokens[OUTPUT]) for one in shown]
        assert row.tokens[OUTPUT] == drawn[elect(drawn)[0]]
        others.add(len({int(one.tokens[1]) for one in shown}))
        for fork in forks:
            fork._script.tokens[[OUTPUT, 3]] = row.tokens[OUTPUT]
        said += row.text[OUTPUT]
    assert max(others) > 1
    spoken = [t for t in table[2:, OUTPUT].tolist() if t != engine.silence_id]
    assert len(before) == 2
    assert said.strip() == engine.model.tokenizer.decode(spoken).strip()
    # A token that the run itself has drawn has its log-probability.
    expected = likelihood(engine.model, {"tokens": table[None]}).logprob[0, 1:-1, OUTPUT]
    found = np.array([row.logprob[OUTPUT] for row in voted.rows])
    own = ~np.isnan(found)
    assert 0 < own.sum() < ROWS
    np.testing.assert_allclose(found[own], expected[own], atol=1e-5)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((2, 3), DecodeOptions(), "votes is 3 and the temperature 0, so all runs would be the"),
        ((2, 9), OPTIONS, "votes is 9: the engine has 5 free sessions; close some"),
        ((2, 3, "rows"), OPTIONS, "about 'rows': must be one of answers, tokens"),
        ((2, 3, "answers", ["user"]), OPTIONS, "about 'user', which is an input"),
        ((2, 3, "answers", ["x"]), OPTIONS, "there is no stream 'x'"),
        ((2, 0), OPTIONS, "votes is 0: must be positive"),
    ],
)
def test_votes_that_are_refused(engine, arguments, options, message):
    session = engine.open(options)
    with pytest.raises(UserError, match=message):
        vote(session, *arguments)
    assert engine.sessions == [session]


def test_an_evaluation_by_votes(loaded, monkeypatch):
    """The same seed gives the same answers, and a vote of one run is that run."""
    judged = []
    original = exact_match._judge

    def record(case, number, tokens, *rest):
        judged.append(tokens.tolist())
        return original(case, number, tokens, *rest)

    monkeypatch.setattr(exact_match, "_judge", record)
    results, tables = [], []
    for seed, about in ((1, "answers"), (1, "answers"), (1, "tokens")):
        options = DecodeOptions(temperature=1.0, seed=seed)
        results.append(exact_match.evaluate(loaded, examples=3, vote=Vote(3, about, options)))
        tables.append(judged[:])
        judged.clear()
    assert results[0] == results[1] and tables[0] == tables[1]
    assert tables[2] != tables[0]
    with pytest.raises(UserError, match="temperature 0, so all runs would be the same"):
        exact_match.evaluate(loaded, examples=3, vote=Vote(3, "answers", DecodeOptions()))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--temperature=1"], "--temperature is for a vote: give the number of runs by --votes"),
        (["--votes=3", "--suite=sep"], "--votes does not go with --suite"),
        (["--votes=3", "--ablate"], "--votes does not go with --ablate"),
    ],
)
def test_flags_that_do_not_go_with_a_vote(flags, message):
    with pytest.raises(UserError, match=message):
        run(parser_of("evaluate").parse(["--checkpoint=x", *flags]))
