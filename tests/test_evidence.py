"""Whether targets can be known in time: the estimate, and what commands and docs say of it."""

import importlib
import json
import pathlib
import re
import sys

import numpy as np
import pytest

from msllm.cli.main import main
from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data.evidence import describe, estimate
from msllm.data.prepare import prepare
from msllm.data.tables import Placement, Table, make_table, shift
from msllm.streams import NEVER, lag_matrix
from msllm.view.prepared import targets_in_time
from msllm.view.split import Split

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
KINDS, NAMES = ("input", "output"), ("user", "output")
SILENCE = 0
WORDS = (
    "we met them near two old mills as rain began to fall and nobody had seen this coming".split()
)


def texts(count, words=200, seed=0):
    """Random token ids, from which nothing but themselves follows."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, words, rng.integers(4, 20)) for _ in range(count)]


def answers(after, count=120, answer=lambda text: text, **options):
    """Examples in which the output answers every token of the user `after` rows later."""
    return [
        make_table(
            [Placement(0, 0, text), Placement(1, after, answer(text))],
            len(text) + after + 2,
            2,
            SILENCE,
        )
        for text in texts(count, **options)
    ]


def found(tables, visibility="block_causal", kinds=KINDS, lag=None):
    """(the estimate for the last stream, its line of text)."""
    lag = lag_matrix(visibility, len(kinds)) if lag is None else lag
    estimates = estimate(tables, kinds, lag, SILENCE)
    names = NAMES if len(kinds) == 2 else tuple(f"s{i}" for i in range(len(kinds)))
    return estimates[-1], describe(estimates, names, lag)[-1]


@pytest.mark.parametrize(
    "after, visibility, late, rows",
    [
        (0, "block_causal", True, 2),
        (1, "block_causal", True, 1),
        (2, "block_causal", False, 0),
        (4, "block_causal", False, 0),
        (0, "same_row", True, 1),
        (1, "same_row", False, 0),
    ],
)
@pytest.mark.parametrize(
    "words, answer",
    [
        (200, lambda text: text),
        (60, lambda text: 200 + text * 7 % 50),
        (9, lambda text: 200 + np.cumsum(text) % 7),
    ],
    ids=["copies", "maps", "adds"],
)
def test_what_follows_from_a_cell_is_known_only_if_that_is_visible(
    after, visibility, late, rows, words, answer
):
    one, line = found(answers(after, answer=answer, words=words), visibility)
    assert one.is_late == late
    if late:
        assert one.hidden.rows == after and one.hidden.known > 0.95 and one.visible.known < 0.5
        where = "in the same row" if not after else "1 row before"
        assert re.search(rf"WARNING: (9\d|100)% of its tokens follow from user {where}", line)
        assert f"place it {rows} row{'s' * (rows > 1)} later" in line
        assert ("let it see the same row" in line) == (after == 1)
    else:
        assert one.visible.rows == after and one.visible.known > 0.95
        assert line.startswith("  output: yes: ") and f"user {after} row" in line


def test_the_row_in_which_a_stream_speaks_must_be_known_too():
    def tables(after):
        rng, made = np.random.default_rng(0), []
        for _ in range(150):
            heard = rng.integers(2, 50, 30)
            heard[rng.random(30) < 0.1] = 1
            said = [Placement(1, row + after, [60]) for row in np.flatnonzero(heard == 1)]
            made.append(make_table([Placement(0, 0, heard), *said], 34, 2, SILENCE))
        return made

    assert found(tables(1))[0].is_late
    assert not found(tables(2))[0].is_late and found(tables(2))[0].visible.known > 0.95


def test_delays_and_single_lags_count():
    late = answers(1)
    assert not found([shift(table, (0, 1)) for table in late])[0].is_late
    lag = lag_matrix("block_causal", 2)
    lag[1, 0] = 0
    assert not found(late, lag=lag)[0].is_late
    lag[1, 0] = 3
    assert "place it 1 row later" in found(answers(3), lag=lag)[1]
    lag[1, 0] = NEVER
    one, line = found(answers(3), lag=lag)
    assert one.is_late and "it never sees user" in line and "later" not in line


def test_copies_at_a_distance_that_differs_between_examples_are_found():
    drawn = [answers(after, 40, seed=after) for after in (1, 2, 3, 4)]
    one, line = found([table for tables in drawn for table in tables])
    assert not one.is_late and 0.2 < one.copied_late < 0.3
    assert f"WARNING: {one.copied_late:.0%} of its tokens repeat another stream" in line
    one, line = found([table for tables in drawn[1:] for table in tables])
    assert one.copied_late == 0 and "yes: 100% of its tokens repeat another stream" in line


def test_nothing_is_claimed_of_streams_that_do_not_depend_on_each_other():
    rng = np.random.default_rng(0)
    tables = [
        Table(rng.integers(1, 30, (60, 3)).astype(np.int32), np.ones((60, 3), bool))
        for _ in range(40)
    ]
    one, line = found(tables, kinds=("input", "thought", "output"))
    assert not one.is_late and one.copied_late == 0 and one.hidden.known < 0.2
    assert "no sign that anything comes too late" in line and "WARNING" not in line


def test_absent_cells_are_no_targets_and_no_evidence():
    def hide(table):
        present = table.present.copy()
        present[::2, 0] = False  # half of the evidence
        return table._replace(present=present)

    one, _ = found([hide(table) for table in answers(2)])
    assert 0.4 < one.visible.known < 0.6
    gone = [t._replace(present=t.present & (np.arange(2) == 0)) for t in answers(2)]
    assert found(gone)[0].targets == 0


def test_a_single_long_example_and_few_tokens():
    text = np.random.default_rng(0).integers(1, 50, 400)
    long = make_table([Placement(0, 0, text), Placement(1, 1, text)], 402, 2, SILENCE)
    assert found([long])[0].is_late
    mapped = make_table([Placement(0, 0, text), Placement(1, 1, text + 50)], 402, 2, SILENCE)
    assert found([mapped])[0].is_late  # what is learnt in one half is tested on the other one
    assert "too few tokens to tell (" in found(answers(1, 3))[1]
    assert "too few tokens to tell (0)" in found([])[1]
    one_stream = [make_table([Placement(0, 0, text)], len(text), 1, SILENCE) for text in texts(9)]
    assert estimate(one_stream, ("output",), lag_matrix("block_causal", 1), SILENCE) == []


def example(page, heading):
    """The first Python code below a heading of a page."""
    section = page.read_text().partition(heading)[2]
    return re.search(r"```python\n(.*?)```", section, flags=re.S)[1]


@pytest.mark.parametrize(
    "page, heading, wrong",
    [
        (DOCS / "data.md", "### Your own converter", ('say("output", 2', 'say("output", 1')),
        (
            DOCS / "extending/converter.md",
            "# A converter",
            ('["after"], text', '["after"] - 1, text'),
        ),
    ],
    ids=["data", "converter"],
)
def test_the_targets_of_the_docs_own_converter_can_be_known(
    tmp_path, monkeypatch, page, heading, wrong
):
    monkeypatch.syspath_prepend(str(tmp_path))
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.permutation(WORDS)) for _ in range(60)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    streams = StreamsConfig(names=NAMES, kinds=KINDS)

    def line_of(module, code):
        (tmp_path / f"{module}.py").write_text(code)
        importlib.invalidate_caches()
        data = DataConfig(
            converter=f"{module}:convert",
            options={"after": 2},
            path=str(source),
            tokenizer=TokenizerConfig(model_type="word", vocab_size=64),
            rows=32,
        )
        prepare(Config(streams=streams, data=data), tmp_path / module)
        return targets_in_time(Split(tmp_path / module, "train"))[-1]

    code = example(page, heading)
    assert wrong[0] in code
    try:
        right = line_of(f"right_{page.stem}", code)
        late = line_of(f"late_{page.stem}", code.replace(*wrong))
    finally:
        for module in (f"right_{page.stem}", f"late_{page.stem}"):
            sys.modules.pop(module, None)
    assert re.search(r"output: yes: (9\d|100)% of its tokens follow from user 2 rows before", right)
    assert "output: WARNING: " in late and "from user 1 row before" in late


CONFIG = """
from msllm.config import default_config

def get_config():
    c = default_config()
    c.streams.names, c.streams.kinds = ("user", "output"), ("input", "output")
    c.data.converter, c.data.options = "chat", {"roles": {"assistant": "output"}}
    c.data.path, c.data.rows, c.data.eval_percent = "chats.jsonl", 32, 20.0
    c.data.tokenizer.model_type, c.data.tokenizer.vocab_size = "word", 256
    return c
"""


def write_chats(folder, count=120):
    """Chats in which a single word, the answer, follows from the last word of the question."""
    rng = np.random.default_rng(0)
    with open(folder / "chats.jsonl", "w") as file:
        for _ in range(count):
            land, start = chr(97 + rng.integers(20)), rng.choice(["name", "please tell me"])
            question = {"role": "user", "content": f"{start} the capital of {land}land"}
            answer = {"role": "assistant", "content": f"{land}ville"}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    (folder / "config.py").write_text(CONFIG)


def test_prepare_and_inspect_say_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_chats(tmp_path)

    def output(*arguments):
        assert main(arguments) == 0
        return capsys.readouterr().out

    # The question ends in the row before the answer, in which the answer is predicted.
    late = "output: WARNING: 9.% of its tokens follow from user 1 row before"
    none = "--config.data.options.overlap=0"
    assert re.search(late, output("prepare", "--config=config.py", "--out=late", none))
    assert re.search(late, output("inspect", "late"))
    assert "output: yes" in output("inspect", "late", "--visibility=same_row")
    same_row = "--config.streams.visibility=same_row"
    assert "output: yes" in output("prepare", "--config=config.py", "--out=late", none, same_row)
    assert "output: yes" in output("prepare", "--config=config.py", "--out=right")
    assert "output: yes" in output("inspect", "right")
    # The visibility of the config is that for which inspect estimates.
    output("prepare", "--config=config.py", "--out=same", none, same_row)
    assert "output: yes" in output("inspect", "same")
    output("inspect", "late", "--html=page.html")
    assert re.search(late, (tmp_path / "page.html").read_text())
    # Data of earlier versions does not name a visibility.
    manifest = json.loads((tmp_path / "same/manifest.json").read_text())
    del manifest["lag"], manifest["digest"]
    (tmp_path / "same/manifest.json").write_text(json.dumps(manifest))
    text = output("inspect", "same")
    assert "assuming block_causal" in text and re.search(late, text)


def test_prepare_warns_of_too_few_rows_and_of_empty_splits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_chats(tmp_path)

    def output(out, *arguments):
        assert main(["prepare", "--config=config.py", f"--out={out}", *arguments]) == 0
        return capsys.readouterr().out

    assert "never" not in output("enough") and "are cut at" not in output("enough")
    # All answers are cut: there is nothing to learn.
    assert main(["prepare", "--config=config.py", "--out=few", "--config.data.rows=5"]) == 2
    error = capsys.readouterr().err
    rule = (
        r"error: config.data.rows is 5: all that output says is lost, because (\d+) of \1 examples"
    )
    assert re.search(rf"{rule} \(100%\) are cut before it; increase it: \d+ cuts none$", error)
    longest = int(re.search(r"(\d+) cuts none", error)[1])
    assert "are cut" not in output("few", f"--config.data.rows={longest}")  # nothing is in the way
    text = output("fewer", f"--config.data.rows={longest - 2}")
    assert f"config.data.rows={longest} cuts none" in text
    none = "eval: none of the 120 examples is held out (config.data.eval_percent is 1e-06)"
    assert f"WARNING: {none}" in output("none", "--config.data.eval_percent=1e-6")
    off = output("off", "--config.data.eval_percent=0.0")
    assert "eval: no examples are held out" in off and "WARNING: eval" not in off
    everything = output("all", "--config.data.eval_percent=99.99999")
    assert "WARNING: train: all 120 examples are held out" in everything


def test_what_gets_mail_is_no_evidence():
    """A copy of a stream in its own row does not say that the stream comes too late."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 50, (40, 30))
    tables = [
        make_table([Placement(s, 0, row) for s in range(2)], 30, 2, SILENCE) for row in tokens
    ]
    kinds, lag = ("output", "input"), lag_matrix("isolated", 2)
    assert estimate(tables, kinds, lag, SILENCE)[0].is_late
    assert not estimate(tables, kinds, lag, SILENCE, [(1, 0)])[0].is_late
