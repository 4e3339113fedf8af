"""The compiled functions of an engine.

They read a table, advance all sessions by one or several rows, and copy sessions. All settings that
a user may change while sessions run are arrays, so changing them does not recompile. On a mesh,
each function that runs the model is one `shard_map`, as in training, and sessions are sharded over
the mesh axes of `batch`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msllm.config import ModelConfig
from msllm.decode.cache import (
    BITS,
    PANELS,
    ROWS_LAST,
    UNREAD,
    Blocks,
    Cache,
    Stored,
    attend,
    block_sizes,
    empty_cache,
    place,
    visible_keys,
    write_cells,
    write_row,
    write_table,
)
from msllm.decode.sampling import FREE, Array, Sampled, Sampling, row_keys, sample
from msllm.kernels import cpu as cpu_kernels
from msllm.model.attention.backend import Backend
from msllm.model.attention.dispatch import get_backend, portable_backend
from msllm.model.block import check_block
from msllm.model.combine import pool_products, sources
from msllm.model.layers import Angles, InputWeight, OutputWeight, rope_angles
from msllm.model.model import MultiStreamLM, abstract_model, bind
from msllm.model.relays import add_relays, attend_to_columns, columns_of, stream_columns
from msllm.runtime.compiler import compiler_options
from msllm.sharding import (
    StreamSubset,
    axis_index,
    axis_size,
    gather,
    gather_streams,
    mesh_axes,
    partition_spec,
)
from msllm.streams import Cells, StreamSpec, Visibility

NOWHERE = 1 << 30  # a place beyond any window
RUN_ROWS = 32  # the most rows that one call of `run` advances

log = logging.getLogger("msllm")

Parameters = dict[str, Any]  # nested dicts of arrays
Weights = dict[str, Any]  # from `DecodeProgram.prepare`; "blocks" is a list of layers


class State(NamedTuple):
    """The device's state of B sessions."""

    cache: Cache
    said: Array  # [B, S, V] bool: tokens that the stream has held, except silence
    allowed: Array  # [B, S, V] bool: tokens that the model may sample


class Controls(NamedTuple):
    """Settings of each session that hold until the user changes them; [B, S] unless noted."""

    sampling: Sampling
    presence_penalty: Array  # float32
    seed: Array  # [B] uint32
    keep: Array  # [B] int32: the number of first rows that never fall out of the window


class RowInputs(NamedTuple):
    """The host's inputs for one row of each session; [B, S] unless noted.

    For `run`, every field has a leading axis of rows.
    """

    active: Array  # [B] bool: the session advances
    row: Array  # [B] int32: the number of the row that is read; the row after it is sampled
    # int32: the tokens that are read. In `run`, FREE after the first row means the sampled token.
    read: Array
    read_present: Array  # bool: the cells of the row that are not absent
    given: Array  # int32: tokens of the next row that are set and not sampled; FREE elsewhere
    penalty: Array  # float32: subtracted from the next row's logit of silence
    # int32, in `run` of a model with mail: the cell whose token the next row holds, as
    # row * S + stream, where rows count from the first one that the call samples; FREE elsewhere
    mail: Array | None = None


class Kernels(NamedTuple):
    """The implementations that a program uses.

    Attributes:
      attention: the attention backend for tables.
      packed: whether weights are stored in the types that the CPU kernels multiply
        (msllm/model/linear.py).
      attend_row: the kernel for attention of a row over a block of the cache (see
        `cache.attend`); None: use XLA.
    """

    attention: Backend
    packed: bool = False
    attend_row: Callable | None = None

    @classmethod
    def fastest(cls, platform: str, config: ModelConfig, one_device: bool) -> Kernels:
        """The fastest implementations on a platform (cpu, gpu, tpu)."""
        portable = cls(portable_backend(config))
        if platform != "cpu":
            return portable
        if reason := cpu_kernels.unavailable_reason():
            log.info("decoding by XLA alone, which is slower with several streams: %s", reason)
            return portable
        suits = config.compute_dtype == "float32" and config.attention in ("auto", "cpu")
        attention = get_backend("cpu") if suits else portable.attention
        # Packing needs the full weight, and each of several devices holds only a part of it.
        return cls(attention, packed=one_device, attend_row=cpu_kernels.attend_row)


class _Specs(NamedTuple):
    """PartitionSpecs of the arguments and results of the compiled functions."""

    weights: Any
    state: Any
    controls: Any
    inputs: Any
    sampled: PartitionSpec  # packed, [3, B, S]


class DecodeProgram:
    """The compiled functions for B sessions of one kind of model.

    Make programs with `decode_program`, which lets engines share them. The functions donate the
    state that they receive, except `take`.

    Attributes:
      streams: S', the number of streams S plus the absent streams that make it a multiple of the
        size of the mesh axis `stream`.
      layout: the order of the dimensions of keys and values in the cache.
      prepare: (parameters) -> weights by layer. Weights of matrix products are in the compute
        dtype.
      empty: () -> State without any row.
      read: (weights, state, slot, tokens, present, rows) -> State. Reads a table of `rows` rows,
        padded to [1, T, S'], into an empty session.
      advance: (weights, state, controls, inputs) -> (State, packed Sampled, logits or None).
        Advances by one row.
      run: (weights, state, controls, inputs, rows) -> (State, packed Sampled of [RUN_ROWS, B, S]).
        Advances by `rows` rows.
      clear: (state, slot) -> State. Empties a session.
      copy: (state, source, target) -> State. Copies a session.
      allow: (state, slot, allowed [S', V]) -> State. Sets the tokens that a session may sample.
      take: (state, slot) -> the State of one session, with B = 1.
      put: (state, slot, session) -> State. Replaces a session by the result of `take`.
    """

    def __init__(
        self,
        config: ModelConfig,
        streams: StreamSpec,
        sessions: int,
        window: int,
        mesh: Mesh | None,
        cache_dtype: str,
        all_logits: bool,
        silence_id: int,
        decodable: int | None = None,
        has_mail: bool = False,
    ):
        """Builds the functions. jax compiles each of them when it is first called.

        Args:
          config: the model's architecture.
          streams: the model's streams.
          sessions: B.
          window: the most rows that a session sees.
          mesh: None: the default device.
          cache_dtype: one of `cache.DTYPES`.
          all_logits: compute and return the logits of all streams, inputs included.
          silence_id: the silence token; -1 if there is none.
          decodable: only token ids below this number are sampled; None: all.
          has_mail: `run` takes `RowInputs.mail`. The rules are the host's.

        Raises UserError if `config.block` is a user's class that keeps a state besides the cache.
        """
        check_block(config, streams.size, cached=True)
        self.config, self.spec, self.mesh, self.window = config, streams, mesh, window
        self.sessions, self.all_logits, self.silence_id = sessions, all_logits, silence_id
        self._has_mail = has_mail
        self.decodable = config.vocab_size if decodable is None else decodable
        self.streams = streams.size + (-streams.size % mesh.shape["stream"] if mesh else 0)
        self._columns = columns_of(streams, mesh.shape["stream"] if mesh else 1)
        self.graph, _, axes = abstract_model(config, streams)
        layer_axes = jax.tree.map(lambda a: a[1:], axes["blocks"], is_leaf=_is_axes)
        self._axes = {**axes, "blocks": [layer_axes] * config.num_layers}

        platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
        self._kernels = Kernels.fastest(platform, config, mesh is None or mesh.size == 1)
        self.layout = PANELS if self._kernels.attend_row else ROWS_LAST
        self._block_rows = block_sizes(window, self.layout)[1]
        in_bits = cache_dtype == "bfloat16" and platform == "cpu"
        self._cache_dtype = BITS if in_bits else cache_dtype
        self._jit_functions(platform)

    def _jit_functions(self, platform: str) -> None:
        specs = self._specs()
        jit = functools.partial(jax.jit, compiler_options=compiler_options(platform))

        def on_mesh(spec) -> dict[str, Any]:
            """The arguments of `jit` that shard the result."""
            return {"out_shardings": _named_shardings(self.mesh, spec)} if self.mesh else {}

        def jit_on_shards(function, in_specs, out_specs):
            """Compiles `function(weights, state, ...)`, which runs the model."""
            if self.mesh is not None:
                function = jax.shard_map(
                    function,
                    mesh=self.mesh,
                    in_specs=in_specs,
                    out_specs=out_specs,
                    check_vma=False,
                )
            return jit(function, donate_argnums=1)

        def of_rows(spec: PartitionSpec) -> PartitionSpec:
            """The spec with a leading axis of rows."""
            return PartitionSpec(None, *spec)

        mail = of_rows(partition_spec("batch", "stream")) if self._has_mail else None
        rows_inputs = RowInputs(*map(of_rows, specs.inputs[:-1]))._replace(mail=mail)
        scalar, table = PartitionSpec(), PartitionSpec(None, None, *partition_spec("stream"))
        logits = partition_spec("batch", "stream", "replicated") if self.all_logits else None
        model_specs = (specs.weights, specs.state)
        self.prepare = jit(self._prepare, **on_mesh(specs.weights))
        self.empty = jit(self._empty, **on_mesh(specs.state))
        self.read = jit_on_shards(
            self._read, (*model_specs, scalar, table, table, scalar), out_specs=specs.state
        )
        self.advance = jit_on_shards(
            self._advance,
            (*model_specs, specs.controls, specs.inputs),
            out_specs=(specs.state, specs.sampled, logits),
        )
        self.run = jit_on_shards(
            self._run,
            (*model_specs, specs.controls, rows_inputs, scalar),
            out_specs=(specs.state, of_rows(specs.sampled)),
        )
        self.clear = jit(self._clear, donate_argnums=0, **on_mesh(specs.state))
        self.copy = jit(self._copy, donate_argnums=0, **on_mesh(specs.state))
        self.allow = jit(self._allow, donate_argnums=0, **on_mesh(specs.state))
        self.put = jit(self._put, donate_argnums=0, **on_mesh(specs.state))
        self.take = jit(self._take, **on_mesh(jax.tree.map(lambda _: scalar, specs.state)))

    def _specs(self) -> _Specs:
        cells, per_session = partition_spec("batch", "stream"), partition_spec("batch")

        def weight_spec(axes):
            # Packed weights have other dimensions, and are used on a single device only.
            return PartitionSpec() if self._kernels.packed else partition_spec(*axes)

        def blocks_spec(axes, layers: list[Blocks]):
            spec = partition_spec(*axes)
            return [
                [Stored(spec, None if block.scale is None else spec) for block in blocks]
                for blocks in layers
            ]

        cache = jax.eval_shape(self._empty).cache
        cache_spec = Cache(
            blocks_spec(self.layout.keys, cache.keys),
            blocks_spec(self.layout.values, cache.values),
            # The queries of all streams attend to the keys of each device, so every device along
            # the mesh axis `stream` holds the cells of all streams.
            Cells(*[per_session] * 4),
        )
        vocabulary = PartitionSpec(*cells, None)
        return _Specs(
            weights=jax.tree.map(weight_spec, self._axes, is_leaf=_is_axes),
            state=State(cache_spec, vocabulary, vocabulary),
            controls=Controls(
                Sampling(*[cells] * len(Sampling._fields)), cells, per_session, per_session
            ),
            inputs=RowInputs(per_session, per_session, cells, cells, cells, cells),
            sampled=PartitionSpec(None, *cells),
        )

    def _empty(self) -> State:
        cache = empty_cache(
            self.config,
            self.sessions,
            self.window,
            len(self._columns.lag),
            self._cache_dtype,
            self.layout,
        )
        tokens = (self.sessions, self.streams, self.config.vocab_size)
        allowed = jnp.broadcast_to(self._allowed(), tokens)
        return State(cache, jnp.full(tokens, False), allowed)

    def _allowed(self) -> jax.Array:
        """[V] bool: the tokens that a session may sample unless it is restricted."""
        return jnp.arange(self.config.vocab_size) < self.decodable

    def _prepare(self, parameters: Parameters) -> Weights:
        """Converts the weights once to the form in which every row uses them.

        The weights of matrix products get the compute dtype, and are packed if the kernels need
        that. Each layer has its own arrays.
        """
        dtype = self.config.compute_dtype

        def cast(x):
            # The scales of norms stay float32. They have two dimensions: layers and features.
            return x.astype(dtype) if x.ndim > 2 else x

        blocks = jax.tree.map(cast, parameters["blocks"])
        tables: dict[str, Any] = {
            name: parameters[name].astype(dtype)
            for name in ("embedding", "head")
            if name in parameters
        }
        if self._kernels.packed:
            blocks = self._pack({**parameters, "blocks": blocks})
            head = "embedding" if self.config.tie_embeddings else "head"
            tables[head] = cpu_kernels.TableWeight(tables[head])
        layers = [
            jax.tree.map(lambda x, layer=layer: x[layer], blocks)
            for layer in range(self.config.num_layers)
        ]
        return {**parameters, **tables, "blocks": layers}

    def _pack(self, parameters: Parameters) -> dict[str, Any]:
        """The blocks, in which the weights of `linear` and `linear_back` are packed."""

        def pack(variable: nnx.Variable):
            weight = variable.get_value()
            if not isinstance(variable, InputWeight | OutputWeight):
                return weight
            sum_over_first = isinstance(variable, InputWeight)
            return jax.vmap(lambda layer: cpu_kernels.pack(layer, sum_over_first))(weight)

        variables = nnx.state(bind(self.graph, parameters).blocks)
        return nnx.to_pure_dict(variables, extract_fn=pack)

    def _layers(self, weights: Weights) -> list[MultiStreamLM]:
        """One model per layer: `blocks` of the i-th model has the weights of layer i."""
        return [bind(self.graph, {**weights, "blocks": layer}) for layer in weights["blocks"]]

    def _apply_blocks(
        self, layers: Sequence[MultiStreamLM], x: jax.Array, angles: Angles, cache: Cache, attend
    ) -> tuple[jax.Array, list[Blocks], list[Blocks]]:
        """Applies all layers, each with its own part of the cache.

        Args:
          attend: (q, k, v, keys, values) -> (output, new keys, new values), for one layer.

        Returns: the last layer's output, and the new keys and values of the cache.
        """
        all_keys, all_values = [], []
        for model, keys, values in zip(layers, cache.keys, cache.values):

            def attend_in_layer(q, k, v, keys=keys, values=values):
                def attend_and_store(q, k, v):
                    out, new_keys, new_values = attend(q, k, v, keys, values)
                    all_keys.append(new_keys)
                    all_values.append(new_values)
                    return out

                return attend_to_columns(self._columns.streams, attend_and_store)(q, k, v)

            x = model.blocks(x, angles, attend_in_layer)
        return x, all_keys, all_values

    def _cells(self, row: jax.Array, tokens: jax.Array, present: jax.Array) -> Cells:
        """The cells of rows [B, T], from tokens and present [B, T, streams of this device]."""
        seen = present & (tokens != self.silence_id) if self.spec.skip_silence else present
        return Cells(row, jnp.ones_like(row), present, seen)

    def _next_row(
        self,
        weights: Weights,
        state: State,
        controls: Controls,
        inputs: RowInputs,
        tokens: jax.Array,
    ) -> tuple[State, Sampled, jax.Array | None]:
        """Reads a row of `tokens` [B, S] and samples the next row.

        Returns: the new state, the sampled row, and its logits [B, S, V] or None.
        """
        layers, size, columns = self._layers(weights), tokens.shape[1], self._columns
        streams = axis_index("stream") * size + jnp.arange(size)
        cells = self._cells(inputs.row[:, None], tokens[:, None], inputs.read_present[:, None])
        expanded = add_relays(columns, tokens[:, None], cells, self.silence_id)
        all_cells = _of_all_streams(expanded.cells)
        # A session that does not advance writes to a place beyond its window: nothing is stored.
        at = jnp.where(inputs.active, place(inputs.row, controls.keep, self.window), NOWHERE)
        read_rows = jnp.minimum(inputs.row + 1, self.window)
        filled = jnp.max(jnp.where(inputs.active, read_rows, 1))
        known_cells = write_cells(state.cache.cells, all_cells, at)
        mask = visible_keys(_of_all_streams(cells), known_cells, columns)

        def attend_to_cache(q, k, v, keys, values):
            keys, values = write_row(keys, values, k, v, at, self.layout, self._block_rows)
            out = attend(q, keys, values, mask, filled, self._kernels.attend_row)
            return out, keys, values

        angles = self._row_angles(inputs)
        x = layers[0].embed(expanded.tokens, expanded.streams)
        x, keys, values = self._apply_blocks(layers, x, angles, state.cache, attend_to_cache)
        counts = inputs.active[:, None] & inputs.read_present & (tokens != self.silence_id)
        session, stream = jnp.arange(len(tokens))[:, None], jnp.arange(size)
        said = state.said.at[session, stream, tokens].max(counts)
        state = State(Cache(keys, values, known_cells), said, state.allowed)
        sampled, logits = self._sample(layers[0], x[:, 0, :size], state, controls, inputs, streams)
        return state, sampled, logits

    def _row_angles(self, inputs: RowInputs) -> Angles:
        """The rotary angles of the row that is read."""

        def angles():
            return rope_angles(inputs.row[:, None], self.config)

        def zeros():
            return jax.tree.map(jnp.zeros_like, angles())

        # The conditional keeps XLA:CPU from fusing the angles into the rotations of every layer,
        # which would compute the cosines again in each of them.
        return jax.lax.cond(jnp.any(inputs.active), angles, zeros)

    def _sample(
        self,
        model: MultiStreamLM,
        x: jax.Array,
        state: State,
        controls: Controls,
        inputs: RowInputs,
        streams: jax.Array,
    ) -> tuple[Sampled, jax.Array | None]:
        """Samples the next row from the last block's output x [B, S, D].

        Input streams need no logits, because their tokens are given. Their logits are left out
        where that holds for the same places on all devices.
        """
        needed = [self.all_logits or kind != "input" for kind in self.spec.kinds]
        subset = StreamSubset.of(needed, x.shape[1])
        nothing = jnp.full(inputs.given.shape, jnp.nan, jnp.float32)
        unsampled = Sampled(inputs.given, nothing, nothing)
        if not subset.places:
            return unsampled, None

        def take(x):
            return subset.take(x, axis=1)

        logits = self._logits(model, model.finish(x), inputs.read_present, subset)
        is_silence = jnp.arange(self.config.vocab_size) == self.silence_id
        bias = jnp.where(is_silence, -take(inputs.penalty)[..., None], 0.0)
        bias -= take(controls.presence_penalty)[..., None] * take(state.said)
        sampled = sample(
            logits,
            bias,
            take(state.allowed),
            Sampling(*map(take, controls.sampling)),
            take(inputs.given),
            row_keys(controls.seed, inputs.row + 1, take(streams[None])[0]),
            inputs.active,
        )
        sampled = Sampled(*map(subset.put, sampled, unsampled))
        return sampled, logits if self.all_logits else None

    def _logits(
        self, model: MultiStreamLM, hidden: jax.Array, present: jax.Array, subset: StreamSubset
    ) -> jax.Array:
        """The logits [B, places of the subset, V] of the next row; log-probabilities of mixtures.

        Args:
          hidden: [B, S, D] after the final norm.
          present: [B, S] bool, of the row that was read.
        """
        hidden, present = hidden[:, None], present[:, None]
        pooled = subset.take(pool_products(model, hidden, present)[:, 0], axis=1)
        logits = gather(model.logits(pooled), 2, mesh_axes("vocab"))
        for rule in self.spec.combine:
            place, owner = rule.stream % subset.size, rule.stream // subset.size
            if rule.mode == "mixture" and place in subset.places:
                found = sources(model, rule, hidden, present)
                each = gather(model.logits(found.hidden), 3, mesh_axes("vocab"))
                at = subset.places.index(place)
                here = axis_index("stream") == owner
                mixed = jnp.where(here, found.mixed(each)[:, 0], logits[:, at])
                logits = logits.at[:, at].set(mixed)
        return logits

    def _advance(self, weights: Weights, state: State, controls: Controls, inputs: RowInputs):
        state, sampled, logits = self._next_row(weights, state, controls, inputs, inputs.read)
        return state, sampled.packed(), logits

    def _run(
        self,
        weights: Weights,
        state: State,
        controls: Controls,
        inputs: RowInputs,
        rows: jax.Array,
    ):
        def next_row(i, carry):
            state, tokens, out = carry
            row_inputs = jax.tree.map(lambda x: x[i], inputs)
            tokens = jnp.where(row_inputs.read != FREE, row_inputs.read, tokens)
            mail = row_inputs.mail
            if mail is not None:
                is_copy = mail // self.spec.size == i  # of a token that this row samples
                mailed = self._mailed(out.tokens, mail)
                given = jnp.where((mail != FREE) & ~is_copy, mailed, row_inputs.given)
                row_inputs = row_inputs._replace(given=given)
            state, sampled, _ = self._next_row(weights, state, controls, row_inputs, tokens)
            if mail is not None:
                copied = self._mailed(sampled.tokens[None], mail % self.spec.size)
                copied = jnp.where(is_copy, copied, sampled.tokens)
                sampled = sampled._replace(tokens=copied)
            out = jax.tree.map(lambda out, x: out.at[i].set(x), out, sampled)
            return state, sampled.tokens, out

        shape = inputs.read.shape
        out = Sampled(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape))
        state, _, out = jax.lax.fori_loop(0, rows, next_row, (state, inputs.read[0], out))
        return state, out.packed()

    def _mailed(self, tokens: jax.Array, cell: jax.Array) -> jax.Array:
        """The tokens [B, S] of the cells `RowInputs.mail` among the rows [R, B, S] of a run."""
        tokens = gather_streams(tokens)
        row, stream = cell // self.spec.size, cell % self.spec.size
        return tokens[row, jnp.arange(len(cell))[:, None], stream]

    def _read(
        self,
        weights: Weights,
        state: State,
        slot: jax.Array,
        tokens: jax.Array,
        present: jax.Array,
        rows: jax.Array,
    ) -> State:
        """Reads a table [1, T, S], whose first `rows` rows are real, into an empty slot.

        T is at most the window.
        """
        layers, size, columns = self._layers(weights), tokens.shape[2], self._columns
        row = jnp.arange(tokens.shape[1])[None]
        is_real = row < rows
        present = present & is_real[..., None]
        cells = self._cells(row, tokens, present)
        expanded = add_relays(columns, tokens, cells, self.silence_id)
        all_cells = _of_all_streams(expanded.cells)
        visibility = Visibility(cells, all_cells, columns.lag, stream_columns(columns))
        angles = rope_angles(row, self.config)
        x = layers[0].embed(expanded.tokens, expanded.streams)
        slot = self._local_slot(slot, state.said.shape[0])

        def attend_to_table(q, k, v, keys, values):
            keys = write_table(keys, k, slot, self.layout.keys, self._block_rows)
            values = write_table(values, v, slot, self.layout.values, self._block_rows)
            k, v = gather_streams(k), gather_streams(v)
            return self._kernels.attention.attend(q, k, v, visibility), keys, values

        _, keys, values = self._apply_blocks(layers, x, angles, state.cache, attend_to_table)
        all_cells = all_cells._replace(row=jnp.where(is_real, row, UNREAD))

        def write(old, new):
            return old.at[slot, : tokens.shape[1]].set(new[0], mode="drop")

        known_cells = jax.tree.map(write, state.cache.cells, all_cells)
        counts = present & (tokens != self.silence_id)
        said = jnp.zeros(state.said.shape[1:], bool).at[jnp.arange(size), tokens[0]].max(counts[0])
        said = state.said.at[slot].set(said, mode="drop")
        return State(Cache(keys, values, known_cells), said, state.allowed)

    def _local_slot(self, slot: jax.Array, sessions: int) -> jax.Array:
        """The slot among the `sessions` of this device; `sessions` if another device holds it."""
        device = 0  # the index of this device along the mesh axes of `batch`
        for axis in mesh_axes("batch"):
            device = device * axis_size(axis) + axis_index(axis)
        local = slot - device * sessions
        return jnp.where((local >= 0) & (local < sessions), local, sessions)

    def _clear(self, state: State, slot: jax.Array) -> State:
        # The keys and values stay in memory. No query sees them, because no cell is present.
        cells = state.cache.cells
        cells = cells._replace(
            row=cells.row.at[slot].set(UNREAD),
            present=cells.present.at[slot].set(False),
            seen=cells.seen.at[slot].set(False),
        )
        said, allowed = state.said.at[slot].set(False), state.allowed.at[slot].set(self._allowed())
        return State(state.cache._replace(cells=cells), said, allowed)

    def _copy(self, state: State, source: jax.Array, target: jax.Array) -> State:
        return self._put(state, target, self._take(state, source))

    def _allow(self, state: State, slot: jax.Array, allowed: jax.Array) -> State:
        return state._replace(allowed=state.allowed.at[slot].set(allowed))

    def _take(self, state: State, slot: jax.Array) -> State:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), state)

    def _put(self, state: State, slot: jax.Array, session: State) -> State:
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, slot, 0), state, session
        )


# Engines with the same arguments share a program, and with it the compiled functions.
decode_program = functools.lru_cache(maxsize=16)(DecodeProgram)


def _of_all_streams(cells: Cells) -> Cells:
    """The cells of the streams of all devices, from those of this device's streams."""
    return cells._replace(present=gather_streams(cells.present), seen=gather_streams(cells.seen))


def _is_axes(x: Any) -> bool:
    """Whether x is a leaf of a tree of logical axes."""
    return isinstance(x, tuple)


def _named_shardings(mesh: Mesh, specs: Any) -> Any:
    """The same tree with a NamedSharding for each PartitionSpec."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
