"""Importing models, adding streams to them, training from them, and exporting them."""

import dataclasses
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys

import golden_cases
import hf_models
import jax
import numpy as np
import pytest
import tokenizers
from runs import flip_a_bit, make_config, make_program
from safetensors.numpy import load_file, save_file

from msllm.config import TokenizerConfig, from_config_dict
from msllm.data.loader import Loader
from msllm.data.prepare import prepare
from msllm.data.tables import unpack
from msllm.errors import UserError
from msllm.evals.held_out import open_split
from msllm.evals.score import score
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer
from msllm.tokenizer import train as train_tokenizer
from msllm.training import train
from msllm.weights import hf, hf_config
from msllm.weights.convert import from_hf, parse_streams, to_hf
from msllm.weights.load import LoadedModel, load
from msllm.weights.vocabulary import TokenizerFile, with_silence
from msllm.weights.warm_start import fine_tune, initial_parameters, stream_vectors

STREAMS = "user,thought,output"
TEXTS = ["take 4 add 3 no wait add 2 ?", "The total is 6.", "0 1 2 3 4 5 6 7 8 9"] * 5
FAMILIES = ("llama_llama3", "qwen2_yarn", "qwen3")  # of tests/hf


def tokenizer_file(pieces=30, special=("<eos>", "<unused>")) -> bytes:
    """A `tokenizers` file with `pieces` tokens: words, then the special tokens."""
    words = sorted({word for text in TEXTS for word in text.split()})[: pieces - len(special)]
    words += [f"word{i}" for i in range(pieces - len(special) - len(words))]
    model = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0])
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(list(special))
    return model.to_str().encode()


@pytest.fixture
def folder(tmp_path):
    """A function folder(name, pieces) that copies a recorded model.

    The copy has a tokenizer with `pieces` tokens. The function returns its path.
    """

    def make(name="qwen3", pieces=hf_models.VOCABULARY):
        path = tmp_path / name
        path.mkdir()
        for file in (hf_models.RECORDED / name).iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        (path / "tokenizer.json").write_bytes(tokenizer_file(pieces))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        return path

    return make


def tensors_of(path):
    """All tensors of a Hugging Face folder."""
    return {name: x for file in path.glob("*.safetensors") for name, x in load_file(file).items()}


def assert_same_tensors(ours, theirs):
    """Asserts that names, dtypes and bytes are equal."""
    assert set(ours) == set(theirs)
    for name, x in theirs.items():
        assert ours[name].dtype == x.dtype and ours[name].tobytes() == x.tobytes(), name


def logits_of(model, tokens):
    """Logits [B, T, S, V] of a full forward pass."""
    return score(model, {"tokens": tokens}).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_added_streams_compute_what_the_imported_model_computes(name, folder, tmp_path):
    source, recorded = folder(name), np.load(hf_models.RECORDED / name / "logits.npz")
    from_hf(source, tmp_path / "out", streams=STREAMS)
    model = load(tmp_path / "out")
    assert model.streams.names == ("user", "thought", "output")
    assert not np.asarray(model.parameters["stream_embedding"]).any()
    assert model.config.vocab_size == hf_models.VOCABULARY + 1 == model.tokenizer.vocab_size
    tokens = np.random.default_rng(1).integers(0, hf_models.VOCABULARY + 1, (1, hf_models.ROWS, 3))
    tokens[0, :, 2] = recorded["tokens"]
    ours = logits_of(model, tokens)[0, :, 2]
    np.testing.assert_allclose(ours[:, :-1], recorded["logits"], rtol=0, atol=1e-4)
    # The logit of silence, the new token, is the mean of the other logits.
    np.testing.assert_allclose(ours[:, -1], recorded["logits"].mean(1), rtol=0, atol=1e-4)

    if name != "qwen3":
        return
    # A change of the visibility makes other streams visible, except for silence if it is hidden.
    block_causal = model.with_visibility("block_causal")
    assert np.abs(logits_of(block_causal, tokens)[0, :, 2, :-1] - recorded["logits"]).max() > 1e-2
    tokens[..., :2] = model.tokenizer.silence_id
    ours = logits_of(block_causal.with_streams(skip_silence=True), tokens)[0, :, 2, :-1]
    np.testing.assert_allclose(ours, recorded["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["llama", "llama_linear", "llama_llama3", "qwen2", "qwen2_yarn", "qwen3", "qwen3_yarn"]
)
@pytest.mark.parametrize(
    "pieces", [hf_models.VOCABULARY, hf_models.VOCABULARY - 3], ids=["full", "padded"]
)
def test_the_round_trip_of_one_stream_is_exact(name, pieces, folder, tmp_path):
    source = folder(name, pieces)
    from_hf(source, tmp_path / "out", vocab_multiple=16 if name == "llama" else 1)
    to_hf(tmp_path / "out", tmp_path / "back")
    assert_same_tensors(tensors_of(tmp_path / "back"), tensors_of(source))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    there, back = (
        json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "back")
    )
    assert hf_config.from_hf(there) == hf_config.from_hf(back)
    for key in ("max_position_embeddings", "eos_token_id", "vocab_size", "model_type"):
        assert there[key] == back[key]


def test_an_import_may_have_a_group_of_streams(folder, tmp_path):
    from_hf(folder("qwen3"), tmp_path / "out", streams="user,thread * 2=thought,output")
    model = load(tmp_path / "out")
    assert len(model.parameters["stream_embedding"]) == 3
    names = ("user", "thread.0", "thread.1", "thread.2", "output")
    assert model.with_threads(3).streams.names == names
    with pytest.raises(UserError, match=r"has groups \(thread\): in no Hugging Face family"):
        to_hf(tmp_path / "out", tmp_path / "hf")


def test_the_round_trip_of_several_streams_is_exact_and_keeps_their_names(folder, tmp_path):
    from_hf(
        folder("qwen3", hf_models.VOCABULARY - 3),
        tmp_path / "grown",
        streams="a=input,b=thought,c=output",
    )
    to_hf(tmp_path / "grown", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_channels"] == 3
    assert "model.channel_embedding.weight" in tensors_of(tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "again")
    first, exported, second = (load(tmp_path / name) for name in ("grown", "hf", "again"))
    for other in (exported, second):
        assert (other.config, other.streams) == (first.config, first.streams)
        assert other.tokenizer.hash == first.tokenizer.hash
        assert other.tokenizer.silence_id == first.tokenizer.silence_id
        jax.tree.map(np.testing.assert_array_equal, other.parameters, first.parameters)
    from_hf(tmp_path / "hf", tmp_path / "renamed", streams="x=input,y=thought,z=output")
    renamed = load(tmp_path / "renamed").streams
    assert renamed == dataclasses.replace(first.streams, names=("x", "y", "z"))
    with pytest.raises(UserError, match="names 2 streams: .* has 3"):
        from_hf(tmp_path / "hf", tmp_path / "none", streams="user,output")


@pytest.mark.parametrize("name", ["s7_c3_causal", "s7_c1_block", "s7_noembed", "s5_three_stream"])
def test_checkpoints_of_the_reference_are_imported_unchanged(name, tmp_path):
    source = golden_cases.case(name).path
    from_hf(source, tmp_path / "out")
    expected, ours = load(source), load(tmp_path / "out")
    assert (ours.config, ours.streams) == (expected.config, expected.streams)
    jax.tree.map(np.testing.assert_array_equal, ours.parameters, expected.parameters)
    to_hf(tmp_path / "out", tmp_path / "back")
    theirs = {name: x for name, x in tensors_of(source).items() if "gate_in_norm" not in name}
    assert_same_tensors(tensors_of(tmp_path / "back"), theirs)
    with pytest.raises(UserError, match="out has no tokenizer"):
        open_split(ours)


def test_added_streams_share_the_stream_vector_of_the_import(tmp_path):
    source = golden_cases.case("s7_c1_block").path
    from_hf(source, tmp_path / "out", streams="user,output")
    one, two = load(source), load(tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, one.config.vocab_size, (1, 9, 2))
    for stream in range(2):
        expected = logits_of(one, tokens[..., stream : stream + 1])
        np.testing.assert_allclose(
            logits_of(two, tokens)[:, :, stream], expected[:, :, 0], rtol=0, atol=1e-4
        )


def test_the_dtype_is_kept_unless_it_would_round(folder, tmp_path):
    source = folder()
    from_hf(source, tmp_path / "out")
    to_hf(tmp_path / "out", tmp_path / "wide", dtype="float32")
    wide = tensors_of(tmp_path / "wide")
    assert {x.dtype for x in wide.values()} == {np.dtype(np.float32)}
    # In float32, change one number so that bfloat16 cannot represent it.
    wide["model.norm.weight"][0] += 1e-6
    save_file(wide, tmp_path / "wide" / hf.WEIGHTS)
    from_hf(tmp_path / "wide", tmp_path / "out2")
    report = to_hf(tmp_path / "out2", tmp_path / "back", like=str(source))
    assert "use --dtype=bfloat16" in report
    assert_same_tensors(tensors_of(tmp_path / "back"), wide)
    to_hf(tmp_path / "out2", tmp_path / "rounded", dtype="bfloat16")
    assert_same_tensors(tensors_of(tmp_path / "rounded"), tensors_of(source))


def test_one_file_and_shards_hold_the_same_tensors(tmp_path):
    config, streams, parameters = hf.read_folder(hf_models.RECORDED / "qwen3_yarn")
    for name, size in (("one", hf.SHARD_BYTES), ("many", 3000)):
        hf.write_folder(tmp_path / name, config, streams, parameters, shard_bytes=size)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    assert not (tmp_path / "one" / hf.INDEX).exists()
    assert_same_tensors(tensors_of(tmp_path / "many"), tensors_of(tmp_path / "one"))
    jax.tree.map(np.testing.assert_array_equal, hf.read_folder(tmp_path / "many")[2], parameters)


def test_silence_is_found_or_added(folder, tmp_path):
    source = folder("qwen2", hf_models.VOCABULARY - 3)
    base = hf.read_folder(source)[2]
    from_hf(source, tmp_path / "added")
    added = load(tmp_path / "added")
    assert added.tokenizer.silence == "<silence>"
    assert added.tokenizer.silence_id == hf_models.VOCABULARY - 3
    from_hf(source, tmp_path / "named", silence="<unused>")
    named = load(tmp_path / "named")
    assert named.tokenizer.silence_id == hf_models.VOCABULARY - 4
    assert named.tokenizer.to_bytes() == (source / "tokenizer.json").read_bytes()
    imported = Tokenizer.load(source / "tokenizer.json", "<eos>")
    for model in (added, named):
        # The table has room for the token, so it does not change.
        np.testing.assert_array_equal(model.parameters["embedding"], base["embedding"])
        assert model.tokenizer.encode("take 4") == imported.encode("take 4")
    with pytest.raises(UserError, match="no such special token .*<eos>, <unused>"):
        from_hf(source, tmp_path / "none", silence="<quiet>")
    assert not (tmp_path / "none").exists()


def test_silence_is_added_to_sentencepiece_files():
    settings = TokenizerConfig(model_type="char", vocab_size=60, silence="<s>")
    data = train_tokenizer(TEXTS, settings).to_bytes()
    before = Tokenizer("sentencepiece", data, "<s>")
    tokenizer, added = with_silence(TokenizerFile("sentencepiece", data, "here"), "")
    assert added and tokenizer.silence_id == before.vocab_size == tokenizer.vocab_size - 1
    assert tokenizer.encode(TEXTS[0]) == before.encode(TEXTS[0])
    assert tokenizer.silence_id not in tokenizer.encode("<silence>")
    _, added = with_silence(TokenizerFile("sentencepiece", tokenizer.to_bytes(), "here"), "")
    assert added is False


def test_vocab_multiple_pads_the_tables(folder, tmp_path):
    from_hf(folder("llama"), tmp_path / "out", vocab_multiple=32)
    model, base = load(tmp_path / "out"), hf.read_folder(hf_models.RECORDED / "llama")[2]
    assert model.config.vocab_size == 64
    for name in ("embedding", "head"):
        np.testing.assert_array_equal(model.parameters[name][: hf_models.VOCABULARY], base[name])


def test_token_ids_with_gaps_are_refused():
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 2}, unk_token="a"))
    with pytest.raises(UserError, match="have gaps"):
        with_silence(TokenizerFile("tokenizers", model.to_str().encode(), "here"), "")


def test_the_error_names_a_wrong_source_and_no_output_is_left(folder, tmp_path):
    source = folder("qwen3")
    out = tmp_path / "out"

    def refused(message, **options):
        with pytest.raises(UserError, match=message):
            from_hf(source, out, **options)
        assert not out.exists() and not list(tmp_path.glob(".out*"))

    refused("'a' has no kind of input, output, thought", streams="a,b")
    refused("streams.names is", streams="user,user,output")
    refused("must be one of block_causal", streams=STREAMS, visibility="open")
    refused("there is no tokenizer file nowhere.json", tokenizer="nowhere.json")
    (source / "tokenizer.json").write_bytes(tokenizer_file(hf_models.VOCABULARY + 5))
    refused("has 45 tokens, but vocab_size of the model is 40")
    (source / "tokenizer.json").write_text("{")
    refused("tokenizer of .* is damaged")
    (source / "tokenizer.json").unlink()
    refused("has no tokenizer, so no '<eos>'", silence="<eos>")
    shard = sorted(source.glob("model-*"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    refused(f"{shard.name} is damaged")
    shard.write_bytes(whole)
    tensors = load_file(shard)
    first = min(tensors)
    save_file(tensors | {first: np.full_like(tensors[first], np.nan)}, shard)
    refused(f"{shard.name}: {first} holds {tensors[first].size} numbers that are not finite")
    shard.unlink()
    refused(f"there is no file .*{shard.name}")
    shard.write_bytes(whole)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"intermediate_size": 24}))
    refused("mlp.* has shape .* the config asks for")


def test_nothing_is_overwritten(folder, tmp_path):
    source = folder()
    from_hf(source, tmp_path / "out")

    def contents():
        return {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    before = contents()
    for again in (
        lambda: from_hf(source, tmp_path / "out"),
        lambda: to_hf(tmp_path / "out", tmp_path / "out"),
    ):
        with pytest.raises(UserError, match="exists already, and nothing is overwritten"):
            again()
    assert contents() == before
    (tmp_path / "empty").mkdir()
    to_hf(tmp_path / "out", tmp_path / "empty")
    assert tensors_of(tmp_path / "empty")


def test_streams_are_parsed():
    assert parse_streams("user, output").kinds == ("input", "output")
    assert parse_streams("sensor=input,plan=thought,output").names == ("sensor", "plan", "output")


@pytest.fixture
def imported(folder, tmp_path):
    """The folder of an imported model with three streams."""
    from_hf(folder("qwen3"), tmp_path / "base", streams=STREAMS)
    return tmp_path / "base"


def fine_tuning_config(folder, **dotted):
    """A config of one step that starts from an imported model."""
    settings = fine_tune(folder)
    small = {"data.rows": 16, "data.batch_size": 8, "optim.warmup_steps": 0, "steps": 1}
    settings.update_from_flattened_dict(small | dotted)
    return from_config_dict(settings)


@pytest.mark.slow
def test_a_run_starts_from_an_import(imported, tmp_path):
    turns = [
        ("user", "take 4 add 3"),
        ("assistant", "0 1 2 3"),
        ("user", "no wait"),
        ("assistant", "4 5"),
    ]
    chat = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
    (tmp_path / "chats.jsonl").write_text("\n".join([chat] * 8))
    changes = {
        "data.converter": "chat",
        "data.options": {"roles": {"assistant": "output"}},
        "data.path": str(tmp_path / "chats.jsonl"),
        "data.eval_percent": 0.0,
        "data.dir": str(tmp_path / "data"),
        "streams.visibility": "block_causal",
        "eval_every": 0,
    }
    config = fine_tuning_config(
        imported, **changes, **{"optim.lr": 1e-8, "optim.weight_decay": 0.0}
    )
    prepare(config, config.data.dir)
    with pytest.raises(
        UserError, match="holds a model: choose another, and start .* --config.init_from"
    ):
        train(config, imported)
    state = train(config, tmp_path / "run")
    base = load(imported)

    def close(a, b):
        return np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-7)

    jax.tree.map(close, state.parameters, base.parameters)
    shutil.rmtree(imported)  # only a new run needs it
    again = train(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, again.parameters, state.parameters)
    report = to_hf(tmp_path / "run", tmp_path / "back", like=str(tmp_path / "qwen3"))
    # The run has kept what the import had kept of the folder.
    (newest,) = (tmp_path / "run" / "checkpoints").iterdir()
    for i, path in enumerate((tmp_path / "run", newest)):
        assert to_hf(path, tmp_path / f"kept{i}") == report
        assert_same_tensors(tensors_of(tmp_path / f"kept{i}"), tensors_of(tmp_path / "back"))
        for file in (tmp_path / "back").glob("*.json"):
            kept = json.loads((tmp_path / f"kept{i}" / file.name).read_text())
            assert kept == json.loads(file.read_text()), file.name
    shutil.rmtree(tmp_path / "run" / "hf")  # as runs of earlier versions
    lost = to_hf(tmp_path / "run", tmp_path / "without")
    assert f"there is no {imported}, from which the run was started" in lost
    assert "step 1" in report and "parameters are written as float32" in report
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings["max_position_embeddings"] == 64


@pytest.mark.parametrize("size", ["2", "3"])
def test_streams_continue_each_other_before_training(size, folder, tmp_path, monkeypatch):
    """configs/smollm2_streams.py: the thought or output continues the question in user.

    Its logits must be those of the imported model on the question and the continuation as one text.
    """
    path = golden_cases.HERE.parent / "configs/smollm2_streams.py"
    (tmp_path / "data/gsm8k").mkdir(parents=True)
    solved = {"question": "take 4 add 3 no wait", "answer": "The total is 6.\n#### 6"}
    for name in ("train", "test"):
        (tmp_path / f"data/gsm8k/{name}.jsonl").write_text(json.dumps(solved))
    monkeypatch.setenv("MSLLM_SHARED", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="models/smollm2/config.json cannot be read .*msllm convert"
    ):
        runpy.run_path(str(path))["get_config"](size)
    from_hf(folder("llama"), "models/smollm2", streams=STREAMS)
    config = from_config_dict(runpy.run_path(str(path))["get_config"](size))
    prepare(config, config.data.dir)
    streams = StreamSpec.from_config(config.streams)
    loader = Loader(config.data, "eval", streams)
    (table,) = unpack(loader.batch(0))
    silence, user, working = loader.tokenizer.silence_id, 0, 1  # stream 1 is thought or output

    def speaks(stream):
        return table.present[:, stream] & (table.tokens[:, stream] != silence)

    begin, end = np.flatnonzero(speaks(working))[[0, -1]]
    assert begin == np.flatnonzero(speaks(user))[-1] + 1 and end > begin + 2
    parameters = initial_parameters(config.init_from, make_program(config), loader.tokenizer)
    model = LoadedModel(config.model, streams, parameters, loader.tokenizer)
    tables = {"tokens": table.tokens[None], "present": table.present[None]}
    logits = score(model, tables).logits[0, begin : end + 1, working]

    text = np.concatenate([table.tokens[speaks(stream), stream] for stream in (user, working)])
    base = load("models/smollm2")  # its streams are isolated: each computes the imported model
    expected = logits_of(base, np.tile(text[None, :, None], 3))[0, :, 0]
    np.testing.assert_allclose(logits, expected[begin:], rtol=0, atol=1e-4)
    assert np.abs(expected[begin:] - expected[:1]).max() > 0.1


def test_initial_parameters_are_sharded_over_the_mesh(imported, caplog):
    streams = {
        "streams.names": ("output", "tool", "user"),
        "streams.kinds": ("output", "input", "input"),
    }
    config = fine_tuning_config(imported, **streams)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, rope_theta=1e4))
    program = make_program(config, 4, data=2, fsdp=2)
    tokenizer = Tokenizer.load(imported / "tokenizer.json")
    with caplog.at_level(logging.WARNING):
        parameters = initial_parameters(imported, program, tokenizer)
    assert "rope_theta is 10000.0, and was 50.0" in caplog.text
    assert parameters["stream_embedding"].shape == (3, 16)
    assert jax.tree.map(lambda x: x.sharding, parameters) == program.state_shardings.parameters
    expected = load(imported).parameters
    jax.tree.map(np.testing.assert_array_equal, parameters, expected)


def test_stream_vectors_follow_the_names_of_streams():
    old = np.arange(6, dtype=np.float32).reshape(2, 3)
    new = stream_vectors(old, ("user", "output"), ("output", "tool", "user"), 3)
    np.testing.assert_array_equal(new, [old[1], old.mean(0), old[0]])
    np.testing.assert_array_equal(
        stream_vectors(None, ("user",), ("user", "tool"), 3), np.zeros((2, 3))
    )


def test_the_error_says_how_a_model_differs(imported, tmp_path):
    tokenizer = Tokenizer.load(imported / "tokenizer.json")

    def refused(message, tokenizer=tokenizer, folder=imported, **dotted):
        with pytest.raises(UserError, match=message):
            initial_parameters(
                folder, make_program(fine_tuning_config(imported, **dotted)), tokenizer
            )

    refused(
        r"blocks/mlp/up is \(2, 16, 20\) there, \(2, 16, 24\) here.*fine_tune", **{"model.d_ff": 24}
    )
    refused("head is only here", **{"model.tie_embeddings": False})
    refused("q_norm is only there", **{"model.qk_norm": False})
    refused("stream_embedding is only there", **{"model.stream_embedding": False})
    refused("another tokenizer", Tokenizer("tokenizers", tokenizer_file(), "<eos>"))
    refused("there is no checkpoint in", folder=tmp_path / "nowhere")
    files = (imported / "parameters" / "d").iterdir()
    flip_a_bit(max(files, key=lambda path: path.stat().st_size))
    refused("config.init_from is .*base: ")


def test_command_line(folder, tmp_path):
    source = folder()

    def run(*arguments):
        command = [sys.executable, "-m", "msllm", "convert", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(golden_cases.HERE.parent)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    done = run("from_hf", source, tmp_path / "out", f"--streams={STREAMS}")
    assert done.returncode == 0, done.stderr
    assert "silence: <silence>, token 40, added" in done.stdout
    done = run("from_hf", source, tmp_path / "out2", "--dtype=bfloat16")
    assert done.returncode == 2 and "from_hf takes no --dtype" in done.stderr
    done = run("convert", source)
    assert done.returncode == 2 and "from_hf|from_gguf|to_hf" in done.stderr


# A module that leaves a file when it is imported.
OUTSIDE = """
import pathlib
pathlib.Path(__file__).with_suffix(".ran").touch()
"""


@pytest.mark.parametrize("section, key", [("model", "block"), ("streams", "visibility")])
def test_code_that_an_import_names_is_not_run(section, key, imported, tmp_path, monkeypatch):
    (tmp_path / "outside_code.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    path = imported / "config.json"
    settings = json.loads(path.read_text())
    settings[section][key] = "outside_code:something"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"config.{section}.{key} of .*config.json is 'outside_"):
        fine_tune(imported)
    assert not (tmp_path / "outside_code.ran").exists()


def test_code_that_an_export_names_is_not_run(imported, tmp_path, monkeypatch):
    (tmp_path / "outside_code.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    to_hf(imported, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    settings = json.loads(path.read_text())
    settings["msllm"]["streams"]["visibility"] = "outside_code:something"
    path.write_text(json.dumps(settings))
    for read in (load, lambda folder: from_hf(folder, tmp_path / "out")):
        with pytest.raises(UserError, match="visibility is 'outside_code:something'"):
            read(tmp_path / "hf")
    assert not (tmp_path / "outside_code.ran").exists()


def test_config_of_an_import_is_complete(imported):
    config = fine_tuning_config(imported)
    assert config.init_from == str(imported) and config.model == load(imported).config
    assert config.data.tokenizer.path == str(imported / "tokenizer.json")
    with pytest.raises(UserError, match="nowhere/config.json cannot be read"):
        fine_tune(imported / "nowhere")
    assert make_config().init_from == ""
