"""How much each cell of a table takes of every other one, layer by layer: for looking at a model, not for running it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msllm.errors import UserError
from msllm.evals.score import check_tables, silence_of
from msllm.model.attention.dispatch import attention
from msllm.model.attention.reference import attention_weights, reference_attention
from msllm.model.layers import rope_angles
from msllm.model.model import bind
from msllm.streams import make_cells, positions
from msllm.weights.load import LoadedModel

MOST = 1 << 28  # numbers: 1 GiB of float32


def attention_map(
    loaded: LoadedModel,
    tokens: np.ndarray,
    present: np.ndarray | None = None,
    silence_id: int | None = None,
) -> np.ndarray:
    """The attention weights of a model in one table: [layers, N, T, S, T, S] float32 (query row and stream, key row and
    stream). Of each query they sum to 1 over the keys, and are 0 where it sees nothing.

    The blocks are those of the model, one after another, on the reference backend. Raises UserError.

    Args:
      tokens: [T, S]. present: [T, S] bool; None: every cell is there.
      silence_id: needed if silence is not seen as a key and the model came without a tokenizer.
    """
    tables = {"tokens": np.asarray(tokens)[None]} | (
        {} if present is None else {"present": np.asarray(present)[None]}
    )
    tables = check_tables(tables, loaded.streams.size, loaded.config.vocab_size)
    _, rows, streams = tables["tokens"].shape
    size = loaded.config.num_layers * loaded.config.num_heads * (rows * streams) ** 2
    if size > MOST:
        raise UserError(
            f"the table has {rows} rows x {streams} streams: their attention weights in all layers and heads are"
            f" {size / 2**28:.1f} GiB, and may be {MOST / 2**28:g} GiB; give fewer rows"
        )
    return np.asarray(
        _attention_map(loaded.graph, silence_of(loaded, silence_id), loaded.parameters, tables)
    )[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attention_map(graph, silence_id, parameters, tables):
    model = bind(graph, parameters)
    tokens, segment = tables["tokens"], tables["segment"]
    silent = tokens == silence_id if model.streams.skip_silence else None
    cells, lag = make_cells(tables["present"], segment, silent), model.streams.lag_array
    angles = rope_angles(positions(segment), model.config)
    blocks, weights = nnx.split(model.blocks)
    found = []

    def kernel(q, k, v, *rule):
        found.append(attention_weights(q, k, *rule))
        return reference_attention(q, k, v, *rule)

    def attend(q, k, v):
        return attention(q, k, v, cells, lag, kernel)

    with jax.default_matmul_precision("highest"):
        x = model.embed(tokens)
        for layer in range(model.config.num_layers):  # a scan would keep `found` to itself
            x = nnx.merge(blocks, jax.tree.map(lambda w: w[layer], weights))(x, angles, attend)
    return jnp.stack(found)


def between_streams(weights: np.ndarray, present: np.ndarray) -> np.ndarray:
    """How much of each stream every stream takes: [..., S, S] (reader, source), of sum 1 over the sources.

    The mean over the reader's present cells of what they take of all rows of the source; nan if it has none.

    Args:
      weights: [..., T, S, T, S], of `attention_map`. present: [T, S] bool.
    """
    taken = np.where(present[:, :, None], weights.sum(-2), 0).sum(-3)
    with np.errstate(invalid="ignore"):
        return taken / present.sum(0)[:, None]
