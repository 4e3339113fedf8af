"""Tiny models of the `transformers` library, for each family and rotary variant.

`python tests/hf_models.py` records them in tests/hf. Each folder holds a bfloat16 model as the
library writes it, and logits.npz: tokens [T] int32 and the logits [T, V] that the library computes
in float32. Recording needs torch and transformers. The tests that read the folders need neither.
"""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np

RECORDED = pathlib.Path(__file__).parent / "hf"
ROWS, VOCABULARY = 32, 40
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# (family, tied embeddings, rotary settings, config format of older library versions, sharded)
VARIANTS = {
    "llama": ("llama", False, {"rope_type": "default"}, False, False),
    "llama_linear": ("llama", True, {"rope_type": "linear", "factor": 2.0}, True, True),
    "llama_llama3": ("llama", True, LLAMA3, True, False),
    "llama_llama3_new": ("llama", False, LLAMA3, False, True),
    "qwen2": ("qwen2", True, {"rope_type": "default"}, True, False),
    "qwen2_yarn": ("qwen2", False, YARN, True, True),
    "qwen3": ("qwen3", True, {"rope_type": "default"}, False, True),
    "qwen3_yarn": (
        "qwen3",
        False,
        YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3},
        False,
        False,
    ),
    "qwen3_linear": ("qwen3", False, {"rope_type": "linear", "factor": 4.0}, True, False),
}


def make(variant: str, folder: pathlib.Path) -> None:
    """Writes a variant's model and logits.npz to `folder`. Needs torch and transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family, tied, rope, older, sharded = VARIANTS[variant]
    theta = 50.0  # small, so that the slow pairs rotate visibly within 32 rows
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12 if family != "qwen2" else None,
        intermediate_size=20,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        rope_parameters=rope | {"rope_theta": theta},
        initializer_range=0.3,
        rms_norm_eps=1e-5,
    )
    if family == "qwen2":
        del config.head_dim
    torch.manual_seed(sum(map(ord, variant)))
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        # New norms are 1 and new biases are 0, which would hide mistakes.
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, float("norm" in name), 0.3)
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="5KB" if sharded else "1GB")
    if older:
        path = folder / "config.json"
        settings = json.loads(path.read_text())
        scaling = settings.pop("rope_parameters")
        settings["rope_theta"] = scaling.pop("rope_theta")
        settings["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
        settings["torch_dtype"] = settings.pop("dtype")
        path.write_text(json.dumps(settings, indent=2))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, ROWS).astype(np.int32)
    np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=logits(folder, tokens))


def logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """The logits [T, V] that transformers computes in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()


if __name__ == "__main__":
    for variant in VARIANTS:
        make(variant, RECORDED / variant)
        (RECORDED / variant / "generation_config.json").unlink(missing_ok=True)
