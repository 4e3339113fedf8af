"""The CPU kernels as JAX functions, and the weight types that they work on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PANEL = 32  # columns of a packed weight, or rows of the decoding cache, stored contiguously
FEW_ROWS = 32  # `matmul_table` calls the kernel for up to this many rows; XLA is faster beyond


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight stored in the order in which `matmul_packed` reads it, PANEL columns at a time.

    Attributes:
      panels: [K, N], where products sum over K. In memory this is a sequence of panels
        [K, PANEL]; the last one is narrower if PANEL does not divide N.
      shape: the shape of the weight before packing.
    """

    panels: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def ndim(self) -> int:
        return len(self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TableWeight:
    """A table [V, D] for lookups of rows and for `matmul_table`, which needs no packing."""

    table: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    def __getitem__(self, index: Any) -> jax.Array:
        return self.table[index]


def pack(weight: jax.Array, sum_over_first: bool) -> PackedWeight:
    """Packs a weight for `matmul_packed`.

    Args:
      weight: [D, ...].
      sum_over_first: True if products sum over D, as in `linear`; False if they sum over the other
        dimensions, as in `linear_back`.
    """
    matrix = weight.reshape(weight.shape[0], -1)
    columns = matrix.T if sum_over_first else matrix  # [N, K]
    outputs, inputs = columns.shape
    end = outputs // PANEL * PANEL  # of the full panels
    panels = columns[:end].reshape(-1, PANEL, inputs).swapaxes(1, 2)
    packed = jnp.concatenate([panels.ravel(), columns[end:].T.ravel()])
    return PackedWeight(packed.reshape(inputs, outputs), weight.shape)


def matmul_packed(x: jax.Array, weights: Sequence[PackedWeight]) -> list[jax.Array]:
    """Multiplies x by several packed weights in one call.

    Args:
      x: [M, K] float32 or bfloat16.
      weights: with panels [K, N] in the dtype of x.

    Returns: [M, N] for each weight, accumulated in float32, in the dtype of x.
    """
    panels = [weight.panels for weight in weights]
    out = [jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype) for w in panels]
    return list(jax.ffi.ffi_call("msllm_matmul_packed", out)(x, *panels))


def matmul_table(x: jax.Array, weight: TableWeight) -> jax.Array:
    """Multiplies x [..., D] by the transpose of a table [V, D]: [..., V] float32.

    Both are float32, or both are bfloat16. The kernel reads the table once for up to a hundred rows
    of x, but XLA is faster for more than FEW_ROWS rows.
    """
    table = weight.table
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if len(rows) <= FEW_ROWS:
        out = jax.ShapeDtypeStruct((len(rows), len(table)), jnp.float32)
        logits = jax.ffi.ffi_call("msllm_matmul_table", out)(rows, table)
    else:
        logits = jnp.matmul(rows, table.T, preferred_element_type=jnp.float32)
    return logits.reshape(*x.shape[:-1], len(table))


def attend_row(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    filled: jax.Array,
    scales: Sequence[jax.Array],
    masked: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attends from one row to R rows of the decoding cache, without the final normalisation.

    Scores and sums are float32. If the CPU multiplies the type of the cache and H is a multiple of
    32, the other operands of the products are rounded to that type. With bfloat16 (AVX-512 BF16)
    these are the queries and the attention weights, as on TPUs and GPUs. With int8 (AVX-512 VNNI
    and VBMI) each query is scaled by its largest element, as in SageAttention (arXiv 2410.02367).
    The attention weights are multiplied by the scales of the values first, and then scaled by the
    largest product in a stream.

    Args:
      q: [B, K, Q, H] float32, already divided by sqrt(H); Q = (query heads per kv head) * S.
      keys: [B, K, S', R / PANEL, H, PANEL], in float32, int8, or uint16 that holds the bits of
        bfloat16.
      values: [B, K, S', R / PANEL, PANEL, H], in the dtype of the keys.
      mask: [B, S, S', R] bool, which keys each query sees.
      filled: [] int32, rows from this index on are neither visible nor read.
      scales: for int8, the scales of keys and of values, [B, K, S', R] float32 each; else empty.
      masked: the score of a key that is not visible.

    Returns: the highest scores [B, K, Q, 1], the sums of e^(score - highest) [B, K, Q, 1], and the
      sums of the values weighted by these powers [B, K, Q, H].
    """
    per_query = jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32)
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    call = jax.ffi.ffi_call("msllm_attend_row", (per_query, per_query, out))
    highest, sums, weighted = call(
        q, keys, values, mask, filled, *scales, masked=np.float32(masked)
    )
    return highest, sums, weighted


def write_row(
    block: Sequence[jax.Array], k: jax.Array, v: jax.Array, at: jax.Array
) -> list[jax.Array]:
    """Writes one row of each session into a block of the decoding cache, in place.

    Args:
      block: keys and values, or for int8 keys, their scales, values and their scales; each as in
        `attend_row`.
      k, v: [B, 1, S, K, H] float32; the kernel converts them as `store` in msllm/decode/cache.py
        does.
      at: [B] int32, the row of the block to write in each session. A session whose row is outside
        of the block is not written.

    Returns: the updated block.
    """
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in block]
    aliases = {3 + i: i for i in range(len(block))}  # the block follows the arguments at, k and v
    call = jax.ffi.ffi_call("msllm_write_row", out, input_output_aliases=aliases)
    return list(call(at, k, v, *block))
