"""A model ready to run, from either kind of directory: a checkpoint of msllm or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
from etils import epath
from flax import nnx

from msllm.config import ModelConfig
from msllm.errors import UserError
from msllm.model.model import abstract_model
from msllm.streams import StreamSpec, lag_matrix
from msllm.tokenizer import FILE_NAMES, Tokenizer
from msllm.weights import hf


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What decoding and scoring need: a model, its streams and, if it came with one, its tokenizer."""

    config: ModelConfig
    streams: StreamSpec
    graph: nnx.GraphDef
    parameters: dict[str, Any]
    tokenizer: Tokenizer | None

    def with_streams(self, **changes) -> LoadedModel:
        """The same parameters under another stream spec, e.g. `with_streams(skip_silence=True)`."""
        streams = dataclasses.replace(self.streams, **changes)
        return dataclasses.replace(
            self, streams=streams, graph=abstract_model(self.config, streams)[0]
        )

    def with_visibility(self, preset: str) -> LoadedModel:
        """The same parameters under the lag matrix of a preset. Raises UserError for an unknown one."""
        return self.with_streams(
            lag=tuple(map(tuple, lag_matrix(preset, self.streams.size).tolist()))
        )


def load_any(path: str | pathlib.Path) -> LoadedModel:
    """Loads a checkpoint of msllm, or a Hugging Face folder.

    Only folders that msllm wrote name their streams and say what silence is. In others the streams are stream0, stream1,
    ..., of which stream0 is the input, as in the reference implementation, unless it is the only one; and the model has
    no tokenizer, unless it is imported (msllm/weights/convert.py). Raises UserError.
    """
    path = epath.Path(path)
    if not path.is_dir():
        raise UserError(f"there is no checkpoint directory {path}: correct --checkpoint")
    if not _is_hf_folder(path):
        from msllm.weights.trained import (
            load_model,  # orbax is slow to import, and a Hugging Face folder needs none of it
        )

        loaded = load_model(path, needs_tokenizer=False)
        return LoadedModel(
            loaded.config.model, loaded.streams, loaded.graph, loaded.parameters, loaded.tokenizer
        )
    folder = pathlib.Path(path)
    config, size, parameters = hf.read_folder(folder)
    streams, silence = hf.read_own(hf.read_settings(folder), size, str(folder / hf.CONFIG))
    files = [folder / name for name in FILE_NAMES.values() if (folder / name).is_file()]
    tokenizer = Tokenizer.load(files[0], silence) if silence and files else None
    parameters = jax.tree.map(jax.numpy.asarray, parameters)
    return from_parameters(config, StreamSpec.from_config(streams), parameters, tokenizer)


def from_parameters(
    config: ModelConfig,
    streams: StreamSpec,
    parameters: dict[str, Any],
    tokenizer: Tokenizer | None = None,
) -> LoadedModel:
    """A model of parameters that are in memory, e.g. in the middle of training."""
    return LoadedModel(config, streams, abstract_model(config, streams)[0], parameters, tokenizer)


def _is_hf_folder(path: epath.Path) -> bool:
    try:
        return "model_type" in json.loads((path / hf.CONFIG).read_text())
    except (OSError, ValueError):
        return False
