"""Each table in docs/data.md is what the converter makes of the text above it."""

import json
import pathlib
import re

import pytest

from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data.converters import CONVERTERS, convert, texts
from msllm.streams import StreamSpec
from msllm.tokenizer import train

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs/data.md"
GENERATED = {"dictation", "misreport", "shuffles"}
SINGLE = {f"{name}_single" for name in ("dictation", "misreport")}  # no sections of their own
INPUTS = re.compile("user|result.*")


def examples():
    """{converter: (records, settings, tables)} from the first block of each converter's section."""
    found = {}
    for section in re.split(r"^### ", DOCS.read_text(), flags=re.M)[1:]:
        name = re.match(r"`(\w+)`", section)
        if name is None:
            continue
        block = re.search(r"```\n(.*?)```", section, flags=re.S)[1]
        head, *drawn = re.split(r"^row(?: .*)?\n", block, flags=re.M)
        settings = dict(re.findall(r"^(options|rows): (.*)$", head, flags=re.M))
        records = re.sub(r"^(options|rows): .*\n", "", head, flags=re.M).rstrip("\n")
        tables = [
            {line.split()[0]: line.split()[1:] for line in part.splitlines() if line}
            for part in drawn
        ]
        found[name[1]] = (
            records,
            {key: json.loads(value) for key, value in settings.items()},
            tables,
        )
    return found


def draw(table, names, tokenizer):
    """{stream: cells} of a table, in the notation of the page.

    `.` is silence, `-` is absent, and the words `.` and `-` are `<.>` and `<->`.
    """

    def cell(token, present):
        if not present:
            return "-"
        if token == tokenizer.silence_id:
            return "."
        word = tokenizer.decode([token])
        return f"<{word}>" if word in (".", "-") else word

    columns = {}
    for stream, name in enumerate(names):
        tokens, present = table.tokens[:, stream].tolist(), table.present[:, stream]
        columns[name] = [cell(*both) for both in zip(tokens, present)]
    return columns


def kind_of(name):
    """The kind of a stream on the page."""
    if INPUTS.fullmatch(name):
        return "input"
    return "thought" if name == "thought" else "output"


def converted(tmp_path, converter, records, settings, names):
    """Yields the drawn tables that a converter makes of records."""
    streams = StreamsConfig(names=names, kinds=tuple(map(kind_of, names)))
    path = tmp_path / ("x.jsonl" if records.startswith("{") else "x.txt")
    path.write_text(records)
    config = Config(
        streams=streams, data=DataConfig(converter=converter, path=str(path), **settings)
    )
    spec = StreamSpec.from_config(streams)
    tokenizer = train(texts(config, spec), TokenizerConfig(model_type="word", vocab_size=256))
    for table in convert(config, spec, tokenizer):
        yield draw(table, names, tokenizer)


def test_the_page_has_a_table_for_each_converter():
    assert set(examples()) == set(CONVERTERS) - SINGLE


@pytest.mark.parametrize("converter", sorted({*CONVERTERS} - SINGLE))
def test_the_page_draws_the_tables_of_the_converter(tmp_path, converter):
    records, settings, tables = examples()[converter]
    if converter in GENERATED:
        settings = {"options": settings.get("options", {}) | {"examples": 100}}
    found = converted(tmp_path, converter, records, settings, tuple(tables[0]))
    if converter in GENERATED:
        assert tables[0] in found
    else:
        assert tables == list(found)
