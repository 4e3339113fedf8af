"""Variations of tables: drawn by the example's id, without loss or reordering of tokens."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msllm.config import (
    Config,
    DataConfig,
    StreamsConfig,
    TokenizerConfig,
    VaryConfig,
    from_config_dict,
)
from msllm.data.converters import convert, vary
from msllm.data.prepare import prepare
from msllm.data.tables import Table, example_hash, held_out
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import train

SILENCE = 99
TOKENIZER = train(
    [" ".join(f"w{i}" for i in range(50))], TokenizerConfig(model_type="word", vocab_size=64)
)
TABLES = st.builds(
    lambda cells, name: Table(np.array(cells, np.int32), np.array(cells) > 0, example_hash(name)),
    st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=20),  # 0 is absent
    st.text("abc", max_size=4),
)


@given(
    table=TABLES,
    lead=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    percent=st.sampled_from([0.0, 30.0, 100.0]),
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=3),
)
def test_silence_is_inserted_between_rows(table, lead, percent, lengths):
    settings = VaryConfig(tuple(lead), percent, tuple(lengths))
    longer = vary.insert_silence(table, settings, SILENCE)
    again = vary.insert_silence(table, settings, SILENCE)
    assert np.array_equal(longer.tokens, again.tokens) and longer.example == table.example
    # Match the old rows in order. All other rows are pauses. Count the pauses before each old row.
    old, pauses = 0, [0]
    for tokens, present in zip(longer.tokens, longer.present):
        fits = old < len(table.tokens) and np.array_equal(tokens, table.tokens[old])
        if fits and np.array_equal(present, table.present[old]):
            old += 1
            pauses.append(0)
        else:
            assert (tokens == np.where(present, SILENCE, 0)).all()  # no stream speaks
            neighbours = table.present[old] & table.present[max(old - 1, 0)]
            assert np.array_equal(present, neighbours)
            pauses[-1] += 1
    # An old row without a present cell cannot be told from a pause of absent streams.
    if table.present.any(axis=1).all():
        assert old == len(table.tokens) and pauses.pop() == 0
        assert pauses[0] in lead
        allowed = {0.0: {0}, 30.0: {0, *lengths}, 100.0: set(lengths)}
        assert set(pauses[1:]) <= allowed[percent]


def test_draws_differ_between_examples():
    def table(i):
        return Table(np.ones((9, 3), np.int32), np.ones((9, 3), bool), example_hash(str(i)))

    def inserted(**settings):
        """The number of rows that are inserted into each of 90 tables."""
        settings = VaryConfig(**settings)
        longer = [vary.insert_silence(table(i), settings, SILENCE) for i in range(90)]
        return [len(table.tokens) - 9 for table in longer]

    leads = inserted(lead=(0, 1, 5))
    assert all(leads.count(n) > 15 for n in (0, 1, 5))
    pauses = inserted(pause_percent=25.0)
    assert np.mean(pauses) / 8 == pytest.approx(0.25, abs=0.06)
    assert len(set(pauses)) > 3


@given(table=TABLES)
def test_permute_exchanges_complete_streams(table):
    after = vary.permute(table, (0, 2))
    columns = [[table.tokens[:, s].tolist(), table.present[:, s].tolist()] for s in range(3)]
    found = [[after.tokens[:, s].tolist(), after.present[:, s].tolist()] for s in range(3)]
    assert found in (columns, columns[::-1])


@given(table=TABLES, rows=st.integers(2, 8), percent=st.integers(0, 100))
def test_pieces_overlap_by_one_row_and_stay_in_one_split(table, rows, percent):
    parts = list(vary.pieces(table, rows))
    joined = np.concatenate([parts[0].tokens, *(part.tokens[1:] for part in parts[1:])])
    assert np.array_equal(joined, table.tokens) and all(len(part.tokens) <= rows for part in parts)
    assert all(np.array_equal(a.tokens[-1], b.tokens[0]) for a, b in zip(parts, parts[1:]))
    assert {held_out(part.example, percent) for part in parts} == {held_out(table.example, percent)}
    assert len({part.example for part in parts}) == len(parts)
    assert all(len(part.tokens) > 1 for part in parts[1:])


# Variations that `convert` makes as the config says


def run(tmp_path, records, model, **data):
    """The tables of records of the converter `aligned`. `model` is a StreamsConfig."""
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = Config(streams=model, data=DataConfig(converter="aligned", path=str(path), **data))
    return list(convert(config, StreamSpec.from_config(model), TOKENIZER))


def said(table):
    """A text for each stream, with "." for silence and "-" for absent cells."""

    def piece(token, present):
        return TOKENIZER.decode([token]) or "." if present else "-"

    columns = zip(table.tokens.T, table.present.T)
    return ["".join(map(piece, *column)).replace("w", "") for column in columns]


ROWS = {"rows": [["w1", "w2", "w3"], ["w4", "w5", "w6"]]}
TWO = StreamsConfig(names=("c", "a"), kinds=("input", "output"))


def test_streams_are_chosen_by_name_and_delayed(tmp_path):
    (table,) = run(tmp_path, [ROWS], TWO, streams=("a", "b", "c"))
    assert said(table) == ["36", "14"] and table.source == f"{tmp_path}/t.jsonl:1"
    vary = VaryConfig(lead=(1,), delays=((0, 1),))
    delayed = dataclasses.replace(TWO, delays=(5, 0))
    (table,) = run(tmp_path, [ROWS], delayed, streams=("a", "b", "c"), vary=vary)
    assert said(table) == [".36-", "-.14"]
    with pytest.raises(UserError, match=r"config.data.streams is \('b', 'c'\): it lacks a"):
        run(tmp_path, [ROWS], TWO, streams=("b", "c"))


def test_delays_and_permutations_are_drawn(tmp_path):
    records = [{"rows": [[f"w{i}", f"w{i + 1}"], ["w1", "w2"]]} for i in range(40)]
    tables = run(tmp_path, records, TWO, vary=VaryConfig(delays=((0, 0), (0, 2))))
    assert sorted({len(table.tokens) for table in tables}) == [2, 4]
    assert 10 < sum(len(table.tokens) == 4 for table in tables) < 30
    swapped = run(tmp_path, records, TWO, vary=VaryConfig(permute=("a", "c")))
    assert {said(table)[0][-1] for table in swapped} == {"1", "2"}
    message = r"config.data.rows is 3: delays of \(\(0, 2\),\) rows leave none"
    with pytest.raises(UserError, match=message):
        run(tmp_path, records, TWO, vary=VaryConfig(delays=((0, 2),)), rows=3)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lead": ()}, r"data.vary.lead is \(\)"),
        ({"pause_rows": (1, -1)}, "data.vary.pause_rows"),
        ({"pause_percent": 101.0}, "data.vary.pause_percent"),
        ({"permute": ("user", "nobody")}, "data.vary.permute"),
        ({"delays": ((0, 0),)}, "data.vary.delays .*must be 3 numbers"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        from_config_dict({"data": {"vary": changes}})


def test_prepare_refuses_a_directory_with_other_settings(tmp_path):
    path = tmp_path / "t.jsonl"
    records = [{"rows": [[f"w{i}", "w1", "w2"], ["w1", "w2", "w3"]]} for i in range(9)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    word = TokenizerConfig(model_type="word", vocab_size=64)
    data = DataConfig(
        converter="aligned", path=str(path), streams=("a", "b", "c"), rows=16, tokenizer=word
    )
    plain = DataConfig(converter="aligned", path=str(path), rows=16, tokenizer=word)
    lenient = dataclasses.replace(plain, bad_percent=1.0)
    prepare(Config(streams=StreamsConfig(), data=lenient), tmp_path / "bad")
    with pytest.raises(UserError, match=r"other settings \(data.bad_percent .*differ"):
        prepare(Config(streams=StreamsConfig(), data=plain), tmp_path / "bad")
    manifest = prepare(Config(streams=TWO, data=data), tmp_path / "out")
    assert manifest["settings"]["streams"] == [["c", "a"], ["input", "output"], [0, 0]]
    assert prepare(Config(streams=TWO, data=data), tmp_path / "out") == manifest
    for name, value in {
        "streams": ("b", "a", "c"),
        "vary": VaryConfig(lead=(1,)),
        "format": "jsonl",
        "bad_percent": 1.0,
    }.items():
        changed = Config(streams=TWO, data=dataclasses.replace(data, **{name: value}))
        with pytest.raises(UserError, match=rf"other settings \(data.{name} .*differ"):
            prepare(changed, tmp_path / "out")


# A converter outside the package

OWN = """
from msllm.data.sources import BadRecord

def convert(layout, record):
    if "text" not in record.value:
        raise BadRecord(f"{record.where}: no text")
    words = record.value["text"].split()
    heard = layout.say("user", 0, " ".join(words))
    said = layout.say("output", layout.options["after"], " ".join(words))
    yield layout.table([heard, said], record.value["text"])
"""


def test_a_converter_outside_the_package(tmp_path, monkeypatch):
    module = tmp_path / "own_converter.py"
    module.write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "t.jsonl"
    lines = [json.dumps({"text": f"w{i} w{i + 1} w{i + 2}"}) for i in range(30)]
    path.write_text("\n".join(lines + ['{"txt": 1}', "{"]))
    word = TokenizerConfig(model_type="word", vocab_size=64)
    data = DataConfig(
        converter="own_converter:convert",
        path=str(path),
        options={"after": 2},
        rows=16,
        tokenizer=word,
    )
    config = Config(data=dataclasses.replace(data, bad_percent=10.0))
    manifest = prepare(config, tmp_path / "out")
    assert manifest["bad"]["bad"] == 2 and manifest["bad"]["records"] == 32
    assert manifest["bad"]["shown"][0] == "t.jsonl:31: no text"
    assert sum(part["tokens"]["output"] for part in manifest["splits"].values()) == 90
    assert prepare(config, tmp_path / "out") == manifest
    module.write_text(OWN + "\n")
    with pytest.raises(UserError, match=r"other settings \(converter_code differ"):
        prepare(config, tmp_path / "out")
    with pytest.raises(UserError, match="t.jsonl:31: no text"):
        prepare(Config(data=data), tmp_path / "strict")
    path.write_text('{"text": 5}')
    with pytest.raises(UserError, match=r"1 of 1 records are bad.*t.jsonl:1: .*AttributeError"):
        prepare(config, tmp_path / "crash")
    with pytest.raises(AttributeError) as failure:
        prepare(Config(data=data), tmp_path / "crash")
    assert failure.value.__notes__ == [f"in {path}:1"]
    for name in ("own_converter:nothing", "nowhere:convert"):
        missing = Config(data=dataclasses.replace(data, converter=name))
        message = f"config.data.converter is '{name}': cannot be imported"
        with pytest.raises(UserError, match=message):
            prepare(missing, tmp_path / "none")


def test_loss_weights_move_with_their_cells():
    weights = np.array([[0, 2], [0, 1], [1, 1]], np.float32)
    tokens = np.array([[1, 4], [2, 5], [3, 6]], np.int32)
    table = Table(tokens, tokens > 0, example_hash("x"), weights=weights)
    longer = vary.insert_silence(table, VaryConfig((1,), 100.0, (1,)), SILENCE)
    assert longer.tokens[:, 0].tolist() == [SILENCE, 1, SILENCE, 2, SILENCE, 3]
    # A pause inside a message has the weight of the message; other silence has the weight 1.
    assert longer.weights.T.tolist() == [[1, 0, 0, 0, 1, 1], [1, 2, 1, 1, 1, 1]]
    assert vary.select(table, [1]).weights.tolist() == [[2], [1], [1]]
    orders = set()
    for name in "abcdefgh":
        permuted = vary.permute(table._replace(example=example_hash(name)), [0, 1])
        column = permuted.tokens[0].tolist().index(1)
        orders.add(column)
        assert permuted.weights[:, column].tolist() == [0, 0, 1]
    assert orders == {0, 1}
    pieces = list(vary.pieces(table, 2))
    assert [piece.weights[:, 1].tolist() for piece in pieces] == [[2, 1], [1, 1]]
