"""The next-row loss. The logits [B, T, S, V] never exist: they are made and used for some cells at a time.

On a mesh the head need not exist whole either: with `vocab_chunks` > 1 only one part of its rows is gathered at a time, at
the price of computing the logits twice (once for the softmax's denominator, once for the gradient).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from msllm.config import LossConfig
from msllm.sharding import axis_index, axis_size, psum
from msllm.streams import target_mask

TILE = 128  # lanes of a TPU's registers
MASKED = -1e30  # the logit of a row that only fills up the last part


def targets_and_weights(batch: dict[str, Any], stream_weights, loss_mask=None):
    """(targets [B, T, S] int32, counted [B, T, S] bool, weights [B, T, S] float32) of a batch of tables.

    The cell (t, s) predicts the cell (t + 1, s). `stream_weights`: [S], the loss weight of each stream in the batch.
    `loss_mask` [B, T, S] bool, if given, says which cells may predict.
    """
    tokens = batch["tokens"]
    targets = jnp.concatenate([tokens[:, 1:], jnp.zeros_like(tokens[:, :1])], axis=1)
    counted = target_mask(batch["present"], batch["segment"])
    if loss_mask is not None:
        counted = counted & loss_mask
    return targets, counted, counted * jnp.asarray(stream_weights, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def next_row_loss(
    hidden, head, targets, weights, options: LossConfig, whole: Callable = lambda rows: rows
):
    """Weighted sum of the next-row losses, and the plain negative log-likelihoods.

    loss(cell) = (1 - e) nll + e mean_v(-log p_v) + z logsumexp(logits)^2, with e = options.label_smoothing and
    z = options.z_loss (Chowdhery et al. 2022, arXiv 2204.02311, section 5). The gradient is made together with the
    value, chunk by chunk, so no more logits are kept than a chunk's (as in Liger kernel, Hsu et al. 2024, arXiv
    2410.10989).

    Args:
      hidden: [..., D] compute dtype. head: [V, D] float32; inside `shard_map` this device's part of it.
      targets: [...] int32. weights: [...] float32, no gradient.
      whole: gives rows of the head complete along D and in the compute dtype (`gather`, and its transpose backward).

    Returns: (sum(weights * loss) float32, nll [...] float32; the latter carries no gradient).
    """
    loss, nll, _ = _losses(hidden, head, targets, weights, options, whole, with_gradient=False)
    return loss, nll


class _Sums(NamedTuple):
    """What the loss needs of a cell's logits, over some of the vocabulary."""

    top: jax.Array  # the highest logit
    exp: jax.Array  # sum of exp(logit - top)
    target: jax.Array  # the target's logit, 0 if it is not here
    logits: jax.Array  # sum of the logits

    def merge(self, other: _Sums) -> _Sums:
        top = jnp.maximum(self.top, other.top)
        exp = self.exp * jnp.exp(self.top - top) + other.exp * jnp.exp(other.top - top)
        return _Sums(top, exp, self.target + other.target, self.logits + other.logits)

    def over_devices(self) -> _Sums:
        """Over the parts of the vocabulary that other devices hold."""
        top = lax.pmax(self.top, "tensor") if axis_size("tensor") > 1 else self.top
        exp, target, logits = psum(
            (self.exp * jnp.exp(self.top - top), self.target, self.logits), "tensor"
        )
        return _Sums(top, exp, target, logits)

    @property
    def log_total(self) -> jax.Array:
        return self.top + jnp.log(self.exp)


def _losses(hidden, head, targets, weights, options: LossConfig, whole, with_gradient: bool):
    """Sum of the losses, nll, and (if asked) the gradients of the sum by hidden and by head."""
    cells, width = targets.size, hidden.shape[-1]
    count = -(-cells // min(options.chunk_tokens, cells))
    size = -(-cells // count)  # evenly filled
    vocab, parts = head.shape[0] * axis_size("tensor"), options.vocab_chunks
    smooth, z = options.label_smoothing, options.z_loss
    # Parts of whole tiles: for others XLA:TPU lays out the gradient so that it cannot scatter it.
    part = -(-head.shape[0] // (parts * TILE)) * TILE if parts > 1 else head.shape[0]
    added = parts * part - head.shape[0]

    def chunks(x, *inner):
        x = x.reshape(cells, *inner)
        return jnp.pad(x, [(0, count * size - cells)] + [(0, 0)] * len(inner)).reshape(
            count, size, *inner
        )

    def logits_and_sums(table, start, hidden, targets):
        """Of the rows of this device's head from `start` on."""
        logits = jnp.einsum("nd,vd->nv", hidden, table, preferred_element_type=jnp.float32)
        row = start + jnp.arange(table.shape[0])
        token = axis_index("tensor") * head.shape[0] + row
        every = logits
        if added:
            real = row < head.shape[0]
            token = jnp.where(real, token, -1)
            every, logits = jnp.where(real, logits, 0.0), jnp.where(real, logits, MASKED)
        # Each device looks in its own part of the vocabulary. A comparison, which is a part of the passes over the logits;
        # but XLA:CPU would write the logits it chooses to memory before it adds them up.
        is_target, at = targets[:, None] == token, jnp.clip(targets - token[0], 0, len(token) - 1)

        def compare():
            return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)

        def look_up():
            return jnp.where(
                token[at] == targets, jnp.take_along_axis(logits, at[:, None], axis=1)[:, 0], 0.0
            )

        top, target = logits.max(-1), lax.platform_dependent(cpu=look_up, default=compare)
        every = every.sum(-1) if smooth else jnp.zeros_like(top)
        return logits, is_target, _Sums(top, jnp.exp(logits - top[:, None]).sum(-1), target, every)

    def values(sums, weights):
        nll = sums.log_total - sums.target
        value = (
            (1 - smooth) * nll + smooth * (sums.log_total - sums.logits / vocab) if smooth else nll
        )
        return jnp.sum(weights * (value + z * jnp.square(sums.log_total) if z else value)), nll

    hidden_chunks, targets, weights = chunks(hidden, width), chunks(targets), chunks(weights)
    transposed = hidden_chunks.swapaxes(
        1, 2
    )  # beforehand: XLA:CPU would transpose the much larger d_logits in memory

    def part_sums(rows, start):
        """_Sums [count, size] of one part of the vocabulary."""
        table = whole(rows)
        return lax.map(lambda xs: logits_and_sums(table, start, *xs)[2], (hidden_chunks, targets))

    def part_losses(rows, start, sums):
        """(loss, nll, d_hidden, d_rows) by one part of the vocabulary; `sums` are of the whole, None: this part is it."""
        table, to_rows = jax.vjp(whole, rows)

        def chunk(carry, xs):
            loss, d_table = carry
            hidden, hidden_t, targets, weights, sums = xs
            logits, is_target, own = logits_and_sums(table, start, hidden, targets)
            sums = own.over_devices() if sums is None else sums
            value, nll = values(sums, weights)
            if not with_gradient:
                return (loss + value, d_table), (nll, None)
            scale = weights * (1 + 2 * z * sums.log_total) if z else weights
            # With a column of them as one more operand, XLA:CPU does not overwrite the logits: it vectorizes no loop that does.
            d_logits = scale[:, None] * jnp.exp(
                logits - (sums.log_total[:, None] + 0 * logits[:, :1])
            )
            d_logits -= weights[:, None] * (
                jnp.where(is_target, 1.0 - smooth, 0.0) + smooth / vocab
            )
            d_logits = d_logits.astype(hidden.dtype)
            d_hidden = jnp.einsum("nv,vd->nd", d_logits, table)
            d_table = d_table + jnp.einsum(
                "dn,nv->dv", hidden_t, d_logits, preferred_element_type=jnp.float32
            )
            return (loss + value, d_table), (nll, d_hidden)

        init = (
            jnp.zeros((), jnp.float32),
            jnp.zeros(table.shape[::-1] if with_gradient else (), jnp.float32),
        )
        (loss, d_table), (nll, d_hidden) = lax.scan(
            chunk, init, (hidden_chunks, transposed, targets, weights, sums)
        )
        d_rows = to_rows(d_table.T.astype(table.dtype))[0] if with_gradient else None
        return loss, nll, d_hidden, d_rows

    if parts == 1:
        loss, nll, d_hidden, d_head = part_losses(head, 0, None)
    else:
        rows = (
            jnp.pad(head, ((0, added), (0, 0))).reshape(parts, part, -1),
            part * jnp.arange(parts),
        )
        nothing = _Sums(
            jnp.full(targets.shape, MASKED), *(jnp.zeros(targets.shape) for _ in range(3))
        )
        sums = lax.scan(lambda sums, part: (sums.merge(part_sums(*part)), None), nothing, rows)[
            0
        ].over_devices()
        loss, nll = values(sums, weights)
        if with_gradient:
            zeros = jnp.zeros(hidden_chunks.shape, jnp.float32)

            def one(d_hidden, part):
                return (lambda _, __, d, d_rows: (d_hidden + d, d_rows))(*part_losses(*part, sums))

            d_hidden, d_head = lax.scan(one, zeros, rows)
            d_head = d_head.reshape(parts * part, -1)[: head.shape[0]]

    def back(x, *inner):
        return x.reshape(-1, *inner)[:cells]

    gradients = (back(d_hidden, width).reshape(hidden.shape), d_head) if with_gradient else None
    return loss, back(nll).reshape(hidden.shape[:-1]), gradients


def _forward(hidden, head, targets, weights, options, whole):
    loss, nll, gradients = _losses(
        hidden, head, targets, weights, options, whole, with_gradient=True
    )
    return (loss, nll), (hidden[:0], *gradients)


def _backward(options, whole, saved, cotangents):
    hidden, d_hidden, d_head = saved
    # The gradients here go through this device's part of the vocabulary; the loss counts on all of them.
    scale = psum(cotangents[0], "tensor")
    return (
        (d_hidden * scale).astype(hidden.dtype),
        (d_head * scale).astype(d_head.dtype),
        None,
        None,
    )


next_row_loss.defvjp(_forward, _backward)
