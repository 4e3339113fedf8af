"""The quickstart's model answers at any row, again and again, in forks and after pauses."""

import collections
import os
import pathlib
import subprocess
import sys

import pytest

import msllm
from msllm.data import dictation
from msllm.decode.script import default_window
from msllm.evals.exact_match import evaluate
from msllm.weights.load import LoadedModel

# The first test includes the training, which takes 2 to 3 CPU-minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
ROOT = pathlib.Path(__file__).resolve().parents[1]
ROWS = (0, 20, 130, 500)  # before the first question
TALKS = 48  # conversations for each entry of ROWS
LISTEN = 12  # rows after a question in which the answer must come
UNSEEN = 12345  # seed of questions that are not in the training data


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> LoadedModel:
    """The model of configs/quickstart.py, trained as a user would train it."""
    folder = tmp_path_factory.mktemp("quickstart")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    config = [f"--config={ROOT}/configs/quickstart.py", f"--config.data.dir={folder}/data"]
    train = ["train", f"--workdir={folder}/run", "--config.eval_every=0"]
    for command in (["prepare"], train):
        line = [sys.executable, "-m", "msllm", *command, *config]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return msllm.load(folder / "run")


def unseen_questions(model: LoadedModel):
    """Questions that no training example holds."""
    options = dict(model.run_config.data.options)
    trained = dictation.converse(options.pop("examples"), **options)
    seen = {tuple(turn.dictation.question) for talk in trained for turn in talk}
    for asked in dictation.generate(10**6, UNSEEN):
        if tuple(asked.question) not in seen:
            yield asked


def answers(engine, sessions, questions, model) -> list[bool]:
    """Asks each session a question. Returns, per session, whether the answer is exact."""
    asked = [next(questions) for _ in sessions]
    for session, question in zip(sessions, asked):
        session.feed("user", " ".join(question.question))
    shown = engine.run(max(len(question.question) for question in asked) + LISTEN, sessions)
    output, silence = model.streams.index("output"), model.tokenizer.silence_id
    right = []
    for question, rows in zip(asked, shown):
        said = [int(row.tokens[output]) for row in rows if row.tokens[output] != silence]
        right.append(model.tokenizer.decode(said).split() == question.answer)
    return right


def test_the_chat_answers_whenever_it_is_asked(quickstart):
    """Asks three questions in a row, at rows 0 to 500. A quarter of the conversations is forked.

    The sessions wait while others go on to the row of their first question. A fork asks its second
    and third question while the session that it comes from waits, which then asks its own.
    """
    model, questions = quickstart, unseen_questions(quickstart)
    size = len(ROWS) * TALKS
    engine = msllm.Engine(model, sessions=size + size // 4, window=default_window(model))
    sessions = {row: [engine.open() for _ in range(TALKS)] for row in ROWS}
    row = 0
    for until in ROWS:
        late = [session for start in ROWS if start >= until for session in sessions[start]]
        if until > row:
            engine.run(until - row, late)
        row = until

    right = collections.defaultdict(list)

    def ask(talks, turn, pause=0):
        if pause:
            engine.run(pause, [session for _, session in talks])
        given = answers(engine, [session for _, session in talks], questions, model)
        for (start, _), answer in zip(talks, given):
            right["first row", start].append(answer)
            right["turn", turn].append(answer)

    talks = [(start, session) for start in ROWS for session in sessions[start]]
    ask(talks, 1)
    forks = [(start, session.fork()) for start, session in talks[::4]]
    ask(forks, 2)
    ask(forks, 3, pause=40)
    for _, session in forks:
        session.close()
    ask(talks, 2)
    ask(talks, 3, pause=40)
    shares = {what: sum(answer) / len(answer) for what, answer in right.items()}
    asked = sum(len(answer) for what, answer in right.items() if what[0] == "turn")
    correct = sum(sum(answer) for what, answer in right.items() if what[0] == "turn")
    assert correct >= 0.99 * asked and min(shares.values()) >= 0.98, shares


def test_held_out_answers_are_exact(quickstart):
    """In the held-out examples the user also pauses inside questions."""
    result = evaluate(quickstart, examples=100)
    assert result.answers > 150
    assert result.exact_match >= 0.98  # 99.7 % or more of all; docs/results.md
    assert result.rows_to_first == dictation.REACTION
