"""Every example drawn in docs/data.md is what its converter makes of the text above it."""

import json
import pathlib
import re

import pytest

from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data.converters import CONVERTERS, convert, texts
from msllm.streams import StreamSpec
from msllm.tokenizer import train

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs/data.md"
INPUTS = re.compile("user|result.*")


def examples():
    """{converter: (records, settings, drawn tables)} of the first block of each one's section."""
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
    """The cells of a table as in the document.

    `.` is silence, `-` is absent, and `<...>` is a word that could be mistaken for these.
    """
    columns = {}
    for stream, name in enumerate(names):
        cells = []
        for token, present in zip(table.tokens[:, stream].tolist(), table.present[:, stream]):
            word = tokenizer.decode([token])
            silent = (
                "."
                if token == tokenizer.silence_id
                else f"<{word}>"
                if word in (".", "-")
                else word
            )
            cells.append(silent if present else "-")
        columns[name] = cells
    return columns


def made(tmp_path, converter, records, settings, names):
    kinds = tuple(
        "input" if INPUTS.fullmatch(n) else "thought" if n == "thought" else "output" for n in names
    )
    streams = StreamsConfig(names=names, kinds=kinds)
    path = tmp_path / ("x.jsonl" if records.startswith("{") else "x.txt")
    path.write_text(records)
    config = Config(
        streams=streams, data=DataConfig(converter=converter, path=str(path), **settings)
    )
    spec = StreamSpec.from_config(streams)
    tokenizer = train(texts(config, spec), TokenizerConfig(model_type="word", vocab_size=256))
    for table in convert(config, spec, tokenizer):
        yield draw(table, names, tokenizer)


def test_every_converter_is_drawn():
    assert set(examples()) == set(CONVERTERS) - {"dictation_single"}


@pytest.mark.parametrize("converter", [name for name in CONVERTERS if name != "dictation_single"])
def test_the_document_draws_what_is_made(tmp_path, converter):
    records, settings, tables = examples()[converter]
    if converter == "dictation":
        settings = {"options": {"examples": 100}}
    found = made(tmp_path, converter, records, settings, tuple(tables[0]))
    assert tables == list(found) if converter != "dictation" else tables[0] in found
