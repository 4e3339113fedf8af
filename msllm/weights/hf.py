"""Folders in the Hugging Face layout: `config.json` and safetensors, read and written.

msllm/weights/hf_config.py converts the config and msllm/weights/hf_tensors.py the tensors.
docs/weights.md says what is read and written.
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
from msllm.runtime.files import new_folder
from msllm.weights import hf_config, hf_tensors
from msllm.weights.hf_tensors import DTYPES, StoredTensor

CONFIG = hf_config.FILE
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model*.bin"  # what older folders have in place of WEIGHTS
GIT_LFS = b"version https://git-lfs"  # how a pointer of Git LFS begins
SHARD_BYTES = 5_000_000_000

log = logging.getLogger("msllm")


def read_folder(directory: str | os.PathLike) -> tuple[ModelConfig, int, dict[str, Any]]:
    """(config, number of streams, parameters as nested dicts of numpy float32) of a folder.

    A head that differs from the embedding is read although the config says that they are tied, as
    `transformers` does.

    Raises UserError for what this model cannot represent, and for missing, unexpected, misshapen or
    damaged tensors and numbers that are not finite.
    """
    directory = pathlib.Path(directory)
    config, streams = hf_config.from_hf(read_settings(directory), str(directory / CONFIG))
    with open_tensors(directory) as tensors:
        if config.tie_embeddings and hf_tensors.has_head_of_its_own(tensors):
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
    """The content of the config.json of a folder. Raises UserError."""
    path = pathlib.Path(directory) / CONFIG
    if not path.is_file():
        raise UserError(
            f"there is no file {path}: a Hugging Face folder needs {CONFIG} and {WEIGHTS}"
            f" (or {INDEX})"
        )
    return read_json(path)


@contextlib.contextmanager
def open_tensors(directory: str | os.PathLike) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of a folder by name, from one file or from shards. Raises UserError.

    They can be loaded until the context ends.
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
    """Writes the folder that `read_folder` reads.

    A model with one stream opens in Hugging Face's libraries. The folder appears when it is
    complete.

    Args:
      directory: the folder. It must not exist, or be empty.
      config, streams, parameters: the model and its number of streams.
      dtype: the type of the tensors, a key of DTYPES. Numbers are rounded to the nearest.
      settings: keys of config.json besides those of the model.
      files: the content of other files to put there, by name.
      shard_bytes: the size of a file of tensors beyond which there are several, with an index.

    Raises UserError if the folder has anything in it, if no family has the form of the model, or
    if a number is beyond the range of the type.
    """
    if dtype not in DTYPES:
        raise UserError(f"the type is {dtype!r}: must be one of {', '.join(DTYPES)}")
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
            # safetensors creates files that only their owner may read.
            shutil.copymode(folder / CONFIG, folder / file)
        if len(shards) > 1:
            size = itemsize * sum(tensor.size for tensor in tensors.values())
            file_of = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": size}, "weight_map": file_of}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _config_content(
    config: ModelConfig, streams: int, dtype: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of config.json: the model's settings, and others that they do not replace."""
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
    """Names of tensors by the file that they go to."""
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
    """The tensor in a type of DTYPES. Raises UserError if a number is beyond the type's range."""
    with np.errstate(over="ignore"):  # the error below names the tensor
        rounded = np.ascontiguousarray(tensor.astype(DTYPES[dtype]))
    if not np.isfinite(rounded).all() and np.isfinite(tensor).all():
        raise UserError(
            f"{name} has numbers beyond the range of {dtype}: write bfloat16 or float32"
        )
    return rounded


def _tensor_files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of each tensor: of the one file or, if there is none, of the index of shards.

    This is the order in which `transformers` looks for them.
    """
    if (directory / WEIGHTS).is_file():
        if (directory / INDEX).is_file():
            log.warning(
                "%s has %s and %s: the first is read, the second is not",
                directory,
                WEIGHTS,
                INDEX,
            )
        with _open(directory / WEIGHTS) as tensors:
            return dict.fromkeys(tensors.keys(), directory / WEIGHTS)
    if not (directory / INDEX).is_file():
        if pickled := sorted(directory.glob(PICKLED)):
            raise UserError(
                f"{pickled[0]} holds its weights as a pickle, which could run any code and is not"
                " read: save the model again with transformers, which writes safetensors"
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
    """A tensor of an open safetensors file."""
    header = file.get_slice(name)

    def load() -> np.ndarray:
        return file.get_tensor(name)

    return StoredTensor(str(path), tuple(header.get_shape()), header.get_dtype(), load)


def _open(path: pathlib.Path) -> Any:
    """An open safetensors file, a context manager. Raises UserError."""
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
    """The content of a JSON file; {} if there is none. Raises UserError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise UserError(f"{path} is no JSON file ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}: must be a JSON object")
    return value


def refuse_pointer(path: pathlib.Path) -> None:
    """Raises UserError if a file is only a pointer of Git LFS to its content."""
    with path.open("rb") as file:
        if file.read(len(GIT_LFS)) == GIT_LFS:
            raise UserError(
                f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its"
                " repository, or download the file"
            )
