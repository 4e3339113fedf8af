"""Rotary positions (Su et al. 2021, arXiv 2104.09864): frequencies, and their variants for longer contexts."""

from __future__ import annotations

import math

import numpy as np

from msllm.config import RopeScalingConfig


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScalingConfig) -> np.ndarray:
    """Angle per row of each rotated pair, [H / 2] float32."""
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    slowed = frequencies / scaling.factor
    if scaling.kind == "none":
        kept = 1.0
    elif scaling.kind == "linear":
        kept = 0.0
    elif scaling.kind == "llama3":
        # Long wavelengths are slowed down by the factor, short ones kept, those between blended (Llama 3.1).
        rotations = scaling.original_max_position * frequencies / (2 * math.pi)
        kept = (rotations - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
    else:
        # YaRN (Peng et al. 2023, arXiv 2309.00071, 3.2): the same by the number of the pair, between the two pairs that
        # turn beta_fast and beta_slow times in the original context.
        def turning(times):
            return math.log(scaling.original_max_position / (times * 2 * math.pi)) / math.log(theta)

        first = max(math.floor(head_dim / 2 * turning(scaling.beta_fast)), 0)
        last = min(math.ceil(head_dim / 2 * turning(scaling.beta_slow)), head_dim - 1)
        kept = 1 - (np.arange(head_dim // 2) - first) / (last - first if last != first else 0.001)
    kept = np.clip(kept, 0, 1)
    return (kept * frequencies + (1 - kept) * slowed).astype(np.float32)


def rope_size(scaling: RopeScalingConfig) -> float:
    """The factor of every rotated query and key: YaRN makes attention a little sharper (arXiv 2309.00071, 3.4)."""
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
