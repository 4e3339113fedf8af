"""Weights in the Hugging Face layout: one key table, read in both directions.

Families: Qwen3, Qwen2 (and 2.5) and Llama, with or without `num_channels` (one vector per stream, which the reference
implementation of multi-stream models adds to the token embedding).
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from msllm.config import Config, ModelConfig, RopeScalingConfig
from msllm.errors import UserError

FAMILIES = ("qwen3", "qwen2", "llama")
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


class Entry(NamedTuple):
    """One kind of tensor. Axes are letters, the keys of `_sizes`; the layer's is left out."""

    name: str  # `{}` stands for the layer
    path: tuple[str, ...]  # where it lies in our parameters
    hf: tuple[str, ...]  # its dimensions in the file; one that joins several axes is written as all of them
    shape: tuple[str, ...]  # its dimensions here

    @property
    def per_layer(self) -> bool:
        return "{}" in self.name


_ATTENTION, _MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
KEY_TABLE = (
    Entry("model.embed_tokens.weight", ("embedding",), ("V", "D"), ("V", "D")),
    Entry("model.channel_embedding.weight", ("stream_embedding",), ("S", "D"), ("S", "D")),
    Entry("model.norm.weight", ("final_norm",), ("D",), ("D",)),
    Entry("lm_head.weight", ("head",), ("V", "D"), ("V", "D")),
    Entry("model.layers.{}.input_layernorm.weight", ("blocks", "attention_norm"), ("D",), ("D",)),
    Entry("model.layers.{}.post_attention_layernorm.weight", ("blocks", "mlp_norm"), ("D",), ("D",)),
    Entry(_ATTENTION + "q_proj.weight", ("blocks", "attention", "q"), ("NH", "D"), ("D", "N", "H")),
    Entry(_ATTENTION + "k_proj.weight", ("blocks", "attention", "k"), ("KH", "D"), ("D", "K", "H")),
    Entry(_ATTENTION + "v_proj.weight", ("blocks", "attention", "v"), ("KH", "D"), ("D", "K", "H")),
    Entry(_ATTENTION + "o_proj.weight", ("blocks", "attention", "o"), ("D", "NH"), ("D", "N", "H")),
    Entry(_ATTENTION + "q_proj.bias", ("blocks", "attention", "q_bias"), ("NH",), ("N", "H")),
    Entry(_ATTENTION + "k_proj.bias", ("blocks", "attention", "k_bias"), ("KH",), ("K", "H")),
    Entry(_ATTENTION + "v_proj.bias", ("blocks", "attention", "v_bias"), ("KH",), ("K", "H")),
    Entry(_ATTENTION + "q_norm.weight", ("blocks", "attention", "q_norm"), ("H",), ("H",)),
    Entry(_ATTENTION + "k_norm.weight", ("blocks", "attention", "k_norm"), ("H",), ("H",)),
    Entry(_MLP + "gate_proj.weight", ("blocks", "mlp", "gate"), ("F", "D"), ("D", "F")),
    Entry(_MLP + "up_proj.weight", ("blocks", "mlp", "up"), ("F", "D"), ("D", "F")),
    Entry(_MLP + "down_proj.weight", ("blocks", "mlp", "down"), ("D", "F"), ("D", "F")),
)
# In every checkpoint of the reference implementation, but only role gating would use it.
UNUSED = (_ATTENTION + "gate_in_norm.weight",)


def read_folder(directory: str | pathlib.Path) -> tuple[ModelConfig, int, dict[str, Any]]:
    """(config, number of streams, parameters as nested dicts of numpy float32) of a Hugging Face folder.

    Raises UserError for what this model cannot represent, and for missing, unexpected, misshapen or damaged tensors.
    """
    directory = pathlib.Path(directory)
    config, streams = read_config(_read_json(directory / CONFIG), str(directory / CONFIG))
    expected, files = _hf_shapes(config, streams), _tensor_files(directory)
    unused = {name.format(i) for name in UNUSED for i in range(config.num_layers)}
    if config.tie_embeddings:
        unused.add("lm_head.weight")  # some writers repeat the tied table
    _check_names(directory, set(files), set(expected), unused)

    parameters: dict[str, Any] = {}
    sizes = _sizes(config, streams)
    for path in sorted(set(files.values())):
        with _open(path) as tensors:
            inside = set(tensors.keys())
            for name in sorted(name for name in expected if files[name] == path):
                if name not in inside:
                    raise UserError(f"{path} has no tensor {name}, which the index places there: copy the file again")
                entry, layer = expected[name]
                _check_tensor(path, name, tensors.get_slice(name), _hf_shape(entry, sizes))
                ours = _from_hf(entry, tensors.get_tensor(name).astype(np.float32), sizes)
                if entry.per_layer:
                    shape = (config.num_layers, *ours.shape)
                    _leaf(parameters, entry.path, lambda: np.empty(shape, np.float32))[layer] = ours
                else:
                    _leaf(parameters, entry.path, lambda: ours)
    return config, streams, parameters


def write_folder(
    directory: str | pathlib.Path, config: ModelConfig, streams: int, parameters: Mapping[str, Any]
) -> None:
    """Writes the folder that `read_folder` reads; an ordinary model (one stream) opens in Hugging Face's libraries."""
    directory = pathlib.Path(directory)
    settings = hf_config(config, streams)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in to_hf(parameters, config).items()}
    safetensors.numpy.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def to_hf(parameters: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Arrays by Hugging Face name, of parameters or of anything of their structure (gradients, moments)."""
    arrays = {}
    for entry in KEY_TABLE:
        leaf: Any = parameters
        for key in entry.path:
            leaf = leaf.get(key) if leaf is not None else None
        if leaf is None:
            continue
        leaf = np.asarray(leaf)
        for layer in range(config.num_layers) if entry.per_layer else [None]:
            arrays[entry.name.format(layer)] = _to_hf(entry, leaf if layer is None else leaf[layer])
    return arrays


def read_config(settings: Mapping[str, Any], source: str = CONFIG) -> tuple[ModelConfig, int]:
    """(config, number of streams) of a Hugging Face config. Raises UserError for what this model cannot represent."""

    def refuse(key: str, rule: str):
        raise UserError(f"{source}: {key} is {settings.get(key)!r}: {rule}")

    def number(key: str, default: int | None = None) -> int:
        value = settings.get(key)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            refuse(key, "must be a positive integer")
        return value

    family = settings.get("model_type")
    if family not in FAMILIES:
        refuse("model_type", f"supported are {', '.join(FAMILIES)}")
    if settings.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "only silu is supported")
    if settings.get("role_gating_enabled"):
        refuse("role_gating_enabled", "role gating is not supported; use a checkpoint trained without it")
    if settings.get("use_sliding_window"):
        refuse("use_sliding_window", "sliding windows are not supported")
    if set(settings.get("layer_types") or ()) - {"full_attention"}:
        refuse("layer_types", "every layer must be full_attention")
    if family == "llama" and settings.get("mlp_bias"):
        refuse("mlp_bias", "biases in the MLP are not supported")
    if family != "qwen2" and settings.get("attention_bias"):
        refuse("attention_bias", "a bias on the output projection is not supported; only qwen2's q, k, v biases are")
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("partial_rotary_factor", "all features of a head are rotated")

    streams, embedding = 1, False
    if settings.get("num_channels") is not None:
        streams = number("num_channels")
        method = settings.get("channel_embedding_method", "additive")
        if method not in ("additive", "none"):
            refuse("channel_embedding_method", "must be additive or none")
        embedding = method == "additive"
    heads, d_model = number("num_attention_heads"), number("hidden_size")
    theta, scaling = _read_rope(settings, source)
    model = ModelConfig(
        vocab_size=number("vocab_size"),
        d_model=d_model,
        num_layers=number("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", d_model // heads),
        d_ff=number("intermediate_size"),
        tie_embeddings=bool(settings.get("tie_word_embeddings", False)),
        qk_norm=family == "qwen3",
        attention_bias=family == "qwen2",
        stream_embedding=embedding,
        norm_eps=float(settings.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
    )
    try:
        Config(model=model)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return model, streams


def hf_config(config: ModelConfig, streams: int) -> dict[str, Any]:
    """The Hugging Face config of a model. Raises UserError where no family has its form."""
    families = {(True, False): "qwen3", (False, True): "qwen2", (False, False): "llama"}
    family = families.get((config.qk_norm, config.attention_bias))
    if family is None:
        raise UserError(
            "config.model has qk_norm and attention_bias: no Hugging Face family has both, so it cannot be exported"
        )
    scaling: dict[str, Any] | None = None
    if config.rope_scaling.kind != "none":
        scaling = {"rope_type": config.rope_scaling.kind, "factor": config.rope_scaling.factor}
    if config.rope_scaling.kind == "llama3":
        scaling["low_freq_factor"] = config.rope_scaling.low_freq_factor
        scaling["high_freq_factor"] = config.rope_scaling.high_freq_factor
        scaling["original_max_position_embeddings"] = config.rope_scaling.original_max_position
    architecture = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[family]
    settings = {
        "architectures": [architecture],
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
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
    }
    if streams > 1 or config.stream_embedding:
        settings["num_channels"] = streams
        settings["channel_embedding_method"] = "additive" if config.stream_embedding else "none"
    return settings


def _read_rope(settings: Mapping[str, Any], source: str) -> tuple[float, RopeScalingConfig]:
    """Base and scaling, from `rope_theta` and `rope_scaling`, or from the newer `rope_parameters` (which wins)."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{source}: rope settings are {rope!r}: must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", settings.get("rope_theta", 10000.0)))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{source}: partial_rotary_factor is not 1: all features of a head are rotated")
    if kind == "default":
        return theta, RopeScalingConfig()
    if kind not in ("linear", "llama3"):
        raise UserError(f"{source}: rope type {kind!r} is not supported: must be default, linear or llama3")
    keys = {"factor": "factor"}
    if kind == "llama3":
        keys |= {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
        keys |= {"original_max_position": "original_max_position_embeddings"}
    missing = [key for key in keys.values() if key not in rope]
    if missing:
        raise UserError(f"{source}: rope type {kind!r} lacks {', '.join(missing)}")
    values = {ours: float(rope[theirs]) for ours, theirs in keys.items()}
    if "original_max_position" in values:
        values["original_max_position"] = int(values["original_max_position"])
    return theta, RopeScalingConfig(kind=kind, **values)


def _sizes(config: ModelConfig, streams: int) -> dict[str, int]:
    heads = {"N": config.num_heads, "K": config.num_kv_heads, "H": config.head_dim}
    return {"V": config.vocab_size, "S": streams, "D": config.d_model, "F": config.d_ff, **heads}


def _hf_shapes(config: ModelConfig, streams: int) -> dict[str, tuple[Entry, int | None]]:
    """(entry, layer) of every tensor that a model of this config has, by name."""
    absent = set()
    if config.tie_embeddings:
        absent.add("head")
    if not config.stream_embedding:
        absent.add("stream_embedding")
    if not config.attention_bias:
        absent |= {"q_bias", "k_bias", "v_bias"}
    if not config.qk_norm:
        absent |= {"q_norm", "k_norm"}
    entries = [entry for entry in KEY_TABLE if entry.path[-1] not in absent]
    return {
        entry.name.format(layer): (entry, layer)
        for entry in entries
        for layer in (range(config.num_layers) if entry.per_layer else [None])
    }


def _hf_shape(entry: Entry, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[axis] for axis in axes) for axes in entry.hf)


def _from_hf(entry: Entry, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    axes = "".join(entry.hf)
    return array.reshape([sizes[axis] for axis in axes]).transpose([axes.index(axis) for axis in entry.shape])


def _to_hf(entry: Entry, array: np.ndarray) -> np.ndarray:
    sizes = dict(zip(entry.shape, array.shape))
    return array.transpose([entry.shape.index(axis) for axis in "".join(entry.hf)]).reshape(_hf_shape(entry, sizes))


def _leaf(tree: dict[str, Any], path: tuple[str, ...], make) -> np.ndarray:
    """The array at `path`, made on first use."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    if path[-1] not in tree:
        tree[path[-1]] = make()
    return tree[path[-1]]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"there is no file {path}: a Hugging Face folder needs {CONFIG} and {WEIGHTS} (or {INDEX})")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON file ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}: must be a JSON object")
    return value


def _tensor_files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of each tensor, from the index of shards or from the one file."""
    if (directory / INDEX).is_file():
        places = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise UserError(f"{directory / INDEX} has no weight_map: copy it again")
        return {name: directory / file for name, file in places.items()}
    with _open(directory / WEIGHTS) as tensors:
        return {name: directory / WEIGHTS for name in tensors.keys()}


def _open(path: pathlib.Path):
    if not path.is_file():
        raise UserError(f"there is no file {path}: copy it, or correct the path of the folder")
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}): copy it again") from error


def _check_names(directory: pathlib.Path, found: set[str], expected: set[str], unused: set[str]) -> None:
    problems = []
    if missing := sorted(expected - found):
        problems.append(f"missing {_some(missing)}")
    if unexpected := sorted(found - expected - unused):
        problems.append(f"unexpected {_some(unexpected)}")
    if problems:
        raise UserError(f"{directory} does not hold the model of its {CONFIG}: {'; '.join(problems)}")


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_tensor(path: pathlib.Path, name: str, tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.get_shape()) != shape:
        raise UserError(f"{path}: {name} has shape {tuple(tensor.get_shape())}: its {CONFIG} asks for {shape}")
    if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        raise UserError(f"{path}: {name} has type {tensor.get_dtype()}: must be a floating-point tensor")
