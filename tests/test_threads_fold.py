"""The folds of configs/threads: their data against a slow reference, and their studies."""

import collections
import dataclasses
import pathlib
import sys

import numpy as np
import pytest
from runs import run_small_study, streams_with

from msllm.config import from_config_dict
from msllm.data.loader import Loader
from msllm.data.prepare import prepare
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.study import load_results
from msllm.study.definition import load_study

FOLDER = pathlib.Path(__file__).parents[1] / "configs/threads"
sys.path.insert(0, str(FOLDER))

import thread_fold  # noqa: E402

SILENCE = 0


def cells(options, spec, count=20) -> np.ndarray:
    """Problems as words, [N, T, S]; "" is silence."""
    words = ["", *thread_fold.words_of(options)]
    ids = {word: i for i, word in enumerate(words)}
    tables = thread_fold.tables(options, spec, ids, SILENCE, count, seed=3)
    return np.array(words)[np.stack([table.tokens for table in tables])]


def product(sequence) -> str:
    """The product of permutations, by following every point through all of them."""
    found = ""
    for point in range(len(sequence[0])):
        for permutation in sequence:
            point = int(permutation[point])
        found += str(point)
    return found


@pytest.mark.parametrize("group,size", [("S3", 6), ("A4", 12), ("S4", 24), ("A5", 60)])
def test_the_groups_are_closed_and_complete(group, size):
    words, table = thread_fold.elements(group), thread_fold.table_of(group)
    assert len(words) == size and table.shape == (size, size)
    for a, b in np.random.default_rng(0).integers(0, size, (20, 2)):
        assert words[table[a, b]] == product([words[a], words[b]])


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_a_tree_of_threads_says_all_products(threads):
    fold = load_study(FOLDER / "fold.py")
    arm = fold.arm(f"{threads} {'tokens' if threads > 1 else 'none'} said")
    spec, share = streams_with(fold.base, arm.settings), 64 // threads
    found = cells(arm.settings["data.options"], spec)
    assert found.shape == (20, arm.settings["data.rows"], 2 * threads)
    in_order = thread_fold.shape_of(spec)[1]
    for table in found:
        inputs, said = table[:, :threads], table[:, in_order]
        shares = [list(inputs[:share, i]) for i in range(threads)]
        assert (inputs[share:-1] == thread_fold.MERGE).all() and (inputs[-1] == "").all()
        assert (said[0] == "").all()
        for i in range(threads):
            for row in range(1, share + 1):
                assert said[row, i] == product(shares[i][:row])
        whole = shares
        while len(whole) > 1:
            whole = [a + b for a, b in zip(whole[::2], whole[1::2])]
            row = len(said) - len(bin(len(whole))) + 2
            for i in range(threads):
                assert said[row, i] == product(whole[i % len(whole)])
        assert set(said[-1]) == {product(sum(shares, []))}


def test_mail_carries_what_a_thread_needs_to_merge():
    mail = load_study(FOLDER / "mail.py")
    options = dict(mail.base.data.options)
    for threads, share in ((2, 10), (8, 8), (16, 3)):
        settings = {
            "streams.names": (f"input * {threads}", f"thread * {threads}"),
            "streams.mail": sys.modules[mail.measure.__module__].mail(threads, share),
        }
        spec = streams_with(mail.base, settings)
        found = cells(options | {"length": threads * share}, spec, 5)
        rounds = threads.bit_length() - 1
        assert found.shape[1:] == (share + rounds + 1, 2 * threads)
        mails = {(rule.rows[0].start, rule.reader): rule.source for rule in spec.mail}
        assert len(mails) == threads * rounds and {rule.lag for rule in spec.mail} == {0}
        for table in found:
            # The same rule in every row: own product times what the own input holds.
            for row in range(1, len(table) - 1):
                for i in range(threads):
                    source = mails.get((row, i))
                    factor = table[row, i] if source is None else table[row, source]
                    said = table[row : row + 2, threads + i]
                    assert said[1] == product([said[0], factor])
            shares = [list(table[:share, i]) for i in range(threads)]
            assert table[-1, threads] == product(sum(shares, []))


def test_one_thread_that_reads_eight_inputs_answers_in_as_many_rows_as_eight_threads():
    fold = load_study(FOLDER / "fold.py")
    arm = fold.arm("1 reads 8 said")
    found = cells(arm.settings["data.options"], streams_with(fold.base, arm.settings), 5)
    assert found.shape[1:] == (12, 9)
    assert arm.settings["data.rows"] == fold.arm("8 latent said").settings["data.rows"]
    for table in found:
        sequence = list(table[:8, :8].reshape(-1))
        assert (table[:4, 8] == "").all()
        for row in range(4, 12):
            assert table[row, 8] == product(sequence[: 8 * (row - 3)])


def test_a_curriculum_silences_thoughts_and_changes_nothing_else():
    fold = load_study(FOLDER / "fold.py")
    for shape in ("1 none", "8 latent", "1 reads 8"):
        said, late, blank = (
            cells(arm.settings["data.options"], streams_with(fold.base, arm.settings), 5)
            for arm in (fold.arm(f"{shape} {thoughts}") for thoughts in ("said", "late", "blank"))
        )
        threads = slice(said.shape[2] - (8 if shape[0] == "8" else 1), None)
        first = 4 if shape == "1 reads 8" else 1
        expected = said.copy()
        expected[:, : first + 2, threads] = ""
        np.testing.assert_array_equal(late, expected)
        expected[:, :-1, threads] = ""
        np.testing.assert_array_equal(blank, expected)


def test_prepared_data_hold_the_mail_and_share_no_example(tmp_path):
    mail = load_study(FOLDER / "mail.py")
    settings = mail.base.copy_and_resolve_references()
    settings.data.options = dict(settings.data.options) | {"examples": 100}
    settings.data.eval_percent = 20.0
    config = from_config_dict(settings)
    assert not config.data.path
    manifest = prepare(config, tmp_path / "data", 1)
    assert manifest["settings"]["converter_code"]
    spec = StreamSpec.from_config(config.streams)
    ids, data = {}, dataclasses.replace(config.data, dir=str(tmp_path / "data"))
    for split in ("train", "eval"):
        loader = Loader(data, split, spec)
        ids[split] = sum((sum(loader.example_ids(i), []) for i in range(loader.num_batches)), [])
        table = loader.batch(0)["tokens"][0]
        for rule in spec.mail:
            row = rule.rows[0].start
            assert table[row, rule.reader] == table[row, rule.source] > 0
    train, held_out = set(ids["train"]), set(ids["eval"])
    assert len(train | held_out) == 100 and len(held_out) > 5 and not train & held_out
    again = {
        table.example
        for table in thread_fold.tables(
            settings.data.options, spec, collections.defaultdict(int), 0, 100, 0
        )
    }
    assert again == train | held_out


def test_sequences_that_cannot_be_cut_are_refused():
    for columns, threads in ((3, 3), (6, 6), (4, 2)):
        with pytest.raises(UserError, match="equal shares"):
            next(thread_fold.draw({"length": 64}, columns, threads, 1, 0))


def test_arms_differ_only_in_what_they_should():
    fold = load_study(FOLDER / "fold.py")
    for threads in (2, 4, 8):
        for thoughts in ("short", "said", "late", "blank"):
            arms = [fold.arm(f"{threads} {e} {thoughts}") for e in ("none", "tokens", "latent")]
            for arm in arms[1:]:
                differing = {
                    key for key, value in arm.settings.items() if value != arms[0].settings[key]
                }
                assert differing == {"streams.lags"}
            assert {arm.after for arm in arms} == {
                f"{threads} {edges} {before}" if before else ""
                for edges in ("none", "tokens", "latent")
                for before in [
                    {"short": "", "said": "short", "late": "said", "blank": "late"}[thoughts]
                ]
            }
        flow = sys.modules[fold.measure.__module__].flow
        assert flow(threads, "none") == "nothing"
        assert "bits" in flow(threads, "tokens") and "latent" in flow(threads, "latent")


@pytest.mark.slow
def test_the_small_studies_run(tmp_path):
    run_small_study(FOLDER / "fold.py", tmp_path / "fold")
    found = load_results(tmp_path / "fold")
    assert found.arms == ("2 tokens short", "2 latent short")
    facts = [(point["parameters"], point["cells"], point["steps"]) for point in found.points]
    assert len(set(facts)) == 1
    assert "- 8 none: nothing" in (tmp_path / "fold" / "table.md").read_text()
    run_small_study(FOLDER / "mail.py", tmp_path / "mail")
    shapes = {
        (record["threads"], record["rows"]) for record in load_results(tmp_path / "mail").records
    }
    assert shapes == {(4, 5), (8, 7)}
