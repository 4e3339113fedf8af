"""A model out of a checkpoint, ready to run: without its run's optimizer and mesh."""

from __future__ import annotations

import base64
import dataclasses
import logging
import os
from typing import Any

import jax
from etils import epath
from flax import nnx

from msllm.checkpoint import check_sums, checkpoint_paths, first_line, read_arrays, read_description
from msllm.config import Config, from_config_dict
from msllm.errors import UserError
from msllm.model.model import abstract_model
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

log = logging.getLogger("msllm")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint, ready to run: everything in it but the optimizer's state."""

    path: str
    step: int
    config: Config
    streams: StreamSpec
    tokenizer: Tokenizer | None  # None: the model was imported without one
    graph: nnx.GraphDef
    parameters: dict[str, Any]


def load_model(path: str | os.PathLike, needs_tokenizer: bool = True) -> Loaded:
    """Loads parameters and description from a checkpoint: a step's directory, or the newest good one of a workdir. Raises
    UserError, also if it `needs_tokenizer` and was imported without one."""
    problems = []
    for candidate in checkpoint_paths(path):
        try:
            loaded = _load(candidate)
            if needs_tokenizer and loaded.tokenizer is None:
                raise UserError(
                    f"{path} has no tokenizer: import it with --tokenizer=FILE (docs/weights.md)"
                )
            return loaded
        except UserError:
            raise
        except Exception as error:  # as in Checkpoints.restore
            reason = first_line(error)
            problems.append(f"{candidate.name}: {reason}")
            log.warning("checkpoint %s is damaged and not used: %s", candidate, reason)
    raise UserError(
        f"no checkpoint in {path} can be read ({'; '.join(problems)}): restore one from a copy"
    )


def _load(path: epath.Path) -> Loaded:
    description = read_description(path)
    config = from_config_dict(description["config"])
    streams = StreamSpec.from_config(config.streams)
    graph, shapes, _ = abstract_model(config.model, streams)
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
    return Loaded(str(path), description["step"], config, streams, tokenizer, graph, parameters)
