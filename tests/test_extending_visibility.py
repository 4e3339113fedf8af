"""docs/extending/visibility.md: a visibility from outside the package."""

import json
import pathlib
import re
import sys
import types

import numpy as np
import pytest
from runs import dictation

import msllm
from msllm.config import Config, StreamsConfig, from_config_dict, to_json
from msllm.errors import UserError
from msllm.streams import NEVER, PRESETS, StreamSpec, lag_matrix, resolve_visibility
from msllm.training import train

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending/visibility.md").read_text()
CODE, USE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
(RESOLVED,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.S)
PATH = "outside.visibility:private_thoughts"  # in tests/
LAG = [[1, NEVER, NEVER], [1, 1, 1], [1, NEVER, 1]]


def resolved(visibility=PATH, **fields) -> StreamsConfig:
    """The config of streams with the function's lags written out."""
    streams = StreamsConfig(visibility=visibility, **fields)
    return resolve_visibility(Config(streams=streams)).streams


@pytest.fixture
def returning(monkeypatch):
    """A function returning(matrix) that gives the import path of a function that returns it."""

    def make(matrix):
        module = types.ModuleType("returning")
        module.function = lambda names, kinds: matrix
        monkeypatch.setitem(sys.modules, "returning", module)
        return "returning:function"

    return make


def test_the_page_shows_the_tested_module_and_its_output(tmp_path, monkeypatch, capsys):
    assert (ROOT / "tests/outside/visibility.py").read_text() == CODE
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    exec(USE, {})
    assert capsys.readouterr().out.strip() == str(np.array(LAG))


def test_the_lags_of_a_function_are_stored_as_on_the_page():
    streams = resolved()
    stored = json.loads(to_json(Config(streams=streams)))["streams"]
    assert {key: stored[key] for key in ("visibility", "lags")} == json.loads(RESOLVED)
    np.testing.assert_array_equal(StreamSpec.from_config(streams).lag_array, LAG)
    assert resolve_visibility(Config(streams=streams)).streams == streams


def test_explicit_lags_override_the_function():
    spec = StreamSpec.from_config(resolved(lags=(("output", "thought", "4"),)))
    assert spec.lag_array[2].tolist() == [1, 4, 1]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_matrix_of_a_preset_is_that_preset(returning, preset):
    streams = resolved(returning(lag_matrix(preset, 3)))
    assert (streams.visibility, streams.lags) == (preset, ())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_import_nothing(preset):
    config = Config(streams=StreamsConfig(visibility=preset))
    assert resolve_visibility(config) is config


@pytest.mark.parametrize(
    "matrix, message",
    [
        (3, r"it returned 3; return 3 x 3 lags \(reader, source\)"),
        ([[1, 1], [1, 1]], r"it returned rows of \[2, 2\]; return 3 x 3 lags"),
        (np.ones((3, 2), int), r"it returned rows of \[2, 2, 2\]; return 3 x 3 lags"),
        (-np.eye(3, dtype=int), "its lag from 'user' to 'user' is .*-1.*; return a number of rows"),
        ([[1] * 3, [1, "neither", 1], [1] * 3], "from 'thought' to 'thought' is 'neither'"),
        ([[1] * 3, [1] * 3, [1, 1, 1.5]], "from 'output' to 'output' is 1.5"),
        ([[True] * 3] * 3, "from 'user' to 'user' is True"),
        (np.ones((3, 3), bool), "from 'user' to 'user' is .*True"),
    ],
    ids=["number", "small", "not square", "negative", "word", "fraction", "bools", "mask"],
)
def test_an_invalid_matrix_is_an_error(returning, matrix, message):
    with pytest.raises(UserError, match=f"config.streams.visibility is 'returning:.*{message}"):
        resolved(returning(matrix))


def test_a_missing_function_is_an_error():
    with pytest.raises(UserError, match="config.streams.visibility is 'outside.visibility:public'"):
        resolved("outside.visibility:public")


def test_other_settings_are_checked_before_the_function_is_called(returning):
    with pytest.raises(UserError, match="config.streams.kinds has 3 items"):
        resolved(returning(None), names=("a", "b"))


def test_reading_a_config_imports_nothing(tmp_path, monkeypatch):
    """So reading a checkpoint that names a function does not run it."""
    (tmp_path / "trap.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    config = from_config_dict({"streams": {"visibility": "trap:function"}})
    with pytest.raises(UserError, match="'trap:function': a function, .*resolve_visibility"):
        StreamSpec.from_config(config.streams)
    assert "trap" not in sys.modules


@pytest.mark.slow
def test_a_checkpoint_is_read_without_its_visibility_function(
    data_dir, tmp_path, make_unimportable
):
    settings = {"data.dir": data_dir, "eval_every": 0, "streams.visibility": PATH}
    train(dictation(**settings, steps=1), tmp_path)
    assert int(train(dictation(**settings, steps=2), tmp_path).step) == 2  # continues
    make_unimportable("outside.visibility")
    loaded = msllm.load(tmp_path)
    assert loaded.step == 2 and np.array_equal(loaded.streams.lag_array, LAG)
    assert loaded.run_config.streams == resolved_lags()
    assert "outside.visibility" not in sys.modules


def resolved_lags() -> StreamsConfig:
    """The config that a checkpoint holds according to the page."""
    stored = json.loads(RESOLVED)
    lags = tuple(map(tuple, stored["lags"]))
    return StreamsConfig(visibility=stored["visibility"], lags=lags)
