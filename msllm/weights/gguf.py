"""GGUF files (llama.cpp): Llama, Qwen2 and Qwen3 models with their BPE tokenizer, read through the package `gguf`.

Numbers are dequantised to float32. The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from msllm.config import ModelConfig, RopeScalingConfig
from msllm.errors import UserError
from msllm.model.layers import rope_frequencies
from msllm.weights import hf

_BLOCK = "model.layers.{}."
# What a tensor is called here and in Hugging Face's layout; `{}` stands for the layer.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{}.attn_norm.weight": _BLOCK + "input_layernorm.weight",
    "blk.{}.ffn_norm.weight": _BLOCK + "post_attention_layernorm.weight",
    "blk.{}.attn_output.weight": _BLOCK + "self_attn.o_proj.weight",
    **{
        f"blk.{{}}.attn_{x}.{kind}": f"{_BLOCK}self_attn.{x}_proj.{kind}"
        for x in "qkv"
        for kind in ("weight", "bias")
    },
    **{f"blk.{{}}.attn_{x}_norm.weight": f"{_BLOCK}self_attn.{x}_norm.weight" for x in "qk"},
    **{f"blk.{{}}.ffn_{x}.weight": f"{_BLOCK}mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
}
FREQUENCIES = "rope_freqs.weight"  # by what Llama 3's frequencies are divided
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut before BPE, by `tokenizer.ggml.pre`: a pattern, or None for GPT-2's.
PATTERNS = {
    "gpt-2": None,
    "smollm": None,  # and every digit by itself
    "llama-bpe": _LETTERS + r"\p{N}{1,3}" + _OTHERS,
    "qwen2": _LETTERS + r"\p{N}" + _OTHERS,
}


class Model(NamedTuple):
    """What a GGUF file holds."""

    config: ModelConfig
    parameters: dict[str, Any]  # nested dicts of numpy float32
    settings: dict[str, Any]  # Hugging Face's config.json of it
    tokenizer: bytes | None  # a `tokenizers` file
    tokenizer_settings: dict[str, Any]  # Hugging Face's tokenizer_config.json


def read_gguf(path: str | os.PathLike, with_tokenizer: bool = True) -> Model:
    """Reads a GGUF file. Raises UserError for what this model cannot represent, and for damage."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("to read GGUF files, install msllm[gguf] (the package gguf)") from error
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: give the path of a .gguf file")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # whatever numpy says of a file that is too short
        raise UserError(f"{path} is damaged or no GGUF file ({error}): copy it again") from error

    tensors, frequencies = {}, None
    for tensor in reader.tensors:

        def load(tensor=tensor):
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

        shape = tuple(int(n) for n in reversed(tensor.shape))
        if tensor.name == FREQUENCIES:
            frequencies = load()
        else:
            tensors[_hf_name(tensor.name)] = hf.Stored(str(path), shape, "F32", load)
    settings = _settings(fields, tensors, frequencies, str(path))
    config, streams = hf.read_config(settings, str(path))
    if settings["model_type"] == "llama":
        tensors = {name: _unpermuted(name, stored, config) for name, stored in tensors.items()}
    parameters = hf.from_hf(tensors, config, streams, str(path))
    if not with_tokenizer:
        return Model(config, parameters, settings, None, {})
    return Model(
        config, parameters, settings, _tokenizer(fields, str(path)), _tokenizer_settings(fields)
    )


def _hf_name(name: str) -> str:
    first, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    if first == "blk" and f"blk.{{}}.{rest}" in NAMES:
        return NAMES[f"blk.{{}}.{rest}"].format(layer)
    return NAMES.get(name, name)


def _unpermuted(name: str, stored: hf.Stored, config: ModelConfig) -> hf.Stored:
    """Llama's q and k rotate the pairs (2m, 2m + 1) in a GGUF file; here, as in Hugging Face's, (m, m + H / 2)."""
    of_heads = {"q_proj.weight": config.num_heads, "k_proj.weight": config.num_kv_heads}
    heads = of_heads.get(name.partition("self_attn.")[2])
    if heads is None:
        return stored

    def load() -> np.ndarray:
        rows = stored.load()
        return rows.reshape(heads, config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)

    return stored._replace(load=load)


def _settings(
    fields: dict[str, Any], tensors: dict[str, hf.Stored], frequencies: np.ndarray | None, path: str
) -> dict[str, Any]:
    """The file's metadata as a Hugging Face config."""
    family = fields.get("general.architecture")

    def get(key: str, default: Any = None) -> Any:
        if (value := fields.get(f"{family}.{key}", default)) is None:
            raise UserError(f"{path} has no {family}.{key}: it is damaged, or no {family} model")
        # The file keeps float32: of 1e-05 that is 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    if family not in hf.FAMILIES:
        raise UserError(
            f"{path} is of the architecture {family!r}: supported are {', '.join(hf.FAMILIES)}"
        )
    if "model.embed_tokens.weight" not in tensors:
        raise UserError(
            f"{path} has no tensor token_embd.weight: it is damaged, or a vocabulary without a model"
        )
    heads, width = get("attention.head_count"), get("embedding_length")
    settings = {
        "model_type": family,
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": width,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", get("rope.dimension_count", width // heads)),
        "intermediate_size": get("feed_forward_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    for name in ("bos", "eos"):
        if (token := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            settings[f"{name}_token_id"] = token
    kind = get("rope.scaling.type", "none")
    if frequencies is not None:
        settings["rope_scaling"] = _llama3_scaling(frequencies, settings, path)
    elif kind != "none":
        factor = get("rope.scaling.factor")
        settings["rope_scaling"] = scaling = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = get(
                "rope.scaling.original_context_length"
            )
            scaling["beta_fast"] = get("rope.scaling.yarn_beta_fast", 32.0)
            scaling["beta_slow"] = get("rope.scaling.yarn_beta_slow", 1.0)
            if (
                times := get("rope.scaling.attn_factor", 1.0)
            ) != 1:  # there it multiplies the paper's
                scaling["attention_factor"] = times * (0.1 * math.log(factor) + 1)
    return settings


def _llama3_scaling(frequencies: np.ndarray, settings: dict[str, Any], path: str) -> dict[str, Any]:
    """Llama 3.1's settings, of which a GGUF file keeps only the effect. All its models share them but for the factor."""
    factor = float(frequencies.max())
    scaling = RopeScalingConfig("llama3", factor, 1.0, 4.0, original_max_position=8192)
    base = (settings["head_dim"], settings["rope_theta"])
    expected = rope_frequencies(*base, RopeScalingConfig()) / rope_frequencies(*base, scaling)
    if expected.shape != frequencies.shape or not np.allclose(frequencies, expected, rtol=1e-4):
        raise UserError(
            f"{path}: {FREQUENCIES} is not Llama 3.1's for any factor: take the model in another format"
        )
    keys = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        "rope_type": "llama3",
        "factor": round(factor) if math.isclose(factor, round(factor)) else factor,
        **keys,
    }


def _tokenizer(fields: dict[str, Any], path: str) -> bytes:
    """The vocabulary and merges of the file as a `tokenizers` file, with the same ids."""
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    parts = [f"tokenizer.ggml.{part}" for part in ("tokens", "token_type", "merges")]
    if kind != "gpt2" or cut not in PATTERNS or any(part not in fields for part in parts):
        raise UserError(
            f"{path} has a tokenizer {kind!r} with tokenizer.ggml.pre={cut!r}: supported is 'gpt2' (BPE) with one of"
            f" {', '.join(PATTERNS)}, tokens, their types and merges; give another with --tokenizer=FILE"
        )
    pieces, types, merges = (list(fields[part]) for part in parts)
    while types and types[-1] == UNUSED:  # the table of embeddings is longer than the vocabulary
        types.pop()
    end = len(types)
    while end and types[end - 1] in (
        CONTROL,
        USER_DEFINED,
    ):  # these follow the vocabulary, as they are added to it
        end -= 1
    merges = [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {piece: i for i, piece in enumerate(pieces[:end])}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut == "llama-bpe"))
    if PATTERNS[cut]:
        split = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[cut]), "isolated")
        parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if cut == "smollm" else []
        parts = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    model.pre_tokenizer = pre_tokenizers.Sequence(parts)
    if cut == "qwen2":
        model.normalizer = normalizers.NFC()
    model.decoder = decoders.ByteLevel()
    for i, piece in enumerate(pieces[: len(types)]):
        if types[i] in (CONTROL, USER_DEFINED):
            special = types[i] == CONTROL
            token = tokenizers.AddedToken(piece, special=special, normalized=False)
            (model.add_special_tokens if special else model.add_tokens)([token])
    wrong = [piece for i, piece in enumerate(pieces[: len(types)]) if model.token_to_id(piece) != i]
    if wrong:
        raise UserError(
            f"{path}: the vocabulary holds {wrong[0]!r} twice: give another one with --tokenizer=FILE"
        )
    if (
        fields.get("tokenizer.ggml.add_bos_token", cut == "llama-bpe")
        and "tokenizer.ggml.bos_token_id" in fields
    ):
        begin = fields["tokenizer.ggml.bos_token_id"]
        special_tokens = [(pieces[begin], begin)]
        model.post_processor = processors.TemplateProcessing(
            f"{pieces[begin]} $A", special_tokens=special_tokens
        )
    return model.to_str().encode()


def _tokenizer_settings(fields: dict[str, Any]) -> dict[str, Any]:
    pieces = fields["tokenizer.ggml.tokens"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := fields.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            settings[f"{ours}_token"] = pieces[token]
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return settings
