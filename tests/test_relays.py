"""Edges through tokens: what a relay shows, in training's forward, on meshes and in decoding."""

import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
import runs
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from msllm.config import Config, ModelConfig, StreamsConfig, from_config_dict, to_json
from msllm.decode.engine import DecodeOptions, Engine
from msllm.errors import UserError
from msllm.evals.attention_map import attention_map
from msllm.evals.score import score
from msllm.kernels import cpu as cpu_kernels
from msllm.model.attention.dispatch import get_backend
from msllm.model.model import abstract_model, bind, init_parameters
from msllm.model.relays import columns_of, distinct_tokens
from msllm.streams import NEVER, StreamSpec, positions
from msllm.tokenizer import resolve_token_sets
from msllm.weights.convert import to_hf
from msllm.weights.load import LoadedModel, load
from msllm.weights.warm_start import write_model

FEW = tuple(range(2, 32, 2))  # the tokens that pass an edge in place of the other half
NAMES = ("a", "b", "c", "d")
KINDS = ("input", "output", "thought", "output")
SILENCE = 1
BACKENDS = ["reference", "chunked"] + ["cpu"] * (cpu_kernels.unavailable_reason() is None)
SIZES = {
    "vocab_size": 32,
    "d_model": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 32,
}


def make_spec(lags=(), size=4, **settings):
    """The spec of the first `size` streams; lags are "READER SOURCE LAG" without spaces in LAG."""
    edges = tuple(tuple(edge.split(" ", 2)) for edge in lags)
    sets = {"few": FEW, "one": (7,)}
    config = StreamsConfig(
        names=NAMES[:size], kinds=KINDS[:size], lags=edges, token_sets=sets, **settings
    )
    return StreamSpec.from_config(config)


@functools.cache
def make_model(layers=2, size=4, **settings):
    """A model config and parameters with noise, so that norms and biases do not hide mistakes."""
    config = ModelConfig(num_layers=layers, **SIZES, **settings)
    parameters = init_parameters(config, make_spec(size=size), 0)
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys)]
    return config, jax.tree.unflatten(tree, noisy)


def random_tables(seed, rows=10, size=4, batch=2, absent=0.2):
    """Tables of two segments with silent and absent cells."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 32, (batch, rows, size)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.3] = SILENCE
    segment = np.where(np.arange(rows) < rows // 2 + 1, 1, 2)
    return {
        "tokens": tokens,
        "present": rng.random(tokens.shape) >= absent,
        "segment": np.broadcast_to(segment, (batch, rows)).astype(np.int32),
    }


def logits(model, spec, tables, backend="reference"):
    """The logits [B, T, S, V] of a forward pass, 0 at absent cells."""
    config, parameters = model
    graph, _, _ = abstract_model(config, spec)

    @jax.jit
    def run(parameters, tables):
        bound = bind(graph, parameters)
        return bound.logits(bound.read(tables, SILENCE, get_backend(backend)))

    with jax.default_matmul_precision("highest"):
        return np.asarray(run(parameters, tables)) * tables["present"][..., None]


@pytest.mark.parametrize("rows", range(4))
def test_in_one_layer_an_edge_through_tokens_equals_a_latent_one(rows):
    """The hidden state of the source is that of its token alone before the first layer."""
    model, tables = make_model(layers=1, size=3), random_tables(0, size=3)
    pairs = [(r, s) for r in "abc" for s in "abc" if r != s]
    latent = make_spec([f"{r} {s} {rows}" for r, s in pairs], 3)
    through_tokens = make_spec([f"{r} {s} {rows} tokens" for r, s in pairs], 3)
    other = make_spec([f"{r} {s} {rows + 1} tokens" for r, s in pairs], 3)
    expected = logits(model, latent, tables)
    for backend in BACKENDS:
        found = logits(model, through_tokens, tables, backend)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(logits(model, other, tables) - expected).max() > 0.01


def widened(spec, tables):
    """Streams and tables in which each relay is a stream of its own that sees itself only.

    This is what relays compute, at the price of more streams.

    Returns: the spec, the tables, and the stream of each column.
    """
    sources = [relay.source for relay in spec.relays]
    size, wide = spec.size, spec.size + len(sources)
    lag = np.full((wide, wide), NEVER)
    lag[:size, :size] = spec.lag_array
    for (reader, source), relay in spec.edge_relays.items():
        column = size + spec.relays.index(relay)
        lag[reader, column] = spec.token_lag_array[reader, source]
    names, kinds = tuple(map(str, range(wide))), (*spec.kinds, *["input"] * len(sources))
    wide_spec = StreamSpec(names, kinds, (1.0,) * wide, tuple(map(tuple, lag.tolist())))
    columns = [*range(size), *sources]
    tokens = tables["tokens"][..., columns]
    for column, relay in enumerate(spec.relays, size):
        if relay.passing is not None:
            passes = np.isin(tokens[..., column], relay.passing)
            tokens[..., column] = np.where(passes, tokens[..., column], SILENCE)
    wide_tables = {
        **tables,
        "tokens": tokens,
        "present": tables["present"][..., columns],
    }
    return wide_spec, wide_tables, np.array(columns)


def emulated(spec, model, tables):
    """The logits of `widened` streams, for the streams of the spec."""
    config, parameters = model
    wide_spec, wide_tables, columns = widened(spec, tables)
    vectors = parameters["stream_embedding"][columns]
    wide_model = config, {**parameters, "stream_embedding": vectors}
    return logits(wide_model, wide_spec, wide_tables)[:, :, : spec.size]


edges = st.sampled_from(
    ["never", "0 tokens", "1 tokens", "3 tokens", "1", "2", "0 tokens:few", "2 tokens:one"]
)


@given(seed=st.integers(0, 1000), drawn=st.lists(edges, min_size=12, max_size=12))
@settings(max_examples=5, phases=[Phase.generate])  # shrinking would compile for minutes
def test_relays_equal_streams_that_see_only_themselves(seed, drawn):
    pairs = [(r, s) for r in NAMES for s in NAMES if r != s]
    spec = make_spec([f"{r} {s} {edge}" for (r, s), edge in zip(pairs, drawn)])
    model, tables = make_model(), random_tables(seed)
    expected = emulated(spec, model, tables)
    for backend in BACKENDS:
        found = logits(model, spec, tables, backend)
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5, err_msg=backend)


MIXED = make_spec(
    ["b a 1 tokens", "c b 0 tokens", "b c 0 tokens", "d c 2 tokens:few", "d b 1", "c a never"]
    + ["d a never", "a b never", "a c never", "a d never", "b d never", "c d never"]
)


def test_a_reader_gets_tokens_and_nothing_that_the_source_took_from_others():
    """c sees b's tokens, and b sees a's: with b's tokens given, a changes no bit of c."""
    model, tables = make_model(), random_tables(1)
    changed = {**tables, "tokens": tables["tokens"].copy()}
    changed["tokens"][..., 0] = (changed["tokens"][..., 0] + 3) % 32
    for backend in BACKENDS:
        before, after = (logits(model, MIXED, x, backend) for x in (tables, changed))
        differs = (before != after).any((0, 1, 3))
        # d sees b through a latent edge, and b saw a.
        assert differs.tolist() == [True, True, False, True], backend


GATED = make_spec(["b a 1 tokens:few", "c a 0 tokens", "d a 2 tokens:one"], visibility="isolated")
# Streams that see one another through relays at most; the earlier rows of d are hidden from itself.
APART = make_spec(["b a 1 tokens", "a c 0 tokens:few", "d d never"], visibility="isolated")
ISOLATED = make_spec(["b b 0", "d d never"], visibility="isolated")


@pytest.mark.parametrize("spec", [GATED, APART, ISOLATED], ids=["gated", "apart", "isolated"])
def test_streams_without_latent_edges_equal_the_reference(spec):
    model, tables = make_model(), random_tables(9)
    expected = emulated(spec, model, tables)
    for backend in BACKENDS:
        found = logits(model, spec, tables, backend)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5, err_msg=backend)


@pytest.mark.parametrize(
    ("spec", "remat"), [(MIXED, "dots"), (APART, "full")], ids=["latent_edges", "apart"]
)
def test_gradients_equal_those_of_streams_that_see_only_themselves(spec, remat):
    (config, parameters), tables = make_model(remat=remat), random_tables(10, rows=20)
    tables["tokens"] %= 6  # few tokens, so that each is that of many cells
    weights = np.random.default_rng(0).standard_normal((2, 20, spec.size, config.d_model))
    weights *= tables["present"][..., None]

    def gradients(spec, tables, columns, backend):
        graph, _, _ = abstract_model(config, spec)

        @jax.jit
        @jax.grad
        def run(parameters):
            vectors = parameters["stream_embedding"][columns]
            bound = bind(graph, {**parameters, "stream_embedding": vectors})
            hidden = bound.read(tables, SILENCE, get_backend(backend))
            return (hidden[:, :, : weights.shape[2]] * weights).sum()

        with jax.default_matmul_precision("highest"):
            return run(parameters)

    expected = gradients(*widened(spec, tables), "reference")
    found = gradients(spec, tables, np.arange(spec.size), BACKENDS[-1])
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one / scale, other / scale, atol=3e-6, err_msg=str(path))


@given(seed=st.integers(0, 100), rows=st.integers(1, 9), size=st.integers(1, 6))
@settings(max_examples=30)
def test_distinct_tokens_are_numbered_as_they_occur(seed, rows, size):
    tokens = np.random.default_rng(seed).integers(0, size, (2, 9, 2)).astype(np.int32)
    tokens[:, rows:] = tokens[:, :1]
    found = jax.tree.map(np.asarray, jax.jit(distinct_tokens)(tokens))
    counts = []
    for table, column in np.ndindex(2, 2):
        cells = tokens[table, :, column].tolist()
        distinct = list(dict.fromkeys(cells))
        counts.append(len(distinct))
        assert [distinct.index(cell) for cell in cells] == found.number[table, :, column].tolist()
        first = found.row[table, : len(distinct), column].tolist()
        assert [cells.index(token) for token in distinct] == first
    assert found.most == max(counts)


def test_a_token_that_does_not_pass_is_seen_as_silence():
    """b sees the even tokens of a, c sees all, and d sees 7 only."""
    model, tables = make_model(), random_tables(7, absent=0)
    tables["tokens"][:, 2, 0] = 3

    def differs(token, backend):
        changed = {**tables, "tokens": tables["tokens"].copy()}
        changed["tokens"][:, 2, 0] = token
        before, after = (logits(model, GATED, x, backend) for x in (tables, changed))
        return (before != after).any((0, 1, 3)).tolist()

    for backend in BACKENDS:
        assert differs(5, backend) == [True, False, True, False]
        assert differs(SILENCE, backend) == [True, False, True, False]
        assert differs(4, backend) == [True, True, True, False]
        assert differs(7, backend) == [True, False, True, True]


def test_in_decoding_and_scoring_a_token_that_does_not_pass_is_seen_as_silence():
    config, parameters = make_model()
    model = LoadedModel(config, GATED, parameters)
    tokens = random_tables(8, batch=1, absent=0)["tokens"]
    engine = Engine(model, sessions=2, window=16, all_logits=True, silence_id=SILENCE)

    def run(token, row):
        changed = tokens.copy()
        changed[:, row, 0] = token
        with engine.open(prefill=changed[0, :4]) as session:
            for stream, column in zip(NAMES, changed[0, 4:].T):
                session.force(stream, column.tolist())
            decoded = np.array([session.step().logits for _ in range(6)])
        return decoded, score(model, {"tokens": changed}, SILENCE).logits[0]

    for row in (1, 5):  # in the prefill, and as a forced token
        found = {token: run(token, row) for token in (3, 5, 4)}
        for other, readers in ((5, [True, False, True, False]), (4, [True, True, True, False])):
            for before, after in zip(found[3], found[other]):
                assert (before != after).any((0, 2)).tolist() == readers, (row, other)
    with pytest.raises(UserError, match="no tokenizer: pass the token that means silence"):
        score(model, {"tokens": tokens})
    outputs = dataclasses.replace(GATED, kinds=("output",) * 4)
    with pytest.raises(UserError, match="pass the token that means silence"):
        Engine(LoadedModel(config, outputs, parameters), window=4)


def test_silence_is_a_token_and_skip_silence_does_not_hide_it():
    model, tables = make_model(), random_tables(2, absent=0)
    spec = make_spec(["b a 1 tokens", "b c never", "b d never"], skip_silence=True)
    tables["tokens"][:, :, 1:] = 5
    silent = {**tables, "tokens": tables["tokens"].copy()}
    silent["tokens"][:, 2, 0] = SILENCE
    spoken = {**tables, "tokens": tables["tokens"].copy()}
    spoken["tokens"][:, 2, 0] = 7
    absent = {**silent, "present": silent["present"].copy()}
    absent["present"][:, 2, 0] = False
    results = [logits(model, spec, x)[:, 3:5, 1] for x in (silent, spoken, absent)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(results[one] - results[other]).max() > 1e-4


def test_packed_equals_alone():
    model, tables = make_model(), random_tables(3, rows=8)
    first = 8 // 2 + 1
    packed = logits(model, MIXED, tables)
    for rows in (slice(0, first), slice(first, 8)):
        alone = {name: x[:, rows] for name, x in tables.items()}
        alone["segment"] = np.ones_like(alone["segment"])
        np.testing.assert_allclose(logits(model, MIXED, alone), packed[:, rows], rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_cached_decoding_equals_a_full_forward_pass(dtype):
    config, parameters = make_model()
    model = LoadedModel(config, MIXED, parameters)
    tables = random_tables(4, batch=1, absent=0)
    tables["segment"] = np.ones_like(tables["segment"])
    expected = score(model, tables, SILENCE).logits[0]
    engine = Engine(
        model, sessions=2, window=16, cache_dtype=dtype, all_logits=True, silence_id=SILENCE
    )
    session = engine.open(DecodeOptions(temperature=0.0), prefill=tables["tokens"][0, :4])
    tolerance = {"float32": 2e-5, "bfloat16": 0.2, "int8": 0.3}[dtype]
    for row in range(4, 10):
        for stream, token in zip(NAMES, tables["tokens"][0, row]):
            session.force(stream, [int(token)])
        found = session.step().logits
        np.testing.assert_allclose(found, expected[row - 1], rtol=0, atol=tolerance)


def test_rows_on_the_device_forks_and_snapshots_see_the_same():
    config, parameters = make_model()
    engine = Engine(
        LoadedModel(config, MIXED, parameters), sessions=4, window=8, silence_id=SILENCE
    )
    session = engine.open(DecodeOptions(temperature=1.0, seed=3))
    session.feed("a", [4, 5, 6, 7, 8, 9])
    for _ in range(4):
        session.step()
    fork, restored = session.fork(), engine.restore(session.snapshot())
    expected = [row.tokens.tolist() for row in session.run(12)]  # the window is full by then
    assert [fork.step().tokens.tolist() for _ in range(12)] == expected
    assert [row.tokens.tolist() for row in restored.run(12)] == expected


@pytest.mark.parametrize("axes", [{"stream": 2}, {"stream": 4, "fsdp": 2}, {"tensor": 2}], ids=str)
@pytest.mark.parametrize("ring", [False, True])
def test_sharded_equals_unsharded(axes, ring):
    if ring and "stream" not in axes:
        pytest.skip("a ring needs several devices along `stream`")
    lags = (("output", "tool", "1 tokens"), ("output", "thought", "0 tokens"))
    lags += (("thought", "user", "2 tokens"), ("output", "user", "never"))
    lags += (("thought", "tool", "0 tokens:few"),)
    results = []
    for devices, mesh in ((1, {}), (math.prod(axes.values()), axes)):
        settings = {**runs.FOUR_STREAMS, "streams.lags": lags, "model.kv_ring": ring and bool(mesh)}
        settings["streams.token_sets"] = {"few": FEW}
        program = runs.make_program(runs.make_config(**settings), devices, **mesh)
        batch = runs.place(program, runs.random_tables(program.config))
        _, metrics = program.step(program.init(), batch)
        results.append({name: float(metrics[name]) for name in ("loss", "gradient_norm")})
    for name, value in results[0].items():
        assert results[1][name] == pytest.approx(value, rel=2e-5), name


def test_columns_are_laid_out_by_device():
    columns = columns_of(MIXED, 2)
    assert MIXED.relays == ((0, None), (1, None), (2, None), (2, FEW))
    assert (columns.streams, columns.relays, columns.sources) == (2, 2, (0, 1, 2, 2))
    # Device 0 has the streams a and b and the relays of a and b.
    assert columns.lag[1, 2] == 1 and columns.lag[4, 3] == 0 and columns.lag[1, 6] == 0
    assert columns.lag[5, 6] == NEVER and columns.lag[5, 7] == 2
    assert (columns.lag[[2, 3, 6, 7]] == NEVER).all() and (columns.lag[:5, 7] == NEVER).all()
    assert columns.passes.sum(1).tolist() == [32, 32, 32, len(FEW)]
    padded = columns_of(make_spec(["b a 1 tokens"]), 2)
    assert padded.sources == (0, -1) and padded.passes is None
    no_relays = columns_of(make_spec(), 1)
    assert no_relays.size == 4 and no_relays.lag.tolist() == make_spec().lag_array.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lags": (("b", "a", "1 token"),)}, "lag '1 token': must be a number of rows >= 0"),
        ({"lags": (("b", "a", "never tokens"),)}, "lag 'never tokens'"),
        ({"lags": (("b", "b", "1 tokens"),)}, "'b' to itself: a stream sees its own cells"),
        ({"visibility_medium": "text"}, "must be latent or tokens"),
        ({"lags": (("b", "a", "1 tokens:no"),)}, "no set 'no' in .* \\(it is empty\\)"),
        ({"lags": (("b", "a", "1 latent:no"),)}, "lag '1 latent:no'"),
        ({"lags": (("b", "a", "1 tokens:"),)}, "no set ''"),
        ({"visibility_medium": "tokens:x", "token_sets": {"y": (1,)}}, "no set 'x' in .* \\(y\\)"),
        ({"token_sets": {"y": ()}}, "give a name, and one token or more"),
        ({"token_sets": {"y": (1, -2)}}, "\\['y'\\] holds -2: must be texts, or ids >= 0"),
        ({"token_sets": {"y": (True,)}}, "\\['y'\\] holds True"),
    ],
)
def test_bad_edges_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        StreamSpec.from_config(StreamsConfig(names=NAMES, kinds=KINDS, **settings))


def test_a_preset_through_tokens_leaves_own_cells_latent():
    spec = make_spec(["d a 2"], visibility="same_row", visibility_medium="tokens")
    own = np.eye(4, dtype=bool)
    expected = np.where(own, 0, NEVER)
    expected[3, 0] = 2
    assert spec.lag_array.tolist() == expected.tolist()
    through = np.where(own, NEVER, 0)
    through[3, 0] = NEVER
    assert spec.token_lag_array.tolist() == through.tolist()


def test_a_preset_may_name_the_tokens_that_pass():
    spec = make_spec(["d a 2 tokens", "d b 1"], visibility_medium="tokens:few")
    sets = {(reader, source): one.name for reader, source, one in spec.passing}
    expected = {(r, s): "few" for r in range(4) for s in range(4) if r != s}
    del expected[3, 0], expected[3, 1]
    assert sets == expected
    assert spec.relays == ((0, None), (0, FEW), (1, FEW), (2, FEW), (3, FEW))


def with_sets(lags, sets):
    streams = StreamsConfig(names=NAMES, kinds=KINDS, lags=lags, token_sets=sets)
    return Config(streams=streams)


def test_texts_become_the_ids_of_their_tokens(letters):
    """Texts, pieces and ids; silence passes anyway."""
    sets = {"some": ("a", letters.piece(9), 7, "<silence>", "a"), "silent": ("<silence>",)}
    config = with_sets((("b", "a", "1 tokens:some"),), sets)
    resolved = resolve_token_sets(config, letters)
    ids = tuple(sorted({*letters.encode("a"), 9, 7}))
    assert len(ids) == 3
    silence = (letters.silence_id,)
    assert resolved.streams.token_sets == {"some": ids, "silent": silence}
    assert resolve_token_sets(resolved, letters) == resolved
    assert from_config_dict(json.loads(to_json(resolved))) == resolved
    assert StreamSpec.from_config(resolved.streams).relays == ((0, ids),)
    # The number of tokens is known before their ids are.
    assert len(StreamSpec.from_config(config.streams).relays[0].passing) == 4


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("a b", r"token_sets\['x'\]: 'a b' is 3 tokens \('a', .*'b'\): give texts that are one"),
        ("\u00e9", r"token_sets\['x'\]: '\u00e9' is not in the vocabulary: give another text"),
    ],
)
def test_texts_of_several_tokens_are_refused(token, message, letters):
    with pytest.raises(UserError, match=message):
        resolve_token_sets(with_sets((), {"x": (token,)}), letters)


@pytest.mark.parametrize(
    ("token", "message"),
    [("a", "holds the text 'a', and no tokenizer has"), (32, "holds 32: must be an id below 32")],
)
def test_a_model_needs_ids_of_its_vocabulary(token, message):
    config, _ = make_model()
    streams = with_sets((("b", "a", "1 tokens:x"),), {"x": (token,)}).streams
    with pytest.raises(UserError, match=message):
        abstract_model(config, StreamSpec.from_config(streams))


def test_checkpoints_and_exports_keep_the_tokens_that_pass(tmp_path, letters):
    config, parameters = make_model()
    settings = with_sets((("b", "a", "1 tokens:x"),), {"x": ("a", "b")})
    settings = resolve_token_sets(dataclasses.replace(settings, model=config), letters)
    write_model(tmp_path / "model", settings, parameters, letters)
    to_hf(tmp_path / "model", tmp_path / "hf")
    ids = tuple(sorted(letters.encode("ab")))
    for folder in ("model", "hf"):
        assert load(tmp_path / folder).streams.relays == ((0, ids),)
    settings = dataclasses.replace(settings, streams=StreamsConfig(names=NAMES, kinds=KINDS))
    write_model(tmp_path / "plain", settings, parameters, letters)
    to_hf(tmp_path / "plain", tmp_path / "plain_hf")
    assert "token_sets" not in (tmp_path / "plain_hf" / "config.json").read_text()


def test_attention_to_a_relay_counts_as_attention_to_its_source():
    config, parameters = make_model()
    tokens = random_tables(5, rows=6, batch=1, absent=0)["tokens"][0]
    weights = attention_map(LoadedModel(config, MIXED, parameters), tokens, silence_id=SILENCE)
    np.testing.assert_allclose(weights.sum((-2, -1)), 1, atol=1e-5)  # [layers, N, T, S, T, S]
    row, stream = np.arange(6)[:, None, None, None], np.arange(4)[None, :, None, None]
    other_row, other = np.arange(6)[None, None, :, None], np.arange(4)
    lag = MIXED.nearest_lag_array[stream, other]
    seen = (other_row <= row - lag) | ((row == other_row) & (stream == other))
    assert ((weights > 0) == seen).all()


def test_a_relay_has_the_position_of_its_source():
    config, parameters = make_model()
    graph, _, _ = abstract_model(config, MIXED)
    tables = random_tables(6)
    model, row = bind(graph, parameters), positions(tables["segment"])
    cells = model.cells(tables, SILENCE)
    expected = model(tables["tokens"], cells, row, None, SILENCE)
    by_stream = np.repeat(row[..., None], 4, axis=2)
    np.testing.assert_array_equal(
        model(tables["tokens"], cells, by_stream, None, SILENCE), expected
    )
    by_stream[..., 1] += 5  # of b, which c and d see
    moved = model(tables["tokens"], cells, by_stream, None, SILENCE)
    assert np.abs(np.asarray(moved - expected))[:, :, 2].max() > 1e-3
