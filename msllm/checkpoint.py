"""Self-contained checkpoints (design: contract 5), written by Orbax in the background.

A checkpoint holds the parameters, the optimizer's state and a description: step, resolved config, tokenizer and a
checksum of every array. The checksums are sums modulo 2^32 over the arrays' bits, computed where the arrays live, so
they cost no file traffic and do not depend on the mesh; a checkpoint that does not add up is not used.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import logging
import os
import time
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from msllm.config import CheckpointConfig, Config, from_config_dict, to_json
from msllm.errors import RunError, UserError
from msllm.optim import path_name
from msllm.runtime import processes
from msllm.runtime.compiler import compiler_options
from msllm.step import Program, TrainState
from msllm.tokenizer import Tokenizer

FORMAT = 1
DIRECTORY = "checkpoints"  # inside a workdir
ITEMS = ("parameters", "rest", "description")

log = logging.getLogger("msllm")


@functools.cache
def _checksums(platform: str):
    def bits(x):
        return (
            jax.lax.bitcast_convert_type(x, jnp.uint32)
            if x.dtype.itemsize == 4
            else x.astype(jnp.uint32)
        )

    def sums(arrays):
        return [jnp.sum(bits(x), dtype=jnp.uint32) for x in arrays]

    return jax.jit(
        sums, compiler_options=compiler_options(platform)
    )  # the defaults copy every array on CPU


def checksums(items: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Checksum of every array of these trees, by name and path; one program for all, so that only one has to be loaded."""
    leaves = {name: jax.tree_util.tree_leaves_with_path(tree) for name, tree in items.items()}
    arrays = [array for pairs in leaves.values() for _, array in pairs]
    values = iter(_checksums(next(iter(arrays[0].devices())).platform)(arrays))
    return {
        name: {path_name(path): int(next(values)) for path, _ in pairs}
        for name, pairs in leaves.items()
    }


def _split(state: TrainState) -> dict[str, Any]:
    rest = {
        "step": state.step,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
        "in_row": state.skipped_in_row,
    }
    return {"parameters": state.parameters, "rest": rest}


def _absolute(path: str | os.PathLike) -> epath.Path:
    path = epath.Path(path)
    return (
        path if "://" in str(path) else path.resolve()
    )  # of an address in an object store that makes a local path


def first_line(error: Exception) -> str:
    """What an error says first; its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def is_no_damage(error: Exception) -> bool:
    """Whether reading a checkpoint failed for another reason than its files: those give whatever orbax, tensorstore and
    json say of them."""
    return isinstance(error, UserError | jax.errors.JaxRuntimeError) or processes.is_peer_failure(
        error
    )


def _digest(description: dict[str, Any]) -> str:
    content = {key: value for key, value in description.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe(
    step: int, config: Config, tokenizer: Tokenizer | None, items: dict[str, Any], **more
) -> dict[str, Any]:
    """The description of a checkpoint that holds these items; `more` is added to it."""
    data = base64.b64encode(tokenizer.to_bytes()).decode() if tokenizer else None
    stored = tokenizer and {"kind": tokenizer.kind, "silence": tokenizer.silence, "bytes": data}
    settings, sums = json.loads(to_json(config)), checksums(items)
    more |= {
        "format": FORMAT,
        "step": step,
        "config": settings,
        "tokenizer": stored,
        "checksums": sums,
    }
    return more | {"digest": _digest(more)}


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # The training loop alone asks that. Orbax asks again when a checkpoint is complete, for its old step: JAX takes
        # that for how far this process is, and if the notice comes then, agrees on a stop that this process has passed.
        return False


class Checkpoints:
    """The checkpoints of one workdir; or quicker ones of the same run, on the disks of its hosts.

    The latter outlive the processes, not the hosts: each process writes what its devices hold, and all must have theirs
    for a restart, on the same mesh.
    """

    def __init__(self, workdir: str | os.PathLike, config: CheckpointConfig, local: bool = False):
        """`local`: those in `config.local_dir`, of which the last two stay: a process may die before it has its part."""
        self._local, self.directory = local, _absolute(workdir) / DIRECTORY
        if local:
            run = hashlib.sha256(str(self.directory).encode()).hexdigest()[:12]
            self.directory = (
                _absolute(config.local_dir)
                / run
                / f"{jax.process_index()}-of-{jax.process_count()}"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        processes = ocp.options.MultiprocessingOptions(
            primary_host=None if local else 0, barrier_sync_key_prefix="local" if local else None
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2 if local else config.keep_last,
            keep_period=config.keep_every or None if not local else None,
            create=not local,
            multiprocessing_options=processes,
            # Orbax tells "the folder is made" to all processes at once, also to one whose own folder is still missing.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=not local),
        )
        self._processes = processes
        handlers = {name: array_handler(processes) for name in ITEMS[:-1]}
        handlers[ITEMS[-1]] = ocp.JsonCheckpointHandler(multiprocessing_options=processes)
        self._manager = _Manager(self.directory, item_handlers=handlers, options=options)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, config: Config, tokenizer: Tokenizer) -> None:
        """Writes a checkpoint of `state` in the background. Training may go on, and donate the state, at once."""
        step, items = int(state.step), _split(state)
        if step in self._manager.all_steps():
            return
        description = describe(step, config, tokenizer, items, layout=_layout(state))
        save = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        begin = time.monotonic()
        try:
            self._manager.save(
                step, args=ocp.args.Composite(description=ocp.args.JsonSave(description), **save)
            )
        except Exception as error:  # see check
            self._raise_not_written(error)
        said = ("local " if self._local else "", step, time.monotonic() - begin)
        log.info(
            "%scheckpoint of step %d: training waited %.2f s, the rest is written beside it", *said
        )

    def check(self) -> None:
        """Raises RunError if a checkpoint that was being written in the background could not be."""
        try:
            self._manager.check_for_errors()
        except (
            Exception
        ) as error:  # whatever orbax and tensorstore say of a disk that is full or gone
            self._raise_not_written(error)

    def _raise_not_written(self, error: Exception) -> NoReturn:
        if processes.is_peer_failure(error):
            raise error
        reason = first_line(error)
        complete = [path for path in self.directory.iterdir() if path.name.isdigit()]
        good = max(
            (int(path.name) for path in complete if ocp.utils.is_checkpoint_finalized(path)),
            default=None,
        )
        kept = f"the one of step {good} is good" if good is not None else "there is none yet"
        raise RunError(
            f"a checkpoint could not be written to {self.directory} ({reason}): {kept}; make room or repair the storage, "
            "and the same command continues from there"
        ) from error

    def restore(self, program: Program, tokenizer: Tokenizer, after: int = -1) -> TrainState | None:
        """The newest good checkpoint, laid out for the program's mesh; None where there is no checkpoint at all, or none
        of a step after `after`.

        Damaged ones are moved aside, to `checkpoints/damaged/`, and reported. Raises UserError if the checkpoints
        belong to another model or tokenizer, or if there are some but none is good: a run never starts over silently.
        Local ones are given up without more ado: they are deleted, and those in the workdir decide.
        """
        for leftover in self.directory.glob("*orbax-checkpoint-tmp*"):
            log.warning(
                "incomplete checkpoint %s: its writing was interrupted; it is not used",
                leftover.name,
            )
        everyone, problems = processes.all_gather_json([step for step in self.steps() if step > after]), []
        if self._local:
            return self._restore_local(
                sorted(set(everyone[0]).intersection(*everyone)), program, tokenizer
            )
        steps = everyone[0]
        for step in reversed(steps):
            try:
                state = self._restore_step(step, program, tokenizer)
            except Exception as error:
                if is_no_damage(error):
                    raise
                reason = first_line(error)
                problems.append(f"step {step}: {reason}")
                log.warning("checkpoint of step %d is damaged and not used: %s", step, reason)
                continue
            self._move_aside([bad for bad in steps if bad > step])
            return state
        if problems:
            raise UserError(
                f"none of the checkpoints in {self.directory} can be read ({'; '.join(problems)}): restore one from a "
                "copy, or start over with another --workdir"
            )
        return None

    def _restore_local(
        self, steps: list[int], program: Program, tokenizer: Tokenizer
    ) -> TrainState | None:
        state = None
        while steps and state is None:
            step = steps.pop()
            try:
                state = self._restore_step(step, program, tokenizer)
            except ValueError as error:
                log.warning("local checkpoint of step %d is not used: %s", step, first_line(error))
        # What one process has and another lacks would be written anew by the other alone, which would wait for the first.
        for path in self.directory.iterdir():
            if state is None or path.name != str(step):
                path.rmtree()
        self._manager.reload()
        return state

    def _restore_step(self, step: int, program: Program, tokenizer: Tokenizer) -> TrainState:
        # Without the manager: it makes all processes wait for one that cannot read its part.
        path, restored, error = self.directory / str(step), {}, None
        try:
            description = read_description(path)
            _check_same_run(description, program.config, tokenizer, path)
            if self._local and description["layout"] != _layout(program.abstract_state):
                raise ValueError("it was written by other processes or another mesh")
            for name, tree in _split(program.abstract_state).items():
                restored[name] = read_arrays(path / name, tree, self._processes)
        except Exception as problem:
            if is_no_damage(problem):
                raise
            error = first_line(problem)
        if any(errors := processes.all_gather_json(error)):
            raise ValueError(next(filter(None, errors)))
        check_sums(restored, description["checksums"])
        rest = restored["rest"]
        return TrainState(
            rest["step"], restored["parameters"], rest["opt_state"], rest["skipped"], rest["in_row"]
        )

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
        processes.all_gather_json(None)  # nobody looks for what is there while it changes
        self._manager.reload()

    def close(self) -> None:
        """Waits until everything is written. Raises RunError if it cannot be."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # see check
            self._raise_not_written(error)
        finally:
            self._manager.close()


def array_handler(processes=ocp.options.MultiprocessingOptions()) -> ocp.PyTreeCheckpointHandler:
    """Writes and reads arrays as all checkpoints hold them."""
    types = ocp.type_handlers.create_type_handler_registry(
        # Where every process keeps a folder of its own, each one writes all that it holds, replicas too.
        (
            jax.Array,
            ocp.type_handlers.ArrayHandler(
                primary_host=None, replica_id=None, use_replica_parallel=False
            ),
        )
    )
    return ocp.PyTreeCheckpointHandler(
        # Float32 that has been trained hardly compresses: to try takes ten times the CPU time of writing, for 8 %.
        use_compression=False,
        multiprocessing_options=processes,
        **({"type_handler_registry": types} if processes.primary_host is None else {}),
    )


def read_arrays(
    path: epath.Path, abstract: Any, processes=ocp.options.MultiprocessingOptions()
) -> Any:
    """The arrays in `path`, in the shapes and layout of `abstract`; only this process reads, and waits for no other."""
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    return array_handler(processes).restore(
        path, args=ocp.args.PyTreeRestore(abstract, restore_args=arguments)
    )


def _layout(state: Any) -> dict[str, Any]:
    """What a local checkpoint must have in common with the run that reads it."""
    mesh = state.step.sharding.mesh
    return {
        "mesh": dict(mesh.shape),
        "devices": [[d.process_index, d.id] for d in mesh.devices.flat],
    }


def read_description(path: epath.Path) -> dict[str, Any]:
    """The description of a checkpoint. Raises UserError, and whatever its damage makes orbax and json raise."""
    description = ocp.JsonCheckpointHandler().restore(path / "description")
    if not isinstance(description, dict) or _digest(description) != description.get("digest"):
        raise ValueError("its description does not match its digest")
    if description["format"] != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {description['format']}: this version of msllm reads {FORMAT}"
        )
    return description


def check_sums(items: dict[str, Any], expected: dict[str, dict[str, int]]) -> None:
    """Raises ValueError if the arrays of these trees are not those of which `expected` has the checksums."""
    for name, found in checksums(items).items():
        wrong = [path for path in expected[name] if found.get(path) != expected[name][path]]
        if wrong or len(found) != len(expected[name]):
            raise ValueError(
                f"checksum of {wrong[0] if wrong else 'an array'} differs: its file was changed or cut"
            )


def _check_same_run(
    description: dict[str, Any], config: Config, tokenizer: Tokenizer, path: epath.Path
) -> None:
    # Settings that are newer than the checkpoint had their defaults.
    stored, current = (
        json.loads(to_json(from_config_dict(description["config"]))),
        json.loads(to_json(config)),
    )
    different = [
        f"{section}.{key} is {stored[section].get(key)!r} there and {current[section].get(key)!r} here"
        for section in ("model", "streams")
        for key in sorted(stored[section].keys() | current[section].keys())
        if stored[section].get(key) != current[section].get(key)
        and key not in ("attention", "remat", "kv_parts", "kv_ring")
    ]
    if different:
        raise UserError(
            f"checkpoint {path} is of another model ({'; '.join(different)}): use the same config, or another --workdir"
        )
    there = hashlib.sha256(base64.b64decode(description["tokenizer"]["bytes"])).hexdigest()
    if there != tokenizer.hash:
        raise UserError(
            f"checkpoint {path} was trained with another tokenizer ({there[:12]}, the data has {tokenizer.hash[:12]}): "
            "use the data it was trained on, or another --workdir"
        )
    for section in ("data", "optim", "loss"):
        for key in sorted(stored[section]):
            if stored[section][key] != current[section].get(key) and key != "dir":
                log.warning(
                    "config.%s.%s was %r when the checkpoint was written and is %r now",
                    section, key, stored[section][key], current[section].get(key),
                )  # fmt: skip


def checkpoint_paths(path: str | os.PathLike) -> list[epath.Path]:
    """The one checkpoint that `path` is, or those of a workdir, newest first. Raises UserError if there is none."""
    path = _absolute(path)
    path = path / DIRECTORY if (path / DIRECTORY).is_dir() else path
    if (path / "description").is_dir():
        return [path]
    found = [p for p in path.iterdir() if p.name.isdigit()] if path.is_dir() else []
    if not found:
        raise UserError(
            f"there is no checkpoint in {path}: give a workdir of `msllm train` or one of its checkpoints"
        )
    return sorted(found, key=lambda p: -int(p.name))
