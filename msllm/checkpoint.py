"""Self-contained checkpoints (docs/design.md, contract 5), written by Orbax in the background.

A checkpoint holds the parameters, the optimizer's state and a description: step, resolved config,
tokenizer and a checksum of every array. A checksum is the sum modulo 2^32 of an array's elements,
with their bits read as unsigned integers. It is computed on the devices, so it costs no file
traffic and does not depend on the mesh. A checkpoint whose checksums differ is not used.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from msllm.config import CheckpointConfig, Config, from_config_dict, to_json
from msllm.errors import RunError, UserError
from msllm.optim import path_name
from msllm.runtime import processes
from msllm.runtime.compiler import compiler_options
from msllm.runtime.files import describe_missing, digest_differs, with_digest
from msllm.step import Program, TrainState
from msllm.tokenizer import Tokenizer

FORMAT = 1
DIRECTORY = "checkpoints"  # inside a workdir
ARRAY_ITEMS = ("parameters", "rest")  # what a checkpoint holds besides its description
# Model settings that change how results are computed, but not the model. A run may change them.
HOW_TO_COMPUTE = ("attention", "remat", "kv_parts", "kv_ring")

log = logging.getLogger("msllm")


@functools.cache
def _checksum_function(platform: str) -> Callable[[list[jax.Array]], list[jax.Array]]:
    def bits(x: jax.Array) -> jax.Array:
        if x.dtype == bool:
            return x.astype(jnp.uint32)
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)

    def sums(arrays: list[jax.Array]) -> list[jax.Array]:
        return [jnp.sum(bits(x), dtype=jnp.uint32) for x in arrays]

    # With XLA's default options the CPU backend would copy every array.
    return jax.jit(sums, compiler_options=compiler_options(platform))


def checksums(items: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The checksum of every array in these trees, by item and path.

    One program computes all checksums, so that only one has to be loaded.
    """
    leaves = {name: jax.tree_util.tree_leaves_with_path(tree) for name, tree in items.items()}
    arrays = [array for pairs in leaves.values() for _, array in pairs]
    platform = next(iter(arrays[0].devices())).platform
    values = iter(_checksum_function(platform)(arrays))
    return {
        name: {path_name(path): int(next(values)) for path, _ in pairs}
        for name, pairs in leaves.items()
    }


@functools.cache
def _finiteness_function(platform: str) -> Callable[[list[jax.Array]], list[jax.Array]]:
    def finite(arrays: list[jax.Array]) -> list[jax.Array]:
        return [jnp.isfinite(x).all() for x in arrays]

    return jax.jit(finite, compiler_options=compiler_options(platform))


def non_finite(tree: Any) -> list[str]:
    """The paths of the arrays that hold a number that is not finite."""
    named = [
        (path_name(path), x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    platform = next(iter(named[0][1].devices())).platform
    finite = _finiteness_function(platform)([x for _, x in named])
    return [name for (name, _), good in zip(named, finite) if not good]


def refuse_patterns(path: str | os.PathLike, setting: str) -> None:
    """Raises UserError for a folder whose checkpoints could never be read.

    Orbax (0.12.8) searches the folder with a glob pattern that contains the folder's own path, and
    TensorStore treats a backslash as a slash.

    Args:
      path: the folder.
      setting: what names it, for the message.
    """
    if found := [c for c in "[]*?\\" if c in str(path)]:
        raise UserError(
            f"{setting} is {path}: checkpoints cannot be kept in a path with {' '.join(found)};"
            " choose another"
        )


def _split(state: TrainState) -> dict[str, Any]:
    """The state as the items ARRAY_ITEMS."""
    rest = {
        "step": state.step,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
        "in_row": state.skipped_in_row,
    }
    return {"parameters": state.parameters, "rest": rest}


def _absolute(path: str | os.PathLike) -> epath.Path:
    path = epath.Path(path)
    # Resolving an address in an object store would turn it into a local path.
    return path if "://" in str(path) else path.resolve()


def error_summary(error: Exception) -> str:
    """The first line of an error's message, or the error's type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def indicates_damage(error: Exception) -> bool:
    """Whether an error while reading a checkpoint comes from damaged files.

    Orbax, TensorStore and json raise many types of errors for damaged files. So every error counts
    as damage unless its cause is invalid input, the devices, or a lost process.
    """
    other_cause = isinstance(error, UserError | jax.errors.JaxRuntimeError)
    return not (other_cause or processes.is_peer_failure(error))


def describe(
    step: int, config: Config, tokenizer: Tokenizer | None, items: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """The description of a checkpoint.

    Args:
      step: steps done.
      config: all settings of the run.
      tokenizer: None if the model has none.
      items: the trees of arrays that the checkpoint holds, by name.
      **more: further entries.
    """
    stored = None
    if tokenizer:
        content = base64.b64encode(tokenizer.to_bytes()).decode()
        stored = {"kind": tokenizer.kind, "silence": tokenizer.silence, "bytes": content}
    return with_digest(
        {
            **more,
            "format": FORMAT,
            "step": step,
            "config": json.loads(to_json(config)),
            "tokenizer": stored,
            "checksums": checksums(items),
        }
    )


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # Only the training loop asks for preemption notices. Orbax would also ask when a checkpoint
        # is complete, with the step of that checkpoint. JAX would take this for the step that the
        # process has reached, and might agree to stop at a step that has already passed.
        return False


class _CheckpointFolder:
    """A folder of checkpoints that Orbax writes in the background.

    Attributes:
      directory: the folder.
    """

    def __init__(
        self,
        name: str,
        directory: epath.Path,
        multiprocessing: ocp.options.MultiprocessingOptions,
        **options: Any,
    ):
        """Opens the folder.

        Args:
          name: what the log calls these checkpoints.
          directory: the folder.
          multiprocessing: which processes write together.
          **options: further options of Orbax's CheckpointManager.
        """
        self._name, self.directory, self._multiprocessing = name, directory, multiprocessing
        # (step, abstract arrays) of the last checkpoint until it is read back
        self._unread: tuple[int, Any] | None = None
        refuse_patterns(directory, f"the folder of each {name}")
        directory.mkdir(parents=True, exist_ok=True)
        handlers: dict[str, Any] = {item: array_handler(multiprocessing) for item in ARRAY_ITEMS}
        handlers["description"] = ocp.JsonCheckpointHandler(multiprocessing_options=multiprocessing)
        self._manager = _Manager(
            directory,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(
                multiprocessing_options=multiprocessing, **options
            ),
        )

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, config: Config, tokenizer: Tokenizer) -> bool:
        """Writes a checkpoint of `state` in the background, unless its step has one already.

        A state with numbers that are not finite is not written, because it would in time replace
        the good checkpoints. When this returns, training may continue and donate the state.

        Returns:
          Whether the step has a checkpoint now, or will have it soon.

        Raises RunError if an earlier checkpoint could not be written, or cannot be read.
        """
        step, items = int(state.step), _split(state)
        if step in self._manager.all_steps():
            return True
        if bad := non_finite(items):
            log.warning(
                "no %s of step %d: %s and %d other arrays hold numbers that are not finite; the"
                " last good checkpoint stays",
                self._name,
                step,
                bad[0],
                len(bad) - 1,
            )
            return False
        description = describe(step, config, tokenizer, items, layout=_layout(state))
        arguments = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        arguments["description"] = ocp.args.JsonSave(description)
        begin = time.monotonic()
        try:
            self._manager.save(step, args=ocp.args.Composite(**arguments))
        except Exception as error:  # see check_for_errors
            self._raise_not_written(error)
        log.info(
            "%s of step %d: training waited %.2f s, the rest is written in the background",
            self._name,
            step,
            time.monotonic() - begin,
        )
        self._unread = step, {name: _smallest(tree) for name, tree in items.items()}
        return True

    def check_for_errors(self) -> None:
        """Raises RunError if a checkpoint could not be written in the background, or be read."""
        try:
            self._manager.check_for_errors()
        except Exception as error:  # a full or missing disk makes Orbax raise many types of errors
            self._raise_not_written(error)
        if self._unread and not self._manager.is_saving_in_progress():
            self._read_back()

    def close(self) -> None:
        """Waits until everything is written and could be read. Raises RunError if that fails."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # see check_for_errors
            self._raise_not_written(error)
        finally:
            self._manager.close()
        self._read_back()

    def _read_back(self) -> None:
        """Reads back the description and the smallest array of each item of the last checkpoint.

        This detects storage whose content cannot be read before the run depends on it. Reading back
        everything would need as much memory as the state.

        Raises RunError if something differs from what was written.
        """
        if not self._unread:
            return
        (step, abstract), self._unread = self._unread, None
        path = self.directory / str(step)
        try:
            expected = read_description(path)["checksums"]
            found = {
                name: read_arrays(path / name, tree, self._multiprocessing, partial=True)
                for name, tree in abstract.items()
                if tree
            }
            for name, tree in found.items():
                for key, x in jax.tree_util.tree_leaves_with_path(tree):
                    if expected[name][path_name(key)] != _checksum_on_host(x):
                        raise ValueError(f"a checksum in {name} differs")
        except Exception as error:  # see check_for_errors
            if processes.is_peer_failure(error):
                raise
            raise RunError(
                f"the checkpoint of step {step} was written to {self.directory} and cannot be read"
                f" ({error_summary(error)}): choose another storage for --workdir"
            ) from error

    def _raise_not_written(self, error: Exception) -> NoReturn:
        if processes.is_peer_failure(error):
            raise error
        complete = [
            int(path.name)
            for path in self.directory.iterdir()
            if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path)
        ]
        good = f"the one of step {max(complete)} is good" if complete else "there is none yet"
        reason = error_summary(error)
        raise RunError(
            f"a checkpoint could not be written to {self.directory} ({reason}): {good}; make room"
            " or repair the storage, and the same command continues from there"
        ) from error

    def _check_layout(self, description: dict[str, Any], program: Program) -> None:
        """Raises ValueError if the checkpoint cannot be read onto the program's mesh."""

    def _restore_step(self, step: int, program: Program, tokenizer: Tokenizer) -> TrainState:
        """Reads one checkpoint. Raises ValueError, in all processes, if it is damaged."""
        # The manager would make all processes wait for one that cannot read its part.
        path, restored, error = self.directory / str(step), {}, None
        try:
            description = read_description(path)
            _check_same_run(description, program.config, tokenizer, path)
            self._check_layout(description, program)
            for name, tree in _split(program.abstract_state).items():
                restored[name] = read_arrays(path / name, tree, self._multiprocessing)
        except Exception as problem:
            if not indicates_damage(problem):
                raise
            error = error_summary(problem)
        errors = [message for message in processes.all_gather_json(error) if message]
        if errors:
            raise ValueError(errors[0])
        check_sums(restored, description["checksums"])
        rest = restored["rest"]
        return TrainState(
            rest["step"], restored["parameters"], rest["opt_state"], rest["skipped"], rest["in_row"]
        )


class Checkpoints(_CheckpointFolder):
    """The checkpoints of a workdir. All processes write them together, and they fit any mesh."""

    def __init__(self, workdir: str | os.PathLike, config: CheckpointConfig):
        super().__init__(
            "checkpoint",
            _absolute(workdir) / DIRECTORY,
            ocp.options.MultiprocessingOptions(primary_host=0),
            max_to_keep=config.keep_last,
            keep_period=config.keep_every or None,
        )

    def restore(self, program: Program, tokenizer: Tokenizer) -> TrainState | None:
        """Reads the newest good checkpoint onto the program's mesh.

        Damaged ones are reported and moved to `checkpoints/damaged/`.

        Returns:
          The state; None if there is no checkpoint at all.

        Raises:
          UserError: the checkpoints belong to another model or tokenizer; or all of them are
            damaged, because a run never starts over by itself.
        """
        for leftover in self.directory.glob("*orbax-checkpoint-tmp*"):
            log.warning(
                "incomplete checkpoint %s is not used: writing it was interrupted",
                leftover.name,
            )
        steps = processes.all_gather_json(self.steps())[0]
        problems = []
        for step in reversed(steps):
            try:
                state = self._restore_step(step, program, tokenizer)
            except Exception as error:
                if not indicates_damage(error):
                    raise
                reason = error_summary(error)
                problems.append(f"step {step}: {reason}")
                log.warning("checkpoint of step %d is damaged and not used: %s", step, reason)
                continue
            self._move_aside([damaged for damaged in steps if damaged > step])
            return state
        if problems:
            raise UserError(
                f"none of the checkpoints in {self.directory} can be read ({'; '.join(problems)}):"
                " restore one from a copy, or start over with another --workdir"
            )
        return None

    def _move_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if processes.is_primary():
            for step in steps:
                target = self.directory / "damaged" / str(step)
                target.parent.mkdir(exist_ok=True)
                if target.exists():
                    target.rmtree()
                (self.directory / str(step)).rename(target)
        processes.all_gather_json(None)  # so that no process lists the folder while it changes
        self._manager.reload()


class LocalCheckpoints(_CheckpointFolder):
    """Checkpoints of a run on the hosts' own disks: fast to write, and lost with a host.

    Each process writes what its devices hold into a folder of its own. A restart needs the parts of
    all processes, and the same mesh. The last two checkpoints are kept, because a process may die
    before it has written its part of the newest one.
    """

    # Why not Orbax's own checkpoints on local disks (orbax.checkpoint.experimental.emergency): they
    # need at least two data-parallel replicas on different hosts, keep no local copy of the first
    # replica and have no checksums. The module also asks not to be used without approval.

    def __init__(self, workdir: str | os.PathLike, config: CheckpointConfig):
        """`config.local_dir` must be set."""
        run = hashlib.sha256(str(_absolute(workdir) / DIRECTORY).encode()).hexdigest()[:12]
        process = f"{jax.process_index()}-of-{jax.process_count()}"
        super().__init__(
            "local checkpoint",
            _absolute(config.local_dir) / run / process,
            ocp.options.MultiprocessingOptions(primary_host=None, barrier_sync_key_prefix="local"),
            max_to_keep=2,
            create=False,
            # Otherwise Orbax tells all processes that the folder exists once one of them has made
            # its own.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )

    def restore(
        self, program: Program, tokenizer: Tokenizer, newer_than: int = -1
    ) -> TrainState | None:
        """Reads the newest checkpoint that is good in all processes, and deletes the others.

        Returns:
          The state; None if there is no good checkpoint of a step after `newer_than`.

        Raises:
          UserError: the checkpoints belong to another model or tokenizer.
        """
        newer = [step for step in self.steps() if step > newer_than]
        everywhere = set.intersection(*map(set, processes.all_gather_json(newer)))
        state, restored = None, None
        for step in sorted(everywhere, reverse=True):
            try:
                state, restored = self._restore_step(step, program, tokenizer), step
                break
            except ValueError as error:
                log.warning(
                    "local checkpoint of step %d is not used: %s", step, error_summary(error)
                )
        # If one process kept a step that another one lacks, the other would write that step alone
        # and wait for the first.
        for path in self.directory.iterdir():
            if path.name != str(restored):
                path.rmtree()
        self._manager.reload()
        return state

    def _check_layout(self, description: dict[str, Any], program: Program) -> None:
        if description["layout"] != _layout(program.abstract_state):
            raise ValueError("it was written by other processes or on another mesh")


def array_handler(
    multiprocessing: ocp.options.MultiprocessingOptions | None = None,
) -> ocp.PyTreeCheckpointHandler:
    """The handler that writes and reads the arrays of all checkpoints.

    Args:
      multiprocessing: which processes write together. Without a primary host, each process writes
        everything that its devices hold, replicas included. None: all processes, with process 0 as
        the primary host.
    """
    multiprocessing = multiprocessing or ocp.options.MultiprocessingOptions()
    options: dict[str, Any] = {}
    if multiprocessing.primary_host is None:
        handler = ocp.type_handlers.ArrayHandler(
            primary_host=None, replica_id=None, use_replica_parallel=False
        )
        options["type_handler_registry"] = ocp.type_handlers.create_type_handler_registry(
            (jax.Array, handler)
        )
    return ocp.PyTreeCheckpointHandler(
        # Compression saves only 8 % of trained float32 values, and takes ten times the CPU time.
        use_compression=False,
        multiprocessing_options=multiprocessing,
        **options,
    )


def read_arrays(
    path: epath.Path,
    abstract: Any,
    multiprocessing: ocp.options.MultiprocessingOptions | None = None,
    partial: bool = False,
) -> Any:
    """Reads the arrays in `path`. Each process reads its part and waits for no other process.

    Args:
      path: an item of a checkpoint.
      abstract: a tree with the shapes, dtypes and shardings of the result.
      multiprocessing: as in `array_handler`.
      partial: whether the item may hold more arrays than `abstract`.
    """
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    return array_handler(multiprocessing).restore(
        path,
        args=ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=partial),
    )


def _checksum_on_host(x: jax.Array) -> int:
    """The checksum of a replicated array, by numpy: nothing is compiled in the middle of a run."""
    values = np.asarray(x.addressable_data(0)).reshape(-1)
    if values.dtype != bool:
        values = values.view(f"uint{8 * values.dtype.itemsize}")
    return int(values.sum(dtype=np.uint32))


def _smallest(tree: Any) -> Any:
    """The abstract form of the smallest replicated array, nested in dicts as in `tree`.

    Returns {} if no replicated array is in dicts alone.
    """
    leaves = [
        (path, x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if x.is_fully_replicated and all(hasattr(key, "key") for key in path)
    ]
    if not leaves:
        return {}
    path, x = min(leaves, key=lambda leaf: leaf[1].size)
    abstract: Any = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    for key in reversed(path):
        abstract = {key.key: abstract}
    return abstract


def _layout(state: Any) -> dict[str, Any]:
    """What a local checkpoint must have in common with the run that reads it."""
    mesh = state.step.sharding.mesh
    return {
        "mesh": dict(mesh.shape),
        "devices": [[d.process_index, d.id] for d in mesh.devices.flat],
    }


def read_description(path: epath.Path) -> dict[str, Any]:
    """Reads the description of a checkpoint.

    Raises:
      UserError: the format of the checkpoint is not FORMAT.
      Exception: the description is damaged; see `indicates_damage`.
    """
    description = ocp.JsonCheckpointHandler().restore(path / "description")
    if not isinstance(description, dict) or digest_differs(description):
        raise ValueError("its description does not match its digest")
    if description["format"] != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {description['format']}: this version of msllm reads"
            f" {FORMAT}"
        )
    return description


def check_sums(items: dict[str, Any], expected: dict[str, dict[str, int]]) -> None:
    """Raises ValueError if the arrays do not have the expected checksums (by item and path)."""
    for name, found in checksums(items).items():
        wrong = [path for path in expected[name] if found.get(path) != expected[name][path]]
        if wrong or len(found) != len(expected[name]):
            what = wrong[0] if wrong else "an array"
            raise ValueError(f"checksum of {what} differs: its file was changed or cut")


def _check_same_run(
    description: dict[str, Any], config: Config, tokenizer: Tokenizer, path: epath.Path
) -> None:
    """Raises UserError if a checkpoint does not fit the config. Warns of other changes."""
    # Converted to a Config first: settings that are newer than the checkpoint had their defaults.
    stored = json.loads(to_json(from_config_dict(description["config"])))
    current = json.loads(to_json(config))
    different = [
        f"{section}.{key} is {stored[section].get(key)!r} there and"
        f" {current[section].get(key)!r} here"
        for section in ("model", "streams")
        for key in sorted(stored[section].keys() | current[section].keys())
        if stored[section].get(key) != current[section].get(key) and key not in HOW_TO_COMPUTE
    ]
    if different:
        raise UserError(
            f"checkpoint {path} is of another model ({'; '.join(different)}): use the same config,"
            " or another --workdir"
        )
    was, now = stored["optim"]["optimizer"], current["optim"]["optimizer"]
    if was != now:
        raise UserError(
            f"checkpoint {path} holds the state of another optimizer (config.optim.optimizer is"
            f" {was!r} there and {now!r} here): use the same, or start another --workdir with"
            f" --config.init_from={path}"
        )
    there = hashlib.sha256(base64.b64decode(description["tokenizer"]["bytes"])).hexdigest()
    if there != tokenizer.hash:
        raise UserError(
            f"checkpoint {path} was trained with another tokenizer ({there[:12]}, the data has"
            f" {tokenizer.hash[:12]}): use the data it was trained on, or another --workdir"
        )
    for section in ("data", "optim", "loss"):
        for key in sorted(stored[section]):
            was, now = stored[section][key], current[section].get(key)
            if key == "options" and isinstance(now, dict):
                was = now | was  # earlier versions did not store options that had their defaults
            if was != now and key != "dir":
                log.warning(
                    "config.%s.%s was %r when the checkpoint was written and is %r now",
                    section,
                    key,
                    was,
                    now,
                )


def checkpoint_paths(path: str | os.PathLike) -> list[epath.Path]:
    """The checkpoints at a path, newest first.

    Args:
      path: a workdir, or one of its checkpoints.

    Raises UserError if there is no checkpoint.
    """
    path = _absolute(path)
    path = path / DIRECTORY if (path / DIRECTORY).is_dir() else path
    if (path / "description").is_dir():
        return [path]
    found = [p for p in path.iterdir() if p.name.isdigit()] if path.is_dir() else []
    if not found:
        there = ""
        if "://" not in str(path) and not path.exists():
            there = f", which does not exist ({describe_missing(path)})"
        raise UserError(
            f"there is no checkpoint in {path}{there}: give a workdir of `msllm train` or one of"
            " its checkpoints"
        )
    return sorted(found, key=lambda p: -int(p.name))
