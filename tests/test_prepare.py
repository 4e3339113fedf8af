"""`prepare`: what it writes, that it is reproducible, and which data it or the loader refuses."""

import dataclasses
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
from runs import flip_a_bit

from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig, from_config_dict
from msllm.data import records
from msllm.data.loader import Loader
from msllm.data.prepare import prepare
from msllm.data.report import describe
from msllm.data.tables import example_hash, held_out, unpack
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
ONE = StreamsConfig(names=("text",), kinds=("output",))
WORD = TokenizerConfig(model_type="word", vocab_size=256)


def dictation_config(**data):
    defaults = {
        "converter": "dictation",
        "options": {"examples": 150},
        "tokenizer": WORD,
        "rows": 64,
    }
    return Config(data=DataConfig(**{**defaults, "eval_percent": 10.0, **data}))


def examples(config, out, split):
    """({id: table} of all examples of a split, its loader)."""
    loader = Loader(
        dataclasses.replace(config.data, dir=str(out)),
        split,
        StreamSpec.from_config(config.streams),
    )
    tables = []
    for step in range(loader.num_batches):
        if split == "eval":
            tables += unpack(loader.batch(step), loader.example_ids(step))
        else:  # the last batch also holds tables of the next epoch, which are left out
            left = loader.num_tables - step * config.data.batch_size
            rows = range(min(config.data.batch_size, left))
            tables += unpack(loader.batch(step, rows), loader.example_ids(step, rows))
    assert len({table.example for table in tables}) == len(tables)
    return {table.example: table for table in tables}, loader


def test_dictation_end_to_end(tmp_path):
    config = dictation_config()
    manifest = prepare(config, tmp_path / "a")
    train, loader = examples(config, tmp_path / "a", "train")
    held, _ = examples(config, tmp_path / "a", "eval")
    assert len(train) + len(held) == 150 and not set(train) & set(held)
    assert set(held) == {name for name in (*train, *held) if held_out(name, 10.0)}
    for name, table in train.items():
        said = table.tokens[:, 0][table.tokens[:, 0] != loader.tokenizer.silence_id]
        assert example_hash(loader.tokenizer.decode(said)) == name

    part = manifest["splits"]["train"]
    assert part["examples"] == len(train)
    assert part["rows"] == sum(len(t.tokens) for t in train.values())
    silent = np.concatenate([t.tokens for t in train.values()]) == loader.tokenizer.silence_id
    assert list(part["silence"].values()) == silent.sum(axis=0).tolist()
    assert list(part["tokens"].values()) == (~silent).sum(axis=0).tolist()
    assert part["silence_rate"] == pytest.approx(silent.mean(), abs=1e-4)
    filled = part["rows"] / (64 * part["tables"])
    assert part["packing_efficiency"] == pytest.approx(filled, abs=1e-4)
    assert sum(shard["records"] for shard in part["shards"]) == part["tables"] == loader.num_tables
    assert f"{len(train)} examples" in describe(manifest)

    prepare(config, tmp_path / "b")
    for file in sorted(os.listdir(tmp_path / "a")):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_both_dictation_layouts_hold_out_the_same_examples(tmp_path):
    multi = dictation_config()
    single = dataclasses.replace(dictation_config(converter="dictation_single"), streams=ONE)
    prepare(multi, tmp_path / "multi")
    prepare(single, tmp_path / "single")
    for split in ("train", "eval"):
        in_multi, _ = examples(multi, tmp_path / "multi", split)
        in_single, _ = examples(single, tmp_path / "single", split)
        assert set(in_multi) == set(in_single)


def test_tables_with_absent_cells_and_delays(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [
        json.dumps({"streams": {"user": ["a", "b", None], "output": [None, "", str(i)]}}) + "\n"
        for i in range(20)
    ]
    path.write_text("".join(lines))
    config = Config(
        streams=StreamsConfig(delays=(0, 0, 2)),
        data=DataConfig(
            converter="tables", path=str(path), tokenizer=WORD, rows=16, eval_percent=0.0
        ),
    )
    manifest = prepare(config, tmp_path / "out")
    assert manifest["splits"]["eval"]["tables"] == 0
    found, loader = examples(config, tmp_path / "out", "train")
    assert len(found) == 20
    for table in found.values():
        assert table.present.tolist() == [[1, 1, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]
        assert table.tokens[3, 2] == loader.tokenizer.silence_id
    words = {loader.tokenizer.decode([t.tokens[4, 2]]) for t in found.values()}
    assert words == {str(i) for i in range(20)}
    with pytest.raises(UserError, match="split 'eval' .* holds no table.*eval_percent"):
        examples(config, tmp_path / "out", "eval")


def test_chat_with_an_imported_tokenizer(tmp_path):
    first = dictation_config()
    prepare(first, tmp_path / "first")
    path = tmp_path / "chat.jsonl"
    turns = [
        {"role": "user", "content": "please add 3"},
        {"role": "output", "content": "that makes 3 ."},
    ]
    path.write_text(json.dumps({"messages": turns}) + "\n\n")
    tokenizer = TokenizerConfig(path=str(tmp_path / "first/tokenizer.model"))
    config = Config(
        data=DataConfig(
            converter="chat", path=str(path), tokenizer=tokenizer, rows=16, eval_percent=0.0
        )
    )
    prepare(config, tmp_path / "out")
    (table,) = examples(config, tmp_path / "out", "train")[0].values()
    loaded = Tokenizer.load(tmp_path / "out/tokenizer.model")
    assert loaded.decode(table.tokens[:, 0]) == "please add 3"
    assert loaded.decode(table.tokens[:, 2]) == "that makes 3 ."


def test_the_tail_of_a_text_is_held_out(tmp_path):
    path = tmp_path / "plain.txt"
    content = "".join(f"line {i} of the text\n" for i in range(200))
    path.write_text(content)
    tokenizer = TokenizerConfig(model_type="char", vocab_size=64)
    data = DataConfig(
        converter="single",
        path=str(path),
        tokenizer=tokenizer,
        rows=33,
        split="tail",
        eval_percent=10.0,
        batch_size=4,
    )
    config = Config(streams=ONE, data=data)
    manifest = prepare(config, tmp_path / "out")
    held, loader = examples(config, tmp_path / "out", "eval")
    total = sum(part["examples"] for part in manifest["splits"].values())
    assert len(held) == round(total / 10)
    assert len(held) > 1
    assert sum(len(table.tokens) < 33 for table in held.values()) == 1  # the end of the text
    texts = {loader.tokenizer.decode(table.tokens[:, 0]) for table in held.values()}
    assert all(text in content[int(0.85 * len(content)) :] for text in texts)


def test_a_held_out_split_from_its_own_file(tmp_path):
    for name, words in (("train", "abc"), ("official", "xy")):
        lines = [
            json.dumps({"streams": {"user": [word, word], "output": ["", word]}}) + "\n"
            for word in words
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "tokenizer.txt").write_text("a b c x y")
    words = dataclasses.replace(WORD, path=str(tmp_path / "words/tokenizer.model"))
    data = DataConfig(
        converter="single",
        path=str(tmp_path / "tokenizer.txt"),
        tokenizer=WORD,
        rows=8,
        eval_percent=0.0,
    )
    prepare(Config(streams=ONE, data=data), tmp_path / "words")
    data = DataConfig(
        converter="tables",
        path=str(tmp_path / "train.jsonl"),
        eval_path=str(tmp_path / "official.jsonl"),
        tokenizer=words,
        rows=4,
        eval_percent=50.0,  # has no effect with eval_path
    )
    manifest = prepare(Config(data=data), tmp_path / "out")
    for split, count in (("train", 3), ("eval", 2)):
        found, loader = examples(Config(data=data), tmp_path / "out", split)
        assert len(found) == count == manifest["splits"][split]["examples"]
        said = {loader.tokenizer.decode(table.tokens[:, 0]) for table in found.values()}
        assert said == ({"a a", "b b", "c c"} if split == "train" else {"x x", "y y"})
    (tmp_path / "official.jsonl").write_text('{"streams": {"user": ["a", "b"]}}\n')
    with pytest.raises(UserError, match=r"other settings \(eval_inputs differ\)"):
        prepare(Config(data=data), tmp_path / "out")
    with pytest.raises(UserError, match="config.data.eval_format is 'jsonl': needs data.eval_path"):
        Config(data=DataConfig(eval_format="jsonl"))


def test_input_without_records_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.touch()
    data = DataConfig(converter="tables", path=str(path), rows=8)
    with pytest.raises(UserError, match="config.data.path is '.*t.jsonl': there is no record"):
        prepare(Config(data=data), tmp_path / "out")


def test_a_loader_asks_for_the_directory_that_is_missing():
    with pytest.raises(UserError, match="config.data.dir is empty"):
        Loader(DataConfig(), "train", StreamSpec.from_config(StreamsConfig()))


def test_an_existing_directory_is_kept_if_equal_and_otherwise_refused(tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    path.write_text('{"streams": {"user": "a b", "output": "c"}}\n')
    config = Config(
        data=DataConfig(
            converter="tables", path=str(path), tokenizer=WORD, rows=8, eval_percent=0.0
        )
    )
    manifest = prepare(config, tmp_path / "out")
    before = (tmp_path / "out/train-00000-of-00004.array_record").stat().st_mtime_ns
    assert prepare(config, tmp_path / "out") == manifest
    assert "already holds this data: nothing to do; to prepare it again, give another --out" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "out/train-00000-of-00004.array_record").stat().st_mtime_ns == before
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, rows=9))
    with pytest.raises(
        UserError,
        match=r"settings \(rows \(was 8, now 9\) differ\): choose another --out, or delete",
    ):
        prepare(other, tmp_path / "out")
    path.write_text('{"streams": {"user": "a b", "output": "d"}}\n')
    with pytest.raises(UserError, match=r"other settings \(inputs differ\)"):
        prepare(config, tmp_path / "out")


def test_a_failed_run_leaves_no_manifest_and_can_be_repeated(tmp_path):
    path = tmp_path / "t.jsonl"
    good = '{"streams": {"user": "please add", "output": "."}}\n'
    path.write_text(good + "oops\n")
    prepare(dictation_config(), tmp_path / "words")
    tokenizer = TokenizerConfig(path=str(tmp_path / "words/tokenizer.model"))
    data = DataConfig(converter="tables", path=str(path), tokenizer=tokenizer, rows=8)
    with pytest.raises(UserError, match="t.jsonl:2: invalid JSON"):
        prepare(Config(data=data), tmp_path / "out")
    with pytest.raises(UserError, match="unfinished or holds no prepared data.*msllm prepare"):
        records.open_prepared(tmp_path / "out", "train")
    path.write_text(good)
    prepare(Config(data=dataclasses.replace(data, eval_percent=0.0)), tmp_path / "out")
    records.open_prepared(tmp_path / "out", "train")


def test_data_without_examples_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"streams": {"user": "a"}}\n')
    config = Config(data=DataConfig(converter="tables", path=str(path), tokenizer=WORD, rows=8))
    with pytest.raises(UserError, match="no example of at least 2 rows"):
        prepare(config, tmp_path / "out")


@pytest.fixture
def prepared(tmp_path):
    prepare(dictation_config(), tmp_path / "data")
    return tmp_path / "data"


def shard_of(prepared):
    return sorted(prepared.glob("train-*"))[1]


def damage_missing(prepared):
    shard_of(prepared).unlink()


def damage_short(prepared):
    shard_of(prepared).write_bytes(shard_of(prepared).read_bytes()[:-10])


def damage_flip(prepared):
    flip_a_bit(shard_of(prepared))


def damage_tokenizer(prepared):
    (prepared / "tokenizer.model").write_bytes(b"another")


def damage_no_tokenizer(prepared):
    (prepared / "tokenizer.model").unlink()


def damage_manifest(prepared):
    (prepared / "manifest.json").write_text("{")


def damage_format(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    (prepared / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_missing, "train-00001-of-00004.array_record is missing"),
        (damage_short, r"train-00001.* has \d+ bytes, manifest.json says"),
        (damage_flip, "train-00001.* is corrupt"),
        (damage_tokenizer, "tokenizer.model is not the tokenizer"),
        (damage_no_tokenizer, "tokenizer.model is missing"),
        (damage_manifest, "manifest.json is damaged"),
        (
            damage_format,
            "manifest.json has format 99, but this version of msllm reads the formats 1 and 2",
        ),
    ],
)
def test_the_loader_finds_damage_when_it_opens_data(prepared, damage, message):
    config = dictation_config(dir=str(prepared))
    spec = StreamSpec.from_config(config.streams)
    Loader(config.data, "train", spec)
    damage(prepared)
    with pytest.raises(UserError, match=f"{message}.*msllm prepare"):
        Loader(config.data, "train", spec)


def test_a_missing_directory_and_an_unknown_split_are_named(tmp_path, prepared):
    beside = f"nowhere does not exist \\({re.escape(str(tmp_path))} holds .*nowhat.*\\)"
    (tmp_path / "other").mkdir()
    (tmp_path / "nowhat").mkdir()
    with pytest.raises(UserError, match=f"{beside}: prepare it with `msllm prepare .*, or name"):
        records.open_prepared(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="no split 'test': must be one of train, eval"):
        records.open_prepared(prepared, "test")


@pytest.mark.parametrize("name", ["quickstart", "quickstart_single", "gsm8k", "shakespeare"])
def test_configs_are_valid(name):
    config = from_config_dict(runpy.run_path(str(ROOT / f"configs/{name}.py"))["get_config"]())
    StreamSpec.from_config(config.streams)
    assert config.data.dir == f"data/{name}"


def test_command_line(tmp_path):
    def run(name, option):
        options = [f"--config=configs/{name}.py", f"--out={tmp_path}/out", option]
        command = [sys.executable, "-m", "msllm", "prepare", *options]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run("quickstart", "--config.data.options.examples=60")
    assert done.returncode == 0, done.stderr
    assert "tokenizer: sentencepiece" in done.stdout
    assert f"prepared in {tmp_path}/out" in done.stdout
    done = run("gsm8k", "--config.data.path=/nowhere.jsonl")
    assert done.returncode == 2
    assert done.stderr.startswith("error: config.data.path is '/nowhere.jsonl'")
    assert "MSLLM_SHARED" not in done.stderr
