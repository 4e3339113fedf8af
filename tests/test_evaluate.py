"""Exact match on held-out examples, with handwritten transcripts in place of generation."""

import numpy as np
import pytest

from msllm.config import StreamsConfig
from msllm.data.dictation import expected_answer
from msllm.data.tables import Placement, make_table
from msllm.decode.engine import FREE, Generated
from msllm.errors import UserError
from msllm.evals import exact_match as evaluation
from msllm.streams import StreamSpec

SILENCE = 0
WORDS = "<silence> take 3 add 1 ? =3 +1 =4 that makes 4 . ##".split()


class WordTokenizer:
    """A token for each of WORDS."""

    silence_id = SILENCE

    def encode(self, text):
        return [WORDS.index(word) for word in text.split()]

    def decode(self, tokens):
        return " ".join(WORDS[token] for token in tokens if token != SILENCE)


class FakeLoaded:
    """A LoadedModel without parameters."""

    tokenizer = WordTokenizer()
    config = run_config = None
    parameters = None

    def __init__(self, names, kinds):
        self.streams = StreamSpec.from_config(StreamsConfig(names=names, kinds=kinds))

    def require_tokenizer(self):
        return self.tokenizer


def placed(stream, start, text):
    return Placement(stream, start, WordTokenizer().encode(text))


def say(monkeypatch, tokens, absent=()):
    """Replaces generation: the result is always these tokens.

    Args:
      monkeypatch: pytest's fixture.
      tokens: [T, S].
      absent: (row, stream) of cells that are absent, whatever their token.

    Returns:
      A dict whose item "forced" will be the forced tokens of the call.
    """
    call = {}

    def generate(model, rows, *, forced, batch):
        call["forced"] = forced
        shown = np.full((batch, rows, tokens.shape[1]), SILENCE)
        shown[:, : len(tokens)] = tokens
        present = shown >= 0
        for row, stream in absent:
            present[:, row, stream] = False
        return Generated(shown, shown, present, [])

    monkeypatch.setattr(evaluation, "generate", generate)
    return call


STREAMS = (("user", "thought", "output"), ("input", "thought", "output"))
EXAMPLE = make_table(
    [
        placed(0, 0, "take 3 add 1 ?"),
        placed(1, 3, "=3"),
        placed(1, 5, "+1 =4"),
        placed(2, 6, "that makes 4 ."),
    ],
    12,
    3,
    SILENCE,
)


def test_only_the_words_of_the_answer_count(monkeypatch):
    loaded = FakeLoaded(*STREAMS)
    case = evaluation.streams_case(EXAMPLE, loaded)
    # Without thoughts, and three rows later than in the example.
    question, answer = placed(0, 0, "take 3 add 1 ?"), placed(2, 9, "that makes 4 .")
    call = say(monkeypatch, make_table([question, answer], 14, 3, SILENCE).tokens)
    assert evaluation._answer([case], loaded, rows=20, batch=2) == [(True, 9 - 4, 12 - 4)]
    forced = call["forced"][0]
    assert forced[:5, 0].tolist() == WordTokenizer().encode("take 3 add 1 ?")
    assert (forced[5:, 0] == SILENCE).all()
    assert (forced[1:, 1:] == FREE).all()  # the model chooses all other cells
    assert case.one_stream_rows == 3 + 1  # three words of thought, then the answer


@pytest.mark.parametrize("answer", ["that makes 3 .", "that makes 4", "that makes 4 . .", ""])
def test_a_wrong_short_or_long_answer_is_wrong(monkeypatch, answer):
    loaded = FakeLoaded(*STREAMS)
    case = evaluation.streams_case(EXAMPLE, loaded)
    say(monkeypatch, make_table([placed(2, 6, answer)], 12, 3, SILENCE).tokens)
    assert not evaluation._answer([case], loaded, rows=20, batch=2)[0][0]


def test_one_stream_is_prompted_with_the_question_and_judged_by_its_last_words(monkeypatch):
    loaded = FakeLoaded(("text",), ("output",))
    question, thoughts = "take 3 add 1 ?", "=3 +1 =4"
    answer = " ".join(expected_answer(question.split()))
    table = make_table([placed(0, 0, f"{question} {thoughts} {answer}")], 14, 1, SILENCE)
    case = evaluation._single_case(table, loaded)
    call = say(monkeypatch, table.tokens)
    assert evaluation._answer([case], loaded, rows=20, batch=2) == [(True, 4, 7)]
    assert case.one_stream_rows == 4
    assert (call["forced"][0, :5, 0] != FREE).all() and (call["forced"][0, 5:, 0] == FREE).all()
    wrong = placed(0, 0, f"{question} {thoughts} that makes 3 .")
    say(monkeypatch, make_table([wrong], 14, 1, SILENCE).tokens)
    assert not evaluation._answer([case], loaded, rows=20, batch=2)[0][0]


def test_absent_cells_are_ignored(monkeypatch):
    loaded = FakeLoaded(*STREAMS)
    case = evaluation.streams_case(EXAMPLE, loaded)
    shown = EXAMPLE.tokens.copy()
    shown[0, 2] = WORDS.index("take")
    say(monkeypatch, shown, absent=[(0, 2)])
    assert evaluation._answer([case], loaded, rows=20, batch=1) == [(True, 2, 5)]


def test_with_a_mark_only_the_words_after_it_count(monkeypatch):
    loaded = FakeLoaded(("user", "output"), ("input", "output"))

    def table(text):
        return make_table([placed(0, 0, "take 3 add 1 ?"), placed(1, 5, text)], 16, 2, SILENCE)

    case = evaluation.streams_case(table("=3 +1 =4 ## 4 ."), loaded)
    case = evaluation._only_after(case, "##", loaded.tokenizer)
    assert loaded.tokenizer.decode(case.answer[0]) == "4 ." and case.one_stream_rows == 1 + 4

    def result(text):
        say(monkeypatch, table(text).tokens)
        return evaluation._answer([case], loaded, rows=20, batch=1, mark="##")[0]

    assert result("=3 ## 4 .") == (True, 3, 4)  # the working differs
    assert result("## 3 . ## 4 .") == (True, 5, 6)  # the last mark counts
    assert result("=3 ## 3") == (False, 3, 3)
    assert result("=3 +1 4 .") == result("4 . ##") == (False, None, None)
    with pytest.raises(
        UserError, match="nothing comes after it in the example's output .*correct the mark"
    ):
        evaluation._only_after(case, "##", loaded.tokenizer)


def test_the_end_of_a_mark_is_found_in_several_tokens():
    class Letters:
        def decode(self, tokens):
            return "".join(tokens)

    def end(*tokens):
        return evaluation._end_of_mark(tokens, "##", Letters())

    assert end("a", "#", "#", "b") == 3
    assert end("##", "b") == 1
    assert end("a#", "#b", "c") == 2
    assert end("##", "b", "#", "#", "c") == 4
    assert end("#", "#", "#", "b") == 3
    assert end("a", "#") == 2


def test_fewer_examples_are_spread_evenly(loaded, monkeypatch):
    taken = []
    case = evaluation.streams_case
    monkeypatch.setattr(
        evaluation, "streams_case", lambda table, model: taken.append(table) or case(table, model)
    )
    monkeypatch.setattr(
        evaluation, "_answer", lambda cases, *_: [evaluation.Answer(False, None, None)] * len(cases)
    )
    assert evaluation.evaluate(loaded).examples > 8
    everything = taken[:]
    taken.clear()
    assert evaluation.evaluate(loaded, examples=4).examples == 4
    places = [
        [np.array_equal(table.tokens, other.tokens) for other in everything].index(True)
        for table in taken
    ]
    assert places == [i * len(everything) // 4 for i in range(4)]
