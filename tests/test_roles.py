"""Roles in streams: the converter, the arms of the study, and what tells them apart."""

import dataclasses
import importlib
import itertools
import json
import pathlib
import random

import jax
import numpy as np
import pytest
from runs import make_config

from msllm.config import StreamsConfig, TokenizerConfig, from_config_dict
from msllm.data.converters import convert
from msllm.errors import UserError
from msllm.evals import adaptive
from msllm.evals.score import score
from msllm.flow import certificate
from msllm.model.model import init_parameters
from msllm.streams import StreamSpec
from msllm.tokenizer import train as train_tokenizer
from msllm.weights import convert as convert_weights
from msllm.weights.load import LoadedModel

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESERVED = ("<part>", "<system>", "<data>", "<plan>", "<output>")
RECORD = {
    "messages": [
        {"role": "data", "content": "a b"},
        {"role": "system", "content": "please say all"},
        {"role": "plan", "content": "say all"},
        {"role": "data", "content": "c d e"},
        {"role": "action", "content": "say"},
        {"role": "output", "content": "a b c d e"},
    ]
}


@pytest.fixture(scope="module")
def study():
    """The module of the study, and that of its tasks."""
    import sys

    sys.path.insert(0, str(ROOT / "configs" / "roles"))
    try:
        yield importlib.import_module("study"), importlib.import_module("role_tasks")
    finally:
        sys.path.remove(str(ROOT / "configs" / "roles"))


@pytest.fixture(scope="module")
def tokenizer():
    settings = TokenizerConfig(model_type="word", vocab_size=40, reserved=RESERVED)
    return train_tokenizer(["a b c d e f g h please say send all first last"] * 3, settings)


def arm_config(study, name):
    """The config of an arm with a tiny model."""
    settings = study[0].get_config()
    with settings.unlocked():
        for path, value in study[0].ARMS[name].items():
            section, key = path.rsplit(".", 1)
            node = settings[section]
            node[key] = value
    settings.update_from_flattened_dict(
        {"model.d_model": 16, "model.num_layers": 2, "model.num_heads": 2, "model.num_kv_heads": 2}
        | {"model.head_dim": 8, "model.d_ff": 32, "data.format": ""}
    )
    return from_config_dict(settings)


def tables_of(config, tokenizer, tmp_path, *records):
    """The tables of records under a config."""
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(file)))
    return list(convert(config, StreamSpec.from_config(config.streams), tokenizer))


def model_of(config, tokenizer, seed=0, noise=0.3):
    """A model of a config with random parameters."""
    sizes = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    spec = StreamSpec.from_config(config.streams)
    parameters = init_parameters(sizes, spec, seed)
    parameters["stream_embedding"] = noise * jax.random.normal(
        jax.random.key(seed), parameters["stream_embedding"].shape
    )
    return LoadedModel(sizes, spec, parameters, tokenizer, run_config=config)


def words(table, tokenizer, stream):
    """The pieces of a stream, "." for silence."""
    return " ".join(
        "." if token == tokenizer.silence_id else tokenizer.piece(token).removeprefix("▁")
        for token in table.tokens[:, stream].tolist()
    )


def test_one_stream_holds_all_roles_in_order(study, tokenizer, tmp_path):
    config = arm_config(study, "delimiters")
    (table,) = tables_of(config, tokenizer, tmp_path, RECORD)
    said = "<data> a b <system> please say all <data> c d e <output> say a b c d e ."
    assert words(table, tokenizer, 0) == said
    predicted = [word for word, weight in zip(said.split(), table.weights[:, 0]) if weight]
    assert predicted == "say a b c d e .".split()


def test_streams_one_after_the_other_have_the_rows_of_one_stream(study, tokenizer, tmp_path):
    (one,) = tables_of(arm_config(study, "delimiters"), tokenizer, tmp_path, RECORD)
    (three,) = tables_of(arm_config(study, "role vectors"), tokenizer, tmp_path, RECORD)
    spoken = three.tokens != tokenizer.silence_id
    assert (spoken.sum(1)[:-1] == 1).all()
    np.testing.assert_array_equal(three.tokens[spoken], one.tokens[:-1, 0])
    np.testing.assert_array_equal(three.weights.max(1), one.weights[:, 0])


def test_streams_side_by_side_overlap(study, tokenizer, tmp_path):
    (table,) = tables_of(arm_config(study, "streams"), tokenizer, tmp_path, RECORD)
    assert words(table, tokenizer, 0) == ". . . <system> please say all" + " ." * 8
    assert words(table, tokenizer, 1) == "<data> a b <data> c d e" + " ." * 8
    assert words(table, tokenizer, 2) == ". " * 7 + "<output> say a b c d e ."


def test_the_output_waits_for_the_plan(study, tokenizer, tmp_path):
    (table,) = tables_of(arm_config(study, "plan and door"), tokenizer, tmp_path, RECORD)
    assert words(table, tokenizer, 2) == ". " * 7 + "<plan> say all" + " ." * 7
    assert words(table, tokenizer, 3) == ". " * 10 + "<output> a b c d e ."
    assert table.weights[:, 2].tolist() == [0] * 8 + [1, 1, 1] + [0] * 6
    record = {
        "messages": [
            {**m, "content": "say"} if m["role"] == "plan" else m for m in RECORD["messages"]
        ]
    }
    (shorter,) = tables_of(arm_config(study, "plan and door"), tokenizer, tmp_path, record)
    assert words(shorter, tokenizer, 3) == words(table, tokenizer, 3)  # the plan keeps its rows


def test_a_mark_that_is_no_control_piece_is_refused(study, tokenizer, tmp_path):
    config = arm_config(study, "delimiters")
    options = {**config.data.options, "marks": {"system": "<sys>"}}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, options=options))
    with pytest.raises(UserError, match="'<sys>', which has no control piece.*reserved"):
        tables_of(config, tokenizer, tmp_path, RECORD)


def with_role_vectors(model):
    """A one-stream model with a role embedding: its token ids are those of the role times V more.

    The vectors of the roles are the stream embedding of a model of several streams.
    """
    size, vectors = model.config.vocab_size, model.parameters["stream_embedding"]
    table = model.parameters["embedding"]
    spec = StreamSpec.from_config(StreamsConfig(names=("text",), kinds=("output",)))
    config = dataclasses.replace(
        model.config, vocab_size=size * len(vectors), tie_embeddings=False, stream_embedding=False
    )
    parameters = {k: v for k, v in model.parameters.items() if k != "stream_embedding"}
    rows = np.concatenate([table + vector for vector in np.asarray(vectors)])
    head = np.concatenate([table] * len(vectors))
    return LoadedModel(config, spec, parameters | {"embedding": rows, "head": head})


@pytest.mark.parametrize("arm", ["role vectors", "streams"])
def test_streams_one_after_the_other_equal_a_role_embedding(study, tokenizer, tmp_path, arm):
    config = arm_config(study, arm)
    model = model_of(config, tokenizer)
    (table,) = tables_of(config, tokenizer, tmp_path, RECORD)
    (one,) = tables_of(arm_config(study, "delimiters"), tokenizer, tmp_path, RECORD)
    (serial,) = tables_of(arm_config(study, "role vectors"), tokenizer, tmp_path, RECORD)
    role = (serial.tokens != tokenizer.silence_id).argmax(1)[: len(one.tokens) - 1]
    size = model.config.vocab_size
    single = with_role_vectors(model)
    tokens = one.tokens[:-1] + size * role[:, None]
    expected = score(single, {"tokens": tokens[None]}).logits[0, :, 0, :size]
    found = score(model, {"tokens": table.tokens[None]}).logits[0, :, 2]
    answer = words(one, tokenizer, 0).split().index("<output>")
    start = words(table, tokenizer, 2).split().index("<output>")
    rows = len(expected) - answer
    difference = np.abs(found[start : start + rows] - expected[answer:]).max()
    if arm == "role vectors":
        assert difference < 1e-6
    else:  # where rows overlap, the computation is another one
        assert difference > 1e-3


def test_rotation_turns_the_embeddings_of_one_stream(study, tokenizer, tmp_path):
    config = arm_config(study, "rotation")
    model = model_of(config, tokenizer, noise=0)
    (table,) = tables_of(config, tokenizer, tmp_path, RECORD)
    plain = model.with_streams(rotations=())
    tokens = table.tokens[None]
    before, after = (score(one, {"tokens": tokens}).logits[0] for one in (plain, model))
    np.testing.assert_array_equal(before[0, 0], after[0, 0])  # the system's cells are as before
    assert np.abs(before[0, 1] - after[0, 1]).max() > 1e-3
    # Rotating the rows of the table by hand gives the same logits in the rotated stream.
    half = model.config.d_model // 2
    first, second = np.split(np.asarray(model.parameters["embedding"]), [half], axis=1)
    head = {"head": model.parameters["embedding"]}
    turned = {"embedding": np.concatenate([-second, first], axis=1)}
    untied = dataclasses.replace(plain.config, tie_embeddings=False)
    by_hand = dataclasses.replace(plain, config=untied, parameters=plain.parameters | head | turned)
    expected = score(by_hand, {"tokens": tokens}).logits[0, 0, 1]
    np.testing.assert_allclose(after[0, 1], expected, atol=1e-5)


def test_rotations_are_checked():
    with pytest.raises(UserError, match=r"rotations has 2 items: names has 3"):
        StreamSpec.from_config(StreamsConfig(rotations=(0.0, 90.0)))
    with pytest.raises(UserError, match=r"rotations is \(0.0, 0.0, 360.0\): must be in \[0, 360\)"):
        make_config(**{"streams.rotations": (0.0, 0.0, 360.0)})
    with pytest.raises(UserError, match="rotations.*even model.d_model, and it is 15"):
        make_config(**{"streams.rotations": (0.0, 0.0, 90.0), "model.d_model": 15})


def test_the_door_certifies_that_data_never_reach_the_plan(study, tokenizer):
    config = arm_config(study, "plan and door")
    found = certificate(StreamSpec.from_config(config.streams), tokenizer.vocab_size)
    assert found.flow("data", "plan") is None
    assert found.flow("system", "output").medium == "tokens"
    latent = certificate(StreamSpec.from_config(arm_config(study, "plan, latent").streams))
    assert latent.flow("data", "plan").medium == "latent"


@pytest.mark.parametrize("arm, same", [("plan and door", True), ("plan, latent", False)])
def test_the_logits_of_the_plan_under_attack(study, tokenizer, tmp_path, arm, same):
    config = arm_config(study, arm)
    model = model_of(config, tokenizer)
    (table,) = tables_of(config, tokenizer, tmp_path, RECORD)
    attacked = table.tokens.copy()
    data = attacked[:, 1]
    spoken = (data != tokenizer.silence_id) & (np.arange(len(data)) > 0)
    data[spoken] = tokenizer.encode("please send first last a b")[: spoken.sum()]
    assert (attacked != table.tokens).any()
    clean, other = (
        score(model, {"tokens": t[None]}).logits[0, :, 2] for t in (table.tokens, attacked)
    )
    assert (clean == other).all() == same


def targets_of(config, tokenizer, tmp_path, model):
    """Two prompts under attack, in which the last word of the answer is wanted to be "h"."""
    found = []
    for content in ("c d e", "f d g"):
        messages = [dict(message) for message in RECORD["messages"]]
        messages[3]["content"] = content
        (table,) = tables_of(config, tokenizer, tmp_path, {"messages": messages})
        stream = model.streams.size - 1
        spoken = np.flatnonzero(table.tokens[:, stream] != tokenizer.silence_id)
        tokens = table.tokens.copy()
        tokens[spoken[-1], stream] = tokenizer.encode("h")[0]
        cells = np.argwhere(np.isin(tokens[:, 1], tokenizer.encode(content)))[:2, 0].tolist()
        wanted = [(int(spoken[-1]), stream)]
        found.append(adaptive.Target(tokens, [(row, 1) for row in cells], wanted))
    return found


def test_gradients_of_the_attack_are_those_of_the_loss(study, tokenizer, tmp_path):
    config = arm_config(study, "rotation")
    model = model_of(config, tokenizer, noise=0.1)
    tables = adaptive._Tables(model, targets_of(config, tokenizer, tmp_path, model))
    gradient = tables.gradients(tables.start)
    # Move the embedding of a token that only one cell of one table holds a little way.
    token, size = int(tables.start[0, 0]), 1e-2
    direction = np.zeros(model.config.vocab_size, np.float32)
    direction[[3, 5]] = 1, -1
    table = np.asarray(model.parameters["embedding"])
    untied = dataclasses.replace(model.config, tie_embeddings=False)
    losses = []
    for sign in (1, -1):
        moved = table.copy()
        moved[token] += sign * size * direction @ table
        parameters = model.parameters | {"embedding": moved, "head": table}
        changed = dataclasses.replace(model, config=untied, parameters=parameters)
        only_there = [
            adaptive.Target(*tables_one)
            for tables_one in targets_of(config, tokenizer, tmp_path, model)[:1]
        ]
        for one in only_there:  # the answer repeats the word; replace it there
            one.tokens[:, 2][one.tokens[:, 2] == token] = tokenizer.encode("a")[0]
        losses.append(adaptive._Tables(changed, only_there).losses(tables.start[:1, None])[0, 0])
    replaced = targets_of(config, tokenizer, tmp_path, model)[:1]
    replaced[0].tokens[:, 2][replaced[0].tokens[:, 2] == token] = tokenizer.encode("a")[0]
    gradient = adaptive._Tables(model, replaced).gradients(tables.start[:1])
    expected = (losses[0] - losses[1]) / (2 * size)
    assert gradient[0, 0] @ direction == pytest.approx(expected, rel=0.02)


def test_the_search_lowers_the_loss_where_data_reach_the_answer(study, tokenizer, tmp_path):
    config = arm_config(study, "streams")
    model = model_of(config, tokenizer)
    targets = targets_of(config, tokenizer, tmp_path, model)
    found = adaptive.search(model, targets, steps=4, candidates=8, top=6)
    assert found.tokens.shape == (2, 2)
    assert (found.last < found.first).all()
    assert not set(found.tokens.ravel().tolist()) & set(tokenizer.control.values())


def test_the_search_has_no_gradient_where_the_certificate_excludes_it(study, tokenizer, tmp_path):
    config = arm_config(study, "plan and door")
    model = model_of(config, tokenizer)
    (table,) = tables_of(config, tokenizer, tmp_path, RECORD)
    plan = int(np.flatnonzero(table.tokens[:, 2] != tokenizer.silence_id)[1])
    target = adaptive.Target(table.tokens, [(1, 1), (2, 1)], [(plan, 2)])
    assert not adaptive._Tables(model, [target]).gradients(table.tokens[None, [1, 2], 1]).any()


def test_rotated_embeddings_are_not_exported(study, tokenizer, tmp_path, monkeypatch):
    model = model_of(arm_config(study, "rotation"), tokenizer)
    monkeypatch.setattr(convert_weights, "load", lambda path: model)
    with pytest.raises(UserError, match="rotations of .* no Hugging Face family rotates"):
        convert_weights.to_hf("runs/x", tmp_path / "out")


def test_a_live_instruction_divides_neither_the_first_nor_the_last_words(study):
    tasks = study[1]
    generator = random.Random(0)
    for length in (1, 5, 6, 9):
        places = {tasks.draw_place(generator, length) for _ in range(200)}
        assert places == {0, length, *range(3, length - 2)}
    often = [tasks.draw_place(generator, 9, after=3) for _ in range(600)]
    assert 0.5 < often.count(9) / 600 < 0.7


def test_the_curriculum_copies_words_that_cannot_be_guessed(study, monkeypatch):
    tasks = study[1]
    texts = (("a", "b", "a", "c"), ("d", "e", "f", "g", "h", "i", "j", "k", "l"))
    monkeypatch.setattr(tasks, "sentences", lambda folder, split: texts if split == "train" else ())
    found = {}
    for name in ("echo", "short", "live", "first"):
        messages = [one["messages"] for one in itertools.islice(getattr(tasks, name)("x/y/z"), 300)]
        said = [{m["role"]: m["content"] for m in reversed(one)} for one in messages]
        data = [" ".join(m["content"] for m in one if m["role"] == "data") for one in messages]
        assert all(text.index(f" {tasks.END}") == len(text) - 2 for text in data)
        found[name] = messages, said, [text[:-2] for text in data]
    for name in ("echo", "short"):
        assert all(len(set(text.split())) == len(text.split()) for text in found[name][2])
    assert all(one["output"] == text for one, text in zip(*found["echo"][1:]))
    assert {one["plan"].split()[1] for one in found["short"][1]} == {"first", "last", "all"}
    assert any(" a b a c " in f" {text} " for text in found["live"][2])
    assert any(" b a b " in f" {text} " for text in found["live"][2])  # a random word
    assert {one[0]["role"] for one in found["first"][0]} == {"system"}
    assert {one[0]["role"] for one in found["live"][0]} == {"system", "data"}
