"""The optimizer and its schedules, also against steps of the reference implementation."""

import dataclasses
import functools

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import host, place

from msllm import step as step_lib
from msllm.config import Config, DataConfig, LossConfig, MeshConfig, OptimConfig
from msllm.errors import UserError
from msllm.loss import targets_and_weights
from msllm.model.model import bind
from msllm.optim import adamw, check_no_decay, leaf_norms, muon, schedule
from msllm.sharding import make_mesh
from msllm.step import Program
from msllm.streams import make_cells, positions
from msllm.weights.hf_tensors import to_hf
from msllm.weights.load import load


@pytest.mark.usefixtures("compile_fast")
def test_four_steps_equal_the_reference_implementation(monkeypatch):
    case = golden_cases.case("s7_c3_pad")
    rule, model = case.meta["train"], load(case.path)
    everything, embedding = rule["param_groups"]
    optim = OptimConfig(
        lr=everything["lr"],
        schedule="constant",
        warmup_steps=0,
        b1=rule["betas"][0],
        b2=rule["betas"][1],
        eps=rule["eps"],
        weight_decay=everything["weight_decay"],
        no_decay=("stream_embedding",),
        stream_embedding_lr=embedding["lr"] / everything["lr"],
        clip_norm=rule["clip_grad_norm"],
    )
    tokens = case["tokens"]
    row = np.arange(tokens.shape[1])
    segment = (row < case["num_rows"][:, None]).astype(np.int32)
    tables = {
        "tokens": tokens,
        "present": np.broadcast_to(segment[:, :, None] > 0, tokens.shape),
        "segment": segment,
    }
    # The reference has no loss on the rows of a prefix. Training data has no such rows, so the step
    # has no loss mask, and the test has to add one.
    mask = np.broadcast_to((row >= case["prefix_rows"][:, None])[:, :, None], tokens.shape)
    monkeypatch.setattr(
        step_lib, "targets_and_weights", functools.partial(targets_and_weights, loss_mask=mask)
    )
    assert model.streams.loss_weights == (0, 1, 1)

    data = DataConfig(batch_size=len(tokens), rows=tokens.shape[1])
    # Dense attention compiles fastest.
    model_config = dataclasses.replace(model.config, attention="reference")
    config = Config(model=model_config, optim=optim, data=data, loss=LossConfig(chunk_tokens=40))
    with jax.default_matmul_precision("highest"):
        program = Program(config, model.streams, make_mesh(MeshConfig(), jax.devices()[:1]))
        state = program.init()._replace(parameters=jax.tree.map(jnp.array, model.parameters))
        losses, norms = [], []
        for _ in range(rule["steps"]):
            state, metrics = program.step(state, place(program, tables))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["gradient_norm"]))
        logits = first_logits(
            program.graph, state.parameters, jax.tree.map(lambda x: x[:1], tables)
        )

    np.testing.assert_allclose(losses, case["train_losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norms, case["train_grad_norms"], rtol=1e-5)
    final = golden_cases.thin("logits", np.asarray(logits))
    np.testing.assert_allclose(final, case["train_final_logits_row0"], rtol=0, atol=1e-4)
    ours = to_hf(host(state.parameters), model.config)
    names = [name for name in case.names if name.startswith("train_final.")]
    assert len(names) == 4
    for name in names:
        mine = golden_cases.thin(name, ours[name.removeprefix("train_final.")])
        np.testing.assert_allclose(mine, case[name], rtol=0, atol=2e-5, err_msg=name)


@functools.partial(jax.jit, static_argnums=0)
def first_logits(graph, parameters, tables):
    """Logits [S, V] of the first row of the first table."""
    model = bind(graph, parameters)
    cells = make_cells(tables["present"], tables["segment"])
    return model.logits(model(tables["tokens"], cells, positions(tables["segment"]))[0, 0])


def rates(steps, **fields):
    """The learning rate of every update in a run of `steps` steps, with lr=2."""
    return np.asarray(schedule(OptimConfig(lr=2.0, **fields), steps)(jnp.arange(steps + 1)))


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warmup_rises_evenly_to_the_full_rate(kind):
    values = rates(40, schedule=kind, warmup_steps=8)
    np.testing.assert_allclose(values[:8], 2.0 * np.arange(1, 9) / 8, rtol=1e-6)
    assert values[8] == pytest.approx(2.0)


def test_cosine_ends_at_the_final_ratio():
    values = rates(40, schedule="cosine", warmup_steps=8, final_lr_ratio=0.1)
    assert values[40] == pytest.approx(0.2)
    assert values[24] == pytest.approx((2.0 + 0.2) / 2)  # half way through the decay
    assert np.all(np.diff(values[8:]) < 0)


def test_wsd_is_constant_and_then_falls_linearly():
    values = rates(40, schedule="wsd", warmup_steps=8, decay_fraction=0.25, final_lr_ratio=0.1)
    np.testing.assert_allclose(values[8:31], 2.0, rtol=1e-6)
    np.testing.assert_allclose(values[30:], np.linspace(2.0, 0.2, 11), rtol=1e-5)


def test_a_constant_rate_and_a_warmup_longer_than_the_run():
    np.testing.assert_array_equal(rates(10, schedule="constant", warmup_steps=0), 2.0)
    np.testing.assert_allclose(
        rates(10, schedule="cosine", warmup_steps=50)[:10], 0.2 * np.arange(1, 11), rtol=1e-6
    )


ONES = np.ones(2, np.float32)
PARAMETERS = {
    "blocks": {"mlp": {"gate": ONES}, "mlp_norm": ONES, "attention": {"q_bias": ONES}},
    "stream_embedding": ONES,
}


def one_update(gradient, **fields):
    """The first update of PARAMETERS if every entry has this gradient."""
    optim = adamw(OptimConfig(lr=0.1, schedule="constant", warmup_steps=0, **fields), 10)
    gradients = jax.tree.map(lambda x: np.full_like(x, gradient), PARAMETERS)
    return optim.update(gradients, optim.init(PARAMETERS), PARAMETERS)[0]


def test_weight_decay_excludes_norms_biases_and_the_stream_embedding():
    updates = one_update(0.0, weight_decay=0.5)
    np.testing.assert_allclose(updates["blocks"]["mlp"]["gate"], -0.05)
    excluded = (
        updates["blocks"]["mlp_norm"],
        updates["blocks"]["attention"]["q_bias"],
        updates["stream_embedding"],
    )
    assert not np.any(excluded)
    everywhere = one_update(0.0, weight_decay=0.5, no_decay=(), stream_embedding_lr=3.0)
    np.testing.assert_allclose(everywhere["blocks"]["mlp_norm"], -0.05)
    np.testing.assert_allclose(everywhere["stream_embedding"], -0.15)


def test_an_entry_of_no_decay_that_fits_no_parameter_is_refused():
    names = ("embedding", "blocks/mlp/gate")
    check_no_decay(OptimConfig(), names)  # the default entries may fit nothing
    check_no_decay(OptimConfig(no_decay=("gate", "norm")), names)
    with pytest.raises(UserError, match="no_decay has 'norm,bias', which is part of no parameter"):
        check_no_decay(OptimConfig(no_decay=("norm,bias",)), names)


def test_stream_embedding_has_its_own_rate():
    updates = one_update(0.3, weight_decay=0.0, stream_embedding_lr=5.0)
    # Adam's first step has size 1 before it is scaled by the rate.
    np.testing.assert_allclose(updates["blocks"]["mlp"]["gate"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["stream_embedding"], -0.5, rtol=1e-5)


def test_silence_has_its_own_rate():
    parameters = {name: np.ones((4, 2), np.float32) for name in ("embedding", "head", "final_norm")}

    def updates(**fields):
        config = OptimConfig(
            lr=0.1, schedule="constant", warmup_steps=0, weight_decay=0.0, **fields
        )
        optim = adamw(config, 10)
        state = optim.init(parameters)
        return optim.update(parameters, state, parameters, silence_id=2)[0], state

    (scaled, _), (plain, state) = updates(silence_lr=3.0), updates()
    for name in ("embedding", "head"):
        expected = plain[name] * np.array([[1], [1], [3], [1]])
        np.testing.assert_allclose(scaled[name], expected, rtol=1e-6)
    np.testing.assert_array_equal(scaled["final_norm"], plain["final_norm"])
    assert len(state) == 5  # as in checkpoints from before this setting existed


@pytest.mark.parametrize("clip_norm, factor", [(2.0, 2.0 / 8.0), (100.0, 1.0), (0.0, 1.0)])
def test_clipping_is_by_global_norm(clip_norm, factor):
    gradient = np.sqrt(8.0)  # 8 entries: a global norm of 8
    # With a large epsilon, Adam's first update is the clipped gradient divided by epsilon.
    updates = one_update(gradient, weight_decay=0.0, clip_norm=clip_norm, eps=1e6)
    expected = -0.1 * factor * gradient / 1e6
    np.testing.assert_allclose(updates["blocks"]["mlp"]["gate"], expected, rtol=1e-4)


def test_muon_gives_matrices_equal_singular_values_and_leaves_the_rest_to_nadam():
    rng = np.random.default_rng(0)
    shapes = {"q": (3, 16, 4, 2), "q_bias": (3, 4, 2), "norm": (3, 16)}
    parameters = {
        "blocks": {
            name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
        },
        "embedding": rng.normal(size=(5, 16)).astype(np.float32),
    }
    gradient = jax.tree.map(
        lambda x: np.float32(1e-3) * rng.normal(size=x.shape).astype(x.dtype), parameters
    )
    fields = {"lr": 0.1, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    optim = muon(OptimConfig(**fields), 10)
    updates, _ = optim.update(gradient, optim.init(parameters), parameters)
    # Each of the three layers is a matrix [16, 8]. Newton-Schulz leaves values between 0.7 and 1.2.
    values = np.linalg.svd(np.reshape(updates["blocks"].pop("q"), (3, 16, 8)), compute_uv=False)
    values /= 0.1 * 0.2 * np.sqrt(16)
    assert values.min() > 0.6 and values.max() < 1.3
    del gradient["blocks"]["q"]
    nadam = optax.nadam(0.1, b2=0.95)
    expected, _ = nadam.update(gradient, nadam.init(gradient))
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(compare, updates, expected)
    decayed = muon(OptimConfig(**fields | {"weight_decay": 0.5}), 10)
    again, _ = decayed.update(
        jax.tree.map(jnp.zeros_like, parameters), decayed.init(parameters), parameters
    )
    np.testing.assert_allclose(again["blocks"]["q"], -0.05 * parameters["blocks"]["q"], rtol=1e-6)


def test_leaf_norms():
    tree = {"b": jnp.array([[3.0], [4.0]]), "a": jnp.array([2.0], jnp.bfloat16)}
    np.testing.assert_allclose(leaf_norms(tree), [2.0, 5.0])
