"""Models without a run: what an import writes, and what a new run may start from (`config.init_from`)."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from msllm.checkpoint import (
    array_handler,
    check_sums,
    checkpoint_paths,
    describe,
    is_no_damage,
    read_arrays,
    read_description,
)
from msllm.config import Config, from_config_dict, to_config_dict, to_json
from msllm.errors import UserError
from msllm.model.model import abstract_model, parameter_shardings
from msllm.optim import path_name
from msllm.runtime import processes
from msllm.step import Program
from msllm.streams import StreamSpec
from msllm.tokenizer import FILE_NAMES, Tokenizer

STREAM_EMBEDDING = "stream_embedding"
SAME = (
    "norm_eps",
    "rope_theta",
    "rope_scaling",
)  # settings that parameters were trained with and do not show

log = logging.getLogger("msllm")


def write_model(
    folder: str | os.PathLike,
    config: Config,
    parameters: dict[str, Any],
    tokenizer: Tokenizer | None,
) -> None:
    """Writes a checkpoint of step 0 without an optimizer's state, the config and the tokenizer into a folder."""
    folder = epath.Path(folder)
    arrays = jax.tree.map(jnp.asarray, parameters)
    description = describe(0, config, tokenizer, {"parameters": arrays})
    with ocp.Checkpointer(array_handler()) as writer:
        writer.save(folder / "parameters", args=ocp.args.PyTreeSave(arrays))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(folder / "description", args=ocp.args.JsonSave(description))
    (folder / "config.json").write_text(to_json(config))
    if tokenizer:
        (folder / FILE_NAMES[tokenizer.kind]).write_bytes(tokenizer.to_bytes())


def fine_tune(folder: str | os.PathLike) -> ml_collections.ConfigDict:
    """Settings of a run that starts from an imported model: its model, streams and tokenizer, all others at their
    defaults. For a file in `configs/`, which goes on to change what it likes. Raises UserError."""
    path = epath.Path(folder) / "config.json"
    try:
        stored = from_config_dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): import the model with `msllm convert`"
        ) from error
    settings = to_config_dict(
        Config(init_from=str(folder), model=stored.model, streams=stored.streams)
    )
    for name in FILE_NAMES.values():
        if (path.parent / name).exists():
            settings.data.tokenizer.path = str(path.parent / name)
    settings.data.tokenizer.silence = stored.data.tokenizer.silence
    return settings


def initial_parameters(
    path: str | os.PathLike, program: Program, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The parameters of a checkpoint, or of the newest one of a workdir, laid out for the program's mesh.

    A stream keeps the vector of the stream of its name; one that is new starts with the mean of all there are. Raises
    UserError if the parameters do not fit the program's model, naming those that do not, or the tokenizer.
    """
    restored, problem = None, None
    try:
        path = checkpoint_paths(path)[0]
        description = read_description(path)
        there = from_config_dict(description["config"])
        streams = StreamSpec.from_config(there.streams)
        _, shapes, axes = abstract_model(there.model, streams)
        _check_tokenizer(description["tokenizer"], tokenizer)
        _check_shapes(shapes, program.abstract_state.parameters)
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            parameter_shardings(axes, program.mesh),
        )
        restored = read_arrays(path / "parameters", abstract)
    except Exception as error:
        if is_no_damage(error) and not isinstance(error, UserError):
            raise
        problem = str(error)
    if any(problems := processes.all_gather_json(problem)):
        raise UserError(f"config.init_from is {path}: {next(filter(None, problems))}")
    try:
        check_sums({"parameters": restored}, description["checksums"])
    except ValueError as error:
        raise UserError(f"config.init_from is {path}: {error}; name another checkpoint") from error
    for key in SAME:
        if (was := getattr(there.model, key)) != (now := getattr(program.config.model, key)):
            log.warning(
                "config.model.%s is %r, and was %r when %s was trained", key, now, was, path
            )
    if program.config.model.stream_embedding:
        vectors = jax.jit(
            lambda old: stream_vectors(
                old, streams.names, program.streams.names, program.config.model.d_model
            ),
            out_shardings=program.state_shardings.parameters[STREAM_EMBEDDING],
        )
        restored[STREAM_EMBEDDING] = vectors(restored.get(STREAM_EMBEDDING))
    log.info("parameters are those of %s, step %d", path, description["step"])
    return restored


def stream_vectors(
    old: Any, old_names: tuple[str, ...], names: tuple[str, ...], d_model: int
) -> Any:
    """The stream embedding [S, D] of the streams `names`, numpy or jax, from that of others or None.

    Without one it is zero, so that nothing is added to the token embedding, as before.
    """
    if old is None:
        return jnp.zeros((len(names), d_model), jnp.float32)
    table = jnp.concatenate([old, jnp.mean(old, axis=0, keepdims=True)])
    return table[
        np.array([old_names.index(name) if name in old_names else len(old_names) for name in names])
    ]


def _check_shapes(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises UserError unless the parameters agree in all but the number of streams."""

    def by_name(tree):
        return {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}

    there, here = by_name(there), by_name(here)
    both = [name for name in there if name in here and name != STREAM_EMBEDDING]
    problems = [
        f"{name} is {there[name]} there, {here[name]} here"
        for name in both
        if there[name] != here[name]
    ]
    problems += [f"{name} is only there" for name in there if name not in here]
    problems += [
        f"{name} is only here" for name in here if name not in there and name != STREAM_EMBEDDING
    ]
    if problems:
        raise UserError(
            f"its parameters are not those of config.model ({'; '.join(problems)}): take config.model from it, with"
            " msllm.weights.warm_start.fine_tune"
        )


def _check_tokenizer(there: dict[str, Any] | None, tokenizer: Tokenizer) -> None:
    if there is None:
        log.warning(
            "the checkpoint to start from came without a tokenizer: nothing says that the data's is the same"
        )
        return
    found = hashlib.sha256(base64.b64decode(there["bytes"])).hexdigest()
    if found != tokenizer.hash:
        raise UserError(
            f"it has another tokenizer ({found[:12]}) than the data ({tokenizer.hash[:12]}): prepare the data with"
            " config.data.tokenizer.path"
        )
