"""An attack that knows the weights: tokens in the data, optimised with gradients.

The search is GCG (Zou et al. 2023, arXiv 2307.15043) for many prompts at a time. In each step, the
gradient of the loss with respect to the one-hot tokens of each attacked cell says which tokens may
lower the loss; candidates that change one cell are drawn from the best ones, and the best candidate
is kept. The loss is the negative log-likelihood of what the attacker wants the model to say.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msllm.errors import UserError
from msllm.model.model import abstract_model, bind
from msllm.weights.load import LoadedModel

TABLES_AT_ONCE = 256  # tables whose losses are computed together


class Target(NamedTuple):
    """A prompt under attack, with what the attacker wants the model to say.

    Attributes:
      tokens: [P, S] int32, the prompt with the wanted answer in its cells.
      attacked: the cells that the attacker chooses, (row, stream) each. All targets of a search
        have the same number of them.
      wanted: the cells that the model should say, (row, stream) each, not in row 0.
    """

    tokens: np.ndarray
    attacked: Sequence[tuple[int, int]]
    wanted: Sequence[tuple[int, int]]


class Found(NamedTuple):
    """The result of a search, in the order of the targets.

    Attributes:
      tokens: [N, A] int32, the tokens of the attacked cells.
      first: [N] float32, the loss at the start, in nats per wanted token.
      last: [N] float32, the loss of the tokens found.
    """

    tokens: np.ndarray
    first: np.ndarray
    last: np.ndarray


def search(
    model: LoadedModel,
    targets: Sequence[Target],
    *,
    steps: int = 50,
    candidates: int = 32,
    top: int = 64,
    allowed: Sequence[int] | None = None,
    seed: int = 0,
) -> Found:
    """Searches the tokens that make the model say what the attacker wants.

    Args:
      model: a model with a tokenizer.
      targets: the prompts. The search starts from the tokens in their attacked cells.
      steps: the number of steps.
      candidates: per target and step.
      top: the number of tokens that are tried in a cell, those with the best gradients.
      allowed: the tokens that may be used; None: all that are no control tokens.
      seed: of the draws.

    Raises UserError if the targets do not have equally many attacked cells, or none.
    """
    tables = _Tables(model, targets)
    tokenizer = model.require_tokenizer()
    if allowed is None:
        control = set(tokenizer.control.values()) | {tokenizer.unknown_id}
        allowed = [token for token in range(tokenizer.vocab_size) if token not in control]
    usable = np.asarray(allowed)
    top = min(top, len(usable))
    generator = np.random.default_rng(seed)
    now = tables.start
    best = first = tables.losses(now[:, None])[:, 0]
    for _ in range(steps):
        order = np.argsort(tables.gradients(now)[:, :, usable], axis=2)[:, :, :top]
        tried = np.repeat(now[:, None], candidates, axis=1)  # [N, C, A]
        place = generator.integers(now.shape[1], size=tried.shape[:2])
        rank = generator.integers(top, size=tried.shape[:2])
        n = np.arange(len(now))[:, None]
        tried[n, np.arange(candidates), place] = usable[order[n, place, rank]]
        losses = tables.losses(tried)
        chosen = losses.argmin(1)
        lowest = losses.min(1)
        better = lowest < best
        now = np.where(better[:, None], tried[np.arange(len(now)), chosen], now)
        best = np.where(better, lowest, best)
    return Found(now, first, best)


class _Tables:
    """The targets as arrays, and the losses of choices of tokens."""

    def __init__(self, model: LoadedModel, targets: Sequence[Target]):
        if model.streams.combine:
            rules = ", ".join(model.streams.names[rule.stream] for rule in model.streams.combine)
            raise UserError(
                f"config.streams.combine predicts {rules} from several streams: this attack follows"
                " the logits of one hidden state, so it cannot be run on the model"
            )
        counts = {len(target.attacked) for target in targets}
        if len(counts) != 1 or 0 in counts or not all(target.wanted for target in targets):
            raise UserError(
                "the targets of an attack must have equally many attacked cells, and wanted ones"
            )
        self._model, self._silence = model, model.require_tokenizer().silence_id
        rows = -(-max(len(target.tokens) for target in targets) // 16) * 16
        size, longest = model.streams.size, max(len(target.wanted) for target in targets)
        number, cells = len(targets), counts.pop()
        self._tokens = np.full((number, rows, size), self._silence, np.int32)
        self._present = np.zeros(self._tokens.shape, bool)
        self._attacked = np.zeros((number, cells, 2), np.int32)
        self._wanted = np.zeros((number, longest, 2), np.int32)
        self._weight = np.zeros((number, longest), np.float32)
        for i, target in enumerate(targets):
            self._tokens[i, : len(target.tokens)] = target.tokens
            self._present[i, : len(target.tokens)] = True
            self._attacked[i] = target.attacked
            self._wanted[i, : len(target.wanted)] = target.wanted
            self._wanted[i, len(target.wanted) :] = target.wanted[0]
            self._weight[i, : len(target.wanted)] = 1 / len(target.wanted)
        n = np.arange(number)[:, None]
        self.start = self._tokens[n, self._attacked[..., 0], self._attacked[..., 1]]
        self._graphs: dict[int, nnx.GraphDef] = {}

    def losses(self, chosen: np.ndarray) -> np.ndarray:
        """[N, C] float32, the losses of tokens [N, C, A] in the attacked cells."""
        number, candidates, cells = chosen.shape
        flat = chosen.reshape(-1, cells)
        owner = np.repeat(np.arange(number), candidates)
        size = min(TABLES_AT_ONCE, len(flat))
        found = []
        for start in range(0, len(flat), size):
            part = np.arange(start, start + size) % len(flat)
            batch = self._batch(owner[part], flat[part])
            found.append(np.asarray(_losses(self._model.graph, self._silence, *batch)))
        return np.concatenate(found)[: len(flat)].reshape(number, candidates)

    def gradients(self, chosen: np.ndarray) -> np.ndarray:
        """[N, A, V] float32, the change of the loss per change of the one-hot tokens.

        Args:
          chosen: [N, A], the tokens at which the gradient is taken.
        """
        number, cells = chosen.shape
        vocab, size = self._model.config.vocab_size, min(TABLES_AT_ONCE, number)
        config = dataclasses.replace(
            self._model.config, vocab_size=vocab + size * cells, tie_embeddings=False
        )
        graph = self._graphs.setdefault(size, abstract_model(config, self._model.streams)[0])
        # Each attacked cell gets a row of its own in the embedding, whose gradient is that of the
        # cell, also through relays.
        own = vocab + np.arange(size * cells, dtype=np.int32).reshape(size, cells)
        found = []
        for start in range(0, number, size):
            part = np.arange(start, start + size) % number
            parameters, tables, wanted, targets, weight = self._batch(part, own)
            table = parameters["embedding"]
            rows = table[chosen[part].reshape(-1)]
            gradient = _row_gradients(
                graph, self._silence, parameters, rows, tables, wanted, targets, weight
            )
            found.append(np.asarray(gradient @ table.T).reshape(size, cells, vocab))
        return np.concatenate(found)[:number]

    def _batch(self, owner: np.ndarray, chosen: np.ndarray) -> tuple[Any, ...]:
        """The arguments of `_losses` for tables with chosen tokens [B, A]."""
        tokens = self._tokens[owner].copy()
        b = np.arange(len(owner))[:, None]
        cells, wanted = self._attacked[owner], self._wanted[owner]
        targets = tokens[b, wanted[..., 0], wanted[..., 1]]
        tokens[b, cells[..., 0], cells[..., 1]] = chosen
        present = self._present[owner]
        tables = {
            "tokens": tokens,
            "present": present,
            "segment": np.ones(tokens.shape[:2], np.int32),
        }
        return self._model.parameters, tables, wanted, targets, self._weight[owner]


def _mean_losses(
    hidden: jax.Array, head: jax.Array, wanted: jax.Array, targets: jax.Array, weight: jax.Array
) -> jax.Array:
    """[B] the weighted negative log-likelihood of `targets` [B, W] in the cells `wanted`."""
    b = jnp.arange(len(wanted))[:, None]
    before = hidden[b, wanted[..., 0] - 1, wanted[..., 1]]
    logits = jnp.einsum("bwd,vd->bwv", before, head, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weight * (jax.nn.logsumexp(logits, axis=-1) - chosen), axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _losses(
    graph: nnx.GraphDef,
    silence: int,
    parameters: dict[str, Any],
    tables: Mapping[str, jax.Array],
    wanted: jax.Array,
    targets: jax.Array,
    weight: jax.Array,
) -> jax.Array:
    model = bind(graph, parameters)
    return _mean_losses(model.read(tables, silence), model.head_table(), wanted, targets, weight)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _row_gradients(
    graph: nnx.GraphDef,
    silence: int,
    parameters: dict[str, Any],
    rows: jax.Array,
    tables: Mapping[str, jax.Array],
    wanted: jax.Array,
    targets: jax.Array,
    weight: jax.Array,
) -> jax.Array:
    """[R, D] the gradient of the sum of the losses by rows [R, D] added to the embedding."""
    head = parameters.get("head", parameters["embedding"])

    def loss(rows):
        table = jnp.concatenate([parameters["embedding"], rows])
        model = bind(graph, {**parameters, "embedding": table, "head": jnp.zeros_like(table)})
        hidden = model.read(tables, silence)
        return jnp.sum(_mean_losses(hidden, head.astype(hidden.dtype), wanted, targets, weight))

    return jax.grad(loss)(rows)
