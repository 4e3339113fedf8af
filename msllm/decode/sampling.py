"""Samples tokens from logits on the device, with penalties and filters.

All settings are arrays, so changing them does not recompile.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

# jax.Array, np.ndarray, or what stands for an array in a tree of the same type, e.g. its sharding.
Array: TypeAlias = Any

FREE = -1  # in an array of given tokens: the model samples this cell


class Sampling(NamedTuple):
    """Sampling settings as arrays of one shape [...]; an engine has [B, S]."""

    temperature: Array  # float32; 0: the most likely token
    top_k: Array  # int32; 0: all
    top_p: Array  # float32
    top_p_inside: Array  # bool: also drop the token that crosses top_p
    min_p: Array  # float32
    min_probability: Array  # float32


class Sampled(NamedTuple):
    """The tokens of one row, and measures of the unmodified distribution; [B, S] each.

    The unmodified distribution is the model's own, before penalties and filters.
    """

    tokens: Array  # int32
    logprob: Array  # float32, nats: the log-probability of the token
    entropy: Array  # float32, nats

    def packed(self) -> jax.Array:
        """[3, B, S] int32 for one transfer to the host; the floats are stored as their bits."""
        floats = [jax.lax.bitcast_convert_type(x, jnp.int32) for x in (self.logprob, self.entropy)]
        return jnp.stack([self.tokens, *floats])

    @classmethod
    def unpacked(cls, packed: np.ndarray) -> Sampled:
        """The inverse of `packed`, on the host."""
        floats = packed.view(np.float32)
        return cls(packed[0], floats[1], floats[2])


def filtered_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [..., V] float32 divided by the temperature, -inf where a filter drops the token.

    The filters apply in the order below. Each one sees the normalised probabilities of the tokens
    that the previous filters kept. The most likely token is always kept.

    - top_k: the k most likely tokens (0: all).
    - top_p: in descending order, tokens whose predecessors' probabilities sum to at most p (nucleus
      sampling, Holtzman et al. 2019, arXiv 1904.09751); with `top_p_inside`, tokens whose
      probabilities together with their predecessors' sum to at most p.
    - min_p: tokens at least min_p times as likely as the most likely one (arXiv 2407.01082).
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
    # Rounding may lift a sum above 1, and top_p = 1 must drop nothing.
    keep &= (jnp.where(each.top_p_inside, through, before) <= each.top_p) | (each.top_p >= 1)
    keep &= probability >= each.min_p * probability[..., :1]
    left = jnp.sum(jnp.where(keep | (rank == 0), probability, 0.0), axis=-1, keepdims=True)
    keep &= probability >= each.min_probability * left
    keep = jnp.take_along_axis(keep | (rank == 0), jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)


def row_keys(seed: jax.Array, row: jax.Array, streams: jax.Array) -> jax.Array:
    """Random keys [B, S]. A draw depends only on its session's seed, its row and its stream.

    Args:
      seed: [B] uint32.
      row: [B] int32.
      streams: [S] int32.
    """

    def keys_of_session(seed, row):
        key = jax.random.fold_in(jax.random.key(seed), row)
        return jax.vmap(lambda stream: jax.random.fold_in(key, stream))(streams)

    return jax.vmap(keys_of_session)(seed, row)


def sample(
    logits: jax.Array,
    bias: jax.Array | float,
    allowed: jax.Array,
    sampling: Sampling,
    given: jax.Array,
    keys: jax.Array,
    active: jax.Array,
) -> Sampled:
    """Samples a token for each cell.

    Args:
      logits: [B, S, V] float32.
      bias: [B, S, V] float32, added to the logits: the negative penalties.
      allowed: [B, S, V] bool, the tokens that may be sampled.
      sampling: [B, S] each.
      given: [B, S] int32, tokens that are set and not sampled; FREE elsewhere.
      keys: [B, S], from `row_keys`.
      active: [B] bool, the sessions whose tokens are used. Nothing is drawn for the others.
    """
    steered = jnp.where(allowed, logits + bias, -jnp.inf)
    best = _argmax(steered)
    draws = (sampling.temperature > 0) & active[:, None]
    chosen = jax.lax.cond(
        jnp.any(draws), lambda: _draw(steered, draws, best, sampling, keys), lambda: best
    )
    tokens = jnp.where(given != FREE, given, chosen.astype(jnp.int32))
    return Sampled(tokens, *_logprob_and_entropy(logits, tokens))


def _draw(logits, draws, best, sampling: Sampling, keys) -> jax.Array:
    """[B, S]: a token drawn where `draws`, else the best one."""
    unfiltered = (
        (sampling.top_k == 0)
        & (sampling.top_p >= 1)
        & (sampling.min_p <= 0)
        & (sampling.min_probability <= 0)
    )

    def filtered():
        return filtered_logits(logits, sampling)

    def plain():
        return logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[..., None]

    # Sorting the vocabulary costs more than a small model, so sort only if a filter needs it.
    scaled = jax.lax.cond(jnp.any(draws & ~unfiltered), filtered, plain)
    return jnp.where(draws, jax.vmap(jax.vmap(jax.random.categorical))(keys, scaled), best)


def _logprob_and_entropy(logits, tokens) -> tuple[jax.Array, jax.Array]:
    """The log-probability of the tokens and the entropy, under the softmax of logits [B, S, V]."""
    # log p = z - log(sum(e^z)), entropy = log(sum(e^z)) - sum(e^z z) / sum(e^z).
    top = jnp.max(logits, axis=-1)
    z = logits - top[..., None]
    weights = jnp.exp(z)
    norm = jnp.sum(weights, axis=-1)
    weighted = jnp.where(z > -jnp.inf, weights * z, 0.0)
    token_logits = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    logprob = token_logits - top - jnp.log(norm)
    return logprob, jnp.log(norm) - jnp.sum(weighted, axis=-1) / norm


def _argmax(x: jax.Array) -> jax.Array:
    """`argmax` over the last axis; 0 if an entry is nan.

    XLA:CPU vectorizes this form, but not its own argmax.
    """
    index = jnp.arange(x.shape[-1])
    top = jnp.max(x, axis=-1, keepdims=True)
    found = jnp.min(jnp.where(x == top, index, index[-1]), axis=-1)
    return jnp.where(jnp.isnan(top[..., 0]), 0, found)
