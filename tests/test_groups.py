"""Groups of interchangeable streams: their meaning, parameters and number."""

import dataclasses
import functools
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msllm import flow
from msllm.cli.base import Parser, load_model
from msllm.config import Config, DataConfig, ModelConfig, StreamsConfig, VaryConfig
from msllm.data.converters import convert
from msllm.data.packing import Packer
from msllm.data.tables import Table
from msllm.decode.arguments import parse_values
from msllm.decode.engine import Engine
from msllm.errors import UserError
from msllm.evals.score import score
from msllm.groups import Group, Roster, expand
from msllm.loss import targets_and_weights
from msllm.model.attention.dispatch import get_backend
from msllm.model.model import abstract_model, bind, init_parameters
from msllm.streams import NEVER, StreamSpec, resolve_visibility
from msllm.weights.load import LoadedModel, load
from msllm.weights.warm_start import write_model

SILENCE = 1
MODEL = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=32
)
# Each thread reads its own input, and what the other threads say; the output reads thread 0.
LAGS = (
    ("thread", "input@i", "0"),
    ("thread", "thread", "1 tokens"),
    ("output", "thread@0", "1"),
)
MAIL = (("input", "thread@i^1", "1", "4"), ("input", "thread@i^2", "1", "5"))


def streams_of(threads=4, lags=LAGS, **fields):
    names = (f"input * {threads}", f"thread * {threads}", "output")
    kinds = ("input", "thought", "output")
    return StreamsConfig(
        **{"visibility": "isolated", "lags": lags, **fields}, names=names, kinds=kinds
    )


def spec_of(*args, **fields):
    return StreamSpec.from_config(streams_of(*args, **fields))


@functools.cache
def parameters_of(identities=0):
    """Parameters with noise, so that norms do not hide mistakes; they fit any number of threads."""
    parameters = init_parameters(MODEL, spec_of(2, identities=identities), 0)
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)]
    return jax.tree.unflatten(tree, noisy)


def model_of(threads=4, **fields):
    identities = fields.get("identities", 0)
    return LoadedModel(MODEL, spec_of(threads, **fields), parameters_of(identities))


def tables_of(size, seed=0, rows=8, absent=0.0):
    """Tables [2, rows, size] of two segments."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 32, (2, rows, size)).astype(np.int32)
    segment = np.where(np.arange(rows) < rows // 2, 1, 2).astype(np.int32)
    return {
        "tokens": tokens,
        "present": rng.random(tokens.shape) >= absent,
        "segment": np.tile(segment, (2, 1)),
    }


@functools.cache
def compiled(spec, backend):
    """The jitted logits of (parameters, tables)."""
    graph = abstract_model(MODEL, spec)[0]

    def run(parameters, tables):
        bound = bind(graph, parameters)
        return bound.logits(bound.read(tables, SILENCE, get_backend(backend)))

    return jax.jit(run)


def logits(model, tables, backend="reference"):
    """The logits [B, T, S, V] of a forward pass, 0 at absent cells."""
    with jax.default_matmul_precision("highest"):
        found = compiled(model.streams, backend)(model.parameters, tables)
    return np.asarray(found) * tables["present"][..., None]


# What a group means.


def test_a_group_is_its_members():
    spec = spec_of(3, delays=(0, 1, 2), loss_weights=(0.0, 0.5, 1.0), mail=MAIL)
    assert spec.names == (
        *("input.0", "input.1", "input.2", "thread.0", "thread.1", "thread.2", "output"),
    )
    assert spec.kinds == ("input",) * 3 + ("thought",) * 3 + ("output",)
    assert spec.loss_weights == (0, 0, 0, 0.5, 0.5, 0.5, 1)
    assert spec.delays == (0, 0, 0, 1, 1, 1, 2)
    assert spec.groups == (Group("input", 0, 3), Group("thread", 3, 3))
    assert spec.classes == (0, 0, 0, 1, 1, 1, 2) and spec.num_classes == 3
    assert spec.roster.class_names == ("input", "thread", "output")
    assert spec.roster.indices == (0, 1, 2, 0, 1, 2, -1)
    assert spec.members("thread") == range(3, 6) and spec.members("thread.1") == range(4, 5)
    n = NEVER
    assert spec.lag_array[3:].tolist() == [
        [0, n, n, 1, n, n, n],
        [n, 0, n, n, 1, n, n],
        [n, n, 0, n, n, 1, n],
        [n, n, n, 1, n, n, 1],
    ]
    assert spec.token_lag_array[3:6, 3:6].tolist() == [[n, 1, 1], [1, n, 1], [1, 1, n]]
    # 2 ^ 1 = 3 is no thread, so that input.2 gets mail in row 5 only.
    assert spec.mail_settings == [
        ("input.0", "thread.1", "1", "4"),
        ("input.0", "thread.2", "1", "5"),
        ("input.1", "thread.0", "1", "4"),
        ("input.2", "thread.0", "1", "5"),
    ]


def test_streams_without_groups_are_as_before():
    spec = StreamSpec.from_config(StreamsConfig(rotations=(0.0, 90.0, 0.0)))
    lag = ((1, 1, 1),) * 3
    assert spec == StreamSpec(
        *(("user", "thought", "output"), ("input", "thought", "output"), (0.0, 1.0, 1.0), lag),
        delays=(0, 0, 0),
        rotations=(0.0, 90.0, 0.0),
    )
    shapes = abstract_model(MODEL, spec)[1]
    assert shapes["stream_embedding"].shape == (3, 16)
    assert "stream_embedding_identities" not in shapes


numbers = st.integers(0, 9)
indices = st.one_of(
    st.just(("i", 0)), st.tuples(st.sampled_from("+-^"), numbers), st.tuples(st.just(""), numbers)
)


@given(size=st.integers(1, 9), other=st.integers(1, 9), index=indices, same=st.booleans())
@settings(max_examples=200)
def test_pairs_follow_the_reader_index(size, other, index, same):
    """`Roster.pairs` against its description, reader by reader."""
    roster = expand((f"a * {size}", "x", f"b * {other}"))
    operation, operand = index
    text = "i" if operation == "i" else f"{operand}" if not operation else f"i{operation}{operand}"
    source, first, count = ("a", 0, size) if same else ("b", size + 1, other)
    expected = []
    for i in range(size):
        j = {"": operand, "i": i, "^": i ^ operand}.get(operation)
        if j is None:
            # Steps around the ring, one at a time.
            j = i if operand == 0 else i % count
            for _ in range(operand):
                j = (j + (1 if operation == "+" else count - 1)) % count
        is_own = operation and operand == 0
        if j < count and (is_own or (i, 0) != (j, first)):
            expected.append((i, first + j))
    assert roster.pairs("a", f"{source}@{text}", "") == expected
    assert roster.pairs("a", "a", "") == [
        (i, j) for i in range(size) for j in range(size) if i != j
    ]
    assert roster.pairs("x", "b", "") == [(size, size + 1 + j) for j in range(other)]
    assert roster.pairs("b@0", "x", "") == [(size + 1, size)]


@given(st.text("ab01@i+-^. *", max_size=8), st.text("ab01@i+-^. *", max_size=8))
@settings(max_examples=300)
def test_any_reference_is_read_or_refused(reader, source):
    roster = expand(("a * 3", "b", "ab * 2"))
    try:
        pairs = roster.pairs(reader, source, "config.streams.lags")
    except UserError as error:
        assert str(error).startswith("config.streams.lags ") and "\n" not in str(error)
    else:
        assert all(0 <= stream < 6 for pair in pairs for stream in pair)


def in_degrees(source, size=8, reader="thread"):
    spec = spec_of(size, lags=((reader, source, "1"),))
    return ((spec.lag_array < NEVER).sum(1) - 1)[size : 2 * size].tolist()


def test_the_usual_topologies():
    assert in_degrees("thread") == [7] * 8  # all to all
    assert in_degrees("thread@i+1") == in_degrees("thread@i-1") == [1] * 8  # ring
    assert in_degrees("thread@0") == [0] + [1] * 7  # star: all read the hub,
    assert in_degrees("thread", reader="thread@0") == [7] + [0] * 7  # and the hub reads all
    assert in_degrees("thread@i^4") == in_degrees("input@i") == [1] * 8


@given(st.sampled_from([2, 4, 8, 16]), st.integers(0, 99))
def test_mail_by_rounds_merges_a_tree(threads, seed):
    """Rounds of mail from i ^ 1, i ^ 2, ... give each thread the sum of all inputs."""
    rounds = [
        ("input", f"thread@i^{1 << r}", "1", str(r + 1)) for r in range((threads - 1).bit_length())
    ]
    spec = spec_of(threads, lags=(), mail=tuple(rounds))
    said = np.random.default_rng(seed).integers(0, 99, threads)
    total = said.sum()
    for row in range(1, len(rounds) + 1):
        rules = [rule for rule in spec.mail if any(row in rows for rows in rule.rows)]
        assert sorted(rule.reader for rule in rules) == list(range(threads))
        gets = {rule.reader: said[rule.source - threads] for rule in rules}
        said = said + np.array([gets[i] for i in range(threads)])
    assert (said == total).all()


ERRORS = [
    ({"names": ("a * 0",)}, "holds 'a \\* 0': a group has 1 to 1024 members"),
    ({"names": ("a * 2", "a")}, "give at least one name, and each name once"),
    ({"names": ("a * 2", "a.1")}, "each name once"),
    ({"names": ("a * 2", "b"), "kinds": ("output",) * 3}, "kinds has 3 items: names has 2"),
    ({"lags": (("b", "a@i", "1"),)}, "source 'a@i' and the reader 'b', which is in no group"),
    ({"lags": (("a@i", "b", "1"),)}, "reader 'a@i': i is the index of the reader"),
    ({"lags": (("a", "b@0", "1"),)}, "'b@0': 'b' is no group \\(a\\)"),
    ({"lags": (("a", "a@j", "1"),)}, "'a@j': 'j' is no index; write GROUP@i"),
    ({"lags": (("a", "a@i*2", "1"),)}, "'i\\*2' is no index"),
    ({"lags": (("a", "c", "1"),)}, "names 'c': the streams are a.0, a.1, b; the groups are a$"),
    ({"lags": (("a", "a@i", "1 tokens"),)}, "from 'a' to itself"),
    ({"mail": (("a", "b", "1", "5"),)}, "reader 'a', which is of kind output"),
    ({"combine": (("b", "mixture", "b, a.1"),)}, "combine names 'a.1', which is of a group"),
    ({"combine": (("a", "own", ""),)}, "combine gives the group 'a' a rule"),
    ({"identities": 1}, "identities is 1, and the group 'a' has 2 members"),
    ({"identities": 2, "names": ("a", "b")}, "they are for groups, and there is none in a, b"),
]


@pytest.mark.parametrize(("fields", "message"), ERRORS)
def test_bad_groups_are_refused(fields, message):
    given_fields = {"names": ("a * 2", "b"), "kinds": ("output",) * 2, **fields}
    with pytest.raises(UserError, match=message):
        StreamSpec.from_config(StreamsConfig(**given_fields))


def test_mail_from_all_members_fills_a_cell_twice():
    with pytest.raises(UserError, match="fills row 5 of 'input.0' twice"):
        spec_of(mail=(("input", "thread", "1", "5"),))
    with pytest.raises(UserError, match="copies 'input' into itself"):
        spec_of(mail=(("input", "input@i", "1", "5"),))


# Parameters.


def written_out(spec, parameters):
    """The same streams and parameters without groups: with a copy of the vector for each member."""
    plain = dataclasses.replace(spec, groups=(), identities=0)
    vectors = parameters["stream_embedding"][np.array(spec.classes)]
    parameters = {**parameters, "stream_embedding": vectors}
    table = parameters.pop("stream_embedding_identities", None)
    if table is not None:
        index = np.array(spec.roster.indices)
        own = np.where(index[:, None] >= 0, table[np.maximum(index, 0)], 0)
        parameters["stream_embedding"] = vectors + own
    return LoadedModel(MODEL, plain, parameters)


@pytest.mark.parametrize("identities", [0, 5])
def test_a_group_equals_streams_with_copies_of_its_vector(identities):
    model = model_of(identities=identities)
    tables = tables_of(9, absent=0.2)
    expected = logits(written_out(model.streams, model.parameters), tables)
    tolerance = 1e-5 if identities else 0  # the order of a sum differs
    np.testing.assert_allclose(logits(model, tables), expected, rtol=0, atol=tolerance)


def test_members_are_exchangeable_and_identities_tell_them_apart():
    tables, order = tables_of(9, 1, absent=0.2), [2, 0, 3, 1, 6, 4, 7, 5, 8]
    tables["tokens"][:, :, 8], tables["present"][:, :, 8] = 3, True
    permuted = {**tables, **{name: tables[name][..., order] for name in ("tokens", "present")}}
    everybody = (
        ("thread", "input@i", "0"),
        ("thread", "thread", "1 tokens"),
        ("output", "thread", "1"),
    )
    for backend in ("reference", "chunked"):
        model = model_of(lags=everybody)
        found = logits(model, permuted, backend)
        np.testing.assert_allclose(
            found, logits(model, tables, backend)[:, :, order], rtol=0, atol=1e-5
        )
    model = model_of(lags=everybody, identities=4)
    difference = logits(model, permuted) - logits(model, tables)[:, :, order]
    assert (np.abs(difference).max((0, 1, 3)) > 1e-2).all()


def test_parameters_of_other_classes_are_refused():
    parameters = parameters_of()
    more = StreamSpec.from_config(
        StreamsConfig(
            ("input * 4", "thread * 4", "output", "tool"), ("input", "thought", "output", "input")
        )
    )
    with pytest.raises(UserError, match=r"is \(3, 16\) and has to be \(4, 16\) for 4 streams"):
        LoadedModel(MODEL, more, parameters)
    with pytest.raises(UserError, match="stream_embedding_identities is missing"):
        LoadedModel(MODEL, spec_of(identities=4), parameters)
    bound = bind(abstract_model(MODEL, more)[0], {**parameters})
    with pytest.raises(UserError, match="those of 3 streams, and there are 4"):
        bound.embed(jnp.zeros((1, 1, 10), jnp.int32), jnp.arange(10))


# Another number of threads.


@pytest.mark.parametrize("threads", [2, 4, 8])
def test_cached_decoding_equals_a_full_pass_with_any_number_of_threads(threads):
    model = model_of(2).with_threads(threads)
    assert model.streams == spec_of(threads)
    tables = {name: x[:1] for name, x in tables_of(model.streams.size, 2).items()}
    tables["segment"] = np.ones_like(tables["segment"])
    expected = score(model, tables, SILENCE).logits[0]
    engine = Engine(model, sessions=1, window=16, all_logits=True, silence_id=SILENCE)
    session = engine.open()
    for stream, tokens in zip(model.streams.names, tables["tokens"][0].T):
        session.force(stream, tokens.tolist())
    session.step()
    for row in range(7):
        np.testing.assert_allclose(session.step().logits, expected[row], rtol=0, atol=2e-5)


def test_more_threads_than_in_an_example_are_absent():
    """A table with two threads gives the same losses in a model of two threads and of four."""
    small, large = model_of(2), model_of(4)
    columns = [large.streams.index(name) for name in small.streams.names]
    packer = Packer(16)
    tables = []
    for seed in range(3):
        table = tables_of(5, seed, rows=6, absent=0.1)
        wide_tokens, wide_present = np.zeros((6, 9), np.int32), np.zeros((6, 9), bool)
        wide_tokens[:, columns], wide_present[:, columns] = table["tokens"][0], table["present"][0]
        tables.append((wide_tokens, wide_present))
    packed = [
        *(
            found
            for number, table in enumerate(tables)
            for found in packer.add(Table(*table, f"{number:x}"))
        ),
        *packer.finish(),
    ]
    for one in packed:
        wide = {name: getattr(one, name)[None] for name in ("tokens", "present", "segment")}
        narrow = {**wide, **{name: wide[name][..., columns] for name in ("tokens", "present")}}
        of_large, of_small = logits(large, wide)[..., columns, :], logits(small, narrow)
        np.testing.assert_allclose(of_large, of_small, rtol=0, atol=1e-5)
        assert np.abs(of_small).max() > 0.1
        weights = targets_and_weights(wide, large.streams.loss_weights)[2]
        expected = targets_and_weights(narrow, small.streams.loss_weights)[2]
        np.testing.assert_array_equal(np.asarray(weights)[..., columns], expected)
        assert weights.sum() == expected.sum() > 0


def test_the_number_of_threads_changes_by_group():
    fields = {
        "names": ("input * 4", "thread * 4", "judge * 2"),
        "kinds": ("input", "thought", "output"),
    }
    lags = (("thread", "input@i", "0"), ("judge", "thread", "1"))
    model = LoadedModel(
        MODEL, StreamSpec.from_config(StreamsConfig(**fields, lags=lags)), parameters_of()
    )
    more = model.with_threads({"thread": 8, "input": 8})
    assert [group.size for group in more.streams.groups] == [8, 8, 2]
    assert model.with_threads({"judge": 3}).streams.size == 11
    with pytest.raises(UserError, match="different numbers.* input=4,thread=4,judge=2"):
        model.with_threads(8)
    with pytest.raises(UserError, match="'thread' 8 members and 'input' 4: they are paired"):
        model.with_threads({"thread": 8})
    with pytest.raises(UserError, match="threads names 'x': the groups are input, thread, judge"):
        model.with_threads({"x": 8})
    with pytest.raises(UserError, match="judge=0: a group has 1 to 1024"):
        model.with_threads({"judge": 0})


def test_a_single_member_in_edges_or_mail_fixes_the_number():
    for fields in (
        {"lags": (*LAGS, ("output", "thread.1", "1"))},
        {"mail": (("input.0", "thread.1", "1", "5"),)},
    ):
        model = model_of(4, **fields)
        with pytest.raises(UserError, match=r"name '(thread|input)\.[01]', a single one; .* write"):
            model.with_threads(8)
        assert model.with_threads(4).streams == model.streams
    with pytest.raises(UserError, match="there is no group; give config.streams.names one"):
        LoadedModel(MODEL, StreamSpec.from_config(StreamsConfig()), parameters_of()).with_threads(4)
    with pytest.raises(UserError, match="identities is 4, and the group 'input' has 8 members"):
        model_of(4, identities=4).with_threads(8)
    with pytest.raises(UserError, match="the streams of the model were changed"):
        model_of(4).with_visibility("same_row").with_threads(8)


def test_settings_of_a_loaded_model_change():
    lags = (("thread", "thread", "2"),)
    model = model_of(2).with_streams(lags=lags, skip_silence=True)
    assert model.streams == dataclasses.replace(spec_of(2, lags=lags), skip_silence=True)
    assert model_of(2).with_streams(mail=MAIL).streams == spec_of(2, mail=MAIL)
    with pytest.raises(UserError, match="names 'x'"):
        model_of(2).with_streams(lags=(("x", "thread", "1"),))


def test_checkpoints_keep_groups(tmp_path, letters):
    config = Config(model=MODEL, streams=streams_of(2))
    write_model(tmp_path / "model", config, parameters_of(), letters)
    stored = json.loads((tmp_path / "model" / "config.json").read_text())["streams"]
    assert stored["names"] == ["input * 2", "thread * 2", "output"]
    flags = Parser("msllm", "")
    flags.add_checkpoint()
    at = f"--checkpoint={tmp_path / 'model'}"
    for text in ("3", "thread=3,input=3"):
        model = load_model(flags.parse([at, f"--threads={text}"]))
        assert model.streams == spec_of(3)
        assert model.run_config.streams == streams_of(3)
    assert load(tmp_path / "model").streams == spec_of(2)
    for text in ("x", "thread=x", "thread=2,3", "thread=2,thread=3", "0"):
        with pytest.raises(UserError, match="--threads"):
            flags.parse([at, f"--threads={text}"])


# Where else streams are named.


def test_the_certificate_of_a_group_is_that_of_its_members():
    spec = spec_of(4, mail=MAIL)
    expected = flow.certificate(dataclasses.replace(spec, groups=()), 32)
    found = flow.certificate(spec, 32)
    assert found == expected
    assert found.flow("input.1", "thread.1").rows == 0
    assert found.flow("input.1", "input.0").medium == "tokens"
    assert flow.certificate(spec_of(4, lags=LAGS[:1]), 32).flow("input.1", "thread.0") is None


def test_visibility_functions_get_the_members(monkeypatch):
    given_names = []

    def ring(names, kinds):
        given_names.append((names, kinds))
        size = len(names)
        return [
            [1 if s in (r, (r + 1) % size) else "never" for s in range(size)] for r in range(size)
        ]

    module = types.ModuleType("a_ring")
    module.ring = ring
    monkeypatch.setitem(sys.modules, "a_ring", module)
    streams = StreamsConfig(("a * 3",), ("output",), visibility="a_ring:ring")
    resolved = resolve_visibility(Config(streams=streams)).streams
    assert given_names == [(("a.0", "a.1", "a.2"), ("output",) * 3)]
    assert resolved.names == ("a * 3",)
    expected = StreamsConfig(
        ("a * 3",), ("output",), visibility="isolated", lags=(("a", "a@i+1", "1"),)
    )
    assert StreamSpec.from_config(resolved) == StreamSpec.from_config(expected)


def test_converters_write_members_and_leave_others_absent(tmp_path, letters):
    """Absent members of ready-made tables, delays by entry, and members that change places."""
    cells = {"input.0": ["a", "b"], "input.1": [None, None], "output": ["", "c"]}
    (tmp_path / "x.jsonl").write_text(json.dumps({"streams": cells}) + "\n")
    streams = StreamsConfig(("input * 2", "output"), ("input", "output"))
    data = DataConfig(
        converter="tables", path=str(tmp_path / "x.jsonl"), vary=VaryConfig(delays=((1, 0),))
    )
    config = Config(streams=streams, data=data)
    spec = StreamSpec.from_config(streams)
    (table,) = convert(config, spec, letters)
    a, b, c = (letters.encode_word(x)[0] for x in "abc")
    assert table.tokens.tolist() == [[0, 0, letters.silence_id], [a, 0, c], [b, 0, 0]]
    assert table.present.tolist() == [
        [False, False, True],
        [True, False, True],
        [True, False, False],
    ]
    permuted = dataclasses.replace(
        config, data=dataclasses.replace(data, vary=VaryConfig(permute=("input",)))
    )
    (table,) = convert(permuted, spec, letters)
    assert sorted(table.present.sum(0)[:2].tolist()) == [0, 2]
    wider = dataclasses.replace(
        config, data=dataclasses.replace(data, vary=VaryConfig(), streams=("input * 3", "output"))
    )
    (table,) = convert(wider, spec, letters)
    assert table.tokens.shape == (2, 3)
    with pytest.raises(UserError, match="permute.* must be among"):
        Config(streams=streams, data=DataConfig(vary=VaryConfig(permute=("x",))))


def test_options_of_a_group_hold_for_its_members():
    spec = spec_of(2)
    assert parse_values("top_k", ["1", "thread=3", "thread.1=4"], spec, int, 0) == (1, 1, 3, 4, 1)


def test_a_roster_of_plain_names():
    roster = expand(("user", "a@b"))
    assert roster == Roster(("user", "a@b")) and roster.classes == (0, 1)
    assert roster.pairs("user", "a@b", "") == [(0, 1)]
    assert roster.pairs("user", "user", "") == [(0, 0)]
    with pytest.raises(UserError, match="names 'a': the streams are user, a@b$"):
        roster.pairs("a", "user", "config.streams.lags")
