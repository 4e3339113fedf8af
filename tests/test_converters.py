"""Converters keep all tokens and the order in each stream, and errors name bad records."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import replace

from msllm.config import Config, DataConfig, StreamsConfig, TokenizerConfig
from msllm.data import dictation
from msllm.data.converters import convert, texts
from msllm.data.converters.layout import MAX_CLOSING_ROWS
from msllm.data.tables import example_hash
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import train

WORDS = "a b c d e f g user thought output #### 1 2 3"
TOKENIZER = train([WORDS], TokenizerConfig(model_type="word", vocab_size=64))
CHARACTERS = train([WORDS + "ä\n"], TokenizerConfig(model_type="char", vocab_size=64))
SENTENCE = st.lists(st.sampled_from("abcdefg"), max_size=6).map(" ".join)
THREE = StreamsConfig()  # user, thought, output
ONE = StreamsConfig(names=("text",), kinds=("output",))


def make_config(converter, path="", streams=THREE, **data):
    return Config(streams=streams, data=DataConfig(converter=converter, path=str(path), **data))


def run(config, tokenizer=TOKENIZER):
    """The tables that the converter makes."""
    return list(convert(config, StreamSpec.from_config(config.streams), tokenizer))


def jsonl(tmp_path, *records):
    """Writes records as JSON lines, and strings as they are."""
    path = tmp_path / "records.jsonl"
    path.write_text(
        "".join(json.dumps(r) + "\n" if not isinstance(r, str) else r + "\n" for r in records)
    )
    return path


def spoken(table, stream, tokenizer=TOKENIZER):
    """(text of a stream, (row of its first token, row after its last token) or None)."""
    speaks = table.present[:, stream] & (table.tokens[:, stream] != tokenizer.silence_id)
    rows = np.flatnonzero(speaks)
    text = tokenizer.decode(table.tokens[speaks, stream])
    return text, (int(rows[0]), int(rows[-1]) + 1) if len(rows) else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for hypothesis, which runs a test many times with the same fixtures."""
    return tmp_path_factory.mktemp("data")


@settings(max_examples=30, deadline=None)
@given(
    question=SENTENCE.filter(bool),
    worked=st.lists(SENTENCE.filter(bool), min_size=1, max_size=3),
    after=st.integers(-1, 9),
)
def test_gsm8k_streams(folder, question, worked, after):
    answer = "\n".join(f"{line} <<1+2=3>>3" for line in worked) + "\n#### 3"
    path = jsonl(folder, {"question": question, "answer": answer})
    (table,) = run(make_config("gsm8k", path, options={"think_after": after}), CHARACTERS)
    asked, (_, asked_end) = spoken(table, 0, CHARACTERS)
    thought, (thought_start, thought_end) = spoken(table, 1, CHARACTERS)
    output, (output_start, output_end) = spoken(table, 2, CHARACTERS)
    assert asked == question and output == "3"
    assert thought == "\n".join(f"{line} 3" for line in worked)  # without calculator annotations
    assert thought_start == (asked_end if after < 0 else after)
    assert output_start == max(thought_end, asked_end)
    assert table.present.all()
    assert 1 <= len(table.tokens) - output_end <= MAX_CLOSING_ROWS  # rows of silence at the end


def test_the_gsm8k_answer_waits_for_the_end_of_the_question(tmp_path):
    path = jsonl(tmp_path, {"question": "a b c d e f", "answer": "g\n#### 1"})
    (table,) = run(make_config("gsm8k", path, options={"think_after": 0}))
    assert spoken(table, 1) == ("g", (0, 1)) and spoken(table, 2) == ("1", (6, 7))


def test_gsm8k_without_a_thought_stream_puts_the_working_into_output(tmp_path):
    path = jsonl(tmp_path, {"question": "a b", "answer": "c <<1+2=3>>3\nd\n#### 3"})
    streams = StreamsConfig(names=("user", "output"), kinds=("input", "output"))
    (table,) = run(make_config("gsm8k", path, streams=streams), CHARACTERS)
    assert spoken(table, 0, CHARACTERS) == ("a b", (0, 3))
    assert spoken(table, 1, CHARACTERS) == ("c 3\nd\n#### 3", (3, 15))
    (table,) = run(
        make_config("gsm8k", path, streams=streams, options={"think_after": 1}), CHARACTERS
    )
    assert spoken(table, 1, CHARACTERS)[1] == (1, 13)


def test_single_puts_text_into_one_of_several_streams(tmp_path):
    (tmp_path / "x.txt").write_text("a b c d e")
    tables = run(make_config("single", tmp_path / "x.txt", options={"stream": "output"}, rows=4))
    assert [spoken(table, 2)[0] for table in tables] == ["a b c d", "d e"]
    for table in tables:
        assert table.present.all() and (table.tokens[:, :2] == TOKENIZER.silence_id).all()


@settings(max_examples=30, deadline=None)
@given(
    cells=st.lists(
        st.tuples(*[st.sampled_from(["a", "b", "", None, 3])] * 2), min_size=1, max_size=6
    ).map(lambda rows: [list(column) for column in zip(*rows)])
)
def test_tables_keep_every_cell(folder, cells):
    (table,) = run(
        make_config("tables", jsonl(folder, {"streams": {"user": cells[0], "output": cells[1]}}))
    )
    ids = {
        "": TOKENIZER.silence_id,
        3: 3,
        "a": TOKENIZER.encode("a")[0],
        "b": TOKENIZER.encode("b")[0],
    }
    for column, stream in zip(cells, (0, 2)):
        assert table.present[:, stream].tolist() == [item is not None for item in column]
        assert table.tokens[:, stream].tolist() == [
            0 if item is None else ids[item] for item in column
        ]
    assert table.present[:, 1].all() and (table.tokens[:, 1] == TOKENIZER.silence_id).all()


def test_tables_from_texts_are_padded_with_silence(tmp_path):
    (table,) = run(
        make_config("tables", jsonl(tmp_path, {"streams": {"user": "a b c", "output": "d"}}))
    )
    assert table.tokens.shape == (3, 3) and table.present.all()
    assert spoken(table, 0) == ("a b c", (0, 3)) and spoken(table, 2) == ("d", (0, 1))


@settings(max_examples=30, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["human", "thought", "output"]), SENTENCE), min_size=1, max_size=6
    ),
    overlap=st.integers(0, 3),
)
def test_chat_keeps_every_turn_in_order(folder, turns, overlap):
    messages = [{"role": role, "content": content} for role, content in turns]
    options = {"roles": {"human": "user"}, "overlap": overlap}
    (table,) = run(make_config("chat", jsonl(folder, {"messages": messages}), options=options))
    for stream, role in enumerate(("human", "thought", "output")):
        assert spoken(table, stream)[0] == " ".join(c for r, c in turns if r == role and c)
    if overlap == 0:  # one stream speaks at a time, without gaps; silence follows
        speaking = (table.tokens != TOKENIZER.silence_id).sum(axis=1)
        closing = len(table.tokens) - sum(speaking)
        assert speaking.tolist() == [1] * sum(speaking) + [0] * closing
        assert 1 <= closing <= MAX_CLOSING_ROWS


def test_chat_overlaps_answers_but_not_inputs(tmp_path):
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "a b c"), ("output", "d e"), ("user", "f"))
    ]
    (table,) = run(
        make_config("chat", jsonl(tmp_path, {"messages": messages}), options={"overlap": 2})
    )
    assert spoken(table, 2) == ("d e", (1, 3))
    assert [TOKENIZER.decode([i]) for i in table.tokens[:5, 0]] == ["a", "b", "c", "f", ""]


@settings(max_examples=30, deadline=None)
@given(content=st.text("abc \n", min_size=2, max_size=60), rows=st.integers(2, 9))
def test_single_predicts_each_character_once(folder, content, rows):
    path = folder / "plain.txt"
    path.write_text(content, newline="")
    pieces = run(make_config("single", path, streams=ONE, rows=rows), CHARACTERS)
    columns = [piece.tokens[:, 0].tolist() for piece in pieces]
    # The first token of a table is the last one of the table before.
    tokens = columns[0][:1] + [token for column in columns for token in column[1:]]
    assert CHARACTERS.decode(tokens) == content
    assert all(a[-1] == b[0] for a, b in zip(columns, columns[1:]))
    assert all(len(column) == rows for column in columns[:-1]) and 2 <= len(columns[-1]) <= rows


def test_reading_text_in_small_blocks_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "plain.txt"
    path.write_text("a b\nc ä\n" * 50)
    config = make_config("single", path, streams=ONE, rows=7)
    whole = run(config, CHARACTERS)
    monkeypatch.setattr("msllm.data.files.BLOCK_CHARACTERS", 5)
    for ours, theirs in zip(run(config, CHARACTERS), whole, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_delays_and_max_examples(tmp_path):
    path = jsonl(tmp_path, *[{"streams": {"user": "a b", "output": "c d"}}] * 3)
    streams = StreamsConfig(delays=(0, 0, 1))
    tables = run(make_config("tables", path, streams=streams, max_examples=2))
    assert len(tables) == 2
    assert tables[0].present[:, 2].tolist() == [False, True, True]
    assert spoken(tables[0], 2) == ("c d", (1, 3))


def test_the_tokenizer_is_trained_on_the_texts_of_tables(tmp_path):
    record = {"question": "a b", "answer": "c <<1+1=2>>2\n#### 2"}
    config = make_config("gsm8k", jsonl(tmp_path, record))
    assert list(texts(config, StreamSpec.from_config(config.streams))) == ["a b", "c 2", "2"]


# Dictated sums.


def dictation_tables(single=False, count=200, options=None, rows=64):
    """(tables, tokenizer) of dictated sums in three streams, or in one."""
    streams = ONE if single else THREE
    name = "dictation_single" if single else "dictation"
    given = {"examples": count, "seed": 3} | (options or {})
    config = make_config(name, streams=streams, options=given, rows=rows)
    word = TokenizerConfig(model_type="word", vocab_size=256)
    tokenizer = train(texts(config, StreamSpec.from_config(streams)), word)
    return run(config, tokenizer), tokenizer


def test_dictation_answers_are_right():
    """Computes the answers from the words alone, without the generator's state."""
    for example in dictation.generate(500, seed=1):
        steps = []
        for word, following in zip(example.question, example.question[1:]):
            if word in ("take", "add", "plus", "subtract", "minus", "double"):
                steps.append((word, following))
            elif (word, following) == ("no", "wait"):
                steps.pop()
        value = 0
        for word, operand in steps:
            sign = -1 if word in ("subtract", "minus") else 1
            value = value * 2 if word == "double" else value + sign * int(operand)
            assert 0 <= value <= dictation.LARGEST
        assert example.answer == ["that", "makes", str(value), "."]
        assert example.answer == dictation.expected_answer(example.question)


def test_a_thought_about_a_correction_names_the_step_that_it_takes_back():
    thoughts, result = dictation.work_out(
        "take 7 double it no wait minus 4 no wait add 2 ?".split()
    )
    assert [" ".join(words) for _, words in thoughts] == (
        ["=7", "*2 =14", "undo*2 =7", "-4 =3", "undo-4 =7", "+2 =9"]
    )
    assert result == 9


def test_dictation_has_corrections_and_no_duplicates():
    examples = list(dictation.generate(2000, seed=5))
    assert len({" ".join(e.question) for e in examples}) == 2000
    assert 0.3 < np.mean(["wait" in e.question for e in examples]) < 0.4
    fewer = dictation.generate(50, seed=5)
    assert [e.question for e in fewer] == [e.question for e in examples[:50]]


def test_dictation_reacts_as_soon_as_the_visibility_allows():
    """Thoughts and answers come as early as the visibility rule allows, and not before."""
    tables, tokenizer = dictation_tables()
    for table in tables:
        question, (start, _) = spoken(table, 0, tokenizer)
        words, silence = question.split(), tokenizer.silence_id
        (end,) = dictation.question_ends(table.tokens[:, 0], tokenizer.encode("?")[0])
        answer, (answer_start, answer_end) = spoken(table, 2, tokenizer)
        assert start == 0 and end == len(words) - 1
        assert answer.split() == dictation.expected_answer(words)
        assert answer_start == end + dictation.REACTION
        assert 1 <= len(table.tokens) - answer_end <= MAX_CLOSING_ROWS
        thoughts, _ = dictation.work_out(words)
        rows = np.flatnonzero(table.tokens[:, 1] != silence).tolist()
        thought_words = [tokenizer.decode([table.tokens[row, 1]]) for row in rows]
        assert thought_words == [word for _, thought in thoughts for word in thought]
        for index, thought in thoughts:
            assert rows.pop(0) == index + dictation.REACTION
            del rows[: len(thought) - 1]
        # "that makes" comes first, so the number is worked out before the output says it.
        value_row = max(np.flatnonzero(table.tokens[:, 1] != silence))
        assert answer_start + 2 >= value_row + dictation.REACTION


def test_dictation_in_one_stream_has_the_same_examples():
    multi, single = dictation_tables()[0], dictation_tables(single=True)[0]
    assert [t.example for t in multi] == [t.example for t in single]
    tokenizer = dictation_tables(single=True)[1]
    words = tokenizer.decode(single[0].tokens[:, 0]).split()
    (end,) = dictation.question_ends(single[0].tokens[:, 0], tokenizer.encode("?")[0])
    assert words[end] == "?" and words[-4:] == dictation.expected_answer(words[: end + 1])


CONVERSATIONS = {"questions": 3, "silence": 60}


def test_conversations_draw_their_pauses_and_ask_no_question_twice():
    conversations = list(dictation.converse(2000, seed=5, **CONVERSATIONS))
    turns = [turn for conversation in conversations for turn in conversation]
    assert {len(conversation) for conversation in conversations} == {1, 2, 3}
    assert len({" ".join(turn.dictation.question) for turn in turns}) == len(turns)
    between = [turn.silence[0] for c in conversations for turn in c[1:]]
    inside = [rows for turn in turns for rows in turn.silence[1:]]
    for pauses, share in ((between, 0.6), (inside, 0.06)):
        assert min(pauses) == 0 and share - 0.02 < np.mean(np.array(pauses) > 0) < share + 0.02
    assert max(between) > 50 and max(sum(sum(t.silence) for t in c) for c in conversations) == 60
    plain = list(dictation.converse(50, seed=5))
    assert [c[0].dictation for c in plain] == list(dictation.generate(50, seed=5))
    assert not any(sum(turn.silence) for (turn,) in plain)


def test_conversations_react_as_soon_as_the_visibility_allows():
    tables, tokenizer = dictation_tables(options=CONVERSATIONS, rows=100)
    silence = tokenizer.silence_id
    turns = 0
    for table in tables:
        assert len(table.tokens) <= 100
        user, thought, output = table.tokens.T
        start = 0
        for end in dictation.question_ends(user, tokenizer.encode("?")[0]):
            at = np.flatnonzero(user[start : end + 1] != silence) + start
            words = [tokenizer.decode([user[row]]) for row in at]
            answer = output[end + dictation.REACTION :][:4]
            assert tokenizer.decode(answer).split() == dictation.expected_answer(words)
            for index, said in dictation.work_out(words)[0]:
                rows = at[index] + dictation.REACTION + np.arange(len(said))
                assert [tokenizer.decode([thought[row]]) for row in rows] == said
            start, turns = end + 1, turns + 1
        assert (user[start:] == silence).all()
    assert turns > 1.5 * len(tables)


def test_conversations_in_one_stream_have_the_same_examples():
    options = CONVERSATIONS
    multi, tokenizer = dictation_tables(options=options, rows=300)
    single, _ = dictation_tables(single=True, options=options, rows=300)
    assert [t.example for t in multi] == [t.example for t in single]
    end_id = tokenizer.encode("?")[0]
    for first, second in zip(multi, single):
        asked = dictation.question_ends(second.tokens[:, 0], end_id)
        assert len(dictation.question_ends(first.tokens[:, 0], end_id)) == len(asked)
        closing = second.tokens[:, 0] == tokenizer.silence_id
        assert not closing[: closing.argmax()].any() and closing[closing.argmax() :].all()


def test_options_of_conversations_have_limits():
    for options in ({"questions": 0}, {"silence": -1}, {"examples": 0}):
        message = rf"options.{next(iter(options))} is .*must be at least"
        with pytest.raises(UserError, match=message):
            dictation_tables(options=options)


# Bad input.

GOOD = {"question": "a", "answer": "b\n#### 1"}
BAD = [
    ("gsm8k", [GOOD, "{'a': 1}"], r"records.jsonl:2: invalid JSON"),
    ("gsm8k", [GOOD, '{"a": 1'], r"records.jsonl:2: invalid JSON \(.* in column 8\)"),
    ("gsm8k", [GOOD, "[1]"], r"records.jsonl:2: .*must be a JSON object"),
    ("gsm8k", [GOOD, GOOD, {"question": "a"}], r"records.jsonl:3: there is no 'answer': must be"),
    ("gsm8k", [{"question": "a", "answer": "b"}], r"records.jsonl:1: .*#### number"),
    ("tables", [GOOD], r"records.jsonl:1: keys are"),
    (
        "tables",
        [{"streams": {"user": ["a"], "output": ["a", "b"]}}],
        r"jsonl:1: lengths in rows are .*'user': 1.*pad",
    ),
    (
        "tables",
        [{"streams": {"user": "a b", "output": ["a"]}}],
        r"jsonl:1: lengths in rows are .*pad",
    ),
    ("tables", [{"streams": {"usr": ["a"]}}], r"records.jsonl:1: unknown stream 'usr'"),
    ("tables", [{"streams": {"user": ["a", "b c"]}}], r"jsonl:1, user, row 1: 'b c' is 2 tokens"),
    ("tables", [{"streams": {"user": ["zzz"]}}], r"jsonl:1, user, row 0: 'zzz' .*unknown"),
    ("tables", [{"streams": {"user": [99999]}}], r"jsonl:1, user, row 0: 99999 is no cell"),
    ("tables", [{"streams": {"user": [True]}}], r"jsonl:1, user, row 0: True is no cell"),
    ("tables", [{"streams": {"user": 5}}], r"jsonl:1: stream 'user' is 5"),
    ("chat", [{"messages": "hi"}], r"records.jsonl:1: 'messages' is a text, but no JSON"),
    (
        "chat",
        [{"messages": [{"role": "bot", "content": "a"}]}],
        r"jsonl:1, message 0: role 'bot' .*options.roles",
    ),
    ("single", ["a"], r"exactly one stream; of several streams, name the one for the text"),
]


@pytest.mark.parametrize("converter, records, message", BAD, ids=[str(i) for i in range(len(BAD))])
def test_the_error_names_a_bad_record(tmp_path, converter, records, message):
    with pytest.raises(UserError, match=message):
        run(make_config(converter, jsonl(tmp_path, *records)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"converter": "gsm9k"},
            "config.data.converter is 'gsm9k': must be one of chat, .*package.module:function",
        ),
        (
            {"converter": "single", "options": {"stream": "outptu"}},
            "stream names 'outptu', which is",
        ),
        ({"options": {"think": 1}}, "options.think: the options of gsm8k are: think_after"),
        ({"options": {"think_after": "1"}}, "think_after is '1': expected int"),
        ({"options": {"think_after": -2}}, "think_after is -2"),
        (
            {"path": "/nowhere/*.jsonl"},
            r"/nowhere/.*\(there is no folder /nowhere\).*--config.data.path=\.\.\.$",
        ),
        ({"path": "../shared/x.jsonl"}, "path=..., or set MSLLM_SHARED: the example configs"),
    ],
)
def test_the_error_names_a_bad_setting(tmp_path, changes, message):
    config = make_config("gsm8k", jsonl(tmp_path, GOOD))
    with pytest.raises(UserError, match=message):
        run(replace(config, "data", **changes))


def test_input_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"question": "\xff\xfe"}\n')
    with pytest.raises(UserError, match="x.jsonl:1: not UTF-8"):
        run(make_config("gsm8k", tmp_path / "x.jsonl"))


# The tables of the example configs must not change: data and checkpoints of earlier versions must
# stay comparable.

SOLVED = {
    "question": "A pen costs 2. How much are 3?",
    "answer": "2*3=<<2*3=6>>6\nSo it is 6.\n#### 6",
}
# config: (converter, options, tokenizer, hash of the tables)
TABLE_HASHES = {
    "quickstart": ("dictation", {"examples": 300}, "word", "50c741e8ed2627fe"),
    "quickstart_single": ("dictation_single", {"examples": 300}, "word", "ca6a210b125cd58c"),
    "gsm8k": ("gsm8k", {}, "char", "1c5ef32274f3e73c"),
    "shakespeare": ("single", {}, "char", "1e20ef509ce52350"),
}


@pytest.mark.parametrize("name", TABLE_HASHES)
def test_the_tables_of_the_configs_do_not_change(tmp_path, name):
    converter, options, model_type, expected = TABLE_HASHES[name]
    (tmp_path / "x.jsonl").write_text(
        json.dumps(SOLVED) + "\n" + json.dumps(SOLVED | {"question": "And 1+1?"})
    )
    play = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak.\n"
    (tmp_path / "x.txt").write_text(play * 9)
    path = tmp_path / ("x.txt" if converter == "single" else "x.jsonl")
    streams = THREE if name in ("quickstart", "gsm8k") else ONE
    config = make_config(converter, path, streams=streams, options=options, rows=65)
    tokenizer = train(
        texts(config, StreamSpec.from_config(streams)),
        TokenizerConfig(model_type=model_type, vocab_size=256),
    )
    content = [
        [[tokenizer.piece(token) for token in row] for row in table.tokens.tolist()]
        + [table.present.tolist(), table.example]
        for table in run(config, tokenizer)
    ]
    if converter == "single":
        # The example's id depends on token ids, which may differ between sentencepiece versions.
        content = [table[:-1] for table in content]
    assert example_hash(json.dumps(content)) == expected
