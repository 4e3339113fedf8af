"""Damaged and hostile files: every reader gives the right result or names the file."""

import io
import json
import random
import shutil
import zipfile

import hf_models
import numpy as np
import pytest
import test_gguf
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msllm.chat.recording import Branch, Recording
from msllm.config import TokenizerConfig
from msllm.data import records
from msllm.errors import UserError
from msllm.kernels.cpu import build
from msllm.monitor import Goodput
from msllm.tokenizer import train as train_tokenizer
from msllm.weights import hf
from msllm.weights.convert import from_gguf, from_hf
from msllm.weights.load import load
from msllm.weights.vocabulary import add_rows

# Values that replace a value in a JSON file.
VALUES = (
    *(None, True, -1, 0, 1, 1 << 40, 10**400, 1e308, float("nan")),
    *("x", "", [], {}, [1], ["a"], {"a": 1}, "\ud800", "\u2581"),
)
STREAMS = "user=input,output=output"
seeds = st.integers(0, 1 << 32)
many = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(value, path=()):
    """The paths of all values inside a JSON value; of a long list only its first items."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value[:4]) if isinstance(value, list) else items
    for key, inner in items:
        yield from places(inner, (*path, key))


def damaged_json(content, draw):
    """JSON text in which one value is replaced or removed."""
    value = json.loads(content)
    path = draw.choice(list(places(value)))
    if not path:
        return json.dumps(draw.choice(VALUES)).encode()
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if draw.random() < 0.2:
        del inner[path[-1]]
    else:
        inner[path[-1]] = draw.choice(VALUES)
    return json.dumps(value).encode()


def damaged_bytes(content, draw):
    """Bytes that are cut, changed or shifted at one place, mostly near the beginning."""
    content, kind = bytearray(content), draw.randrange(4)
    place = draw.randrange(min(len(content), draw.choice((100, 1000, 10**9))))
    if kind == 0:
        return bytes(content[:place])
    if kind == 1:
        content[place] = draw.randrange(256)
    elif kind == 2:
        number = draw.choice(((1 << 64) - 1, 1 << 62, 10**9, 0))
        content[place : place + 8] = number.to_bytes(8, "little")
    else:
        del content[place : place + draw.randrange(1, 20)]
    return bytes(content)


def damage(path, draw):
    """Damages a file."""
    content = path.read_bytes()
    is_json = path.suffix == ".json" and draw.random() < 0.8
    path.write_bytes((damaged_json if is_json else damaged_bytes)(content, draw))


@pytest.fixture(scope="module")
def bpe():
    """The content of a tokenizer.json with a special token and few others."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=30, special_tokens=["<|end|>"], show_progress=False
    )
    model.train_from_iterator(["the total is"] * 3, trainer)
    return model.to_str().encode()


@pytest.fixture(scope="module")
def pieces():
    """The content of a tokenizer.model."""
    config = TokenizerConfig(model_type="char", vocab_size=40)
    return train_tokenizer(
        ["take 4 add 3 no wait add 2 ?", "the total is 6"] * 5, config
    ).to_bytes()


def write_folder(folder, files, variant="llama"):
    """Writes a recorded model and other files to a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        hf_models.RECORDED / variant, folder, ignore=shutil.ignore_patterns("logits.npz")
    )
    for name, content in files.items():
        text = json.dumps(content).encode() if isinstance(content, dict) else content
        (folder / name).write_bytes(text)


@given(seed=seeds, variant=st.sampled_from(("llama", "qwen2_yarn")))
@settings(many, max_examples=60)
def test_a_hugging_face_folder_loads_or_is_refused(seed, variant, tmp_path):
    draw, folder = random.Random(seed), tmp_path / "model"
    write_folder(folder, {}, variant)
    damage(draw.choice(sorted(folder.iterdir())), draw)
    try:
        load(folder)
    except UserError as error:
        assert str(folder) in str(error)


@given(seed=seeds, kind=st.sampled_from(("tokenizers", "sentencepiece")))
@settings(many, max_examples=60)
def test_the_tokenizer_of_a_folder_is_imported_or_refused(seed, kind, tmp_path, bpe, pieces):
    draw, folder, out = random.Random(seed), tmp_path / "model", tmp_path / "out"
    if kind == "tokenizers":
        added, tokenizer = {"0": {"content": "<|end|>", "special": True}}, {"tokenizer.json": bpe}
    else:
        added = {"23": {"content": "<|a|>", "special": True}}
        tokenizer = {"tokenizer.model": pieces, "added_tokens.json": {"<|a|>": 23}}
    files = tokenizer | {
        "tokenizer_config.json": {"eos_token": "<|end|>", "added_tokens_decoder": added},
        "special_tokens_map.json": {"eos_token": "<|end|>"},
        "generation_config.json": {"eos_token_id": [2]},
    }
    write_folder(folder, files)
    damage(folder / draw.choice(sorted(files)), draw)
    shutil.rmtree(out, ignore_errors=True)
    try:
        from_hf(folder, out, streams=STREAMS)
    except UserError as error:
        assert str(folder) in str(error)
        assert not out.exists()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A GGUF file of a small model with a tokenizer."""
    config, _, parameters = hf.read_folder(hf_models.RECORDED / "qwen2")
    config, parameters = add_rows(config, parameters, 305, config.vocab_size)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    test_gguf.write(path, config, parameters)
    return path


@given(seed=seeds)
@settings(many, max_examples=40)
def test_a_gguf_file_is_imported_or_refused(seed, gguf_file, tmp_path):
    path, out = tmp_path / "model.gguf", tmp_path / "out"
    path.write_bytes(damaged_bytes(gguf_file.read_bytes(), random.Random(seed)))
    shutil.rmtree(out, ignore_errors=True)
    try:
        from_gguf(path, out, streams=STREAMS)
    except UserError as error:
        assert str(path) in str(error)


@pytest.fixture
def recording_file(tmp_path, letters):
    """A recording of three rows."""
    recording = Recording(("user", "output"), ("input", "output"), letters)
    tokens = np.array([[3, 1], [4, 1], [1, 5]], np.int32)
    about = {"parent": None, "forked": 0, "events": []}
    recording.branches = [Branch.stored(about, tokens, tokens > 0, np.arange(3.0))]
    path = tmp_path / "recording.npz"
    recording.save(path)
    return path


def damaged_arrays(content, draw):
    """An npz file in which one array is changed."""
    arrays = dict(np.load(io.BytesIO(content)))
    name, kind = draw.choice(sorted(arrays)), draw.randrange(6)
    array = arrays[name]
    if name == "about":
        arrays[name] = np.array(damaged_json(str(array), draw).decode())
    elif kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[name] = array.astype(draw.choice((np.float64, np.int64, "U3", bool, complex)))
    elif kind == 2:
        arrays[name] = array[..., :-1]
    elif kind == 3:
        arrays[name] = array.reshape(-1)
    elif kind == 4:
        arrays[name] = array.astype(np.int64) + 10**6
    else:
        arrays[name] = array[:0]
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def damaged_members(content, draw):
    """An npz file in which bytes of one array's file are changed, its size among them."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        chosen = draw.choice(old.namelist())
        for name in old.namelist():
            data = old.read(name)
            if name == chosen:
                data = data.replace(b"(1, 3", b"(9999999999, 3")
                data = data if draw.random() < 0.5 else damaged_bytes(data, draw)
            new.writestr(name, data)
    return stream.getvalue()


@given(seed=seeds)
@settings(many, max_examples=150)
def test_a_recording_is_read_or_refused(seed, recording_file):
    draw, content = random.Random(seed), recording_file.read_bytes()
    kind = draw.choice((damaged_bytes, damaged_arrays, damaged_members))
    path = recording_file.with_name("damaged.npz")
    path.write_bytes(kind(content, draw))
    try:
        recording = Recording.load(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        again = path.with_name("again.npz")
        again.unlink(missing_ok=True)
        if any(branch.rows for branch in recording.branches):
            recording.save(again)


@given(seed=seeds)
@many
def test_a_changed_manifest_is_named(seed, data_dir, tmp_path):
    path = tmp_path / records.MANIFEST
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    before = json.loads(path.read_text())
    path.write_bytes(damaged_json(path.read_text(), random.Random(seed)))
    after = json.loads(path.read_text())
    if after == before or "digest" not in after:
        return
    with pytest.raises(UserError, match=records.MANIFEST):
        records.read_manifest(tmp_path)


def test_a_manifest_without_digest_is_read(data_dir, tmp_path):
    """Earlier versions wrote none."""
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    manifest = json.loads((tmp_path / records.MANIFEST).read_text())
    del manifest["digest"]
    (tmp_path / records.MANIFEST).write_text(json.dumps(manifest))
    assert records.read_manifest(tmp_path) == manifest


@given(seed=seeds)
@many
def test_damaged_times_do_not_end_a_run(seed, tmp_path):
    path = tmp_path / "goodput.json"
    path.unlink(missing_ok=True)
    goodput = Goodput(path)
    goodput.saved(10)
    goodput.write()
    damage(path, random.Random(seed))
    goodput = Goodput(path)
    goodput.restored(10)
    goodput.write()
    assert goodput.attempts in (1, 2)


def test_a_library_that_was_cut_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && echo compiled > "$2"; shift; done\n'
    )
    compiler.chmod(0o755)
    library = build._build(str(compiler))
    complete = library.read_bytes()
    assert complete.startswith(b"compiled")
    library.write_bytes(complete[:-3])
    assert build._build(str(compiler)) == library
    assert library.read_bytes() == complete
