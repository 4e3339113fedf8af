"""`msllm evaluate`: what each stream says in each turn of one's own chats."""

import dataclasses
import json
import re

import numpy as np
import pytest

from msllm.cli.main import main
from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data.loader import Loader
from msllm.data.prepare import prepare
from msllm.data.tables import unpack
from msllm.evals import by_turn, exact_match, likelihood
from msllm.evals.score import score
from msllm.streams import StreamSpec

STREAMS = StreamsConfig(names=("user", "thought", "output"), kinds=("input", "thought", "output"))


def chat(*texts, roles=("user", "assistant")):
    messages = [
        {"role": roles[number % len(roles)], "content": text} for number, text in enumerate(texts)
    ]
    return {"messages": messages}


def with_data(folder, make_model, records, streams=STREAMS, **data):
    """An untrained model whose data, all of it held out but for a few examples, are these chats."""
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {
        "converter": "chat",
        "options": {"roles": {"assistant": "output"}, "overlap": -1},
        "path": str(folder / "in.jsonl"),
        "tokenizer": TokenizerConfig(model_type="word", vocab_size=128),
        "rows": 48,
        "eval_percent": 99.9,
        "batch_size": 2,
        "dir": str(folder / "data"),
    }
    config = Config(streams=streams, data=DataConfig(**(settings | data)))
    prepare(config, folder / "data")
    tokenizer = Loader(config.data, "eval", StreamSpec.from_config(streams)).tokenizer
    model = make_model(vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(
        model, streams=StreamSpec.from_config(streams), tokenizer=tokenizer, run_config=config
    )


@pytest.fixture
def chats(tmp_path, make_model):
    words = [f"w{i}" for i in range(30)]
    rng = np.random.default_rng(0)

    def text():
        return " ".join(rng.choice(words, rng.integers(1, 6)))

    records = [chat(*[text() for _ in range(2 * rng.integers(1, 4))]) for _ in range(12)]
    records += [chat(text(), text(), text()) for _ in range(3)]  # the last turn has no answer
    records += [chat(text(), roles=["assistant"])]  # nothing is asked
    return with_data(tmp_path, make_model, records)


def test_means_are_over_the_tokens_of_each_turn(chats):
    found = {(one.stream, one.turn): one for one in by_turn.evaluate(chats)}
    assert {stream for stream, _ in found} == {"output"}  # no chat has thoughts
    assert {turn for _, turn in found} == {0, 1, 2, 3}
    loader = Loader(chats.run_config.data, "eval", chats.streams)
    batches = [loader.batch(step) for step in range(loader.num_batches)]
    tables = [table for batch in batches for table in unpack(batch)]
    padded = [np.zeros((len(tables), 48, 3), kind) for kind in (np.int32, bool)]
    for number, table in enumerate(tables):
        for array, values in zip(padded, (table.tokens, table.present)):
            array[number, : len(values)] = values
    scores = score(chats, dict(zip(("tokens", "present"), padded)))
    silence, values = chats.tokenizer.silence_id, []
    for number, table in enumerate(tables):
        said, heard = table.tokens[1:, 2] != silence, table.tokens[1:, 0] != silence
        # A turn begins with the first word of the user after an answer.
        begins = np.flatnonzero(heard & ~np.append(False, heard[:-1]))
        for row in np.flatnonzero(said):
            turn = max(1, int(np.searchsorted(begins, row, side="right")))
            right = scores.logits[number, row, 2].argmax() == table.tokens[row + 1, 2]
            values.append((turn, scores.logprob[number, row, 2], right))
    turns, logprob, right = map(np.array, zip(*values))
    for turn in range(4):
        where = turns == turn if turn else turns > 0
        one = found["output", turn]
        assert one.tokens == where.sum()
        np.testing.assert_allclose(one.nll, -logprob[where].mean(), rtol=1e-4)
        np.testing.assert_allclose(one.accuracy, right[where].mean(), rtol=0, atol=1e-9)
    report = likelihood.report(likelihood.evaluate(chats), chats.streams.names, 10)
    np.testing.assert_allclose(found["output", 0].nll, report["output"]["nll_spoken"], rtol=1e-4)


def test_turns_without_a_question_or_an_answer_are_not_judged(chats):
    result = exact_match.evaluate(chats)
    loader = Loader(chats.run_config.data, "eval", chats.streams)
    cases = []
    for step in range(loader.num_batches):
        for table in unpack(loader.batch(step)):
            cases.append(exact_match.streams_case(table, chats))
    assert any(not case.turns for case in cases)
    unanswered = [turn for case in cases for turn in case.turns if not turn.has_answer]
    answered = [turn for case in cases for turn in case.turns if turn.has_answer]
    assert len(unanswered) == 3 and result.answers == len(answered)
    assert len(result.by_turn) == 3


def test_the_command_prints_no_figure_that_does_not_exist(
    chats, tmp_path, make_model, monkeypatch, capsys
):
    def output(model, *arguments):
        monkeypatch.setattr("msllm.cli.evaluate.load_model", lambda flags: model)
        status = main(["evaluate", "--checkpoint=x", *arguments])
        return status, capsys.readouterr()

    status, (text, _) = output(chats, f"--json={tmp_path / 'result.json'}")
    assert status == 0 and not re.search(r"\bnan\b|None|-\d", text)
    assert re.search(r"^output +all +\d+ +\d\.\d{4} +[\d.]+%", text, flags=re.M)
    assert re.search(r"^output +3 +\d+ +\d\.\d{4} +[\d.]+%", text, flags=re.M)
    assert "answers in 16 held-out examples are exact" in text
    result = json.loads((tmp_path / "result.json").read_text())
    assert [one["turn"] for one in result["predicted"]] == [0, 1, 2, 3]
    assert result["answers"] and "NaN" not in (tmp_path / "result.json").read_text()

    (tmp_path / "said").mkdir()
    said = [chat(f"w{i} w{i}", roles=["assistant"]) for i in range(6)]
    only_said = with_data(tmp_path / "said", make_model, said)
    status, (text, _) = output(only_said)
    assert status == 0 and "none of 6 held-out examples has an input and an answer" in text
    assert re.search(r"^output +all +6 ", text, flags=re.M)  # no row predicts the first one

    (tmp_path / "texts").mkdir()
    texts = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(6)]
    one = StreamsConfig(names=("text",), kinds=("output",))
    settings = {"streams": one, "converter": "single", "options": {}}
    one_stream = with_data(
        tmp_path / "texts", lambda **sizes: make_model(1, **sizes), texts, **settings
    )
    status, (text, _) = output(one_stream)
    assert status == 0 and re.search(r"^text +all +12 ", text, flags=re.M) and "exact" not in text
    status, (_, error) = output(one_stream, "--after=x")
    assert status == 2 and "--after needs answers" in error
