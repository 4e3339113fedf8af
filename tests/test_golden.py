"""Logits, masks, losses and gradients equal those of the reference implementation."""

import dataclasses

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msllm.config import LossConfig
from msllm.loss import next_row_loss, targets_and_weights
from msllm.model.model import bind
from msllm.streams import make_cells, positions, visibility_table
from msllm.weights.hf_tensors import to_hf
from msllm.weights.load import load

pytestmark = pytest.mark.slow

CASES = [name for name in golden_cases.COPIED if name.startswith("s7_")]
LOSSES = {
    # name: (streams without loss, options, prefix of the names of gradients)
    "loss_ce": ((), LossConfig(chunk_tokens=40), ""),
    "loss_ce_mask_user": ((0,), LossConfig(chunk_tokens=40), "ce_mask_user."),
    "loss_ce_smooth_z": (
        (),
        LossConfig(chunk_tokens=40, label_smoothing=0.1, z_loss=1e-3),
        "ce_smooth_z.",
    ),
}


class Setup:
    """A golden case as a model and a batch of tables."""

    def __init__(self, name, attention):
        self.case = case = golden_cases.case(name)
        spec = case.meta["spec"]
        model = load(case.path).with_visibility(
            "same_row" if spec["mask"] == "causal" else "block_causal"
        )
        model = model.with_streams(skip_silence="skip_silence" in spec["mask"])
        config = dataclasses.replace(model.config, attention=attention)
        self.model = dataclasses.replace(model, config=config)
        tokens = case["tokens"]
        row = np.arange(tokens.shape[1])
        segment = (row < case["num_rows"][:, None]).astype(np.int32)
        present = np.broadcast_to(segment[:, :, None] > 0, tokens.shape)
        self.batch = {"tokens": tokens, "present": present, "segment": segment}
        self.silent = tokens == spec["silence"]
        self.cells = make_cells(
            present, segment, self.silent if model.streams.skip_silence else None
        )
        # Rows of a prefix are context from another example: visible, but without a loss.
        self.loss_mask = np.broadcast_to(
            (row >= case["prefix_rows"][:, None])[:, :, None], tokens.shape
        )

    def hidden(self, parameters):
        """(bound model, hidden states [B, T, S, D])."""
        model = bind(self.model.graph, parameters)
        return model, model(self.batch["tokens"], self.cells, positions(self.batch["segment"]))

    def logits(self):
        model, hidden = self.hidden(self.model.parameters)
        return np.asarray(model.logits(hidden))

    def weighted(self, excluded=()):
        """(targets, counted cells, weights), with weight 0 for the excluded streams."""
        weights = tuple(float(s not in excluded) for s in range(self.model.streams.size))
        return targets_and_weights(self.batch, weights, self.loss_mask)


BOTH = [(name, backend) for name in CASES for backend in ("chunked", "reference")]


@pytest.fixture(scope="module", params=BOTH, ids="-".join)
def setup(request):
    with jax.default_matmul_precision("highest"):
        yield Setup(*request.param)


def test_logits(setup):
    present = setup.batch["present"]
    difference = np.abs(golden_cases.thin("logits", setup.logits()) - setup.case["logits"])[present]
    assert difference.max() < 1e-4


def test_mask(setup):
    for b, golden in enumerate(setup.case["visible"]):
        table = visibility_table(setup.cells, setup.model.streams.lag_array, b)
        np.testing.assert_array_equal(table.reshape(golden.shape), golden)


def test_labels(setup):
    targets, counted, _ = setup.weighted()
    np.testing.assert_array_equal(np.where(counted, targets, -100), setup.case["labels"])


def test_losses_and_gradients(setup):
    losses = {name: rule for name, rule in LOSSES.items() if name in setup.case}
    # With one stream there is no loss without the user's stream.
    assert len(losses) == 3 or setup.model.streams.size == 1
    weighted = {name: setup.weighted(excluded) for name, (excluded, _, _) in losses.items()}

    @jax.jit
    def run(parameters):
        def forward(parameters):
            model, hidden = setup.hidden(parameters)
            return hidden, model.head_table()

        outputs, pull_back = jax.vjp(forward, parameters)
        values, slopes = {}, {}
        for name, (_, options, _) in losses.items():
            targets, _, weights = weighted[name]

            def loss_of(hidden, table):
                return next_row_loss(hidden, table, targets, weights, options)

            (total, nll), slopes[name] = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(*outputs)
            values[name] = (total, nll)
        # One compiled backward pass serves all losses.
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *slopes.values())
        return values, jax.lax.map(pull_back, stacked)

    values, gradients = run(setup.model.parameters)
    for index, (name, (_, _, prefix)) in enumerate(losses.items()):
        targets, _, weights = weighted[name]
        total, nll = values[name]
        np.testing.assert_allclose(total / weights.sum(), setup.case[name], rtol=0, atol=1e-5)
        if name == "loss_ce":
            check_per_stream(setup, np.asarray(nll), np.asarray(weights), np.asarray(targets))
        ours = to_hf(
            jax.tree.map(lambda x: x[index] / weights.sum(), gradients[0]), setup.model.config
        )
        check_gradients(setup.case, f"{prefix}grad.", ours)


def check_gradients(case, prefix, ours):
    """Compares the recorded gradients with this prefix, relative to their largest entries."""
    names = [name for name in case.names if name.startswith(prefix) and "gate_in_norm" not in name]
    assert names
    for name in names:
        golden = case[name]
        mine = golden_cases.thin(name, ours[name.removeprefix(prefix)])
        assert np.abs(mine - golden).max() <= 1e-4 * np.abs(golden).max(), name


def check_per_stream(setup, nll, counted, targets):
    """Compares the losses of each stream, with and without targets that are silence."""
    per_stream = (nll * counted).sum((0, 1)) / counted.sum((0, 1))
    np.testing.assert_allclose(per_stream, setup.case["loss_per_stream"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        (nll * counted).sum() / counted.sum(), setup.case["loss_avg"], rtol=0, atol=1e-5
    )
    spoken = counted * (targets != setup.case.meta["spec"]["silence"])
    for stream, name in enumerate(
        ["loss_user_nonsilence", "loss_output_nonsilence"][: nll.shape[2]]
    ):
        mean = (nll * spoken)[..., stream].sum() / spoken[..., stream].sum()
        np.testing.assert_allclose(mean, setup.case[name], rtol=0, atol=1e-5)
