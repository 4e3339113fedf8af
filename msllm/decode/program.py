"""The compiled functions of an engine: read a table, advance all sessions by a row or by many, copy a session.

All that a user may change while sessions run enters as arrays: nothing compiles twice. On a mesh the functions that run
the model are one `shard_map`, as in training; sessions lie along the axes of `batch`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
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
    Cache,
    Stored,
    attend,
    blocks,
    empty_cache,
    place,
    visible_keys,
    write_cells,
    write_row,
    write_table,
)
from msllm.decode.sampling import FREE, Chosen, Sampling, row_keys, sample
from msllm.kernels import cpu as cpu_kernels
from msllm.model.attention.backend import Backend
from msllm.model.attention.dispatch import get_backend, portable_backend
from msllm.model.layers import InputWeight, OutputWeight, rope_angles
from msllm.model.model import MultiStreamLM, abstract_model, bind
from msllm.runtime.compiler import compiler_options
from msllm.sharding import axis_index, axis_size, gather, gather_streams, mesh_axes, partition_spec
from msllm.streams import Cells, StreamSpec, Visibility, pad_lag

NOWHERE = 1 << 30  # a place beyond any window
RUN_ROWS = 32  # rows that one call of `run` advances at most

log = logging.getLogger("msllm")


class State(NamedTuple):
    """What the device holds of B sessions."""

    cache: Cache
    said: jax.Array  # [B, S, V] bool: tokens that the stream has held, besides silence
    allowed: jax.Array  # [B, S, V] bool: tokens that the model may sample


class Controls(NamedTuple):
    """What a session is asked to do until it is asked otherwise; [B, S] unless noted."""

    sampling: Sampling
    presence_penalty: Any  # float32
    seed: Any  # [B] uint32
    kept: Any  # [B] int32: rows at the beginning that never fall out


class Feed(NamedTuple):
    """What the host says of one row of each session; [B, S] unless noted. `run` takes many, with a first axis of rows."""

    active: Any  # [B] bool: the session advances
    row: Any  # [B] int32: the number of the row that is read; the next one is chosen
    read: Any  # int32: its tokens; FREE (in `run`, after the first row): as they were chosen
    read_present: Any  # bool: its cells that are not absent
    given: Any  # int32: tokens of the next row that are not the model's choice, else FREE
    penalty: Any  # float32: subtracted from the next row's logit of silence


class Specs(NamedTuple):
    """PartitionSpecs of what goes through `shard_map`."""

    weights: Any
    state: Any
    controls: Any
    feed: Any


class DecodeProgram:
    """See `decode_program`. Attributes:

    streams: S', which is S and the absent streams that make it a multiple of the mesh axis `stream`.
    layout: of keys and values.
    prepare(parameters) -> weights: by layer, in the compute dtype where that is what they are used in.
    empty() -> State.
    read(weights, state, slot, tokens, present, rows) -> State: a table, at the beginning of a session.
    advance(weights, state, controls, feed) -> (State, packed Chosen, logits or None): one row.
    run(weights, state, controls, feeds, rows) -> (State, packed Chosen of [RUN_ROWS, B, S]): `rows` rows.
    clear(state, slot), copy(state, source, target), allow(state, slot, allowed [S', V]) -> State.
    take(state, slot) -> one session's State, with B = 1. put(state, slot, session) -> State.

    The state that goes in is donated.
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
    ):
        self.config, self.spec, self.mesh, self.window = config, streams, mesh, window
        self.all_logits, self.silence_id = all_logits, silence_id
        self.streams = streams.size + (-streams.size % mesh.shape["stream"] if mesh else 0)
        self._lag = pad_lag(streams.lag_array, self.streams)
        self.graph, _, axes = abstract_model(config, streams)
        per_layer = jax.tree.map(lambda a: a[1:], axes["blocks"], is_leaf=_is_axes)
        self._axes = {**axes, "blocks": [per_layer] * config.num_layers}

        platform = mesh.devices.flat[0].platform if mesh else jax.default_backend()
        self._kernels = _kernels(platform, config, mesh is None or mesh.size == 1)
        self.layout = PANELS if self._kernels.attend_row else ROWS_LAST
        self._block_rows = blocks(window, self.layout)[1]
        stored = BITS if cache_dtype == "bfloat16" and platform == "cpu" else cache_dtype
        self.empty_state = lambda: State(
            empty_cache(config, sessions, window, self.streams, stored, self.layout),
            *(
                jnp.full((sessions, self.streams, config.vocab_size), value)
                for value in (False, True)
            ),
        )
        specs = self._specs()
        jit = functools.partial(jax.jit, compiler_options=compiler_options(platform))

        def placed(spec):
            return {"out_shardings": _named(mesh, spec)} if mesh else {}

        self.prepare = jit(self._prepare, **placed(specs.weights))
        self.empty = jit(self.empty_state, **placed(specs.state))
        scalar, by_stream = PartitionSpec(), PartitionSpec(None, None, *partition_spec("stream"))
        cells = partition_spec("batch", "stream")
        chosen = PartitionSpec(None, *cells)
        logits = partition_spec("batch", "stream", "replicated") if all_logits else None
        sharded = functools.partial(self._sharded, jit)

        def in_run(spec):
            return PartitionSpec(None, *spec)

        self.advance = sharded(
            self._advance,
            (specs.weights, specs.state, specs.controls, specs.feed),
            (specs.state, chosen, logits),
        )
        feeds = Feed(*map(in_run, specs.feed))
        self.run = sharded(
            self._run,
            (specs.weights, specs.state, specs.controls, feeds, scalar),
            (specs.state, in_run(chosen)),
        )
        self.read = sharded(
            self._read,
            (specs.weights, specs.state, scalar, by_stream, by_stream, scalar),
            specs.state,
        )
        whole = jax.tree.map(lambda _: scalar, specs.state)
        self.clear = jit(self._clear, donate_argnums=0, **placed(specs.state))
        self.copy = jit(self._copy, donate_argnums=0, **placed(specs.state))
        self.allow = jit(self._allow, donate_argnums=0, **placed(specs.state))
        self.put = jit(self._put, donate_argnums=0, **placed(specs.state))
        self.take = jit(self._take, **placed(whole))

    def _specs(self) -> Specs:
        """How everything lies on the mesh."""
        cells, per_session = partition_spec("batch", "stream"), partition_spec("batch")
        state = jax.eval_shape(self.empty_state)

        def fit(axes, layers):
            lies = partition_spec(*axes)
            return [
                [Stored(lies, None if x.scale is None else lies) for x in layer] for layer in layers
            ]

        vocabulary = PartitionSpec(*cells, None)

        def weight_spec(axes):
            # Packed weights have axes of their own, and are on one device.
            return PartitionSpec() if self._kernels.packed else partition_spec(*axes)

        return Specs(
            jax.tree.map(weight_spec, self._axes, is_leaf=_is_axes),
            State(
                # Which cells are there is known to every device of the mesh axis `stream`: all queries come to all keys.
                Cache(*map(fit, self.layout, state.cache[:2]), Cells(*[per_session] * 4)),
                vocabulary,
                vocabulary,
            ),
            Controls(Sampling(*[cells] * len(Sampling._fields)), cells, per_session, per_session),
            Feed(per_session, per_session, cells, cells, cells, cells),
        )

    def _sharded(self, jit, function, in_specs, out_specs):
        """`function(weights, state, ...)`, compiled, with the state donated."""
        if self.mesh is None:
            return jit(function, donate_argnums=1)
        function = jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return jit(function, donate_argnums=1)

    def _prepare(self, parameters):
        """Weights of matrix products in the compute dtype, so that no row converts them; each layer's in arrays of its own. With
        kernels they are of the types that the kernels multiply."""
        dtype = self.config.compute_dtype

        def cast(x):
            # With the axis of layers, norms have two dimensions: they stay float32.
            return x.astype(dtype) if x.ndim > 2 else x

        blocks = jax.tree.map(cast, parameters["blocks"])
        tables = {
            name: parameters[name].astype(dtype)
            for name in ("embedding", "head")
            if name in parameters
        }
        if self._kernels.packed:
            blocks = self._pack({**parameters, "blocks": blocks})
            head = "embedding" if self.config.tie_embeddings else "head"
            tables[head] = cpu_kernels.TableWeight(tables[head])
        layers = [jax.tree.map(lambda x: x[i], blocks) for i in range(self.config.num_layers)]
        return {**parameters, **tables, "blocks": layers}

    def _pack(self, parameters):
        """The blocks' weights of all layers, packed where the model uses them in `linear` or `linear_back` alone."""

        def pack(variable: nnx.Variable):
            weight = variable.get_value()
            if not isinstance(variable, InputWeight | OutputWeight):
                return weight
            sum_over_first = isinstance(variable, InputWeight)
            return jax.vmap(lambda layer: cpu_kernels.pack(layer, sum_over_first))(weight)

        variables = nnx.state(bind(self.graph, parameters).blocks)
        return nnx.to_pure_dict(variables, extract_fn=pack)

    def _layers(self, weights) -> list[MultiStreamLM]:
        """The model, once for each layer: `blocks` of the i-th holds the weights of layer i."""
        return [bind(self.graph, {**weights, "blocks": layer}) for layer in weights["blocks"]]

    def _cells(self, row, tokens, present) -> Cells:
        """Cells of rows [B, T] with tokens and present [B, T, streams of this device]."""
        seen = present & (tokens != self.silence_id) if self.spec.skip_silence else present
        return Cells(row, jnp.ones_like(row), present, seen)

    def _next_row(self, weights, state: State, controls: Controls, feed: Feed, tokens):
        """Reads `tokens` and chooses the next row: (state, Chosen, logits [B, S, V] or None)."""
        layers, size = self._layers(weights), tokens.shape[1]
        streams = axis_index("stream") * size + jnp.arange(size)
        cells = self._cells(feed.row[:, None], tokens[:, None], feed.read_present[:, None])
        everyone = cells._replace(
            present=gather_streams(cells.present), seen=gather_streams(cells.seen)
        )
        # A session that does not advance writes beyond its window, that is nowhere.
        at = jnp.where(feed.active, place(feed.row, controls.kept, self.window), NOWHERE)
        filled = jnp.max(jnp.where(feed.active, jnp.minimum(feed.row + 1, self.window), 1))
        (keys, values, known), said = state.cache, state.said
        known, keys, values = write_cells(known, everyone, at), list(keys), list(values)
        mask = visible_keys(everyone, known, self._lag, size)

        def angles():
            return rope_angles(feed.row[:, None], self.config)

        # A condition: else XLA:CPU fuses them, with their cosines, into the rotations of every layer.
        angles = jax.lax.cond(
            jnp.any(feed.active), angles, lambda: jax.tree.map(jnp.zeros_like, angles())
        )
        x = layers[0].embed(tokens[:, None])
        for i, model in enumerate(layers):

            def attention(q, k, v):
                keys[i], values[i] = write_row(
                    keys[i], values[i], k, v, at, self.layout, self._block_rows
                )
                return attend(q, keys[i], values[i], mask, filled, self._kernels.attend_row)

            x = model.blocks(x, angles, attention)
        counts = feed.active[:, None] & feed.read_present & (tokens != self.silence_id)
        batch, stream = jnp.arange(len(tokens))[:, None], jnp.arange(size)
        said = said.at[batch, stream, tokens].max(counts)
        state = State(Cache(keys, values, known), said, state.allowed)
        chosen, logits = self._choose(layers[0], x[:, 0], state, controls, feed, streams)
        return state, chosen, logits

    def _choose(
        self, model, x, state: State, controls: Controls, feed: Feed, streams
    ) -> tuple[Chosen, Any]:
        """Chosen of what the last block gives, x [B, S, D]. Streams that are only fed need no head."""
        size = x.shape[1]
        # One program runs on all parts of the mesh axis `stream`: a place is left out where all of them hold an input.
        needed = [
            s
            for s in range(size)
            if self.all_logits or any(k != "input" for k in self.spec.kinds[s::size])
        ]
        if not needed:
            nothing = jnp.full(feed.given.shape, jnp.nan, jnp.float32)
            return Chosen(feed.given, nothing, nothing), None
        pick = (lambda x: x) if len(needed) == size else (lambda x: x[:, jnp.array(needed)])
        logits = gather(model.logits(model.finish(pick(x))), 2, mesh_axes("vocab"))
        is_silence = jnp.arange(self.config.vocab_size) == self.silence_id
        bias = jnp.where(is_silence, -pick(feed.penalty)[..., None], 0.0)
        bias -= pick(controls.presence_penalty)[..., None] * pick(state.said)
        keys = row_keys(controls.seed, feed.row + 1, pick(streams[None])[0])
        sampling, given = Sampling(*map(pick, controls.sampling)), pick(feed.given)
        chosen = sample(logits, bias, pick(state.allowed), sampling, given, keys, feed.active)
        if len(needed) < size:

            def place(all_cells, x):
                return all_cells.at[:, jnp.array(needed)].set(x)

            nothing = jnp.full(feed.given.shape, jnp.nan, jnp.float32)
            chosen = Chosen(*map(place, (feed.given, nothing, nothing), chosen))
        return chosen, logits if self.all_logits else None

    def _advance(self, weights, state: State, controls: Controls, feed: Feed):
        state, chosen, logits = self._next_row(weights, state, controls, feed, feed.read)
        return state, chosen.packed(), logits

    def _run(self, weights, state: State, controls: Controls, feeds: Feed, rows):
        def body(i, carry):
            state, tokens, out = carry
            feed = jax.tree.map(lambda x: x[i], feeds)
            tokens = jnp.where(feed.read != FREE, feed.read, tokens)
            state, chosen, _ = self._next_row(weights, state, controls, feed, tokens)
            # As the host does it: what is absent holds token 0.
            out = jax.tree.map(lambda out, x: out.at[i].set(x), out, chosen)
            return state, chosen.tokens, out

        shape = feeds.read.shape
        out = Chosen(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape))
        state, _, out = jax.lax.fori_loop(0, rows, body, (state, feeds.read[0], out))
        return state, out.packed()

    def _read(self, weights, state: State, slot, tokens, present, rows) -> State:
        """A table [1, T, S] of which the first `rows` rows are there, into an empty slot. T at most the window."""
        layers, size = self._layers(weights), tokens.shape[2]
        row = jnp.arange(tokens.shape[1])[None]
        here = row < rows
        present = present & here[..., None]
        cells = self._cells(row, tokens, present)
        everyone = cells._replace(
            present=gather_streams(cells.present), seen=gather_streams(cells.seen)
        )
        streams = axis_index("stream") * size + jnp.arange(size)
        visibility = Visibility(cells, everyone, self._lag, streams)
        angles, backend, x = (
            rope_angles(row, self.config),
            self._kernels.attention,
            layers[0].embed(tokens),
        )
        sessions = state.said.shape[0]
        mine = slot - self._batch_index() * sessions
        at = (
            jnp.where((mine >= 0) & (mine < sessions), mine, sessions),
        )  # beyond: another device's, write nothing
        cache = state.cache

        keys, values = list(cache.keys), list(cache.values)
        for i, model in enumerate(layers):

            def attention(q, k, v):
                keys[i], values[i] = (
                    write_table(old[i], new, *at, axes, self._block_rows)
                    for old, new, axes in zip((keys, values), (k, v), self.layout)
                )
                return backend.attend(q, gather_streams(k), gather_streams(v), visibility)

            x = model.blocks(x, angles, attention)
        everyone = everyone._replace(row=jnp.where(here, row, UNREAD))
        first = (*at, slice(0, tokens.shape[1]))
        known = jax.tree.map(
            lambda old, new: old.at[first].set(new[0], mode="drop"), cache.cells, everyone
        )
        counts = present & (tokens != self.silence_id)
        said = jnp.zeros(state.said.shape[1:], bool).at[jnp.arange(size), tokens[0]].max(counts[0])
        return State(
            Cache(keys, values, known), state.said.at[at].set(said, mode="drop"), state.allowed
        )

    def _batch_index(self):
        """This device's place along the mesh axes of `batch`."""
        index = 0
        for axis in mesh_axes("batch"):
            index = index * axis_size(axis) + axis_index(axis)
        return index

    def _clear(self, state: State, slot) -> State:
        """Keys and values stay where they are: cells that are not seen hide them."""
        cells = state.cache.cells

        def fill(x, value):
            return x.at[slot].set(value)

        cells = Cells(
            fill(cells.row, UNREAD),
            cells.segment,
            fill(cells.present, False),
            fill(cells.seen, False),
        )
        return State(
            state.cache._replace(cells=cells), fill(state.said, False), fill(state.allowed, True)
        )

    def _copy(self, state: State, source, target) -> State:
        return self._put(state, target, self._take(state, source))

    def _allow(self, state: State, slot, allowed) -> State:
        return state._replace(allowed=state.allowed.at[slot].set(allowed))

    def _take(self, state: State, slot) -> State:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), state)

    def _put(self, state: State, slot, session: State) -> State:
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, slot, 0), state, session
        )


@functools.lru_cache(maxsize=16)
def decode_program(
    config: ModelConfig,
    streams: StreamSpec,
    sessions: int,
    window: int,
    mesh: Mesh | None,
    cache_dtype: str,
    all_logits: bool,
    silence_id: int,
) -> DecodeProgram:
    """The program for B = `sessions` sessions with windows of `window` rows; engines of one kind share it.

    Args:
      mesh: None: the default device. cache_dtype: one of `cache.DTYPES`.
      all_logits: compute and return the logits of all streams, also of inputs.
      silence_id: -1 if there is none.
    """
    return DecodeProgram(
        config, streams, sessions, window, mesh, cache_dtype, all_logits, silence_id
    )


class Kernels(NamedTuple):
    """What does the work.

    Attributes:
      attention: a backend, for tables.
      packed: whether weights are stored in the types that the CPU kernels multiply (msllm/model/linear.py).
      attend_row: attention of a row over a block of the cache, see `cache.attend`; None: XLA's.
    """

    attention: Backend
    packed: bool = False
    attend_row: Callable | None = None


def _kernels(platform: str, config: ModelConfig, one_device: bool) -> Kernels:
    slow = Kernels(portable_backend(config))
    if platform != "cpu":
        return slow
    if reason := cpu_kernels.unavailable_reason():
        log.info("decoding by XLA alone, which is slower with several streams: %s", reason)
        return slow
    here = config.compute_dtype == "float32" and config.attention in ("auto", "cpu")
    attention = get_backend("cpu") if here else slow.attention
    # Panels are of a whole weight, and a device of several has a part of it.
    return Kernels(attention, packed=one_device, attend_row=cpu_kernels.attend_row)


def _is_axes(x) -> bool:
    return isinstance(x, tuple)


def _named(mesh, specs):
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
