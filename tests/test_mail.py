"""Mail: cells of input streams that copy what another stream said, in decoding, data and tests."""

import dataclasses
import json
import types

import numpy as np
import pytest
from hypothesis import given, reject, settings, strategies

from msllm.config import Config, DataConfig, MeshConfig, StreamsConfig, TokenizerConfig
from msllm.data.converters import convert
from msllm.data.loader import Loader
from msllm.data.prepare import prepare
from msllm.data.sources import BadRecord, BadRecords
from msllm.data.tables import Table
from msllm.decode.engine import FREE, DecodeOptions, Engine, generate
from msllm.errors import UserError
from msllm.evals import by_turn, exact_match
from msllm.mail import Mail, deliver_to_example, is_mailed, mail_in, mailed_cells, parse_mail
from msllm.sharding import make_mesh
from msllm.streams import StreamSpec
from msllm.weights.convert import _rename_streams

SILENCE = 3
NAMES = ("user", "thought", "output", "tool")
KINDS = ("input", "thought", "output", "input")
USER, THOUGHT, OUTPUT, TOOL = range(4)
WARM = DecodeOptions(temperature=2.0, seed=5)
WINDOW = 10
# A chain (tool reads the user's mail), lags of several rows and of none, and rows without an end.
RULES = (
    ("user", "thought", "1", "3,6::4"),
    ("user", "output", "3", "4:6"),
    ("tool", "user", "1", "5::3"),
    ("tool", "output", "0", "4::3"),
)


def rules(*mail):
    return parse_mail(mail, NAMES, KINDS)


def streams(mail=RULES, **fields):
    return StreamsConfig(names=NAMES, kinds=KINDS, mail=mail, **fields)


@pytest.fixture
def model(make_model):
    return make_model(4).with_streams(mail=rules(*RULES))


def engine_of(model, **arguments):
    arguments = {"sessions": 2, "window": WINDOW, "silence_id": SILENCE} | arguments
    return Engine(model, **arguments)


def tokens(rows):
    return np.array([row.tokens for row in rows])


def steps(session, count):
    return tokens([session.step() for _ in range(count)])


def check_delivered(table, mail, delays=(0,) * 4):
    """Asserts that the cells of a table, as read, hold their mail. Returns how many speak."""
    spoken = 0
    for row, reader, source_row, source in mailed_cells(mail, len(table.tokens)):
        if row < delays[reader]:
            continue
        assert table.present[row, reader] == table.present[source_row, source]
        assert table.tokens[row, reader] == table.tokens[source_row, source]
        spoken += table.present[row, reader] and table.tokens[row, reader] != SILENCE
    return spoken


def by_hand(model, table):
    """The table that a model without mail generates if the input streams are forced by hand."""
    session = engine_of(model.with_streams(mail=()), window=len(table.tokens)).open(WARM)
    for row in table.tokens:
        session.force(USER, [int(row[USER])])
        session.force(TOOL, [int(row[TOOL])])
        session.step()
    return session.transcript()


def test_rows_are_parsed_and_described():
    mail = rules(("user", "output", "2", "5, 8:80:3,9:11:4,90:"))
    parts = (range(5, 6), range(8, 78, 3), range(9, 10), range(90, 1 << 31))
    assert mail == (Mail(USER, OUTPUT, 2, parts),)
    assert mail[0].describe(NAMES) == ("user", "output", "2", "5,8:78:3,9,90:")
    for row, expected in ((5, 1), (6, 0), (8, 1), (9, 1), (10, 0), (11, 1), (80, 0), (10**9, 1)):
        assert len(mail_in(mail, row)) == expected, row
    assert mail_in(mail, 11) == [(11, USER, 9, OUTPUT)]
    assert is_mailed(mail, 12, 4).sum(0).tolist() == [4, 0, 0, 0]


@pytest.mark.parametrize(
    "mail, message",
    [
        ([("x", "output", "1", "5")], "config.streams.mail names 'x': the streams are user, th"),
        ([("user", "x", "1", "5")], "config.streams.mail names 'x'"),
        ([("output", "user", "1", "5")], "'output', which is of kind output: mail goes into inp"),
        ([("user", "user", "1", "5")], "copies 'user' into itself"),
        ([("user", "output", "-1", "5")], r"holds lag '-1': must be a number of rows in \[0, "),
        (
            [("user", "tool", "0", "5"), ("tool", "output", "0", "9")],
            r"copies 'tool' into 'user' in the same row \(lag 0\), and 'tool' gets such a copy",
        ),
        ([("user", "output", "²", "5")], "holds lag '²'"),
        ([("user", "output", "never", "5")], "holds lag 'never'"),
        ([("user", "output", "1", "")], "holds rows '': rows are '5'"),
        ([("user", "output", "1", "5-7")], "holds rows '5-7': rows are"),
        ([("user", "output", "1", "5:9:")], "holds rows '5:9:': rows are"),
        ([("user", "output", "1", "5:9:0")], "holds rows '5:9:0': rows are below"),
        ([("user", "output", "1", "9:5")], "holds rows '9:5', which are none"),
        ([("user", "output", "1", "99999999999")], "'99999999999': rows are below 2147483648"),
        ([("user", "output", "4", "2:9")], "there is no row -2 to copy from; begin at row 4 or"),
        ([("user", "output", "1", "5,2:8")], "fills row 5 of 'user' twice"),
        ([("user", "output", "1", "5"), ("user", "tool", "2", "5")], "fills row 5 of 'user' twic"),
        (
            [("user", "output", "1", "3::6"), ("user", "tool", "1", "2::7")],
            "fills row 9 of 'user' twice",
        ),
    ],
)
def test_rules_that_are_refused(mail, message):
    with pytest.raises(UserError, match=message) as error:
        StreamSpec.from_config(streams(mail=tuple(mail)))
    assert "\n" not in str(error.value)


@given(
    strategies.tuples(*[strategies.integers(1, 12)] * 2),
    strategies.tuples(*[strategies.integers(1, 9)] * 2),
    strategies.tuples(*[strategies.integers(2, 60)] * 2),
)
@settings(max_examples=200)
def test_rules_overlap_exactly_if_their_rows_do(starts, step, length):
    texts = [f"{a}:{a + n}:{s}" for a, s, n in zip(starts, step, length)]
    a, b = (set(range(a, a + n, s)) for a, s, n in zip(starts, step, length))
    mail = (("user", "output", "1", texts[0]), ("user", "thought", "1", texts[1]))
    if a & b:
        with pytest.raises(UserError, match=f"fills row {min(a & b)} of 'user' twice"):
            rules(*mail)
    else:
        assert len(rules(*mail)) == 2


def test_step_run_fork_and_restore_give_what_feeding_by_hand_gives(model):
    rows = 24  # the session outlives its window
    engine = engine_of(model, window=rows)
    expected = steps(first := engine.open(WARM), rows)
    table = first.transcript()
    assert check_delivered(table, model.streams.mail) > 8
    np.testing.assert_array_equal(expected, table.tokens)
    np.testing.assert_array_equal(expected, by_hand(model, table).tokens)
    silent = is_mailed(model.streams.mail, rows, 4)[:, [USER, TOOL]]
    assert (expected[:, [USER, TOOL]][~silent] == SILENCE).all()
    first.close()

    np.testing.assert_array_equal(tokens((session := engine.open(WARM)).run(rows)), expected)
    session.close()
    session = engine.open(WARM)
    begun = [tokens(session.run(4)), steps(session, 1)]
    snapshot, fork = session.snapshot(), session.fork()
    session.close()
    for session in (fork, engine.restore(snapshot)):
        shown = [*begun, tokens(session.run(3)), steps(session, 2), tokens(session.run(rows - 10))]
        np.testing.assert_array_equal(np.concatenate(shown), expected)
        session.close()


def test_mail_does_not_depend_on_the_window(model):
    """A source that has left the window is still copied."""
    model = model.with_streams(mail=rules(("user", "thought", "13", "13::2")))
    engine = engine_of(model)
    session, other = engine.open(WARM), engine.open(WARM)
    shown = steps(session, 40)
    assert np.array_equal(shown[13::2, USER], shown[:-13:2, THOUGHT])
    assert len(set(shown[13::2, USER])) > 3
    np.testing.assert_array_equal(tokens(other.run(40)), shown)


def test_decoding_on_a_mesh_delivers_the_same_mail(model):
    expected = tokens(engine_of(model).open(WARM).run(12))
    mesh = make_mesh(MeshConfig(data=2, stream=2, tensor=2))
    engine = engine_of(model, mesh=mesh)
    for session in (engine.open(WARM), engine.open(WARM)):
        session.step()
        np.testing.assert_array_equal(tokens(session.run(11)), expected[1:])


def test_a_copy_of_the_same_row_follows_what_is_fed_later(model):
    """A copy of an input reads a token that is fed after the row was shown; a forced one stays."""
    engine = engine_of(model.with_streams(mail=rules(("tool", "user", "0", "0:"))))
    session = engine.open(WARM)
    session.feed("user", [9])
    assert session.step().tokens[[USER, TOOL]].tolist() == [9, 9]
    session.run(2)
    session.feed("user", [7])  # goes into row 2
    session.force("tool", [11])
    session.step()
    session.feed("user", [8])  # goes into row 3
    session.step()
    assert session.transcript().tokens[2:4, [USER, TOOL]].tolist() == [[7, 7], [8, 11]]


def test_mail_is_copied_as_read(model):
    """Fed after the row was shown, forced, ablated and absent: the copy is what the model reads."""
    engine = engine_of(model.with_streams(mail=rules(("tool", "user", "1", "3:"))))
    session = engine.open(WARM)
    session.run(3)
    session.feed("user", [7, 8])  # 7 goes into row 2, which was shown as silence
    assert session.step().tokens[[USER, TOOL]].tolist() == [8, 7]
    session.force("user", [9])
    assert tokens(session.run(3))[:, [USER, TOOL]].tolist() == [
        [9, 8],
        [SILENCE, 9],
        [SILENCE, SILENCE],
    ]
    session.close()

    engine = engine_of(model.with_streams(mail=rules(("user", "output", "2", "2:"))))
    session = engine.open(dataclasses.replace(WARM, ablated=("output",)))
    session.force("output", [FREE, FREE, 11])  # forced tokens are said in spite of the ablation
    shown = [*session.run(4), session.step(), *session.run(2)]
    assert tokens(shown)[:, USER].tolist() == [SILENCE] * 4 + [11, SILENCE, SILENCE]

    delays = (0, 0, 3, 0)
    model = model.with_streams(mail=rules(("user", "output", "1", "2:6")), delays=delays)
    engine = engine_of(model)
    one, other = engine.open(WARM), engine.open(WARM)
    shown = [other.step(), *other.run(7)]
    np.testing.assert_array_equal(steps(one, 8), tokens(shown))
    for session in (one, other):
        table = session.transcript()
        assert table.present[:, USER].tolist() == [True, True, False, False, *[True] * 4]
        assert check_delivered(table, model.streams.mail) >= 1


@pytest.mark.parametrize("at_once", [True, False])
def test_fed_tokens_wait_and_forced_ones_replace_mail(model, at_once):
    model = model.with_streams(mail=rules(("user", "thought", "1", "3,4,6")))
    session = engine_of(model).open(WARM)
    session.run(3)
    session.feed("user", [7, 8, 9])  # into rows 2, 5 and 7
    shown = tokens(session.run(5)) if at_once else steps(session, 5)
    read = session.transcript().tokens
    assert read[[2, 5, 7], USER].tolist() == [7, 8, 9]
    assert read[[3, 4, 6], USER].tolist() == read[[2, 3, 5], THOUGHT].tolist()
    np.testing.assert_array_equal(shown, read[3:])

    session = engine_of(model).open(WARM)
    session.run(3)
    session.force("user", [FREE, 12, FREE, 13])
    shown = tokens(session.run(4)) if at_once else steps(session, 4)
    assert shown[:, USER].tolist() == [shown[0, USER], 12, SILENCE, 13]
    assert shown[0, USER] == session.transcript().tokens[2, THOUGHT]
    # What is fed now does not replace the cell of row 6, which gets mail.
    session.feed("user", [14])
    assert session.step().tokens[USER] == 14
    assert session.transcript().tokens[6, USER] == 13


def test_an_ablated_reader_gets_no_mail(model):
    options = dataclasses.replace(WARM, ablated=("user", "tool"))
    assert (tokens(engine_of(model).open(options).run(12))[:, [USER, TOOL]] == SILENCE).all()


def test_a_prefill_gets_mail_in_silent_cells(model):
    """A session that continues from a prefill equals one that decoded those rows."""
    engine = engine_of(model, window=20)
    expected = steps(session := engine.open(WARM), 16)
    session.close()
    prefill = expected[:7].copy()
    assert len(set(prefill[3:7, USER]) - {SILENCE}) > 1
    prefill[:, [USER, TOOL]] = SILENCE
    session = engine.open(WARM, prefill=prefill)
    np.testing.assert_array_equal(session.transcript().tokens, expected[:7])
    np.testing.assert_array_equal(tokens(session.run(9)), expected[7:])
    session.close()
    prefill[4, USER] = 17  # given, like a forced token
    assert engine.open(WARM, prefill=prefill).transcript().tokens[4, USER] == 17


def test_random_rules(make_model):
    """Steps and calls of `run` agree, and the result is that of forcing the mail by hand."""
    plain = make_model(4)

    def some_rules(draw):
        found = []
        for reader, others in (("user", NAMES[1:]), ("tool", NAMES[:-1])):
            count = draw(strategies.integers(0, 3))
            for rows in range(count):  # rule number `rows` has its own rows
                lag = draw(strategies.integers(0, 6))
                first = rows + 3 * draw(strategies.integers(2, 4))
                source = draw(strategies.sampled_from(others))
                step = 3 * draw(strategies.integers(1, 2))
                found.append((reader, source, str(lag), f"{first}::{step}"))
        try:
            return rules(*found)
        except UserError:  # a copy of a copy in the same row
            reject()

    actions = strategies.lists(
        strategies.tuples(strategies.sampled_from(["run", "feed", "force"]), strategies.integers()),
        min_size=4,
        max_size=6,
    )

    @given(strategies.data(), actions)
    def check(data, actions):
        model = plain.with_streams(mail=some_rules(data.draw))
        engine = engine_of(model, window=64)
        one, other = engine.open(WARM), engine.open(WARM)
        for action, number in actions:
            stream = (USER, TOOL)[number % 2]
            for session in (one, other):
                if action == "feed":
                    session.feed(stream, [4 + number % 5, SILENCE, 4 + number % 7])
                elif action == "force":
                    session.force((THOUGHT, OUTPUT)[number % 2], [FREE, 4 + number % 11])
            count = 1 + number % 6
            np.testing.assert_array_equal(steps(one, count), tokens(other.run(count)))
        one.step(), other.step()  # what was fed last is read
        table = one.transcript()
        np.testing.assert_array_equal(table.tokens, other.transcript().tokens)
        check_delivered(table, model.streams.mail)

        hand = engine_of(plain, window=64).open(WARM)
        starts = np.cumsum([0, *(1 + number % 6 for _, number in actions)])
        for row, cells in enumerate(table.tokens):
            for start, (action, number) in zip(starts, actions):
                if action == "force" and start == row:
                    hand.force((THOUGHT, OUTPUT)[number % 2], [FREE, 4 + number % 11])
            hand.force(USER, [int(cells[USER])])
            hand.force(TOOL, [int(cells[TOOL])])
            hand.step()
        np.testing.assert_array_equal(hand.transcript().tokens, table.tokens)

    check()


@pytest.mark.parametrize("delays", [(0, 0, 0, 0), (1, 0, 2, 3)])
def test_data_is_filled_as_decoding_shows_it(model, delays):
    model = model.with_streams(delays=delays)
    session = engine_of(model, window=20).open(WARM)
    session.run(20)
    table = session.transcript()
    assert check_delivered(table, model.streams.mail, delays) > 4
    mailed = is_mailed(model.streams.mail, 20, 4)
    for blank in (SILENCE, None):  # silent or absent in the data
        present = table.present if blank else table.present & ~mailed
        given = np.where(mailed, SILENCE, table.tokens) * present
        filled = deliver_to_example(given, present, model.streams.mail, NAMES, delays, SILENCE)
        np.testing.assert_array_equal(filled[0], table.tokens)
        np.testing.assert_array_equal(filled[1], table.present)


def write(path, *examples):
    lines = [json.dumps({"streams": dict(zip(NAMES, cells))}) for cells in examples]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


SAID = (["a", "", "", "", ""], ["", "b", "", "c", ""], ["", "", "d", "", "e"], ["", "", "", "", ""])
DATA_RULES = (("user", "thought", "1", "2,4"), ("tool", "output", "2", "4"))


def test_convert_fills_mail_and_checks_what_is_there(letters, tmp_path):
    spec = StreamSpec.from_config(streams(mail=DATA_RULES))

    def tables(*examples, bad_percent=0.0, **fields):
        path = write(tmp_path / "in.jsonl", *examples)
        data = DataConfig(converter="tables", path=path, rows=16, bad_percent=bad_percent, **fields)
        bad = BadRecords(bad_percent)
        found = [t.tokens.T for t in convert(Config(data=data), spec, letters, bad)]
        return found, bad

    def said(table):
        return ["".join(letters.decode([t]) or "-" for t in column) for column in table]

    ((table,), _) = tables(SAID)
    assert said(table) == ["a-b-c", "-b-c-", "--d-e", "----d"]
    written = (["a", "", "b", "", None], *SAID[1:3], ["", "", "", "", "d"])
    np.testing.assert_array_equal(tables(written)[0][0], table)
    wrong = (["a", "", "b", "", "a"], *SAID[1:])
    message = r"in.jsonl:2: row 4 of 'user' holds token \d+, but .* from 'thought', which said tok"
    with pytest.raises(BadRecord, match=message):
        tables(SAID, wrong)
    found, bad = tables(*[SAID] * 3, wrong, SAID, bad_percent=50)
    assert (len(found), bad.bad, bad.records) == (4, 1, 5)
    absent = (["a", "", "b", "", ""], ["", None, "", "c", ""], *SAID[2:])
    with pytest.raises(BadRecord, match="from 'thought', which is absent in row 1: leave the cell"):
        tables(absent)


def test_data_belongs_to_its_mail(tmp_path):
    """Equal rules fit in any order; data of other rules is refused by name."""
    path = write(tmp_path / "in.jsonl", SAID, (["b", *SAID[0][1:]], *SAID[1:]))
    data = DataConfig(
        dir=str(tmp_path / "out"),
        converter="tables",
        path=path,
        rows=8,
        batch_size=1,
        eval_percent=0,
        shards=1,
        tokenizer=TokenizerConfig(model_type="char", vocab_size=0),
    )
    config = Config(data=data, streams=streams(mail=DATA_RULES))
    prepare(config, data.dir)
    same = (*DATA_RULES[1:], ("user", "thought", "1", "4,2:3"))
    loader = Loader(data, "train", StreamSpec.from_config(streams(mail=same)))
    for mail in ((), DATA_RULES[:1]):
        with pytest.raises(UserError, match="config.streams.mail is .* was prepared with .*'2,4'"):
            Loader(data, "train", StreamSpec.from_config(streams(mail=mail)))
    batch = loader.batch(0)
    assert batch["tokens"][0, 2, USER] == batch["tokens"][0, 1, THOUGHT]


def test_mail_follows_streams_that_are_renamed():
    old = streams(mail=DATA_RULES)
    new = StreamsConfig(names=("question", "plan", "answer", "result"), kinds=KINDS)
    renamed = _rename_streams(old, new).mail
    assert renamed == (("question", "plan", "1", "2,4"), ("result", "answer", "2", "4"))


def test_free_running_evaluation_takes_mail_from_the_model(model):
    """The data's mail is not given, is no input of a turn, and does not count as one."""
    mail = rules(("user", "thought", "1", "6,8"))
    tokenizer = types.SimpleNamespace(silence_id=SILENCE, vocab_size=32)
    model = model.with_streams(mail=mail)
    stand_in = types.SimpleNamespace(
        streams=model.streams, run_config=None, require_tokenizer=lambda: tokenizer
    )
    table = np.full((10, 4), SILENCE)
    table[[0, 1], USER] = 10, 11
    table[[5, 7], THOUGHT] = table[[6, 8], USER] = 12, 13
    table[[4, 9], OUTPUT] = 14
    example = Table(table, np.ones(table.shape, bool))
    case = exact_match.streams_case(example, stand_in)
    assert [turn.end for turn in case.turns] == [1]
    assert by_turn._turn_of_rows(example, stand_in).max() == 1
    assert case.prompt[[6, 8], USER].tolist() == [FREE, FREE]
    forced = exact_match.forced_tables([case], stand_in, 12, 2)
    assert (forced[:, [6, 8], USER] == FREE).all() and forced[0, 0, USER] == 10
    shown = generate(model, 12, WARM, forced=forced, batch=2, silence_id=SILENCE).shown
    assert np.array_equal(shown[:, [6, 8], USER], shown[:, [5, 7], THOUGHT])
    assert (shown[:, [6, 8], USER] != [12, 13]).any()
