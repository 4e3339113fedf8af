"""The train step: a pure function of (state, batch), compiled once for a mesh. `train`, `bench` and tests run this one."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from msllm.config import Config
from msllm.loss import next_row_loss, targets_and_weights
from msllm.model.attention.dispatch import choose_backend
from msllm.model.layers import gather_weight
from msllm.model.model import abstract_model, bind, init_parameters, parameter_shardings
from msllm.optim import global_norm, leaf_norms, optimizer, path_name, schedule
from msllm.runtime.compiler import compiler_options
from msllm.sharding import (
    BATCH_AXES,
    axis_index,
    check_mesh,
    mesh_axes,
    named_sharding,
    partition_spec,
    psum,
)
from msllm.streams import StreamSpec, make_cells, positions


class TrainState(NamedTuple):
    """All that changes from step to step."""

    step: jax.Array  # [] int32: steps done; the next batch is batch(step)
    parameters: dict[str, Any]  # float32
    opt_state: Any
    skipped: jax.Array  # [] int32: updates skipped so far, because loss or gradient was not finite
    skipped_in_row: jax.Array  # [] int32: of these, the latest ones without an update between


class Program:
    """The compiled functions of a run.

    Attributes:
      config, streams, mesh, silence_id: what it was made for. backend: of attention.
      graph: graphdef of the model. parameter_names: paths, in the order of the gradient norms.
      state_shardings, abstract_state: layout and shapes of the TrainState.
      abstract_batch: shapes and layout of a batch: tables [B, T, S'], where S' is S and the absent streams that make it
        a multiple of the mesh axis `stream`.
      init() -> TrainState: every device makes its own part.
      step(state, batch) -> (state, metrics): the old state's memory is reused.
      evaluate(parameters, batch) -> sums over a batch, for all streams.
    """

    def __init__(self, config: Config, streams: StreamSpec, mesh: Mesh, silence_id: int = -1):
        """`config.model.vocab_size` must be set. `silence_id` is -1 if there is none. Raises UserError."""
        check_mesh(config, mesh)
        self.config, self.streams, self.mesh, self.silence_id = config, streams, mesh, silence_id
        absent = -streams.size % mesh.shape["stream"]
        self._loss_weights = streams.loss_weights + (0.0,) * absent
        tables = (config.data.batch_size, config.data.rows, streams.size + absent)
        kinds = {
            "tokens": (tables, jnp.int32),
            "present": (tables, bool),
            "segment": (tables[:2], jnp.int32),
        }
        batches = {name: named_sharding(mesh, *axes) for name, axes in BATCH_AXES.items()}
        self.abstract_batch = {
            k: jax.ShapeDtypeStruct(*kinds[k], sharding=batches[k]) for k in BATCH_AXES
        }
        self.backend = choose_backend(config.model, streams.lag_array, config.data.rows, mesh)
        self.graph, shapes, axes = abstract_model(config.model, streams)
        self.parameter_names = [
            path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
        ]
        self._specs = jax.tree.map(
            lambda a: partition_spec(*a), axes, is_leaf=lambda a: isinstance(a, tuple)
        )
        self._optimizer = optimizer(config.optim, config.steps, silence_id)

        scalar, shardings = named_sharding(mesh), parameter_shardings(axes, mesh)
        count, moments = (
            jax.ShapeDtypeStruct((), jnp.int32),
            jax.eval_shape(self._optimizer.init, shapes),
        )
        of_moments = optax.tree_utils.tree_map_params(
            self._optimizer,
            lambda _, x: x,
            moments,
            shardings,
            transform_non_params=lambda _: scalar,
        )
        self.state_shardings = states = TrainState(scalar, shardings, of_moments, scalar, scalar)

        def shaped(x, sharding):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        state = TrainState(count, shapes, moments, count, count)
        self.abstract_state = jax.tree.map(shaped, state, states)
        jit = functools.partial(
            jax.jit, compiler_options=compiler_options(mesh.devices.flat[0].platform)
        )
        self.init = jit(self._init, out_shardings=states)
        self.step = jit(
            self._step,
            donate_argnums=0,
            in_shardings=(states, batches),
            out_shardings=(states, scalar),
        )
        self.evaluate = jit(self._evaluate, in_shardings=(shardings, batches), out_shardings=scalar)

    def _init(self) -> TrainState:
        parameters = init_parameters(self.config.model, self.streams, self.config.seed)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, parameters, self._optimizer.init(parameters), zero, zero)

    def _losses(self, parameters, batch, total_weight, all_streams: bool):
        """(loss, sums) of a batch of tables; the loss is this batch's share of the mean over `total_weight`.

        `all_streams`: also compute the head for streams of weight 0 (for evaluation).
        """
        config, streams = self.config, self.streams

        def local(parameters, batch, total_weight):
            model = bind(self.graph, parameters)
            tokens, size = batch["tokens"], batch["tokens"].shape[2]
            mine = axis_index("stream") * size + jnp.arange(size)
            silent = tokens == self.silence_id
            cells = make_cells(
                batch["present"], batch["segment"], silent if streams.skip_silence else None
            )
            hidden = model(tokens, cells, positions(batch["segment"]), backend=self.backend)
            targets, counted, weights = targets_and_weights(
                batch, jnp.asarray(self._loss_weights)[mine]
            )
            # The same program runs for all parts of the stream axis: a place is left out if it has weight 0 in each.
            kept = [s for s in range(size) if all_streams or any(streams.loss_weights[s::size])]
            head = model.head_parameter[...]
            complete_rows = functools.partial(gather_weight, dtype=hidden.dtype, axis=1)

            def pick(x):
                return x if len(kept) == size else x[:, :, jnp.array(kept)]

            loss, nll = next_row_loss(
                pick(hidden),
                head,
                pick(targets),
                pick(weights) / total_weight,
                config.loss,
                complete_rows,
            )
            # What is reported must not depend on which streams share a device.
            reported = pick(counted) if all_streams else pick(weights) > 0
            spoken = reported & (pick(targets) != self.silence_id)

            def place(x):
                return x if len(kept) == size else jnp.zeros(size).at[jnp.array(kept)].set(x)

            def over_cells(x):
                return psum(place(x.sum((0, 1))), *mesh_axes("batch"))

            sums = {
                "nll": over_cells(nll * reported),
                "nll_spoken": over_cells(nll * spoken),
                "targets": over_cells(reported.astype(jnp.float32)),
                "targets_spoken": over_cells(spoken.astype(jnp.float32)),
            }

            def cells_in(x):
                return psum(x.sum(dtype=jnp.float32), *mesh_axes("batch"), "stream")

            counts = {"cells": cells_in(cells.present), "spoken": cells_in(cells.present & ~silent)}
            return psum(loss, *mesh_axes("batch"), "stream"), (sums, counts)

        batch_specs = {name: partition_spec(*axes) for name, axes in BATCH_AXES.items()}
        scalar, per_stream = PartitionSpec(), partition_spec("stream")
        names = ("nll", "nll_spoken", "targets", "targets_spoken")
        out = (scalar, (dict.fromkeys(names, per_stream), {"cells": scalar, "spoken": scalar}))
        # The loss has its own VJP, which does not say over which mesh axes its values vary: hence no check of that.
        sharded = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(self._specs, batch_specs, scalar),
            out_specs=out,
            check_vma=False,
        )
        loss, (sums, counts) = sharded(parameters, batch, total_weight)
        return loss, {**{name: x[: streams.size] for name, x in sums.items()}, **counts}

    def _gradients(self, parameters, batch):
        """(gradients, loss, sums) of a whole batch, in micro-batches if the config asks for them."""
        weights = targets_and_weights(batch, self._loss_weights)[2]
        total_weight = jnp.maximum(weights.sum(), 1e-9)
        gradient = jax.value_and_grad(self._losses, has_aux=True)
        parts = self.config.optim.accumulate
        if parts == 1:
            (loss, sums), gradients = gradient(parameters, batch, total_weight, False)
            return gradients, loss, sums

        # Table b goes to micro-batch b % parts: each of them stays spread over all devices.
        micro = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch
        )

        def accumulate(carry, batch):
            (loss, sums), gradients = gradient(parameters, batch, total_weight, False)
            return jax.tree.map(jnp.add, carry, (gradients, loss, sums)), None

        shapes = jax.eval_shape(
            lambda b: gradient(parameters, b, total_weight, False),
            jax.tree.map(lambda x: x[0], micro),
        )
        (loss, sums), gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(accumulate, (gradients, loss, sums), micro)[0]

    def _step(self, state: TrainState, batch):
        gradients, loss, sums = self._gradients(state.parameters, batch)
        norms = leaf_norms(gradients)
        finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(norms))
        # An update that is left out is an update by zero. To choose between new and old arrays would keep both in memory.
        update = optimizer(self.config.optim, self.config.steps, self.silence_id, finite).update
        updates, opt_state = update(gradients, state.opt_state, state.parameters)
        updates = jax.tree.map(lambda x: jnp.where(finite, x, 0), updates)
        parameters = optax.apply_updates(state.parameters, updates)
        opt_state = jax.tree.map(
            lambda x, old: x if x.ndim else jnp.where(finite, x, old), opt_state, state.opt_state
        )
        skip = (~finite).astype(jnp.int32)
        skipped, in_row = state.skipped + skip, skip * (state.skipped_in_row + 1)
        # The schedule counts updates, not steps: a skipped update does not use up learning rate.
        metrics = {
            **sums,
            "loss": loss,
            "gradient_norms": norms,
            "gradient_norm": global_norm(norms),
            "update_norm": global_norm(leaf_norms(updates)),
            "parameter_norm": global_norm(leaf_norms(parameters)),
            "learning_rate": schedule(self.config.optim, self.config.steps)(
                state.step - state.skipped
            ),
            "skipped": skipped,
            "skipped_in_row": in_row,
        }
        return TrainState(state.step + 1, parameters, opt_state, skipped, in_row), metrics

    def _evaluate(self, parameters, batch):
        weights = targets_and_weights(batch, self._loss_weights)[2]
        loss, sums = self._losses(parameters, batch, 1.0, True)
        return {**sums, "loss": loss, "weight": weights.sum()}
