"""docs/extending/layer.md: a layer from outside the package."""

import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from runs import dictation, four_streams, host, make_program, place, random_tables

import msllm
from msllm.decode.engine import DecodeOptions, Engine
from msllm.errors import UserError
from msllm.evals.score import score
from msllm.model.block import check_block
from msllm.model.model import abstract_model
from msllm.training import train
from msllm.weights import hf_config

ROOT = pathlib.Path(__file__).parents[1]
PATH = "outside.layer:ParallelBlock"  # in tests/
SILENCE = 3
OPTIONS = {"optim.lr": 1e-2, "optim.eps": 1e-5, "streams.loss_weights": (0.0, 0.0, 0.5, 2.0)}


def test_the_page_shows_the_tested_module():
    page = (ROOT / "docs/extending/layer.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert (ROOT / "tests/outside/layer.py").read_text() == code


def table(rows):
    """Random tokens [rows, 3]."""
    return np.random.default_rng(0).integers(4, 32, (rows, 3)).astype(np.int32)


def logits(model, tokens):
    """[R, S, V] of a full forward pass over tokens [R, S]."""
    return score(model, {"tokens": tokens[None]}).logits[0]


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "xla"])
def test_cached_decoding_equals_the_full_forward_pass(make_model, monkeypatch, kernels):
    """With and without packed weights."""
    if not kernels:
        monkeypatch.setattr("msllm.kernels.cpu.unavailable_reason", lambda: "not asked for")
    model = make_model(3, block=PATH, d_ff=40 + 8 * kernels)
    prefill = table(5)
    engine = Engine(model, window=16, all_logits=True, silence_id=SILENCE)
    session = engine.open(DecodeOptions(temperature=1.0), prefill=prefill)
    rows = [session.step() for _ in range(6)]
    transcript = session.transcript().tokens
    expected = logits(model, transcript)
    for row in rows:
        np.testing.assert_allclose(row.logits, expected[row.index - 1], rtol=0, atol=1e-4)
    # The built-in layer gives something else.
    builtin = logits(make_model(3, d_ff=40 + 8 * kernels), transcript)
    assert np.abs(builtin - expected).max() > 0.1


def refused(name) -> str:
    """The import path of a layer in tests/outside/refused_layers.py."""
    return f"outside.refused_layers:{name}"


@pytest.mark.parametrize(
    "name, message",
    [
        ("ReadsNextRow", "changes row 0 of stream 0 of the same table without `attend`"),
        ("ReadsOtherStreams", "changes row 1 of stream 1 of the same table without `attend`"),
        ("ReadsOtherTables", "changes row 1 of stream 0 of another table without `attend`"),
        ("HoldsStatistics", "its variable mean is a BatchStat"),
        ("HasUnknownAxis", "its variable scale has the axis 'mine'"),
        ("jax", "neither a function nor a class"),
        ("Angles", "must be a class derived from flax.nnx.Module"),
    ],
)
def test_a_layer_that_breaks_the_rules_is_refused_everywhere(make_model, name, message):
    with pytest.raises(UserError, match=f"config.model.block is .*{name}.*{message}"):
        make_program(four_streams(**{"model.block": refused(name)}))
    with pytest.raises(UserError, match=f"config.model.block is .*{name}"):
        Engine(make_model(3, block=refused(name)), silence_id=SILENCE)


@pytest.mark.parametrize(
    "name, message",
    [
        ("ReadsRowBefore", "a row depends on earlier rows other than through `attend`"),
        ("AttendsTwice", "it calls `attend` 2 times in a layer"),
    ],
)
def test_state_outside_the_cache_is_refused_only_in_decoding(make_model, name, message):
    model = make_model(3, block=refused(name))
    with pytest.raises(UserError, match=f"config.model.block is .*{name}.*{message}"):
        Engine(model, silence_id=SILENCE)
    check_block(model.config, 3, cached=False)
    assert np.isfinite(logits(model, table(5))).all()


def test_export_to_hugging_face_is_refused(make_model):
    with pytest.raises(UserError, match="no Hugging Face family has these layers"):
        hf_config.to_hf(make_model(3, block=PATH).config, 3)


def run(devices=1, **axes):
    """The metrics of three training steps."""
    config = four_streams(**OPTIONS, **{"model.block": PATH})
    program = make_program(config, devices, **axes)
    state, metrics = program.init(), []
    for seed in range(3):
        batch = place(program, random_tables(config, seed))
        state, step_metrics = jax.block_until_ready(program.step(state, batch))
        metrics.append(host(step_metrics))
    assert "blocks/gate" in program.parameter_names
    return metrics


@pytest.mark.slow
@pytest.mark.usefixtures("compile_fast")
@pytest.mark.parametrize("axes", [{"fsdp": 2, "stream": 2, "tensor": 2}, {"fsdp": 4, "stream": 2}])
def test_training_on_a_mesh_equals_training_on_one_device(axes):
    metrics = run()
    assert metrics[2]["loss"] < metrics[0]["loss"]
    for ours, theirs in zip(run(8, **axes), metrics, strict=True):
        for name in ("loss", "nll", "gradient_norms", "update_norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_loading_a_checkpoint_requires_allow_code(data_dir, tmp_path, monkeypatch):
    settings = {"data.dir": data_dir, "eval_every": 0, "model.block": PATH}
    state = train(dictation(**settings, steps=1), tmp_path)
    parameters = host(state.parameters)
    assert int(train(dictation(**settings, steps=2), tmp_path).step) == 2  # continues

    monkeypatch.delitem(sys.modules, "outside.layer")
    message = "config.model.block of .* is 'outside.layer:ParallelBlock': .* allow_code=True"
    with pytest.raises(UserError, match=message):
        msllm.load(tmp_path / "checkpoints" / "1")
    with pytest.raises(
        UserError, match="its config.model.block is 'outside.layer:Paral.*, but that of the run"
    ):
        other = dictation(**settings | {"model.block": ""}, init_from=str(tmp_path), steps=1)
        train(other, tmp_path / "other")
    assert "outside.layer" not in sys.modules

    loaded = msllm.load(tmp_path / "checkpoints" / "1", allow_code=True)
    jax.tree.map(np.testing.assert_array_equal, host(loaded.parameters), parameters)
    assert np.isfinite(logits(loaded, table(4))).all()


def test_the_model_has_the_parameters_of_the_layer(make_model):
    model = make_model(3, block=PATH)
    _, shapes, axes = abstract_model(model.config, model.streams)
    assert shapes["blocks"]["gate"].shape == (2, 16) == model.parameters["blocks"]["gate"].shape
    assert axes["blocks"]["gate"] == ("layers", "embed") and "mlp_norm" not in shapes["blocks"]
