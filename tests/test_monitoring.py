"""Interventions, ablations, replays and monitors count what they should (docs/monitoring.md)."""

import dataclasses
import json

import numpy as np
import pytest

from msllm.cli.main import main
from msllm.config import StreamsConfig
from msllm.data.dictation import answer_words
from msllm.decode.engine import FREE, Engine, Generated, generate
from msllm.errors import UserError
from msllm.evals import free_run
from msllm.evals import monitor as monitors
from msllm.evals.ablate import ablate, hide
from msllm.evals.exact_match import SLACK
from msllm.evals.intervene import Forced, intervene
from msllm.evals.monitor import Transcripts, agreement, auc, g_mean, monitor, read_transcripts
from msllm.evals.replay import replay
from msllm.evals.score import score
from msllm.streams import NEVER, StreamSpec

USER, THOUGHT, OUTPUT = range(3)


@pytest.fixture
def examples(loaded):
    return free_run.read_examples(loaded, examples=12)


@pytest.fixture
def scripted(examples, monkeypatch):
    """A function scripted(**what) that replaces the model by a script, and returns the examples.

    The script says what the examples say. `reads`: the output tells the last number of the thought
    if it sees the thought. `wrong`: an example in which its answer is wrong. `late`: the thought
    says its last number only after the answer. `babbles`: the output says on and on, from
    `babbles` rows after the end of the example.
    """
    tokenizer = examples.model.tokenizer
    encode, silence = tokenizer.encode, tokenizer.silence_id

    def script(reads=True, wrong=None, late=False, babbles=None):
        def say(table, number, model):
            """Fills the free cells of a table [R, S]."""
            known = examples.tables[number].tokens
            said = np.full_like(table, silence)
            said[: len(known)] = known
            if late:
                row = np.flatnonzero(said[:, THOUGHT] != silence)[-1]
                said[-1, THOUGHT], said[row, THOUGHT] = said[row, THOUGHT], silence
            said = np.where(table == FREE, said, table)
            thoughts = tokenizer.decode(said[said[:, THOUGHT] != silence, THOUGHT]).split()
            values = [word[1:] for word in thoughts if word.startswith("=")]
            answer = int(np.flatnonzero(known[:, OUTPUT] != silence)[2])  # its third word
            sees = model.streams.lag[OUTPUT][THOUGHT] < NEVER
            if table[answer, OUTPUT] == FREE and reads and not late:
                told = values[-1] if sees and values else "0"
                said[answer, OUTPUT] = encode(told)[0]
            if number == wrong:
                said[answer, OUTPUT] = encode("that")[0]
            if babbles is not None:
                said[len(known) + babbles :, OUTPUT] = encode("that")[0]
            return said

        def generated(model, rows, options=None, *, forced, batch):
            tables = [say(table, number, model) for number, table in enumerate(forced)]
            tables = np.array(tables)
            return Generated(tables, tables, np.ones(tables.shape, bool), [])

        monkeypatch.setattr(free_run, "generate", generated)
        return examples

    return script


def last_number(forced: Forced):
    """The answer of an output that tells the last number of a dictation's thought."""
    values = forced.tokens[forced.spoken[:, THOUGHT], THOUGHT]
    return None if forced.row != np.flatnonzero(forced.spoken[:, THOUGHT])[-1] else values[-1]


def faithful(examples):
    tokenizer = examples.model.tokenizer

    def expected(forced: Forced):
        if last_number(forced) is None:
            return None
        value = int(tokenizer.decode([forced.token]).strip()[1:])
        return [tokenizer.encode(" ".join(answer_words(value)))]

    return expected


def test_an_output_that_reads_the_thought_follows_it(scripted):
    examples = scripted()
    result = intervene(examples, pattern="=", place="last", expected=faithful(examples))
    (thought,) = result.streams
    assert (result.right, result.sham) == (len(examples.cases), 0.0)
    assert (thought.cases, thought.moved) == (len(examples.cases), 1.0)
    assert (thought.asked, thought.followed) == (thought.cases, 1.0)
    assert thought.appeared == 1.0 and thought.needed > 2 * len(examples.cases)
    assert [one.example for one in result.outcomes] == list(range(len(examples.cases)))


def test_an_output_that_ignores_the_thought_does_not(scripted):
    examples = scripted(reads=False)
    (thought,) = intervene(examples, pattern="=", place="last", expected=faithful(examples)).streams
    assert (thought.moved, thought.followed) == (0.0, 0.0) and thought.asked == thought.cases


def test_earlier_numbers_move_only_what_depends_on_them(scripted):
    examples = scripted()
    any_place = intervene(examples, pattern="=", expected=faithful(examples), seed=1)
    (thought,) = any_place.streams
    # The script's output depends on the last number alone.
    assert 0 < thought.asked < thought.cases
    assert thought.moved == thought.asked / thought.cases and thought.followed == 1.0


def test_wrong_answers_are_left_out(scripted):
    examples = scripted(wrong=3)
    result = intervene(examples, pattern="=", place="last")
    assert result.right == len(examples.cases) - 1
    assert 3 not in [one.example for one in result.outcomes]
    assert result.streams[0].asked == 0 and result.streams[0].followed is None


def test_thoughts_after_the_answer_are_not_in_time(scripted):
    (thought,) = intervene(scripted(late=True), pattern="=").streams
    missing = len(scripted(late=True).cases)
    assert thought.appeared == pytest.approx(1 - missing / thought.needed)


def test_a_run_ends_with_its_own_rows(scripted):
    examples = scripted(babbles=SLACK)
    assert len({len(case.prompt) for case in examples.cases}) > 1
    found = free_run.run(examples)
    assert found.right.all()
    texts = [record["streams"]["output"] for record in free_run.transcripts(examples, found)]
    encode = examples.model.tokenizer.encode
    for number, case in enumerate(examples.cases):
        assert found.present[number].sum() == (len(case.prompt) + SLACK) * 3
        assert [encode(texts[number])] == case.turns[0].answer
    # One row earlier, it counts.
    assert not free_run.run(scripted(babbles=SLACK - 1)).right.any()


def test_a_run_ends_when_the_outputs_have_said_its_end(scripted):
    examples = scripted(babbles=0)
    assert not free_run.run(examples).right.any()
    (stop,) = examples.model.tokenizer.encode(".")
    found = free_run.run(examples._replace(end=stop))
    assert found.right.all()
    for tokens, present in zip(found.tokens, found.present):
        last = np.flatnonzero(tokens[:, OUTPUT] == stop)[0]
        assert present[: last + 1].all() and not present[last + 1 :].any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"streams": ["gone"]}, "no stream 'gone'"),
        ({"streams": ["output"]}, "is an output"),
        ({"pattern": "("}, "must be a regular expression"),
        ({"place": "first"}, "must be one of any, last"),
    ],
)
def test_bad_arguments_are_errors(scripted, arguments, message):
    with pytest.raises(UserError, match=message):
        intervene(scripted(), **arguments)


def test_a_model_without_right_answers_is_refused(examples, monkeypatch):
    count, rows = len(examples.cases), examples.rows
    nothing = np.full((count, rows, 3), examples.model.tokenizer.silence_id)

    def silent(model, rows, options=None, *, forced, batch):
        return Generated(nothing, nothing, np.ones(nothing.shape, bool), [])

    monkeypatch.setattr(free_run, "generate", silent)
    with pytest.raises(UserError, match="none of 12 examples is answered exactly"):
        intervene(examples)


def test_a_forced_run_is_that_of_a_session(examples):
    """On the device: a cell that is forced in a batch, and the same by `Session.force`."""
    model, row = examples.model, 9
    token = model.tokenizer.encode("=5")[0]

    def change(number, table):
        if number == 2:
            table[row, THOUGHT] = token

    base, forced = free_run.run(examples), free_run.run(examples, change)
    others = [i for i in range(len(examples.cases)) if i != 2]
    np.testing.assert_array_equal(base.tokens[others], forced.tokens[others])
    np.testing.assert_array_equal(base.tokens[2, :row], forced.tokens[2, :row])
    assert forced.tokens[2, row, THOUGHT] == token
    with Engine(model, sessions=len(examples.cases), window=examples.rows).open() as session:
        session.force(USER, base.tokens[2, :, USER])
        session.force(THOUGHT, [model.tokenizer.silence_id, *[FREE] * (row - 1), token])
        session.force(OUTPUT, [model.tokenizer.silence_id])
        rows = [one.tokens for one in session.run(examples.rows)]
    np.testing.assert_array_equal(rows, forced.tokens[2])


def test_ablation_counts(scripted):
    examples = scripted()
    result = ablate(examples)
    assert result.exact == 1.0 and [one.stream for one in result.streams] == ["user", "thought"]
    thought = result.streams[1]
    tokens, zero = examples.model.tokenizer, "that makes 0 ."
    zeros = np.mean([zero in tokens.decode(table.tokens[:, OUTPUT]) for table in examples.tables])
    assert thought.silenced == thought.hidden == pytest.approx(zeros)
    assert thought.hidden_right.shape == (len(examples.cases),)
    assert thought.nll != result.nll


def with_lags(model, *lags, visibility="isolated"):
    streams = model.streams
    config = StreamsConfig(streams.names, streams.kinds, visibility=visibility, lags=lags)
    return dataclasses.replace(model, streams=StreamSpec.from_config(config))


def random_tables(streams=3, rows=10, seed=0):
    return {"tokens": np.random.default_rng(seed).integers(0, 32, (2, rows, streams))}


def test_a_hidden_stream_is_one_with_edges_never(make_model):
    model, tables = make_model(), random_tables()
    never = (("output", "thought", "never"), ("user", "thought", "never"))
    expected = with_lags(model, *never, visibility="block_causal")
    assert hide(model, "thought").streams == expected.streams
    mixed = with_lags(model, ("output", "thought", "1 tokens"), ("output", "user", "2 tokens"))
    expected = with_lags(model, ("output", "user", "2 tokens"))
    assert hide(mixed, "thought").streams == expected.streams
    hidden = score(hide(mixed, "thought"), tables).logits
    np.testing.assert_array_equal(hidden, score(expected, tables).logits)
    assert (hidden[:, :, OUTPUT] != score(mixed, tables).logits[:, :, OUTPUT]).any()
    assert hide(mixed, "user").streams.token_lag[OUTPUT][THOUGHT] == 1


# The thought reads the user, and the output reads what the thought says.
DOOR = (("thought", "user", "1"), ("output", "thought", "1 tokens"))


def test_the_transcript_of_the_thoughts_gives_the_logits_of_the_output(make_model):
    model = with_lags(make_model(), *DOOR)
    found = replay(model, random_tables(), "output", silence_id=1)
    assert (found.sources, found.left_out) == (("thought",), ("user",))
    assert found.difference == 0.0
    latent = with_lags(make_model(), DOOR[0], ("output", "thought", "1"))
    found = replay(latent, random_tables(), "output", silence_id=1)
    assert (found.sources, found.left_out) == (("user", "thought"), ())
    # The certificate lists the user as a source, because its silence would show.
    tokens = random_tables()["tokens"].copy()
    logits = score(latent, {"tokens": tokens}).logits[:, :, OUTPUT]
    tokens[:, :, USER] = 1
    assert (score(latent, {"tokens": tokens}).logits[:, :, OUTPUT] != logits).any()


def test_decoding_a_transcript_gives_the_same_logits(make_model):
    model, rows = with_lags(make_model(), *DOOR), 8
    user = np.random.default_rng(0).integers(2, 32, rows)
    forced = np.full((rows, 3), FREE)
    forced[:, USER], forced[0, THOUGHT:] = user, 1
    first = generate(model, rows, forced=forced, keep_logits=True, silence_id=1)
    forced[:, USER], forced[:, THOUGHT] = 1, first.shown[0, :, THOUGHT]
    second = generate(model, rows, forced=forced, keep_logits=True, silence_id=1)
    np.testing.assert_array_equal(first.shown[0, :, OUTPUT], second.shown[0, :, OUTPUT])
    assert first.logits and (np.array(first.logits) != np.array(second.logits)).any()
    for one, other in zip(first.logits, second.logits, strict=True):
        np.testing.assert_array_equal(one[:, OUTPUT], other[:, OUTPUT])


def synthetic(count=300, seed=0):
    """Transcripts whose label is in one stream, in none, and in the agreement of two."""
    rng = np.random.default_rng(seed)
    labels = rng.random(count) < 0.4
    number = rng.integers(0, 10, count)
    other = np.where(labels, (number + rng.integers(1, 10, count)) % 10, number)
    words = np.array(["tell", "hide"])
    return Transcripts(
        {
            "plan": [f"i {words[int(label)]} it" for label in labels],
            "noise": [f"so {n} then" for n in rng.integers(0, 10, count)],
            "value": [f"={n}" for n in number],
            "output": [f"that makes {n} ." for n in other],
        },
        labels,
    )


def test_monitors_find_a_known_signal():
    pytest.importorskip("sklearn")
    train, test = synthetic(), synthetic(seed=1)
    reads = {name: [name] for name in train.streams}
    both = ["value", "output"]
    reads |= {"all": [*train.streams], "both": both, "both+agreement": both}
    found = {one.monitor: one for one in monitor(train, {"test": test}, reads, resamples=200)}
    assert found["plan"].auc.value == found["all"].auc.value == 1.0
    assert found["plan"].g_mean.value == 1.0
    for name in ("noise", "value", "output", "both"):
        assert 0.4 < found[name].auc.value < 0.6
        assert found[name].auc.low < found[name].auc.value < found[name].auc.high
        assert 0.05 < found[name].auc.high - found[name].auc.low < 0.2
    assert found["both+agreement"].auc.value == 1.0
    assert found["plan"].items == 300 and found["plan"].positives == test.labels.sum()
    assert "plan" in monitors.describe([*found.values()])


def test_statistics_equal_their_definitions():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(-2, 3, 60), rng.random(60) < 0.4
    pairs = [np.sign(a - b) for a in scores[labels] for b in scores[~labels]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs) / 2 + 0.5)
    weights = rng.integers(0, 4, 60)
    repeated = np.repeat(np.arange(60), weights)
    for statistic in (auc, g_mean):
        expected = statistic(scores[repeated], labels[repeated])
        assert statistic(scores, labels, weights) == pytest.approx(expected)
        assert np.isnan(statistic(scores, np.ones(60, bool)))
    right = (scores > 0) == labels
    assert g_mean(scores, labels) == pytest.approx(
        np.sqrt(right[labels].mean() * right[~labels].mean())
    )


def test_agreement_compares_last_words():
    found = agreement(
        Transcripts({"a": ["=1 =12", "no", ""], "b": ["is 12 .", "yes", "x"]}, np.ones(3, bool)),
        ["a", "b"],
    )
    assert found[:, 0].tolist() == [1, -1, 0]


def write_lines(path, transcripts, **extra):
    lines = [
        {"streams": {name: texts[i] for name, texts in transcripts.streams.items()}}
        | extra
        | {"secret": bool(label)}
        for i, label in enumerate(transcripts.labels)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_the_command_reads_transcripts(tmp_path, capsys):
    pytest.importorskip("sklearn")
    train = write_lines(tmp_path / "train.jsonl", synthetic(80))
    test = write_lines(tmp_path / "test.jsonl", synthetic(40, seed=1))
    out = tmp_path / "out.json"
    arguments = ["monitor", f"--train={train}", f"--test={test}", "--label=secret"]
    assert main([*arguments, f"--json={out}"]) == 0
    found = {one["monitor"]: one for one in json.loads(out.read_text())}
    assert [*found] == ["plan", "noise", "value", "output", "all", "all+agreement"]
    assert found["plan"]["auc"]["value"] == 1.0 and found["plan"]["data"] == "test.jsonl"
    assert main([*arguments, "--streams=value,output", "--agreement"]) == 0
    assert "value+output+agreement" in capsys.readouterr().out
    assert main([*arguments, "--streams=gone"]) == 2
    assert "no stream 'gone'" in capsys.readouterr().err
    assert main([*arguments, "--agreement"]) == 2


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "is no JSON"),
        ('{"streams": ["a"], "label": true}', "must hold the texts"),
        ('{"streams": {"a": "x"}, "label": 1}', "must be true or false"),
        ('{"streams": {"b": "x"}, "label": true}', "all lines must have the same"),
    ],
)
def test_bad_transcripts_are_errors(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"streams": {"a": "x"}, "label": true}\n' + line + "\n")
    with pytest.raises(UserError, match=f"line 2: .*{message}"):
        read_transcripts(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no transcripts"):
        read_transcripts(path)


def test_training_needs_both_labels():
    pytest.importorskip("sklearn")
    train = synthetic(20)
    with pytest.raises(UserError, match="have the same label"):
        monitor(train.where(train.labels), {"test": train})


def test_evaluate_writes_interventions_ablations_and_transcripts(scripted, monkeypatch, tmp_path):
    model = scripted().model
    monkeypatch.setattr("msllm.cli.evaluate.load_model", lambda flags: model)
    out, transcripts = tmp_path / "out.json", tmp_path / "said.jsonl"
    monkeypatch.setattr("msllm.evals.exact_match.is_applicable", lambda model: False)
    arguments = ["--examples=12", "--intervene==", "--ablate", f"--transcripts={transcripts}"]
    assert main(["evaluate", "--checkpoint=x", *arguments, f"--json={out}"]) == 0
    found = json.loads(out.read_text())
    (thought,) = found["interventions"]["streams"]
    assert thought["cases"] == len(found["interventions"]["outcomes"]) == 12
    assert [one["stream"] for one in found["ablation"]["streams"]] == ["user", "thought"]
    said = read_transcripts(transcripts, "right")
    assert said.labels.all() and said.streams["output"][0].startswith("that makes")
