"""`msllm inspect`: the text that it prints, the HTML page that it writes, the shards it reads."""

import html.parser
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from rich.cells import cell_len

from msllm import tokenizer
from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data import records
from msllm.data.loader import Loader
from msllm.data.prepare import prepare
from msllm.data.tables import unpack
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.view import cells
from msllm.view import prepared as prepared_view
from msllm.view.split import Split

ROOT = pathlib.Path(__file__).resolve().parents[1]
DELAYED = StreamsConfig(names=("user", "output"), kinds=("input", "output"), delays=(0, 1))


def prepared(folder, lines, streams=DELAYED, model_type="word", **data):
    """Prepares examples. Each line is an example: a list of cells for each stream.

    Returns the prepared directory and the config.
    """
    path = folder / "in.jsonl"
    path.write_text(
        "".join(json.dumps({"streams": dict(zip(streams.names, line))}) + "\n" for line in lines)
    )
    words = TokenizerConfig(model_type=model_type, vocab_size=256)
    defaults = {
        "converter": "tables",
        "path": str(path),
        "tokenizer": words,
        "eval_percent": 0.0,
        "rows": 8,
    }
    settings = {**defaults, "dir": str(folder / "out"), **data}
    config = Config(streams=streams, data=DataConfig(**settings))
    prepare(config, folder / "out")
    return folder / "out", config


def many(count):
    """Lines for `prepared`: examples of 2 to 5 rows, all different."""
    return [
        [[f"u{i}", *["a"] * (i % 4), ""], ["b", *[""] * (i % 4), f"o{i}"]] for i in range(count)
    ]


def shown(directory, *, width=200, terminal=False, **options):
    """The text that `msllm inspect` prints."""
    console = cells.console(file=io.StringIO(), width=width, force_terminal=terminal)
    prepared_view.run(directory, console, **options)
    return console.file.getvalue()


@pytest.fixture
def small(tmp_path):
    """A prepared directory with two examples, packed into one table."""
    lines = [[["a", "b", "", None], ["x", "", "y", "z"]], [["c", ""], ["", "w"]]]
    return prepared(tmp_path, lines)[0]


def test_plain_output(small):
    (packed,) = [packed for _, packed in Split(small, "train").tables()]
    assert packed.segment.tolist() == [1, 1, 1, 1, 1, 2, 2, 2]
    first, second = packed.examples
    lines = shown(small).splitlines()
    assert lines[0] == f"{small}, split train"
    facts = [re.split("  +", line.strip(), maxsplit=1) for line in lines[1 : lines.index("")]]
    assert [fact for fact in facts if fact[0] != "shards"] == [
        ["examples", "2"],
        ["tables", "1 of 8 rows"],
        ["rows", "8, which fill 100.0% of the tables"],
        ["silence", "36.4% of the cells"],
        ["longest", "5 rows"],
        ["overlap", "12.5% of the rows have two or more streams that speak (all tables)"],
        ["unknown", "none"],
        ["cut", "none"],
        ["dropped", "none"],
        ["tokenizer", "sentencepiece, 9 pieces, silence is <silence>"],
        ["duplicates, all splits", "none"],
        ["empty, all splits", "none"],
    ]
    assert re.fullmatch(r"1 of [\d.]+ KiB in all; tables in each: 1", dict(facts)["shards"])
    start = lines.index("") + 1
    assert lines[start : start + 3] == [
        "  stream  kind    delay  tokens  silence  absent  silent",
        "  user    input       0       3        2       3   40.0%",
        "  output  output      1       4        2       2   33.3%",
    ]
    assert "  converter     tables" in lines
    # Absent cells are blank. Silence is a dot.
    assert lines[-12:] == [
        "table 0: 8 of 8 rows hold examples",
        "row user output",
        f"── example 0, {first}, 5 rows ──",
        "0   a",
        "1   b    x",
        "2   ·    ·",
        "3        y",
        "4        z",
        f"── example 1, {second}, 3 rows ──",
        "5   c",
        "6   ·    ·",
        "7        w",
    ]


def test_limits_on_rows_and_tables_and_the_number_of_empty_rows(tmp_path):
    directory, _ = prepared(tmp_path, many(9), rows=16)
    data = Split(directory, "train")
    packed = data.table(0)
    filled = int((packed.segment > 0).sum())
    lines = shown(directory, rows=7).splitlines()
    assert [line.split()[0] for line in lines if re.match(r"\d", line)] == list("0123456")
    empty = f", {16 - filled} empty rows" if filled < 16 else ""
    assert lines[-1] == f"({filled - 7} more rows: --rows={filled} shows them{empty})"
    assert sum(line.startswith("──") for line in lines) == packed.segment[6]
    assert "more rows" not in shown(directory, rows=filled)
    text = shown(directory, tables=99)
    assert text.count("example ") == 9 and text.count("table ") == len(data)
    assert f"({16 - int((data.table(len(data) - 1).segment > 0).sum())} empty rows)" in text
    for first, packed in data.tables():
        for number, name in enumerate(packed.examples, first):
            assert f"example {number}, {name}, " in text


def test_silence_is_dimmed_on_a_terminal_only(small, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" not in shown(small)
    text = shown(small, terminal=True)
    styled = {re.sub(r"\x1b\[\d+m", "", line).rstrip(): line for line in text.splitlines()}
    assert styled["6   ·    ·"].count("\x1b[2m·") == 2
    absent = styled["7        w"]
    assert "·" not in absent and "\x1b[2m7" in absent and "\x1b[2mw" not in absent
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown(small, terminal=True)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_columns_are_cut_to_the_terminal(tmp_path, width):
    names = tuple(f"stream_{i}" for i in range(16))
    streams = StreamsConfig(names=names, kinds=("output",) * 16)
    words = ["\u65e5\u672c\u8a9e\u306e\u9577\u3044\u8a00\u8449", "short", "unpronounceable", ""]
    directory, _ = prepared(
        tmp_path, [[[words[(i + j) % 4] for j in range(4)] for i in range(16)]], streams
    )
    text = shown(directory, width=width)
    assert all(word in text for word in words)  # a file has no width that limits lines
    lines = shown(directory, width=width, terminal=True, example="0")
    lines = [re.sub(r"\x1b\[[\d;]+m", "", line) for line in lines.splitlines()]
    rows = [line for line in lines if re.match(r"(row|\d) ", line)]
    assert len(rows) == 5 and max(cell_len(line) for line in rows) <= max(width, 4 + 16 * 4)
    assert sum("\u2026" in line for line in rows) >= 4
    if width == 60:  # each column takes three characters and a space
        for line in rows[1:]:
            start = re.search(r"\u00b7|un", line).start()
            assert cell_len(line[:start]) % 4 == 0


def test_columns_are_aligned(tmp_path):
    """Also with characters that are two columns wide, escaped or combining."""
    streams = StreamsConfig(names=("a", "b"), kinds=("output", "output"))
    said = ["\u65e5", "x", "\n", "\u0301", "\u00a0"]
    directory, _ = prepared(tmp_path, [[said, ["|"] * 5]], streams, model_type="char")
    lines = [line for line in shown(directory).splitlines() if line.endswith("|")]
    assert [line.split()[1] for line in lines] == ["\u65e5", "x", r"\n", "\u25cc\u0301", r"\xa0"]
    assert {cell_len(line[: line.index("|")]) for line in lines} == {9}


def test_spelling():
    words = tokenizer.train(
        ["ab \n cd  ."] * 5, TokenizerConfig(model_type="unigram", vocab_size=300)
    )

    def spelled(text):
        return [cells.spelling(words, token) for token in words.encode(text)]

    assert spelled("\u00e9") == ["<0xC3>", "<0xA9>"]
    assert spelled("\n") == [r"\n"]
    assert cells.visible("\t\x1b[2m\u202e\u200d") == r"\t\x1b[2m\u202e\u200d"

    # With a byte alphabet such as GPT-2's, a token shows its bytes as text if they are valid UTF-8,
    # and otherwise its spelling in the vocabulary.
    pieces = [
        "<silence>",
        "\u0120the",
        "\u010a",
        "\u0120\u0120",
        "\u00c3",
        "\u00b7",
        "\u00c2\u00b7",
        "<&>",
    ]
    pieces.append("\u0120a\u0120")
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<silence>"])
    loaded = tokenizer.Tokenizer.from_bytes("tokenizers", model.to_str().encode(), "<silence>")
    spelled = [cells.spelling(loaded, token) for token in range(1, len(pieces))]
    # The first middle dot is the spelling of half a character. The second is the character itself.
    # Both are marked with <>, because a bare dot means silence.
    assert spelled == [
        "the",
        r"\n",
        "\u2423\u2423",
        "\u00c3",
        "<\u00b7>",
        "<\u00b7>",
        "<&>",
        "a\u2423",
    ]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_examples_by_number_and_id_equal_those_of_the_loader(tmp_path, split):
    directory, config = prepared(tmp_path, many(60), eval_percent=50.0, batch_size=4, shards=3)
    loader = Loader(config.data, split, StreamSpec.from_config(config.streams))
    expected = {}
    for step in range(loader.num_batches):
        rows = range(min(4, loader.num_tables - 4 * step))
        expected |= {
            t.example: t for t in unpack(loader.batch(step, rows), loader.example_ids(step, rows))
        }
    data = Split(directory, split)
    assert len(expected) == data.part["examples"] > 20
    found = [data.example(str(number)) for number in range(len(expected))]
    assert [number for number, _ in found] == list(range(len(expected)))
    names = [table.example for _, table in found]
    assert set(names) == set(expected) and (split == "train" or names == list(expected))
    for number, table in found:
        np.testing.assert_array_equal(table.tokens, expected[table.example].tokens)
        np.testing.assert_array_equal(table.present, expected[table.example].present)
        by_id = data.example(table.example)
        assert by_id[0] == number and by_id[1].tokens.tolist() == table.tokens.tolist()
    text = shown(directory, split=split, example=names[3], rows=None)
    assert text == shown(directory, split=split, example="3")
    lines = text.splitlines()
    assert f"── example 3, {names[3]}, {len(found[3][1].tokens)} rows ──" in lines
    assert sum(bool(re.match(r"\d", line)) for line in lines) == len(found[3][1].tokens)
    third = found[3][1]
    user, output = (loader.tokenizer.decode(third.tokens[third.present[:, s], s]) for s in range(2))
    assert lines[-2:] == [f"user: {user}", f"output: {output}"]


def test_overlap_is_counted_over_all_tables_or_a_sample(tmp_path):
    directory, config = prepared(tmp_path, many(60), shards=4)
    data = Split(directory, "train")
    silence = data.columns.tokenizer.silence_id
    tables = [packed for _, packed in data.tables()]
    speak = [(t.present & (t.tokens != silence)).sum(axis=1) > 1 for t in tables]
    assert prepared_view.overlap(data, 1000) == (
        sum(int(s.sum()) for s in speak),
        data.part["rows"],
        len(data),
    )
    third = [len(data) * i // 3 for i in range(3)]
    rows = sum(int((tables[i].segment > 0).sum()) for i in third)
    assert prepared_view.overlap(data, 3) == (sum(int(speak[i].sum()) for i in third), rows, 3)
    statistics = prepared_view.statistics(data, prepared_view.overlap(data, 3))
    assert "(a sample: 3 tables, evenly spread)" in str(statistics)


def test_only_the_shards_of_shown_tables_are_read(tmp_path, monkeypatch):
    directory, _ = prepared(tmp_path, many(60), shards=8)
    shards = sorted(directory.glob("train-*"))
    for shard in shards[1:]:
        shard.unlink()
    opened = []
    check = records.check_shard
    monkeypatch.setattr(
        records, "check_shard", lambda *a, **options: opened.append(options) or check(*a, **options)
    )
    data = Split(directory, "train")
    assert opened == []
    assert data.example("0")[0] == 0 and shown(directory, example="1")
    assert opened == [{"read": False}] * 2
    with pytest.raises(UserError, match="train-00007.* is missing.*msllm prepare"):
        data.table(len(data) - 1)
    shards[0].write_bytes(bytes(shards[0].stat().st_size))
    with pytest.raises(UserError, match="train-00000.* is corrupt .*prepare.? again"):
        shown(directory, example="0")


class Page(html.parser.HTMLParser):
    """Parses a page. Asserts that its tags are balanced and that it loads nothing.

    Attributes:
      tables: for each table of cells its rows, and for each cell [class, text].
      marks: the headings of examples.
      text: all text.
    """

    VOID = ("meta",)

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.marks, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert not {"src", "href"} & set(attributes) and tag != "script"
        if tag in self.VOID:
            return
        self.open.append((tag, attributes.get("class")))
        if self.open[-1] == ("table", "cells"):
            self.tables.append([])
        elif ("table", "cells") in self.open and tag == "tr":
            self.tables[-1].append([])
        elif ("table", "cells") in self.open and tag == "td":
            self.tables[-1][-1].append([attributes.get("class"), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1][0] == "td" and ("table", "cells") in self.open:
            self.tables[-1][-1][-1][1] += data
        if ("tr", "mark") in self.open and self.open[-1][0] == "th":
            self.marks.append(data)


def test_the_page_holds_every_cell(tmp_path):
    streams = StreamsConfig(names=("<b>", "output"), kinds=("input", "output"), delays=(0, 1))
    said = ["<i>", "&amp;", '"', "\n", "\u65e5", "</td>", "'", "", None]
    lines = [[said[i:] + said[:i], [*"abcdefgh", ""]] for i in range(7)]
    pieces = {piece: i for i, piece in enumerate(["<silence>", "<unk>", *said[:7], *"abcdefgh"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, "<unk>"))
    model.add_special_tokens(["<silence>"])
    model.save(str(tmp_path / "given.json"))
    given = TokenizerConfig(path=str(tmp_path / "given.json"))
    directory, _ = prepared(tmp_path, lines, streams, tokenizer=given, rows=24, shards=2)
    file = tmp_path / "page.html"
    assert shown(directory, file=file) == f"wrote {file}\n"
    assert sorted(path.name for path in tmp_path.glob("page*")) == ["page.html"]
    text = file.read_text()
    assert "prefers-color-scheme: dark" in text and "://" not in text and "url(" not in text
    found = Page(text)
    assert "<b>" in found.text and f"{directory}, split train" in found.text
    data = Split(directory, "train")
    words = data.columns.tokenizer
    expected, marks = [], []
    for first, packed in data.tables():
        rows = []
        for tokens, present in zip(
            packed.tokens[packed.segment > 0], packed.present[packed.segment > 0]
        ):
            row = []
            for token, there in zip(tokens.tolist(), present):
                if not there:
                    row.append(["absent", ""])
                elif token == words.silence_id:
                    row.append(["silence", cells.SILENT])
                else:
                    row.append([None, words.piece(token).replace("\n", r"\n")])
            rows.append(row)
        expected.append(rows)
        marks += [f"example {first + i}, {name}, 10 rows" for i, name in enumerate(packed.examples)]
    assert [[row for row in rows if row] for rows in found.tables] == expected and len(expected) > 2
    assert found.marks == marks
    shown(directory, file=file, tables=2, rows=5)
    found = Page(file.read_text())
    assert [sum(map(bool, rows)) for rows in found.tables] == [5, 5]
    shown(directory, file=file, example="3")
    assert Page(file.read_text()).marks == [marks[3]]


def test_all_counts_of_the_manifest_are_shown(small):
    manifest = records.read_manifest(small)
    manifest["duplicates"] = {"train": 1234, "eval": 0, "train_and_eval": 5}
    manifest["splits"]["train"] |= {"cut": {"examples": 2, "rows": 9, "reason": "too long"}}
    manifest["bad"] = {"records": 1000, "bad": 1, "shown": ["f:2: \x1b no JSON"]}
    manifest["settings"]["inputs"] = [[f"file{i}", "0123456789abcdef" * 4] for i in range(9)]
    records.write_manifest(small, manifest)
    text = shown(small)
    for line in (
        "  duplicates, all splits  1,234 train, 0 eval, 5 train_and_eval\n",
        "  cut                     2 examples, 9 rows (too long)\n",
        "  bad, all splits         1,000 records, 1 bad ([f:2: \\x1b no JSON])\n",
        "[file4, 0123456789ab], ... 4 more]",
    ):
        assert line in text, line


def test_one_stream_has_no_overlap(tmp_path):
    one = StreamsConfig(names=("text",), kinds=("output",))
    directory, _ = prepared(tmp_path, [[["a", "b"]]], one)
    assert "  overlap" not in shown(directory)
    shown(directory, file=tmp_path / "x.html")
    page = Page((tmp_path / "x.html").read_text())
    assert "overlap" not in page.text.split("split train")[-1]


def test_options_that_do_not_fit_the_data_are_refused(small, tmp_path):
    for message, options in {
        "--example=2: split 'train' of .* holds the examples 0 to 1": {"example": "2"},
        "--example='-1': give a number from 0 to 1, or an id of 16 hex digits": {"example": "-1"},
        f"--example={16 * '0'}: split 'train' of .* does not hold it.*--split=eval": {
            "example": 16 * "0"
        },
        "--split=eval: this split of .* has no tables; give --split=train": {"split": "eval"},
        "no split 'test': must be one of train, eval": {"split": "test"},
        "--rows=0: must be at least 1": {"rows": 0},
        "--tables=0: must be at least 1": {"tables": 0},
        "--html=.*: No such file or directory; give a file in an existing folder": {
            "file": tmp_path / "no/x.html"
        },
    }.items():
        with pytest.raises(UserError, match=message):
            shown(small, **options)
    (tmp_path / "empty").mkdir()
    for directory, message in (
        ("empty", "is unfinished or holds no prepared data"),
        ("nowhere", "does not exist"),
    ):
        with pytest.raises(UserError, match=f"{directory} {message}.*msllm prepare"):
            shown(tmp_path / directory)


def test_command_line(small):
    def run(*arguments):
        line = [sys.executable, "-m", "msllm", "inspect", *map(str, arguments)]
        return subprocess.run(
            line, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"FORCE_COLOR": ""}
        )

    done = run(small, "--example", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown(small, example="1")
    done = run()
    assert done.returncode == 2 and done.stderr.startswith(
        "error: DIR must be given (see msllm inspect --help)"
    )


def test_a_closed_pipe_ends_the_command_quietly(small):
    """As in `msllm inspect DIR | head`."""
    line = [sys.executable, "-m", "msllm", "inspect", str(small)]
    with subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE
