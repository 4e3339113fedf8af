"""Attention on CPUs: two kernels in C++ (msllm/native/attention.cc), O(L) memory.

FlashAttention (Dao et al. 2022, arXiv 2205.14135) in blocks of cells as small as a core's caches, of which those that the
rule or the segments exclude are skipped, as in `chunked`; the products run at the rate of the machine's large ones.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from msllm.kernels import cpu as cpu_kernels
from msllm.model.attention.backend import Case
from msllm.streams import NEVER, Cells

BLOCK_CELLS = 160  # about as many in a block of keys: small enough for a core's cache
LANES = 16  # of the widest vectors; a block holds whole ones


def declines(case: Case) -> str | None:
    """Why `native_attention` is not for this case; None if it is."""
    if case.dtype != "float32":
        return f"it computes in float32, and the model in {case.dtype}"
    return cpu_kernels.unavailable_reason()


def native_attention(q, k, v, q_cells: Cells, k_cells: Cells, lag, q_streams):
    """As `reference_attention`, without ever holding [L, L]; same arguments, float32. Differentiable in q, k and v."""
    return _attention(q, k, v, _rule(q_cells, k_cells, jnp.asarray(lag), q_streams, 0))


def forward_part(q, k, v, q_cells: Cells, k_cells: Cells, lag, q_streams, k_start):
    """Output, and log-sum-exp [B, T, Sq, N], over keys of some streams only, from `k_start` on (ring.py)."""
    return _outputs(q, k, v, _rule_of_part(k, q_cells, k_cells, lag, q_streams, k_start))


def backward_part(q, k, v, q_cells, k_cells, lag, q_streams, k_start, out, lse, d_out):
    """Gradients of q, k and v through these keys, given output and log-sum-exp over all keys."""
    return _gradients(
        (q, k, v, _rule_of_part(k, q_cells, k_cells, lag, q_streams, k_start), out, lse), d_out
    )[:3]


def _rule_of_part(k, q_cells, k_cells, lag, q_streams, k_start):
    k_start = q_streams[0] if k_start is None else k_start
    lag = jax.lax.dynamic_slice_in_dim(jnp.asarray(lag), k_start, k.shape[2], axis=1)
    return _rule(q_cells, k_cells, lag, q_streams, k_start)


def _rule(q_cells: Cells, k_cells: Cells, lag, q_streams, k_start):
    """What the kernels must know of the cells, by cell: row and segment of queries and keys; lag [Sq, Sk], and which
    stream of the keys each stream of the queries is."""

    def flat(x):
        return x.reshape(x.shape[0], -1)

    def rows(cells):
        return flat(jnp.broadcast_to(cells.row[..., None], cells.present.shape))

    # An absent query and an unseen key get different segments, which no other cell has.
    def segments(cells, there, nowhere):
        return flat(jnp.where(there, cells.segment[..., None], nowhere))

    missing = -k_cells.row.shape[1] * lag.shape[1] % _block(lag.shape[1])

    def fill_up(x, value):
        return jnp.pad(x, ((0, 0), (0, missing)), constant_values=value)

    keys = fill_up(rows(k_cells), NEVER - 1), fill_up(segments(k_cells, k_cells.seen, -1), -1)
    return (
        rows(q_cells),
        segments(q_cells, q_cells.present, -2),
        *keys,
        lag[q_streams],
        (q_streams - k_start).astype(jnp.int32),
    )


def _block(streams: int) -> int:
    """Cells of a block of keys: whole rows, and whole vectors."""
    return max(1, BLOCK_CELLS // (streams * LANES)) * streams * LANES


def _flat(*arrays):
    """[B, T, S, ...] -> [B, L, ...]."""
    return (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in arrays)


def _turned(x):
    """Keys or values [B, T, S, K, H] -> [B, K, blocks, H, cells of a block]."""
    (flat,), block = _flat(x), _block(x.shape[2])
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % block), (0, 0), (0, 0)))
    return flat.reshape(flat.shape[0], -1, block, *flat.shape[2:]).transpose(0, 3, 1, 4, 2)


def _shaped(*shapes):
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


def _outputs(q, k, v, rule):
    return jax.ffi.ffi_call("msllm_attention", _shaped(q.shape, q.shape[:-1]))(
        *_flat(q, v), _turned(k), *rule
    )


@jax.custom_vjp
def _attention(q, k, v, rule):
    return _forward(q, k, v, rule)[0]


def _forward(q, k, v, rule):
    out, lse = (checkpoint_name(x, "attention") for x in _outputs(q, k, v, rule))
    return out, (q, k, v, rule, out, lse)


def _gradients(saved, d_out):
    q, k, v, rule, out, lse = saved
    call = jax.ffi.ffi_call("msllm_attention_gradients", _shaped(q.shape, k.shape, v.shape))
    return *call(*_flat(q, k), _turned(k), *rule, _turned(v), out, lse, d_out), None


_attention.defvjp(_forward, _gradients)
