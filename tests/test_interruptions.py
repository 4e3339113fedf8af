"""Interruptions: how outputs and thoughts are judged, and what live sessions are fed."""

import dataclasses

import numpy as np
import pytest

from msllm.data.dictation import REACTION
from msllm.errors import UserError
from msllm.evals.exact_match import Turn, streams_case
from msllm.evals.held_out import examples, open_split
from msllm.evals.interruptions import Verdict, _corrected, _given, _live, evaluate, judge
from msllm.tokenizer import Tokenizer

USER, THOUGHT, OUTPUT = range(3)


def table(tokenizer: Tokenizer, rows: int = 16, **columns) -> np.ndarray:
    """Tokens [rows, 3] with texts {row: text} in some columns, and silence elsewhere."""
    tokens = np.full((rows, 3), tokenizer.silence_id)
    for s, name in enumerate(("user", "thought", "output")):
        for row, text in columns.get(name, {}).items():
            ids = tokenizer.encode(text)
            tokens[row : row + len(ids), s] = ids
    return tokens


def test_verdicts_on_outputs_and_thoughts(loaded):
    case = _corrected(loaded, "", 1)[0]
    user = {0: "take 3 add 1 no wait add 2 ?"}
    encode = loaded.tokenizer.encode
    case = case._replace(turns=[Turn(8, [encode("that makes 5 .")], 1)])

    def verdict(**columns):
        (verdict,) = judge(table(loaded.tokenizer, user=user, **columns), case, loaded)
        return verdict

    # The step back before the user's "wait" is not a reaction to it.
    thought = {0: "undo+1", 8: "undo+1 =3"}
    assert verdict(thought=thought, output={11: "that makes 5 ."}) == Verdict(True, False, 3)
    assert verdict(thought=thought, output={11: "that makes 4 ."}) == Verdict(False, True, 3)
    assert verdict(output={11: "that makes 5 . ."}) == Verdict(False, False, None)


def test_verdicts_on_the_training_data_are_followed(loaded):
    wait = loaded.tokenizer.encode("wait")[0]
    tables = [t for t in examples(open_split(loaded)) if (t.tokens == wait).any()]
    verdicts = [v for t in tables for v in judge(t.tokens, streams_case(t, loaded), loaded)]
    assert len(verdicts) >= 3
    assert set(verdicts) == {Verdict(followed=True, ignored=False, rows_to_notice=REACTION)}
    assert len(_corrected(loaded, "", 500)) == len(tables)


def test_each_correction_of_a_conversation_has_a_verdict(loaded):
    encode = loaded.tokenizer.encode
    corrected = "take 3 add 1 no wait add 2 ?"
    user, ends = {0: corrected, 12: "take 4 add 1 ?", 22: corrected}, (8, 16, 30)
    columns = {
        "thought": {7: "undo+1 =3", 29: "undo+1 =3"},
        "output": {10: "that makes 5 .", 18: "that makes 5 .", 32: "that makes 4 ."},
    }
    tokens = table(loaded.tokenizer, rows=40, user=user, **columns)
    turns = [Turn(end, [encode("that makes 5 .")], 1) for end in ends]
    case = _corrected(loaded, "", 1)[0]._replace(turns=turns)
    assert judge(tokens, case, loaded) == [Verdict(True, False, 2), Verdict(False, True, 2)]


def test_sessions_are_fed_every_word_of_the_user_in_order(loaded):
    cases = _corrected(loaded, "", 3)

    def said(column):
        return column[column != loaded.tokenizer.silence_id].tolist()

    for case, given, live in zip(cases, _given(loaded, cases, 40), _live(loaded, cases, 40)):
        assert (given[: len(case.prompt), USER] == case.prompt[:, USER]).all()
        assert said(live[:, USER]) == said(case.prompt[:, USER])
        # A word that follows silence goes into the row that was shown last.
        end = case.turns[-1].end
        late = np.flatnonzero(live[:, USER] == said(case.prompt[:, USER])[-1])[-1] - end
        assert -1 <= late <= 0


def test_evaluate_counts_cases_and_refuses_other_converters(loaded):
    found = evaluate(loaded, examples=2)
    assert found.table.cases == found.live.cases == 2
    other = dataclasses.replace(
        loaded.run_config, data=dataclasses.replace(loaded.run_config.data, converter="chat")
    )
    with pytest.raises(UserError, match="converter is 'chat': must be 'dictation'"):
        evaluate(dataclasses.replace(loaded, run_config=other))
