"""Loss weights of cells: from records to the loss, and what equals what."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import (
    assert_same_parameters,
    four_streams,
    host,
    make_config,
    make_program,
    metrics,
    place,
    random_tables,
    replace,
    reproducible_metrics,
    stop_after,
)

from msllm import step as step_lib
from msllm.config import (
    Config,
    DataConfig,
    MixtureConfig,
    StreamsConfig,
    TokenizerConfig,
    VaryConfig,
)
from msllm.data import converters, records
from msllm.data.converters import convert
from msllm.data.converters.layout import each_record
from msllm.data.global_batch import to_devices
from msllm.data.loader import Loader
from msllm.data.packing import Packer
from msllm.data.prepare import prepare
from msllm.data.report import describe
from msllm.data.tables import Placement, Table, loss_weights, unpack
from msllm.errors import UserError
from msllm.evals.by_turn import evaluate as by_turn_evaluate
from msllm.evals.likelihood import evaluate
from msllm.loss import targets_and_weights
from msllm.streams import StreamSpec
from msllm.tokenizer import train as train_tokenizer
from msllm.training import train
from msllm.weights.load import load

STREAMS = StreamsConfig(names=("user", "output"), kinds=("input", "output"))
SPEC = StreamSpec.from_config(STREAMS)
TOKENIZER = train_tokenizer(["abcdefgh"] * 9, TokenizerConfig(model_type="char", vocab_size=16))
VOCAB = TOKENIZER.vocab_size


def chat(*messages):
    """A record from (role, content, weight or None)."""
    return {
        "messages": [
            {"role": role, "content": content} | ({} if weight is None else {"weight": weight})
            for role, content, weight in messages
        ]
    }


def make(folder, chats, streams=STREAMS, **data):
    """A config for records, in a file, with a tokenizer of one token per character."""
    path, model = folder / "in.jsonl", folder / "tokenizer.model"
    path.write_text("".join(json.dumps(record) + "\n" for record in chats))
    model.write_bytes(TOKENIZER.to_bytes())
    settings = {"eval_percent": 0.0, "rows": 24, "batch_size": 2, "converter": "chat"} | data
    tokenizer = TokenizerConfig(path=str(model))
    return Config(streams=streams, data=DataConfig(path=str(path), tokenizer=tokenizer, **settings))


def converted(config):
    return list(convert(config, StreamSpec.from_config(config.streams), TOKENIZER))


def open_loader(config, out, split="train"):
    spec = StreamSpec.from_config(config.streams)
    return Loader(replace(config, "data", dir=str(out)).data, split, spec)


def weights_of(table):
    """The loss weights of a table. Without weights, all are 1."""
    return np.ones(table.tokens.shape) if table.weights is None else table.weights


# From records to batches.


@pytest.mark.parametrize("silence", [0, 3])
def test_drawn_silence_around_a_message_keeps_the_weight_1(tmp_path, silence):
    record = chat(("output", "c", None), ("user", "ab", 0))
    (table,) = converted(make(tmp_path, [record], options={"silence": silence}))
    begin = 1 + silence
    rows = range(begin, begin + 3)
    assert table.weights[:, 0].tolist() == [int(r not in rows) for r in range(len(table.tokens))]


def test_the_weight_of_a_message_is_that_of_its_cells_and_of_the_silence_that_ends_it(tmp_path):
    record = chat(("user", "ab", 0), ("output", "cd", 0), ("user", "e", None), ("output", "f", 2.5))
    (table,) = converted(make(tmp_path, [record], options={"overlap": 0}))
    user, output = table.weights.T.tolist()
    assert table.weights.dtype == np.float32
    # rows: 0 a, 1 b, 2 c, 3 d, 4 e, 5 f
    assert user[:6] == [0, 0, 0, 1, 1, 1]
    assert output[:7] == [1, 1, 0, 0, 0, 2.5, 2.5]
    assert set(user[6:]) | set(output[7:]) <= {1}


def test_a_message_that_begins_at_once_keeps_its_own_weight():
    table = Table(np.zeros((4, 1), np.int32), np.ones((4, 1), bool))
    placements = [Placement(0, 2, [5]), Placement(0, 0, [5, 5]), Placement(0, 2, [])]
    assert loss_weights(table, placements, [1, 0, 7]).weights[:, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("flags", [{"weight": 1}, {"train": True, "loss": 1}, {"weight": None}])
def test_weights_of_one_are_no_weights(tmp_path, flags):
    message = {"role": "output", "content": "abc", **flags}
    config = make(tmp_path, [{"messages": [message]}] * 3)
    assert all(table.weights is None for table in converted(config))
    manifest = prepare(config, tmp_path / "out")
    assert manifest["format"] == 1 and "excluded" not in manifest["splits"]["train"]
    assert open_loader(config, tmp_path / "out").batch(0).keys() == {"tokens", "present", "segment"}
    (shard,) = (tmp_path / "out").glob("train-*")
    assert b"weights" not in records.Reader([str(shard)])[0]


def test_calls_results_and_reasoning_have_the_weight_of_their_message(tmp_path):
    names = ("user", "call", "result", "thought", "output")
    streams = StreamsConfig(names=names, kinds=("input", "output", "input", "thought", "output"))
    call = {"id": "1", "function": {"name": "a", "arguments": "b"}}
    record = {
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "output",
                "content": "cd",
                "reasoning": "e",
                "tool_calls": [call],
                "train": False,
            },
            {"role": "tool", "tool_call_id": "1", "content": "f", "weight": 3},
        ]
    }
    options = {"roles": {"reasoning": "thought"}}
    config = make(tmp_path, [record], streams, converter="tools", options=options)
    (table,) = converted(config)
    found = {name: set(table.weights[:, s].tolist()) for s, name in enumerate(names)}
    assert found == {
        "user": {1},
        "call": {1, 0},
        "result": {1, 3},
        "thought": {1, 0},
        "output": {1, 0},
    }


def test_a_call_of_sharegpt_keeps_its_weight(tmp_path):
    names = ("user", "call", "result", "output")
    streams = StreamsConfig(names=names, kinds=("input", "output", "input", "output"))
    call = {"from": "function_call", "value": '{"name": "a", "arguments": "b"}', "weight": 0}
    config = make(
        tmp_path,
        [{"conversations": [{"from": "human", "value": "c"}, call]}],
        streams,
        converter="tools",
    )
    (table,) = converted(config)
    assert set(table.weights[:, 1].tolist()) == {0, 1}


def test_ready_made_tables_have_weights(tmp_path):
    cells = {"user": "ab", "output": ["", "c", "d"]}
    weights = {"output": [1, False, 0.25]}
    config = make(tmp_path, [{"streams": cells, "weights": weights}], converter="tables")
    (table,) = converted(config)
    assert table.weights.tolist() == [[1, 1], [1, 0], [1, 0.25]]
    for bad, message in (
        ({"output": [1]}, "must be a list of 3 numbers"),
        ({"x": [1] * 3}, "unknown stream 'x'"),
        ({"output": [1, 1, -1]}, "the weight of output, row 2 is -1"),
        ([1], "'weights' is"),
    ):
        config = make(tmp_path, [{"streams": cells, "weights": bad}], converter="tables")
        with pytest.raises(UserError, match=message):
            converted(config)


@pytest.mark.parametrize(
    "weights, message",
    [
        (np.ones((3, 2)), ""),
        (np.array([[True, False]] * 3), ""),
        (np.ones((2, 3), np.float32), "weights of shape"),
        (-np.ones((3, 2), np.float32), "weight -1.0: must be finite"),
        (np.full((3, 2), 1e300), "weight inf: must be finite"),
        (np.full((3, 2), np.nan), "weight nan: must be finite"),
        ([[1, 1]] * 3, "weights that are no array"),
        (np.full((3, 2), "a"), "weights that are no array"),
    ],
)
def test_weights_of_any_converter_are_checked(tmp_path, monkeypatch, weights, message):
    def own(layout, record):
        table = layout.table([layout.say("output", 0, "abc")], "x", closed=False)
        yield table._replace(weights=weights)

    own.__module__ = "own"
    own = converters.Converter(each_record(own), options=None)
    monkeypatch.setattr(converters, "get_converter", lambda *_: (own, {}))
    config = make(tmp_path, [{}])
    if message:
        with pytest.raises(UserError, match=f"yields .*{message}"):
            converted(config)
        return
    (table,) = converted(config)
    if weights.all():
        assert table.weights is None
    else:
        assert table.weights.dtype == np.float32
        np.testing.assert_array_equal(table.weights, weights)


MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(SPEC.names),
        st.text("abcd", max_size=5),
        st.sampled_from([None, None, True, False, 0, 1, 2, 0.5]),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=10, deadline=None)
@given(
    chats=st.lists(MESSAGES, min_size=1, max_size=6),
    delays=st.sampled_from([(0, 0), (0, 2), (1, 0)]),
    pause=st.sampled_from([0.0, 40.0]),
)
def test_every_cell_keeps_its_weight_to_the_batch(tmp_path_factory, chats, delays, pause):
    folder = tmp_path_factory.mktemp("weights")
    streams = StreamsConfig(names=STREAMS.names, kinds=STREAMS.kinds, delays=delays)
    vary = VaryConfig(pause_percent=pause)
    plain = [chat(*[(role, text, None) for role, text, _ in messages]) for messages in chats]
    without = converted(make(folder, plain, streams))
    config = make(folder, [chat(*messages) for messages in chats], streams, rows=64, vary=vary)
    tables = converted(config)
    for table, other, messages in zip(tables, without, chats, strict=True):
        assert (table.weights is None) == all(w in (None, 1) for _, text, w in messages if text)
        if not pause:  # weights change no cell
            # The number of closing rows depends on the record.
            rows = max(min(len(table.tokens), len(other.tokens)) - 3 - max(delays), 0)
            np.testing.assert_array_equal(table.tokens[:rows], other.tokens[:rows])
    if all(len(table.tokens) < 2 for table in tables):
        return
    manifest = prepare(config, folder / "out")
    loader = open_loader(config, folder / "out")
    assert loader.has_weights == any(table.weights is not None for table in tables)
    assert manifest["format"] == 1 + loader.has_weights
    found = {}
    for step in range(2 * loader.num_batches):  # an epoch and more
        examples = unpack(loader.batch(step), loader.example_ids(step))
        found |= {table.example: table for table in examples}
    for table in tables:
        if len(table.tokens) > 1:
            packed = found[table.example]
            np.testing.assert_array_equal(packed.tokens, table.tokens)
            np.testing.assert_array_equal(weights_of(packed), weights_of(table))


def test_prepared_data_say_which_cells_have_weights(tmp_path):
    config = make(tmp_path, [chat(("user", "ab", 0), ("output", "cd", 2))] * 2)
    manifest = prepare(config, tmp_path / "out")
    part = manifest["splits"]["train"]
    assert part["excluded"] == {"user": 6, "output": 0}
    assert part["weighted"] == {"user": 0, "output": 6}
    text = describe(manifest)
    assert "user: 4 tokens" in text and "6 cells of loss weight 0" in text
    assert "6 cells of other loss weights than 1" in text
    # An earlier version, which would train without the weights, refuses the format.
    assert manifest["format"] == 2 and records.FORMAT == 1


def test_a_source_without_weights_has_weights_of_one_in_a_mixture(tmp_path):
    dirs = []
    for name, weight in (("a", None), ("b", 0)):
        (tmp_path / name).mkdir()
        config = make(tmp_path / name, [chat(("output", "abcdefgh" * 2, weight))] * 4)
        prepare(config, tmp_path / name / "out")
        dirs.append(str(tmp_path / name / "out"))
    mixture = MixtureConfig(tuple(dirs), ("a", "b"), (1.0, 1.0))
    config = replace(config, "data", mixture=mixture)
    loader = Loader(config.data, "train", SPEC)
    batch, sources = loader.batch(0), loader.sources(0)
    assert sorted(sources) == [0, 1]
    for source, weights in zip(sources, batch["weights"]):
        assert (weights == 0).any() == (source == 1)
    part = loader.batch(0, range(1, 2))
    np.testing.assert_array_equal(part["weights"], batch["weights"][1:])


# From batches to gradients.

WEIGHTS = (0.0, 1.0, 0.5, 2.0)
OPTIONS = {"streams.loss_weights": WEIGHTS, "optim.lr": 1e-2, "model.attention": "reference"}


@functools.cache
def program(weighted=True, devices=1, options=(), **axes):
    config = four_streams(**OPTIONS | dict(options))
    return make_program(config, devices, weighted=weighted, **axes)


def random_weights(tables, seed=0):
    """Tables with random loss weights; a third of them is 0."""
    rng = np.random.default_rng(seed)
    drawn = np.where(
        rng.random(tables["tokens"].shape) < 0.3, 0, rng.uniform(0.1, 3, tables["tokens"].shape)
    )
    return tables | {"weights": drawn.astype(np.float32)}


def step(program, tables):
    """(metrics, parameters) after one step."""
    state, metrics = program.step(program.init(), place(program, tables))
    return host(metrics), host(state.parameters)


def assert_equal(result, expected, **tolerance):
    def same(path, found, wanted):
        name = jax.tree_util.keystr(path)
        if tolerance:
            np.testing.assert_allclose(found, wanted, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(found, wanted, err_msg=name)

    jax.tree_util.tree_map_with_path(same, result, expected)


def test_weights_multiply_those_of_streams_and_zero_is_not_counted():
    tables = random_weights(random_tables(four_streams()))
    targets, counted, weights = targets_and_weights(tables, WEIGHTS)
    plain = {name: x for name, x in tables.items() if name != "weights"}
    same_targets, all_counted, stream_weights = targets_and_weights(plain, WEIGHTS)
    of_target = np.zeros_like(tables["weights"])
    of_target[:, :-1] = tables["weights"][:, 1:]
    np.testing.assert_array_equal(targets, same_targets)
    np.testing.assert_array_equal(counted, all_counted & (of_target > 0))
    np.testing.assert_array_equal(weights, stream_weights * of_target)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_fast")
def test_weights_of_one_change_no_bit():
    tables = random_tables(four_streams())
    ones = np.ones(tables["tokens"].shape, np.float32)
    expected = step(program(weighted=False), tables)
    assert_equal(step(program(), tables | {"weights": ones}), expected)
    assert_equal(step(program(), tables), expected)  # tables of a source without weights


@pytest.mark.slow
@pytest.mark.usefixtures("compile_fast")
def test_a_cell_of_weight_0_is_no_target(monkeypatch):
    tables = random_weights(random_tables(four_streams()))
    tables["weights"] = (tables["weights"] > 0).astype(np.float32)
    tables["weights"][:, -1] = 0
    result = step(program(), tables)
    plain = {name: x for name, x in tables.items() if name != "weights"}
    mask = np.zeros(tables["tokens"].shape, bool)
    mask[:, :-1] = tables["weights"][:, 1:] > 0
    with monkeypatch.context() as patch:
        masked = functools.partial(targets_and_weights, loss_mask=mask)
        patch.setattr(step_lib, "targets_and_weights", masked)
        expected = step(make_program(four_streams(**OPTIONS)), plain)
    assert_equal(result, expected)
    # The tokens of the last row are targets only: no gradient depends on those of weight 0.
    changed = tables["tokens"].copy()
    changed[:, -1] = np.where(tables["present"][:, -1], 2 + changed[:, -1] % 7, 0)
    (metrics, parameters), (other_metrics, other_parameters) = (
        result,
        step(program(), tables | {"tokens": changed}),
    )
    assert_equal(other_parameters, parameters)
    assert metrics["loss"] == other_metrics["loss"]
    assert metrics["targets"].sum() == (targets_and_weights(tables, WEIGHTS)[2] > 0).sum()


@pytest.mark.slow
@pytest.mark.usefixtures("compile_fast")
def test_the_loss_is_the_weighted_mean():
    tables = random_weights(random_tables(four_streams()))
    machine = program()
    parameters = host(machine.init().parameters)
    sums = host(machine.evaluate(parameters, place(machine, tables)))
    # The losses of single cells, as the change of the sum when their weight is taken away.
    b, t, s = np.argwhere(np.asarray(targets_and_weights(tables, WEIGHTS)[2]) > 0)[5]
    without = {name: x.copy() for name, x in tables.items()}
    without["weights"][b, t + 1, s] = 0
    other = host(machine.evaluate(parameters, place(machine, without)))
    weight = WEIGHTS[s] * tables["weights"][b, t + 1, s]
    nll = sums["nll"][s] - other["nll"][s]  # of the targets of a weight above 0, not weighted
    assert sums["loss"] - other["loss"] == pytest.approx(weight * nll, rel=2e-2)
    assert sums["weight"] - other["weight"] == pytest.approx(weight, rel=1e-3)
    assert sums["targets"][s] - other["targets"][s] == 1
    metrics, _ = step(machine, tables)
    assert metrics["loss"] == pytest.approx(sums["loss"] / sums["weight"], rel=1e-5)
    assert metrics["cells"] == tables["present"].sum()  # all cells are read


@pytest.mark.slow
@pytest.mark.usefixtures("compile_fast")
def test_packed_examples_equal_the_same_examples_alone():
    config = four_streams(**OPTIONS | {"data.batch_size": 2})
    machine = make_program(config, weighted=True)
    rng = np.random.default_rng(3)
    singles = []
    for rows in (9, 7):
        shape = (rows, 4)
        singles.append(
            Table(
                rng.integers(2, 32, shape).astype(np.int32),
                np.ones(shape, bool),
                "0",
                weights=rng.integers(0, 3, shape).astype(np.float32),
            )
        )

    def sums(groups):
        packed = []
        for group in groups:
            packer = Packer(16)
            packed += [out for table in group for out in packer.add(table)] + packer.finish()
        batch = {
            name: np.stack([getattr(table, name) for table in packed])
            for name in ("tokens", "present", "segment", "weights")
        }
        while len(batch["tokens"]) < 2:
            batch = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in batch.items()}
        return host(machine.evaluate(parameters, place(machine, batch)))

    parameters = host(machine.init().parameters)
    together, alone = sums([singles]), sums([[singles[0]], [singles[1]]])
    assert_equal(together, alone, rtol=1e-5)
    assert 0 < together["targets"].sum() < 4 * 14


@pytest.mark.slow
@pytest.mark.usefixtures("compile_fast")
@pytest.mark.parametrize(
    "axes, options",
    [
        ({"data": 2, "fsdp": 2, "stream": 2}, {}),
        ({"stream": 4, "tensor": 2}, {}),
        ({"data": 8}, {"data.batch_size": 16, "optim.accumulate": 2}),
    ],
)
def test_a_mesh_and_micro_batches_compute_what_one_device_computes(axes, options):
    whole = program(options=tuple((k, v) for k, v in options.items() if k != "optim.accumulate"))
    tables = random_weights(random_tables(whole.config))
    expected = step(whole, tables)
    machine = program(devices=8, options=tuple(options.items()), **axes)
    state = jax.device_put(host(whole.init()), machine.state_shardings)
    state, metrics = machine.step(state, place(machine, tables))
    assert_equal((host(metrics), host(state.parameters)), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_weights_are_not_dropped_by_a_program_without_them():
    machine = program(weighted=False)
    with pytest.raises(ValueError, match="made without weights"):
        to_devices(machine.abstract_batch, random_weights(random_tables(machine.config)))


# Runs.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A config of a run on chats with weights: what the model must not learn has weight 0."""
    folder = tmp_path_factory.mktemp("run")
    asked = ["".join(letters) for letters in itertools.product("ab", repeat=5)]
    chats = [
        chat(("user", text, None), ("output", "cd"[j] * 3, j), ("output", "e", 0.5))
        for text in asked
        for j in range(2)
    ]
    made = make(folder, chats, eval_percent=20.0)
    prepare(made, folder / "out")
    return make_config(
        **{
            "streams.names": SPEC.names,
            "streams.kinds": SPEC.kinds,
            "data.dir": str(folder / "out"),
            "data.rows": 24,
            "data.batch_size": 8,
            "data.eval_percent": 20.0,
            "steps": 30,
            "eval_every": 10,
            "checkpoint.every": 5,
            "log_every": 1,
            "optim.lr": 1e-2,
        }
    )


@pytest.mark.slow
def test_a_run_trains_with_weights_continues_and_evaluates(prepared, tmp_path, monkeypatch):
    train(prepared, tmp_path / "all")
    with monkeypatch.context() as patch:
        stop_after(patch, 12)
        train(prepared, tmp_path / "stopped")
    train(prepared, tmp_path / "stopped")
    assert reproducible_metrics(tmp_path / "stopped") == reproducible_metrics(tmp_path / "all")
    assert_same_parameters(tmp_path / "stopped", tmp_path / "all")
    last = metrics(tmp_path / "all")[-1]
    # The answers "ccc" have weight 0: the model has learnt that "ddd" follows.
    assert last["eval/loss"] < 1
    model = load(tmp_path / "all")
    loader = open_loader(prepared, prepared.data.dir, "eval")
    expected, spoken = np.zeros(2), 0
    for step in range(loader.num_batches):
        targets, counted, _ = map(np.asarray, targets_and_weights(loader.batch(step), (1.0, 1.0)))
        expected += counted.sum((0, 1))
        spoken += (counted & (targets != loader.tokenizer.silence_id))[..., 1].sum()
    by_turn = by_turn_evaluate(model)
    assert [(one.stream, one.tokens) for one in by_turn] == [("output", spoken)]
    units = evaluate(model)
    np.testing.assert_array_equal(units.targets.sum(0), expected)
    assert last["eval/nll/output"] == pytest.approx(
        units.nll.sum(0)[1] / units.targets.sum(0)[1], rel=1e-4
    )
