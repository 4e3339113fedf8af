"""The attention weights of a model on one table, for inspection."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msllm.errors import UserError
from msllm.evals.score import check_tables
from msllm.model.attention import reference
from msllm.model.attention.dispatch import attention
from msllm.model.attention.reference import attention_weights, reference_attention
from msllm.model.layers import rope_angles
from msllm.model.model import bind
from msllm.model.relays import add_relays, attend_to_columns, local_columns
from msllm.streams import Visibility, positions
from msllm.weights.load import LoadedModel

MAX_WEIGHTS = 1 << 28  # 1 GiB of float32


def attention_map(
    loaded: LoadedModel,
    tokens: np.ndarray,
    present: np.ndarray | None = None,
    silence_id: int | None = None,
) -> np.ndarray:
    """Computes the attention weights of a model on one table, with the reference backend.

    Args:
      loaded: the model.
      tokens: [T, S].
      present: [T, S] bool; None: every cell is present.
      silence_id: the silence token. Needed if the model has no tokenizer, and either hides silence
        as a key or has edges that only some tokens pass.

    Returns: [layers, N, T, S, T, S] float32: query row and stream, key row and stream. The weights
      of a query sum to 1 over the keys, and are 0 for keys that it does not see.

    Raises UserError if the table does not fit the model, or has too many rows.
    """
    tables = {"tokens": np.asarray(tokens)[None]}
    if present is not None:
        tables["present"] = np.asarray(present)[None]
    tables = check_tables(tables, loaded.streams.size, loaded.config.vocab_size)
    _, rows, streams = tables["tokens"].shape
    size = loaded.config.num_layers * loaded.config.num_heads * (rows * streams) ** 2
    if size > MAX_WEIGHTS:
        raise UserError(
            f"the table has {rows} rows x {streams} streams: its attention weights in all layers "
            f"and heads take {size / 2**28:.1f} GiB, and may take {MAX_WEIGHTS / 2**28:g} GiB; "
            "give fewer rows"
        )
    silence = loaded.silence_token(silence_id)
    return np.asarray(_attention_map(loaded.graph, silence, loaded.parameters, tables))[:, 0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attention_map(
    graph: nnx.GraphDef, silence_id: int, parameters: dict[str, Any], tables: dict[str, jax.Array]
) -> jax.Array:
    """[layers, B, N, T, S, T, S] for tables [B, T, S]."""
    model = bind(graph, parameters)
    cells, columns = model.cells(tables, silence_id), local_columns(model.streams)
    expanded = add_relays(columns, tables["tokens"], cells, silence_id)
    angles = rope_angles(positions(tables["segment"]), model.config)
    found = []

    def attend_and_record(
        q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility
    ) -> jax.Array:
        found.append(attention_weights(q, k, visibility))
        return reference_attention(q, k, v, visibility)

    backend = dataclasses.replace(reference.BACKEND, attend=attend_and_record)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, cells, columns.lag, backend, key_cells=expanded.cells)

    attend_all = attend_to_columns(columns.streams, attend)

    with jax.default_matmul_precision("highest"):
        x = model.embed(*expanded[:2])
        # A loop, because values that are recorded inside a scan cannot leave it.
        for block in model.layers():
            x = block(x, angles, attend_all)
    weights = jnp.stack(found)
    # The weight of a relay counts as attention to the stream whose tokens it shows.
    streams = weights[..., : columns.streams]
    for relay, source in enumerate(columns.sources):
        streams = streams.at[..., source].add(weights[..., columns.streams + relay])
    return streams


def between_streams(weights: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The share of its attention that each stream pays to each stream.

    A share is the sum of a cell's weights over all rows of the source, averaged over the reader's
    present cells.

    Args:
      weights: [..., T, S, T, S], from `attention_map`.
      present: [T, S] bool.

    Returns: [..., S, S] (reader, source). The shares of a reader sum to 1 over the sources. They
      are nan if no cell of the reader is present.
    """
    taken = np.where(present[:, :, None], weights.sum(-2), 0).sum(-3)
    with np.errstate(invalid="ignore"):
        return taken / present.sum(0)[:, None]
