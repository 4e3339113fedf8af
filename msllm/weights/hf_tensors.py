"""Converts between the parameters of a model and tensors with Hugging Face names.

`KEY_TABLE` maps each kind of tensor to a parameter, and the axes of the one to those of the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax import traverse_util

from msllm.config import ModelConfig
from msllm.errors import UserError

# Types that can be written, by their names in config.json.
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
# Types that can be read: {name in safetensors: name in config.json}.
_FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Entry(NamedTuple):
    """One kind of tensor. Axes are letters, the keys of `_sizes`, without the axis of layers.

    Attributes:
      name: the Hugging Face name; `{}` stands for the layer.
      path: the keys of the parameter in nested dicts.
      hf: the dimensions of the tensor. A string of several letters is one dimension that joins
        several axes.
      shape: the axes of the parameter.
    """

    name: str
    path: tuple[str, ...]
    hf: tuple[str, ...]
    shape: tuple[str, ...]

    @property
    def per_layer(self) -> bool:
        """Whether every layer has such a tensor. The parameter stacks them along its first axis."""
        return "{}" in self.name

    def hf_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the shape of the tensor."""
        return tuple(math.prod(sizes[axis] for axis in axes) for axes in self.hf)

    def to_parameter(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Returns a tensor with the axes of the parameter (of one layer)."""
        axes = "".join(self.hf)
        split = tensor.reshape([sizes[axis] for axis in axes])
        return split.transpose([axes.index(axis) for axis in self.shape])

    def to_tensor(self, parameter: np.ndarray) -> np.ndarray:
        """Returns a parameter (of one layer) with the axes of the tensor."""
        sizes = dict(zip(self.shape, parameter.shape))
        split = parameter.transpose([self.shape.index(axis) for axis in "".join(self.hf)])
        return split.reshape(self.hf_shape(sizes))


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ATTENTION, _MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."
KEY_TABLE = (
    Entry(EMBEDDING, ("embedding",), ("V", "D"), ("V", "D")),
    Entry("model.channel_embedding.weight", ("stream_embedding",), ("S", "D"), ("S", "D")),
    Entry("model.norm.weight", ("final_norm",), ("D",), ("D",)),
    Entry(HEAD, ("head",), ("V", "D"), ("V", "D")),
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
# Tensors that a file may hold but that are not read. Every checkpoint of the reference
# implementation has the first one, although only role gating uses it. The others are rotary
# frequencies, which older checkpoints store.
UNUSED = (
    _ATTENTION + "gate_in_norm.weight",
    _ATTENTION + "rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
)


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
      path: the file, for messages.
      shape: the shape of the tensor.
      dtype: the name of its type in safetensors, e.g. "BF16".
      load: a function that reads the tensor.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]


def from_hf(
    tensors: Mapping[str, StoredTensor], config: ModelConfig, streams: int, source: str
) -> dict[str, Any]:
    """Returns parameters, as nested dicts of numpy float32, from tensors with Hugging Face names.

    Args:
      tensors: the tensors by name. They are read one at a time.
      config: the config of the model.
      streams: the number of streams.
      source: the folder or file, for messages.

    Raises UserError if a tensor is missing, unexpected, misshapen, not of a floating-point type, or
    holds numbers that are not finite.
    """
    if config.num_layers > len(tensors):  # do not list the names of an absurd number of layers
        raise UserError(
            f"{source} holds {len(tensors)} tensors, too few for the {config.num_layers:,} layers"
            " of its config: copy the files again"
        )
    expected, sizes = _expected_tensors(config), _sizes(config, streams)
    _check_names(source, set(tensors), set(expected), _unused_names(config))
    for name, (entry, _) in expected.items():
        _check_tensor(name, tensors[name], entry.hf_shape(sizes))

    parameters: dict[tuple[str, ...], np.ndarray] = {}  # by path
    for name in sorted(expected, key=lambda name: (tensors[name].path, name)):
        entry, layer = expected[name]
        parameter = entry.to_parameter(_load_finite(name, tensors[name]), sizes)
        if layer is None:
            parameters[entry.path] = parameter
            continue
        if entry.path not in parameters:
            parameters[entry.path] = np.empty((config.num_layers, *parameter.shape), np.float32)
        parameters[entry.path][layer] = parameter
    return traverse_util.unflatten_dict(parameters)


def has_untied_head(tensors: Mapping[str, StoredTensor]) -> bool:
    """Returns whether there is a head that differs from the embedding."""
    if HEAD not in tensors or EMBEDDING not in tensors:
        return False
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    if head.shape != embedding.shape or not {head.dtype, embedding.dtype} <= _FLOATS.keys():
        return True
    return not np.array_equal(head.load(), embedding.load())


def to_hf(parameters: dict[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns tensors by Hugging Face name.

    Args:
      parameters: nested dicts of the parameters, or of arrays with the same structure, such as
        gradients or moments.
      config: the config of the model.
    """
    tensors, by_path = {}, traverse_util.flatten_dict(parameters)
    for entry in KEY_TABLE:
        if entry.path not in by_path:
            continue
        parameter = np.asarray(by_path[entry.path])
        if entry.per_layer:
            for layer in range(config.num_layers):
                tensors[entry.name.format(layer)] = entry.to_tensor(parameter[layer])
        else:
            tensors[entry.name] = entry.to_tensor(parameter)
    return tensors


def common_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """Returns the type that all tensors share, a key of DTYPES, or float32 if there is none."""
    types = {tensor.dtype for tensor in tensors.values()}
    common = _FLOATS.get(types.pop()) if len(types) == 1 else None
    return common if common in DTYPES else "float32"


def is_exact_in(parameters: dict[str, Any], config: ModelConfig, dtype: str) -> bool:
    """Returns whether the type, a key of DTYPES, represents every parameter exactly."""
    with np.errstate(over="ignore"):  # numbers that overflow compare as different
        return all(
            np.array_equal(tensor.astype(DTYPES[dtype]).astype(np.float32), tensor)
            for tensor in to_hf(parameters, config).values()
        )


def _sizes(config: ModelConfig, streams: int) -> dict[str, int]:
    """Returns the length of every axis by its letter."""
    return {
        "V": config.vocab_size,
        "S": streams,
        "D": config.d_model,
        "F": config.d_ff,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
    }


def _expected_tensors(config: ModelConfig) -> dict[str, tuple[Entry, int | None]]:
    """Returns {name: (entry, layer)} of every tensor that a model of this config has.

    The layer is None for tensors outside of the layers.
    """
    absent = set()
    if config.tie_embeddings:
        absent.add("head")
    if not config.stream_embedding:
        absent.add("stream_embedding")
    if not config.attention_bias:
        absent |= {"q_bias", "k_bias", "v_bias"}
    if not config.qk_norm:
        absent |= {"q_norm", "k_norm"}
    expected: dict[str, tuple[Entry, int | None]] = {}
    for entry in KEY_TABLE:
        if entry.path[-1] in absent:
            continue
        if entry.per_layer:
            for layer in range(config.num_layers):
                expected[entry.name.format(layer)] = (entry, layer)
        else:
            expected[entry.name] = (entry, None)
    return expected


def _unused_names(config: ModelConfig) -> set[str]:
    unused = {name.format(layer) for name in UNUSED for layer in range(config.num_layers)}
    if config.tie_embeddings:
        unused.add(HEAD)  # some libraries store the tied embedding twice
    return unused


def _check_names(source: str, found: set[str], expected: set[str], unused: set[str]) -> None:
    problems = []
    if missing := sorted(expected - found):
        problems.append(f"missing {_first_names(missing)}")
    if unexpected := sorted(found - expected - unused):
        problems.append(f"unexpected {_first_names(unexpected)}")
    if problems:
        raise UserError(
            f"the tensors of {source} are not those of its config: {'; '.join(problems)}"
        )


def _first_names(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _check_tensor(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"{tensor.path}: {name} has shape {tensor.shape}: the config asks for {shape}"
        )
    if tensor.dtype not in _FLOATS:
        raise UserError(
            f"{tensor.path}: {name} has type {tensor.dtype}: must be one of {', '.join(_FLOATS)};"
            " use the checkpoint that it was quantised from"
        )


def _load_finite(name: str, tensor: StoredTensor) -> np.ndarray:
    """Returns a tensor as float32. Raises UserError if it holds numbers that are not finite."""
    array = tensor.load().astype(np.float32)
    if bad := int(array.size - np.isfinite(array).sum()):
        raise UserError(
            f"{tensor.path}: {name} holds {bad} numbers that are not finite (of {array.size}): the"
            " file is damaged or its training diverged; use another checkpoint"
        )
    return array
