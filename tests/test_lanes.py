"""Text in lanes: its tables, its exact likelihood, its generation and its bits per byte."""

import dataclasses
import io
import itertools
import json
import types

import jax
import numpy as np
import pytest
from runs import make_config, replace

from msllm.config import StreamsConfig, VaryConfig
from msllm.data.converters import check_streams, convert, texts
from msllm.data.converters.lanes import Lanes, _table, cut
from msllm.data.converters.layout import Layout
from msllm.data.prepare import prepare
from msllm.data.sources import BadRecords
from msllm.decode.engine import DecodeOptions, Engine
from msllm.decode.lanes import LaneSession, generate
from msllm.errors import UserError
from msllm.evals import likelihood as likelihoods
from msllm.evals.lanes import text_likelihood
from msllm.evals.score import likelihood
from msllm.model.model import init_parameters
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer, train
from msllm.view.cells import console
from msllm.view.generation import print_generation
from msllm.weights.load import LoadedModel

pytestmark = pytest.mark.usefixtures("compile_fast")
TEXTS = ["zwölf Boxkämpfer\njagen Viktor quer über den großen Sylter Deich 🙂", "to be", "a", ""]
TEXT = "\n".join(TEXTS) * 3


def settings(lanes, delays=(), rows=12, visibility="same_row", **data):
    """A config of lanes."""
    config = make_config(
        **{
            "streams.names": tuple(f"lane{i}" for i in range(lanes)),
            "streams.kinds": ("output",) * lanes,
            "streams.delays": delays,
            "streams.visibility": visibility,
            "data.converter": "lanes",
            "data.rows": rows,
            "data.batch_size": 2,
            "data.eval_percent": 50.0,
            "model.vocab_size": 400,
        }
    )
    return replace(config, "data", **data)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(path of records, path of their tokenizer)."""
    folder = tmp_path_factory.mktemp("lanes")
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [TEXT, *TEXTS]))
    config = settings(1, path=str(path)).data.tokenizer
    (folder / "tokenizer.model").write_bytes(train([TEXT], config).to_bytes())
    return str(path), str(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def make_lanes(corpus):
    """make_lanes(lanes, delays) -> a random model that reads text in lanes."""

    def make(lanes, delays=(), **data):
        path, tokenizer_path = corpus
        config = settings(lanes, delays, path=path, **data)
        config = replace(config, "data", tokenizer=_given(config, tokenizer_path))
        tokenizer, spec = Tokenizer.load(tokenizer_path), StreamSpec.from_config(config.streams)
        sizes = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size, num_layers=1)
        parameters = _noisy(init_parameters(sizes, spec, 0), 0.3)
        return LoadedModel(sizes, spec, parameters, tokenizer, run_config=config)

    return make


def _given(config, path):
    return dataclasses.replace(config.data.tokenizer, path=path)


def _noisy(parameters, scale):
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [x + scale * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves)]
    return jax.tree.unflatten(tree, noise)


# The converter


@pytest.mark.parametrize("lanes, delays", [(1, ()), (3, ()), (3, (0, 2, 1)), (5, ())])
def test_a_text_comes_back_byte_for_byte(corpus, lanes, delays):
    path, tokenizer_path = corpus
    config = settings(lanes, delays, path=path)
    config = replace(config, "data", tokenizer=_given(config, tokenizer_path))
    spec, tokenizer = StreamSpec.from_config(config.streams), Tokenizer.load(tokenizer_path)
    found = list(convert(config, spec, tokenizer))
    of_record = {}
    for table in found:
        of_record.setdefault(table.source, []).append(table)
    shape = Lanes(tuple(range(lanes)), spec.delays, tokenizer.silence_id)
    joined = [sum((shape.join(one.tokens) for one in part), []) for part in of_record.values()]
    assert [tokenizer.decode(ids) for ids in joined] == [TEXT, *TEXTS[:3]]  # "" gives no table

    # Full tables have no end; the last table of a text has one, and parts of almost equal length.
    full = lanes * (12 - 1 - max(spec.delays))
    for part in of_record.values():
        counts = [len(shape.join(one.tokens)) for one in part]
        assert counts[:-1] == [full] * (sum(counts) // full - (counts[-1] == full))
        last = part[-1]
        if counts[-1] > full - lanes:
            assert shape.length(last.tokens) is None and last.present.sum() == full + lanes
            continue
        longest = -(-len(shape.join(last.tokens)) // lanes)
        assert shape.length(last.tokens) == longest
        end = spec.delays[0] + longest + 1
        here = last.present & (last.tokens != tokenizer.silence_id)
        assert {longest, longest - 1} >= set(here.sum(0)) and (np.diff(here.sum(0)) <= 0).all()
        assert last.present[:, 0].sum() == longest + 2 and last.present[end, 0]
        assert (last.present[:, 1:].sum(0) == longest + 1).all()
        assert (last.tokens[~last.present] == 0).all()


def test_a_text_is_the_same_example_in_any_number_of_lanes(corpus):
    path, tokenizer_path = corpus
    tokenizer, ids = Tokenizer.load(tokenizer_path), []
    for lanes in (1, 2, 4):
        config = settings(lanes, path=path, rows=16 // lanes + 1)
        spec = StreamSpec.from_config(config.streams)
        ids.append([table.example for table in convert(config, spec, tokenizer)])
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) > 5


def test_groups_and_a_plan(corpus):
    path, tokenizer_path = corpus
    tokenizer = Tokenizer.load(tokenizer_path)
    streams = StreamsConfig(names=("plan", "lane * 3"), kinds=("thought", "output"))
    config = dataclasses.replace(
        settings(1, path=path, options={"lanes": ["lane"], "plan": "plan", "plan_tokens": 2}),
        streams=streams,
    )
    spec = StreamSpec.from_config(streams)
    first = next(convert(config, spec, tokenizer))
    expected = tokenizer.encode(TEXT)[:33]
    assert Lanes((1, 2, 3), spec.delays, tokenizer.silence_id).join(first.tokens) == expected
    assert first.tokens[1:, 0].tolist() == [*expected[11:13], *expected[22:24]] + [1] * 7
    assert set(texts(config, spec)) == {TEXT, *TEXTS}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"options": {"lanes": ["user"]}}, "user is an input"),
        ({"options": {"lanes": ["output", "output"]}}, "name each stream once"),
        ({"options": {"lanes": ["x"]}}, "no stream 'x'"),
        ({"options": {"plan": "output"}}, "plan is 'output', a lane"),
        ({"options": {"plan_tokens": 0}}, "plan_tokens is 0"),
        ({"vary": VaryConfig(lead=(2,))}, "config.data.vary .* the first silence"),
        ({"streams": ("user", "output", "x")}, "config.data.streams .* as they are"),
        ({"delays": (0, 1)}, "the delay of output, the first lane"),
        ({"kinds": ("input", "thought")}, "no stream is an output"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    kinds, delays = change.pop("kinds", ("input", "output")), change.pop("delays", ())
    streams = StreamsConfig(names=("user", "output"), kinds=kinds, delays=delays)
    config = dataclasses.replace(settings(1, path="none", **change), streams=streams)
    with pytest.raises(UserError, match=message):
        check_streams(config, StreamSpec.from_config(streams))


# The likelihood


def outcomes(rows, delays, size, silence):
    """Yields (tokens, present, whether it ended) of everything that lanes can say."""

    def grow(tokens, present, length):
        t = len(tokens)
        if t == rows:
            yield np.array(tokens), np.array(present), length is not None
            return
        for said in range(size) if length is None and t > delays[0] else [silence]:
            now = (
                t - delays[0] - 1 if length is None and t > delays[0] and said == silence else None
            )
            end = length if length is not None else now
            here = [
                delay <= t and (end is None or t - delay <= end + (s == 0))
                for s, delay in enumerate(delays)
            ]
            choices = [
                [said if s == 0 else silence]
                if s == 0 or t == delays[s]
                else range(size)
                if here[s]
                else [0]
                for s in range(len(delays))
            ]
            for row in itertools.product(*choices):
                row = [token * is_here for token, is_here in zip(row, here)]
                yield from grow([*tokens, row], [*present, here], end)

    yield from grow([], [], None)


@pytest.mark.parametrize(
    "lanes, rows, options",
    [
        ((0, 1), 5, {"visibility": "block_causal"}),
        ((0, 0), 4, {"visibility": "same_row", "visibility_medium": "tokens"}),
    ],
)
def test_the_probabilities_of_all_tables_sum_to_one(make_model, lanes, rows, options):
    size, silence = 3, 2
    names = tuple(f"lane{i}" for i in range(len(lanes)))
    spec = StreamSpec.from_config(
        StreamsConfig(names=names, kinds=("output",) * len(names), delays=lanes, **options)
    )
    config = dataclasses.replace(make_model(1).config, vocab_size=size, num_layers=1)
    model = LoadedModel(config, spec, _noisy(init_parameters(config, spec, 0), 0.5))
    tokens, present, ended = map(np.array, zip(*outcomes(rows, lanes, size, silence)))
    found = likelihood(model, {"tokens": tokens, "present": present}, silence).logprob
    total = np.exp(np.nansum(found.astype(np.float64), axis=(1, 2)))
    assert total.sum() == pytest.approx(1, abs=1e-5)
    assert len(total) > 200
    assert total.max() > 3 / len(total)  # not uniform

    # Every text that fits has one table among those that ended: the one that the converter makes.
    shape = Lanes(tuple(range(len(lanes))), lanes, silence)
    layout = Layout(
        spec, types.SimpleNamespace(silence_id=silence), rows - max(lanes), {}, BadRecords()
    )
    of_text = {}
    for table in tokens[ended]:
        text = tuple(shape.join(table))
        if text:
            parts = cut(text, len(lanes))
            made = _table(layout, shape.streams, parts, "")
            if max(lanes) == 0 and len(made.tokens) <= rows:
                filled = np.zeros_like(table)
                filled[: len(made.tokens)] = made.tokens
                of_text[text] = of_text.get(text, 0) + (filled == table).all()
    if max(lanes) == 0:
        longest = len(lanes) * (rows - 2)
        every = [
            text for n in range(1, longest + 1) for text in itertools.product((0, 1), repeat=n)
        ]
        assert {text: of_text.get(text) for text in every} == dict.fromkeys(every, 1)


# Generation


def score_table(model, table, rows=16):
    """The log-probability of a table, padded to a number of rows."""
    padding = ((0, rows - len(table.tokens)), (0, 0))
    padded = {"tokens": np.pad(table.tokens, padding), "present": np.pad(table.present, padding)}
    found = likelihood(model, {name: array[None] for name, array in padded.items()})
    return float(np.nansum(found.logprob))


@pytest.mark.parametrize("delays", [(), (0, 3, 1)])
def test_generated_texts_have_the_likelihood_of_their_tables(make_lanes, delays):
    model = make_lanes(3, delays)
    options = DecodeOptions(temperature=1.0, silence_penalty=-3.0, penalty_start=0, seed=5)
    found = generate(model, 14, options, batch=4)
    assert {one.ended for one in found} == {True, False}
    assert len({len(one.tokens) for one in found}) > 2
    for one in found:
        assert one.present[0, 0] and one.tokens[0, 0] == model.tokenizer.silence_id
        assert one.logprob == pytest.approx(score_table(model, one), abs=1e-3)
        shape = Lanes((0, 1, 2), model.streams.delays, model.tokenizer.silence_id)
        assert one.text == model.tokenizer.decode(shape.join(one.tokens))
        if one.ended:
            length = shape.length(one.tokens)
            assert (one.present[:, 1:].sum(0) == length + 1).all()
            assert len(one.tokens) == max(length + max(model.streams.delays), length + 1) + 1
    # A text does not depend on those beside it.
    if not delays:
        assert generate(model, 14, options)[0].text == found[0].text


def test_a_text_that_is_forced_has_its_likelihood(make_lanes):
    model = make_lanes(3, (0, 0, 2))
    config = model.run_config
    engine = Engine(model, sessions=3, window=16)
    for table in list(convert(config, model.streams, model.tokenizer))[-3:]:
        session = engine.open()
        for stream in range(3):
            session.force(stream, np.where(table.present, table.tokens, 7)[:, stream].tolist())
        follower = LaneSession(model, session)
        while not follower.finished:
            follower.add(session.step())
        found = follower.result()
        rows = len(found.tokens)
        np.testing.assert_array_equal(found.tokens, table.tokens[:rows])
        assert not table.present[rows:].any()
        assert found.logprob == pytest.approx(score_table(model, table), abs=1e-3)


def test_a_stream_that_has_ended_is_absent(make_lanes):
    model = make_lanes(3)
    engine = Engine(model, sessions=2, window=16)
    session = engine.open(DecodeOptions(temperature=1.0, seed=1))
    shown = [session.step() for _ in range(3)]
    session.end("lane1")
    session.end("lane1")
    fork = session.fork()
    assert shown[-1].present.all()  # what was shown stays
    rows = session.run(3)
    assert all(row.present.tolist() == [True, False, True] for row in rows)
    read = session.transcript()
    assert read.present[:, 1].tolist() == [True, True] + [False] * 4
    np.testing.assert_array_equal([r.tokens for r in fork.run(3)], [r.tokens for r in rows])
    scored = likelihood(model, {"tokens": read.tokens[None], "present": read.present[None]})
    np.testing.assert_allclose(rows[-1].logprob[[0, 2]], scored.logprob[0, -2, [0, 2]], atol=1e-4)


def test_the_command_prints_the_joined_text(make_lanes):
    model = make_lanes(3)
    out = io.StringIO()
    options = DecodeOptions(silence_penalty=-30.0, penalty_start=5)  # ends in row 5
    print_generation(model, {}, 14, options, console(file=out, width=80), {"lane0": "to be"})
    lines = out.getvalue().splitlines()
    table = [line.split() for line in lines[: lines.index("")]]
    assert [line[0] for line in table[1:]] == ["0", "1", "2", "3", "4", "5"]
    assert table[1] == ["0", "·", "·", "·"] and table[-1] == ["5", "·"]
    said = generate(model, 14, options, begin="to be")[0]
    assert said.ended and said.text.startswith("to be")
    assert out.getvalue().endswith(f"\nthe text\n{said.text}\n")
    out = io.StringIO()
    print_generation(model, {}, 3, DecodeOptions(), console(file=out, width=80))
    assert "\nthe text, which has no end yet: use more rows\n" in out.getvalue()
    with pytest.raises(UserError, match="not trained on lanes"):
        generate(dataclasses.replace(model, run_config=None))


# Evaluation


def test_bits_per_byte_do_not_depend_on_how_a_text_is_cut(make_lanes, corpus, tmp_path):
    """And a model that says everything with equal probability pays log2 V bits a token."""
    totals = set()
    for lanes in (1, 2, 4):
        model = make_lanes(lanes, rows=16 // lanes + 1)
        out = str(tmp_path / str(lanes))
        prepare(model.run_config, out)
        uniform = jax.tree.map(np.zeros_like, model.parameters)
        found = text_likelihood(dataclasses.replace(model, parameters=uniform), out)
        said = text_likelihood(model, out)
        np.testing.assert_array_equal(found.bytes, said.bytes)
        tables = list(convert(model.run_config, model.streams, model.tokenizer))
        held_out = [table for table in tables if int(table.example, 16) < 1 << 63]
        shape = Lanes(tuple(range(lanes)), model.streams.delays, model.tokenizer.silence_id)
        pieces = [model.tokenizer.piece_bytes[shape.join(t.tokens)].sum() for t in held_out]
        assert sorted(pieces) == sorted(found.bytes) and 100 < sum(pieces)
        totals.add(sum(pieces))
        units = likelihoods.evaluate(model, out)
        assert said.bits.sum() == pytest.approx(units.nll.sum() / np.log(2))
        report = likelihoods.report(units, model.streams.names, 10)["all"]
        assert said.bits_per_byte == pytest.approx(report["bits_per_byte"])
        low, high = said.interval()
        assert low < said.bits_per_byte < high
        bits = np.log2(model.tokenizer.vocab_size)
        # Ends, and the silence of short parts, cost as well.
        np.testing.assert_allclose(found.bits, bits * units.targets.sum(1), rtol=1e-5)
        assert units.targets.sum() > units.targets_spoken.sum()
    assert len(totals) == 1


def test_piece_bytes_add_up_to_the_text(corpus):
    for tokenizer, extra in (
        (Tokenizer.load(corpus[1]), 0),
        (train([TEXT], dataclasses.replace(settings(1).data.tokenizer, model_type="char")), 0),
        (train(["to be"], dataclasses.replace(settings(1).data.tokenizer, model_type="word")), 1),
    ):
        counts = tokenizer.piece_bytes
        for text in TEXTS[:3] if not extra else ["to be", "be be to"]:
            assert counts[tokenizer.encode(text)].sum() == len(text.encode()) + extra
        assert counts[tokenizer.silence_id] == 0 and counts[tokenizer.unknown_id] == 0
