"""Reads and writes folders in the Hugging Face layout: `config.json` and safetensors.

msllm/weights/hf_config.py converts the config, and msllm/weights/hf_tensors.py the tensors.
docs/weights.md describes which models these folders may hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from msllm.config import ModelConfig
from msllm.errors import UserError
from msllm.runtime.files import new_folder, read_object
from msllm.weights import hf_config, hf_tensors
from msllm.weights.hf_tensors import DTYPES, StoredTensor

CONFIG = hf_config.FILE
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model*.bin"  # the weights in older folders, which are not read
GIT_LFS = b"version https://git-lfs"  # the beginning of a Git LFS pointer
SHARD_BYTES = 5_000_000_000

log = logging.getLogger("msllm")


def read_folder(directory: str | os.PathLike) -> tuple[ModelConfig, int, dict[str, Any]]:
    """Returns (config, number of streams, parameters) of a folder.

    The parameters are nested dicts of numpy float32. As in `transformers`, a head that differs from
    the embedding is read even if the config says that they are tied.

    Raises UserError for a setting that msllm does not support, for missing, unexpected, misshapen
    or damaged tensors, and for numbers that are not finite.
    """
    directory = pathlib.Path(directory)
    config, streams = hf_config.from_hf(read_settings(directory), str(directory / CONFIG))
    with open_tensors(directory) as tensors:
        if config.tie_embeddings and hf_tensors.has_untied_head(tensors):
            log.warning(
                "%s: tie_word_embeddings is true, but %s differs from %s: both are read, and the"
                " model is not tied",
                directory / CONFIG,
                hf_tensors.HEAD,
                hf_tensors.EMBEDDING,
            )
            config = dataclasses.replace(config, tie_embeddings=False)
        return config, streams, hf_tensors.from_hf(tensors, config, streams, str(directory))


def read_settings(directory: str | os.PathLike) -> dict[str, Any]:
    """Returns the content of a folder's config.json. Raises UserError."""
    path = pathlib.Path(directory) / CONFIG
    if not path.is_file():
        raise UserError(
            f"there is no file {path}: a Hugging Face folder needs {CONFIG} and {WEIGHTS}"
            f" (or {INDEX})"
        )
    return read_json(path)


@contextlib.contextmanager
def open_tensors(directory: str | os.PathLike) -> Iterator[dict[str, StoredTensor]]:
    """Opens the file or shards of a folder and yields its tensors by name. Raises UserError.

    The tensors can be loaded until the context ends.
    """
    file_of = _tensor_files(pathlib.Path(directory))
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(_open(path)) for path in sorted(set(file_of.values()))}
        names_in = {path: set(file.keys()) for path, file in opened.items()}
        for name, path in file_of.items():
            if name not in names_in[path]:
                raise UserError(
                    f"{path} has no tensor {name}, which the index places there: copy the file"
                    " again"
                )
        yield {name: _stored(opened[path], name, path) for name, path in file_of.items()}


def write_folder(
    directory: str | os.PathLike,
    config: ModelConfig,
    streams: int,
    parameters: dict[str, Any],
    dtype: str = "float32",
    settings: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder that `read_folder` reads.

    Hugging Face's libraries open the folder of a model with one stream. The folder appears only
    when it is complete.

    Args:
      directory: the folder. It must be empty or not exist.
      config: the config of the model.
      streams: the number of streams.
      parameters: nested dicts of numpy arrays.
      dtype: the type of the tensors, a key of DTYPES. Parameters are rounded to nearest.
      settings: keys of config.json besides those of the model.
      files: {name: content} of other files to write into the folder.
      shard_bytes: tensors larger than this in total are divided among shards, with an index.

    Raises UserError if the folder is not empty, if no Hugging Face family has the form of the
    model, or if a parameter is beyond the range of the type.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}: must be one of {', '.join(DTYPES)}")
    content = _config_content(config, streams, dtype, settings or {})
    tensors = hf_tensors.to_hf(parameters, config)
    itemsize = DTYPES[dtype].itemsize
    shards = _shards(tensors, itemsize, shard_bytes)
    with new_folder(directory) as folder:
        for name, data in (files or {}).items():
            (folder / name).write_bytes(data)
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        for file, names in shards.items():
            shard = {name: _rounded(name, tensors[name], dtype) for name in names}
            safetensors.numpy.save_file(shard, folder / file, metadata={"format": "pt"})
            # safetensors creates files that only their owner can read.
            shutil.copymode(folder / CONFIG, folder / file)
        if len(shards) > 1:
            size = itemsize * sum(tensor.size for tensor in tensors.values())
            file_of = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": size}, "weight_map": file_of}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _config_content(
    config: ModelConfig, streams: int, dtype: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the content of config.json: `settings`, updated with the model's own."""
    others = {
        key: value for key, value in settings.items() if key not in ("dtype", "rope_parameters")
    }
    content = others | hf_config.to_hf(config, streams) | {"torch_dtype": dtype}
    if "max_position_embeddings" in others:
        content["max_position_embeddings"] = others["max_position_embeddings"]
    return content


def _shards(
    tensors: Mapping[str, np.ndarray], itemsize: int, shard_bytes: int
) -> dict[str, list[str]]:
    """Returns {name of a file: names of its tensors}."""
    shards: list[list[str]] = [[]]
    filled = 0  # bytes in the last shard
    for name, tensor in tensors.items():
        size = tensor.size * itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


def _rounded(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the tensor in a type of DTYPES. Raises UserError for numbers beyond its range."""
    with np.errstate(over="ignore"):  # the error below names the tensor
        rounded = np.ascontiguousarray(tensor.astype(DTYPES[dtype]))
    if not np.isfinite(rounded).all() and np.isfinite(tensor).all():
        raise UserError(
            f"{name} has numbers beyond the range of {dtype}: use dtype bfloat16 or float32"
        )
    return rounded


def _tensor_files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns {name of a tensor: its file}.

    Like `transformers`, it looks for the single file first, and then for the index of shards.
    """
    if (directory / WEIGHTS).is_file():
        if (directory / INDEX).is_file():
            log.warning(
                "%s has %s and %s: only the first is read",
                directory,
                WEIGHTS,
                INDEX,
            )
        with _open(directory / WEIGHTS) as tensors:
            return dict.fromkeys(tensors.keys(), directory / WEIGHTS)
    if not (directory / INDEX).is_file():
        if pickled := sorted(directory.glob(PICKLED)):
            raise UserError(
                f"{pickled[0]} is a pickle, which is not read because it could run any code: save"
                " the model again with transformers, which writes safetensors"
            )
        raise UserError(
            f"there is no file {directory / WEIGHTS}: copy it, or correct the path of the folder"
        )
    file_of = read_json(directory / INDEX).get("weight_map")
    if not isinstance(file_of, dict):
        raise UserError(f"{directory / INDEX} has no weight_map: copy it again")
    for name, file in file_of.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise UserError(
                f"{directory / INDEX} places {name} in {file!r}: must be a file of the same folder"
            )
    return {name: directory / file for name, file in file_of.items()}


def _stored(file: Any, name: str, path: pathlib.Path) -> StoredTensor:
    """Returns a tensor of an open safetensors file."""
    header = file.get_slice(name)

    def load() -> np.ndarray:
        return file.get_tensor(name)

    return StoredTensor(str(path), tuple(header.get_shape()), header.get_dtype(), load)


def _open(path: pathlib.Path) -> Any:
    """Returns an open safetensors file, which is a context manager. Raises UserError."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: copy it, or correct the path of the folder")
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        refuse_pointer(path)
        raise UserError(
            f"{path} is damaged or no safetensors file ({error}): copy it again"
        ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file; {} without a file. Raises UserError if it is damaged."""
    if not path.is_file():
        return {}
    refuse_pointer(path)
    return read_object(path, "copy it again")


def refuse_pointer(path: pathlib.Path) -> None:
    """Raises UserError if a file is only a Git LFS pointer."""
    with path.open("rb") as file:
        if file.read(len(GIT_LFS)) == GIT_LFS:
            raise UserError(
                f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its"
                " repository, or download the file"
            )
