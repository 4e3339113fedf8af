"""The same model in torch for comparison: transformers' Qwen3 with a dense mask in float32 on CPU.

Multi-stream models were published in this form. A table becomes one sequence of L = T x S tokens,
row by row. A mask [L, L] of 0 and -10,000 defines which cells see each other. Attention is
`scaled_dot_product_attention`. Decoding calls the model with one row of S tokens and the cache of
`transformers`. The weights are those of msllm, so loss, gradient norm and decoded tokens must
agree. This module needs torch and transformers (`pip install torch transformers`), which msllm
itself does not need.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
import transformers

from msllm.config import ModelConfig
from msllm.errors import UserError
from msllm.weights import hf_config
from msllm.weights.hf_tensors import to_hf

BLOCKED = -10_000.0  # mask value between cells that do not see each other


class Model:
    """Qwen3 on tables."""

    def __init__(self, config: ModelConfig, size: int, parameters: dict[str, Any]) -> None:
        """Creates the model from parameters of msllm.

        Args:
          config: sizes of the model.
          size: number of streams.
          parameters: parameters of the model of msllm.

        Raises:
          UserError: jax does not run on CPU, so the comparison would be unfair.
        """
        if jax.default_backend() != "cpu":
            raise UserError(
                f"--torch runs on CPU and msllm on {jax.default_backend()}: set JAX_PLATFORMS=cpu "
                "to compare them"
            )
        self.size = size
        settings = transformers.Qwen3Config(
            **hf_config.to_hf(config, size), attn_implementation="sdpa"
        )
        self.qwen = transformers.Qwen3ForCausalLM(settings)
        arrays = {
            name: torch.from_numpy(np.array(array))
            for name, array in to_hf(parameters, config).items()
        }
        self.stream_embedding = torch.nn.Embedding.from_pretrained(
            arrays.pop("model.channel_embedding.weight"), freeze=False
        )
        missing, unexpected = self.qwen.load_state_dict(arrays, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise ValueError(f"weights do not fit: {missing=}, {unexpected=}")
        self.qwen.tie_weights()
        self.parameters = [*self.qwen.parameters(), *self.stream_embedding.parameters()]

    def logits(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        first_row: int = 0,
        cache: transformers.Cache | None = None,
    ) -> torch.Tensor:
        """Returns the logits [B, rows x S, V] of the given rows.

        Args:
          tokens: [B, rows, S].
          mask: [B, 1, rows x S, (first_row + rows) x S].
          first_row: number of earlier rows.
          cache: keys and values of the earlier rows.
        """
        batch, rows, size = tokens.shape
        embedded = self.qwen.model.embed_tokens(tokens) + self.stream_embedding.weight
        positions = (
            torch.arange(first_row, first_row + rows).repeat_interleave(size).expand(batch, -1)
        )
        return self.qwen(
            inputs_embeds=embedded.reshape(batch, rows * size, -1),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits


def dense_mask(rows: int, size: int, first_row: int = 0) -> torch.Tensor:
    """Returns the mask [1, 1, rows x S, (first_row + rows) x S] of block-causal visibility.

    It is 0 where a cell sees a cell of an earlier row or itself, and BLOCKED elsewhere.

    Args:
      rows: number of rows.
      size: number of streams S.
      first_row: number of earlier rows.
    """
    keys = torch.arange((first_row + rows) * size)
    queries = torch.arange(first_row * size, (first_row + rows) * size)
    visible = (keys // size < (queries // size)[:, None]) | (keys == queries[:, None])
    return torch.where(visible, 0.0, BLOCKED)[None, None]


class Trainer:
    """Trains with AdamW on one batch of tables without absent cells, with loss on all streams."""

    def __init__(self, model: Model, tokens: np.ndarray) -> None:
        """Creates the optimizer.

        Args:
          model: the model to train.
          tokens: [B, T, S], the batch.
        """
        batch, rows, size = tokens.shape
        self._model, self._tokens = model, torch.from_numpy(tokens).long()
        self._labels = torch.full(tokens.shape, -100)
        self._labels[:, :-1] = self._tokens[:, 1:]
        self._mask = dense_mask(rows, size).expand(batch, -1, -1, -1).contiguous()
        self._optimizer = torch.optim.AdamW(
            model.parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1
        )

    def step(self) -> tuple[float, float]:
        """Runs a step and returns its loss and gradient norm before the update."""
        logits = self._model.logits(self._tokens, self._mask)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), self._labels.flatten(), ignore_index=-100
        )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters, 1.0)
        self._optimizer.step()
        return loss.item(), norm.item()


class Session:
    """Decodes one table greedily with the cache of `transformers`."""

    def __init__(self, model: Model, prefill: np.ndarray) -> None:
        """Reads the given rows.

        Args:
          model: the model.
          prefill: [rows, S], the rows before the first decoded row.
        """
        self._model, self._cache, self._rows = model, transformers.DynamicCache(), 0
        self._next = self._feed(torch.from_numpy(prefill).long())

    def step(self) -> np.ndarray:
        """Returns the next row [S] and feeds it to the model."""
        row = self._next
        self._next = self._feed(row[None])
        return row.numpy()

    @torch.inference_mode()
    def _feed(self, rows: torch.Tensor) -> torch.Tensor:
        mask = dense_mask(len(rows), self._model.size, self._rows)
        logits = self._model.logits(rows[None], mask, self._rows, self._cache)
        self._rows += len(rows)
        return logits[0, -self._model.size :].argmax(-1)
