"""The next-row loss, computed without materialising the logits [B, T, S, V].

Only the logits of one chunk of cells exist at a time. On a mesh, `vocab_chunks` > 1 also gathers
the head one part of its rows at a time. The logits are then computed twice: once for the
denominator of the softmax, and once for the gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from msllm.config import LossConfig
from msllm.errors import UserError
from msllm.sharding import axis_index, axis_size, gather, psum
from msllm.streams import target_mask

TILE = 128  # lanes of a TPU register
MASKED = -1e30  # the logit of a padding row in the last part of the head

GatherRows = Callable[[jax.Array], jax.Array]  # see `next_row_loss`
# (hidden [N, D], head [V, D], targets [N] int32, options) -> loss of each cell [N]
Objective = Callable[[jax.Array, jax.Array, jax.Array, LossConfig], jax.Array]


class Forward(NamedTuple):
    """What a penalty sees of a step: all tables of the batch, on every device.

    Attributes:
      hidden: [B, T, S, D] after the final norm, in the compute dtype.
      head: [V, D] in the compute dtype. The logits are their product.
      batch: tokens [B, T, S], present [B, T, S] and segment [B, T]; optionally weights [B, T, S],
        and what the step has drawn (msllm/model/draws.py).
    """

    hidden: jax.Array
    head: jax.Array
    batch: Mapping[str, jax.Array]


Penalty = Callable[[Forward], jax.Array]  # returns a number, to be minimised


def targets_and_weights(
    batch: Mapping[str, Any], stream_weights: Sequence[float] | jax.Array, loss_mask: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Targets and weights of a batch. The cell (t, s) predicts the token of the cell (t + 1, s).

    Args:
      batch: tokens [B, T, S], present [B, T, S] and segment [B, T]; optionally weights [B, T, S]
        float32, the loss weight of each cell as a target.
      stream_weights: [S], the loss weight of each stream.
      loss_mask: [B, T, S] bool, which cells may predict; None: all.

    Returns:
      targets [B, T, S] int32; counted [B, T, S] bool, which cells predict a cell of a loss weight
      above 0; and weights [B, T, S] float32, the stream's weight times that of the predicted cell
      for counted cells, otherwise 0.
    """
    targets = _next_row(batch["tokens"])
    counted = target_mask(batch["present"], batch["segment"])
    if loss_mask is not None:
        counted = counted & loss_mask
    weights = counted * jnp.asarray(stream_weights, jnp.float32)
    if "weights" in batch:
        of_targets = _next_row(batch["weights"])
        counted = counted & (of_targets > 0)
        weights = weights * of_targets
    return targets, counted, weights


def _next_row(cells: jax.Array) -> jax.Array:
    """The cells (t + 1, s) at (t, s): [B, T, S]; 0 in the last row."""
    return jnp.concatenate([cells[:, 1:], jnp.zeros_like(cells[:, :1])], axis=1)


def _identity(rows: jax.Array) -> jax.Array:
    return rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def next_row_loss(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    options: LossConfig,
    gather_rows: GatherRows = _identity,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the next-row losses, and the plain negative log-likelihoods.

    loss(cell) = (1 - e) nll + e mean_v(-log p_v) + z logsumexp(logits)^2, with
    e = options.label_smoothing and z = options.z_loss (Chowdhery et al. 2022, arXiv 2204.02311,
    section 5). The gradient is computed together with the value, chunk by chunk, so that only the
    logits of one chunk exist at a time (as in Liger kernel, Hsu et al. 2024, arXiv 2410.10989).

    Args:
      hidden: [..., D] in the compute dtype.
      head: [V, D] float32; inside `shard_map` the shard of this device.
      targets: [...] int32.
      weights: [...] float32; has no gradient.
      options: label smoothing, z-loss and chunk sizes.
      gather_rows: gathers rows of the head along D and casts them to the compute dtype. Its
        transpose scatters their gradient.

    Returns: sum(weights * loss), float32, and nll [...] float32, which carries no gradient.
    """
    arguments = hidden, head, targets, weights, options, gather_rows
    loss, nll, _ = _losses(*arguments, with_gradient=False)
    return loss, nll


def _forward(hidden, head, targets, weights, options, gather_rows):
    arguments = hidden, head, targets, weights, options, gather_rows
    loss, nll, gradients = _losses(*arguments, with_gradient=True)
    return (loss, nll), (hidden[:0], *gradients)


def _backward(options, gather_rows, saved, cotangents):
    hidden, d_hidden, d_head = saved
    # The loss is replicated over `tensor`, and `shard_map` splits its cotangent among these
    # devices. The sum restores it.
    scale = psum(cotangents[0], "tensor")
    d_hidden = (d_hidden * scale).astype(hidden.dtype)
    d_head = (d_head * scale).astype(d_head.dtype)
    return d_hidden, d_head, None, None


next_row_loss.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def mixture_loss(
    hidden: jax.Array,
    log_weights: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    options: LossConfig,
    gather_rows: GatherRows = _identity,
) -> tuple[jax.Array, jax.Array]:
    """`next_row_loss` of cells that are predicted by a mixture of P distributions.

    nll(cell) = -logsumexp_i(log_weights_i + log p_i(target)), where p_i is the softmax of the
    logits of hidden_i. As in `next_row_loss`, the gradient is computed together with the value. A
    chunk has `options.chunk_tokens` rows of logits, P for each cell.

    Args:
      hidden: [..., P, D] in the compute dtype.
      log_weights: [..., P] float32, logs of weights that sum to 1.
      head, targets, weights, gather_rows: as in `next_row_loss`.
      options: the chunk sizes. Label smoothing and z-loss must be 0.

    Returns: sum(weights * nll), float32, and nll [...] float32, which carries no gradient.
    """
    arguments = hidden, log_weights, head, targets, weights, options, gather_rows
    loss, nll, _ = _mixture_losses(*arguments, with_gradient=False)
    return loss, nll


def _mixture_losses(hidden, log_weights, head, targets, weights, options, gather_rows, **kwargs):
    assert not (options.label_smoothing or options.z_loss), options
    sources = hidden.shape[-2]

    def per_source(x):
        return jnp.repeat(x[..., None], sources, axis=-1)

    arguments = hidden, head, per_source(targets), per_source(weights), options, gather_rows
    loss, nll, gradients = _losses(*arguments, log_weights=log_weights, **kwargs)
    return loss, nll[..., 0], gradients


def _mixture_forward(hidden, log_weights, head, targets, weights, options, gather_rows):
    arguments = hidden, log_weights, head, targets, weights, options, gather_rows
    loss, nll, gradients = _mixture_losses(*arguments, with_gradient=True)
    return (loss, nll), (hidden[:0], *gradients)


def _mixture_backward(options, gather_rows, saved, cotangents):
    hidden, d_hidden, d_head, d_log_weights = saved
    d_hidden, d_head, _, _ = _backward(options, gather_rows, (hidden, d_hidden, d_head), cotangents)
    # Every device along `tensor` has the gradient of the weights, but only its part of the others.
    return d_hidden, d_log_weights * cotangents[0], d_head, None, None


mixture_loss.defvjp(_mixture_forward, _mixture_backward)


def objective_loss(
    objective: Objective,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    options: LossConfig,
    gather_rows: GatherRows = _identity,
) -> tuple[jax.Array, jax.Array]:
    """`next_row_loss` with a user-defined objective in place of the cross-entropy.

    The objective gets one chunk of cells at a time, and the whole head. The backward pass calls it
    again. Cells of weight 0 contribute nothing, whatever their loss is.

    Returns: sum(weights * loss), float32, and nll [...] float32, which carries no gradient.
    """
    table = gather(gather_rows(head), 0, ("tensor",))
    dtype = table.dtype
    table = table.astype(jnp.float32)  # so that its gradient is accumulated in float32

    @jax.checkpoint
    def chunk_loss(table, hidden, targets, weights):
        losses = objective(hidden, table.astype(dtype), targets, options)
        if losses.shape != targets.shape or not jnp.issubdtype(losses.dtype, jnp.floating):
            raise UserError(
                f"config.loss.objective is {options.objective!r}: it returned {losses.dtype}"
                f" {losses.shape} for {targets.shape[0]} cells; return one floating-point loss per"
                " cell"
            )
        losses = jnp.where(weights > 0, losses.astype(jnp.float32), 0.0)
        return jnp.sum(weights * losses)

    def add_chunk(total, cells):
        return total + chunk_loss(table, *cells), None

    cells = _Cells.of(hidden, targets, weights, options.chunk_tokens)
    # Pad the last chunk with copies of its last cell. With zeros, which no model produces as hidden
    # states, the gradient of an objective may not be finite.
    chunks, size = cells.targets.shape
    last = targets.size - (chunks - 1) * size - 1
    source = jnp.minimum(jnp.arange(size), last)
    padded = cells.hidden.at[-1].set(cells.hidden[-1, source])
    loss, _ = lax.scan(
        add_chunk, jnp.zeros((), jnp.float32), (padded, cells.targets, cells.weights)
    )
    detached = lax.stop_gradient((hidden, head))
    return loss, next_row_loss(*detached, targets, weights, options, gather_rows)[1]


class _Sums(NamedTuple):
    """What the loss needs to know about a cell's logits, over a part of the vocabulary."""

    top: jax.Array  # the highest logit
    exp: jax.Array  # sum of exp(logit - top)
    target: jax.Array  # the target's logit; 0 if another part holds it
    logits: jax.Array  # sum of the logits

    def merge(self, other: _Sums) -> _Sums:
        """Merges two parts of the vocabulary."""
        top = jnp.maximum(self.top, other.top)
        exp = self.exp * jnp.exp(self.top - top) + other.exp * jnp.exp(other.top - top)
        return _Sums(top, exp, self.target + other.target, self.logits + other.logits)

    def over_devices(self) -> _Sums:
        """Merges the parts of the vocabulary on all devices."""
        top = lax.pmax(self.top, "tensor") if axis_size("tensor") > 1 else self.top
        exp, target, logits = psum(
            (self.exp * jnp.exp(self.top - top), self.target, self.logits), "tensor"
        )
        return _Sums(top, exp, target, logits)

    @property
    def log_total(self) -> jax.Array:
        """log(sum of exp(logit))."""
        return self.top + jnp.log(self.exp)


class _Cells(NamedTuple):
    """Cells in chunks of equal size. The last chunk is padded with cells of weight 0."""

    hidden: jax.Array  # [chunks, n, D]
    targets: jax.Array  # [chunks, n]
    weights: jax.Array  # [chunks, n]
    # `hidden` as [chunks, D, n]. Without it XLA:CPU transposes the gradient of the logits, which is
    # much larger, in memory.
    transposed: jax.Array
    # [chunks, n], of a mixture, in which P cells in succession are the sources of one prediction
    log_weights: jax.Array | None

    @classmethod
    def of(cls, hidden, targets, weights, chunk_tokens: int, log_weights=None) -> _Cells:
        count = -(-targets.size // min(chunk_tokens, targets.size))
        size = -(-targets.size // count)  # fills the chunks evenly
        if log_weights is not None:
            sources = log_weights.shape[-1]
            size = -(-size // sources) * sources
            count = -(-targets.size // size)

        def chunks(x, *inner):
            x = x.reshape(targets.size, *inner)
            padding = [(0, count * size - targets.size)] + [(0, 0)] * len(inner)
            return jnp.pad(x, padding).reshape(count, size, *inner)

        hidden = chunks(hidden, hidden.shape[-1])
        log_weights = None if log_weights is None else chunks(log_weights)
        return cls(hidden, chunks(targets), chunks(weights), hidden.swapaxes(1, 2), log_weights)


class _HeadPart(NamedTuple):
    """Some rows of this device's part of the head."""

    rows: jax.Array  # [v, columns of this device] float32
    start: jax.Array | int  # index of the first row among the rows of this device


def _losses(
    hidden,
    head,
    targets,
    weights,
    options,
    gather_rows,
    with_gradient: bool,
    log_weights: jax.Array | None = None,
):
    """(loss, nll [...], gradients), with the arguments of `next_row_loss`.

    The gradients are those with respect to hidden and head, and to log_weights if there are any;
    None without `with_gradient`.

    Args:
      log_weights: [..., P] of a mixture; the last axis of `targets` then holds its P sources.
    """
    cells = _Cells.of(hidden, targets, weights, options.chunk_tokens, log_weights)
    sources = 0 if log_weights is None else log_weights.shape[-1]
    losses = _ChunkedLoss(options, gather_rows, with_gradient, cells, len(head), sources)
    in_parts = losses.one_part if options.vocab_chunks == 1 else losses.many_parts
    loss, nll, shares, d_hidden, d_head = in_parts(head)

    def restore(x, *inner):
        return x.reshape(-1, *inner)[: targets.size].reshape(*targets.shape, *inner)

    gradients = None
    if with_gradient:
        gradients = restore(d_hidden, hidden.shape[-1]), d_head
        if log_weights is not None:
            gradients = *gradients, -restore(shares)
    return loss, restore(nll), gradients


@dataclasses.dataclass(frozen=True)
class _ChunkedLoss:
    """The loss of some cells, chunk by chunk. The gradients are None without `with_gradient`."""

    options: LossConfig
    gather_rows: GatherRows
    with_gradient: bool
    cells: _Cells
    head_rows: int  # rows of the head on this device
    sources: int = 0  # P of a mixture; 0: none

    @property
    def vocab_size(self) -> int:
        return self.head_rows * axis_size("tensor")

    def one_part(self, head):
        """(loss, nll, shares, d_hidden, d_head), with the whole head gathered at once."""
        return self._part_losses(_HeadPart(head, 0), None)

    def many_parts(self, head):
        """The same as `one_part`, with `vocab_chunks` parts of the head gathered in turn."""
        parts = self.options.vocab_chunks
        # Each part is a multiple of TILE rows. Otherwise XLA:TPU lays out the gradient in a way
        # that it cannot scatter.
        size = -(-self.head_rows // (parts * TILE)) * TILE
        padding = parts * size - self.head_rows
        rows = jnp.pad(head, ((0, padding), (0, 0))).reshape(parts, size, -1)
        head_parts = _HeadPart(rows, size * jnp.arange(parts))

        def add_sums(sums, part):
            return sums.merge(self._part_sums(part)), None

        def add_gradients(d_hidden, part):
            _, _, _, more, d_rows = self._part_losses(part, sums)
            return d_hidden + more, d_rows

        shape = self.cells.targets.shape
        empty = _Sums(jnp.full(shape, MASKED), *(jnp.zeros(shape) for _ in range(3)))
        sums = lax.scan(add_sums, empty, head_parts)[0].over_devices()
        loss, nll, shares = self._values(sums, self.cells.weights, self.cells.log_weights)
        if not self.with_gradient:
            return loss, nll, None, None, None
        d_hidden = jnp.zeros(self.cells.hidden.shape, jnp.float32)
        d_hidden, d_head = lax.scan(add_gradients, d_hidden, head_parts)
        return loss, nll, shares, d_hidden, d_head.reshape(parts * size, -1)[: self.head_rows]

    def _part_sums(self, part: _HeadPart) -> _Sums:
        """The _Sums [chunks, n] of one part of the head."""
        table = self.gather_rows(part.rows)

        def chunk(xs):
            return self._logits_and_sums(table, part.start, *xs)[2]

        return lax.map(chunk, (self.cells.hidden, self.cells.targets))

    def _part_losses(self, part: _HeadPart, sums: _Sums | None):
        """(loss, nll, shares, d_hidden, d_rows) through one part of the head.

        `sums` covers the whole vocabulary. None: the part holds all rows of this device.
        """
        table, to_rows = jax.vjp(self.gather_rows, part.rows)

        def chunk(carry, xs):
            loss, d_table = carry
            hidden, transposed, targets, weights, log_weights, sums = xs
            logits, is_target, own = self._logits_and_sums(table, part.start, hidden, targets)
            sums = own.over_devices() if sums is None else sums
            value, nll, shares = self._values(sums, weights, log_weights)
            if not self.with_gradient:
                return (loss + value, d_table), (nll, None, None)
            d_logits = self._d_logits(logits, is_target, sums, shares).astype(hidden.dtype)
            d_hidden = jnp.einsum("nv,vd->nd", d_logits, table)
            d_table = d_table + jnp.einsum(
                "dn,nv->dv", transposed, d_logits, preferred_element_type=jnp.float32
            )
            return (loss + value, d_table), (nll, shares if self.sources else None, d_hidden)

        d_table = jnp.zeros(table.shape[::-1] if self.with_gradient else (), jnp.float32)
        init = jnp.zeros((), jnp.float32), d_table
        cells = self.cells
        xs = (
            cells.hidden,
            cells.transposed,
            cells.targets,
            cells.weights,
            cells.log_weights,
            sums,
        )
        (loss, d_table), (nll, shares, d_hidden) = lax.scan(chunk, init, xs)
        d_rows = to_rows(d_table.T.astype(table.dtype))[0] if self.with_gradient else None
        return loss, nll, shares, d_hidden, d_rows

    def _logits_and_sums(self, table, start, hidden, targets):
        """The logits of some rows of the head, and their _Sums.

        Args:
          table: [v, D], the rows of this device's head from `start` on, gathered along D. The last
            part may end with padding rows.
          start: index of the first of these rows.
          hidden: [n, D].
          targets: [n].

        Returns:
          logits [n, v] float32; is_target [n, v] bool, whether a logit is that of the cell's
          target; and the _Sums [n].
        """
        logits = jnp.einsum("nd,vd->nv", hidden, table, preferred_element_type=jnp.float32)
        row = start + jnp.arange(table.shape[0])
        token = axis_index("tensor") * self.head_rows + row
        summed = logits
        if len(table) * self.options.vocab_chunks > self.head_rows:
            real = row < self.head_rows
            token = jnp.where(real, token, -1)
            summed = jnp.where(real, logits, 0.0)
            logits = jnp.where(real, logits, MASKED)
        is_target = targets[:, None] == token
        top, target = logits.max(-1), _target_logits(logits, is_target, targets, token)
        smooth = self.options.label_smoothing
        summed = summed.sum(-1) if smooth else jnp.zeros_like(top)
        exp = jnp.exp(logits - top[:, None]).sum(-1)
        return logits, is_target, _Sums(top, exp, target, summed)

    def _values(self, sums: _Sums, weights, log_weights) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(weighted sum of the losses, nll of each cell, shares).

        The share of a cell is the weight of its own nll in the gradient: `weights`, which the
        sources of a mixture divide among themselves by their posterior probabilities.
        """
        smooth, z = self.options.label_smoothing, self.options.z_loss
        value = nll = sums.log_total - sums.target
        if log_weights is not None:
            joint = (log_weights - nll).reshape(-1, self.sources)
            log_p = jax.nn.logsumexp(joint, axis=-1, keepdims=True)
            shares = weights * jnp.exp(joint - log_p).reshape(weights.shape)
            nll = jnp.broadcast_to(-log_p, joint.shape).reshape(weights.shape)
            return jnp.sum(weights * nll) / self.sources, nll, shares
        if smooth:
            mean_nll = sums.log_total - sums.logits / self.vocab_size
            value = (1 - smooth) * nll + smooth * mean_nll
        if z:
            value = value + z * jnp.square(sums.log_total)
        return jnp.sum(weights * value), nll, weights

    def _d_logits(self, logits, is_target, sums: _Sums, weights) -> jax.Array:
        """The gradient of the weighted sum of the losses with respect to the logits, [n, v]."""
        smooth, z = self.options.label_smoothing, self.options.z_loss
        scale = weights * (1 + 2 * z * sums.log_total) if z else weights
        d_logits = scale[:, None] * _exp_below(logits, sums.log_total)
        labels = jnp.where(is_target, 1.0 - smooth, 0.0) + smooth / self.vocab_size
        return d_logits - weights[:, None] * labels


def _target_logits(logits, is_target, targets, token) -> jax.Array:
    """The logit of each cell's target [n]; 0 if the target is not among the tokens [v]."""

    def compare():
        # Fuses with the other passes over the logits, except on CPU. XLA:CPU would write the
        # selected logits to memory before it sums them.
        return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)

    def look_up():
        index = jnp.clip(targets - token[0], 0, len(token) - 1)
        found = jnp.take_along_axis(logits, index[:, None], axis=1)[:, 0]
        return jnp.where(token[index] == targets, found, 0.0)

    return lax.platform_dependent(cpu=look_up, default=compare)


def _exp_below(logits, log_total) -> jax.Array:
    """exp(logits - log_total): the probabilities [n, v]."""
    # XLA:CPU does not vectorize a loop that overwrites its operand. A column of the logits as a
    # second operand keeps it from overwriting them.
    return jnp.exp(logits - (log_total[:, None] + 0 * logits[:, :1]))
