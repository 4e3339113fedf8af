"""From logits to tokens, on the device: penalties, filters, draws. All settings are arrays: no change recompiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FREE = -1  # in an array of given tokens: the model chooses


class Sampling(NamedTuple):
    """Settings of sampling, arrays [...] each; of an engine [B, S]."""

    temperature: Any  # float32; 0: the most likely token
    top_k: Any  # int32; 0: all
    top_p: Any  # float32
    top_p_inside: Any  # bool: the token that crosses top_p is dropped too
    min_p: Any  # float32
    min_probability: Any  # float32


class Chosen(NamedTuple):
    """One row's tokens, [B, S] each, and how likely the model itself held them: without penalties and filters."""

    tokens: Any  # int32
    logprob: Any  # float32, nats
    entropy: Any  # float32, nats

    def packed(self) -> jax.Array:
        """[3, B, S] int32, the floats as their bits: it leaves the device in one transfer. `unpacked` reads it."""

        def bits(x):
            return jax.lax.bitcast_convert_type(x, jnp.int32)

        return jnp.stack([self.tokens, bits(self.logprob), bits(self.entropy)])


def unpacked(packed: np.ndarray) -> Chosen:
    """What `Chosen.packed` packed, on the host."""
    floats = packed.view(np.float32)
    return Chosen(packed[0], floats[1], floats[2])


def filtered_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [..., V] float32 over the temperature, -inf where a filter drops the token. The best one always stays.

    The filters follow each other, and each sees the probabilities that the one before it left, normalised:

    - top_k: the k most likely tokens (0: all).
    - top_p: in descending order, tokens whose predecessors' probabilities sum to at most p (nucleus sampling, Holtzman
      et al. 2019, arXiv 1904.09751); with `top_p_inside` tokens whose own sum, with them, is at most p.
    - min_p: tokens at least min_p times as likely as the best (arXiv 2407.01082).
    - min_probability: tokens of at least this probability.
    """
    each = Sampling(*(x[..., None] for x in sampling))
    logits = logits / jnp.where(each.temperature > 0, each.temperature, 1.0)
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    keep = (rank < each.top_k) | (each.top_k == 0)
    probability = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    through = jnp.cumsum(probability, axis=-1)
    before = jnp.concatenate([jnp.zeros_like(through[..., :1]), through[..., :-1]], axis=-1)
    # A sum that rounding takes above 1 must not drop anything.
    keep &= (jnp.where(each.top_p_inside, through, before) <= each.top_p) | (each.top_p >= 1)
    keep &= probability >= each.min_p * probability[..., :1]
    left = jnp.sum(jnp.where(keep | (rank == 0), probability, 0.0), axis=-1, keepdims=True)
    keep &= probability >= each.min_probability * left
    keep = jnp.take_along_axis(keep | (rank == 0), jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)


def row_keys(seed, row, streams):
    """[B, S] random keys: a draw depends on its session's seed, its row and its stream, and on nothing else.

    Args: seed [B] uint32, row [B] int32, streams [S] int32.
    """
    of_row = jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seed, row)
    return jax.vmap(lambda key: jax.vmap(lambda stream: jax.random.fold_in(key, stream))(streams))(
        of_row
    )


def sample(logits, bias, allowed, sampling: Sampling, given, keys, active) -> Chosen:
    """Chooses a token for each cell.

    Args:
      logits: [B, S, V] float32. bias: [B, S, V] float32, what the penalties add to them.
      allowed: [B, S, V] bool: the tokens that may be chosen. sampling: of [B, S]. keys: [B, S].
      given: [B, S] int32: tokens that are no choice, else FREE.
      active: [B] bool: tables whose choice matters; work is not done on account of the others.
    """
    steered = jnp.where(allowed, logits + bias, -jnp.inf)
    best = _argmax(steered)
    warm = (sampling.temperature > 0) & active[:, None]
    whole = (
        (sampling.top_k == 0)
        & (sampling.top_p >= 1)
        & (sampling.min_p <= 0)
        & (sampling.min_probability <= 0)
    )

    def draw():
        # Sorting the vocabulary costs more than a small model: only where a filter asks for it.
        def plain():
            return (
                steered / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[..., None]
            )

        filtered = jax.lax.cond(
            jnp.any(warm & ~whole), lambda: filtered_logits(steered, sampling), plain
        )
        return jnp.where(warm, jax.vmap(jax.vmap(jax.random.categorical))(keys, filtered), best)

    chosen = jax.lax.cond(jnp.any(warm), draw, lambda: best).astype(jnp.int32)
    tokens = jnp.where(given != FREE, given, chosen)
    # log p = z - log(sum(e^z)), entropy = log(sum(e^z)) - sum(e^z z) / sum(e^z).
    top = jnp.max(logits, axis=-1)
    z = logits - top[..., None]
    weights = jnp.exp(z)
    norm = jnp.sum(weights, axis=-1)
    weighted = jnp.where(z > -jnp.inf, weights * z, 0.0)
    logprob = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - top - jnp.log(norm)
    return Chosen(tokens, logprob, jnp.log(norm) - jnp.sum(weighted, axis=-1) / norm)


def _argmax(x: jax.Array) -> jax.Array:
    """`argmax` of the last axis; where nothing is comparable, the last index. XLA:CPU finds it in vectors so, else one number
    after the other."""
    index = jnp.arange(x.shape[-1])
    return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), index, index[-1]), axis=-1)
