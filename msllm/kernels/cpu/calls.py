"""The CPU kernels as JAX functions, and the types of the weights that they multiply."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

PANEL = 32  # columns of a packed weight, or rows of the decoding cache, that lie together
FEW_ROWS = 32  # rows of x up to which `matmul_table` is faster than XLA


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight in the order in which `matmul_packed` reads it, PANEL columns at a time.

    Attributes:
      panels: [K, N]. A product sums over K. In memory the first [K, PANEL] numbers are the first
        panel, and so on; the last panel is narrower if PANEL does not divide N.
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
    """A table [V, D] whose rows are looked up, and that `matmul_table` multiplies by unpacked."""

    table: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table.shape

    def __getitem__(self, index) -> jax.Array:
        return self.table[index]


def pack(weight: jax.Array, sum_over_first: bool) -> PackedWeight:
    """Packs a weight.

    Args:
      weight: [D, ...].
      sum_over_first: whether products sum over D, as in `linear`, or over the other dimensions, as
        in `linear_back`.
    """
    matrix = weight.reshape(weight.shape[0], -1)
    columns = matrix.T if sum_over_first else matrix  # [N, K]
    outputs, inputs = columns.shape
    end = outputs // PANEL * PANEL
    panels = columns[:end].reshape(-1, PANEL, inputs).swapaxes(1, 2)
    in_order = jnp.concatenate([panels.ravel(), columns[end:].T.ravel()])
    return PackedWeight(in_order.reshape(inputs, outputs), weight.shape)


def matmul_packed(x: jax.Array, weights: Sequence[PackedWeight]) -> list[jax.Array]:
    """Products of one x with several packed weights, in one call.

    Args:
      x: [M, K] float32 or bfloat16. weights: panels [K, N] of the same dtype.

    Returns: [M, N] for each weight, in the dtype of x; sums are float32.
    """
    panels = [weight.panels for weight in weights]
    out = [jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype) for w in panels]
    return list(jax.ffi.ffi_call("msllm_matmul_packed", out)(x, *panels))


def matmul_table(x: jax.Array, weight: TableWeight) -> jax.Array:
    """The product of x [..., D] with the rows of a table [V, D]: [..., V] float32.

    Both are float32, or both bfloat16. The kernel reads the table once for up to a hundred rows of
    x; for more than FEW_ROWS rows XLA is faster.
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
    """Attention of one row over R rows of the decoding cache, not yet normalised.

    Scores and sums are float32. The operands of the products are rounded to the type of the cache
    where the CPU multiplies that type and H is a multiple of 32. For bfloat16 (AVX-512 BF16) these
    are the queries and the weights, as on TPUs and GPUs. For int8 (AVX-512 VNNI and VBMI) each
    query is scaled by its largest element, as in SageAttention (arXiv 2410.02367), and the weights,
    times the scales of the values, by the largest one in a stream.

    Args:
      q: [B, K, Q, H] float32, already divided by sqrt(H); Q = (query heads per kv head) * S.
      keys: [B, K, S', R / PANEL, H, PANEL]. values: [B, K, S', R / PANEL, PANEL, H]. Both float32,
        int8, or uint16 that holds the bits of bfloat16.
      mask: [B, S, S', R] bool, which keys each query sees.
      filled: [] int32, rows from here on are not visible and are not read.
      scales: for int8 the scales of keys and of values, R float32 numbers for each of the S'
        streams; else empty.
      masked: the score of a key that is not visible.

    Returns: the highest scores [B, K, Q, 1], the sums of e^(score - highest) [B, K, Q, 1], and the
      sums of the values weighted by these powers [B, K, Q, H].
    """
    one = jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32)
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    call = jax.ffi.ffi_call("msllm_attend_row", (one, one, out))
    highest, sums, weighted = call(
        q, keys, values, mask, filled, *scales, masked=np.float32(masked)
    )
    return highest, sums, weighted


def write_row(
    block: Sequence[jax.Array], k: jax.Array, v: jax.Array, at: jax.Array
) -> list[jax.Array]:
    """Writes one row of each session into a block of the decoding cache, in place.

    Args:
      block: the keys, for int8 their scales, the values, for int8 their scales; each as in
        `attend_row`.
      k, v: [B, 1, S, K, H] float32; the kernel converts them as `cache.store` does.
      at: [B] int32, the row of the block to write in each session; a row outside of the block
        writes nothing.
    """
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in block]
    in_place = {3 + i: i for i in range(len(block))}
    call = jax.ffi.ffi_call("msllm_write_row", out, input_output_aliases=in_place)
    return list(call(at, k, v, *block))
