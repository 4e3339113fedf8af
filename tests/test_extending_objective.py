"""docs/extending/objective.md: an objective from outside the package."""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from outside.objective import GAMMA, focal
from runs import dictation, four_streams, host, make_program, place, random_tables

import msllm
from msllm.config import LossConfig
from msllm.errors import UserError
from msllm.loss import objective_loss
from msllm.training import train

ROOT = pathlib.Path(__file__).parents[1]
PATH = "outside.objective:focal"  # in tests/
OPTIONS = {"streams.loss_weights": (0.0, 0.0, 0.5, 2.0), "optim.lr": 1e-2, "optim.eps": 1e-5}


def test_the_page_shows_the_tested_module():
    page = (ROOT / "docs/extending/objective.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert (ROOT / "tests/outside/objective.py").read_text() == code


def inputs():
    """hidden [2, 5, 3, D], head [V, D], and targets and weights [2, 5, 3]; some weights are 0."""
    random = np.random.default_rng(0)
    weights = random.random((2, 5, 3)) * (random.random((2, 5, 3)) < 0.7)
    hidden, head = random.normal(size=(2, 5, 3, 8)), random.normal(size=(12, 8))
    targets = random.integers(0, 12, (2, 5, 3))
    return jnp.float32(hidden), jnp.float32(head), jnp.int32(targets), jnp.float32(weights)


def dense_focal(hidden, head, targets, weights):
    """The weighted sum of the focal loss, and the nll of each cell, computed without chunks."""
    log_p = jax.nn.log_softmax(hidden @ head.T)
    nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * (1 - jnp.exp(-nll)) ** GAMMA * nll), nll


@pytest.mark.parametrize("chunk", [8, 15, 1000])
def test_value_and_gradients_are_those_of_the_definition(chunk):
    options = LossConfig(chunk_tokens=chunk)

    def ours(*arguments):
        return objective_loss(focal, *arguments, options)

    def run(function):
        return jax.value_and_grad(function, (0, 1), has_aux=True)(*inputs())

    (loss, nll), gradients = run(ours)
    (expected, expected_nll), expected_gradients = run(dense_focal)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_cells_without_weight_and_padding_of_chunks_contribute_nothing():
    """Even if their loss is infinite, or its gradient nan at the zero hidden states of padding."""
    hidden, head, targets, weights = inputs()

    def objective(hidden, head, targets, options):
        size = jnp.linalg.norm(hidden @ head.T, axis=-1)  # its gradient is nan where hidden is 0
        return jnp.where(targets == 3, jnp.inf, size)

    weights = jnp.where(targets == 3, 0.0, weights)

    def loss(hidden, head):
        return objective_loss(objective, hidden, head, targets, weights, LossConfig(chunk_tokens=8))

    (value, _), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
    expected = (weights * jnp.linalg.norm(hidden @ head.T, axis=-1)).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    d_hidden, d_head = map(np.asarray, gradients)
    assert np.isfinite(d_head).all()
    np.testing.assert_array_equal(np.any(d_hidden, axis=-1), np.asarray(weights) > 0)


def test_the_gradient_of_the_head_is_summed_in_float32():
    hidden, head, targets, weights = inputs()
    many = 256
    repeated = [jnp.concatenate([x] * many) for x in (hidden, targets, weights)]

    def loss(head, hidden, targets, weights):
        rows = head.astype(jnp.bfloat16)
        return objective_loss(focal, hidden, rows, targets, weights, LossConfig(chunk_tokens=30))[0]

    one = jax.grad(loss)(head, hidden, targets, weights)
    sums = jax.grad(loss)(head, *repeated)
    np.testing.assert_allclose(sums / many, one, rtol=0.02, atol=0.02)


def test_a_wrong_result_is_an_error():
    def mean(hidden, head, targets, options):
        return jnp.mean(hidden)

    with pytest.raises(UserError, match="'a:b': it returned float32 .. for 6 cells"):
        objective_loss(mean, *inputs(), LossConfig(chunk_tokens=7, objective="a:b"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss.objective": "focal"}, "must be package.module:function"),
        ({"loss.objective": PATH, "loss.vocab_chunks": 2}, "vocab_chunks is 2: must be 1"),
        ({"loss.objective": "outside.objective:local"}, "cannot be imported"),
    ],
)
def test_invalid_settings_are_errors(settings, message):
    with pytest.raises(UserError, match=message):
        make_program(four_streams(**settings))


def run(steps=3, devices=1, **axes):
    """Trains with the objective: (metrics of each step, sums of an evaluation before step 0)."""
    program = make_program(four_streams(**OPTIONS, **{"loss.objective": PATH}), devices, **axes)
    state, metrics = program.init(), []
    tables = random_tables(program.config)
    sums = host(program.evaluate(state.parameters, place(program, tables)))
    for _ in range(steps):
        state, step_metrics = jax.block_until_ready(program.step(state, place(program, tables)))
        metrics.append(host(step_metrics))
    return metrics, sums


@pytest.mark.slow
@pytest.mark.usefixtures("compile_fast")
def test_a_run_minimises_the_objective_on_every_mesh():
    metrics, sums = run()
    builtin = make_program(four_streams(**OPTIONS))
    batch = place(builtin, random_tables(builtin.config))
    state = builtin.init()
    expected = host(builtin.evaluate(state.parameters, batch))
    jax.tree.map(np.testing.assert_array_equal, sums, expected)  # evaluation reports the nll
    _, first = builtin.step(state, batch)
    for name in ("nll", "nll_spoken", "targets", "cells"):
        np.testing.assert_allclose(metrics[0][name], first[name], rtol=1e-5)
    assert metrics[0]["loss"] < first["loss"]  # focal loss multiplies the nll by a factor below 1
    assert metrics[2]["loss"] < metrics[1]["loss"] < metrics[0]["loss"]
    for axes in ({"fsdp": 2, "stream": 2, "tensor": 2}, {"data": 4, "tensor": 2}):
        sharded, sharded_sums = run(devices=8, **axes)
        np.testing.assert_allclose(sharded_sums["nll"], sums["nll"], rtol=1e-4)
        for ours, theirs in zip(sharded, metrics, strict=True):
            for name in ("loss", "nll", "gradient_norms", "update_norm"):
                np.testing.assert_allclose(
                    ours[name], theirs[name], rtol=1e-4, atol=1e-6, err_msg=name
                )


@pytest.mark.slow
def test_a_checkpoint_is_read_without_its_objective(data_dir, tmp_path, make_unimportable):
    settings = {"data.dir": data_dir, "eval_every": 0, "loss.objective": PATH}
    train(dictation(**settings, steps=1), tmp_path)
    make_unimportable("outside.objective")
    loaded = msllm.load(tmp_path)
    assert loaded.step == 1 and loaded.run_config.loss.objective == PATH
    assert "outside.objective" not in sys.modules
