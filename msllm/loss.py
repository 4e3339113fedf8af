"""The next-row loss. The logits [B, T, S, V] never exist: they are made and used for some rows at a time."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from msllm.config import LossConfig
from msllm.streams import StreamSpec, target_mask


def targets_and_weights(batch: dict[str, Any], streams: StreamSpec, loss_mask=None):
    """(targets [B, T, S] int32, counted [B, T, S] bool, weights [B, T, S] float32) of a batch of tables.

    The cell (t, s) predicts the cell (t + 1, s). `loss_mask` [B, T, S] bool, if given, says which cells may predict.
    """
    tokens = batch["tokens"]
    targets = jnp.concatenate([tokens[:, 1:], jnp.zeros_like(tokens[:, :1])], axis=1)
    counted = target_mask(batch["present"], batch["segment"])
    if loss_mask is not None:
        counted = counted & loss_mask
    return targets, counted, counted * jnp.asarray(streams.loss_weights, jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def next_row_loss(hidden, table, targets, weights, options: LossConfig, rows: int):
    """Weighted sum of the next-row losses, and the plain negative log-likelihoods.

    loss(cell) = (1 - e) nll + e mean_v(-log p_v) + z logsumexp(logits)^2, with e = options.label_smoothing and
    z = options.z_loss (Chowdhery et al. 2022, arXiv 2204.02311, section 5). The gradient is made together with the
    value, chunk by chunk, so no logits are computed twice (as in Liger kernel, Hsu et al. 2024, arXiv 2410.10989).

    Args:
      hidden: [B, T, S, D] compute dtype. table: [V, D] float32, the head.
      targets: [B, T, S] int32. weights: [B, T, S] float32, no gradient.
      rows: rows whose logits exist at one time.

    Returns: (sum(weights * loss) float32, nll [B, T, S] float32; the latter carries no gradient).
    """
    return _scan_chunks(hidden, table, targets, weights, options, rows, with_gradient=False)[:2]


def _scan_chunks(hidden, table, targets, weights, options, rows, with_gradient: bool):
    """Sum of the losses, nll, and (if asked) the gradients of the sum by hidden and by table."""
    total_rows, head = hidden.shape[1], table.astype(hidden.dtype)

    def chunks(x):
        x = jnp.pad(x, [(0, 0), (0, -total_rows % rows)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, rows, *x.shape[2:]).swapaxes(0, 1)

    def unchunk(x):
        x = x.swapaxes(0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :total_rows]

    def chunk(carry, xs):
        loss, d_table = carry
        hidden, targets, weights = xs
        logits = jnp.einsum("btsd,vd->btsv", hidden, head, preferred_element_type=jnp.float32)
        log_total = jax.nn.logsumexp(logits, axis=-1)
        # A comparison instead of a gather: it stays local when the vocabulary is sharded.
        is_target = targets[..., None] == jnp.arange(logits.shape[-1])
        nll = log_total - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        value, smooth, z = nll, options.label_smoothing, options.z_loss
        if smooth:
            value = (1 - smooth) * nll + smooth * (log_total - jnp.mean(logits, axis=-1))
        if z:
            value = value + z * jnp.square(log_total)
        loss = loss + jnp.sum(weights * value)
        if not with_gradient:
            return (loss, d_table), (nll, None)
        scale = weights * (1 + 2 * z * log_total) if z else weights
        d_logits = scale[..., None] * jnp.exp(logits - log_total[..., None])
        d_logits -= weights[..., None] * (jnp.where(is_target, 1.0 - smooth, 0.0) + smooth / logits.shape[-1])
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("btsv,vd->btsd", d_logits, head)
        d_table = d_table + jnp.einsum("btsv,btsd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        return (loss, d_table), (nll, d_hidden)

    init = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape if with_gradient else (), jnp.float32))
    (loss, d_table), (nll, d_hidden) = lax.scan(chunk, init, tuple(map(chunks, (hidden, targets, weights))))
    return loss, unchunk(nll), unchunk(d_hidden) if with_gradient else None, d_table


def _forward(hidden, table, targets, weights, options, rows):
    loss, nll, d_hidden, d_table = _scan_chunks(hidden, table, targets, weights, options, rows, with_gradient=True)
    return (loss, nll), (d_hidden, d_table)


def _backward(options, rows, gradients, cotangents):
    d_hidden, d_table = gradients
    scale = cotangents[0]
    return (d_hidden * scale).astype(d_hidden.dtype), d_table * scale, None, None


next_row_loss.defvjp(_forward, _backward)
