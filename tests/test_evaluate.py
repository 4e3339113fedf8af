"""Exact match on held-out examples, with handwritten transcripts in place of generation."""

import numpy as np
import pytest

from msllm.config import StreamsConfig
from msllm.data.dictation import expected_answer
from msllm.data.tables import Placement, make_table
from msllm.decode.engine import FREE, Generated, Row
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
    assert evaluation._answer([case], loaded, rows=20, batch=2) == [[(True, 9 - 4, 12 - 4)]]
    forced = call["forced"][0]
    assert forced[:5, 0].tolist() == WordTokenizer().encode("take 3 add 1 ?")
    assert (forced[5:, 0] == SILENCE).all()
    assert (forced[1:, 1:] == FREE).all()  # the model chooses all other cells
    # Three words of thought, then the answer.
    assert [turn.one_stream_rows for turn in case.turns] == [3 + 1]


@pytest.mark.parametrize("answer", ["that makes 3 .", "that makes 4", "that makes 4 . .", ""])
def test_a_wrong_short_or_long_answer_is_wrong(monkeypatch, answer):
    loaded = FakeLoaded(*STREAMS)
    case = evaluation.streams_case(EXAMPLE, loaded)
    say(monkeypatch, make_table([placed(2, 6, answer)], 12, 3, SILENCE).tokens)
    assert not evaluation._answer([case], loaded, rows=20, batch=2)[0][0].right


def test_the_most_frequent_answer_of_a_vote_counts():
    """Whenever it comes: the rows are those of the first run that gave it."""
    loaded = FakeLoaded(*STREAMS)
    case = evaluation.streams_case(EXAMPLE, loaded)

    def run(start, text):
        tokens = make_table([placed(2, start, text)], 14, 3, SILENCE).tokens
        return [Row(i, row, row >= 0, None, None, None, None) for i, row in enumerate(tokens)]

    wrong, right = run(6, "that makes 3 ."), [run(at, "that makes 4 .") for at in (9, 7)]
    assert evaluation._elected(case, [wrong, *right], loaded, "") == [(True, 9 - 4, 12 - 4)]
    assert not evaluation._elected(case, [wrong, right[0], wrong], loaded, "")[0].right


def test_each_turn_of_a_conversation_has_its_own_answer(monkeypatch):
    loaded = FakeLoaded(*STREAMS)
    questions = [placed(0, row, "take 3 add 1 ?") for row in (0, 14, 30)]
    thoughts = [placed(1, row, "=3 +1 =4") for row in (3, 17, 33)]
    recorded = [placed(2, row, "that makes 4 .") for row in (6, 20, 36)]
    example = make_table([*questions, *thoughts, *recorded], 44, 3, SILENCE)
    case = evaluation.streams_case(example, loaded)
    assert [turn.end for turn in case.turns] == [4, 18, 34]
    assert [turn.one_stream_rows for turn in case.turns] == [4, 4, 4]
    # Right; late but before the next question has ended; wrong.
    given = [placed(2, 7, "that makes 4 ."), placed(2, 31, "that makes 4 ."), placed(2, 37, "3 .")]
    say(monkeypatch, make_table([*questions, *given], 44, 3, SILENCE).tokens)
    answers = evaluation._answer([case], loaded, rows=50, batch=1)
    assert answers == [[(True, 3, 6), (True, 13, 16), (False, 3, 4)]]


def test_streams_that_speak_at_the_same_time_have_one_answer():
    loaded = FakeLoaded(("user", "output"), ("input", "output"))

    def ends(*placements):
        table = make_table(placements, 20, 2, SILENCE)
        return [turn.end for turn in evaluation.streams_case(table, loaded).turns]

    question, answer = "take 3", "that makes"
    turns = [placed(0, 0, question), placed(1, 4, answer), placed(0, 8, question)]
    assert ends(*turns, placed(1, 12, answer)) == [1, 9]
    assert ends(*turns, placed(1, 9, answer)) == [9]
    assert ends(placed(1, 0, answer), placed(0, 4, question), placed(1, 8, answer)) == [5]
    assert ends(placed(0, 0, question)) == [1]


def test_figures_that_do_not_exist_are_left_out():
    figures = {"one_stream_rows": 1.0, "answered_rows": None}
    rows = {"rows_to_first": None, "rows_to_last": None}
    none = evaluation.ExactMatch(2, 4, 0.0, 0.0, (0.0, 0.0), **figures, **rows)
    text = evaluation.describe(none)
    assert "nan" not in text and "None" not in text and "0.0% of 4 answers in 2 held-out" in text
    rows = {"rows_to_first": -3.0, "rows_to_last": 2.0}
    figures["answered_rows"] = -3.0
    early = evaluation.ExactMatch(2, 2, 1.0, 1.0, (1.0,), **figures, **rows)
    text = evaluation.describe(early)
    assert "3 rows before the end of the input, last token 2 rows after" in text
    assert "-3" not in text and "turn" not in text


def test_one_stream_is_prompted_with_the_question_and_judged_by_its_last_words(monkeypatch):
    loaded = FakeLoaded(("text",), ("output",))
    question, thoughts = "take 3 add 1 ?", "=3 +1 =4"
    answer = " ".join(expected_answer(question.split()))
    table = make_table([placed(0, 0, f"{question} {thoughts} {answer}")], 14, 1, SILENCE)
    (case,) = evaluation._single_cases(table, loaded)
    call = say(monkeypatch, table.tokens)
    assert evaluation._answer([case], loaded, rows=20, batch=2) == [[(True, 4, 7)]]
    assert case.turns[0].one_stream_rows == 4
    assert (call["forced"][0, :5, 0] != FREE).all() and (call["forced"][0, 5:, 0] == FREE).all()
    wrong = placed(0, 0, f"{question} {thoughts} that makes 3 .")
    say(monkeypatch, make_table([wrong], 14, 1, SILENCE).tokens)
    assert not evaluation._answer([case], loaded, rows=20, batch=2)[0][0].right


def test_each_question_in_one_stream_is_a_task_after_those_before_it(monkeypatch):
    loaded = FakeLoaded(("text",), ("output",))
    example = "take 3 add 1 ? =3 +1 =4 that makes 4 ."
    table = make_table([placed(0, 0, f"{example} {example}")], 26, 1, SILENCE)
    first, second = evaluation._single_cases(table, loaded)
    assert (first.turns[0].end, second.turns[0].end) == (4, 16)
    assert (first.first_turn, second.first_turn) == (0, 1)
    assert len(first.prompt) == 12 and (second.prompt[:17, 0] != FREE).all()
    say(monkeypatch, table.tokens)
    both = evaluation._answer([first, second], loaded, rows=26, batch=2)
    assert both == [[(True, 4, 7)], [(True, 4, 7)]]


def test_absent_cells_are_ignored(monkeypatch):
    loaded = FakeLoaded(*STREAMS)
    case = evaluation.streams_case(EXAMPLE, loaded)
    shown = EXAMPLE.tokens.copy()
    shown[0, 2] = WORDS.index("take")
    say(monkeypatch, shown, absent=[(0, 2)])
    assert evaluation._answer([case], loaded, rows=20, batch=1) == [[(True, 2, 5)]]


def test_with_a_mark_only_the_words_after_it_count(monkeypatch):
    loaded = FakeLoaded(("user", "output"), ("input", "output"))

    def table(text):
        return make_table([placed(0, 0, "take 3 add 1 ?"), placed(1, 5, text)], 16, 2, SILENCE)

    case = evaluation.streams_case(table("=3 +1 =4 ## 4 ."), loaded)
    case = evaluation._only_after(case, "##", loaded.tokenizer)
    (turn,) = case.turns
    assert loaded.tokenizer.decode(turn.answer[0]) == "4 ." and turn.one_stream_rows == 1 + 4

    def result(text):
        say(monkeypatch, table(text).tokens)
        return evaluation._answer([case], loaded, rows=20, batch=1, mark="##")[0][0]

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
        evaluation,
        "_answer",
        lambda cases, *_: [[evaluation.Answer(False, None, None)] for _ in cases],
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
