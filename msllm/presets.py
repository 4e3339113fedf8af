"""Shapes of published models, for configs: `config.model.update(QWEN3["8b"])`."""

from __future__ import annotations

_COMMON = {
    "vocab_size": 151936,
    "head_dim": 128,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "qk_norm": True,
}

# Yang et al. 2025, Qwen3 technical report (arXiv 2505.09388), table 1, and the config.json of each model.
QWEN3 = {
    "0.6b": {
        **_COMMON,
        **{
            "num_layers": 28,
            "d_model": 1024,
            "d_ff": 3072,
            "num_heads": 16,
            "num_kv_heads": 8,
            "tie_embeddings": True,
        },
    },
    "1.7b": {
        **_COMMON,
        **{
            "num_layers": 28,
            "d_model": 2048,
            "d_ff": 6144,
            "num_heads": 16,
            "num_kv_heads": 8,
            "tie_embeddings": True,
        },
    },
    "8b": {
        **_COMMON,
        **{
            "num_layers": 36,
            "d_model": 4096,
            "d_ff": 12288,
            "num_heads": 32,
            "num_kv_heads": 8,
            "tie_embeddings": False,
        },
    },
    "32b": {
        **_COMMON,
        **{
            "num_layers": 64,
            "d_model": 5120,
            "d_ff": 25600,
            "num_heads": 64,
            "num_kv_heads": 8,
            "tie_embeddings": False,
        },
    },
}
