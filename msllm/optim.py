"""AdamW, its schedules and masks, out of optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from msllm.config import OptimConfig

TABLES = ("embedding", "head")  # parameters with a row for each token


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by update count: linear warm-up, then cosine, stable-and-decay (WSD) or constant."""
    warmup = min(config.warmup_steps, steps)
    last = config.lr * config.final_lr_ratio
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.lr, max(1, steps - warmup), config.final_lr_ratio)
    elif config.schedule == "wsd":  # Hu et al. 2024, arXiv 2404.06395
        decay = max(1, round(config.decay_fraction * steps))
        rest = optax.linear_schedule(
            config.lr, last, decay, transition_begin=max(0, steps - warmup - decay)
        )
    else:
        rest = optax.constant_schedule(config.lr)
    if not warmup:
        return rest
    # The first update already moves: a rate of zero would waste it.
    ramp = optax.linear_schedule(config.lr / warmup, config.lr, max(1, warmup - 1))
    return optax.join_schedules([ramp, rest], [warmup])


def _mask(parameters: Any, holds) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: holds(path_name(path)), parameters)


def path_name(path) -> str:
    """`blocks/mlp/gate` for the key path of a parameter."""
    return "/".join(str(getattr(key, "key", key)) for key in path)


def optimizer(
    config: OptimConfig, steps: int, silence_id: int = -1, moves=True
) -> optax.GradientTransformation:
    """Clip by global norm, Adam (Kingma & Ba 2014), decoupled weight decay (Loshchilov & Hutter 2017), schedule.

    Parameters whose path contains one of `config.no_decay` are not decayed; the stream embedding's rate is multiplied
    by `config.stream_embedding_lr`, that of the rows of the token `silence_id` by `config.silence_lr`. Where `moves`
    ([] bool) is false the moments stay what they are; the updates then mean nothing.
    """
    b1, b2 = (b if moves is True else jnp.where(moves, b, 1.0) for b in (config.b1, config.b2))

    def decayed(tree):
        return _mask(tree, lambda name: not any(part in name for part in config.no_decay))

    def stream_embedding(tree):
        return _mask(tree, lambda name: "stream_embedding" in name)

    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()

    def clipped(updates):
        return clip.update(updates, optax.EmptyState())[0]

    return optax.chain(
        optax.stateless(
            lambda updates, _: jax.tree.map(lambda x: jnp.where(moves, x, 0), clipped(updates))
        ),
        optax.scale_by_adam(b1, b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decayed),
        optax.masked(optax.scale(config.stream_embedding_lr), stream_embedding),
        # Not in the chain if it does nothing: the state of a chain has a place for each of its parts.
        *([_scale_row(silence_id, config.silence_lr)] if config.silence_lr != 1 else []),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def _scale_row(token: int, factor: float) -> optax.GradientTransformation:
    """Multiplies the updates of one token's rows in the tables [V, D]."""

    def scale(path, update):
        if path_name(path) not in TABLES:
            return update
        return jnp.where(jnp.arange(len(update))[:, None] == token, factor * update, update)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def leaf_norms(tree: Any) -> jax.Array:
    """L2 norm of every leaf, [leaves] float32, in the order of `jax.tree.leaves`."""
    return jnp.sqrt(
        jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)])
    )


def global_norm(norms: jax.Array) -> jax.Array:
    """L2 norm of the whole from the norms of its leaves."""
    return jnp.sqrt(jnp.sum(jnp.square(norms)))
