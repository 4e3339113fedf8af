"""The study of configs/sleep: what it measures, how thoughts are kept silent, its small form."""

import importlib.util
import pathlib

import numpy as np
import pytest
from runs import make_config, run_small_study

from msllm.data import shuffles
from msllm.data.converters import texts
from msllm.decode.engine import Engine
from msllm.decode.script import DecodeOptions
from msllm.model.model import init_parameters
from msllm.streams import StreamSpec
from msllm.study import load_results
from msllm.tokenizer import train
from msllm.training import with_vocabulary
from msllm.weights.load import LoadedModel

STUDY = pathlib.Path(__file__).parents[1] / "configs/sleep/study.py"
SMALL = {"cards": 8, "moves": (1, 2), "steps": 3, "choices": (1, 3, 8), "silence": 12}


@pytest.fixture(scope="module")
def study():
    """The module of the study."""
    spec = importlib.util.spec_from_file_location("sleep_study", STUDY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_told(study, example):
    """The session of a model that says exactly what the data hold."""
    play = shuffles.play(example)
    rows = max(row for row, _ in (*play.user, *play.output)) + 3
    columns = []
    for said in (play.thought, play.output):
        columns.append([""] * rows)
        for row, word in said:
            columns[-1][row] = word
    return study.Session(example, *columns)


def test_sessions_are_judged_by_their_rows(study):
    met = set()
    for example in shuffles.generate(200, 1, **SMALL):
        session = as_told(study, example)
        play = shuffles.play(example)
        answered = [row for row, word in play.output if word == "."]
        for number, (end, row) in enumerate(zip(example.question_ends, answered, strict=True)):
            assert session.answer(number) == (True, row - end)
        assert session.words.sum() == len(play.thought)
        doing, rows = session.doing(), answered[0] - example.question_ends[0]
        met.add(doing)
        longest = shuffles.longest_answer(example.steps)
        if doing == "has followed this card":
            assert 3 <= rows <= 4  # 4: it ended one or two rows before the thought could react
        elif doing == "follows this card":
            assert 3 < rows < longest
        else:
            assert rows == longest
        wrong = session._replace(output=[word.replace(".", "") for word in session.output])
        assert wrong.answer(0) == (False, -1)
    assert met == {
        "has followed this card",
        "follows this card",
        "follows another card",
        "is between cards",
        "has said nothing",
    }


def test_a_kept_silent_thought_may_speak_again_when_it_has_read_the_question(study):
    settings = make_config(
        **{
            "data.converter": "shuffles",
            "data.options": {"examples": 30, **SMALL},
            "data.tokenizer.model_type": "word",
        }
    )
    spec = StreamSpec.from_config(settings.streams)
    tokenizer = train(texts(settings, spec), settings.data.tokenizer)
    config = with_vocabulary(settings, tokenizer.vocab_size)
    model = LoadedModel(
        config.model, spec, init_parameters(config.model, spec, 0), tokenizer, "", 0, config
    )
    examples = [e._replace(held=0) for e in shuffles.generate(3, 0, **SMALL | {"questions": 1})]
    free, silent = (study.run(model, examples, kept_silent) for kept_silent in (False, True))
    engine = Engine(model, sessions=1, window=128)
    for example, one, other in zip(examples, free, silent):
        until = example.question_ends[0] + 2
        assert not other.words[:until].any() and one.words[:until].any()
        assert other.words[until:].any()
        # The engine's own option gives the same.
        with engine.open(DecodeOptions(ablated=("thought",))) as session:
            said = [""] * (until + 1)
            for row, word in shuffles.user_words(example):
                said[row] = word
            silence = tokenizer.silence_id
            ids = [tokenizer.encode_word(word)[0] if word else silence for word in said]
            session.force("user", ids)
            session.run(until)
            session.options = DecodeOptions()
            session.run(len(other.thought) - until)
            tokens = session.transcript().tokens[:, 1]
        words = ["" if t == silence else tokenizer.decode([t]).strip() for t in tokens.tolist()]
        assert words == other.thought


@pytest.mark.slow
def test_the_small_study_runs(study, tmp_path):
    run_small_study(STUDY, tmp_path)
    found = load_results(tmp_path)
    assert found.arms == (study.AHEAD, study.KEPT_SILENT)
    ones, threes = (found.select({"kind": kind}) for kind in ("one", "three"))
    assert len(ones) == 2 * 3 * 2 * 4  # arms, m, r, examples
    assert len(threes) == 2 * 3 * 2 * 4  # arms, m, users, examples
    of_arm = {arm: [r for r in ones if r["arm"] == arm] for arm in found.arms}
    key = [(r["item"], r["m"], r["r"]) for r in of_arm[study.AHEAD]]
    assert key == [(r["item"], r["m"], r["r"]) for r in of_arm[study.KEPT_SILENT]]
    assert {r["thought"] for r in of_arm[study.KEPT_SILENT]} == {"has said nothing"}
    points = {point["arm"]: point for point in found.points}
    assert points[study.AHEAD]["parameters"] == points[study.KEPT_SILENT]["parameters"]
    assert "| 16 | 16 | " in (tmp_path / "table.md").read_text()
    assert np.isfinite(found.estimate("words", study.AHEAD, kind="three").value)
