"""The next-row loss. The logits [B, T, S, V] never exist: they are made and used for some rows at a time."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from msllm.config import LossConfig
from msllm.sharding import RULES, axis_index, axis_size, total
from msllm.streams import target_mask


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def next_row_loss(hidden, table, targets, weights, options: LossConfig):
    """Weighted sum of the next-row losses, and the plain negative log-likelihoods.

    loss(cell) = (1 - e) nll + e mean_v(-log p_v) + z logsumexp(logits)^2, with e = options.label_smoothing and
    z = options.z_loss (Chowdhery et al. 2022, arXiv 2204.02311, section 5). The gradient is made together with the
    value, chunk by chunk, so no logits are computed twice (as in Liger kernel, Hsu et al. 2024, arXiv 2410.10989).

    Args:
      hidden: [..., D] compute dtype. table: [V, D] compute dtype, the head (inside `shard_map`: its part of V).
      targets: [...] int32. weights: [...] float32, no gradient.

    Returns: (sum(weights * loss) float32, nll [...] float32; the latter carries no gradient).
    """
    loss, nll, _, _ = _scan_chunks(hidden, table, targets, weights, options, with_gradient=False)
    return loss, nll


def _scan_chunks(hidden, table, targets, weights, options: LossConfig, with_gradient: bool):
    """Sum of the losses, nll, and (if asked) the gradients of the sum by hidden and by table."""
    cells, size = targets.size, min(options.chunk_tokens, targets.size)
    count = -(-cells // size)
    size = -(-cells // count)  # evenly filled
    vocab = table.shape[0] * axis_size("tensor")
    columns = axis_index("tensor") * table.shape[0] + jnp.arange(table.shape[0])

    def chunks(x, width):
        x = x.reshape(cells, *width)
        return jnp.pad(x, [(0, count * size - cells)] + [(0, 0)] * len(width)).reshape(count, size, *width)

    def chunk(carry, xs):
        loss, d_table = carry
        hidden, hidden_t, targets, weights = xs
        logits = jnp.einsum("nd,vd->nv", hidden, table, preferred_element_type=jnp.float32)
        top = lax.stop_gradient(logits.max(-1))
        if axis_size("tensor") > 1:
            top = lax.pmax(top, "tensor")
        log_total = top + jnp.log(total(jnp.exp(logits - top[:, None]).sum(-1), *RULES["vocab"]))
        # A comparison instead of a gather: each device looks in its own part of the vocabulary.
        is_target = targets[:, None] == columns
        nll = log_total - total(jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1), *RULES["vocab"])
        value, smooth, z = nll, options.label_smoothing, options.z_loss
        if smooth:
            value = (1 - smooth) * nll + smooth * (log_total - total(logits.sum(-1), *RULES["vocab"]) / vocab)
        if z:
            value = value + z * jnp.square(log_total)
        loss = loss + jnp.sum(weights * value)
        if not with_gradient:
            return (loss, d_table), (nll, None)
        scale = weights * (1 + 2 * z * log_total) if z else weights
        d_logits = scale[:, None] * jnp.exp(logits - log_total[:, None])
        d_logits -= weights[:, None] * (jnp.where(is_target, 1.0 - smooth, 0.0) + smooth / vocab)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("nv,vd->nd", d_logits, table)
        d_table = d_table + jnp.einsum("dn,nv->dv", hidden_t, d_logits, preferred_element_type=jnp.float32)
        return (loss, d_table), (nll, d_hidden)

    init = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape[::-1] if with_gradient else (), jnp.float32))
    hidden_chunks = chunks(hidden, hidden.shape[-1:])
    # Transposed beforehand: XLA:CPU would transpose the much larger d_logits in memory.
    xs = (hidden_chunks, hidden_chunks.swapaxes(1, 2), chunks(targets, ()), chunks(weights, ()))
    (loss, d_table), (nll, d_hidden) = lax.scan(chunk, init, xs)
    nll = nll.reshape(-1)[:cells].reshape(targets.shape)
    if not with_gradient:
        return loss, nll, None, None
    return loss, nll, d_hidden.reshape(-1, hidden.shape[-1])[:cells].reshape(hidden.shape), d_table.T.astype(table.dtype)


def _forward(hidden, table, targets, weights, options):
    loss, nll, d_hidden, d_table = _scan_chunks(hidden, table, targets, weights, options, with_gradient=True)
    return (loss, nll), (d_hidden, d_table)


def _backward(options, gradients, cotangents):
    d_hidden, d_table = gradients
    # The gradients here go through this device's part of the vocabulary; the loss counts on all of them.
    scale = total(cotangents[0], *RULES["vocab"])
    return (d_hidden * scale).astype(d_hidden.dtype), (d_table * scale).astype(d_table.dtype), None, None


next_row_loss.defvjp(_forward, _backward)
