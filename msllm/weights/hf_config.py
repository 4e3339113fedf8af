"""The `config.json` of a Hugging Face folder, in both directions.

Families: Qwen3, Qwen2 (and 2.5) and Llama, with or without `num_channels`, the key by which the
reference implementation of multi-stream models says how many streams there are. It adds one vector
per stream to the token embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from msllm.config import Config, ModelConfig, RopeScalingConfig, StreamsConfig, from_config_dict
from msllm.errors import UserError

FILE = "config.json"
FAMILIES = ("qwen3", "qwen2", "llama")
OWN = "msllm"  # the key for what Hugging Face has no key for: streams by name, the silence token
_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# The settings of each rope type besides its factor: the field of RopeScalingConfig, and the key.
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
    """(config, number of streams) from the content of a config.json.

    Args:
      settings: the content.
      source: the file, for messages.

    Raises UserError for a setting that this model cannot represent.
    """
    read = _Settings(settings, source)
    _check_supported(read)
    family = settings["model_type"]
    streams, stream_embedding = _read_channels(read)
    heads, d_model = read.positive("num_attention_heads"), read.positive("hidden_size")
    theta, scaling = _read_rope(settings, source)
    model = ModelConfig(
        vocab_size=read.positive("vocab_size"),
        d_model=d_model,
        num_layers=read.positive("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=read.positive("num_key_value_heads", heads),
        head_dim=read.positive("head_dim", 128 if family == "qwen3" else d_model // heads),
        d_ff=read.positive("intermediate_size"),
        tie_embeddings=bool(settings.get("tie_word_embeddings", False)),
        qk_norm=family == "qwen3",
        attention_bias=family == "qwen2",
        stream_embedding=stream_embedding,
        norm_eps=float(settings.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
    )
    try:
        Config(model=model)  # checks the values against each other
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return model, streams


def to_hf(config: ModelConfig, streams: int) -> dict[str, Any]:
    """The content of the config.json of a model. Raises UserError if no family has its form."""
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
    """(streams, silence token) as a config.json that msllm wrote names them.

    For any other config.json: (`unnamed_streams`, None).

    Args:
      settings: the content of the file.
      streams: the number of streams, from `from_hf`.
      source: the file, for messages.

    Raises UserError if the names are no streams, or not that many.
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
            f"{source}: {OWN} names {len(named.names)} streams: num_channels is {streams}"
        )
    return named, own.get("silence")


def unnamed_streams(size: int) -> StreamsConfig:
    """Streams stream0, stream1, ... for a model that does not name them.

    As in the reference implementation, stream0 is the input. A single stream is an output.
    """
    kinds = ("input",) + ("output",) * (size - 1) if size > 1 else ("output",)
    return StreamsConfig(names=tuple(f"stream{s}" for s in range(size)), kinds=kinds)


class _Settings(NamedTuple):
    """The content of a config.json and the name of the file for messages."""

    values: Mapping[str, Any]
    source: str

    def refuse(self, key: str, rule: str) -> NoReturn:
        raise UserError(f"{self.source}: {key} is {self.values.get(key)!r}: {rule}")

    def positive(self, key: str, default: int | None = None) -> int:
        """A positive integer; `default` if the key is missing or null."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            self.refuse(key, "must be a positive integer")
        return value


def _check_supported(read: _Settings) -> None:
    """Raises UserError for an architecture that this model does not have."""
    settings = read.values
    family = settings.get("model_type")
    if family not in FAMILIES:
        read.refuse("model_type", f"supported are {', '.join(FAMILIES)}")
    if settings.get("hidden_act", "silu") not in ("silu", "swish"):
        read.refuse("hidden_act", "only silu is supported")
    if settings.get("role_gating_enabled"):
        read.refuse(
            "role_gating_enabled",
            "role gating is not supported; use a checkpoint trained without it",
        )
    if settings.get("quantization_config"):
        read.refuse(
            "quantization_config",
            "quantised weights are not supported; use the checkpoint that they were made from",
        )
    if settings.get("use_sliding_window"):
        read.refuse("use_sliding_window", "sliding windows are not supported")
    if set(settings.get("layer_types") or ()) - {"full_attention"}:
        read.refuse("layer_types", "every layer must be full_attention")
    if family == "llama" and settings.get("mlp_bias"):
        read.refuse("mlp_bias", "biases in the MLP are not supported")
    if family != "qwen2" and settings.get("attention_bias"):
        read.refuse(
            "attention_bias",
            "a bias on the output projection is not supported; only qwen2's on q, k and v are",
        )
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        read.refuse("partial_rotary_factor", "must be 1: all features of a head are rotated")


def _read_channels(read: _Settings) -> tuple[int, bool]:
    """(number of streams, whether they have an embedding)."""
    if read.values.get("num_channels") is None:
        return 1, False
    method = read.values.get("channel_embedding_method", "additive")
    if method not in ("additive", "none"):
        read.refuse("channel_embedding_method", "must be additive or none")
    return read.positive("num_channels"), method == "additive"


def _read_rope(settings: Mapping[str, Any], source: str) -> tuple[float, RopeScalingConfig]:
    """Base and scaling.

    Older writers use `rope_theta` and `rope_scaling`; newer ones put both into `rope_parameters`.
    """
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{source}: rope settings are {rope!r}: must be an object")
    rope = {key: value for key, value in rope.items() if value is not None}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{source}: partial_rotary_factor is {rope['partial_rotary_factor']!r}: must be 1, all"
            " features of a head are rotated"
        )
    try:
        theta = float(rope.get("rope_theta") or settings.get("rope_theta") or 10000.0)
        return theta, _read_rope_scaling(rope, settings, source)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: rope settings are {rope}: must be numbers ({error})") from error


def _read_rope_scaling(
    rope: Mapping[str, Any], settings: Mapping[str, Any], source: str
) -> RopeScalingConfig:
    """The scaling of rope settings without nulls. Raises whatever `float` raises for a value."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeScalingConfig()
    if kind not in _ROPE_KEYS:
        rule = "must be default, linear, llama3 or yarn"
        if kind == "dynamic":
            rule += (
                "; up to max_position_embeddings dynamic is the same as none: set rope_scaling to"
                " null"
            )
        raise UserError(f"{source}: rope type {kind!r} is not supported: {rule}")
    if kind == "yarn":
        if not rope.get("truncate", True):
            raise UserError(f"{source}: the rope type yarn with truncate=false is not supported")
        rope = {**_yarn_defaults(rope, settings), **rope}
    keys = {"factor": "factor"} | _ROPE_KEYS[kind]
    if missing := [key for key in keys.values() if key not in rope]:
        raise UserError(f"{source}: rope type {kind!r} lacks {', '.join(missing)}")
    values: dict[str, Any] = {field: float(rope[key]) for field, key in keys.items()}
    if "original_max_position" in values:
        values["original_max_position"] = int(values["original_max_position"])
    return RopeScalingConfig(kind=kind, **values)


def _yarn_defaults(rope: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What YaRN's settings are where they are not given, as `transformers` has it."""
    longest = 2048 if settings["model_type"] == "llama" else 32768
    return {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": _yarn_attention_factor(rope),
        "original_max_position_embeddings": settings.get("max_position_embeddings") or longest,
    }


def _yarn_attention_factor(rope: Mapping[str, Any]) -> float:
    """The attention factor that `mscale` and `mscale_all_dim` stand for; 0 without them.

    With 0 the model takes the formula of the paper (arXiv 2309.00071).
    """
    mscale, mscale_all_dim = (float(rope.get(key, 0)) for key in ("mscale", "mscale_all_dim"))
    factor = float(rope.get("factor", 1))
    if not mscale or not mscale_all_dim or factor <= 1:
        return 0.0
    log_factor = math.log(factor)
    return (0.1 * mscale * log_factor + 1) / (0.1 * mscale_all_dim * log_factor + 1)


def _rope_settings(rope: RopeScalingConfig) -> dict[str, Any] | None:
    """The value of `rope_scaling`."""
    if rope.kind == "none":
        return None
    settings: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    settings |= {key: getattr(rope, field) for field, key in _ROPE_KEYS[rope.kind].items()}
    if settings.get("attention_factor") == 0:  # the formula of the paper, which is the default
        del settings["attention_factor"]
    return settings
