"""Floating-point operations of a train step by formula: only what the visibility rule needs, nothing that is masked."""

from __future__ import annotations

import numpy as np

from msllm.config import ModelConfig
from msllm.streams import StreamSpec


def visible_pairs(lag: np.ndarray, rows: int) -> int:
    """Pairs (query cell, key cell) of one full table [rows, S] without absent cells."""
    reach = np.clip(rows - lag.astype(np.int64), 0, rows)  # rows of queries that see at least one row of the source
    itself = rows * int(np.sum(np.diagonal(lag) > 0))
    return int(np.sum(reach * (reach + 1) // 2)) + itself


def attention_flops(num_heads: int, head_dim: int, lag: np.ndarray, batch: int, rows: int) -> int:
    """Operations of the forward pass of one layer's scores and weighted sums, for `batch` full tables."""
    return 2 * 2 * num_heads * head_dim * batch * visible_pairs(lag, rows)


def train_flops(config: ModelConfig, streams: StreamSpec, batch: int, rows: int) -> int:
    """Operations of forward and backward for `batch` full tables, two per multiply-add, the backward counted twice the
    forward (Kaplan et al. 2020, arXiv 2001.08361); no rematerialisation; the head only for streams that are trained."""
    cells = batch * rows * streams.size
    trained = batch * rows * sum(weight > 0 for weight in streams.loss_weights)
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.d_model * heads + 3 * config.d_model * config.d_ff
    attention = attention_flops(config.num_heads, config.head_dim, streams.lag_array, batch, rows)
    head = trained * config.d_model * config.vocab_size
    return 3 * (config.num_layers * (2 * cells * layer + attention) + 2 * head)
