"""The other tasks of configs/threads: their data against slow references, and their studies."""

import pathlib
import random
import sys

import numpy as np
import pytest
from runs import run_small_study, streams_with

from msllm.data.files import shared_file
from msllm.errors import UserError
from msllm.study import load_results
from msllm.study.definition import load_study

FOLDER = pathlib.Path(__file__).parents[1] / "configs/threads"
sys.path.insert(0, str(FOLDER))

import thread_chase  # noqa: E402
import thread_graph  # noqa: E402
import thread_sum  # noqa: E402

PROSQA = shared_file("data/prosqa/prosqa_valid.json", str(FOLDER / "graph.py"))


def as_words(words, make):
    """Tables as words, [N, T, S]; "" is silence. `make` gets the ids of words and of silence."""
    words = ["", *words]
    tables = make({word: i for i, word in enumerate(words)}, 0)
    return np.array(words)[np.stack([table.tokens for table in tables])]


def follows(facts, root, limit=99):
    """{what follows from the root: in how many steps}, by trying all facts again and again."""
    found = {root: 0}
    for step in range(1, limit):
        new = {c for s, c in facts if found.get(s) == step - 1} - found.keys()
        found |= dict.fromkeys(new, step)
    return found


# Graph.


def test_graphs_have_the_statistics_of_prosqa():
    problems = list(thread_graph.draw({"most_facts": 99}, 400, seed=5))
    facts = np.mean([len(problem.facts) for problem in problems])
    nodes = np.mean([len({word for fact in p.facts for word in fact}) for p in problems])
    assert abs(facts - 35.8) < 2 and abs(nodes - 22.8) < 1
    reached = np.mean([len(problem.distances) for problem in problems])
    assert abs(reached - 13.4) < 1  # of the validation split
    steps = np.bincount([problem.steps for problem in problems], minlength=7) / 400
    np.testing.assert_allclose(steps[3:], (0.40, 0.43, 0.14, 0.02), atol=0.08)
    assert 0.4 < np.mean([problem.answer == problem.choices[0] for problem in problems]) < 0.6


def test_exactly_one_choice_follows_and_both_are_ends_of_chains():
    for problem in thread_graph.draw({"nodes": (18, 40), "most_facts": 64}, 100, seed=6):
        found = follows(problem.facts, problem.root)
        assert problem.distances == found
        assert [choice for choice in problem.choices if choice in found] == [problem.answer]
        subjects = {subject for subject, _ in problem.facts}
        assert problem.root in subjects and not subjects & set(problem.choices)
        conclusions = {conclusion for _, conclusion in problem.facts}
        assert subjects - conclusions <= set(thread_graph.NAMES)
        assert conclusions <= set(thread_graph.CONCEPTS)
        assert len(set(problem.facts)) == len(problem.facts)


def test_threads_say_what_follows_and_the_output_says_the_answer_once_it_is_known():
    study = load_study(FOLDER / "graph.py")
    spec, rows = streams_with(study.base, {}), thread_graph.rows_of(8)
    problems = list(thread_graph.draw({}, 20, seed=7))
    for said in (True, False):
        found = as_words(
            thread_graph.WORDS,
            lambda ids, silence: thread_graph.tables(problems, spec, rows, ids, silence, said),
        )
        for problem, table in zip(problems, found):
            known = follows(problem.facts, problem.root)
            facts, threads = table[:, :40], table[:, 40:80]
            question, output = table[:, 80], table[:, 81]
            choices = problem.choices
            assert (
                " ".join(question).split()
                == f"Is {problem.root} a {choices[0]} or {choices[1]}".split()
            )
            for row in range(rows):
                for fact, thread in zip(facts.T, threads.T):
                    sentence = [word for word in fact if word]
                    subject = sentence[-4] if sentence else None
                    late = subject in known and row >= thread_graph.READ + known[subject]
                    assert thread[row] == (sentence[-1] if late and said else "")
                is_known = row > thread_graph.READ + known[problem.answer] - 1
                assert output[row] == (problem.answer if is_known else "")
            assert sum(any(fact) for fact in facts.T) == len(problem.facts)


def test_prosqa_is_read_as_its_graphs_say():
    if not pathlib.Path(PROSQA).is_file():
        pytest.skip(f"{PROSQA} is missing: set MSLLM_SHARED to the folder with the shared data")
    import json

    problems = thread_graph.read_prosqa(PROSQA)
    records = json.loads(pathlib.Path(PROSQA).read_text())
    assert len(problems) == len(records) == 300
    for problem, record in zip(problems, records):
        words = record["idx_to_symbol"]
        assert set(problem.facts) == {(words[a], words[b]) for a, b in record["edges"]}
        assert problem.root == words[record["root"]]
        assert problem.answer == words[record["target"]]
        assert set(problem.choices) == {words[record["target"]], words[record["neg_target"]]}
        assert problem.steps == len(record["steps"])


def test_what_is_missing_or_impossible_is_named():
    with pytest.raises(UserError, match="MSLLM_SHARED"):
        thread_graph.read_prosqa("/missing.json")
    with pytest.raises(UserError, match="no proof of 9 steps"):
        thread_graph.draw_problem(random.Random(0), 9, (5, 6), 40)


# Chase.


@pytest.mark.parametrize("threads,rows", [(1, 8), (4, 8), (2, 2), (4, 2), (4, 4)])
def test_threads_share_the_pointers_of_a_row(threads, rows):
    study = load_study(FOLDER / "chase.py")
    arm = study.arm(f"{threads} in {rows} rows")
    spec, options = streams_with(study.base, arm.settings), arm.settings["data.options"]
    found = as_words(
        thread_chase.ITEMS,
        lambda ids, silence: thread_chase.tables(options, spec, ids, silence, 20, 1),
    )
    items, advance = thread_chase.ITEMS, 8 // rows
    for table in found:
        size = len(items)
        assert sorted(table[:size, 0]) == sorted(items)
        pointers, item = dict(table[:size, :2]), table[size, 1]
        assert set(table[size + 1, 2:]) == {item} and set(table[: size + 1, 2:].flat) == {""}
        for row in range(rows):
            passed = []
            for _ in range(advance):
                item = pointers[item]
                passed.append(item)
            said = list(table[size + 2 + row, 2:])
            shares = [max((i + 1) * advance // threads, 1) for i in range(threads)]
            assert said == [passed[share - 1] for share in shares] and said[-1] == item
    assert len({tuple(table[:, 0]) for table in found}) == len(found)


def test_rows_that_do_not_divide_the_pointers_are_refused():
    problem = np.zeros((1, 16), int), np.zeros(1, int)
    for threads, options in ((1, {"steps": 8, "rows": 3}), (3, {"steps": 8, "rows": 4})):
        with pytest.raises(UserError, match="equal share"):
            thread_chase.solve(*problem, threads, options)


# Lags.


@pytest.mark.parametrize("topology", thread_sum.ROUNDS)
def test_sums_follow_from_what_the_edges_let_threads_hear(topology):
    study = load_study(FOLDER / "lags.py")
    arms = [study.arm(f"{topology}, lag {lag}") for lag in ("1", "8", "drawn")]
    spec = streams_with(study.base, arms[1].settings)
    found = as_words(
        thread_sum.WORDS,
        lambda ids, silence: thread_sum.tables(topology, spec, ids, silence, 30, 2),
    )
    heard = {i: [] for i in range(4)}
    for reader, source in thread_sum.sources(topology):
        heard[reader].append(source)
        assert spec.token_lag[4 + reader][4 + source] == 8
    share, hold = thread_sum.SHARE, thread_sum.HOLD
    assert found.shape[1:] == (arms[0].settings["data.rows"], 8)
    for table in found:
        digits, said = table[:share, :4].astype(int), table[:, 4:]
        assert (said[share].astype(int) == digits.sum(0) % 5).all()
        total = digits.sum() % 5
        assert int(said[-1, 0]) == total
        for row in range(share, len(said) - 1):
            if table[row, 0] != thread_sum.NEXT:
                assert (said[row + 1] == said[row]).all()
                continue
            # Everything that a thread needs is what others say now, and said 8 rows ago.
            assert (said[row] == said[row - 8]).all() and (said[row] == said[row - 1]).all()
            for i in range(4):
                visible = [int(said[row, j]) for j in heard[i]]
                own = digits[:, i].sum()
                expected = {
                    "all": (own + sum(visible)) % 5,
                    "star": total if i == 0 else visible[0] if row > share + hold else own % 5,
                    "tree": (visible[0] + (visible[1] if len(visible) > 1 else int(said[row, i])))
                    % 5,
                    "ring": (own + visible[0]) % 5,
                }
                assert int(said[row + 1, i]) == expected[topology]
    drawn = streams_with(study.base, arms[2].settings).drawn_lags
    assert drawn and {
        key for key, value in arms[2].settings.items() if value != arms[0].settings[key]
    } == {"streams.lags"}


@pytest.mark.slow
def test_the_small_studies_run(tmp_path):
    for name, arms, same in (
        ("graph", ("tokens", "latent"), ("parameters", "cells", "targets")),
        ("chase", ("1 in 2 rows", "4 in 2 rows"), ("rows",)),
        ("lags", ("all, lag 4", "all, lag drawn"), ("parameters", "cells", "targets")),
    ):
        run_small_study(FOLDER / f"{name}.py", tmp_path / name)
        found = load_results(tmp_path / name)
        assert found.arms == arms
        for fact in same:
            assert found.points[0][fact] == found.points[1][fact]
        assert "answers" in (tmp_path / name / "table.md").read_text()
