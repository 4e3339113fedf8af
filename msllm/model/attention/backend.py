"""What an attention backend is asked to do, so that it can say beforehand what it cannot."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """One device's share of the attention of a model. `declines(case)` of a backend returns None or the reason."""

    platform: str  # cpu | tpu | gpu
    device_kind: str  # as the runtime names it: "TPU v5 lite", "NVIDIA H100 80GB HBM3", ...
    dtype: str  # of q, k and v: float32 | bfloat16
    rows: int  # T
    streams: int  # S, all of them
    q_streams: int  # of these, streams whose queries this device holds
    heads: int  # N on this device
    kv_heads: int  # K on this device
    head_dim: int  # H
    lag: np.ndarray  # [S, S] int32
    ring: bool = False  # the keys come in parts, one device's streams at a time
