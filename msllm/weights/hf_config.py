"""Converts between the `config.json` of a Hugging Face folder and `ModelConfig`.

The families are Qwen3, Qwen2 (and 2.5) and Llama. Each may have `num_channels`, the key for the
number of streams in the reference implementation of multi-stream models. That implementation adds
one vector per stream to the token embedding.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from msllm.config import Config, ModelConfig, RopeScalingConfig, StreamsConfig, from_config_dict
from msllm.errors import UserError

FILE = "config.json"
FAMILIES = ("qwen3", "qwen2", "llama")
OWN = "msllm"  # the key for settings that Hugging Face lacks: the streams and the silence token
_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# Keys of config.json that do not change what a model computes from tokens: settings for training,
# generation and bookkeeping, and for parts that `_check_supported` requires to be switched off.
IRRELEVANT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path architectures
    attention_dropout attn_implementation bos_token_id chunk_size_feed_forward dtype embd_pdrop
    eos_token_id hidden_dropout id2label initializer_range is_llama_config label2id
    max_position_embeddings max_window_layers model_max_length msllm output_attentions
    output_hidden_states pad_token_id pretraining_tp problem_type resid_pdrop return_dict
    sliding_window task_specific_params tokenizer_class torch_dtype transformers_version
    unk_token_id unsloth_fixed unsloth_version use_cache

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id is_decoder length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores prefix remove_invalid_values
    repetition_penalty return_dict_in_generate sep_token_id suppress_tokens temperature top_k
    top_p typical_p

    medusa_num_heads medusa_num_layers num_streams role_gating_beta_max role_gating_granularity
    role_gating_log_clip_min role_gating_log_eps role_gating_mlp_hidden role_gating_mode
    role_gating_tau role_gating_uniform_mix
    """.split()
)
# {field of RopeScalingConfig: key in config.json} of each rope type, besides `factor`.
_ROPE_KEYS = {
    "linear": {},
    "llama3": {
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position": "original_max_position_embeddings",
    },
    "yarn": {
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "original_max_position": "original_max_position_embeddings",
    },
}


def from_hf(settings: Mapping[str, Any], source: str = FILE) -> tuple[ModelConfig, int]:
    """Returns (config, number of streams) from the content of a config.json.

    Every key must be one that msllm reads, or one of `IRRELEVANT`. As in `transformers`, a key
    whose value is null counts as missing.

    Args:
      settings: the content.
      source: the file, for messages.

    Raises UserError for a setting that is unknown or that msllm does not support.
    """
    read = Settings(settings, source)
    _check_supported(read)
    family = read.values["model_type"]
    streams, stream_embedding = _read_channels(read)
    heads, d_model = read.positive("num_attention_heads"), read.positive("hidden_size")
    theta, scaling = _read_rope(read)
    model = ModelConfig(
        vocab_size=read.positive("vocab_size"),
        d_model=d_model,
        num_layers=read.positive("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=read.positive("num_key_value_heads", heads),
        head_dim=read.positive("head_dim", 128 if family == "qwen3" else d_model // heads),
        d_ff=read.positive("intermediate_size"),
        tie_embeddings=read.flag("tie_word_embeddings"),
        qk_norm=family == "qwen3",
        attention_bias=family == "qwen2",
        stream_embedding=stream_embedding,
        norm_eps=read.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
    )
    read.refuse_unread(IRRELEVANT)
    try:
        Config(model=model)  # checks the values against each other
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return model, streams


def to_hf(config: ModelConfig, streams: int) -> dict[str, Any]:
    """Returns the content of a model's config.json. Raises UserError if no family has its form."""
    if config.block:
        raise UserError(
            f"config.model.block is {config.block!r}: no Hugging Face family has these layers, so"
            " the model cannot be exported"
        )
    families = {(True, False): "qwen3", (False, True): "qwen2", (False, False): "llama"}
    family = families.get((config.qk_norm, config.attention_bias))
    if family is None:
        raise UserError(
            "config.model has qk_norm and attention_bias: no Hugging Face family has both, so the"
            " model cannot be exported"
        )
    rope = config.rope_scaling
    settings = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_settings(rope),
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
    }
    if rope.kind in ("llama3", "yarn"):
        settings["max_position_embeddings"] = round(rope.factor * rope.original_max_position)
    if streams > 1 or config.stream_embedding:
        settings["num_channels"] = streams
        settings["channel_embedding_method"] = "additive" if config.stream_embedding else "none"
    return settings


def read_streams(
    settings: Mapping[str, Any], streams: int, source: str = FILE
) -> tuple[StreamsConfig, str | None]:
    """Returns (streams, silence token) from the content of a config.json that msllm wrote.

    For any other config.json the result is (`unnamed_streams`, None).

    Args:
      settings: the content of the file.
      streams: the number of streams, from `from_hf`.
      source: the file, for messages.

    Raises UserError if the streams are invalid, or if their number is another.
    """
    own = settings.get(OWN) or {}
    if "streams" not in own:
        return unnamed_streams(streams), own.get("silence")
    try:
        named = from_config_dict({"streams": own["streams"]}).streams
    except UserError as error:
        raise UserError(f"{source}: {OWN}: {error}") from error
    if len(named.names) != streams:
        raise UserError(
            f"{source}: {OWN} names {len(named.names)} streams, but num_channels is {streams}:"
            " export the model again"
        )
    return named, own.get("silence")


def unnamed_streams(size: int) -> StreamsConfig:
    """Returns the streams stream0, stream1, ... for a model that does not name its streams.

    As in the reference implementation, stream0 is the input. A single stream is an output.
    """
    kinds = ("input",) + ("output",) * (size - 1) if size > 1 else ("output",)
    return StreamsConfig(names=tuple(f"stream{s}" for s in range(size)), kinds=kinds)


class Settings:
    """A JSON object of settings that keeps track of the keys that were read.

    Attributes:
      values: the settings without nulls.
      source: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values = {key: value for key, value in values.items() if value is not None}
        self.source = source
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key and marks the key as read."""
        self._read.add(key)
        return self.values.get(key, default)

    def refuse(self, key: str, rule: str) -> NoReturn:
        raise UserError(f"{self.source}: {key} is {self.values.get(key)!r}: {rule}")

    def refuse_unread(self, irrelevant: Iterable[str]) -> None:
        """Raises UserError if there is a key that was not read and is not in `irrelevant`."""
        for key in sorted(self.values.keys() - self._read - set(irrelevant)):
            self.refuse(
                key,
                "this setting is unknown; if the model computes the same without it, remove it"
                " from the file",
            )

    def require(self, key: str, allowed: tuple[Any, ...], rule: str) -> None:
        """Raises UserError if the key has a value that is not in `allowed`."""
        if key in self.values and self.get(key) not in allowed:
            self.refuse(key, rule)

    def positive(self, key: str, default: int | None = None) -> int:
        """Returns a positive integer; `default` if the key is missing."""
        value = self.get(key, default)
        if type(value) is not int or value <= 0:
            self.refuse(key, "must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a finite number; `default` if the key is missing."""
        value = self.get(key, default)
        if type(value) not in (int, float):
            self.refuse(key, "must be a number")
        if not abs(value) <= sys.float_info.max:
            self.refuse(key, "must be a finite number")
        return float(value)

    def flag(self, key: str) -> bool:
        """Returns a boolean; False if the key is missing."""
        value = self.get(key, False)
        if type(value) is not bool:
            self.refuse(key, "must be true or false")
        return value


def _check_supported(read: Settings) -> None:
    """Raises UserError for a setting that msllm does not support."""
    family = read.get("model_type")
    if family not in FAMILIES:
        read.refuse("model_type", f"must be one of {', '.join(FAMILIES)}")
    read.require("hidden_act", ("silu", "swish"), "only silu is supported")
    off = (False, None)
    read.require(
        "role_gating_enabled",
        off,
        "role gating is not supported; use a checkpoint trained without it",
    )
    if read.get("quantization_config"):
        read.refuse(
            "quantization_config",
            "quantised weights are not supported; use the checkpoint that they were made from",
        )
    read.require("use_sliding_window", off, "sliding windows are not supported")
    types = read.get("layer_types", [])
    if not isinstance(types, list) or any(name != "full_attention" for name in types):
        read.refuse("layer_types", "every layer must be full_attention")
    read.require("mlp_bias", off, "biases in the MLP are not supported")
    if family != "qwen2":  # qwen2 has biases on q, k and v for any value of the key
        read.require(
            "attention_bias",
            off,
            "only the biases of qwen2, on q, k and v, are supported, none on the output projection",
        )
    read.get("attention_bias")  # marks it as read for qwen2
    read.require("partial_rotary_factor", (1.0,), "must be 1: all features of a head are rotated")
    for key in (
        "add_cross_attention",
        "is_encoder_decoder",
        "pruned_heads",
        "rope_interleaved",
        "tie_encoder_decoder",
        "torchscript",
        "use_mrope",
        "use_qk_norm",
    ):
        read.require(key, (*off, {}), "this is not supported")
    if "auto_map" in read.values:
        read.refuse(
            "auto_map",
            "the folder has its own code, which may compute something else; if the code is that of"
            f" {family} in transformers, remove the key from the file",
        )


def _read_channels(read: Settings) -> tuple[int, bool]:
    """Returns (number of streams, whether they have an embedding)."""
    method = read.get("channel_embedding_method", "additive")
    if read.get("num_channels") is None:
        return 1, False
    if method not in ("additive", "none"):
        read.refuse("channel_embedding_method", "must be additive or none")
    return read.positive("num_channels"), method == "additive"


def _read_rope(read: Settings) -> tuple[float, RopeScalingConfig]:
    """Returns (base, scaling) of the rotary embedding.

    Older files have `rope_theta` and `rope_scaling`. Newer files have both in `rope_parameters`,
    some of them by type of layer. If a file has both forms, `transformers` uses `rope_scaling`.
    """
    values = read.get("rope_scaling") or read.get("rope_parameters") or {}
    read.get("rope_parameters")  # marks it as read
    if not isinstance(values, Mapping):
        raise UserError(f"{read.source}: rope settings are {values!r}: must be an object")
    if any(isinstance(value, Mapping) for value in values.values()):  # by type of layer
        others = {key for key, value in values.items() if not isinstance(value, Mapping | None)}
        if others or not isinstance(values.get("full_attention"), Mapping):
            raise UserError(
                f"{read.source}: rope settings are {values!r}: settings by type of layer must have"
                " no other keys, and must include full_attention, the type of all layers"
            )
        values = values["full_attention"]
    rope = Settings(values, f"{read.source}: rope settings")
    rope.require("partial_rotary_factor", (1.0,), "must be 1: all features of a head are rotated")
    theta = rope.number("rope_theta", read.number("rope_theta", 10000.0))
    if theta <= 0:
        read.refuse("rope_theta", "must be positive")
    return theta, _read_rope_scaling(rope, read)


def _read_rope_scaling(rope: Settings, read: Settings) -> RopeScalingConfig:
    """Returns the scaling of rope settings. `read` holds the settings of the model."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        # transformers writes the trained length for every type, but ignores it for this one.
        rope.refuse_unread(("original_max_position_embeddings",))
        return RopeScalingConfig()
    if kind not in list(_ROPE_KEYS):  # a list, because the file may hold a kind without a hash
        rule = "must be default, linear, llama3 or yarn"
        if kind == "dynamic":
            rule += (
                "; within max_position_embeddings dynamic scaling changes nothing: set rope_scaling"
                " to null"
            )
        raise UserError(f"{read.source}: rope type {kind!r} is not supported: {rule}")
    defaults: dict[str, Any] = {}
    if kind == "yarn":
        if not rope.get("truncate", True):
            raise UserError(
                f"{read.source}: the rope type yarn with truncate=false is not supported"
            )
        defaults = _yarn_defaults(rope, read)
    keys = {"factor": "factor"} | _ROPE_KEYS[kind]
    missing = [key for key in keys.values() if key not in rope.values and key not in defaults]
    if missing:
        raise UserError(f"{read.source}: rope type {kind!r} lacks {', '.join(missing)}")
    values: dict[str, Any] = {
        field: rope.number(key, defaults.get(key)) for field, key in keys.items()
    }
    rope.refuse_unread(("original_max_position_embeddings",))
    if "original_max_position" in values:
        values["original_max_position"] = int(values["original_max_position"])
    return RopeScalingConfig(kind=kind, **values)


def _yarn_defaults(rope: Settings, read: Settings) -> dict[str, Any]:
    """Returns the values that `transformers` uses for YaRN settings that are not given."""
    longest = 2048 if read.values["model_type"] == "llama" else 32768
    return {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": _yarn_attention_factor(rope),
        "original_max_position_embeddings": read.get("max_position_embeddings", longest),
    }


def _yarn_attention_factor(rope: Settings) -> float:
    """Returns the attention factor that `mscale` and `mscale_all_dim` give, or 0 without them.

    With 0, the model uses the formula of the paper (arXiv 2309.00071).
    """
    mscale, mscale_all_dim = (rope.number(key, 0.0) for key in ("mscale", "mscale_all_dim"))
    factor = rope.number("factor", 1.0)
    if not mscale or not mscale_all_dim or factor <= 1:
        return 0.0
    log_factor = math.log(factor)
    return (0.1 * mscale * log_factor + 1) / (0.1 * mscale_all_dim * log_factor + 1)


def _rope_settings(rope: RopeScalingConfig) -> dict[str, Any] | None:
    """Returns the value of `rope_scaling`."""
    if rope.kind == "none":
        return None
    settings: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    settings |= {key: getattr(rope, field) for field, key in _ROPE_KEYS[rope.kind].items()}
    if settings.get("attention_factor") == 0:  # the formula of the paper, which is the default
        del settings["attention_factor"]
    return settings
