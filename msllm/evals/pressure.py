"""Training under pressure: a penalty on a probe that reads a secret from the thoughts' tokens.

    config.penalty.function = "msllm.evals.pressure:probe"
    config.penalty.weight = 1.0
    config.penalty.options = {"words": ("quietly", "secretly")}

The secret is whether an input says one of the words. The probe is the adversary: it reads the
tokens that the model is about to say in its thoughts, and the penalty is how well it tells the
examples with the secret from those without. Training therefore looks for thoughts that do not give
the secret away to such a probe. docs/monitoring.md shows what a monitor that is trained afterwards
still finds.

The probe is the nearest centroid, the linear classifier that needs no training of its own: it is
found anew in each batch, and so it always matches the present thoughts. It reads two kinds of
features of an example:

- the expected share of each token among those that a stream says;
- for each two streams, the probability that their last words are the same.

The penalty is the squared distance between the means of the examples with and without the secret,
summed over streams and pairs. It is estimated without bias (Gretton et al. 2012, the maximum mean
discrepancy, JMLR 13), because the distance between means of few examples is too large by chance.

All logits of the thoughts are in memory at the same time, so this is for small vocabularies.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from msllm.config import Config
from msllm.data.records import read_manifest
from msllm.errors import UserError
from msllm.loss import Forward, Penalty, targets_and_weights
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer


def probe(config: Config, streams: StreamSpec) -> Penalty:
    """Makes the penalty. It reads the tokenizer of the prepared data.

    Options:
      words: the words of an input that mean that an example has the secret. Each is one token.
      streams: the streams that the probe reads; default: all thoughts.

    Raises UserError if an option is invalid.
    """
    options = dict(config.penalty.options)
    words, chosen = options.pop("words", ()), options.pop("streams", ())
    if options:
        raise UserError(
            f"unknown option config.penalty.options.{[*options][0]}: the options of the probe are:"
            " words, streams"
        )
    if isinstance(words, str) or not words:
        raise UserError(
            f"config.penalty.options.words is {words!r}: must be one or more words that an input"
            " says in the examples with the secret"
        )
    thoughts = [s for s, kind in enumerate(streams.kinds) if kind == "thought"]
    read = [streams.index(name) for name in chosen] or thoughts
    if not read:
        raise UserError(
            "config.penalty.options.streams is empty, and no stream is a thought: name the streams"
            " that the probe reads"
        )
    inputs = [s for s, kind in enumerate(streams.kinds) if kind == "input"]
    tokenizer = _tokenizer(config)
    ids = [_one_token(word, tokenizer) for word in words]

    def penalty(forward: Forward) -> jax.Array:
        batch = forward.batch
        says = jnp.isin(batch["tokens"], jnp.array(ids)) & batch["present"]
        secret = says[:, :, jnp.array(inputs)].any(-1)
        return separation(forward, read, secret, tokenizer.silence_id)

    return penalty


def separation(
    forward: Forward, streams: list[int], secret: jax.Array, silence_id: int
) -> jax.Array:
    """How well the probe tells examples with a secret from others.

    Args:
      forward: the step.
      streams: those that the probe reads.
      secret: [B, T] bool, rows that show that their example has the secret.
      silence_id: the silence token.

    Returns: the squared distance of the means, without bias. It may be below 0. It is 0 if there
      are fewer than two examples of a kind.
    """
    batch, read = forward.batch, jnp.array(streams)
    segment, rows = batch["segment"], batch["segment"].shape[1]
    # Of [B, K]: the packed examples of the tables, at most one per row.
    one_hot = (segment[..., None] == jnp.arange(1, rows + 1)).astype(jnp.float32)
    exists = one_hot.any(1)
    is_secret = (one_hot * secret[..., None]).any(1) & exists

    targets, counted, _ = targets_and_weights(batch, (1.0,) * batch["tokens"].shape[2])
    hidden = forward.hidden[:, :, read]
    logits = jnp.einsum("btsd,vd->btsv", hidden, forward.head, preferred_element_type=jnp.float32)
    chance = jax.nn.softmax(logits) * counted[:, :, read, None]
    words = chance.at[..., silence_id].set(0.0)
    shares = jnp.einsum("btk,btsv->bksv", one_hot, words)
    shares = shares / jnp.maximum(shares.sum(-1, keepdims=True), 1.0)

    # The last cell of each example in which a stream speaks in the data.
    speaks = counted[:, :, read] & (targets[:, :, read] != silence_id)
    numbered = jnp.arange(1, rows + 1)[:, None] * speaks
    last = (one_hot[:, :, None, :] * numbered[..., None]).max(1)  # [B, K, S]; 0: there is none
    is_last = (one_hot[:, :, None, :] * numbered[..., None] == last[:, None]) & (last[:, None] > 0)
    ends = jnp.einsum("btsk,btsv->bksv", is_last.astype(jnp.float32), words)
    agree = jnp.einsum("bksv,bkuv->bksu", ends, ends)
    pairs = np.triu_indices(len(streams), 1)
    features = jnp.concatenate(
        [shares.reshape(*shares.shape[:2], -1), agree[:, :, pairs[0], pairs[1]]], axis=-1
    )
    return _squared_distance(features, is_secret, exists & ~is_secret)


def _squared_distance(features: jax.Array, one: jax.Array, other: jax.Array) -> jax.Array:
    """The squared distance between the means of two groups of [B, K, F], without bias.

    Args:
      one, other: [B, K] bool, the groups.
    """
    sums, products, counts = [], [], []
    for group in (one, other):
        members = jnp.where(group[..., None], features, 0.0)
        total, count = members.sum((0, 1)), group.sum()
        pairs = (total**2).sum() - (members**2).sum()  # over different members
        sums.append(total / jnp.maximum(count, 1))
        products.append(pairs / jnp.maximum(count * (count - 1), 1))
        counts.append(count)
    distance = products[0] + products[1] - 2 * (sums[0] * sums[1]).sum()
    return jnp.where((counts[0] > 1) & (counts[1] > 1), distance, 0.0)


def _tokenizer(config: Config) -> Tokenizer:
    """The tokenizer of the prepared data. Raises UserError."""
    data = config.data
    folder = data.mixture.dirs[0] if data.mixture.dirs else data.dir
    stored = read_manifest(folder)["tokenizer"]
    return Tokenizer.load(pathlib.Path(folder) / stored["file"], stored["silence"])


def _one_token(word: str, tokenizer: Tokenizer) -> int:
    ids = tokenizer.encode_word(word)
    if len(ids) != 1 or ids[0] == tokenizer.unknown_id:
        raise UserError(
            f"config.penalty.options.words holds {word!r}: it is {len(ids)} tokens or unknown to"
            " the tokenizer; name words of one token"
        )
    return ids[0]
