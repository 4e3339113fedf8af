"""The optimizer of a run: AdamW or Muon, built from parts of optax, or a user-defined one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from msllm.config import OptimConfig, find_object
from msllm.errors import UserError

TOKEN_TABLES = ("embedding", "head")  # parameters with a row for each token


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by number of updates: linear warm-up, then cosine, WSD or constant.

    WSD (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395) ends with a linear decay.

    Args:
      config: the settings.
      steps: number of steps in the whole run.
    """
    warmup = min(config.warmup_steps, steps)
    last = config.lr * config.final_lr_ratio
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(config.lr, max(1, steps - warmup), config.final_lr_ratio)
    elif config.schedule == "wsd":
        decay = max(1, round(config.decay_fraction * steps))
        rest = optax.linear_schedule(
            config.lr, last, decay, transition_begin=max(0, steps - warmup - decay)
        )
    else:
        rest = optax.constant_schedule(config.lr)
    if not warmup:
        return rest
    # The ramp starts above zero: an update with a learning rate of zero would be wasted.
    ramp = optax.linear_schedule(config.lr / warmup, config.lr, max(1, warmup - 1))
    return optax.join_schedules([ramp, rest], [warmup])


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a parameter from its key path, for example `blocks/mlp/gate`."""
    return "/".join(str(getattr(key, "key", key)) for key in path)


def mask_by_name(parameters: Any, holds: Callable[[str], bool]) -> Any:
    """A mask for optax: a tree like `parameters` with `holds(name)` at each leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: holds(path_name(path)), parameters)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer that `config.optimizer` names.

    Its `update` takes two more arguments. `finite` ([] bool): if it is false, the state does not
    change and the returned updates are meaningless. `silence_id`: the token that means silence.

    Raises UserError if there is no such optimizer.
    """
    make = find_object(config.optimizer, OPTIMIZERS, "config.optim.optimizer")
    optimizer = make(config, steps)
    return optimizer if config.optimizer in OPTIMIZERS else _skip_nonfinite(optimizer)


def check_no_decay(config: OptimConfig, names: Sequence[str]) -> None:
    """Raises UserError if an entry of `config.no_decay` is part of no parameter's name.

    Args:
      config: the optimizer's settings.
      names: the names of all parameters. The default entries need fit none: no model has all.
    """
    for part in config.no_decay:
        if part not in OptimConfig.no_decay and not any(part in name for name in names):
            raise UserError(
                f"config.optim.no_decay has {part!r}, which is part of no parameter's name: correct"
                f" or remove it (there are {', '.join(sorted(names))})"
            )


def adamw(config: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, then AdamW (Loshchilov & Hutter 2017) with the schedule of the config.

    Parameters whose path contains one of `config.no_decay` are not decayed. The learning rate is
    multiplied by `config.stream_embedding_lr` for the stream embedding, and by `config.silence_lr`
    for the silence token's rows in embedding and head. `update` takes the extra arguments that
    `make_optimizer` describes.
    """
    clip = _clip(config)

    def chain(finite: Any = True, silence_id: int = -1) -> optax.GradientTransformation:
        # With zero gradients and decay rates of 1, Adam leaves its moments as they are. Selecting
        # between new and old moments would keep both in memory.
        b1, b2 = config.b1, config.b2
        if finite is not True:
            b1, b2 = jnp.where(finite, b1, 1.0), jnp.where(finite, b2, 1.0)

        def clip_or_zero(updates: Any, _: Any) -> Any:
            clipped, _ = clip.update(updates, optax.EmptyState())
            return jax.tree.map(lambda x: jnp.where(finite, x, 0), clipped)

        return optax.chain(
            optax.stateless(clip_or_zero),
            optax.scale_by_adam(b1, b2, config.eps),
            *_decay_and_rate(config, steps, silence_id),
        )

    def update(
        updates: Any, state: Any, params: Any = None, *, finite: Any = True, silence_id: int = -1
    ) -> tuple[Any, Any]:
        updates, new_state = chain(finite, silence_id).update(updates, state, params)
        # Without `finite`, `chain` keeps the moments, but not the scalars, which count updates.
        new_state = jax.tree.map(
            lambda new, old: new if new.ndim else jnp.where(finite, new, old), new_state, state
        )
        return updates, new_state

    return optax.GradientTransformationExtraArgs(chain().init, update)


def muon(config: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, NAdam for all other parameters.

    The update of a matrix is its momentum with all singular values set to about 1, scaled so that
    its entries have the size of Adam's (Liu et al. 2025, arXiv 2502.16982, section 2.2). So `lr`
    and `weight_decay` mean what they mean for `adamw`. `config.b1` is the decay of the momentum of
    both kinds; 0.95 is usual. Clipping, weight decay, `config.stream_embedding_lr` and
    `config.silence_lr` are those of `adamw`, and so are the arguments of `update`.
    """

    def matrices(tree: Any) -> Any:
        """How to read each array [layers, D, ...] as matrices [D, everything else]."""

        def matrix(path: tuple[Any, ...], x: Any) -> contrib.MuonDimensionNumbers | None:
            name = path_name(path)
            if not name.startswith("blocks/") or x.ndim < 3:
                return None
            if any(part in name for part in config.no_decay):  # a bias [layers, heads, H]
                return None
            return contrib.MuonDimensionNumbers((1,), tuple(range(2, x.ndim)))

        return jax.tree_util.tree_map_with_path(matrix, tree)

    direction = contrib.muon(
        learning_rate=-1.0,  # the schedule comes after the decay
        beta=config.b1,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )

    def chain(silence_id: int = -1) -> optax.GradientTransformation:
        return optax.chain(_clip(config), direction, *_decay_and_rate(config, steps, silence_id))

    def update(
        updates: Any, state: Any, params: Any = None, *, silence_id: int = -1
    ) -> tuple[Any, Any]:
        return chain(silence_id).update(updates, state, params)

    return _skip_nonfinite(optax.GradientTransformationExtraArgs(chain().init, update))


def _clip(config: OptimConfig) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()


def _decay_and_rate(
    config: OptimConfig, steps: int, silence_id: int
) -> list[optax.GradientTransformation]:
    """What follows the direction of an update: weight decay, and the rates of the config."""

    def is_decayed(tree: Any) -> Any:
        return mask_by_name(tree, lambda name: not any(part in name for part in config.no_decay))

    def is_stream_embedding(tree: Any) -> Any:
        return mask_by_name(tree, lambda name: "stream_embedding" in name)

    parts = [
        optax.add_decayed_weights(config.weight_decay, is_decayed),
        optax.masked(optax.scale(config.stream_embedding_lr), is_stream_embedding),
    ]
    # The state has an entry for each part, so a part that does nothing would change the layout of
    # checkpoints.
    if config.silence_lr != 1:
        parts.append(_scale_row(silence_id, config.silence_lr))
    return [*parts, optax.scale_by_learning_rate(schedule(config, steps))]


# These optimizers handle the extra arguments that `make_optimizer` describes. A new entry that does
# not can be wrapped in `_skip_nonfinite`.
OPTIMIZERS: dict[str, Callable[[OptimConfig, int], optax.GradientTransformationExtraArgs]] = {
    "adamw": adamw,
    "muon": muon,
}


def _skip_nonfinite(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Adds the argument `finite` of `make_optimizer` to the update of any optimizer."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(
        updates: Any, state: Any, params: Any = None, *, finite: Any = True, **extra_args: Any
    ) -> tuple[Any, Any]:
        updates, new_state = optimizer.update(updates, state, params, **extra_args)
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state)
        return updates, new_state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def optimizer_shardings(
    state: Any, parameters: Any, shardings: Any, replicated: jax.sharding.Sharding
) -> Any:
    """The shardings of an optimizer's state.

    An array belongs to a parameter if its path ends with the parameter's path, as in
    `[1].mu['blocks']['mlp']['gate']`. If it also has the parameter's shape, it gets the parameter's
    sharding.

    Args:
      state: the shapes of the optimizer's state.
      parameters: the shapes of the parameters.
      shardings: the shardings of the parameters.
      replicated: the sharding of everything else, such as counts and factored moments.
    """
    by_path = {
        path: (x.shape, sharding)
        for (path, x), sharding in zip(
            jax.tree_util.tree_leaves_with_path(parameters), jax.tree.leaves(shardings), strict=True
        )
    }

    def sharding_of(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        for start in range(len(path)):  # longest suffix first
            if path[start:] in by_path:
                shape, sharding = by_path[path[start:]]
                return sharding if x.shape == shape else replicated
        return replicated

    return jax.tree_util.tree_map_with_path(sharding_of, state)


def _scale_row(token: int, factor: float) -> optax.GradientTransformation:
    """Multiplies the updates of one token's rows in the TOKEN_TABLES [V, D] by a factor."""

    def scale(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        if path_name(path) not in TOKEN_TABLES:
            return update
        return jnp.where(jnp.arange(len(update))[:, None] == token, factor * update, update)

    def update(updates: Any, _: Any) -> Any:
        return jax.tree_util.tree_map_with_path(scale, updates)

    return optax.stateless(update)


def leaf_norms(tree: Any) -> jax.Array:
    """L2 norm of every leaf, [leaves] float32, in the order of `jax.tree.leaves`."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.stack(squares))


def global_norm(norms: jax.Array) -> jax.Array:
    """L2 norm of a whole tree from the norms of its leaves."""
    return jnp.sqrt(jnp.sum(jnp.square(norms)))
