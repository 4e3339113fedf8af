"""Data prepared by an earlier layout of the package (tests/golden/before/data) stay valid."""

import dataclasses
import json
import pathlib
import runpy
import shutil
import sys
import types

import pytest

from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig, from_config_dict
from msllm.data import identity, records
from msllm.data.loader import Loader
from msllm.data.prepare import prepare
from msllm.data.tables import unpack
from msllm.errors import UserError
from msllm.streams import StreamSpec

BEFORE = pathlib.Path(__file__).parent / "golden/before/data"
READER = "msllm.data.corpora:tatoeba"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the earlier data, from which the user's module `own` is imported."""
    shutil.copytree(BEFORE, tmp_path / "data")
    monkeypatch.syspath_prepend(tmp_path / "data")
    monkeypatch.delitem(sys.modules, "own", raising=False)
    yield tmp_path / "data"
    sys.modules.pop("own", None)


def config_of(folder, case):
    """The config with which the data of a case were prepared."""
    return from_config_dict(runpy.run_path(str(folder / "config.py"))["get_config"](case))


def contents(folder):
    """The bytes of each file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pairs_in(config, split):
    """The texts {(user, output)} in the examples of a split."""
    loader = Loader(config.data, split, StreamSpec.from_config(config.streams))
    tables = []
    for step in range(loader.num_batches):
        rows = range(min(config.data.batch_size, loader.num_tables - step * config.data.batch_size))
        tables += unpack(loader.batch(step, rows), loader.example_ids(step, rows))
    return {tuple(map(loader.tokenizer.decode, table.tokens.T)) for table in tables}


@pytest.mark.parametrize("case", ["tatoeba", "built_in", "own"])
def test_earlier_data_are_accepted_and_read(folder, case, capsys):
    config = config_of(folder, case)
    before = contents(folder / case)
    manifest = prepare(config, folder / case)
    assert "already holds this data" in capsys.readouterr().out
    assert contents(folder / case) == before
    assert manifest == json.loads(before["manifest.json"])
    pairs = [line.split("\t")[:2] for line in (folder / "pairs.txt").read_text().splitlines()]
    found = pairs_in(config, "train")
    if case == "tatoeba":
        held_out = pairs_in(config, "eval")
        assert len(held_out) == 2 and not held_out & found
        found |= held_out
    assert found == set(map(tuple, pairs))


def test_an_unfinished_run_is_continued(folder, capsys):
    config = config_of(folder, "interrupted")
    shard = folder / "interrupted/train-00000-of-00001.array_record"
    before = shard.stat().st_mtime_ns
    prepare(config, folder / "interrupted")
    assert "holds 1 of 1 portions" in capsys.readouterr().out
    assert shard.stat().st_mtime_ns == before
    assert len(pairs_in(config, "train")) == 5


def test_data_prepared_before_an_option_existed_are_accepted(tmp_path, capsys):
    options = {"examples": 20, "seed": 0}
    tokenizer = TokenizerConfig(model_type="word", vocab_size=256)
    data = DataConfig(
        converter="dictation", options=options, rows=64, shards=1, tokenizer=tokenizer
    )
    streams = StreamsConfig(("user", "thought", "output"), ("input", "thought", "output"))
    prepare(Config(data=data, streams=streams), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"]["options"] == options | {"questions": 1, "silence": 0}
    manifest["settings"]["options"] = options  # as in a manifest of an earlier version
    del manifest["digest"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    prepare(Config(data=data, streams=streams), tmp_path)
    assert "already holds this data" in capsys.readouterr().out
    other = dataclasses.replace(data, options=options | {"questions": 2})
    with pytest.raises(UserError, match=r"settings \(options \(questions was 1, now 2\) differ\)"):
        prepare(Config(data=other, streams=streams), tmp_path)


def test_chats_prepared_before_a_row_lay_between_turns_stay_valid(tmp_path, capsys):
    turns = [{"role": "user", "content": "one two"}, {"role": "output", "content": "three"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    data = DataConfig(
        converter="chat",
        path=str(tmp_path / "chats.jsonl"),
        dir=str(tmp_path / "data"),
        rows=16,
        shards=1,
        eval_percent=0.0,
        tokenizer=TokenizerConfig(model_type="word", vocab_size=32),
    )
    config = Config(data=data, streams=StreamsConfig(("user", "output"), ("input", "output")))
    before = dataclasses.replace(
        config, data=dataclasses.replace(data, options={"overlap": 0, "ignored_keys": ["x"]})
    )
    manifest = prepare(before, data.dir)
    assert manifest["settings"]["options"]["overlap"] == 0

    # What is trained on such data says so in its checkpoints, although its config does not.
    unset = identity.with_stored_options(data, manifest)
    assert unset.options["overlap"] == 0 and unset.options["ignored_keys"] == ["x"]
    Loader(data, "train", StreamSpec.from_config(config.streams))

    with pytest.raises(
        UserError, match=r"overlap was 0, now -1.* differ\): .*set them as they were"
    ):
        prepare(config, data.dir)
    capsys.readouterr()
    assert prepare(before, data.dir) == manifest
    assert "already holds this data" in capsys.readouterr().out

    new = prepare(config, tmp_path / "new")["settings"]
    assert new["options"]["overlap"] == -1
    # A manifest that does not give the option is from the time of the old default.
    del new["options"]["overlap"]
    assert identity.different_settings(manifest["settings"], new) == [
        "options (ignored_keys was [], now ['x'])"
    ]


def test_another_type_of_tokenizer_is_refused_with_its_values(folder):
    config = config_of(folder, "built_in")
    tokenizer = TokenizerConfig(vocab_size=config.data.tokenizer.vocab_size)
    data = dataclasses.replace(config.data, tokenizer=tokenizer)
    values = r"tokenizer \(model_type was 'word', now 'bpe'\) differ"
    with pytest.raises(UserError, match=values):
        prepare(dataclasses.replace(config, data=data), folder / "built_in")


def test_a_changed_input_is_refused(folder):
    with (folder / "pairs.txt").open("a") as file:
        file.write("Thanks.\tTack.\tCC-BY 2.0\n")
    for case, what in (("tatoeba", "data"), ("interrupted", "an unfinished run")):
        with pytest.raises(UserError, match=rf"{what} with other settings \(inputs differ\)"):
            prepare(config_of(folder, case), folder / case)


def test_a_changed_function_of_the_user_is_refused(folder):
    with (folder / "own.py").open("a") as file:
        file.write("# changed\n")
    with pytest.raises(UserError, match=r"other settings \(converter_code differ\)"):
        prepare(config_of(folder, "own"), folder / "own")


def test_another_reader_is_refused(folder):
    config = config_of(folder, "tatoeba")
    data = dataclasses.replace(config.data, format="msllm.data.corpora:switchboard")
    with pytest.raises(UserError, match=r"settings \(data.format \(was .*, now .*\) differ\)"):
        prepare(dataclasses.replace(config, data=data), folder / "tatoeba")


@pytest.mark.parametrize("changed, case", [(READER, "tatoeba"), ("wait_k", "built_in")])
def test_a_new_revision_of_a_function_of_msllm_is_refused(folder, changed, case, monkeypatch):
    monkeypatch.setattr(identity, "REVISIONS", {changed: 2})
    config = config_of(folder, case)
    with pytest.raises(UserError, match=r"other settings \((format|converter)_revision differ\)"):
        prepare(config, folder / case)
    manifest = prepare(config, folder / "new")
    assert prepare(config, folder / "new") == manifest
    monkeypatch.setattr(identity, "REVISIONS", {})
    with pytest.raises(UserError, match="_revision differ"):
        prepare(config, folder / "new")


def test_only_user_functions_are_identified_by_content(folder):
    def code(case):
        config = config_of(folder, case)
        settings = identity.get_settings(config, StreamSpec.from_config(config.streams))
        return {name: value for name, value in settings.items() if name.endswith("_code")}

    assert code("tatoeba") == code("built_in") == {}
    assert code("own") == {"converter_code": records.file_hash(folder / "own.py")}


def test_a_function_without_a_file_is_refused(folder, monkeypatch):
    module = types.ModuleType("typed_in_a_notebook")
    module.convert = lambda layout, record: []
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = config_of(folder, "own")
    data = dataclasses.replace(config.data, converter=f"{module.__name__}:convert")
    with pytest.raises(UserError, match="config.data.converter is .*: the module has no file"):
        prepare(dataclasses.replace(config, data=data), folder / "new")
