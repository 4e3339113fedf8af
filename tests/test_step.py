"""The train step: its values, skipped updates, and the arrays and FLOPs that it must not have."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import SILENCE, four_streams, host, make_program, place, random_tables

from msllm.model.model import bind
from msllm.streams import make_cells, positions

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_fast")]
WEIGHTS = (0.0, 0.0, 0.5, 2.0)
OPTIONS = {
    "streams.loss_weights": WEIGHTS,
    "streams.lags": (
        ("output", "tool", "never"),
        ("thought", "user", "0"),
        ("output", "thought", "3"),
    ),
    "streams.skip_silence": True,
    "optim.lr": 1e-2,
    "optim.eps": 1e-6,
}


@functools.cache
def program(**dotted):
    """A program on one device. Tests with the same settings share it."""
    return make_program(four_streams(**OPTIONS | dotted))


@functools.partial(jax.jit, static_argnums=0)
def dense_nll(graph, parameters, tables, seen):
    """-log p [B, T - 1, S] of the token that follows each cell, with all logits in memory."""
    model = bind(graph, parameters)
    cells = make_cells(tables["present"], tables["segment"], ~seen)
    hidden = model(tables["tokens"], cells, positions(tables["segment"]))
    log_p = jax.nn.log_softmax(model.logits(hidden[:, :-1]))
    return -jnp.take_along_axis(log_p, tables["tokens"][:, 1:, :, None], axis=-1)[..., 0]


def test_loss_and_sums_equal_a_dense_computation():
    machine = program()
    tables, state = random_tables(machine.config), machine.init()
    parameters = host(state.parameters)
    nll = np.asarray(dense_nll(machine.graph, parameters, tables, tables["tokens"] != SILENCE))
    _, metrics = machine.step(state, place(machine, tables))

    present, segment, targets = tables["present"], tables["segment"], tables["tokens"][:, 1:]
    counted = present[:, 1:] & present[:, :-1] & (segment[:, 1:] == segment[:, :-1])[:, :, None]
    weights = counted * np.array(WEIGHTS)
    assert float(metrics["loss"]) == pytest.approx((weights * nll).sum() / weights.sum(), abs=1e-5)
    spoken = counted & (targets != SILENCE)
    for name, kept in (("nll", counted), ("nll_spoken", spoken)):
        # The head is not computed for streams of weight 0.
        expected = np.where(np.array(WEIGHTS) > 0, (nll * kept).sum((0, 1)), 0)
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5)
        counts = np.where(np.array(WEIGHTS) > 0, kept.sum((0, 1)), 0)
        np.testing.assert_array_equal(metrics[name.replace("nll", "targets")], counts)
    assert metrics["cells"] == present.sum()
    assert metrics["spoken"] == (present & (tables["tokens"] != SILENCE)).sum()

    # Evaluation includes the streams of weight 0.
    sums = machine.evaluate(parameters, place(machine, tables))
    np.testing.assert_allclose(sums["nll"], (nll * counted).sum((0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(sums["targets"], counted.sum((0, 1)))
    assert float(sums["loss"] / sums["weight"]) == pytest.approx(float(metrics["loss"]), abs=1e-6)


def test_accumulated_gradients_equal_those_of_the_full_batch():
    parts = 4
    whole, accumulated = program(), program(**{"optim.accumulate": parts})
    states = [whole.init(), accumulated.init()]
    for seed in range(3):
        tables = random_tables(whole.config, seed)
        cells = tables["present"].sum((1, 2)).reshape(-1, parts).sum(0)
        # Micro-batches differ in size, so a mean of their means would be wrong.
        assert len(set(cells.tolist())) > 1
        results = [p.step(s, place(p, tables)) for p, s in zip((whole, accumulated), states)]
        states, (one, other) = [state for state, _ in results], [metrics for _, metrics in results]
        for name in ("loss", "nll", "targets_spoken", "cells", "gradient_norms", "update_norm"):
            np.testing.assert_allclose(other[name], one[name], rtol=2e-5, err_msg=name)
    for a, b in zip(*(jax.tree.leaves(host(state.parameters)) for state in states)):
        # Adam divides by small numbers, which magnifies rounding errors of small gradients.
        np.testing.assert_allclose(b, a, atol=3e-5)


@pytest.mark.parametrize("optimizer, value", [("adamw", np.inf), ("adamw", 1e25), ("muon", 1e25)])
def test_an_update_that_is_not_finite_is_skipped_and_counted(optimizer, value):
    machine = program(**{"optim.optimizer": optimizer})
    batch = place(machine, random_tables(machine.config))
    state, _ = machine.step(machine.init(), batch)
    good = host(state)
    final_norm = state.parameters["final_norm"].at[3].set(value)
    state = state._replace(parameters=state.parameters | {"final_norm": final_norm})
    poisoned = host(state)
    for expected in (1, 2):
        state, metrics = machine.step(state, batch)
        assert int(metrics["skipped"]) == int(metrics["skipped_in_row"]) == expected
        assert float(metrics["update_norm"]) == 0
    # With the large finite value, the loss is finite and the gradient is not.
    assert np.isfinite(metrics["loss"]) == np.isfinite(value)
    assert not np.isfinite(metrics["gradient_norms"]).all()
    jax.tree.map(np.testing.assert_array_equal, poisoned.parameters, host(state.parameters))
    jax.tree.map(np.testing.assert_array_equal, poisoned.opt_state, host(state.opt_state))
    assert int(state.step) == 3

    healthy = jax.device_put(good.parameters, machine.state_shardings.parameters)
    state, metrics = machine.step(state._replace(parameters=healthy), batch)
    assert int(metrics["skipped"]) == 2 and int(metrics["skipped_in_row"]) == 0
    # The schedule and the moments continue as if the skipped steps had not happened.
    second, expected = machine.step(jax.device_put(good, machine.state_shardings), batch)
    assert float(metrics["learning_rate"]) == float(expected["learning_rate"])
    jax.tree.map(np.testing.assert_array_equal, host(state.parameters), host(second.parameters))


def lowered(machine):
    return machine.step.lower(machine.abstract_state, machine.abstract_batch)


def test_no_array_of_all_logits_exists():
    vocab = 31  # no other axis has this length
    machine = program(**{"model.vocab_size": vocab, "loss.chunk_tokens": 24})
    found = re.findall(r"\bf32\[([\d,]+)\]", lowered(machine).compile().as_text())
    shapes = [tuple(map(int, shape.split(","))) for shape in found]
    width = machine.config.model.d_model
    logits = [shape for shape in shapes if vocab in shape and width not in shape]
    assert (24, vocab) in logits or (vocab, 24) in logits
    assert max(np.prod(shape) for shape in logits) == 24 * vocab


def test_the_head_is_not_computed_for_streams_without_weight():
    def head_flops(loss_weights):
        """FLOPs of 512 more entries of the vocabulary, nearly all of them in the head."""
        sizes = [
            {"model.vocab_size": size, "streams.loss_weights": loss_weights} for size in (512, 1024)
        ]
        # Use one chunk, because the cost analysis counts the body of a loop once.
        programs = [program(**size, **{"loss.chunk_tokens": 1024}) for size in sizes]
        small, large = (lowered(machine).cost_analysis()["flops"] for machine in programs)
        return large - small

    assert 0.45 < head_flops(WEIGHTS) / head_flops((1.0, 1.0, 0.5, 2.0)) < 0.6


def test_the_step_compiles_once_and_donates_the_state():
    machine = program()
    state = machine.init()
    for seed in range(3):
        old = state
        state, _ = machine.step(state, place(machine, random_tables(machine.config, seed)))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert machine.step._cache_size() == 1


def test_the_step_does_not_copy_the_moments():
    """Temporaries grow with the gradients and updates only."""

    def temporaries(vocab_size):
        machine = program(**{"model.vocab_size": vocab_size, "loss.chunk_tokens": 8})
        return lowered(machine).compile().memory_analysis().temp_size_in_bytes

    width = program().config.model.d_model
    more = 4 * 8192 * width  # bytes of 8192 more rows of the embedding table
    assert (temporaries(16384) - temporaries(8192)) / more < 3
