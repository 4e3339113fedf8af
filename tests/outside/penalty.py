"""A custom penalty: what one stream says in a row should not be what it said before."""

import jax
import jax.numpy as jnp

from msllm.config import Config
from msllm.loss import Forward, Penalty
from msllm.streams import StreamSpec


def repetition(config: Config, streams: StreamSpec) -> Penalty:
    """The mean probability that a stream repeats its token. The option `stream` names it."""
    column = streams.index(config.penalty.options["stream"])

    def penalty(forward: Forward) -> jax.Array:
        logits = jnp.einsum("btd,vd->btv", forward.hidden[:, :, column], forward.head)
        tokens = forward.batch["tokens"][:, :, column]
        chance = jnp.take_along_axis(jax.nn.softmax(logits), tokens[..., None], axis=-1)[..., 0]
        return chance.mean(where=forward.batch["present"][:, :, column])

    return penalty
