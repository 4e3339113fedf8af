"""Loads a model from a checkpoint of msllm or a Hugging Face folder."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from msllm.config import Config, ModelConfig, StreamsConfig, code_named_by, from_config_dict
from msllm.errors import UserError
from msllm.groups import resize
from msllm.mail import Mail
from msllm.model.model import abstract_model, check_parameters
from msllm.runtime.environment import refuse_x64
from msllm.streams import StreamSpec, lag_matrix
from msllm.tokenizer import FILE_NAMES, Tokenizer
from msllm.weights import hf, hf_config

log = logging.getLogger("msllm")

# Settings of `config.streams` that `LoadedModel.with_streams` takes besides fields of `StreamSpec`.
_SETTINGS = {"lags", "visibility", "visibility_medium", "token_sets"}


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its streams, parameters and tokenizer, for decoding and scoring.

    Raises UserError if the parameters do not have the shapes that the config and streams need.

    Attributes:
      config: the sizes and options of the model.
      streams: the streams and their visibility.
      parameters: nested dicts of arrays, as `msllm.model.model.init_parameters` returns them.
      tokenizer: the tokenizer; None if the model has none.
      path: the checkpoint; None for a Hugging Face folder or a model made in memory.
      step: the training step of the checkpoint, or None.
      run_config: all settings of the run that wrote the checkpoint, or None.
    """

    config: ModelConfig
    streams: StreamSpec
    parameters: dict[str, Any]
    tokenizer: Tokenizer | None = None
    path: str | None = None
    step: int | None = None
    run_config: Config | None = None

    def __post_init__(self) -> None:
        check_parameters(self.config, self.streams, self.parameters)

    @functools.cached_property
    def graph(self) -> nnx.GraphDef:
        """The structure of the model; `msllm.model.model.bind(graph, parameters)` is the module."""
        return abstract_model(self.config, self.streams)[0]

    @property
    def trained_rows(self) -> int | None:
        """T, the rows of the tables that the model was trained on.

        None if it is unknown: the model is an import, or a fine-tuned import that may have been
        trained on longer texts before.
        """
        run = self.run_config
        if run is None or not self.step or run.init_from:
            return None
        return run.data.rows

    def require_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer. Raises UserError if the model has none."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.path or 'the model'} has no tokenizer: import it with --tokenizer=FILE"
                " (docs/weights.md)"
            )
        return self.tokenizer

    def silence_token(
        self, silence_id: int | None = None, needed: bool | None = None
    ) -> int | None:
        """Returns the silence token: `silence_id`, or else that of the tokenizer.

        Args:
          silence_id: the token that the caller gives.
          needed: whether None is refused. By default it is if the model hides silence, or shows
            the tokens that do not pass an edge as silence.

        Raises UserError if the token is needed and unknown, or not in the vocabulary.
        """
        if silence_id is None and self.tokenizer is not None:
            silence_id = self.tokenizer.silence_id
        shows_silence = self.streams.skip_silence or bool(self.streams.passing)
        if silence_id is None and (shows_silence if needed is None else needed):
            raise UserError(
                "the model has no tokenizer: pass the token that means silence as silence_id=..."
                " (--silence_id)"
            )
        size = self.config.vocab_size
        is_id = isinstance(silence_id, (int, np.integer)) and 0 <= silence_id < size
        if silence_id is not None and not is_id:
            raise UserError(f"silence_id is {silence_id}: the vocabulary has ids 0 to {size - 1}")
        return silence_id

    def with_streams(self, **changes: Any) -> LoadedModel:
        """Returns the model with other streams.

        Args:
          changes: fields of `StreamSpec`, e.g. `skip_silence=True`; or the settings `lags`, `mail`
            (as texts), `visibility`, `visibility_medium` and `token_sets` of `config.streams`.

        Raises UserError if a setting is invalid, or if the parameters are of other classes of
        streams.
        """
        settings = {name: changes.pop(name) for name in _SETTINGS & changes.keys()}
        if any(not isinstance(rule, Mail) for rule in changes.get("mail", ())):
            settings["mail"] = changes.pop("mail")
        model = self
        if settings:
            model = self._with_settings(dataclasses.replace(self._settings(), **settings))
        if {"lag", "token_lag"} & changes.keys():
            changes = {"drawn_lags": ()} | changes
        return dataclasses.replace(model, streams=dataclasses.replace(model.streams, **changes))

    def with_threads(self, threads: int | Mapping[str, int]) -> LoadedModel:
        """Returns the model with other numbers of interchangeable streams.

        Args:
          threads: the number of members of every group, or of some groups by name.

        Raises UserError if the streams have no such group, if edges or mail name a single member of
        a group that changes, if groups that are paired by index would have different numbers of
        members, or if a group has more members than identities.
        """
        settings = self._settings()
        references = [(edge[0], edge[1]) for edge in (*settings.lags, *settings.mail)]
        names = resize(settings.names, references, threads)
        return self._with_settings(dataclasses.replace(settings, names=names))

    def _settings(self) -> StreamsConfig:
        """The settings of the streams. Raises UserError if the streams have others by now."""
        settings = self.streams.settings
        if settings is None or StreamSpec.from_config(settings) != self.streams:
            raise UserError(
                "the streams of the model were changed, so that its settings do not describe them:"
                " change settings and the number of threads first, before other fields"
            )
        return settings

    def _with_settings(self, settings: StreamsConfig) -> LoadedModel:
        run = self.run_config
        run = run and dataclasses.replace(run, streams=settings)
        return dataclasses.replace(self, streams=StreamSpec.from_config(settings), run_config=run)

    def with_visibility(self, preset: str) -> LoadedModel:
        """Returns the model with the visibility of a preset. Raises UserError."""
        lag = lag_matrix(preset, self.streams.size).tolist()
        return self.with_streams(lag=tuple(tuple(row) for row in lag), token_lag=(), passing=())


def load(path: str | os.PathLike, allow_code: bool = False) -> LoadedModel:
    """Loads a model onto one device.

    Args:
      path: a checkpoint of msllm, a workdir of `msllm train`, a folder written by `msllm convert`,
        or a Hugging Face folder. In a workdir, the newest checkpoint that is not damaged is read.
      allow_code: import the layers outside of msllm that a checkpoint may name
        (`config.model.block`). They can run any code: allow it only if you trust the checkpoint and
        the module that it names.

    A Hugging Face folder that msllm exported names its streams and its silence token. The streams
    of any other folder are called stream0, stream1, ..., and stream0 is the input unless it is the
    only stream. Its model has no tokenizer, because the folder does not say which token means
    silence. `msllm convert` turns such a folder into a checkpoint with named streams and a
    tokenizer.

    Raises UserError if there is no model at `path`, if it cannot be read, or if it names code and
    `allow_code` is false.
    """
    refuse_x64()
    path = epath.Path(path)
    if _is_hf_folder(path):
        return _load_hf_folder(pathlib.Path(path))
    return _load_checkpoint(path, allow_code)


def _is_hf_folder(path: epath.Path) -> bool:
    try:
        content = json.loads((path / hf.CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "model_type" in content


def _load_hf_folder(folder: pathlib.Path) -> LoadedModel:
    config, size, parameters = hf.read_folder(folder)
    streams, silence = hf_config.read_streams(
        hf.read_settings(folder), size, str(folder / hf.CONFIG)
    )
    files = [folder / name for name in FILE_NAMES.values() if (folder / name).is_file()]
    tokenizer = Tokenizer.load(files[0], silence) if silence and files else None
    parameters = jax.tree.map(jnp.asarray, parameters)
    return LoadedModel(config, StreamSpec.from_config(streams), parameters, tokenizer)


def _load_checkpoint(path: epath.Path, allow_code: bool) -> LoadedModel:
    """Reads the checkpoint at `path` or, in a workdir, the newest one that is not damaged."""
    from msllm.checkpoint import checkpoint_paths, error_summary  # imports orbax, which is slow

    problems = []
    for candidate in checkpoint_paths(path):
        try:
            return _read_checkpoint(candidate, allow_code)
        except UserError:
            raise
        except Exception as error:  # for damaged files, orbax and tensorstore raise many types
            reason = error_summary(error)
            problems.append(f"{candidate.name}: {reason}")
            log.warning("checkpoint %s is damaged and not used: %s", candidate, reason)
    raise UserError(
        f"no checkpoint in {path} can be read ({'; '.join(problems)}): restore one from a copy"
    )


def _read_checkpoint(path: epath.Path, allow_code: bool) -> LoadedModel:
    from msllm.checkpoint import check_sums, read_arrays, read_description

    description = read_description(path)
    config = from_config_dict(description["config"])
    if not allow_code:
        _refuse_code(path, config)
    streams = StreamSpec.from_config(config.streams)
    _, shapes, _ = abstract_model(config.model, streams)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
    )
    parameters = read_arrays(path / "parameters", abstract)
    check_sums({"parameters": parameters}, description["checksums"])
    stored = description["tokenizer"]
    tokenizer = stored and Tokenizer.from_bytes(
        stored["kind"], base64.b64decode(stored["bytes"]), stored["silence"]
    )
    return LoadedModel(
        config.model,
        streams,
        parameters,
        tokenizer,
        path=str(path),
        step=description["step"],
        run_config=config,
    )


def _refuse_code(path: epath.Path, config: Config) -> None:
    """Raises UserError if the model of a checkpoint would import code outside of msllm."""
    for setting, code in code_named_by(config.model, "config.model").items():
        raise UserError(
            f"{setting} of {path} is {code!r}: loading the model would run this code. If you trust"
            " it, allow it by load(..., allow_code=True), or --allow_code on the command line"
        )
