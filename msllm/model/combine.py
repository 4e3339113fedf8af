"""The predictions of streams that follow from several streams (`config.streams.combine`).

The next token of such a stream is drawn from a mixture of the distributions of its sources, or from
a product (a log-linear pool) of them. As in ParScale (Chen et al. 2025, arXiv 2505.10475, section
3), the weights are learned: an MLP computes them from the sources' hidden states of the row, and a
part of them is spread evenly, so that every source keeps a gradient. A source that is absent in a
row has no part in it. If all are, the stream follows from its own state.

Everything here concerns one row at a time. It runs inside `shard_map` and outside.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from msllm.combine import Combine
from msllm.config import ModelConfig
from msllm.model.layers import constant, gather_param, parameter
from msllm.sharding import axis_index, axis_size, gather_streams
from msllm.streams import StreamSpec

MultiStreamLM: TypeAlias = Any  # of msllm/model/model.py, which imports this module
_ABSENT = -1e30  # the log-weight of a source without a part; finite, so that gradients are


class Weights(nnx.Module):
    """The parameters of the MLPs, of all rules. A pair is an entry in the sources of a rule.

    The members of a group are one entry: they share its parameters, and their mean is its hidden
    state. For them `own` adds what tells the members of a group apart. So a group may have another
    number of members than in training.
    """

    def __init__(self, config: ModelConfig, streams: StreamSpec, rngs: nnx.Rngs | None):
        """Creates the parameters. Without `rngs` only their shapes are meaningful."""
        rules, width = streams.combine, config.d_model
        entries = [rule.entry_groups for rule in rules]
        pairs, grouped = sum(map(len, entries)), sum(map(_count_groups, entries))
        axes = ("replicated", "embed", "replicated")
        most = max(map(len, entries))
        self.up = parameter(rngs, (pairs, width, width), axes, (most * width) ** -0.5)
        self.up_bias = constant(0.0, (len(rules), width), axes[:2])
        self.down = parameter(rngs, (pairs, width), axes[:2], width**-0.5)
        self.down_bias = constant(0.0, (pairs,), axes[:1])
        if grouped:
            self.own = parameter(rngs, (grouped, width, width), axes, width**-0.5)


def _count_groups(groups: tuple[str, ...]) -> int:
    """How many entries of a rule are groups."""
    return sum(map(bool, groups))


class Sources(NamedTuple):
    """What the prediction of one stream follows from.

    Attributes:
      hidden: [B, T, P, D], the hidden states of the sources.
      log_weights: [B, T, P] float32, logs of weights that sum to 1.
    """

    hidden: jax.Array
    log_weights: jax.Array

    def pooled(self) -> jax.Array:
        """The weighted sum of the hidden states, [B, T, D].

        The head is linear, so its logits are the weighted sum of the sources' logits.
        """
        weights = jnp.exp(self.log_weights)[..., None]
        return jnp.sum(weights * self.hidden.astype(jnp.float32), axis=-2).astype(self.hidden.dtype)

    def mixed(self, logits: jax.Array) -> jax.Array:
        """The log-probabilities [B, T, V] of the mixture, from the sources' logits [B, T, P, V]."""
        joint = self.log_weights[..., None] + jax.nn.log_softmax(logits, axis=-1)
        return jax.nn.logsumexp(joint, axis=-2)


def sources(model: MultiStreamLM, rule: Combine, hidden: jax.Array, present: jax.Array) -> Sources:
    """The sources of a rule, on every device along the mesh axis `stream`.

    Args:
      model: the model.
      rule: one of `model.streams.combine`.
      hidden: [B, T, S, D] after the final norm, of the streams of this device.
      present: [B, T, S] bool.
    """
    all_hidden, all_present = gather_streams(hidden), gather_streams(present)
    chosen = jnp.array(rule.sources)
    return weigh(
        model,
        rule,
        all_hidden[:, :, chosen],
        all_present[:, :, chosen],
        all_hidden[:, :, rule.stream],
    )


def weigh(
    model: MultiStreamLM, rule: Combine, hidden: jax.Array, present: jax.Array, own: jax.Array
) -> Sources:
    """Computes the weights of a rule's sources.

    Args:
      model: the model.
      rule: one of `model.streams.combine`.
      hidden: [..., P, D], the hidden states of the sources.
      present: [..., P] bool, which of them are present.
      own: [..., D], the hidden state of the stream itself.
    """
    spec, weights, dtype = model.streams, model.combine, hidden.dtype
    number = spec.combine.index(rule)
    before = [other.entry_groups for other in spec.combine[:number]]
    first = sum(map(len, before))
    pairs = slice(first, first + len(rule.entry_groups))
    entries = np.array(rule.entries)
    seen = jnp.where(present[..., None], hidden, 0)  # an absent source changes nothing
    up = gather_param(weights.up, dtype)[pairs]
    of_entries = _means(seen, present, rule) if rule.groups else seen
    x = jnp.einsum("...pd,pde->...e", of_entries, up, preferred_element_type=jnp.float32)
    x = (x + gather_param(weights.up_bias, jnp.float32)[number])[..., None, :]
    if rule.groups:
        of_members = gather_param(weights.own, dtype)[sum(map(_count_groups, before)) :]
        groups = [entry for entry, name in enumerate(rule.entry_groups) if name]
        for place, entry in enumerate(groups):
            members = jnp.asarray(entries == entry)[:, None]
            added = jnp.einsum(
                "...pd,de->...pe", seen, of_members[place], preferred_element_type=jnp.float32
            )
            x = x + jnp.where(members, added, 0)
    down = gather_param(weights.down, jnp.float32)[pairs][entries]
    scores = jnp.sum(jax.nn.silu(x) * down, axis=-1) + weights.down_bias.get_value()[pairs][entries]

    count = jnp.sum(present, axis=-1, keepdims=True)
    log_weights = jax.nn.log_softmax(jnp.where(present, scores, _ABSENT), axis=-1)
    if spec.combine_smoothing:
        evenly = jnp.log(spec.combine_smoothing / jnp.maximum(count, 1))
        log_weights = jnp.logaddexp(jnp.log1p(-spec.combine_smoothing) + log_weights, evenly)
    # If all sources are absent, the stream itself takes the place of the first one.
    is_first = jnp.arange(len(rule.sources)) == 0
    alone = (count == 0) & is_first
    log_weights = jnp.where(present, log_weights, jnp.where(alone, 0.0, _ABSENT))
    return Sources(jnp.where(alone[..., None], own[..., None, :], seen), log_weights)


def part_of_device(x: jax.Array, stream: int | tuple[int, ...]) -> jax.Array:
    """A stream of all rows, or several, of which each device along `stream` gets an equal part.

    So all these devices share the work of a stream that only one of them holds.

    Args:
      x: [B, T, S, ...], of the streams of this device.
      stream: the index of the stream, or several.

    Returns: [1, N, ...] or, of several streams, [1, N, P, ...]. Rows of zeros pad the last part.
    """
    parts = axis_size("stream")
    x = gather_streams(x)[:, :, jnp.array(stream)]
    x = x.reshape(1, -1, *x.shape[2:])
    if parts == 1:
        return x
    size = -(-x.shape[1] // parts)
    x = jnp.pad(x, [(0, 0), (0, parts * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jax.lax.dynamic_slice_in_dim(x, axis_index("stream") * size, size, axis=1)


def sources_of_device(
    model: MultiStreamLM, rule: Combine, hidden: jax.Array, present: jax.Array
) -> Sources:
    """This device's part, as in `part_of_device`, of the sources of a rule. See `sources`."""
    states, here = (part_of_device(x, rule.sources) for x in (hidden, present))
    return weigh(model, rule, states, here, part_of_device(hidden, rule.stream))


def _means(seen: jax.Array, present: jax.Array, rule: Combine) -> jax.Array:
    """The mean hidden state of the present sources of each entry, [..., E, D].

    Args:
      seen: [..., P, D], 0 where a source is absent.
      present: [..., P] bool.
      rule: the rule.
    """
    is_in = np.array(rule.entries)[:, None] == np.arange(len(rule.entry_groups))  # [P, E]
    count = jnp.einsum("...p,pe->...e", present.astype(jnp.float32), is_in.astype(np.float32))
    total = jnp.einsum("...pd,pe->...ed", seen.astype(jnp.float32), is_in.astype(np.float32))
    return (total / jnp.maximum(count, 1)[..., None]).astype(seen.dtype)


def pool_products(model: MultiStreamLM, hidden: jax.Array, present: jax.Array) -> jax.Array:
    """The hidden states [B, T, S, D] whose logits predict, for all streams but mixtures.

    That of a stream with the mode `product` is the weighted sum of its sources'. The arguments are
    those of `sources`.
    """
    result = hidden
    for rule in model.streams.combine:
        if rule.mode == "product":
            result = put(result, sources(model, rule, hidden, present).pooled(), rule.stream)
    return result


def put(into: jax.Array, x: jax.Array, stream: int) -> jax.Array:
    """`into` [B, T, S, ...] with x [B, T, ...] in the place of a stream, if this device holds it.

    S is the number of streams of this device.
    """
    size = into.shape[2]
    place, owner = stream % size, stream // size
    here = axis_index("stream") == owner
    return into.at[:, :, place].set(jnp.where(here, x, into[:, :, place]))


def next_logits(model: MultiStreamLM, hidden: jax.Array, present: jax.Array) -> jax.Array:
    """The logits [B, T, S, V] float32 of each stream's next token, on one device.

    Those of a mixture are log-probabilities. For scoring; training never holds all logits.

    Args:
      model: the model.
      hidden: [B, T, S, D] after the final norm.
      present: [B, T, S] bool.
    """
    logits = model.logits(pool_products(model, hidden, present))
    for rule in model.streams.combine:
        if rule.mode == "mixture":
            found = sources(model, rule, hidden, present)
            logits = logits.at[:, :, rule.stream].set(found.mixed(model.logits(found.hidden)))
    return logits
