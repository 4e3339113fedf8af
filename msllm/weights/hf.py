"""Weights in the Hugging Face layout: one key table, read in both directions.

Families: Qwen3, Qwen2 (and 2.5) and Llama, with or without `num_channels` (one vector per stream, which the reference
implementation of multi-stream models adds to the token embedding). docs/weights.md says what is read and written.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from msllm.config import Config, ModelConfig, RopeScalingConfig, StreamsConfig, from_config_dict
from msllm.errors import UserError
from msllm.runtime.files import new_folder

FAMILIES = ("qwen3", "qwen2", "llama")
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
OWN = "msllm"  # the key of config.json for what Hugging Face has no key for: streams by name, the silence token
SHARD_BYTES = 5_000_000_000
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Entry(NamedTuple):
    """One kind of tensor. Axes are letters, the keys of `_sizes`; the layer's is left out."""

    name: str  # `{}` stands for the layer
    path: tuple[str, ...]  # where it lies in our parameters
    hf: tuple[
        str, ...
    ]  # its dimensions in the file; one that joins several axes is written as all of them
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
    Entry(
        "model.layers.{}.post_attention_layernorm.weight", ("blocks", "mlp_norm"), ("D",), ("D",)
    ),
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
# The first is in every checkpoint of the reference implementation, but only role gating would use it; the others are
# tables of frequencies that older checkpoints hold.
UNUSED = (
    _ATTENTION + "gate_in_norm.weight",
    _ATTENTION + "rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
)


class Stored(NamedTuple):
    """A tensor in some file."""

    path: str  # of the file, for messages
    shape: tuple[int, ...]
    dtype: str  # as the file calls it
    load: Callable[[], np.ndarray]  # its numbers


def read_folder(directory: str | pathlib.Path) -> tuple[ModelConfig, int, dict[str, Any]]:
    """(config, number of streams, parameters as nested dicts of numpy float32) of a Hugging Face folder.

    Raises UserError for what this model cannot represent, and for missing, unexpected, misshapen or damaged tensors and
    numbers that are not finite.
    """
    directory = pathlib.Path(directory)
    config, streams = read_config(read_settings(directory), str(directory / CONFIG))
    with open_tensors(directory) as tensors:
        return config, streams, from_hf(tensors, config, streams, str(directory))


def read_settings(directory: pathlib.Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder. Raises UserError."""
    return _read_json(directory / CONFIG)


@contextlib.contextmanager
def open_tensors(directory: pathlib.Path) -> Iterator[dict[str, Stored]]:
    """The tensors of a Hugging Face folder by name, in one file or in shards. Raises UserError."""
    files = _tensor_files(directory)
    with contextlib.ExitStack() as stack:
        open_files = {
            path: stack.enter_context(_open(path)) for path in sorted(set(files.values()))
        }
        inside = {path: set(file.keys()) for path, file in open_files.items()}
        tensors = {}
        for name, path in files.items():
            if name not in inside[path]:
                raise UserError(
                    f"{path} has no tensor {name}, which the index places there: copy the file again"
                )
            piece = open_files[path].get_slice(name)

            def load(file=open_files[path], name=name):
                return file.get_tensor(name)

            tensors[name] = Stored(str(path), tuple(piece.get_shape()), piece.get_dtype(), load)
        yield tensors


def from_hf(
    tensors: Mapping[str, Stored], config: ModelConfig, streams: int, source: str
) -> dict[str, Any]:
    """Parameters, as nested dicts of numpy float32, of tensors with Hugging Face names. Raises UserError."""
    expected, sizes = _hf_shapes(config, streams), _sizes(config, streams)
    unused = {name.format(i) for name in UNUSED for i in range(config.num_layers)}
    if config.tie_embeddings:
        unused.add("lm_head.weight")  # some writers repeat the tied table
    _check_names(source, set(tensors), set(expected), unused)
    for name, (entry, _) in expected.items():
        _check_tensor(name, tensors[name], _hf_shape(entry, sizes))

    parameters: dict[str, Any] = {}
    for name in sorted(expected, key=lambda name: (tensors[name].path, name)):
        entry, layer = expected[name]
        array = tensors[name].load().astype(np.float32)
        if bad := int(array.size - np.isfinite(array).sum()):
            raise UserError(
                f"{tensors[name].path}: {name} holds {bad} numbers that are not finite (of {array.size}): the file is"
                " damaged or its training diverged, take another checkpoint"
            )
        ours = _from_hf(entry, array, sizes)
        if entry.per_layer:
            shape = (config.num_layers, *ours.shape)
            _leaf(parameters, entry.path, lambda: np.empty(shape, np.float32))[layer] = ours
        else:
            _leaf(parameters, entry.path, lambda: ours)
    return parameters


def stored_dtype(tensors: Mapping[str, Stored]) -> str:
    """The one type of all tensors, a key of DTYPES; float32 if there are several."""
    types = {_FLOATS.get(tensor.dtype) for tensor in tensors.values()}
    return types.pop() if len(types) == 1 and types <= set(DTYPES) else "float32"


def write_folder(
    directory: str | pathlib.Path,
    config: ModelConfig,
    streams: int,
    parameters: Mapping[str, Any],
    dtype: str = "float32",
    settings: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the folder that `read_folder` reads; an ordinary model (one stream) opens in Hugging Face's libraries.

    The folder appears when it is complete. Raises UserError if there is one with anything in it.

    Args:
      dtype: of the tensors, a key of DTYPES; numbers are rounded to the nearest. settings: keys of config.json besides
      those of the model. files: others to put there, by name. shard_bytes: more are written as shards, with an index.
    """
    if dtype not in DTYPES:
        raise UserError(f"the type is {dtype!r}: must be one of {', '.join(DTYPES)}")
    others = {
        key: value
        for key, value in (settings or {}).items()
        if key not in ("dtype", "rope_parameters")
    }
    written = others | hf_config(config, streams) | {"torch_dtype": dtype}
    if "max_position_embeddings" in others:
        written["max_position_embeddings"] = others["max_position_embeddings"]
    tensors = to_hf(parameters, config)
    shards = _shards(tensors, DTYPES[dtype].itemsize, shard_bytes)
    with new_folder(directory) as folder:
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content)
        (folder / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
        for file, names in shards.items():
            with np.errstate(over="ignore"):  # said below, by name
                part = {
                    name: np.ascontiguousarray(tensors[name].astype(DTYPES[dtype]))
                    for name in names
                }
            _check_range(part, tensors, dtype)
            safetensors.numpy.save_file(part, folder / file, metadata={"format": "pt"})
            shutil.copymode(folder / CONFIG, folder / file)  # else only its owner may read it
        if len(shards) > 1:
            size = sum(x.size for x in tensors.values()) * DTYPES[dtype].itemsize
            places = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": size}, "weight_map": places}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(
    tensors: Mapping[str, np.ndarray], itemsize: int, shard_bytes: int
) -> dict[str, list[str]]:
    """Names of tensors by the file that they go to."""
    parts, filled = [[]], 0
    for name, array in tensors.items():
        if parts[-1] and filled + array.size * itemsize > shard_bytes:
            parts, filled = [*parts, []], 0
        parts[-1].append(name)
        filled += array.size * itemsize
    if len(parts) == 1:
        return {WEIGHTS: parts[0]}
    return {
        f"model-{i + 1:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts)
    }


def _check_range(
    part: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray], dtype: str
) -> None:
    for name, array in part.items():
        if not np.isfinite(array).all() and np.isfinite(tensors[name]).all():
            raise UserError(
                f"{name} has numbers beyond the range of {dtype}: write bfloat16 or float32"
            )


def fits(parameters: Mapping[str, Any], config: ModelConfig, dtype: str) -> bool:
    """Whether every parameter is exactly a number of this type."""
    with np.errstate(over="ignore"):  # then it does not fit

        def same(x):
            return np.array_equal(x.astype(DTYPES[dtype]).astype(np.float32), x)

        return all(same(array) for array in to_hf(parameters, config).values())


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
        refuse(
            "role_gating_enabled",
            "role gating is not supported; use a checkpoint trained without it",
        )
    if settings.get("quantization_config"):
        refuse(
            "quantization_config",
            "quantised weights are not supported; use the checkpoint they were made from",
        )
    if settings.get("use_sliding_window"):
        refuse("use_sliding_window", "sliding windows are not supported")
    if set(settings.get("layer_types") or ()) - {"full_attention"}:
        refuse("layer_types", "every layer must be full_attention")
    if family == "llama" and settings.get("mlp_bias"):
        refuse("mlp_bias", "biases in the MLP are not supported")
    if family != "qwen2" and settings.get("attention_bias"):
        refuse(
            "attention_bias",
            "a bias on the output projection is not supported; only qwen2's q, k, v biases are",
        )
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
    theta, scaling = _read_rope(settings, source, 2048 if family == "llama" else 32768)
    model = ModelConfig(
        vocab_size=number("vocab_size"),
        d_model=d_model,
        num_layers=number("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", 128 if family == "qwen3" else d_model // heads),
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
    rope = config.rope_scaling
    scaling: dict[str, Any] | None = None
    if rope.kind != "none":
        scaling = {"rope_type": rope.kind, "factor": rope.factor}
        scaling |= {theirs: getattr(rope, ours) for ours, theirs in _ROPE_KEYS[rope.kind].items()}
        if not scaling.get("attention_factor", 1):
            del scaling["attention_factor"]
    architecture = {
        "qwen3": "Qwen3ForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "llama": "LlamaForCausalLM",
    }[family]
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
    if rope.kind in ("llama3", "yarn"):
        settings["max_position_embeddings"] = round(rope.factor * rope.original_max_position)
    if streams > 1 or config.stream_embedding:
        settings["num_channels"] = streams
        settings["channel_embedding_method"] = "additive" if config.stream_embedding else "none"
    return settings


def read_own(
    settings: Mapping[str, Any], streams: int, source: str = CONFIG
) -> tuple[StreamsConfig, str | None]:
    """(streams, silence) as a config that we wrote says them; of others (`unnamed_streams`, None). Raises UserError."""
    own = settings.get(OWN) or {}
    try:
        read = (
            from_config_dict({"streams": own["streams"]}).streams
            if "streams" in own
            else unnamed_streams(streams)
        )
    except UserError as error:
        raise UserError(f"{source}: {OWN}: {error}") from error
    if len(read.names) != streams:
        raise UserError(
            f"{source}: {OWN} names {len(read.names)} streams: num_channels is {streams}"
        )
    return read, own.get("silence")


def unnamed_streams(size: int) -> StreamsConfig:
    """The streams of a model that says only how many there are: the first is the input, unless it is the only one."""
    kinds = ("input",) + ("output",) * (size - 1) if size > 1 else ("output",)
    return StreamsConfig(names=tuple(f"stream{s}" for s in range(size)), kinds=kinds)


# Settings of a rope type besides its factor, in RopeScalingConfig and there.
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


def _read_rope(
    settings: Mapping[str, Any], source: str, positions: int
) -> tuple[float, RopeScalingConfig]:
    """Base and scaling, from `rope_theta` and `rope_scaling`, or from `rope_parameters`, where newer writers put both.

    `positions`: what `max_position_embeddings` is where it is not given.
    """
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{source}: rope settings are {rope!r}: must be an object")
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{source}: partial_rotary_factor is not 1: all features of a head are rotated"
        )
    try:
        theta = float(rope.get("rope_theta") or settings.get("rope_theta") or 10000.0)
        if kind == "default":
            return theta, RopeScalingConfig()
        if kind not in _ROPE_KEYS:
            rule = "must be default, linear, llama3 or yarn"
            if kind == "dynamic":
                rule += "; up to max_position_embeddings dynamic is the same as none: set rope_scaling to null"
            raise UserError(f"{source}: rope type {kind!r} is not supported: {rule}")
        if kind == "yarn":
            original = settings.get("max_position_embeddings") or positions
            defaults = {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": original,
            }
            rope = defaults | {"attention_factor": _yarn_size(rope)} | rope
            if not rope.get("truncate", True):
                raise UserError(
                    f"{source}: the rope type yarn with truncate=false is not supported"
                )
        keys = {"factor": "factor"} | _ROPE_KEYS[kind]
        if missing := [key for key in keys.values() if key not in rope]:
            raise UserError(f"{source}: rope type {kind!r} lacks {', '.join(missing)}")
        values = {ours: float(rope[theirs]) for ours, theirs in keys.items()}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: rope settings are {dict(rope)}: must be numbers ({error})"
        ) from error
    if "original_max_position" in values:
        values["original_max_position"] = int(values["original_max_position"])
    return theta, RopeScalingConfig(kind=kind, **values)


def _yarn_size(rope: Mapping[str, Any]) -> float:
    """The attention factor that `mscale` and `mscale_all_dim` stand for; 0, the paper's formula, without them."""
    over, under = (float(rope.get(key, 0)) for key in ("mscale", "mscale_all_dim"))
    if not over or not under or float(rope.get("factor", 1)) <= 1:
        return 0.0

    def size(scale):
        return 0.1 * scale * math.log(float(rope["factor"])) + 1

    return size(over) / size(under)


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
    return array.reshape([sizes[axis] for axis in axes]).transpose(
        [axes.index(axis) for axis in entry.shape]
    )


def _to_hf(entry: Entry, array: np.ndarray) -> np.ndarray:
    sizes = dict(zip(entry.shape, array.shape))
    return array.transpose([entry.shape.index(axis) for axis in "".join(entry.hf)]).reshape(
        _hf_shape(entry, sizes)
    )


def _leaf(tree: dict[str, Any], path: tuple[str, ...], make) -> np.ndarray:
    """The array at `path`, made on first use."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    if path[-1] not in tree:
        tree[path[-1]] = make()
    return tree[path[-1]]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"there is no file {path}: a Hugging Face folder needs {CONFIG} and {WEIGHTS} (or {INDEX})"
        )
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
        return dict.fromkeys(tensors.keys(), directory / WEIGHTS)


def _open(path: pathlib.Path):
    if not path.is_file():
        raise UserError(f"there is no file {path}: copy it, or correct the path of the folder")
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path} is damaged or no safetensors file ({error}): copy it again"
        ) from error


def _check_names(source: str, found: set[str], expected: set[str], unused: set[str]) -> None:
    problems = []
    if missing := sorted(expected - found):
        problems.append(f"missing {_some(missing)}")
    if unexpected := sorted(found - expected - unused):
        problems.append(f"unexpected {_some(unexpected)}")
    if problems:
        raise UserError(f"{source} does not hold the model of its config: {'; '.join(problems)}")


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_tensor(name: str, tensor: Stored, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"{tensor.path}: {name} has shape {tensor.shape}: the config asks for {shape}"
        )
    if tensor.dtype not in _FLOATS:
        raise UserError(
            f"{tensor.path}: {name} has type {tensor.dtype}: must be a floating-point tensor"
        )
