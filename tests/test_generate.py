"""`msllm generate`: its arguments, and the table that it prints."""

import dataclasses
import io

import pytest
import rich.console

from msllm.decode.arguments import parse_inputs, parse_texts, parse_values
from msllm.decode.engine import DecodeOptions
from msllm.errors import UserError
from msllm.view import cells
from msllm.view.generation import print_generation


@pytest.fixture
def model(make_model, letters):
    return dataclasses.replace(make_model(3, vocab_size=letters.vocab_size), tokenizer=letters)


def printed(model, inputs, rows, options, forced=None):
    """Returns the lines that `print_generation` prints."""
    console = rich.console.Console(file=io.StringIO(), width=200)
    print_generation(model, inputs, rows, options, console, forced)
    return console.file.getvalue().splitlines()


def test_the_table_shows_every_row(model):
    lines = printed(model, {"user": "abc"}, 6, DecodeOptions(ablated=("thought",)))
    assert lines[0].split() == ["row", "user", "thought", "output"]
    rows = [line.split() for line in lines[1:7]]
    assert [row[0] for row in rows] == list("012345")
    assert [row[1] for row in rows] == ["a", "b", "c"] + [cells.SILENT] * 3
    assert {row[2] for row in rows} == {cells.SILENT}
    assert lines[8] == "user: abc"


def test_arguments_are_parsed_and_checked(model):
    streams = model.streams
    assert parse_inputs(["user=a=b", "user=c"], streams) == {"user": "a=bc"}
    assert parse_values("top_k", ["5", "output=2"], streams, int, 0) == (5, 5, 2)
    assert parse_values("top_k", ["output=2"], streams, int, 0) == (0, 0, 2)
    for message, bad in {
        "no stream 'usr'": lambda: parse_inputs(["usr=a"], streams),
        "output is generated; inputs are user": lambda: parse_inputs(["output=a"], streams),
        "write it as stream=text": lambda: parse_inputs(["hello"], streams),
        "'x' is not a number": lambda: parse_values("top_k", ["output=x"], streams, int, 0),
        "--rows=0": lambda: printed(model, {}, 0, DecodeOptions()),
        "no tokenizer": lambda: printed(
            dataclasses.replace(model, tokenizer=None), {}, 1, DecodeOptions()
        ),
    }.items():
        with pytest.raises(UserError, match=message):
            bad()


def test_text_that_does_not_fit_is_reported(model, caplog):
    printed(model, {"user": "abc"}, 3, DecodeOptions())
    assert not caplog.records
    printed(model, {"user": "abc def"}, 3, DecodeOptions())
    (record,) = caplog.records
    assert record.getMessage() == "4 tokens of user were never read: use --rows=7 or more"


def test_words_that_the_model_does_not_know_are_named(model, caplog):
    printed(model, {"user": "abc xyz? a xyz?"}, 16, DecodeOptions(), {"output": "de! Z"})
    assert [record.getMessage() for record in caplog.records] == [
        "user: unknown to the model: 'xyz?'",
        "output: unknown to the model: 'de!', 'Z'",
    ]


def test_streams_can_be_forced(model, caplog):
    forced = parse_texts("force", ["output=a", "thought=abc", "output=b"], model.streams)
    assert forced == {"output": "ab", "thought": "abc"}
    lines = printed(model, {"user": "d"}, 2, DecodeOptions(), forced)
    assert [line.split()[1:] for line in lines[1:3]] == [["d", "a", "a"], [cells.SILENT, "b", "b"]]
    assert "1 tokens of thought were never said: use --rows=3 or more" in caplog.text
    with pytest.raises(UserError, match="--force='hello': write it as stream=text"):
        parse_texts("force", ["hello"], model.streams)
