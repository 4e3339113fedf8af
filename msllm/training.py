"""Training: opens a run, restores or initialises its state, and loops over the steps.

Calling `train` again continues the run. Ctrl-C, SIGTERM or a preemption notice ends it after the
current step, with a checkpoint. On a cluster every process makes the same call (docs/pods.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
from etils import epath

import msllm
from msllm import flow
from msllm.checkpoint import Checkpoints, LocalCheckpoints, refuse_patterns
from msllm.config import Config, to_config_dict, to_json
from msllm.data.global_batch import global_batches
from msllm.data.identity import with_stored_options
from msllm.data.loader import Loader
from msllm.data.mixture import by_source
from msllm.data.records import file_hash
from msllm.errors import UserError
from msllm.hooks import (
    Announce,
    CheckStop,
    Evaluate,
    Hook,
    LogExamples,
    Profile,
    ReadMetrics,
    Run,
    SaveCheckpoints,
)
from msllm.metrics import MetricsWriters, MixtureShares
from msllm.monitor import Goodput, Monitor
from msllm.runtime import processes
from msllm.runtime.compiler import compile_step, enable_compilation_cache
from msllm.runtime.environment import refuse_x64
from msllm.runtime.files import write_atomically
from msllm.runtime.progress import Progress
from msllm.sharding import make_mesh
from msllm.step import Program, TrainState
from msllm.streams import StreamSpec, resolve_visibility
from msllm.tokenizer import Tokenizer, resolve_token_sets
from msllm.weights.warm_start import initial_parameters, keep_origin

log = logging.getLogger("msllm")


def train(
    config: Config,
    workdir: str | os.PathLike,
    hooks: Sequence[Hook] = (),
    *,
    stop: processes.StopSignal | None = None,
    seconds_before: float = 0.0,
) -> TrainState:
    """Trains the run in `workdir` up to step `config.steps`. Continues a run that has begun.

    In a run of several processes (`processes.connect`) all processes call this, with the same
    config and hooks, and a workdir that they share.

    Args:
      config: all settings.
      workdir: the folder of the run, for checkpoints, metrics and the resolved config. It is
        created if it does not exist.
      hooks: hooks of the caller. They are called after msllm's own hooks (`msllm.hooks`).
      stop: decides when to stop early; None: on Ctrl-C, SIGTERM or a preemption notice.
      seconds_before: how long this process has been running, for the goodput.

    Returns:
      The state after the last step.

    Raises:
      UserError: the config, data, workdir or checkpoints are invalid; or too many updates in a row
        were skipped (`config.optim.max_skipped`).
      RunError: the run cannot continue, for example because the disk is full.
    """
    refuse_x64()
    config = resolve_visibility(config)
    workdir = open_workdir(workdir)
    with (
        _without_empty_workdir(workdir),
        processes.exclusive_workdir(workdir),
        contextlib.ExitStack() as stack,
    ):
        # Open the run: data, mesh, program, checkpoints.
        goodput = Goodput(workdir / "goodput.json", seconds_before)
        enable_compilation_cache(config.compilation_cache, workdir / "compiled")
        streams = StreamSpec.from_config(config.streams)
        loader, held_out = _open_data(config, streams)
        data = with_stored_options(config.data, loader.manifest)
        config = dataclasses.replace(config, data=data)
        config = with_vocabulary(config, loader.tokenizer.vocab_size)
        config = resolve_token_sets(config, loader.tokenizer)
        streams = StreamSpec.from_config(config.streams)
        mesh = make_mesh(config.mesh)
        program = Program(
            config, streams, mesh, loader.tokenizer.silence_id, weighted=loader.has_weights
        )
        evaluate = Evaluate(config)
        checkpoints = Checkpoints(workdir, config.checkpoint)
        local = (
            LocalCheckpoints(workdir, config.checkpoint) if config.checkpoint.local_dir else None
        )

        # Restore or initialise its state.
        with goodput.inside("restore"):
            state = _restore_or_initialise(program, loader.tokenizer, checkpoints, local, workdir)
        start = int(state.step)
        goodput.restored(start)
        goodput.write()
        if start >= config.steps:
            log.info(
                "nothing to do: the run in %s is at step %d of %d; increase config.steps to train"
                " it further, or give another --workdir to start a new run",
                workdir,
                start,
                config.steps,
            )
            checkpoints.close()
            if local:
                local.close()
            return state
        if processes.is_primary():
            write_atomically(workdir / "config.json", to_json(config))
            for line in flow.summary(streams, config.model.vocab_size):
                log.info("%s", line)
        stack.callback(goodput.write)
        writers = MetricsWriters(workdir, config)
        stack.callback(writers.close)
        with goodput.inside("compile"):
            step = compile_step(program.step, program.abstract_state, program.abstract_batch)

        # Loop over the steps. Leaving the `with` block completes the last checkpoint.
        stop = stack.enter_context(stop or processes.StopSignal())
        monitor = _open_monitor(program, writers, goodput, loader, start)
        stack.callback(monitor.progress.close)
        stack.callback(checkpoints.close)
        if local:
            stack.callback(local.close)
        run = Run(config, workdir, program, loader, held_out, monitor, state, step=start)
        run.hooks = [
            *([LogExamples()] if config.monitor.examples else []),
            ReadMetrics(),
            Announce(step),
            CheckStop(stop),
            SaveCheckpoints(checkpoints, local),
            evaluate,
            *([Profile(config)] if config.monitor.profile_start else []),
            *hooks,
        ]
        for hook in run.hooks:
            stack.callback(hook.close, run)
        with processes.exit_on_error():
            _loop(run, step)
    return run.state


def _loop(run: Run, step: jax.stages.Compiled) -> None:
    """Runs steps until the run is complete or asked to stop."""
    goodput, last = run.monitor.goodput, run.config.steps
    batches = global_batches(run.loader, run.program.abstract_batch, range(run.step, last))
    for hook in run.hooks:
        hook.at_start(run)
    goodput.begin("steps")
    while run.step < last and not run.stopping:
        with goodput.inside("data"):
            run.tables, batch = next(batches)
        run.state, metrics = step(run.state, batch)
        run.step += 1
        for hook in run.hooks:
            if hook.every and (run.step % hook.every == 0 or run.step == last):
                hook.at_step(run, run.step, metrics)
    for hook in run.hooks:
        hook.at_end(run)
    goodput.begin("checkpoint")  # the last checkpoint is still being written


def _restore_or_initialise(
    program: Program,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
    local: LocalCheckpoints | None,
    workdir: epath.Path,
) -> TrainState:
    """Returns the state to start from."""
    # 1. The newest good checkpoint: from the hosts' own disks if all hosts have one that is newer
    #    than those in the workdir, otherwise from the workdir.
    state = None
    if local:
        state = local.restore(program, tokenizer, max(checkpoints.steps(), default=-1))
    if state is None:
        state = checkpoints.restore(program, tokenizer)
    if state is not None:
        log.info("continuing at step %d of %s", int(state.step), workdir)
        return state
    log.info("starting a new run in %s", workdir)
    state = program.init()
    # 2. The parameters of the checkpoint that `config.init_from` names.
    if program.config.init_from:
        state = state._replace(parameters=None)  # frees their memory
        parameters = initial_parameters(program.config.init_from, program, tokenizer)
        if processes.is_primary():
            keep_origin(program.config.init_from, workdir)
        return state._replace(parameters=parameters)
    # 3. Random parameters.
    return state


def open_workdir(path: str | os.PathLike) -> epath.Path:
    """Creates the folder of a run. Raises UserError if that fails, or if it holds a model."""
    workdir = epath.Path(path)
    refuse_patterns(workdir, "--workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError) as error:
        remedy = (
            "install msllm[gcs] for gs://, and check that this host may write there"
            if "://" in str(path)
            else "choose another"
        )
        raise UserError(
            f"--workdir is {path}, which cannot be created ({error}): {remedy}"
        ) from error
    if (workdir / "description").is_dir():
        raise UserError(
            f"--workdir is {path}, which holds a model: choose another, and start from this model"
            f" with --config.init_from={path}"
        )
    return workdir


@contextlib.contextmanager
def _without_empty_workdir(workdir: epath.Path) -> Iterator[None]:
    """Removes a workdir if the `with` block fails and has written nothing there."""
    try:
        yield
    except BaseException:
        if "://" not in str(workdir) and jax.process_count() == 1:
            with contextlib.suppress(OSError):
                if {file.name for file in workdir.iterdir()} <= {"lock"}:
                    (workdir / "lock").unlink(missing_ok=True)
                    workdir.rmdir()
        raise


def _open_data(config: Config, streams: StreamSpec) -> tuple[Loader, dict[str, Loader]]:
    """Opens the training data, and the held-out split of each source if the run evaluates.

    Raises UserError in all processes if one of them cannot open its data, or if they differ in
    config, code, tokenizer or data.
    """
    loader, held_out, facts, error = None, {}, {}, None
    part = (jax.process_index(), jax.process_count())
    try:
        loader = Loader(config.data, "train", streams, part)
        if config.eval_every and (loader.plan or config.data.eval_percent or config.data.eval_path):
            held_out = _open_held_out(config, loader, streams)
        facts = {
            "config": to_config_dict(config).to_dict(),
            "code": _source_hashes(),
            "jax version": jax.__version__,
            "tokenizer": loader.tokenizer.hash,
        }
        for name, manifest in loader.manifests.items():
            facts[f"data manifest of {name}" if name else "data manifest"] = manifest
    except UserError as problem:
        error = str(problem)
    processes.check_same_everywhere(facts, error)
    assert loader is not None  # otherwise check_same_everywhere has raised the error
    return loader, held_out


def _open_held_out(config: Config, loader: Loader, streams: StreamSpec) -> dict[str, Loader]:
    """Opens the held-out split of each source, by name. Sources of a mixture may have none."""
    parts = by_source(config.data)
    if loader.plan:
        empty = [name for name in parts if not loader.manifests[name]["splits"]["eval"]["tables"]]
        if empty:
            log.warning("no examples of %s are held out: not evaluated", ", ".join(empty))
        parts = {name: part for name, part in parts.items() if name not in empty}
    return {
        name: Loader(part, "eval", streams, (jax.process_index(), jax.process_count()))
        for name, part in parts.items()
    }


def _source_hashes() -> dict[str, str]:
    """The sha256 of every source file of the package, by its path in the package."""
    package = pathlib.Path(msllm.__file__).parent
    files = [path for path in package.rglob("*.*") if path.suffix in (".py", ".cc", ".h")]
    return {str(path.relative_to(package)): file_hash(path) for path in sorted(files)}


def _open_monitor(
    program: Program, writers: MetricsWriters, goodput: Goodput, loader: Loader, start: int
) -> Monitor:
    config, shares = program.config, None
    progress = Progress(
        "step",
        config.steps,
        start,
        every=0,
        file=sys.stdout,
        keep=True,
        enabled=processes.is_primary(),
    )
    if loader.plan:
        chosen = config.data.mixture.streams
        shares = MixtureShares(loader.plan, chosen, program.streams, program.silence_id)
    return Monitor(program, writers, progress, goodput, processes.DispatchClocks(), shares)


def with_vocabulary(config: Config, size: int) -> Config:
    """The config with `model.vocab_size` set to `size`, unless it is already at least that.

    Raises UserError if it is positive and smaller.
    """
    if config.model.vocab_size >= size:
        return config
    if config.model.vocab_size:
        raise UserError(
            f"config.model.vocab_size is {config.model.vocab_size}: the data's tokenizer has"
            f" {size} pieces; set it to 0 (the tokenizer's size) or to at least that"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
