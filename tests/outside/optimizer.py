"""A custom optimizer: Lion (Chen et al. 2023, arXiv 2302.06675)."""

from typing import Any

import optax

from msllm.config import OptimConfig
from msllm.optim import mask_by_name, schedule


def lion(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Lion with the settings of `config.optim`; `steps` is the length of the run."""

    def is_decayed(parameters: Any) -> Any:
        return mask_by_name(
            parameters, lambda name: not any(part in name for part in config.no_decay)
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.lion(
            schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=is_decayed,
        ),
    )
