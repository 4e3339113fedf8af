"""The flow certificate: against an independent search, and against models and decoding."""

import dataclasses
import itertools
import json
import math
import os
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import dictation

from msllm import flow
from msllm.cli.main import main
from msllm.combine import Combine
from msllm.config import StreamsConfig
from msllm.decode.engine import FREE, DecodeOptions, Engine
from msllm.errors import UserError
from msllm.kernels import cpu as cpu_kernels
from msllm.mail import Mail
from msllm.model import model as model_lib
from msllm.model.attention.dispatch import get_backend
from msllm.model.model import bind
from msllm.model.relays import Columns, columns_of
from msllm.streams import NEVER, Relay, StreamSpec, TokenSet, make_cells, positions
from msllm.training import train
from msllm.view import flow as view

NAMES = ("user", "thought", "output", "tool", "system")
STREAMS, ROWS, VOCAB, SILENCE = 5, 8, 32, 3
# Tokens that pass an edge: none of the last four is in a set.
SETS = (TokenSet("some", (0, 1, 2, *range(4, 20))), TokenSet("few", (4, 9, 27)))
STOPPED = (28, 29, 30, 31)
# The number of graphs that are compiled for each backend and for decoding, a few CPU-seconds each.
COMPILED = int(os.environ.get("MSLLM_FLOW_GRAPHS", 12))
OPTIONS = {
    "reference": {},
    "chunked": {"block_cells": 6},
    **({"cpu": {}} if cpu_kernels.unavailable_reason() is None else {}),
}
BACKENDS = {name: get_backend(name).with_options(**options) for name, options in OPTIONS.items()}


def spec_of(lag, token_lag=(), kinds=(), skip_silence=False, passing=()):
    """A StreamSpec from matrices; `kinds` by default an input, a thought, an output, two inputs."""
    size = len(lag)
    kinds = tuple(kinds or ("input", "thought", "output", "input", "input")[:size])
    weights = tuple(float(kind != "input") for kind in kinds)

    def matrix(lags):
        return tuple(tuple(int(x) for x in row) for row in lags)

    return StreamSpec(
        NAMES[:size],
        kinds,
        weights,
        matrix(lag),
        skip_silence,
        (0,) * size,
        matrix(token_lag),
        passing=passing,
    )


@st.composite
def graphs(draw, least=2, most=STREAMS, with_rules=False):
    """A StreamSpec with a mix of missing edges, latent edges and edges through tokens.

    `with_rules`: with rules of mail and of combination.
    """
    size = draw(st.integers(least, most))
    lag, token_lag = np.full((2, size, size), NEVER)
    passing = []
    for reader, source in itertools.product(range(size), repeat=2):
        rows = draw(st.integers(0, 3))
        if reader == source:
            lag[reader, source] = draw(st.sampled_from([rows, rows, NEVER]))
            continue
        medium = draw(st.sampled_from(["never", "never", "latent", "tokens", "tokens", "set"]))
        if medium != "never":
            (lag if medium == "latent" else token_lag)[reader, source] = rows
        if medium == "set":
            passing.append((reader, source, draw(st.sampled_from(SETS))))
    kinds = draw(
        st.lists(st.sampled_from(("input", "thought", "output")), min_size=size).map(
            lambda kinds: [*kinds[: size - 1], "output"]
        )
    )
    has_edges = (token_lag < NEVER).any()
    token_lag, hidden = token_lag if has_edges else (), draw(st.booleans())
    spec = spec_of(lag, token_lag, kinds, hidden, tuple(passing))
    pairs = [
        (reader, source)
        for reader, source in itertools.permutations(range(size), 2)
        if with_rules and kinds[reader] == "input"
    ]
    mail = tuple(
        Mail(*pair, draw(st.integers(1, 3)), (range(0, ROWS),))
        for pair in pairs
        if draw(st.integers(0, 2)) == 0
    )
    combine = tuple(
        Combine(s, "mixture", tuple(draw(st.permutations(range(size)))[: draw(st.integers(1, 2))]))
        for s, kind in enumerate(kinds)
        if with_rules and kind != "input" and draw(st.integers(0, 2)) == 0
    )
    return dataclasses.replace(spec, mail=mail, combine=combine)


def first_rows(spec, generated):
    """[source, reader]: the rows until a token of the source changes the reader's logits.

    Searches row by row which cells a change in row 0 reaches. -1: none.
    """
    size = spec.size
    rows = (3 + 1) * size + 1  # more than any path without a loop takes
    token, hidden, logits = np.zeros((3, rows, size, size), bool)  # [row, source, stream]
    token[0] = np.eye(size, dtype=bool)
    for row in range(rows):
        if generated and row:
            chosen = np.array([kind != "input" for kind in spec.kinds])
            token[row] |= logits[row - 1] & chosen
        for rule in spec.mail if generated else ():
            if row >= rule.lag:
                token[row, :, rule.reader] |= token[row - rule.lag, :, rule.source]
        hidden[row] |= token[row]
        for _ in range(size):
            for reader, source in itertools.product(range(size), repeat=2):
                for seen, lags in ((hidden, spec.lag_array), (token, spec.token_lag_array)):
                    last = row - int(lags[reader, source])
                    if last >= 0:
                        hidden[row, :, reader] |= seen[: last + 1, :, source].any(0)
        logits[row] = hidden[row]
        for rule in spec.combine:
            logits[row, :, rule.stream] |= hidden[row][:, list(rule.sources)].any(1)
    return np.where(logits.any(0), logits.argmax(0), -1)


@pytest.mark.parametrize("generated", [True, False])
@hypothesis.settings(max_examples=200)
@hypothesis.given(spec=graphs(with_rules=True))
def test_rows_equal_those_of_a_search_over_cells(generated, spec):
    expected = first_rows(spec, generated)
    found = flow.certificate(spec, VOCAB, generated=generated)
    for a, b in itertools.permutations(range(spec.size), 2):
        rows = -1 if found.flows[a][b] is None else found.flows[a][b].rows
        assert rows == expected[a, b], (spec, a, b)


def least_cut(spec, source, reader, generated, bits):
    """The bits of the cheapest set of tokens and relays without which no path is left.

    Tries all sets. `bits` are those of the elements: ("token", stream) and ("relay", source, the
    tokens that pass). None: none cuts.
    """
    size = spec.size
    edges = [(("seen", s), ("hidden", s)) for s in range(size)]
    edges += [(("token", s), ("seen", s)) for s in range(size)]
    edges += [(("hidden", s), ("logits", s)) for s in range(size)]
    edges += [
        (("hidden", s), ("logits", rule.stream)) for rule in spec.combine for s in rule.sources
    ]
    if generated:
        chosen = [s for s in range(size) if spec.kinds[s] != "input"]
        edges += [(("logits", s), ("token", s)) for s in chosen]
        edges += [(("seen", rule.source), ("token", rule.reader)) for rule in spec.mail]
    sets = {(b, a): one.tokens for b, a, one in spec.passing}
    for b, a in itertools.product(range(size), repeat=2):
        if spec.lag_array[b, a] < NEVER:
            edges.append((("hidden", a), ("hidden", b)))
        if spec.token_lag_array[b, a] < NEVER:
            relay = ("relay", a, sets.get((b, a)))
            edges += [(("seen", a), relay), (relay, ("hidden", b))]
    best = None
    for removed in itertools.chain.from_iterable(
        itertools.combinations(bits, count) for count in range(len(bits) + 1)
    ):
        left = [edge for edge in edges if edge[0] not in removed]
        reached = {("token", source), ("hidden", source)}
        while more := {b for a, b in left if a in reached} - reached:
            reached |= more
        cost = sum(bits[element] for element in removed)
        if ("logits", reader) not in reached and (best is None or cost < best):
            best = cost
    return best


@pytest.mark.parametrize("generated", [True, False])
@hypothesis.settings(max_examples=60)
@hypothesis.given(spec=graphs(most=4, with_rules=True))
def test_bits_are_those_of_the_smallest_cut(generated, spec):
    bits = {("token", s): math.log2(VOCAB + 1) for s in range(spec.size)}
    for _, source, one in spec.passing:  # with silence and an absent cell
        bits["relay", source, one.tokens] = math.log2(len(one.tokens) + 2)
    found = flow.certificate(spec, VOCAB, generated=generated)
    for a, b in itertools.permutations(range(spec.size), 2):
        one, expected = found.flows[a][b], least_cut(spec, a, b, generated, bits)
        if expected is None:
            assert one.medium == "latent" and one.bits is None and one.cut == ()
        elif expected == 0:
            assert one is None
        else:
            assert one.medium == "tokens" and one.bits == pytest.approx(expected)
            assert one.cut and one.path[0] == NAMES[a] and one.path[-1] == NAMES[b]


def perturbed(spec, stream, tokens, present, first):
    """Other tokens of one stream from row `first` on, some silent and some absent."""
    rng = np.random.default_rng(stream)
    changed, there = tokens.copy(), present.copy()
    rows = changed[:, first:, stream]
    changed[:, first:, stream] = (rows + rng.integers(1, VOCAB, rows.shape)) % VOCAB
    changed[:, first + 2, stream] = SILENCE
    there[:, first + 3, stream] ^= True
    return changed, there


def tables(seed=0):
    """tokens [1, ROWS, STREAMS] and present."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (1, ROWS, STREAMS)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.2] = SILENCE
    return tokens, rng.random(tokens.shape) > 0.1


def check_stopped(spec, logits, tokens, present):
    """Tokens that pass none of a stream's edges may be any others of the kind.

    What they can still reach is what the stream influences if these edges are cut.
    """
    checked = 0
    for source in range(spec.size):
        edges = [(r, s) for r, s, _ in spec.passing if s == source]
        if not edges:
            continue
        token_lag = spec.token_lag_array
        token_lag[tuple(zip(*edges))] = NEVER
        cut = dataclasses.replace(spec, token_lag=tuple(map(tuple, token_lag.tolist())), passing=())
        found = flow.certificate(cut, VOCAB, generated=False)
        one, other = tokens.copy(), tokens.copy()
        one[..., 1::2, source], other[..., 1::2, source] = STOPPED[0], STOPPED[2]
        differs = (logits(one, present) != logits(other, present)).any(-1).reshape(-1, spec.size)
        for reader in range(spec.size):
            if reader != source and found.flows[source][reader] is None:
                assert not differs[:, reader].any(), (spec, source, reader)
                checked += 1
    return checked


class Seen:
    """Counts the influences that a certificate allows and that a test has seen."""

    def __init__(self):
        self.allowed = self.seen = self.excluded = 0

    def check(self, spec, found, logits, changed, source, first):
        """Compares logits [..., T, S, V] before and after a change of `source` in row `first`.

        What the certificate excludes must not change by a bit.
        """
        differs = (logits != changed).any(-1).reshape(-1, ROWS, logits.shape[-2]).any(0)
        for reader in range(spec.size):
            one = found.flows[source][reader]
            if reader == source:
                continue
            begin = ROWS if one is None else min(first + one.rows, ROWS)
            assert not differs[:begin, reader].any(), (spec, source, reader, one)
            self.excluded += one is None
            if begin < ROWS - 1:
                self.allowed += 1
                self.seen += differs[begin:, reader].any()


def layers(make_model, spec, **settings):
    """A model of three layers with the streams of a spec."""
    model = make_model(spec.size, vocab_size=VOCAB, num_layers=3, remat="none", **settings)
    return dataclasses.replace(model, streams=spec)


# A layout with a relay for each stream and set, so that one compiled model serves all graphs.
RELAYS = [Relay(s, tokens) for tokens in (None, *(x.tokens for x in SETS)) for s in range(STREAMS)]


def padded_lag(spec):
    """The lags of STREAMS streams and RELAYS: those of the spec, and others are isolated."""
    at = [*range(spec.size), *(STREAMS + RELAYS.index(relay) for relay in spec.relays)]
    size = STREAMS + len(RELAYS)
    lag = np.full((size, size), NEVER, np.int32)
    lag[np.ix_(at, at)] = columns_of(spec, 1).lag
    return lag


@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_what_is_excluded_changes_no_bit_of_the_forward(name, make_model, monkeypatch):
    """For 200 graphs. The lags are an argument, so that the model is compiled once."""
    whole = spec_of(np.zeros((STREAMS, STREAMS)))
    model = layers(make_model, whole)
    passes = np.ones((len(RELAYS), VOCAB + 1), bool)
    for relay, (_, tokens) in enumerate(RELAYS):
        passes[relay] = tokens is None or np.isin(np.arange(VOCAB + 1), tokens)
    sources = tuple(relay.source for relay in RELAYS)
    layout = Columns(STREAMS, len(RELAYS), sources, None, passes)
    segment = jnp.ones((1, ROWS), jnp.int32)

    @jax.jit
    def run(tokens, present, silent, lag):
        monkeypatch.setattr(model_lib, "local_columns", lambda spec: layout._replace(lag=lag))
        bound = bind(model.graph, model.parameters)
        cells = make_cells(present, segment, silent)
        hidden = bound(tokens, cells, positions(segment), BACKENDS[name], SILENCE)
        return bound.logits(hidden)

    seen, stopped, (tokens, present) = Seen(), [], tables()

    @hypothesis.settings(max_examples=200)
    @hypothesis.given(spec=graphs(), first=st.integers(0, 3))
    def check(spec, first):
        found, lag = flow.certificate(spec, VOCAB, generated=False), padded_lag(spec)

        def logits(tokens, present):
            silent = (tokens == SILENCE) & spec.skip_silence
            return np.asarray(run(tokens, present, silent, lag))[..., : spec.size, :]

        base = logits(tokens, present)
        for source in range(spec.size):
            changed = logits(*perturbed(spec, source, tokens, present, first))
            seen.check(spec, found, base, changed, source, first)
        stopped.append(check_stopped(spec, logits, tokens, present))

    check()
    assert seen.excluded > 300 and seen.seen > 0.9 * seen.allowed > 300 and sum(stopped) > 100


COMPILED_GRAPHS = hypothesis.settings(max_examples=COMPILED, phases=[hypothesis.Phase.generate])


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_excluded_changes_no_bit_of_a_compiled_forward(name, make_model):
    """With the relays and the lags that the model makes from its streams."""
    seen, (tokens, present) = Seen(), tables()

    @COMPILED_GRAPHS
    @hypothesis.given(spec=graphs(least=3))
    def check(spec):
        model = layers(make_model, spec)

        @jax.jit
        def run(tokens, present):
            segment = jnp.ones((1, ROWS), jnp.int32)
            batch = {"tokens": tokens, "present": present, "segment": segment}
            bound = bind(model.graph, model.parameters)
            return bound.logits(bound.read(batch, SILENCE, BACKENDS[name]))

        def logits(tokens, present):
            return np.asarray(run(tokens[..., : spec.size], present[..., : spec.size]))

        base, found = logits(tokens, present), flow.certificate(spec, generated=False)
        for source in range(spec.size):
            changed = logits(*perturbed(spec, source, tokens, present, 2))
            seen.check(spec, found, base, changed, source, 2)
        check_stopped(spec, logits, tokens, present)

    check()
    assert seen.excluded and seen.seen > 0.8 * seen.allowed > 0


@pytest.mark.slow
def test_what_is_excluded_changes_no_bit_of_decoding(make_model):
    """With given tokens, and when the model chooses the tokens of all streams but inputs."""
    given, free = Seen(), Seen()
    tokens, other = tables()[0][0], tables(1)[0][0]

    @COMPILED_GRAPHS
    @hypothesis.given(spec=graphs(least=3))
    def check(spec):
        model = layers(make_model, spec)
        engine = Engine(model, window=ROWS, all_logits=True, silence_id=SILENCE)

        def logits(forced):
            with engine.open(prefill=tokens[:1, : spec.size]) as session:
                for stream in range(spec.size):
                    session.force(stream, forced[:, stream].tolist())
                # The logits of a row are those from which its tokens were chosen.
                return np.array([session.step().logits for _ in range(ROWS)])

        chosen = np.array([kind != "input" for kind in spec.kinds])
        for generated, seen in ((False, given), (True, free)):
            forced = np.where(chosen & generated, FREE, tokens[:, : spec.size])
            found = flow.certificate(spec, VOCAB, generated=generated)
            base = logits(forced)
            for source in range(spec.size):
                changed = forced.copy()
                changed[:2, source] = other[:2, source]
                changed[0, source] = (tokens[0, source] + 1) % VOCAB
                if chosen[source] and generated:
                    # Any token but the one that the model chooses.
                    changed[0, source] = (base[0, source].argmax() + 1) % VOCAB
                    changed[1:, source] = FREE
                # Row 0 of the forced tokens is read for the logits of row 1.
                seen.check(spec, found, base, logits(changed), source, 1)
        check_stopped(spec, lambda tokens, _: logits(tokens), tokens[:, : spec.size], None)

    check()
    assert given.excluded and free.excluded
    assert given.seen > 0.8 * given.allowed > 0 and free.seen > 0.6 * free.allowed > 0


@pytest.fixture
def run_command(monkeypatch):
    """`msllm.cli.main.main` in a process that has started jax."""
    monkeypatch.setenv("PJRT_NPROC", "1")
    return main


@hypothesis.given(spec=graphs(with_rules=True))
def test_latent_influence_is_that_of_the_certificate(spec):
    found, latent = flow.certificate(spec, VOCAB), flow.latent_influence(spec)
    for a, b in itertools.permutations(range(spec.size), 2):
        one = found.flows[a][b]
        assert latent[a, b] == (one is not None and one.medium == "latent")


def test_a_silence_penalty_tells_no_stream_of_inputs_that_it_may_not_know(make_model):
    model = dataclasses.replace(make_model(4), streams=streams(**DOOR))
    engine = Engine(model, window=4, silence_id=SILENCE)
    message = (
        "silence_penalty follows the timing of the input 'tool', which stream 'plan' does not see"
        " over latent edges"
    )
    with pytest.raises(UserError, match=message):
        engine.open(DecodeOptions(silence_penalty=(0, 0, 1, 0)))
    with engine.open(DecodeOptions(silence_penalty=1, penalty_start=2)) as session:
        with pytest.raises(UserError, match="of the input 'user', which stream 'output' does not"):
            session.options = DecodeOptions(silence_penalty=(0, 0, 0, 1))
        session.options = DecodeOptions(silence_penalty=(1, 1, 0, 0))  # of inputs: no effect
    # All other edges are latent, so each stream may learn of the tool.
    never = dataclasses.replace(model, streams=streams(lags=(("output", "tool", "never"),)))
    Engine(never, window=4, silence_id=SILENCE).open(DecodeOptions(silence_penalty=1))


def streams(**settings):
    """The spec of a user, a tool, a plan and an output with settings of StreamsConfig."""
    return StreamSpec.from_config(
        StreamsConfig(
            names=("user", "tool", "plan", "output"),
            kinds=("input", "input", "thought", "output"),
            **settings,
        )
    )


# The plan sees the user alone, and the output sees the tool and what the plan says.
DOOR = {
    "visibility": "isolated",
    "lags": (
        ("plan", "user", "1"),
        ("output", "tool", "0"),
        ("output", "plan", "2 tokens"),
    ),
}


def test_a_plan_behind_a_door():
    found = flow.certificate(streams(**DOOR), 4095)
    assert {(a, b): str(one) for a, b, one in found.pairs() if one} == {
        ("user", "plan"): "latent, 1 row",
        ("tool", "output"): "latent, 0 rows",
        ("plan", "output"): "12.0 bits, 2 rows",
        (
            "user",
            "output",
        ): "12.0 bits, 4 rows",  # 1 to the plan, 1 until it speaks, 2 to the output
    }
    assert found.flow("user", "output").path == ("user", "plan", "output")
    assert found.flow("user", "output").cut == ("plan",)
    given = flow.certificate(streams(**DOOR), 4095, generated=False)
    assert given.flow("user", "output") is None and given.flow("plan", "output").rows == 2
    assert flow.summary(streams(**DOOR), 4096) == [
        "flow: no influence: user -> tool, tool -> user, tool -> plan, plan -> user, plan -> tool,"
        " output -> user and 2 more",
        "flow: through tokens only, at most 12.1 bits a row: user -> output, plan -> output",
        "flow: more than the edge between them: user -> output through plan (12.1 bits)",
    ]


def test_bits_are_bounded_by_the_tokens_that_pass_and_add_up_over_paths():
    spec = streams(
        visibility="isolated",
        lags=(
            ("plan", "user", "1"),
            ("output", "plan", "1 tokens"),
            ("output", "user", "1 tokens"),
        ),
    )
    one = flow.certificate(spec, 15).flow("user", "output")
    assert one.bits == 8 and one.cut == ("user", "plan")
    edges = (("output", "user", "1 tokens:two"), ("output", "plan", "1 tokens:six"))
    sets = {"two": ("yes", "no"), "six": tuple(range(6))}
    alone = {"visibility": "isolated", "token_sets": sets}
    spec = streams(lags=(("plan", "user", "1"), *edges), **alone)
    assert flow.certificate(spec, 15).flow("user", "output").bits == 2 + 3
    # With few tokens of the plan, the vocabulary may be unknown.
    only = streams(lags=(("plan", "user", "1"), ("output", "plan", "1 tokens")), **alone)
    assert flow.certificate(only).flow("user", "output").bits is None
    only = streams(lags=(("plan", "user", "1"), edges[1]), **alone)
    assert flow.certificate(only).flow("user", "output").bits == 3
    # Two readers share a relay if they see the same tokens.
    both = (edges[1], ("tool", "plan", "0 tokens:six"), ("output", "tool", "1 tokens"))
    found = flow.certificate(streams(lags=(("plan", "user", "1"), *both), **alone), 255)
    assert found.flow("plan", "output").bits == 3


def test_mail_passes_what_a_stream_said():
    mail = (("tool", "plan", "2", "5:"),)
    spec = streams(
        visibility="isolated", lags=(("plan", "user", "0"), ("output", "tool", "1")), mail=mail
    )
    one = flow.certificate(spec, 15).flow("user", "output")
    # Row 0 to the plan, 1 until it speaks, 2 in the mail, 1 from the tool to the output.
    assert str(one) == "4.0 bits, 4 rows" and one.path == ("user", "plan", "tool", "output")
    assert flow.certificate(spec, 15, generated=False).flow("user", "output") is None
    assert flow.summary(spec, 15)[-1] == (
        "flow: more than the edge between them: user -> tool through plan (4.0 bits),"
        " user -> output through plan, tool (4.0 bits), plan -> output through tool (4.0 bits)"
    )
    html = view.page("x", spec, 15)
    assert 'class="mail" d=' in html and "tool gets mail from plan, lag 2 rows" in html


def test_a_missing_edge_does_not_hide_a_path():
    """The tool's hidden states reach the output through those of the user, which is an input."""
    spec = streams(lags=(("output", "tool", "never"), ("plan", "tool", "3 tokens")))
    assert flow.certificate(spec, 9).flow("tool", "output").medium == "latent"
    assert flow.summary(spec, 9) == [
        "flow: more than the edge between them: tool -> plan through user (latent),"
        " tool -> output through user (latent)"
    ]
    assert flow.summary(streams(), 9) == []


def test_the_command_prints_a_table_and_writes_a_page(run_command, capsys, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "from msllm.config import Config, StreamsConfig, to_config_dict\n"
        "def get_config():\n"
        f"    streams = StreamsConfig(names={streams().names}, kinds={streams().kinds}, **{DOOR})\n"
        "    return to_config_dict(Config(streams=streams))\n"
    )
    page, values = tmp_path / "page.html", tmp_path / "flow.json"
    line = ["flow", f"--config={config}", "--config.model.vocab_size=4095"]
    assert run_command([*line, f"--html={page}", f"--json={values}"]) == 0
    text = capsys.readouterr().out
    header, *rows = [re.split(r"  +", row.strip()) for row in text.splitlines()[2:7]]
    assert header == ["source \\ reader", *streams().names]
    assert rows[0] == ["user", "-", "never", "latent, 1 row", "12.0 bits, 4 rows"]
    assert rows[3] == ["output", "never", "never", "never", "-"]
    assert text.endswith("these pairs have no influence either:\n  user -> output\n")

    stored = json.loads(values.read_text())
    assert stored["vocab_size"] == 4095 and len(stored["given"]) == len(stored["generated"]) == 12
    by_pair = {(one["source"], one["reader"]): one for one in stored["generated"]}
    assert by_pair["plan", "output"]["bits"] == 12 and by_pair["plan", "output"]["rows"] == 2
    assert by_pair["output", "plan"] == {
        "source": "output",
        "reader": "plan",
        "influence": False,
    }

    html = page.read_text()
    assert "<script" not in html and html.count("marker-end") == 3
    assert html.count('class="tokens" d=') == 2  # an arrow and the legend
    assert "output sees plan through tokens, lag 2 rows" in html
    assert 'title="user → plan → output">12.0 bits<small>4 rows</small>' in html

    assert run_command(line[:2]) == 0
    text = capsys.readouterr().out
    assert "tokens, 4 rows" in text and "unknown before the data is prepared" in text
    assert run_command([*line[:2], "--config.streams.visibility=block_causal"]) == 0
    assert "latent, 1 row  latent, 1 row" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "give either --config=FILE or --checkpoint=DIR"),
        (("--config=configs/quickstart.py", "--checkpoint=runs/x"), "give either --config=FILE"),
        (("--config.optim.lr=1",), "--config.optim.lr=1 overrides a setting of a config: give"),
    ],
)
def test_errors_of_the_command(run_command, capsys, arguments, message):
    assert run_command(["flow", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_names_are_shown_safely():
    spec = dataclasses.replace(streams(**DOOR), names=("<b>", "a\x1b[1m", "plan", "output"))
    html = view.page("x", spec, 8)
    assert "&lt;b&gt;" in html and ">never influences" not in html and "<b> " not in html
    assert "\x1b" not in html and "\x1b" not in view.text(spec, 8)


def test_the_tokens_that_pass_are_named():
    sets = {"yes/no": ("yes", "no"), "one": (7,)}
    lags = (("output", "plan", "2 tokens:yes/no"), ("output", "tool", "0 tokens:one"))
    spec = streams(visibility="isolated", lags=lags, token_sets=sets)
    assert view.text(spec).endswith(
        "Edges that only some tokens pass, besides silence:\n"
        "  tool -> output: one, 1 token\n  plan -> output: yes/no, 2 tokens"
    )
    assert re.search(r"plan +never +never +- +2.0 bits, 2 rows\n", view.text(spec))
    html = view.page("x", spec)
    assert "output sees plan through tokens of yes/no, lag 2 rows" in html
    assert ">yes/no</text>" in html and "<li>plan -&gt; output: yes/no, 2 tokens</li>" in html
    assert flow.as_json(spec)["passing"] == [
        {"source": "tool", "reader": "output", "set": "one", "tokens": [7]},
        {"source": "plan", "reader": "output", "set": "yes/no", "tokens": ["no", "yes"]},
    ]
    assert "only some tokens" not in view.text(streams()) + view.page("x", streams())


def test_evaluate_prints_the_certificate_of_restricted_streams(
    loaded, run_command, capsys, monkeypatch
):
    def stop(*_):
        raise UserError("stopped")

    monkeypatch.setattr("msllm.evals.by_turn.evaluate", stop)
    never = StreamSpec.from_config(
        StreamsConfig(loaded.streams.names, loaded.streams.kinds, visibility="isolated")
    )
    for model in (loaded, loaded.with_streams(lag=never.lag)):
        monkeypatch.setattr("msllm.cli.evaluate.load_model", lambda flags, model=model: model)
        assert run_command(["evaluate", "--checkpoint=x"]) == 2
        lines = capsys.readouterr().out.splitlines()
        assert lines == flow.summary(model.streams, model.config.vocab_size)
    assert lines and lines[0].startswith("flow: no influence: user -> thought, ")


def test_training_logs_the_certificate_of_restricted_streams(
    data_dir, tmp_path, caplog, monkeypatch
):
    def stop(*_):
        raise UserError("stopped")

    monkeypatch.setattr("msllm.training.compile_step", stop)
    caplog.set_level("INFO", "msllm")
    lags = (("output", "user", "2 tokens:sum"),)
    sets = {"sum": ("plus", "minus", 9)}
    config = dictation(**{"data.dir": data_dir, "streams.lags": lags, "streams.token_sets": sets})
    with pytest.raises(UserError, match="stopped"):
        train(config, tmp_path)
    lines = [line for line in caplog.messages if line.startswith("flow: ")]
    assert lines == [
        "flow: more than the edge between them: user -> output through thought (latent)"
    ]
    # The config of the run holds the ids of the tokens that pass.
    stored = json.loads((tmp_path / "config.json").read_text())["streams"]["token_sets"]
    assert list(stored) == ["sum"] and 9 in stored["sum"] and len(stored["sum"]) == 3
    assert all(type(token) is int for token in stored["sum"])


def test_mail_is_a_path_through_tokens_that_exists_in_generation_only():
    config = StreamsConfig(
        names=("a", "b", "c"),
        kinds=("input", "output", "input"),
        visibility="isolated",
        lags=(("b", "a", "1"),),
        mail=(("c", "b", "2", "4:"),),
    )
    spec = StreamSpec.from_config(config)
    found = flow.certificate(spec, 15)
    # One row until b sees a, one until b has said its next token, and two until c gets it.
    influence = found.flow("a", "c")
    assert (influence.rows, influence.medium, influence.bits, influence.cut) == (
        4,
        "tokens",
        4.0,
        ("b",),
    )
    assert found.flow("c", "b") is None
    assert flow.certificate(spec, 15, generated=False).flow("b", "c") is None
