"""The multi-stream decoder: embeddings, a scan over blocks, and the head.

Activations are [B, T, S, D] throughout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from msllm.config import INPUT_ONLY, ModelConfig
from msllm.errors import UserError
from msllm.model.attention.backend import Backend
from msllm.model.attention.dispatch import (
    KEEP_OUTPUT,
    attention,
    attention_of_draw,
    portable_backend,
)
from msllm.model.block import Block, block_class, check_variables
from msllm.model.combine import Weights
from msllm.model.layers import (
    SAVED,
    Angles,
    constant,
    gather_param,
    parameter,
    rms_norm,
    rope_angles,
    rotate,
)
from msllm.model.linear import head_logits
from msllm.model.relays import (
    Expanded,
    add_relay_columns,
    add_relays,
    attend_to_columns,
    local_columns,
    relay_keys,
)
from msllm.optim import path_name
from msllm.sharding import (
    FSDP,
    axis_index,
    axis_size,
    gather,
    gather_streams,
    mesh_axes,
    named_sharding,
    psum,
    rows_to_cells,
)
from msllm.streams import Cells, StreamSpec, make_cells, positions

# See `relays.relay_keys`. Every part adds to the gradients of all weights, so more parts cost more.
RELAY_PARTS = 4


class MultiStreamLM(nnx.Module):
    """A decoder-only language model over S streams. With S = 1 it is an ordinary one."""

    def __init__(self, config: ModelConfig, streams: StreamSpec, rngs: nnx.Rngs | None):
        """Creates the parameters. Without `rngs` only their shapes are meaningful."""
        self.config, self.streams = config, streams
        table_shape, table_axes = (config.vocab_size, config.d_model), ("vocab", "embed")
        self.embedding = parameter(rngs, table_shape, table_axes, 0.02)
        if config.stream_embedding:
            shape, axes = (streams.num_classes, config.d_model), ("replicated", "embed")
            self.stream_embedding = parameter(rngs, shape, axes, 0.02)
        if streams.identities:
            shape, axes = (streams.identities, config.d_model), ("replicated", "embed")
            self.stream_embedding_identities = parameter(rngs, shape, axes, 0.02)
        self.blocks = block_class(config)(config, rngs)
        self.final_norm = constant(1.0, (config.d_model,), ("embed",))
        if not config.tie_embeddings:
            self.head = parameter(rngs, table_shape, table_axes, config.d_model**-0.5)
        if streams.combine:
            self.combine = Weights(config, streams, rngs)

    def read(
        self,
        tables: Mapping[str, jax.Array],
        silence_id: int | None,
        backend: Backend | None = None,
    ) -> jax.Array:
        """Computes the hidden states of tables that start at row 0.

        Args:
          tables: `tokens` [B, T, S] int32, `present` [B, T, S] bool and `segment` [B, T] int32; in
            training also what was drawn, `identity` and `lag_draw` (msllm/model/draws.py).
          silence_id: the silence token. Needed only if the streams set `skip_silence`, or if only
            some tokens pass an edge.
          backend: as in `__call__`.

        Returns: as in `__call__`.
        """
        cells = self.cells(tables, silence_id)
        position = positions(tables["segment"])
        draw = tables["lag_draw"][0] if "lag_draw" in tables else None
        identity = tables.get("identity")
        return self(tables["tokens"], cells, position, backend, silence_id, identity, draw)

    def cells(self, tables: Mapping[str, jax.Array], silence_id: int | None) -> Cells:
        """The cells of tables, for attention. The arguments are those of `read`."""
        silent = tables["tokens"] == silence_id if self.streams.skip_silence else None
        return make_cells(tables["present"], tables["segment"], silent)

    def __call__(
        self,
        tokens: jax.Array,
        cells: Cells,
        position: jax.Array,
        backend: Backend | None = None,
        silence_id: int | None = None,
        identity: jax.Array | None = None,
        lag_draw: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the hidden states, from which the model predicts each stream's next cell.

        Args:
          tokens: [B, T, S] int32.
          cells: what attention needs to know of these cells, from `cells`.
          position: RoPE positions, [B, T] or [B, T, S] int32.
          backend: the attention backend, from `choose_backend`. None means one that runs on every
            device.
          silence_id: the silence token. Needed only if some tokens do not pass an edge.
          identity: [B, T, members] int32, the identity of the members of groups; None: 0, 1, ...
          lag_draw: [draws] int32, which of its values each drawn lag has; None: the first.

        Returns: [B, T, S, D] after the final norm, in the compute dtype.
        """
        config, columns = self.config, local_columns(self.streams)
        expanded = add_relays(columns, tokens, cells, silence_id)
        chosen = backend or portable_backend(config)
        if position.ndim == 3:
            position = add_relay_columns(columns, position)
        angles = rope_angles(position, config)
        graph, weights = nnx.split(self.blocks)

        def attend_by(q, k, v, lag, traced_lag=None):
            return attention(
                q,
                k,
                v,
                cells,
                lag,
                chosen,
                config.kv_parts,
                config.kv_ring,
                expanded.cells,
                traced_lag,
            )

        def attend(q, k, v):
            return attention_of_draw(columns.lag_choices, lag_draw, chosen, attend_by, q, k, v)

        if config.remat in INPUT_ONLY:
            # Without this, the gathered keys and values stay in memory through the backward pass of
            # the MLP.
            attend = jax.checkpoint(attend, policy=KEEP_OUTPUT)

        x = self.embed(expanded.tokens, expanded.streams, identity)
        relays = None
        if columns.relays and not config.block:
            relays = self._relay_keys(x, expanded, angles, identity)
            x = x[:, :, : columns.streams]
            angles = _take_columns(angles, slice(0, columns.streams))

        def layer(x, weights_and_relays):
            weights, relays = weights_and_relays

            def attend_to_all(q, k, v):
                if relays is None:
                    return attend_to_columns(columns.streams, attend)(q, k, v)
                k, v = (jnp.concatenate(both, axis=2) for both in zip((k, v), relays))
                return attend(q, k, v)

            block = nnx.merge(graph, weights)
            return block(checkpoint_name(x, "input"), angles, attend_to_all), None

        x, _ = jax.lax.scan(_remat(layer, config.remat), x, (weights, relays))
        return self.finish(x[:, :, : columns.streams])

    def _relay_keys(
        self, x: jax.Array, expanded: Expanded, angles: Angles, identity: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The keys and values of this device's relays in all layers, [layers, B, T, R, K, H].

        Args:
          x: [B, T, M, D], the embeddings of all columns.
          expanded: the columns.
          angles: of all columns.
          identity: as in `__call__`.
        """
        graph, weights = nnx.split(self.blocks)
        of_relays = slice(local_columns(self.streams).streams, None)
        # Moving the few inputs of a part to the host would take longer than computing them again.
        remat = "full" if self.config.remat == "offload" else self.config.remat

        def layer(x, weights_and_more):
            weights, is_last = weights_and_more
            block = nnx.merge(graph, weights)
            k, v = block.relay_keys(checkpoint_name(x, "input"))
            # Nothing sees the relays after their last keys.
            x = jax.lax.cond(is_last, lambda x, v: x, block.next_relays, x, v)
            return x, (k, v)

        def tower(x):
            is_last = jnp.arange(self.config.num_layers) == self.config.num_layers - 1
            return jax.lax.scan(_remat(layer, remat), x, (weights, is_last))[1]

        # Each part gathers the weights once, if they are sharded.
        parts = RELAY_PARTS if axis_size("stream") * axis_size("fsdp") == 1 else 2
        tokens = expanded.tokens[:, :, of_relays]
        if self.streams.identities and identity is not None:
            # The embedding of a token depends on the identity, which changes between examples.
            index = self._group_indices(expanded.streams[of_relays])
            tokens += self.config.vocab_size * identity[:, :, jnp.maximum(index, 0)]
        k, v = relay_keys(x[:, :, of_relays], tokens, tower, parts)
        return rotate(k, _take_columns(angles, of_relays)), v

    def layers(self) -> Iterator[Block]:
        """Yields each layer's block, for code that does not scan over the layers."""
        graph, weights = nnx.split(self.blocks)
        for layer in range(self.config.num_layers):
            yield nnx.merge(graph, jax.tree.map(lambda w: w[layer], weights))  # noqa: B023

    def finish(self, x: jax.Array) -> jax.Array:
        """The final norm of the last block's output."""
        return rms_norm(x, gather_param(self.final_norm, jnp.float32), self.config.norm_eps)

    def embed(
        self, tokens: jax.Array, streams: jax.Array, identity: jax.Array | None = None
    ) -> jax.Array:
        """Token plus stream embeddings, in the compute dtype.

        Args:
          tokens: [B, T, M] int32.
          streams: [M] int32, the stream of each column.
          identity: as in `__call__`.

        Returns: [B, T, M, D].
        """
        # The table is far larger than the rows that a step looks up, so the rows are sent and not
        # the table. Every device looks up the tokens of all devices in the columns that it holds.
        # The gradient of the table then needs no sum over devices.
        table, ids = self.embedding.get_value(), gather(gather_streams(tokens), 0, FSDP)
        local = ids - axis_index("tensor") * table.shape[0]  # index in this device's vocabulary
        here = (local >= 0) & (local < table.shape[0])
        rows = jnp.where(here[..., None], table[jnp.where(here, local, 0)], 0.0)
        rows = rows_to_cells(rows.astype(self.config.compute_dtype))
        x = psum(rows, *mesh_axes("vocab")).astype(jnp.float32)
        # Streams past the last one only pad the mesh. They are absent, so any vector will do.
        streams = jnp.minimum(streams, self.streams.size - 1)
        if self.streams.rotations:
            x = rotate(x[..., None, :], _rotation_angles(self.streams.rotations, streams))[
                ..., 0, :
            ]
        if self.config.stream_embedding:
            stream_table = gather_param(self.stream_embedding, jnp.float32)
            if len(stream_table) != self.streams.num_classes:  # indexing would clamp in silence
                raise UserError(
                    f"the parameters are those of {len(stream_table)} streams, and there are"
                    f" {self.streams.num_classes}: use the streams that the model was trained with"
                )
            classes = jnp.asarray(self.streams.classes)[streams] if self.streams.groups else streams
            x = x + stream_table[classes]
        if self.streams.identities:
            table = gather_param(self.stream_embedding_identities, jnp.float32)
            index = self._group_indices(streams)
            chosen = jnp.maximum(index, 0)
            vectors = table[chosen if identity is None else identity[:, :, chosen]]
            x = x + jnp.where((index >= 0)[:, None], vectors, 0)
        return x.astype(self.config.compute_dtype)

    def _group_indices(self, streams: jax.Array) -> jax.Array:
        """The index of each stream [M] in its group; -1: it is in no group."""
        streams = jnp.minimum(streams, self.streams.size - 1)
        return jnp.asarray(self.streams.roster.indices)[streams]

    @property
    def head_parameter(self) -> nnx.Param:
        """The parameter [V, D] of the head; inside `shard_map`, this device's part of it."""
        return self.embedding if self.config.tie_embeddings else self.head

    def head_table(self) -> Any:
        """The head [V, D] in the compute dtype, gathered along D; see `gather_param`."""
        return gather_param(self.head_parameter, self.config.compute_dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """The logits [..., V] float32 of hidden states [..., D].

        For scoring and decoding. Training never holds all logits (msllm/loss.py). The prediction of
        a stream with a rule in `streams.combine` does not follow from its own hidden state alone:
        see `msllm.model.combine.next_logits`.
        """
        return head_logits(hidden, self.head_table())


def _rotation_angles(rotations: Sequence[float], streams: jax.Array) -> Angles:
    """cos and sin [M, 1, 1] of the rotations, in degrees, of streams [M]."""
    angles = np.radians(np.asarray(rotations, np.float64))
    cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
    return jnp.asarray(cos)[streams][:, None, None], jnp.asarray(sin)[streams][:, None, None]


def _take_columns(angles: Angles, columns: slice) -> Angles:
    """The angles of some columns. Angles without a column for each stream hold for all."""
    if angles[0].shape[2] == 1:
        return angles
    return angles[0][:, :, columns], angles[1][:, :, columns]


def _remat(layer: Callable, policy: str) -> Callable:
    """Wraps a layer so that the backward pass recomputes what `policy` does not save.

    - `none` saves everything.
    - `dots` saves the results of matrix products and of attention. Norms, rotations and activation
      functions take most of the memory and are cheap to recompute.
    - `full` saves the layer's input.
    - `offload` saves the layer's input in the host's memory.
    """
    if policy == "none":
        return layer
    policies = {
        "dots": jax.checkpoint_policies.save_only_these_names(*SAVED),
        "full": None,
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["input"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    return jax.checkpoint(layer, policy=policies[policy], prevent_cse=False)


def abstract_model(
    config: ModelConfig, streams: StreamSpec
) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """The structure of a model, without its arrays.

    Returns: the graphdef, the shapes of the parameters, and their logical axes. The last two are
      nested dicts of the same structure.

    Raises UserError if `config.block` cannot be imported, or holds anything but parameters; or if
    the tokens that pass an edge are not ids of the vocabulary.
    """
    streams.check_token_sets(config.vocab_size)
    graph, state = nnx.split(nnx.eval_shape(lambda: MultiStreamLM(config, streams, None)))
    if config.block:
        check_variables(config, state["blocks"])
    shapes = nnx.to_pure_dict(state)
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    axes = jax.tree.unflatten(jax.tree.structure(shapes), [leaf.axes for leaf in leaves])
    return graph, shapes, axes


def parameter_shardings(axes: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """NamedShardings of the parameters, from their logical axes."""
    return jax.tree.map(
        lambda names: named_sharding(mesh, *names), axes, is_leaf=lambda x: isinstance(x, tuple)
    )


def init_parameters(config: ModelConfig, streams: StreamSpec, seed: int) -> dict[str, Any]:
    """Initialises the parameters, as nested dicts.

    Call it under `jit` with `parameter_shardings` as `out_shardings`, so that each device creates
    its own part.
    """
    return nnx.to_pure_dict(nnx.split(MultiStreamLM(config, streams, nnx.Rngs(seed)))[1])


@functools.lru_cache(maxsize=32)
def _parameter_shapes(config: ModelConfig, streams: StreamSpec) -> dict[str, tuple[int, ...]]:
    _, shapes, _ = abstract_model(config, streams)
    return {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(shapes)}


def check_parameters(config: ModelConfig, streams: StreamSpec, parameters: dict[str, Any]) -> None:
    """Raises UserError unless the parameters have the names and shapes that the model needs."""
    needed = _parameter_shapes(config, streams)
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    found = {path_name(path): x.shape for path, x in leaves}
    for name in sorted(needed.keys() | found):
        if needed.get(name) != found.get(name):
            has, needs = found.get(name, "missing"), needed.get(name, "not to exist")
            raise UserError(
                f"the parameters are those of another model: {name} is {has} and has to be {needs}"
                f" for {streams.num_classes} streams: use the config and the streams that the model"
                " was trained with"
            )


def bind(graph: nnx.GraphDef, parameters: dict[str, Any]) -> MultiStreamLM:
    """The model with these parameters."""
    return nnx.merge(graph, nnx.State(parameters))
