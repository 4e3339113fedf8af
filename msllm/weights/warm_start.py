"""Starts a run from an existing model: imported folders and `config.init_from`."""

from __future__ import annotations

import base64
import functools
import hashlib
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
    indicates_damage,
    read_arrays,
    read_description,
    refuse_patterns,
)
from msllm.config import (
    Config,
    ModelConfig,
    code_named_by,
    from_config_dict,
    to_config_dict,
    to_json,
)
from msllm.errors import UserError
from msllm.groups import expand
from msllm.model.model import abstract_model, init_parameters, parameter_shardings
from msllm.optim import path_name
from msllm.runtime import processes
from msllm.runtime.files import read_object
from msllm.step import Program
from msllm.streams import StreamSpec
from msllm.tokenizer import FILE_NAMES, Tokenizer

STREAM_EMBEDDING = "stream_embedding"
COMBINE = "combine"
# The folder inside an imported model for the files beside its weights. A run that starts from the
# model keeps a copy in its workdir, and an export writes them again.
ORIGIN = "hf"
# Settings that change what a model computes, but not the shapes of its parameters.
INVISIBLE_SETTINGS = ("norm_eps", "rope_theta", "rope_scaling")

log = logging.getLogger("msllm")


def write_model(
    folder: str | os.PathLike,
    config: Config,
    parameters: dict[str, Any],
    tokenizer: Tokenizer | None,
) -> None:
    """Writes a checkpoint of step 0 without optimizer state, with the config and the tokenizer.

    Args:
      folder: an empty folder. `load`, `fine_tune` and `config.init_from` read it afterwards.
      config: a config with the model and streams of the parameters.
      parameters: nested dicts of arrays.
      tokenizer: the tokenizer; None if the model has none.
    """
    root = epath.Path(folder)
    refuse_patterns(root, "the folder of the model")
    arrays = jax.tree.map(jnp.asarray, parameters)
    description = describe(0, config, tokenizer, {"parameters": arrays})
    with ocp.Checkpointer(array_handler()) as writer:
        writer.save(root / "parameters", args=ocp.args.PyTreeSave(arrays))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(root / "description", args=ocp.args.JsonSave(description))
    (root / "config.json").write_text(to_json(config))
    if tokenizer:
        (root / FILE_NAMES[tokenizer.kind]).write_bytes(tokenizer.to_bytes())


def fine_tune(folder: str | os.PathLike) -> ml_collections.ConfigDict:
    """Returns settings for a run that starts from an imported model.

    The model, streams and tokenizer are those of the import. All other settings have their
    defaults. A config file calls this instead of `default_config`, and then changes settings.

    Args:
      folder: the folder that `msllm convert` wrote.

    Raises UserError if there is no imported model in the folder, or if its config names code.
    """
    path = epath.Path(folder) / "config.json"
    try:
        stored = from_config_dict(read_object(path, "import the model again"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error}): import the model with `msllm convert`"
        ) from error
    config = Config(init_from=str(folder), model=stored.model, streams=stored.streams)
    for setting, code in code_named_by(config).items():
        raise UserError(
            f"{setting} of {path} is {code!r}: a run would import this code; if you trust it, write"
            " a config that names it and sets init_from"
        )
    settings = to_config_dict(config)
    for name in FILE_NAMES.values():
        if (path.parent / name).exists():
            settings.data.tokenizer.path = str(path.parent / name)
    settings.data.tokenizer.silence = stored.data.tokenizer.silence
    return settings


def initial_parameters(
    path: str | os.PathLike, program: Program, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Returns the parameters of a checkpoint, sharded for the program's mesh.

    In the stream embedding, a stream or group gets the vector of the one with the same name. A
    stream with a new name gets the mean of all vectors. All processes of a run call this together.

    Args:
      path: a checkpoint, or a workdir, whose newest checkpoint is used.
      program: the program of the run.
      tokenizer: the tokenizer of the run's data.

    Raises UserError if parameters do not fit the program's model (the message names them), if the
    checkpoint has another tokenizer, or if it cannot be read.
    """
    parameters: dict[str, Any] = {}
    problem = None
    try:
        path = checkpoint_paths(path)[0]
        description = read_description(path)
        parameters = _read_parameters(path, description, program, tokenizer)
    except Exception as error:  # for damaged files, orbax and tensorstore raise many types
        if not indicates_damage(error) and not isinstance(error, UserError):
            raise
        problem = str(error)
    # If one process fails, all must raise: the others would wait for it in the checksums below.
    if problems := [shared for shared in processes.all_gather_json(problem) if shared]:
        raise UserError(f"config.init_from is {path}: {problems[0]}")
    try:
        check_sums({"parameters": parameters}, description["checksums"])
    except ValueError as error:
        raise UserError(f"config.init_from is {path}: {error}; name another checkpoint") from error
    stored = from_config_dict(description["config"])
    _warn_of_other_settings(stored.model, program.config.model, path)
    if program.config.model.stream_embedding:
        vectors = functools.partial(
            stream_vectors,
            old_names=expand(stored.streams.names).class_names,
            names=program.streams.roster.class_names,
            d_model=program.config.model.d_model,
        )
        sharding = program.state_shardings.parameters[STREAM_EMBEDDING]
        old = parameters.get(STREAM_EMBEDDING)
        parameters[STREAM_EMBEDDING] = jax.jit(vectors, out_shardings=sharding)(old)
    if program.streams.combine and COMBINE not in parameters:
        parameters[COMBINE] = _new_weights(program)
    log.info("starting from the parameters of %s, step %d", path, description["step"])
    return parameters


def _new_weights(program: Program) -> dict[str, Any]:
    """The initial weights of `config.streams.combine`, for a model that has none yet."""
    log.info("the weights of config.streams.combine are new")

    def weights() -> dict[str, Any]:
        config = program.config
        return init_parameters(config.model, program.streams, config.seed)[COMBINE]

    shardings = program.state_shardings.parameters[COMBINE]
    return jax.jit(weights, out_shardings=shardings)()


def keep_origin(model: str | os.PathLike, workdir: epath.Path) -> None:
    """Copies the folder ORIGIN of the model that a run starts from into the run's workdir.

    An export of the run then needs neither the model nor the folder that the run was started in.
    """
    for folder in origin_folders(model):
        for file in folder.iterdir():
            (workdir / ORIGIN).mkdir(exist_ok=True)
            (workdir / ORIGIN / file.name).write_bytes(file.read_bytes())
        return


def origin_folders(path: str | os.PathLike) -> list[epath.Path]:
    """The folder ORIGIN of a model, a workdir or a checkpoint in a workdir, or no folder."""
    root = epath.Path(path)
    return [
        folder / ORIGIN
        for folder in (root, root.parent.parent)
        if (folder / ORIGIN / "config.json").exists()
    ][:1]


def stream_vectors(
    old: Any, old_names: tuple[str, ...], names: tuple[str, ...], d_model: int
) -> Any:
    """Returns the stream embedding [S, D] of the streams `names`, made from an existing one.

    Args:
      old: the stream embedding of the streams `old_names`, numpy or jax. None: the model has none;
        the result is zero, so that the model computes the same as before.
      old_names: the names of the existing streams.
      names: the names of the new streams. A name that is not in `old_names` gets the mean of the
        existing vectors.
      d_model: D.
    """
    if old is None:
        return jnp.zeros((len(names), d_model), jnp.float32)
    table = jnp.concatenate([old, jnp.mean(old, axis=0, keepdims=True)])
    mean = len(old_names)
    rows = [old_names.index(name) if name in old_names else mean for name in names]
    return table[np.array(rows)]


def _read_parameters(
    path: epath.Path, description: dict[str, Any], program: Program, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Returns the parameters of a checkpoint on the program's mesh, with its own streams."""
    stored = from_config_dict(description["config"])
    if stored.model.block != program.config.model.block:  # otherwise the run has imported it
        raise UserError(
            f"its config.model.block is {stored.model.block!r}, but that of the run is"
            f" {program.config.model.block!r}: both must be the same"
        )
    streams = StreamSpec.from_config(stored.streams)
    _, shapes, axes = abstract_model(stored.model, streams)
    _check_tokenizer(description["tokenizer"], tokenizer)
    _check_combine(streams, program.streams)
    _check_shapes(shapes, program.abstract_state.parameters)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        parameter_shardings(axes, program.mesh),
    )
    return read_arrays(path / "parameters", abstract)


def _check_tokenizer(stored: dict[str, Any] | None, tokenizer: Tokenizer) -> None:
    """Raises UserError if the tokenizer in a checkpoint's description differs from the data's."""
    if stored is None:
        log.warning(
            "the checkpoint to start from has no tokenizer, so it cannot be compared with that of"
            " the data"
        )
        return
    found = hashlib.sha256(base64.b64decode(stored["bytes"])).hexdigest()
    if found != tokenizer.hash:
        raise UserError(
            f"it has another tokenizer ({found[:12]}) than the data ({tokenizer.hash[:12]}):"
            " prepare the data with its tokenizer (config.data.tokenizer.path)"
        )


def _check_combine(stored: StreamSpec, current: StreamSpec) -> None:
    """Raises UserError if the weights of the streams' sources belong to other rules."""
    there, here = (
        [
            (streams.names[rule.stream], group or streams.names[source])
            for rule in streams.combine
            for source, group in zip(rule.sources, rule.groups or ("",) * len(rule.sources))
        ]
        for streams in (stored, current)
    )
    there, here = list(dict.fromkeys(there)), list(dict.fromkeys(here))
    if there and there != here:
        raise UserError(
            f"its config.streams.combine has the (stream, source) pairs {there}, and that of the"
            f" run {here}: use the same, whose mode may differ"
        )


def _check_shapes(stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError unless the parameters have the same shapes, up to the number of streams."""
    there, here = _shapes_by_name(stored), _shapes_by_name(current)
    problems = []
    for name in there:
        if name not in here:
            problems.append(f"{name} is only there")
        elif there[name] != here[name] and name != STREAM_EMBEDDING:
            problems.append(f"{name} is {there[name]} there, {here[name]} here")
    for name in here:
        is_new = name == STREAM_EMBEDDING or name.startswith(f"{COMBINE}/")
        if name not in there and not is_new:
            problems.append(f"{name} is only here")
    if problems:
        of_groups = any("stream_embedding_identities" in problem for problem in problems)
        also = " and config.streams.identities" if of_groups else ""
        raise UserError(
            f"its parameters are not those of config.model{also} ({'; '.join(problems)}): use its"
            f" config.model{also}, with msllm.weights.warm_start.fine_tune"
        )


def _shapes_by_name(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _warn_of_other_settings(stored: ModelConfig, current: ModelConfig, path: epath.Path) -> None:
    for key in INVISIBLE_SETTINGS:
        before, now = getattr(stored, key), getattr(current, key)
        if before != now:
            log.warning(
                "config.model.%s is %r, and was %r when %s was trained", key, now, before, path
            )
