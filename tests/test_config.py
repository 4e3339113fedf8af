"""Configs: from a ConfigDict to the frozen Config and back, and messages for wrong settings."""

import copy
import dataclasses
import json
import math
import operator
import pathlib
import re
import runpy

import ml_collections
import numpy as np
import pytest
from hypothesis import given, strategies

from msllm import config as config_module
from msllm.config import (
    Config,
    StreamsConfig,
    code_named_by,
    default_config,
    from_config_dict,
    to_config_dict,
    to_json,
)
from msllm.errors import UserError
from msllm.streams import NEVER, StreamSpec

CONFIGS = sorted((pathlib.Path(__file__).resolve().parents[1] / "configs").glob("*.py"))


def settings(**dotted):
    """The default settings with changes; keys are dotted."""
    result = default_config()
    result.update_from_flattened_dict(dotted)
    return result


def test_round_trips():
    changed = {
        "steps": 7,
        "optim.lr": 0.5,
        "optim.no_decay": ("norm",),
        "streams.lags": (("output", "user", "never"), ("thought", "output", "2")),
        "data.options": {"examples": 5, "name": "x"},
        "model.rope_scaling.kind": "llama3",
    }
    config = from_config_dict(settings(**changed))
    assert config != Config()
    assert (config.steps, config.optim.lr, config.model.rope_scaling.kind) == (7, 0.5, "llama3")
    assert from_config_dict(to_config_dict(config)) == config
    assert from_config_dict(json.loads(to_json(config))) == config
    assert from_config_dict(default_config()) == Config() == from_config_dict({})
    with pytest.raises(AttributeError):
        config.steps = 8


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_is_valid(path, tmp_path, monkeypatch):
    module = runpy.run_path(str(path))
    if base := module.get("BASE"):  # the folder of an imported model
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match="import the model with `msllm convert`"):
            module["get_config"]()
        (tmp_path / base).mkdir(parents=True)
        (tmp_path / base / "config.json").write_text(to_json(Config()))
    settings = module["get_config"]()
    assert isinstance(settings, ml_collections.ConfigDict) and settings.is_locked
    config = from_config_dict(settings)
    assert StreamSpec.from_config(config.streams).size == len(config.streams.names)
    has_data = config.data.dir or config.data.mixture.dirs
    assert has_data or "--config.data.dir=" in module["__doc__"]  # users give their own data


def test_a_misspelt_key_raises():
    with pytest.raises(AttributeError, match='Did you mean "lr"'):
        default_config().optim.lrr = 1.0
    with pytest.raises(
        UserError, match=r"unknown config key config\.optim\.lrr: did you mean config\.optim\.lr\?"
    ):
        from_config_dict({"optim": {"lrr": 1.0}})
    with pytest.raises(UserError, match=r"unknown config key config\.zzz: known: steps, seed"):
        from_config_dict({"zzz": 1})


def numbers(value, path="", hints=None):
    """Yields the dotted path of every setting that is a number or holds numbers."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        name = f"{path}.{field.name}".removeprefix(".")
        if dataclasses.is_dataclass(inner):
            yield from numbers(inner, name)
        elif "int" in str(field.type) or "float" in str(field.type):
            yield name


def test_every_number_has_a_range():
    found = list(numbers(Config()))
    assert len(found) > 50 and set(found) == set(config_module._RANGES)


@pytest.mark.parametrize("path", [path for path in numbers(Config()) if "mixture" not in path])
def test_numbers_out_of_range_are_refused(path):
    default = operator.attrgetter(path)(Config())
    items = path in ("streams.loss_weights", "streams.delays", "data.vary.delays")
    low = float(config_module._RANGES[path][1:].split(",")[0])
    for wrong in (low - 1, math.nan, math.inf):
        if path == "data.max_examples" and wrong == math.inf:
            continue  # any number of examples may be used
        if not isinstance(default, float) and not items:
            wrong = int(min(wrong, 2.0**40)) if wrong == wrong else -(2**40)
        if isinstance(default, tuple):
            wrong = (wrong,) * (3 if items else 1)
        if path == "data.vary.delays":
            wrong = (wrong,)
        if path == "streams.token_sets":
            wrong = {"set": (wrong,)}
        with pytest.raises(UserError, match=rf"config\.{re.escape(path)} .*must be|expected int"):
            from_config_dict(settings(**{path: wrong}))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"steps": "7"}, "config.steps is '7': expected int, got str"),
        ({"steps": 7.0}, "config.steps is 7.0: expected int, got float"),
        ({"steps": True}, "config.steps is True: expected int, got bool"),
        ({"optim": {"lr": "1e-3"}}, "config.optim.lr is '1e-3': expected float, got str"),
        ({"model": {"qk_norm": 1}}, "config.model.qk_norm is 1: expected bool, got int"),
        ({"model": 3}, "config.model is 3: it is a section, set its keys instead"),
        ({"streams": {"names": "user"}}, "config.streams.names is 'user': expected a tuple"),
        (
            {"streams": {"delays": (1, "2")}},
            "config.streams.delays[1] is '2': expected int, got str",
        ),
        (
            {"streams": {"lags": (("a", "b"),)}},
            "config.streams.lags[0] is ('a', 'b'): expected 3 items",
        ),
    ],
)
def test_a_wrong_type_is_named(values, message):
    with pytest.raises(UserError) as error:
        from_config_dict(values)
    assert str(error.value) == message


def test_the_former_name_of_a_backend_is_read():
    former = from_config_dict({"model": {"attention": "native"}})
    assert former == from_config_dict({"model": {"attention": "cpu"}})
    assert json.loads(to_json(former))["model"]["attention"] == "cpu"


def test_an_integer_is_accepted_for_a_float():
    config = from_config_dict({"optim": {"lr": 1}, "streams": {"loss_weights": [0, 1, 2]}})
    assert type(config.optim.lr) is float and config.streams.loss_weights == (0.0, 1.0, 2.0)


@pytest.mark.parametrize(
    "key, value, rule",
    [
        ("model.compute_dtype", "float16", "must be one of float32, bfloat16"),
        (
            "model.attention",
            "flash",
            "must be one of auto, splash, gpu, cpu, chunked, reference",
        ),
        ("model.remat", "some", "must be one of none, dots, full"),
        ("model.rope_scaling.kind", "dynamic", "must be one of none, linear, llama3, yarn"),
        ("model.rope_scaling.factor", 0.0, "must be positive"),
        ("optim.schedule", "step", "must be one of cosine, wsd, constant"),
        ("data.tokenizer.model_type", "wordpiece", "must be one of bpe, unigram, word, char"),
        ("data.split", "random", "must be one of hash, tail"),
        *(
            (f"model.{name}", 0, "must be positive")
            for name in ("d_model", "num_layers", "num_heads", "num_kv_heads")
        ),
        *((f"model.{name}", -2, "must be positive") for name in ("head_dim", "d_ff")),
        ("model.vocab_size", -1, "must be at least 0"),
        ("model.num_kv_heads", 3, "must divide model.num_heads=4"),
        ("model.head_dim", 7, "must be even"),
        ("steps", 0, "must be positive"),
        ("log_every", 0, "must be positive"),
        ("data.rows", 1, "must be at least 2"),
        ("data.batch_size", 0, "must be positive"),
        ("data.shards", 0, "must be in [1, 100000)"),
        ("data.eval_percent", 100.0, "must be in [0, 100)"),
        ("optim.lr", 0.0, "must be positive"),
        ("optim.accumulate", 0, "must be positive"),
        ("optim.accumulate", 3, "must divide data.batch_size=8"),
        ("optim.decay_fraction", 0.0, "must be in (0, 1]"),
        ("loss.label_smoothing", 1.0, "must be in [0, 1)"),
        ("loss.chunk_tokens", 0, "must be positive"),
        ("checkpoint.keep_last", 0, "must be positive"),
        ("monitor.profile_start", 1000, "must be before the last of steps=1000"),
    ],
)
def test_the_error_names_key_value_and_rule(key, value, rule):
    with pytest.raises(UserError) as error:
        from_config_dict(settings(**{key: value}))
    assert str(error.value).startswith(f"config.{key} is {value!r}: {rule}")


@pytest.mark.parametrize(
    "axes, rule", [({"data": 0}, "must be positive, or -1"), ({"fsdp": -1}, "only one axis may")]
)
def test_mesh_rules(axes, rule):
    with pytest.raises(UserError, match=rule):
        from_config_dict({"mesh": axes})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"names": ()}, "give at least one name, and each name once"),
        ({"names": ("user", "user", "output")}, "give at least one name, and each name once"),
        ({"kinds": ("input", "output")}, "config.streams.kinds has 2 items: names has 3"),
        ({"kinds": ()}, "config.streams.kinds has 0 items: names has 3"),
        (
            {"kinds": ("input", "hidden", "output")},
            "holds 'hidden': must be one of input, output, thought",
        ),
        (
            {"loss_weights": (1.0,)},
            "config.streams.loss_weights has 1 items: names has 3, give one per stream",
        ),
        ({"loss_weights": (0.0, 0.0, 0.0)}, "must be >= 0, and one of them positive"),
        ({"loss_weights": (1.0, -1.0, 0.0)}, "must be >= 0, and one of them positive"),
        ({"kinds": ("input",) * 3}, "one of them positive"),
        ({"delays": (0, 1)}, "config.streams.delays has 2 items"),
        ({"delays": (0, -1, 0)}, "config.streams.delays is (0, -1, 0): must be >= 0 rows"),
        (
            {"visibility": "all"},
            "visibility is 'all': must be one of block_causal, same_row, isolated",
        ),
        (
            {"lags": (("output", "tool", "1"),)},
            "names 'tool': the streams are user, thought, output",
        ),
        (
            {"lags": (("output", "user", "-1"),)},
            "lag '-1': must be a number of rows >= 0, or",
        ),
        (
            {"lags": (("output", "user", "soon"),)},
            "lag 'soon': must be a number of rows >= 0, or",
        ),
    ],
)
def test_stream_rules(fields, message):
    with pytest.raises(UserError) as error:
        StreamSpec.from_config(StreamsConfig(**fields))
    assert message in str(error.value)


NAMES = ("user", "thought", "output")
EDGES = strategies.dictionaries(
    strategies.tuples(strategies.sampled_from(NAMES), strategies.sampled_from(NAMES)),
    strategies.one_of(strategies.just("never"), strategies.integers(0, 9).map(str)),
)


@given(EDGES, strategies.sampled_from(["block_causal", "same_row", "isolated"]))
def test_lags_change_only_the_edges_that_they_name(edges, preset):
    config = StreamsConfig(
        visibility=preset, lags=tuple((*edge, lag) for edge, lag in edges.items())
    )
    lag = StreamSpec.from_config(config).lag_array
    plain = StreamSpec.from_config(StreamsConfig(visibility=preset)).lag_array
    for reader in range(3):
        for source in range(3):
            edge = edges.get((NAMES[reader], NAMES[source]))
            if edge is None:
                expected = plain[reader, source]
            else:
                expected = NEVER if edge == "never" else int(edge)
            assert lag[reader, source] == expected
    between_streams = {"block_causal": 1, "same_row": 0, "isolated": NEVER}[preset]
    assert np.all(plain[~np.eye(3, dtype=bool)] == between_streams)


def test_default_config_is_a_fresh_copy():
    first = default_config()
    first.optim.lr = 0.5
    assert default_config().optim.lr == Config().optim.lr
    assert copy.deepcopy(first).optim.lr == 0.5


def test_user_code_is_found_in_all_settings():
    settings = default_config()
    assert code_named_by(from_config_dict(settings)) == {}
    settings.model.block = "mine:Block"
    settings.monitor.writers = ("jsonl", "mine.writers:Print", "yours:Send")
    settings.data.path = "gs://bucket/file"  # a URL
    settings.data.format = "msllm.data.corpora:tatoeba"  # part of msllm
    config = from_config_dict(settings)
    assert code_named_by(config) == {
        "config.model.block": "mine:Block",
        "config.monitor.writers": "mine.writers:Print, yours:Send",
    }
    assert code_named_by(config.model, "model") == {"model.block": "mine:Block"}
    settings.model.block = "mine"
    with pytest.raises(UserError, match="config.model.block is 'mine': must be package.module"):
        from_config_dict(settings)
