"""The train step: a pure function of (state, batch), compiled once for a mesh.

Training, benchmarks, ahead-of-time compilation for pods and the tests all use this step.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from msllm.config import Config, import_object
from msllm.errors import UserError
from msllm.loss import (
    Forward,
    Penalty,
    mixture_loss,
    next_row_loss,
    objective_loss,
    targets_and_weights,
)
from msllm.model.attention.dispatch import choose_backend
from msllm.model.block import check_block
from msllm.model.combine import part_of_device, pool_products, sources_of_device
from msllm.model.draws import draw
from msllm.model.layers import gather_weight
from msllm.model.model import abstract_model, bind, init_parameters, parameter_shardings
from msllm.model.relays import columns_of
from msllm.optim import (
    check_no_decay,
    global_norm,
    leaf_norms,
    make_optimizer,
    optimizer_shardings,
    path_name,
    schedule,
)
from msllm.runtime.compiler import compiler_options
from msllm.sharding import (
    BATCH_AXES,
    StreamSubset,
    axis_index,
    axis_size,
    check_mesh,
    gather,
    mesh_axes,
    named_sharding,
    partition_spec,
    psum,
)
from msllm.streams import StreamSpec

Parameters = dict[str, Any]  # nested dicts of float32 arrays
Batch = dict[str, jax.Array]  # the tables of BATCH_AXES
Sums = dict[str, jax.Array]  # sums over the cells of a batch, per stream or over all streams
PER_STREAM_SUMS = ("nll", "nll_spoken", "targets", "targets_spoken")


class TrainState(NamedTuple):
    """Everything that changes from step to step."""

    step: jax.Array  # [] int32: number of steps done; the next batch is batch(step)
    parameters: Parameters
    opt_state: Any
    skipped: jax.Array  # [] int32: updates skipped so far (loss or gradient not finite)
    skipped_in_row: jax.Array  # [] int32: updates skipped in a row up to now


class Program:
    """The compiled functions of a run.

    Attributes:
      config, streams, mesh, silence_id: the arguments of the constructor.
      backend: the attention backend.
      graph: the graphdef of the model.
      parameter_names: paths of the parameters, in the order of the gradient norms.
      state_shardings: shardings of the TrainState.
      abstract_state: shapes, dtypes and shardings of the TrainState.
      abstract_batch: shapes, dtypes and shardings of a batch. Its tables are [B, T, S'], where S'
        is S padded with absent streams to a multiple of the mesh axis `stream`.
      init: () -> TrainState. Every device initialises its own shards.
      step: (state, batch) -> (state, metrics). Donates the old state.
      evaluate: (parameters, batch) -> sums over a batch, for all streams.
    """

    def __init__(
        self,
        config: Config,
        streams: StreamSpec,
        mesh: Mesh,
        silence_id: int = -1,
        weighted: bool = False,
    ):
        """Prepares the functions. Each is compiled on its first call.

        Args:
          config: all settings; `model.vocab_size` must be set.
          streams: the streams of the model.
          mesh: as `make_mesh` returns it.
          silence_id: the silence token; -1 if there is none.
          weighted: batches have loss weights of cells (`Loader.has_weights`).

        Raises UserError if the config does not fit the mesh, or if code that it names cannot be
        used.
        """
        check_mesh(config, mesh)
        check_block(config.model, streams.size, cached=False)
        objective = config.loss.objective
        self._objective = import_object(objective, "config.loss.objective") if objective else None
        self._penalty = _make_penalty(config, streams, mesh)
        self.config, self.streams, self.mesh, self.silence_id = config, streams, mesh, silence_id
        absent = -streams.size % mesh.shape["stream"]
        self._loss_weights = streams.loss_weights + (0.0,) * absent
        columns = columns_of(streams, mesh.shape["stream"])
        self.backend = choose_backend(
            config.model, columns.lag_choices, config.data.rows, mesh, columns.relays
        )
        self.graph, shapes, axes = abstract_model(config.model, streams)
        paths = jax.tree_util.tree_leaves_with_path(shapes)
        self.parameter_names = [path_name(path) for path, _ in paths]
        self._parameter_specs = jax.tree.map(
            lambda a: partition_spec(*a), axes, is_leaf=lambda a: isinstance(a, tuple)
        )
        check_no_decay(config.optim, self.parameter_names)
        self._optimizer = make_optimizer(config.optim, config.steps)
        self.abstract_batch = self._abstract_batch(streams.size + absent, weighted)
        self.state_shardings, self.abstract_state = self._abstract_state(shapes, axes)
        self._compile_functions()

    def _abstract_batch(self, streams: int, weighted: bool) -> dict[str, jax.ShapeDtypeStruct]:
        data = self.config.data
        tables = (data.batch_size, data.rows, streams)
        kinds = {
            "tokens": (tables, jnp.int32),
            "present": (tables, bool),
            "segment": (tables[:2], jnp.int32),
        }
        if weighted:
            kinds["weights"] = (tables, jnp.float32)
        return {
            name: jax.ShapeDtypeStruct(*kind, sharding=named_sharding(self.mesh, *BATCH_AXES[name]))
            for name, kind in kinds.items()
        }

    def _abstract_state(self, shapes, axes) -> tuple[TrainState, TrainState]:
        """The shardings of the state, and its shapes with these shardings.

        Args:
          shapes: shapes of the parameters.
          axes: logical axes of the parameters.
        """
        # Any: the leaves are shardings or shapes in place of arrays.
        scalar: Any = named_sharding(self.mesh)
        shardings = parameter_shardings(axes, self.mesh)
        count: Any = jax.ShapeDtypeStruct((), jnp.int32)
        moments = jax.eval_shape(self._optimizer.init, shapes)
        moment_shardings = optimizer_shardings(moments, shapes, shardings, scalar)
        state_shardings = TrainState(scalar, shardings, moment_shardings, scalar, scalar)
        state = TrainState(count, shapes, moments, count, count)

        def with_sharding(x, sharding):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return state_shardings, jax.tree.map(with_sharding, state, state_shardings)

    def _compile_functions(self) -> None:
        states, scalar = self.state_shardings, named_sharding(self.mesh)
        batches = {name: x.sharding for name, x in self.abstract_batch.items()}
        jit = functools.partial(
            jax.jit, compiler_options=compiler_options(self.mesh.devices.flat[0].platform)
        )
        self.init = jit(self._init, out_shardings=states)
        self.step = jit(
            self._step,
            donate_argnums=0,
            in_shardings=(states, batches),
            out_shardings=(states, scalar),
        )
        self.evaluate = jit(
            self._evaluate, in_shardings=(states.parameters, batches), out_shardings=scalar
        )

    def _init(self) -> TrainState:
        parameters = init_parameters(self.config.model, self.streams, self.config.seed)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, parameters, self._optimizer.init(parameters), zero, zero)

    def _losses(
        self, parameters: Parameters, batch: Batch, total_weight, all_streams: bool
    ) -> tuple[jax.Array, Sums]:
        """The loss and the sums of a batch of tables.

        Args:
          total_weight: the loss is the weighted sum over the batch, divided by this weight.
          all_streams: for evaluation: compute the head for streams of weight 0 as well, and use the
            built-in loss in place of `config.loss.objective`.
        """
        batch_specs = {name: partition_spec(*BATCH_AXES[name]) for name in batch}
        scalar, per_stream = PartitionSpec(), partition_spec("stream")
        sums_specs = dict.fromkeys(PER_STREAM_SUMS, per_stream)
        counts_specs = {"cells": scalar, "spoken": scalar}
        if self._penalty and not all_streams:
            counts_specs["penalty"] = scalar
        # No check_vma: the custom VJP of the loss does not declare over which mesh axes its values
        # vary.
        sharded = jax.shard_map(
            functools.partial(self._losses_of_device, all_streams=all_streams),
            mesh=self.mesh,
            in_specs=(self._parameter_specs, batch_specs, scalar),
            out_specs=(scalar, (sums_specs, counts_specs)),
            check_vma=False,
        )
        loss, (sums, counts) = sharded(parameters, batch, total_weight)
        return loss, {**{name: x[: self.streams.size] for name, x in sums.items()}, **counts}

    def _losses_of_device(
        self, parameters: Parameters, batch: Batch, total_weight, all_streams: bool
    ) -> tuple[jax.Array, tuple[Sums, Sums]]:
        """The part of `_losses` inside `shard_map`, on this device's tables and streams.

        Returns:
          The loss of the whole batch; and (sums over all tables for each stream of this device,
          counts over the whole batch, and the penalty if there is one).
        """
        model, size = bind(self.graph, parameters), batch["tokens"].shape[2]
        streams = axis_index("stream") * size + jnp.arange(size)
        hidden = model.read(batch, self.silence_id, self.backend)
        targets, counted, weights = targets_and_weights(
            batch, jnp.asarray(self._loss_weights)[streams]
        )
        present = model.cells(batch, self.silence_id).present
        needed = [all_streams or weight > 0 for weight in self._loss_weights]
        mixed = [rule.stream for rule in self.streams.combine if rule.mode == "mixture"]
        mixtures = [rule for rule in self.streams.combine if rule.stream in mixed]
        mixtures = [rule for rule in mixtures if needed[rule.stream]]
        needed = [need and s not in mixed for s, need in enumerate(needed)]
        subset = StreamSubset.of(needed, size)
        is_mixed = jnp.isin(streams, jnp.array(mixed, jnp.int32))
        pooled = pool_products(model, hidden, present)

        def take(x):
            return subset.take(x, axis=2)

        loss_of = next_row_loss
        if self._objective and not all_streams:
            loss_of = functools.partial(objective_loss, self._objective)
        gather_rows = functools.partial(gather_weight, dtype=hidden.dtype, axis=1)
        loss, sums = jnp.zeros(()), dict.fromkeys(PER_STREAM_SUMS, jnp.zeros(size))
        # The subset may hold streams of weight 0. They are not reported, because which ones it
        # holds depends on the mesh.
        reported = (counted if all_streams else weights > 0) & ~is_mixed
        if subset.places:
            loss, nll = loss_of(
                take(pooled),
                model.head_parameter[...],
                take(targets),
                take(jnp.where(is_mixed, 0, weights)) / total_weight,
                self.config.loss,
                gather_rows,
            )
            spoken = take(reported) & (take(targets) != self.silence_id)
            sums = self._sums(nll, take(reported), spoken, subset)
        for rule in mixtures:
            of_stream = functools.partial(part_of_device, stream=rule.stream)
            reported = counted if all_streams else weights > 0
            more, nll = mixture_loss(
                *sources_of_device(model, rule, hidden, present),
                model.head_parameter[...],
                of_stream(targets),
                of_stream(weights) / total_weight,
                self.config.loss,
                gather_rows,
            )
            loss = loss + more
            spoken = of_stream(reported & (targets != self.silence_id))
            of_rule = _sums_over_cells(nll, of_stream(reported), spoken)
            sums = {
                name: x + jnp.where(streams == rule.stream, psum(of_rule[name], "stream"), 0)
                for name, x in sums.items()
            }
        counts = self._counts(present, batch["tokens"])
        if self._penalty and not all_streams:
            penalty = self._penalty_of_device(model, hidden, batch)
            loss = loss + self.config.penalty.weight * penalty
            counts["penalty"] = psum(penalty, *mesh_axes("batch"))
        return psum(loss, *mesh_axes("batch"), "stream"), (sums, counts)

    def _penalty_of_device(self, model: Any, hidden: jax.Array, batch: Batch) -> jax.Array:
        """This device's share of the penalty, which is a number of the whole batch."""
        axes = mesh_axes("batch")

        def whole(x):
            return gather(x, 0, (axes,))

        head = gather_weight(model.head_parameter[...], dtype=hidden.dtype, axis=1)
        forward = Forward(whole(hidden), head, {name: whole(x) for name, x in batch.items()})
        found = self._penalty(forward) if self._penalty else jnp.zeros(())
        if found.shape != () or not jnp.issubdtype(found.dtype, jnp.floating):
            raise UserError(
                f"config.penalty.function is {self.config.penalty.function!r}: it returned"
                f" {found.dtype} {found.shape}; return one floating-point number"
            )
        devices = 1
        for axis in axes:
            devices *= axis_size(axis)
        return found.astype(jnp.float32) / devices

    def _sums(self, nll, reported, spoken, subset: StreamSubset) -> Sums:
        """PER_STREAM_SUMS over all tables for this device's streams. Arguments: [B, T, streams]."""

        sums = _sums_over_cells(nll, reported, spoken)
        return {name: subset.put(x, jnp.zeros(subset.size)) for name, x in sums.items()}

    def _counts(self, present, tokens) -> Sums:
        """Counts of present cells, and of present cells that are not silent, in the whole batch."""

        def count(x):
            return psum(x.sum(dtype=jnp.float32), *mesh_axes("batch"), "stream")

        return {"cells": count(present), "spoken": count(present & (tokens != self.silence_id))}

    def _gradients(self, parameters: Parameters, batch: Batch) -> tuple[Parameters, Any, Sums]:
        """(gradients, loss, sums) of a batch, accumulated over `optim.accumulate` micro-batches."""
        weights = targets_and_weights(batch, self._loss_weights)[2]
        total_weight = jnp.maximum(weights.sum(), 1e-9)

        def gradients_of(batch):
            gradient = jax.value_and_grad(self._losses, has_aux=True)
            (loss, sums), gradients = gradient(parameters, batch, total_weight, False)
            return gradients, loss, sums

        parts = self.config.optim.accumulate
        if parts == 1:
            return gradients_of(batch)

        # Table b goes to micro-batch b % parts: so every micro-batch is spread over all devices.
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch
        )

        def add(totals, batch):
            return jax.tree.map(jnp.add, totals, gradients_of(batch)), None

        shapes = jax.eval_shape(gradients_of, jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, micro)[0]

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        optim, steps = self.config.optim, self.config.steps
        drawn = draw(self.streams, self.config.seed, state.step, batch["segment"])
        gradients, loss, sums = self._gradients(state.parameters, {**batch, **drawn})
        norms = leaf_norms(gradients)
        finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(norms))
        # A skipped update is an update by zero. Selecting between the new and the old parameters
        # would keep both in memory.
        updates, opt_state = self._optimizer.update(
            gradients,
            state.opt_state,
            state.parameters,
            finite=finite,
            silence_id=self.silence_id,
        )
        updates = jax.tree.map(lambda x: jnp.where(finite, x, 0), updates)
        parameters = optax.apply_updates(state.parameters, updates)
        skip = (~finite).astype(jnp.int32)
        skipped, skipped_in_row = state.skipped + skip, skip * (state.skipped_in_row + 1)
        metrics = {
            **sums,
            "loss": loss,
            "gradient_norms": norms,
            "gradient_norm": global_norm(norms),
            "update_norm": global_norm(leaf_norms(updates)),
            "parameter_norm": global_norm(leaf_norms(parameters)),
            # The schedule counts updates, not steps: a skipped update does not advance it.
            "learning_rate": schedule(optim, steps)(state.step - state.skipped),
            "skipped": skipped,
            "skipped_in_row": skipped_in_row,
        }
        return TrainState(state.step + 1, parameters, opt_state, skipped, skipped_in_row), metrics

    def _evaluate(self, parameters: Parameters, batch: Batch) -> Sums:
        weights = targets_and_weights(batch, self._loss_weights)[2]
        loss, sums = self._losses(parameters, batch, 1.0, True)
        return {**sums, "loss": loss, "weight": weights.sum()}


def _sums_over_cells(nll, reported, spoken) -> Sums:
    """PER_STREAM_SUMS over the first two dimensions, and over the devices along `batch`."""

    def over_cells(x):
        return psum(x.sum((0, 1)), *mesh_axes("batch"))

    return {
        "nll": over_cells(nll * reported),
        "nll_spoken": over_cells(nll * spoken),
        "targets": over_cells(reported.astype(jnp.float32)),
        "targets_spoken": over_cells(spoken.astype(jnp.float32)),
    }


def _make_penalty(config: Config, streams: StreamSpec, mesh: Mesh) -> Penalty | None:
    """The function of `config.penalty`, if there is one.

    Raises UserError if it cannot be imported, or if the mesh divides a table or the head.
    """
    if not config.penalty.function:
        return None
    for axis in ("stream", "tensor"):
        if mesh.shape[axis] > 1:
            raise UserError(
                f"config.penalty.function is {config.penalty.function!r}: it sees whole tables and"
                f" the whole head, and config.mesh.{axis} is {mesh.shape[axis]}; set"
                f" config.mesh.{axis}=1"
            )
    return import_object(config.penalty.function, "config.penalty.function")(config, streams)
