"""GGUF files (llama.cpp): Llama, Qwen2 and Qwen3 models with their BPE tokenizer.

The package `gguf` reads the file, and numbers are dequantised to float32. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from msllm.config import ModelConfig, RopeScalingConfig
from msllm.errors import UserError
from msllm.model.layers import rope_frequencies
from msllm.weights import hf, hf_config, hf_tensors
from msllm.weights.hf_tensors import StoredTensor

_LAYER = "model.layers.{}."
# The Hugging Face name of each tensor; `{}` stands for the layer.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "blk.{}.attn_norm.weight": _LAYER + "input_layernorm.weight",
    "blk.{}.attn_q.weight": _LAYER + "self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": _LAYER + "self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": _LAYER + "self_attn.v_proj.weight",
    "blk.{}.attn_q.bias": _LAYER + "self_attn.q_proj.bias",
    "blk.{}.attn_k.bias": _LAYER + "self_attn.k_proj.bias",
    "blk.{}.attn_v.bias": _LAYER + "self_attn.v_proj.bias",
    "blk.{}.attn_q_norm.weight": _LAYER + "self_attn.q_norm.weight",
    "blk.{}.attn_k_norm.weight": _LAYER + "self_attn.k_norm.weight",
    "blk.{}.attn_output.weight": _LAYER + "self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": _LAYER + "post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": _LAYER + "mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": _LAYER + "mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": _LAYER + "mlp.down_proj.weight",
}
FREQUENCIES = "rope_freqs.weight"  # what Llama 3 divides its rotary frequencies by
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is split before BPE, by `tokenizer.ggml.pre`: a pattern, or None for that of GPT-2.
PATTERNS = {
    "gpt-2": None,
    "smollm": None,  # but every digit is split off
    "llama-bpe": _LETTERS + r"\p{N}{1,3}" + _OTHERS,
    "qwen2": _LETTERS + r"\p{N}" + _OTHERS,
}


# Keys of the model's metadata that change nothing in what it computes.
IRRELEVANT = (
    "context_length",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "vocab_size",
)


class GgufModel(NamedTuple):
    """The content of a GGUF file.

    Attributes:
      config: the model.
      parameters: nested dicts of numpy float32.
      settings: the content of the config.json that a Hugging Face folder of the model would have.
      tokenizer: a file of the `tokenizers` library; None if it was not asked for.
      tokenizer_settings: the content of the folder's tokenizer_config.json.
    """

    config: ModelConfig
    parameters: dict[str, Any]
    settings: dict[str, Any]
    tokenizer: bytes | None
    tokenizer_settings: dict[str, Any]


def read_gguf(path: str | os.PathLike, with_tokenizer: bool = True) -> GgufModel:
    """Reads a GGUF file.

    Args:
      path: the file, or one of the parts that it was split into.
      with_tokenizer: whether to read its tokenizer.

    Raises UserError if the file is damaged, if this model cannot represent what it holds, or if the
    package `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("to read GGUF files, install msllm[gguf] (the package gguf)") from error
    path = pathlib.Path(path)
    source = str(path)
    readers, fields = _open_parts(path, gguf.GGUFReader)
    tensors: dict[str, StoredTensor] = {}
    frequencies = None
    for tensor in itertools.chain.from_iterable(reader.tensors for reader in readers):
        load = functools.partial(gguf.quants.dequantize, tensor.data, tensor.tensor_type)
        if tensor.name == FREQUENCIES:
            frequencies = load()
        else:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            tensors[_hf_name(tensor.name)] = StoredTensor(source, shape, "F32", load)
    settings = _settings(fields, tensors, frequencies, source)
    config, streams = hf_config.from_hf(settings, source)
    if settings["model_type"] == "llama":
        tensors = {name: _unpermute(name, stored, config) for name, stored in tensors.items()}
    parameters = hf_tensors.from_hf(tensors, config, streams, source)
    if not with_tokenizer:
        return GgufModel(config, parameters, settings, None, {})
    tokenizer, tokenizer_settings = _tokenizer(fields, source), _tokenizer_settings(fields)
    return GgufModel(config, parameters, settings, tokenizer, tokenizer_settings)


def _open_parts(path: pathlib.Path, reader: Callable) -> tuple[list[Any], dict[str, Any]]:
    """(readers, metadata) of a file, or of all the parts that a model was split into.

    llama.cpp's gguf-split names them `NAME-00001-of-00003.gguf`. The first has the metadata.
    """
    opened, fields = _open(path, reader)
    count = fields.get("split.count", 0)
    if count < 2:
        return [opened], fields
    pattern = re.fullmatch(rf"(.*)-\d{{5}}-of-{count:05}\.gguf", path.name)
    if not pattern:
        raise UserError(
            f"{path} is one of {count} parts, and its name does not end in -00001-of-{count:05}"
            ".gguf: name the parts like that, in one folder, or join them with gguf-split --merge"
        )
    parts = [path.with_name(f"{pattern[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    readers, metadata = [], []
    for number, part in enumerate(parts):
        opened, fields = _open(part, reader)
        if (fields.get("split.no"), fields.get("split.count")) != (number, count):
            raise UserError(
                f"{part} says that it is part {fields.get('split.no')} (from 0) of"
                f" {fields.get('split.count')}: copy it again"
            )
        readers.append(opened)
        metadata.append(fields)
    found, total = sum(len(r.tensors) for r in readers), metadata[0].get("split.tensors.count")
    if total not in (None, found):
        raise UserError(
            f"{parts[0]} and its {count - 1} other parts hold {found} of {total} tensors: copy them"
            " again"
        )
    return readers, metadata[0]


def _open(path: pathlib.Path, reader: Callable) -> tuple[Any, dict[str, Any]]:
    """(reader, metadata) of one file. Raises UserError."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: give the path of a .gguf file")
    hf.refuse_pointer(path)
    try:
        opened = reader(path)
        return opened, {name: field.contents() for name, field in opened.fields.items()}
    except Exception as error:  # a file that is too short raises whatever numpy raises
        raise UserError(f"{path} is damaged or no GGUF file ({error}): copy it again") from error


def _hf_name(name: str) -> str:
    """The Hugging Face name of a tensor; an unknown name stays as it is."""
    first, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    if first == "blk" and f"blk.{{}}.{rest}" in NAMES:
        return NAMES[f"blk.{{}}.{rest}"].format(layer)
    return NAMES.get(name, name)


def _unpermute(name: str, stored: StoredTensor, config: ModelConfig) -> StoredTensor:
    """Undoes llama.cpp's order of the rows of Llama's q and k.

    A GGUF file has them rotate the pairs (2m, 2m + 1); this model, like Hugging Face's, rotates
    (m, m + H / 2).
    """
    heads_of = {"q_proj.weight": config.num_heads, "k_proj.weight": config.num_kv_heads}
    heads = heads_of.get(name.partition("self_attn.")[2])
    if heads is None:
        return stored

    def load() -> np.ndarray:
        rows = stored.load()
        return rows.reshape(heads, config.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)

    return stored._replace(load=load)


def _settings(
    fields: dict[str, Any],
    tensors: dict[str, StoredTensor],
    frequencies: np.ndarray | None,
    source: str,
) -> dict[str, Any]:
    """The file's metadata as the content of a Hugging Face config.json."""
    family = fields.get("general.architecture")
    if family not in hf_config.FAMILIES:
        raise UserError(
            f"{source} is of the architecture {family!r}: supported are"
            f" {', '.join(hf_config.FAMILIES)}"
        )
    if "model.embed_tokens.weight" not in tensors:
        raise UserError(
            f"{source} has no tensor token_embd.weight: it is damaged, or a vocabulary without a"
            " model"
        )
    metadata = _Metadata.of(fields, family, source)
    heads, width = metadata.get("attention.head_count"), metadata.get("embedding_length")
    head_dim = metadata.get("rope.dimension_count", width // heads)
    settings = {
        "model_type": family,
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": width,
        "num_hidden_layers": metadata.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("attention.head_count_kv", heads),
        "head_dim": metadata.get("attention.key_length", head_dim),
        "intermediate_size": metadata.get("feed_forward_length"),
        "rms_norm_eps": metadata.get("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.get("rope.freq_base", 10000.0),
        "max_position_embeddings": metadata.get("context_length"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    for name in ("bos", "eos"):
        if (token := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            settings[f"{name}_token_id"] = token
    if frequencies is not None:
        settings["rope_scaling"] = _llama3_scaling(frequencies, settings, source)
    elif (kind := metadata.get("rope.scaling.type", "none")) != "none":
        settings["rope_scaling"] = _rope_scaling(kind, metadata)
    metadata.require("attention.value_length", (settings["head_dim"],), "must be key_length")
    metadata.require("attention.causal", (True,), "must be true")
    metadata.require("expert_count", (0,), "experts are not supported")
    metadata.refuse_unread(IRRELEVANT)
    return settings


class _Metadata(hf_config.Settings):
    """The fields of a file that describe its model, without the family's name."""

    @classmethod
    def of(cls, fields: dict[str, Any], family: str, source: str) -> _Metadata:
        """Those of all fields of a file that describe a model of the family."""
        prefix = f"{family}."
        own = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
        return cls(own, f"{source}: {family}")

    def get(self, key: str, default: Any = None) -> Any:
        """A field; `default` if it is missing. Raises UserError if there is no default either."""
        value = super().get(key, default)
        if value is None:
            raise UserError(
                f"{self.source} has no {key}: the file is damaged, or of another architecture"
            )
        # Files store float32, which for 1e-05 is 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(kind: str, metadata: _Metadata) -> dict[str, Any]:
    """The value of `rope_scaling` for linear and YaRN."""
    factor = metadata.get("rope.scaling.factor")
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling |= {
            "original_max_position_embeddings": metadata.get(
                "rope.scaling.original_context_length"
            ),
            "beta_fast": metadata.get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": metadata.get("rope.scaling.yarn_beta_slow", 1.0),
        }
        # A GGUF file gives a multiple of the attention factor of the paper.
        multiple = metadata.get("rope.scaling.attn_factor", 1.0)
        if multiple != 1:
            scaling["attention_factor"] = multiple * (0.1 * math.log(factor) + 1)
    return scaling


def _llama3_scaling(
    frequencies: np.ndarray, settings: dict[str, Any], source: str
) -> dict[str, Any]:
    """The value of `rope_scaling` for Llama 3.1.

    A GGUF file keeps only the effect of these settings. All models of Llama 3.1 share them except
    the factor, which is the largest divisor of a frequency.
    """
    factor = float(frequencies.max())
    scaling = RopeScalingConfig("llama3", factor, 1.0, 4.0, original_max_position=8192)
    base = (settings["head_dim"], settings["rope_theta"])
    expected = rope_frequencies(*base, RopeScalingConfig()) / rope_frequencies(*base, scaling)
    if expected.shape != frequencies.shape or not np.allclose(frequencies, expected, rtol=1e-4):
        raise UserError(
            f"{source}: {FREQUENCIES} is not Llama 3.1's for any factor: take the model in another"
            " format"
        )
    whole = math.isclose(factor, round(factor))
    return {
        "rope_type": "llama3",
        "factor": round(factor) if whole else factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


def _tokenizer(fields: dict[str, Any], source: str) -> bytes:
    """The vocabulary and merges of the file as a `tokenizers` file, with the same ids."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    parts = [f"tokenizer.ggml.{part}" for part in ("tokens", "token_type", "merges")]
    if kind != "gpt2" or pre not in PATTERNS or any(part not in fields for part in parts):
        raise UserError(
            f"{source} has a tokenizer {kind!r} with tokenizer.ggml.pre={pre!r}: supported is"
            f" 'gpt2' (BPE) with one of {', '.join(PATTERNS)}, tokens, their types and merges; give"
            " another with --tokenizer=FILE"
        )
    pieces, types, merges = (list(fields[part]) for part in parts)
    while types and types[-1] == UNUSED:  # pieces that only fill the table of embeddings
        types.pop()
    pieces = pieces[: len(types)]
    # The library adds control and user-defined pieces after the vocabulary. Those at its end are
    # therefore left out of it here, and get the same ids when they are added.
    size = len(pieces)
    while size and types[size - 1] in (CONTROL, USER_DEFINED):
        size -= 1
    try:
        bpe = models.BPE(
            {piece: i for i, piece in enumerate(pieces[:size])},
            [tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=pre == "llama-bpe",
        )
    except Exception as error:  # the library's errors have no type of their own
        raise UserError(
            f"{source}: the merges of the tokenizer do not fit its tokens ({error}): give another"
            " tokenizer with --tokenizer=FILE"
        ) from error
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    for piece, token_type in zip(pieces, types):
        if token_type == CONTROL:
            tokenizer.add_special_tokens(
                [tokenizers.AddedToken(piece, special=True, normalized=False)]
            )
        elif token_type == USER_DEFINED:
            tokenizer.add_tokens([tokenizers.AddedToken(piece, special=False, normalized=False)])
    for i, piece in enumerate(pieces):
        if tokenizer.token_to_id(piece) != i:
            raise UserError(
                f"{source}: the vocabulary holds {piece!r} twice: give another one with"
                " --tokenizer=FILE"
            )
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{pieces[bos]} $A", special_tokens=[(pieces[bos], bos)]
        )
    return tokenizer.to_str().encode()


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    """How text is split before BPE."""
    if pattern := PATTERNS[pre]:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, byte_level])
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    return pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _tokenizer_settings(fields: dict[str, Any]) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    pieces = fields["tokenizer.ggml.tokens"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := fields.get(f"tokenizer.ggml.{field}_token_id")) is not None:
            settings[f"{name}_token"] = pieces[token]
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return settings
