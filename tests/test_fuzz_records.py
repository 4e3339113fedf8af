"""Damaged record files and tokenizers: what is left is read, or the file is named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import time

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from test_damaged_files import damaged_bytes, damaged_json

from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data.converters import convert
from msllm.data.sources import BadRecords
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import TextError, Tokenizer, train

STREAMS = StreamsConfig(names=("user", "output"), kinds=("input", "output"))
SPEC = StreamSpec.from_config(STREAMS)
TOKENIZER = train(["abcdefghijklmnop"], TokenizerConfig(model_type="bpe", vocab_size=300))
PAIRS = [("abc"[i % 3] * 3 + "defgh"[i % 5] * 2, "mnop"[i % 4] * 4 + "\u00e9") for i in range(12)]
SECONDS = 10.0  # for one small file
seeds = st.integers(0, 1 << 32)


def json_lines():
    return "".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in PAIRS).encode()


def rows(**dialect):
    stream = io.StringIO()
    csv.writer(stream, **dialect).writerows([("source", "target"), *PAIRS])
    return stream.getvalue().encode()


def columns(write):
    stream = io.BytesIO()
    write(pyarrow.table({"source": [a for a, _ in PAIRS], "target": [b for _, b in PAIRS]}), stream)
    return stream.getvalue()


def arrow_file(table, stream):
    with pyarrow.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)


FILES = {
    "a.jsonl": json_lines(),
    "a.json": json.dumps([{"source": a, "target": b} for a, b in PAIRS]).encode(),
    "a.csv": rows(),
    "a.tsv": rows(delimiter="\t"),
    "a.parquet": columns(pyarrow.parquet.write_table),
    "a.arrow": columns(arrow_file),
    "a.jsonl.gz": gzip.compress(json_lines()),
    "a.jsonl.xz": lzma.compress(json_lines()),
    "a.jsonl.bz2": bz2.compress(json_lines()),
    "a.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(json_lines()),
}


def read(path, **data):
    """([(source, target)] of the tables, the counts of records) of a file of pairs."""
    config = Config(
        streams=STREAMS, data=DataConfig(converter="wait_k", path=str(path), rows=64, **data)
    )
    bad = BadRecords(100.0)
    tables = list(convert(config, SPEC, TOKENIZER, bad))
    return [tuple(map(TOKENIZER.decode, table.tokens.T)) for table in tables], bad


def test_the_files_are_good(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name)[0] == PAIRS, name


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=60, deadline=None)
@given(seed=seeds)
def test_a_damaged_file_is_read_or_named(tmp_path_factory, name, seed):
    path = tmp_path_factory.getbasetemp() / name
    content = damaged_bytes(FILES[name], random.Random(seed))
    path.write_bytes(content)
    begin = time.monotonic()
    try:
        found, bad = read(path)
    except UserError as error:
        assert name in str(error)
        return
    finally:
        assert time.monotonic() - begin < SECONDS
    assert bad.records == len(found) + bad.bad + bad.empty
    assert len(bad.shown) == min(bad.bad, 5) and all(name in message for message in bad.shown)
    if name == "a.jsonl":
        # What is not damaged is read, whatever happens to the line beside it.
        lines = set(content.split(b"\n"))
        pairs = zip(PAIRS, FILES[name].split(b"\n"))
        assert set(found) >= {pair for pair, line in pairs if line in lines}
        assert bad.records == sum(1 for line in content.split(b"\n") if line.strip())
    elif name.count(".") > 1 and content:  # compressed files have checksums
        assert found == PAIRS
    elif name in ("a.parquet", "a.arrow"):
        assert bad.records == len(PAIRS)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60), name=st.sampled_from([*FILES, "a.srt", "a.vtt", "a.txt"]))
def test_any_bytes_are_read_or_named(tmp_path_factory, content, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        _, bad = read(path)
    except UserError as error:
        assert name in str(error)
    else:
        assert all(name in message for message in bad.shown)


@pytest.fixture(scope="module")
def byte_level():
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<silence>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the total is 6"] * 3, trainer)
    return model.to_str().encode()


@pytest.mark.parametrize("kind", ["tokenizers", "sentencepiece"])
@settings(max_examples=120, deadline=None)
@given(seed=seeds, text=st.text("the total is6\u00e9\u2581 \n", max_size=20))
def test_a_damaged_tokenizer_gives_texts_back_or_says_so(byte_level, kind, seed, text):
    draw = random.Random(seed)
    content = byte_level if kind == "tokenizers" else TOKENIZER.to_bytes()
    change = damaged_json if kind == "tokenizers" and draw.random() < 0.8 else damaged_bytes
    begin = time.monotonic()
    try:
        tokenizer = Tokenizer(kind, change(content, draw), "<silence>", "the file")
    except UserError as error:
        assert "the file" in str(error)
        return
    try:
        ids = tokenizer.encode(text)
        outcome = tokenizer.compare(text, ids)
    except TextError:
        assert not tokenizer.lossless
    else:
        assert all(0 <= i < tokenizer.vocab_size for i in ids) and tokenizer.silence_id not in ids
        if outcome == "same":
            assert tokenizer.decode(ids) == text
        else:
            assert not tokenizer.lossless
    assert time.monotonic() - begin < SECONDS
