"""Mixtures: shares of tokens, batches, settings that are refused, and runs.

The shares are exact at any step and for any number of hosts. Each source has its own held-out
split.
"""

import dataclasses
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import (
    assert_same_batch,
    assert_same_parameters,
    concatenate,
    dictation,
    metrics,
    replace,
    reproducible_metrics,
    stop_after,
    table_keys,
)

from msllm.config import DataConfig, MixtureConfig, StreamsConfig, from_config_dict
from msllm.data.loader import Loader
from msllm.data.mixture import Plan, Turns, by_source
from msllm.data.prepare import prepare
from msllm.errors import UserError
from msllm.evals.exact_match import evaluate
from msllm.hooks import mean_losses
from msllm.metrics import weighted_mean
from msllm.sharding import make_mesh
from msllm.step import Program
from msllm.streams import StreamSpec
from msllm.training import train
from msllm.weights.load import load

WEIGHTS = st.lists(st.integers(0, 1000).map(lambda x: x / 1000), min_size=1, max_size=8).filter(any)


@given(
    weights=WEIGHTS,
    tables=st.lists(st.integers(1, 9999), min_size=8, max_size=8),
    begin=st.integers(0, 10**12),
)
def test_turns_are_exact_at_any_index(weights, tables, begin):
    """Also after 10^12 tables, where sums of floats would be wrong."""
    shares = [Fraction(repr(w)) / n for w, n in zip(weights, tables)]
    turns, total, size = Turns(shares), sum(shares), len(shares)
    counts = turns.counts(begin)
    for index in range(begin, begin + 200):
        source, before = turns.turn(index)
        assert before == counts[source] and shares[source] > 0
        counts[source] += 1
        assert counts == turns.counts(index + 1)
        # Sources are split in halves, and each split can be wrong by half a table.
        halvings = (size - 1).bit_length()
        for n, share in zip(counts, shares):
            assert abs(n - share / total * (index + 1)) <= Fraction(halvings, 2)


def manifest(tables, **tokens):
    """The counts of a manifest: tables, and tokens of each stream."""
    return {"splits": {"train": {"tables": tables, "tokens": tokens}}}


def plan(weights, manifests, batch_size=8, schedule=(), streams=()):
    names = [f"s{i}" for i in range(len(manifests))]
    mixture = MixtureConfig(tuple(names), (), tuple(weights), schedule, streams)
    return Plan(DataConfig(batch_size=batch_size, mixture=mixture), dict(zip(names, manifests)))


@given(
    weights=st.lists(st.floats(0.001, 100), min_size=2, max_size=4),
    sizes=st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**9)), min_size=4, max_size=4),
    index=st.integers(0, 10**9),
)
def test_shares_of_tokens_are_within_a_table_of_the_target(weights, sizes, index):
    manifests = [
        manifest(tables, user=0, output=tokens) for tables, tokens in sizes[: len(weights)]
    ]
    counts = plan(weights, manifests).counts(index)
    assert sum(counts) == index
    per_table = [Fraction(tokens, tables) for tables, tokens in sizes]
    wanted = [Fraction(repr(w)) / mean for w, mean in zip(weights, per_table)]
    for n, share in zip(counts, wanted):
        assert abs(n - index * share / sum(wanted)) <= 1


def test_weights_count_the_tokens_of_chosen_streams():
    manifests = [manifest(10, user=100, output=100), manifest(10, user=300, output=50)]
    # Tables of 20 and 35 tokens: 1500 tables are 1500 * 7 / 11 and 1500 * 4 / 11.
    assert plan((1.0, 1.0), manifests).counts(1500) == [955, 545]
    assert plan((1.0, 1.0), manifests, streams=("output",)).counts(900) == [300, 600]
    assert plan((1.0, 1.0), manifests, streams=("user",)).counts(800) == [600, 200]
    assert plan((3.0, 1.0), manifests, streams=("user",)).counts(1000) == [900, 100]
    silent = [manifest(10, user=100, output=0), manifest(10, user=300, output=50)]
    rule = r"source 's0' .* has weight 1.0 and only silence in config.data.mixture.streams output"
    with pytest.raises(UserError, match=rule):
        plan((1.0, 1.0), silent, streams=("output",))
    assert plan((0.0, 1.0), silent, streams=("output",)).counts(9) == [0, 9]


def test_a_schedule_continues_each_source_where_it_stopped():
    alike = [manifest(10, output=100), manifest(20, output=200)]
    scheduled = plan((1.0, 0.0), alike, batch_size=4, schedule=((3, (0.5, 0.5)), (10, (1.0, 3.0))))
    places = [scheduled.place(i) for i in range(80)]
    for source in (0, 1):
        indices = [index for s, index in places if s == source]
        assert indices == list(range(len(indices)))
    sources = [source for source, _ in places]
    assert sources[:12] == [0] * 12 and sum(sources[12:40]) == 14 and sum(sources[40:80]) == 30
    assert scheduled.counts(80) == [80 - 44, 44] and scheduled.counts(12) == [12, 0]
    assert scheduled.targets(0) == scheduled.targets(2) == [1, 0]
    assert scheduled.targets(3) == scheduled.targets(9) == [0.5, 0.5]
    assert scheduled.targets(10) == [0.25, 0.75]
    assert scheduled.epochs(20) == [36 / 10, 44 / 20]


SPEC = StreamSpec.from_config(StreamsConfig())


@pytest.fixture(scope="session")
def directories(tmp_path_factory):
    """Three prepared directories, `first` and `second` with one tokenizer, `other` with another."""
    base = tmp_path_factory.mktemp("mixture")
    first = dictation(**{"data.options": {"examples": 200}})
    prepare(first, base / "first")
    given = dataclasses.replace(first.data.tokenizer, path=str(base / "first/tokenizer.model"))
    second = replace(first, "data", options={"examples": 90, "seed": 7}, tokenizer=given)
    prepare(second, base / "second")
    prepare(replace(first, "data", options={"examples": 40, "seed": 5}), base / "other")
    return base


def mixed(directories, names=("first", "second"), weights=(3.0, 1.0), **settings):
    """The config of a mixture of some of the directories."""
    dirs = tuple(str(directories / name) for name in names)
    return dictation(**{"data.mixture.dirs": dirs, "data.mixture.weights": weights, **settings})


@pytest.fixture
def config(directories):
    """Half of the tokens from each source. From step 5 on, 3/4 come from the second one.

    Only the tokens of the streams user and output count.
    """
    schedule = ((5, (1.0, 3.0)),)
    settings = {"data.mixture.schedule": schedule, "data.mixture.streams": ("user", "output")}
    return mixed(directories, weights=(1.0, 1.0), **settings)


def test_every_table_is_the_next_of_its_source(config):
    loader = Loader(config.data, "train", SPEC)
    alone = [Loader(data, "train", SPEC) for data in by_source(config.data).values()]
    assert list(by_source(config.data)) == ["first", "second"] == list(loader.manifests)
    orders = [[key for step in range(12) for key in table_keys(one.batch(step))] for one in alone]
    for step in range(12):
        batch, sources = loader.batch(step), loader.sources(step)
        assert table_keys(batch) == [orders[source].pop(0) for source in sources]
    assert loader.plan.counts(96) == [96 - len(order) for order in orders]


def test_the_seed_of_a_source_depends_on_its_name_and_the_seed_of_the_run(directories):
    def seeds(config):
        return {name: data.seed for name, data in by_source(config.data).items()}

    both = seeds(mixed(directories))
    assert both["first"] != both["second"]
    three = seeds(mixed(directories, ("second", "other", "first"), (1.0, 1.0, 1.0)))
    assert three.items() >= both.items()
    assert not both.items() & seeds(mixed(directories, **{"data.seed": 1})).items()


@settings(max_examples=10)
@given(step=st.integers(0, 40), hosts=st.sampled_from([2, 4, 8]))
def test_the_parts_of_all_hosts_are_the_batch(directories, step, hosts):
    config = mixed(directories, **{"data.mixture.schedule": ((7, (1.0, 1.0)),)})
    loader, size = Loader(config.data, "train", SPEC), 8 // hosts
    parts = [loader.batch(step, range(host * size, (host + 1) * size)) for host in range(hosts)]
    assert_same_batch(concatenate(parts), loader.batch(step))
    sources = [loader.sources(step, range(host * size, (host + 1) * size)) for host in range(hosts)]
    assert loader.sources(step) == sum(sources, [])
    for index, batch in enumerate(loader.iterate(range(step, step + 3)), step):
        assert_same_batch(batch, loader.batch(index))


def test_shares_of_the_tokens_in_batches(directories):
    """Counts the tokens of several epochs of the first source."""
    for streams in ((), ("thought",), ("user", "output")):
        loader = Loader(mixed(directories, **{"data.mixture.streams": streams}).data, "train", SPEC)
        columns = [SPEC.names.index(name) for name in streams or SPEC.names]
        counts = np.zeros(2)
        for step in range(60):
            batch = loader.batch(step)
            spoken = batch["present"] & (batch["tokens"] != loader.tokenizer.silence_id)
            counts += np.bincount(loader.sources(step), spoken[:, :, columns].sum((1, 2)), 2)
        assert counts[0] / counts.sum() == pytest.approx(0.75, abs=0.01)


def test_sources_that_do_not_fit_each_other_are_refused(directories, tmp_path):
    remedy = "prepare it with --config.data.tokenizer.path=.*first/tokenizer.model"
    remedy += " --config.data.tokenizer.silence="
    rule = "other was prepared with another tokenizer than .*first .sha256 is"
    with pytest.raises(UserError, match=f"{rule} .*{remedy}'<silence>'"):
        Loader(mixed(directories, ("first", "other")).data, "train", SPEC)
    long = dictation(**{"data.rows": 64})
    prepare(long, tmp_path / "long")
    with pytest.raises(UserError, match="config.data.rows is 32, but .*long was prepared with 64"):
        Loader(mixed(directories, ("first", tmp_path / "long")).data, "train", SPEC)
    delayed = StreamSpec.from_config(StreamsConfig(delays=(0, 1, 1)))
    with pytest.raises(
        UserError, match="config.streams.delays is .*, but .*first was prepared with"
    ):
        Loader(mixed(directories).data, "train", delayed)
    with pytest.raises(UserError, match="nowhere does not exist"):
        Loader(mixed(directories, ("first", "nowhere")).data, "train", SPEC)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weights": (1.0,)}, "weights must be 2 numbers, one per directory"),
        (
            {"weights": (0.0, 0.0)},
            r"config.data.mixture.weights is \(0.0, 0.0\): .* one of them positive",
        ),
        ({"weights": (1.0, float("nan"))}, "must be finite and at least 0"),
        ({"weights": (-1.0, 2.0)}, "must be at least 0"),
        ({"schedule": ((3, (1.0,)),)}, "config.data.mixture.schedule .* weights must be 2 numbers"),
        (
            {"schedule": ((3, (1.0, 1.0)), (3, (1.0, 1.0)))},
            "its steps must be positive and increase",
        ),
        ({"schedule": ((0, (1.0, 1.0)),)}, "its steps must be positive and increase"),
        (
            {"streams": ("output", "speech")},
            "config.data.mixture.streams .* must be among streams.names",
        ),
        ({"names": ("a",)}, "must be 2 names, one per directory"),
        ({"names": ("a", "a")}, "config.data.mixture.names is .*must be different"),
        ({"names": ("nll", "b")}, "other than nll and nll_spoken"),
        (
            {"dirs": ("x/a", "y/a")},
            r"names is \('a', 'a'\): must be different.*set data.mixture.names",
        ),
        ({"dirs": ()}, "needs data.mixture.dirs"),
    ],
)
def test_invalid_mixtures_are_refused(changes, message):
    valid = {"dirs": ("x/a", "y/b"), "weights": (1.0, 2.0)}
    assert from_config_dict({"data": {"mixture": valid}}).data.mixture.source_names == ("a", "b")
    with pytest.raises(UserError, match=message):
        from_config_dict({"data": {"mixture": valid | changes}})


@pytest.fixture
def uninterrupted(config, tmp_path_factory):
    """The workdir of a finished run of `config`, shared by all tests of a session. Read only."""
    workdir = tmp_path_factory.getbasetemp() / "uninterrupted_mixture"
    if not workdir.exists():
        train(replace(config, "mesh", data=2, fsdp=4), workdir)
    return workdir


@pytest.mark.slow
def test_a_run_logs_shares_and_evaluates_each_source(config, uninterrupted):
    lines = metrics(uninterrupted)
    steps = [line for line in lines if "loss" in line]
    loader = Loader(config.data, "train", SPEC)
    assert [line["mixture/second/target"] for line in steps] == [0.5] * 5 + [0.75] * 3
    tables = loader.manifests["second"]["splits"]["train"]["tables"]
    assert steps[-1]["mixture/second/epoch"] == loader.plan.counts(64)[1] / tables
    for line in steps:
        batch, sources = loader.batch(line["step"] - 1), np.array(loader.sources(line["step"] - 1))
        spoken = batch["present"] & (batch["tokens"] != loader.tokenizer.silence_id)
        said = spoken[:, :, [0, 2]].sum((1, 2))  # of user and output
        assert line["mixture/second/share"] == pytest.approx(said[sources == 1].sum() / said.sum())
        assert line["mixture/first/share"] + line["mixture/second/share"] == pytest.approx(1)
    evaluated = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [4, 8]
    for line in evaluated:
        for kind in ("loss", "loss_spoken", "nll/output", "nll_spoken/user"):
            parts = [line[f"eval/{name}/{kind}"] for name in ("first", "second")]
            assert parts[0] != parts[1]
            assert line[f"eval/{kind}"] == pytest.approx(np.mean(parts))


@pytest.mark.slow
def test_each_source_is_evaluated_on_its_own_split(config, uninterrupted, directories):
    loaded, line = load(uninterrupted), metrics(uninterrupted)[-1]
    for name in ("first", "second"):
        alone = replace(
            loaded.run_config, "data", dir=str(directories / name), mixture=MixtureConfig()
        )
        program = Program(alone, loaded.streams, make_mesh(alone.mesh), loaded.tokenizer.silence_id)

        def place(array, abstract):
            return jax.device_put(array, abstract.sharding)

        parameters = jax.tree.map(place, loaded.parameters, program.abstract_state.parameters)
        values = mean_losses(program, parameters, Loader(alone.data, "eval", SPEC))
        assert values["loss"] == pytest.approx(line[f"eval/{name}/loss"], rel=1e-5)


def test_weighted_mean_of_the_metrics_of_sources():
    """Metrics that a source of weight 0 alone has are left out."""
    parts = {
        "a": {"loss": 1.0, "nll/x": 2.0},
        "b": {"loss": 4.0},
        "c": {"loss": 100.0, "nll/y": 1.0},
    }
    assert weighted_mean(parts, {"a": 2.0, "b": 1.0, "c": 0.0}) == {"loss": 2.0, "nll/x": 2.0}


@pytest.mark.slow
def test_a_stopped_run_continues_bit_for_bit(config, uninterrupted, tmp_path, monkeypatch):
    config = replace(config, "mesh", data=2, fsdp=4)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert int(train(config, tmp_path).step) == 4
    train(config, tmp_path)
    assert reproducible_metrics(tmp_path) == reproducible_metrics(uninterrupted)
    assert_same_parameters(tmp_path, uninterrupted)


@pytest.mark.slow
def test_evaluate_needs_one_source(uninterrupted, directories):
    with pytest.raises(
        UserError, match="trained on a mixture of .*first, .*second: choose one, --data=DIR"
    ):
        evaluate(load(uninterrupted))
    assert evaluate(load(uninterrupted), str(directories / "second"), 2).examples == 2
