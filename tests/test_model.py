"""The model with one stream, permuted streams, on meshes, and with recomputation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msllm.config import MeshConfig
from msllm.model.model import abstract_model, bind
from msllm.sharding import make_mesh, partition_spec
from msllm.streams import NEVER, Cells, make_cells, positions
from msllm.weights.load import LoadedModel


def random_table(rows, streams, batch=1, absent=0.0, segments=1):
    """(tokens, cells, position) of random tables."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (batch, rows, streams)).astype(np.int32)
    segment = np.sort(rng.integers(1, segments + 1, (batch, rows)), axis=1).astype(np.int32)
    present = rng.random(tokens.shape) >= absent
    return tokens, make_cells(present, segment), positions(segment)


def forward(model, tokens, cells, position, parameters=None):
    """The logits of all cells."""
    bound = bind(model.graph, model.parameters if parameters is None else parameters)
    return bound.logits(bound(tokens, cells, position))


def plain_decoder(config, parameters, tokens):
    """An ordinary causal language model in numpy: tokens [T] -> logits [T, V]."""

    def norm(x, weight):
        return weight * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + config.norm_eps)

    rows, half = len(tokens), config.head_dim // 2
    angle = np.arange(rows)[:, None] * config.rope_theta ** (-np.arange(half) / half)
    rotation = np.exp(1j * angle)[:, None]

    def rotated(x):
        z = (x[..., :half] + 1j * x[..., half:]) * rotation
        return np.concatenate([z.real, z.imag], -1)

    blocks = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters["blocks"])
    embedding = np.asarray(parameters["embedding"], np.float64)
    x = embedding[tokens] + np.asarray(parameters["stream_embedding"], np.float64)[0]
    for i in range(config.num_layers):
        attention, mlp = (
            {k: w[i] for k, w in blocks[part].items()} for part in ("attention", "mlp")
        )
        y = norm(x, blocks["attention_norm"][i])
        q = rotated(norm(np.einsum("td,dnh->tnh", y, attention["q"]), attention["q_norm"]))
        k = rotated(norm(np.einsum("td,dnh->tnh", y, attention["k"]), attention["k_norm"]))
        v = np.einsum("td,dnh->tnh", y, attention["v"])
        heads = []
        for n in range(config.num_heads):
            m = n * config.num_kv_heads // config.num_heads
            scores = q[:, n] @ k[:, m].T / np.sqrt(config.head_dim)
            scores = np.where(np.tril(np.ones((rows, rows), bool)), scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, m])
        x = x + np.einsum("ntH,dnH->td", np.stack(heads), attention["o"])
        y = norm(x, blocks["mlp_norm"][i])
        gate = y @ mlp["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ mlp["up"])) @ mlp["down"].T
    return norm(x, np.asarray(parameters["final_norm"], np.float64)) @ embedding.T


def test_one_stream_is_an_ordinary_decoder(make_model):
    model = make_model(1)
    tokens, cells, position = random_table(11, 1)
    ours = forward(model, tokens, cells, position)[0, :, 0]
    theirs = plain_decoder(model.config, model.parameters, tokens[0, :, 0])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_permuting_streams_permutes_logits(make_model):
    model, order = make_model(3), np.array([2, 0, 1])
    tokens, cells, position = random_table(7, 3, absent=0.2)
    embedding = model.parameters["stream_embedding"][order]
    parameters = model.parameters | {"stream_embedding": embedding}
    moved = Cells(cells.row, cells.segment, cells.present[..., order], cells.seen[..., order])
    ours = forward(model, tokens[..., order], moved, position, parameters)
    expected = forward(model, tokens, cells, position)[:, :, order]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 4, 2)], ids=str)
def test_sharded_equals_unsharded(make_model, sizes):
    model = make_model(4, lag=np.random.default_rng(3).choice([0, 1, 2, NEVER], (4, 4)))
    tokens, cells, position = random_table(6, 4, batch=8, absent=0.1, segments=2)
    axes = abstract_model(model.config, model.streams)[2]
    specs = jax.tree.map(lambda a: partition_spec(*a), axes, is_leaf=lambda a: isinstance(a, tuple))
    cell, row = partition_spec("batch", "row", "stream"), partition_spec("batch", "row")
    sharded = jax.jit(
        jax.shard_map(
            lambda parameters, *args: forward(model, *args, parameters),
            mesh=make_mesh(MeshConfig(*sizes)),
            in_specs=(specs, cell, Cells(row, row, cell, cell), row),
            out_specs=partition_spec("batch", "row", "stream", "vocab"),
            check_vma=False,
        )
    )
    ours = sharded(model.parameters, tokens, cells, position)
    np.testing.assert_allclose(ours, forward(model, tokens, cells, position), rtol=0, atol=1e-4)


def test_remat_does_not_change_gradients(make_model):
    model = make_model(3)
    inputs = random_table(6, 3)

    def gradient(remat):
        config = dataclasses.replace(model.config, remat=remat)
        other = LoadedModel(config, model.streams, model.parameters)

        def loss(parameters):
            return jnp.sum(jnp.sin(forward(other, *inputs, parameters)))

        return jax.jit(jax.grad(loss))(model.parameters)

    expected = gradient("none")
    for remat in ("dots", "full", "offload"):
        for ours, theirs in zip(jax.tree.leaves(gradient(remat)), jax.tree.leaves(expected)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
