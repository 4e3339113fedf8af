"""Settings that configs share, as plain dictionaries for `ConfigDict.update`.

For example:

    config = default_config()
    config.update(POD)
    config.model.update(QWEN3["8b"])
"""

from __future__ import annotations

from typing import Any

_QWEN3 = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_kv_heads": 8,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "qk_norm": True,
}

# Sizes of published models, for `config.model`. Yang et al. 2025, Qwen3 technical report
# (arXiv 2505.09388), table 1, and the config.json of each model.
QWEN3: dict[str, dict[str, Any]] = {
    "0.6b": {
        **_QWEN3,
        "num_layers": 28,
        "d_model": 1024,
        "d_ff": 3072,
        "num_heads": 16,
        "tie_embeddings": True,
    },
    "1.7b": {
        **_QWEN3,
        "num_layers": 28,
        "d_model": 2048,
        "d_ff": 6144,
        "num_heads": 16,
        "tie_embeddings": True,
    },
    "8b": {
        **_QWEN3,
        "num_layers": 36,
        "d_model": 4096,
        "d_ff": 12288,
        "num_heads": 32,
        "tie_embeddings": False,
    },
    "32b": {
        **_QWEN3,
        "num_layers": 64,
        "d_model": 5120,
        "d_ff": 25600,
        "num_heads": 64,
        "tie_embeddings": False,
    },
}

# Four input, two thought and two output streams, for `config.streams`.
EIGHT_STREAMS: dict[str, Any] = {
    "names": ("system", "user", "tool", "observer", "thought", "plan", "output", "action"),
    "kinds": ("input",) * 4 + ("thought",) * 2 + ("output",) * 2,
}

# Settings that the pod configs share. Each config adds a model, a batch size, a mesh and the
# settings that save memory (model.remat, loss.vocab_chunks).
POD: dict[str, Any] = {
    "steps": 100_000,
    "model": {"compute_dtype": "bfloat16"},
    "streams": EIGHT_STREAMS,
    "data": {"rows": 1024},
    "loss": {"chunk_tokens": 8192},
    "optim": {"lr": 3e-4, "warmup_steps": 2000},
}
