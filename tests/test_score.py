"""Scoring: tables, prepared data and texts, packing, batches, and invalid tables."""

import dataclasses
import json
import re
import subprocess
import sys

import golden_cases
import numpy as np
import pytest

from msllm.cli.main import main
from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data.identity import with_stored_options
from msllm.data.loader import Loader
from msllm.data.prepare import prepare
from msllm.errors import UserError
from msllm.evals import score as score_module
from msllm.evals.score import check_tables, read_text, score, score_batches
from msllm.streams import StreamSpec
from msllm.weights.load import load


def run(*arguments):
    """Runs `msllm score`."""
    command = [sys.executable, "-m", "msllm", "score", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=golden_cases.HERE.parent)


def test_the_command_reproduces_a_golden_case(tmp_path):
    case = golden_cases.case("s7_c10_skip")
    tokens, rows = case["tokens"], np.arange(case["tokens"].shape[1])
    present = np.broadcast_to((rows < case["num_rows"][:, None])[:, :, None], tokens.shape)
    np.savez(tmp_path / "in.npz", tokens=tokens, present=present)
    arguments = [
        f"--checkpoint={case.path}",
        f"--tables={tmp_path / 'in.npz'}",
        f"--out={tmp_path / 'out.npz'}",
    ]
    done = run(*arguments, "--visibility=block_causal", "--skip_silence", "--silence_id=5")
    assert done.returncode == 0, done.stderr
    out = np.load(tmp_path / "out.npz")
    difference = golden_cases.thin("logits", out["logits"]) - case["logits"]
    assert np.abs(difference[present]).max() < 1e-4
    counted = np.isfinite(out["logprob"])
    np.testing.assert_array_equal(counted, case["labels"] != -100)
    np.testing.assert_allclose(-out["logprob"][counted].mean(), case["loss_ce"], rtol=0, atol=1e-5)

    done = run(*arguments, "--skip_silence", "--force")
    assert done.returncode == 2 and "--silence_id" in done.stderr and "Traceback" not in done.stderr
    done = run(*arguments[1:], f"--checkpoint={tmp_path / 'none'}", "--force")
    assert done.returncode == 2 and "there is no checkpoint in" in done.stderr


def test_packed_examples_score_like_single_ones(make_model):
    model, rng = make_model(3), np.random.default_rng(0)
    first, second = rng.integers(0, 32, (4, 3)), rng.integers(0, 32, (5, 3))
    packed = np.concatenate([first, second, np.zeros((2, 3), int)])[None]
    segment = np.array([[7] * 4 + [2] * 5 + [0] * 2])
    ours = score(model, {"tokens": packed, "segment": segment})
    for part, rows in ((first, slice(0, 4)), (second, slice(4, 9))):
        alone = score(model, {"tokens": part[None]})
        np.testing.assert_allclose(ours.logits[0, rows], alone.logits[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(ours.logprob[0, rows], alone.logprob[0], rtol=0, atol=1e-5)
    assert np.isnan(ours.logprob[0, [3, 8, 9, 10]]).all()


def test_batches_are_as_large_as_their_logits_allow(make_model, monkeypatch):
    model, tokens = make_model(3), np.random.default_rng(0).integers(0, 32, (5, 4, 3))
    whole = score(model, {"tokens": tokens})
    monkeypatch.setattr(score_module, "LOGITS_AT_ONCE", 2 * 4 * 3 * 32)
    parts = list(score_batches(model, {"tokens": tokens}))
    assert [len(part.logits) for part in parts] == [2, 2, 1]
    again = score(model, {"tokens": tokens})
    np.testing.assert_allclose(again.logits, whole.logits, rtol=0, atol=1e-5)


def test_visibility_changes_logits(make_model):
    model, tokens = make_model(3), np.random.default_rng(0).integers(0, 32, (1, 4, 3))
    logits = score(model, {"tokens": tokens}).logits
    other = score(model.with_visibility("same_row"), {"tokens": tokens}).logits
    assert np.abs(logits - other).max() > 1e-3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": np.zeros((1, 4, 2), int)}, "2 streams: the model has 3"),
        ({"tokens": np.zeros((4, 3), int)}, r"must be \[B, T, S\]"),
        ({"tokens": np.zeros((1, 4, 3))}, "must be integers"),
        ({"tokens": np.full((1, 4, 3), 32)}, r"tokens\[0, 0, 0\] is 32"),
        ({"tokens": np.full((1, 4, 3), -1)}, "is -1: the vocabulary"),
        ({"present": np.ones((1, 4, 3), int)}, "present is int64"),
        ({"present": np.ones((1, 3, 3), bool)}, "present is bool"),
        ({"segment": np.ones((1, 3), int)}, "segment is int64"),
        ({"segment": np.array([[1, 2, 1, 0]])}, "id 1 has several runs"),
        ({"segment": np.array([[1, 1, -1, 0]])}, "it holds -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_tables_are_refused(change, message):
    tables = {"tokens": np.zeros((1, 4, 3), int), "present": np.ones((1, 4, 3), bool)} | change
    if "tokens" in change:
        tables.pop("present")
    with pytest.raises(UserError, match=message):
        check_tables(tables, 3, 32)


def test_absent_cells_may_hold_any_token(make_model):
    tokens = np.full((1, 4, 3), -1)
    tokens[:, :2] = 5
    present = tokens >= 0
    found = score(make_model(3), {"tokens": tokens, "present": present})
    assert np.isfinite(found.logits[present]).all()


def test_load_names_a_missing_checkpoint(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint in"):
        load(tmp_path / "none")


def test_a_missing_workdir_is_named_with_what_there_is(tmp_path):
    (tmp_path / "quickstart").mkdir()
    there = r"quickstrat, which does not exist \(.* holds quickstart\): give a workdir"
    with pytest.raises(UserError, match=there):
        load(tmp_path / "quickstrat")


@pytest.fixture
def chats(tmp_path, make_model):
    """A model that was trained on chats of two streams, and the folder of their prepared data."""
    lines = [("who are you", "me"), ("me", "you are you"), ("are you me", "who")] * 4
    with open(tmp_path / "chats.jsonl", "w") as file:
        for number, (question, answer) in enumerate(lines):
            turns = [{"role": "user", "content": question}, {"role": "bot", "content": answer}]
            file.write(json.dumps({"id": number, "messages": turns}) + "\n")
    streams = StreamsConfig(names=("user", "output"), kinds=("input", "output"))
    data = DataConfig(
        converter="chat",
        options={"roles": {"bot": "output"}},
        path=str(tmp_path / "chats.jsonl"),
        dir=str(tmp_path / "data"),
        tokenizer=TokenizerConfig(model_type="word", vocab_size=32),
        rows=24,
        eval_percent=50.0,
    )
    config, spec = Config(streams=streams, data=data), StreamSpec.from_config(streams)
    manifest = prepare(config, tmp_path / "data")
    tokenizer = Loader(data, "train", spec).tokenizer
    model = make_model(2, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, data=with_stored_options(data, manifest))
    return dataclasses.replace(model, streams=spec, tokenizer=tokenizer, run_config=config)


@pytest.fixture
def command(monkeypatch, capsys):
    """A function command(model, *arguments): runs `msllm score`, returns status and output."""

    def run_command(model, *arguments):
        monkeypatch.setattr("msllm.cli.score.load_model", lambda flags: model)
        status = main(["score", "--checkpoint=x", *map(str, arguments)])
        done = capsys.readouterr()
        return status, done.out, done.err

    return run_command


def test_a_text_gets_the_options_with_which_the_data_of_the_checkpoint_was_prepared(
    chats, tmp_path
):
    turns = [{"role": "user", "content": "who"}, {"role": "bot", "content": "me"}]
    (tmp_path / "mine.jsonl").write_text(json.dumps({"messages": turns}))

    def row_of_answer(options):
        data = dataclasses.replace(chats.run_config.data, options=options)
        config = dataclasses.replace(chats.run_config, data=data)
        model = dataclasses.replace(chats, run_config=config)
        tokens = read_text(model, tmp_path / "mine.jsonl").tables["tokens"][0, :, 1]
        return int((tokens != chats.tokenizer.silence_id).argmax())

    assert row_of_answer(chats.run_config.data.options) == 2
    # A checkpoint of an earlier version gave only the options that its config set.
    assert row_of_answer({"roles": {"bot": "output"}}) == 1
    assert row_of_answer({"roles": {"bot": "output"}, "overlap": -3}) == 4


def test_a_text_that_is_no_table_is_answered_with_an_example(chats, command, tmp_path):
    """A model whose data was generated has no converter for texts."""
    model = dataclasses.replace(chats, run_config=None)
    text, example = tmp_path / "q.txt", '{"streams": {"user": "...", "output": "..."}}'
    text.write_text("who are you\n")
    status, _, error = command(model, f"--text={text}")
    assert status == 2 and f"such as {example}" in error and error.count("\n") == 1
    text.write_text(example.replace("...", "who are you"))
    status, printed, _ = command(model, f"--text={text}")
    assert status == 0 and "example 0" in printed


def test_each_value_of_a_text_says_which_cell_it_belongs_to(chats, command, tmp_path):
    text, out = tmp_path / "mine.jsonl", tmp_path / "out.jsonl"
    turns = [{"role": "user", "content": "who are you"}, {"role": "bot", "content": "me me"}]
    other = [{"role": "user", "content": "me"}, {"role": "bot", "content": "you"}]
    text.write_text("".join(json.dumps({"messages": one}) + "\n" for one in (turns, other)))
    status, printed, _ = command(chats, f"--text={text}", f"--out={out}")
    assert status == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    said = [one for one in found if one["example"] == 0 and one["token"] != "·"]
    # The first row is not predicted. The answer follows the question.
    assert [(one["row"], one["stream"], one["token"]) for one in said] == [
        (1, "user", "are"),
        (2, "user", "you"),
        (4, "output", "me"),
        (5, "output", "me"),
    ]
    sources = [f"{text}:{line}" for line in (1, 1, 2, 2)]
    assert [one["source"] for one in found if one["row"] == 1] == sources
    silence, encode = chats.tokenizer.silence_id, chats.tokenizer.encode
    tokens = np.full((1, 7, 2), silence)
    tokens[0, :3, 0], tokens[0, 4:6, 1] = encode("who are you"), encode("me me")
    expected = score(chats, {"tokens": tokens})
    for one in said:
        stream, id_ = chats.streams.index(one["stream"]), chats.tokenizer.encode(one["token"])[0]
        assert one["id"] == id_ == tokens[0, one["row"], stream]
        logprob = expected.logprob[0, one["row"] - 1, stream]
        np.testing.assert_allclose(one["logprob"], logprob, rtol=0, atol=1e-4)
        likeliest = expected.logits[0, one["row"] - 1, stream].argmax() == id_
        assert one["likeliest"] == likeliest
    cells = [one for one in found if one["stream"] == "output"]
    assert f"output: {len(cells)} cells, " in printed and "; 3 without silence: " in printed

    status, printed, _ = command(chats, f"--text={text}")
    assert status == 0 and f"── example 1, {text}:2 ──" in printed
    assert re.search(rf"^ +4  output  me +{said[2]['id']} +{said[2]['logprob']:.4f}", printed, re.M)


def test_prepared_data_are_scored_example_by_example(chats, command, tmp_path):
    data = f"--data={tmp_path / 'data'}"
    status, _, _ = command(chats, data, "--split=train", f"--out={tmp_path / 'out.npz'}")
    assert status == 0
    out = np.load(tmp_path / "out.npz")
    assert set(out.files) == {"tokens", "present", "segment", "logprob", "likeliest", "streams"}
    assert out["streams"].tolist() == ["user", "output"]
    again = score(chats, {name: out[name] for name in ("tokens", "present", "segment")})
    np.testing.assert_allclose(out["logprob"], again.logprob, rtol=0, atol=1e-4)
    status, printed, _ = command(chats, data, "--split=train", "--examples=3")
    headings = re.findall("^── example (.), ([0-9a-f]{16}) ──$", printed, re.M)
    assert [number for number, _ in headings] == ["0", "1", "2"]
    manifest = json.loads((tmp_path / "data/manifest.json").read_text())
    assert manifest["splits"]["train"]["examples"] > 3
    status, _, _ = command(chats, data, "--logits", f"--out={tmp_path / 'logits.npz'}")
    assert np.load(tmp_path / "logits.npz")["logits"].shape[-1] == chats.config.vocab_size


def test_an_existing_file_is_replaced_only_by_force(chats, command, tmp_path):
    arguments = [f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'out.jsonl'}"]
    (tmp_path / "out.jsonl").write_text("precious")
    status, _, error = command(chats, *arguments)
    assert status == 2 and "the file exists; choose another name, or replace it" in error
    assert (tmp_path / "out.jsonl").read_text() == "precious"
    assert command(chats, *arguments, "--force")[0] == 0
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["row"] == 1
    np.savez(tmp_path / "in.npz", tokens=np.zeros((1, 4, 2), int))
    (tmp_path / "out.npz").write_text("precious")
    tables = [f"--tables={tmp_path / 'in.npz'}", f"--out={tmp_path / 'out.npz'}"]
    assert command(chats, *tables)[0] == 2 and (tmp_path / "out.npz").read_text() == "precious"
    assert command(chats, *tables, "--force")[0] == 0
    assert np.load(tmp_path / "out.npz")["logits"].shape == (1, 4, 2, chats.config.vocab_size)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give one of --data, --text and --tables: none is given"),
        (["--data=a", "--text=b"], "--data and --text is given"),
        (["--text=none.txt"], "--text=none.txt: there is no such file"),
        (["--tables=a", "--split=eval"], "--split needs --data"),
        (["--data=a", "--out=a.txt"], "the name must end in .jsonl or .npz"),
        (["--data=a", "--logits"], "--logits needs an npz file"),
    ],
)
def test_bad_flags_end_with_one_line(chats, command, arguments, message):
    status, _, error = command(chats, *arguments)
    assert status == 2 and message in error and error.count("\n") == 1


def test_a_text_is_read_as_the_data_of_the_model_were(chats, make_model, tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("who are you me " * 20)
    one = StreamSpec.from_config(StreamsConfig(names=("text",), kinds=("output",)))
    model = make_model(1, vocab_size=chats.tokenizer.vocab_size)
    imported = dataclasses.replace(model, streams=one, tokenizer=chats.tokenizer)
    found = read_text(imported, plain)
    assert found.tables["present"].sum() == 80
    # Of several streams, texts are given stream by stream if the data of the model was generated.
    tables = tmp_path / "tables.jsonl"
    tables.write_text('{"streams": {"user": "who are you", "output": "me"}}\n')
    data = dataclasses.replace(chats.run_config.data, converter="dictation", options={})
    config = dataclasses.replace(chats.run_config, data=data)
    found = read_text(dataclasses.replace(chats, run_config=config), tables)
    assert found.tables["tokens"][0, 0].tolist() == [
        *chats.tokenizer.encode("who"),
        *chats.tokenizer.encode("me"),
    ]
    with pytest.raises(UserError, match="chats.jsonl:1: keys are"):
        read_text(dataclasses.replace(chats, run_config=config), tmp_path / "chats.jsonl")
    # A converter of the user is code.
    data = dataclasses.replace(data, converter="nowhere:convert")
    config = dataclasses.replace(chats.run_config, data=data)
    with pytest.raises(UserError, match="'nowhere:convert': reading the text would run this code"):
        read_text(dataclasses.replace(chats, run_config=config), tables)
