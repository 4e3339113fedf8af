"""GGUF files (llama.cpp): Llama, Qwen2 and Qwen3 models with their BPE tokenizer.

The package `gguf` reads the file, and quantised tensors become float32. The format is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import collections
import functools
import itertools
import logging
import math
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from msllm.config import ModelConfig, RopeScalingConfig
from msllm.errors import UserError
from msllm.model.layers import rope_frequencies
from msllm.weights import hf, hf_config, hf_tensors
from msllm.weights.hf_tensors import StoredTensor

log = logging.getLogger("msllm")

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
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # values of `tokenizer.ggml.token_type`

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is split before BPE, by `tokenizer.ggml.pre`: a pattern, or None for the one of GPT-2.
PATTERNS = {
    "gpt-2": None,
    "smollm": None,  # and every digit is a word of its own
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
      config: the config of the model.
      parameters: nested dicts of numpy float32.
      settings: the content of config.json in a Hugging Face folder of the same model.
      tokenizer: the content of a `tokenizers` file; None if it was not requested.
      tokenizer_settings: the content of tokenizer_config.json in that folder.
    """

    config: ModelConfig
    parameters: dict[str, Any]
    settings: dict[str, Any]
    tokenizer: bytes | None
    tokenizer_settings: dict[str, Any]


def read_gguf(path: str | os.PathLike, with_tokenizer: bool = True) -> GgufModel:
    """Reads a GGUF file.

    Args:
      path: the file, or one of the parts that the model was split into.
      with_tokenizer: whether to read its tokenizer.

    Raises UserError if the file is damaged, if msllm cannot represent its model, or if the package
    `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files need the package gguf: install msllm[gguf]") from error
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
    """Returns (readers, metadata) of a file, or of all parts that a model was split into.

    gguf-split of llama.cpp names the parts `NAME-00001-of-00003.gguf`. The first part has the
    metadata.
    """
    opened, fields = _open(path, reader)
    count = fields.get("split.count", 0)
    if count < 2:
        return [opened], fields
    pattern = re.fullmatch(rf"(.*)-\d{{5}}-of-{count:05}\.gguf", path.name)
    if not pattern:
        raise UserError(
            f"{path} is one of {count} parts, but its name does not end in -NNNNN-of-{count:05}"
            ".gguf, with the number of the part from 00001 on: rename the parts, or join them with"
            " gguf-split --merge"
        )
    parts = [path.with_name(f"{pattern[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    readers, metadata = [], []
    for number, part in enumerate(parts):
        opened, fields = _open(part, reader)
        if (fields.get("split.no"), fields.get("split.count")) != (number, count):
            raise UserError(
                f"{part} holds part {fields.get('split.no')} (from 0) of"
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
    """Returns (reader, metadata) of one file. Raises UserError."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: name a .gguf file")
    hf.refuse_pointer(path)
    try:
        opened = reader(path)
        return opened, {name: field.contents() for name, field in opened.fields.items()}
    except Exception as error:  # for truncated files, numpy raises many types
        raise UserError(f"{path} is damaged or no GGUF file ({error}): copy it again") from error


def _hf_name(name: str) -> str:
    """Returns the Hugging Face name of a tensor, or the name itself if it is unknown."""
    first, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    if first == "blk" and f"blk.{{}}.{rest}" in NAMES:
        return NAMES[f"blk.{{}}.{rest}"].format(layer)
    return NAMES.get(name, name)


def _unpermute(name: str, stored: StoredTensor, config: ModelConfig) -> StoredTensor:
    """Undoes the order in which llama.cpp stores the rows of Llama's q and k.

    In a GGUF file, the rotary embedding rotates the pairs of features (2m, 2m + 1). In msllm, as in
    Hugging Face's libraries, it rotates the pairs (m, m + H / 2).
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
    """Returns the file's metadata as the content of a Hugging Face config.json."""
    family = fields.get("general.architecture")
    if family not in hf_config.FAMILIES:
        raise UserError(
            f"{source} has the architecture {family!r}: must be one of"
            f" {', '.join(hf_config.FAMILIES)}"
        )
    if "model.embed_tokens.weight" not in tensors:
        raise UserError(
            f"{source} has no tensor token_embd.weight: it is damaged, or holds a vocabulary"
            " without a model"
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
    """The fields of a file that describe its model, without the family's prefix."""

    @classmethod
    def of(cls, fields: dict[str, Any], family: str, source: str) -> _Metadata:
        """Selects the fields of a model of the family from all fields of a file."""
        prefix = f"{family}."
        own = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
        return cls(own, f"{source}: {family}")

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a field, or `default` if it is missing. Raises UserError without a default."""
        value = super().get(key, default)
        if value is None:
            raise UserError(
                f"{self.source} has no {key}: the file is damaged, or of another architecture"
            )
        # Files store float32. Going through its shortest decimal gives 1e-05, not
        # 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(kind: str, metadata: _Metadata) -> dict[str, Any]:
    """Returns the value of `rope_scaling` for linear scaling and YaRN."""
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
        # A GGUF file stores a multiple of the attention factor in the paper (arXiv 2309.00071).
        multiple = metadata.get("rope.scaling.attn_factor", 1.0)
        if multiple != 1:
            scaling["attention_factor"] = multiple * (0.1 * math.log(factor) + 1)
    return scaling


def _llama3_scaling(
    frequencies: np.ndarray, settings: dict[str, Any], source: str
) -> dict[str, Any]:
    """Returns the value of `rope_scaling` for Llama 3.1.

    A GGUF file does not store these settings, only the divisors of the frequencies that follow from
    them. All Llama 3.1 models have the same settings except the factor, which is the largest
    divisor.
    """
    factor = float(frequencies.max())
    scaling = RopeScalingConfig("llama3", factor, 1.0, 4.0, original_max_position=8192)
    base = (settings["head_dim"], settings["rope_theta"])
    expected = rope_frequencies(*base, RopeScalingConfig()) / rope_frequencies(*base, scaling)
    if expected.shape != frequencies.shape or not np.allclose(frequencies, expected, rtol=1e-4):
        raise UserError(
            f"{source}: {FREQUENCIES} does not follow from Llama 3.1's settings with any factor:"
            " import the model from another format"
        )
    is_integer = math.isclose(factor, round(factor))
    return {
        "rope_type": "llama3",
        "factor": round(factor) if is_integer else factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


def _tokenizer(fields: dict[str, Any], source: str) -> bytes:
    """Returns a `tokenizers` file with the vocabulary, ids and merges of the GGUF file."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    parts = [f"tokenizer.ggml.{part}" for part in ("tokens", "token_type", "merges")]
    if kind != "gpt2" or pre not in PATTERNS or any(part not in fields for part in parts):
        raise UserError(
            f"{source} has a tokenizer {kind!r} with tokenizer.ggml.pre={pre!r}: must be 'gpt2'"
            f" (BPE) with one of {', '.join(PATTERNS)}, and with tokens, token types and merges;"
            " name another tokenizer with --tokenizer=FILE"
        )
    pieces, types, merges = (list(fields[part]) for part in parts)
    while types and types[-1] == UNUSED:  # pieces that only fill up the embedding
        types.pop()
    pieces = pieces[: len(types)]
    # The library adds control and user-defined pieces after the vocabulary. So such pieces at the
    # end are left out of the vocabulary here, and get the same ids when they are added.
    size = len(pieces)
    while size and types[size - 1] in (CONTROL, USER_DEFINED):
        size -= 1
    try:
        bpe = models.BPE(
            {piece: i for i, piece in enumerate(pieces[:size])},
            _effective_merges(merges, pieces, source),
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
                f"{source}: the vocabulary holds {piece!r} twice: name another tokenizer with"
                " --tokenizer=FILE"
            )
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if bos is not None and fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{pieces[bos]} $A", special_tokens=[(pieces[bos], bos)]
        )
    return tokenizer.to_str().encode()


def _effective_merges(
    merges: Sequence[str], pieces: Sequence[str], source: str
) -> list[tuple[str, str]]:
    """Returns the merges as pairs, without those that change no token.

    llama.cpp divides a merged piece again if the vocabulary does not have it. Such a merge changes
    nothing if no other merge could have taken one of its parts, or takes its result.
    """
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    known = set(pieces)
    if all(first + second in known for first, second in pairs):
        return pairs
    lefts, rights = (
        collections.Counter(x for x, _ in pairs),
        collections.Counter(y for _, y in pairs),
    )
    kept, dropped = [], 0
    for first, second in pairs:
        result = first + second
        competes = rights[first] or lefts[second] or lefts[result] or rights[result]
        if result in known or competes:
            kept.append((first, second))
        else:
            dropped += 1
    if dropped:
        log.warning("%s: %d merges give no token of the vocabulary: left out", source, dropped)
    return kept


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    """Returns the library's form of an entry of PATTERNS."""
    if pattern := PATTERNS[pre]:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, byte_level])
    digits = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    return pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _tokenizer_settings(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of tokenizer_config.json."""
    pieces = fields["tokenizer.ggml.tokens"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token := fields.get(f"tokenizer.ggml.{field}_token_id")) is not None:
            settings[f"{name}_token"] = pieces[token]
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return settings
