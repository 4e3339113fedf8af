"""Attention on CPUs: two C++ kernels (msllm/kernels/cpu/attention.cc), float32, O(L) memory.

FlashAttention (Dao et al. 2022, arXiv 2205.14135) in blocks of cells that fit into a core's caches.
The kernels skip blocks that the lags or the segments exclude, as `chunked` does. Their products are
as fast as large matrix products on the same machine.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from msllm.kernels import cpu as cpu_kernels
from msllm.model.attention.backend import Backend, Case, RingParts
from msllm.streams import NEVER, Cells, Visibility

BLOCK_CELLS = 160  # approximate cells of a block of keys, so that it fits into a core's cache
LANES = 16  # float32 lanes of the widest vectors; a block is a multiple of them

# A `Visibility` in the form that the kernels take, see `_cell_vectors`.
CellVectors = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def declines(case: Case) -> str | None:
    """The reason why the kernels cannot compute `case` on this machine, or None if they can."""
    if case.dtype != "float32":
        return f"it computes in float32, but the model in {case.dtype}"
    return cpu_kernels.unavailable_reason()


def cpu_attention(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """Computes `reference_attention` in float32, without holding an array [L, L]."""
    return _attention(q, k, v, _cell_vectors(visibility))


def forward_part(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp over the keys of some streams; see `RingParts`."""
    return _outputs(q, k, v, _cell_vectors(visibility))


def backward_part(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visibility: Visibility,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v through the keys of some streams; see `RingParts`."""
    return _backward((q, k, v, _cell_vectors(visibility), out, lse), d_out)[:3]


def _cell_vectors(visibility: Visibility) -> CellVectors:
    """Converts a visibility to the six int32 arrays that the kernels take.

    Absent queries get the segment -2 and unseen keys the segment -1, so that they match nothing.

    Returns: row and segment of each query, [B, Lq] each; row and segment of each key, [B, Lk] each,
      padded to full blocks; the lags of the streams, [Sq, Sk]; and the column of the keys that
      holds each stream of the queries, [Sq].
    """
    queries, keys, lags = visibility.queries, visibility.keys, visibility.pair_lags()
    missing = -keys.row.shape[1] * lags.shape[1] % _block_cells(lags.shape[1])

    def rows(cells: Cells) -> jax.Array:
        return _flat(jnp.broadcast_to(cells.row[..., None], cells.present.shape))

    def segments(cells: Cells, used: jax.Array, unused_segment: int) -> jax.Array:
        return _flat(jnp.where(used, cells.segment[..., None], unused_segment))

    def pad(x: jax.Array, value: int) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, missing)), constant_values=value)

    key_rows, key_segments = pad(rows(keys), NEVER - 1), pad(segments(keys, keys.seen, -1), -1)
    return (
        rows(queries),
        segments(queries, queries.present, -2),
        key_rows,
        key_segments,
        lags,
        (visibility.query_streams - visibility.first_key_stream).astype(jnp.int32),
    )


def _block_cells(streams: int) -> int:
    """The cells of a block of keys: complete rows, and a multiple of LANES."""
    return max(1, BLOCK_CELLS // (streams * LANES)) * streams * LANES


def _flat(x: jax.Array) -> jax.Array:
    """[B, T, S, ...] -> [B, L, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _transposed_blocks(x: jax.Array) -> jax.Array:
    """Keys or values [B, T, S, K, H] -> [B, K, blocks, H, cells of a block]."""
    flat, block = _flat(x), _block_cells(x.shape[2])
    flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % block), (0, 0), (0, 0)))
    return flat.reshape(flat.shape[0], -1, block, *flat.shape[2:]).transpose(0, 3, 1, 4, 2)


def _float32(*shapes: tuple[int, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)


def _outputs(
    q: jax.Array, k: jax.Array, v: jax.Array, cells: CellVectors
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, Sq, N, H] and log-sum-exp [B, T, Sq, N]."""
    call = jax.ffi.ffi_call("msllm_attention", _float32(q.shape, q.shape[:-1]))
    out, lse = call(_flat(q), _flat(v), _transposed_blocks(k), *cells)
    return out, lse


@jax.custom_vjp
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, cells: CellVectors) -> jax.Array:
    return _forward(q, k, v, cells)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, cells: CellVectors
) -> tuple[jax.Array, tuple[Any, ...]]:
    """The forward pass: the output, and the values that `_backward` needs."""
    out, lse = (checkpoint_name(x, "attention") for x in _outputs(q, k, v, cells))
    return out, (q, k, v, cells, out, lse)


def _backward(saved: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    """Gradients of q, k and v, and None for the cells."""
    q, k, v, cells, out, lse = saved
    call = jax.ffi.ffi_call("msllm_attention_gradients", _float32(q.shape, k.shape, v.shape))
    flat = (_flat(q), _flat(k), _transposed_blocks(k))
    return *call(*flat, *cells, _transposed_blocks(v), out, lse, d_out), None


_attention.defvjp(_forward, _backward)

BACKEND = Backend(
    "cpu",
    cpu_attention,
    RingParts(forward_part, backward_part),
    declines=declines,
    any_cells=True,
    traced_lag=True,
)
