"""Floating-point operations of a train step, by formula.

Only the operations that the visibility rule requires count: no masked pairs, no recomputation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from msllm.config import ModelConfig
from msllm.streams import StreamSpec


def visible_pairs(lag: np.ndarray, rows: int) -> int:
    """Visible pairs (query cell, key cell) in one full table [rows, S], without absent cells.

    Args:
      lag: [S, S] int.
      rows: T.
    """
    # Per edge, the number of query rows that see at least one row of the source.
    reach = np.clip(rows - lag.astype(np.int64), 0, rows)
    itself = rows * int(np.sum(np.diagonal(lag) > 0))
    return int(np.sum(reach * (reach + 1) // 2)) + itself


def attention_flops(num_heads: int, head_dim: int, pairs: float) -> float:
    """Operations of one layer's attention scores and weighted sums in the forward pass."""
    return 2 * 2 * num_heads * head_dim * pairs


def batch_pairs(lag: np.ndarray, queries: np.ndarray, keys: np.ndarray, segment: np.ndarray) -> int:
    """Visible pairs (query cell, key cell) in packed tables, which may have absent cells.

    Args:
      lag: [S, S] int.
      queries: [B, T, S] bool, the cells that are present.
      keys: [B, T, S] bool, the cells that other cells may see.
      segment: [B, T] int, ascending within a table.
    """
    batch, rows, _ = keys.shape
    row = np.arange(rows)
    begins = np.concatenate([np.ones((batch, 1), bool), segment[:, 1:] != segment[:, :-1]], 1)
    first = np.maximum.accumulate(np.where(begins, row, 0), 1)  # first row of the segment
    before = np.pad(np.cumsum(keys, 1), [(0, 0), (1, 0), (0, 0)])  # [:, t]: keys in rows 0..t-1
    pairs = 0
    for value in np.unique(lag[lag < rows]):
        end = np.maximum(np.minimum(row + 1 - value, rows), first)  # rows first..end-1 are seen
        visible = np.take_along_axis(before, end[:, :, None], 1) - np.take_along_axis(
            before, first[:, :, None], 1
        )
        seen = np.einsum("bto,so->bts", visible, (lag == value).astype(np.int64))
        pairs += int(seen[queries].sum())
    # Every cell sees itself. With a lag of 0 this pair is already counted, unless the cell is not a
    # key.
    counted = keys & (np.diagonal(lag) <= 0)
    return pairs + int((queries & ~counted).sum())


def train_flops(config: ModelConfig, streams: StreamSpec, batch: int, rows: int) -> int:
    """`step_flops` of `batch` full tables of `rows` rows."""
    targets = [batch * rows * (weight > 0) for weight in streams.loss_weights]
    pairs = batch * visible_pairs(streams.nearest_lag_array, rows)
    flops = step_flops(config, batch * rows * streams.size, sum(targets), pairs)
    return int(flops + combine_flops(config, streams, targets))


def combine_flops(config: ModelConfig, streams: StreamSpec, targets: Sequence[float]) -> float:
    """What the rules of `streams.combine` add to `step_flops`.

    These are the weights of the sources, and the logits of all sources of a mixture but one.

    Args:
      config: sizes of the model.
      streams: the streams.
      targets: for each stream, the cells with a target of positive weight.
    """
    flops, width = 0.0, config.d_model
    for rule in streams.combine:
        heads = len(rule.sources) - 1 if rule.mode == "mixture" else 0
        weights = len(rule.sources) * width * (width + 2)
        flops += 3 * 2 * targets[rule.stream] * (weights + heads * width * config.vocab_size)
    return flops


def step_flops(config: ModelConfig, cells: float, targets: float, pairs: float) -> float:
    """Operations of a forward and backward pass without rematerialisation.

    A multiply-add counts as two, the backward pass as twice the forward pass (Kaplan et al. 2020,
    arXiv 2001.08361).

    Args:
      config: sizes of the model.
      cells: cells that are present.
      targets: cells with a target of positive weight. Only these need the head.
      pairs: visible pairs of cells.
    """
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.d_model * heads + 3 * config.d_model * config.d_ff
    attention = attention_flops(config.num_heads, config.head_dim, pairs)
    return 3 * (
        config.num_layers * (2 * cells * layer + attention)
        + 2 * targets * config.d_model * config.vocab_size
    )
