"""What training draws for every batch: identities of threads, and lags (docs/groups.md).

The draws are functions of the seed, the step and the place of an example in the global batch. They
are therefore the same on every mesh and any number of hosts, and a run that continues draws what
it would have drawn.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from msllm.streams import StreamSpec

# Examples of a table that draw identities of their own; further ones repeat the draws in order.
EXAMPLES = 64
_LAGS, _IDENTITIES = 0, 1  # number the kinds of draws


def draw(spec: StreamSpec, seed: int, step: jax.Array, segment: jax.Array) -> dict[str, jax.Array]:
    """Draws for a batch; empty if the streams draw nothing.

    Args:
      spec: the streams.
      seed: the seed of the run.
      step: [] int32.
      segment: [B, T] int32, of the global batch.

    Returns:
      A dictionary. `identity`, [B, T, members] int32, is the identity of the i-th member of each
      group. All groups share the draw, so that members with the same index have the same identity.
      `lag_draw`, [B, draws] int32, says which of its values each drawn lag has: the same in all
      tables.
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    found = {}
    if spec.identities and spec.groups:
        found["identity"] = _identities(
            jax.random.fold_in(key, _IDENTITIES), segment, spec.identities, spec.largest_group
        )
    if spec.drawn_lags:
        key = jax.random.fold_in(key, _LAGS)
        places = [
            jax.random.bits(jax.random.fold_in(key, number)) % len(drawn.values)
            for number, drawn in enumerate(spec.drawn_lags)
        ]
        lag_draw = jnp.stack(places).astype(jnp.int32)
        found["lag_draw"] = jnp.broadcast_to(lag_draw, (len(segment), len(places)))
    return found


def _identities(key: jax.Array, segment: jax.Array, identities: int, members: int) -> jax.Array:
    """[B, T, members] int32: `members` of the identities for each example, without repetition."""
    batch, rows = segment.shape
    examples = min(EXAMPLES, rows)
    order = jnp.argsort(jax.random.bits(key, (batch, examples, identities)), axis=2)
    drawn = order[:, :, :members].astype(jnp.int32)
    return jnp.take_along_axis(drawn, (segment % examples)[:, :, None], axis=1)
