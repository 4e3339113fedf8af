"""Training: data in, steps, evaluation, checkpoints, metrics.

`train` continues a run from its newest checkpoint. Ctrl-C, SIGTERM or a preemption notice ends the
step, saves and returns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath

import msllm
from msllm.config import Config, to_config_dict, to_json
from msllm.data.loader import Batch, Loader, spread
from msllm.data.mixture import by_source
from msllm.data.records import file_hash
from msllm.errors import UserError
from msllm.goodput import Goodput
from msllm.metrics import Shares, Writer, append_lines, named_losses, weighted_mean
from msllm.monitor import Meter
from msllm.runtime import processes
from msllm.runtime.compiler import compile_step, enable_compilation_cache
from msllm.runtime.files import write_atomically
from msllm.runtime.progress import Progress
from msllm.sharding import make_mesh
from msllm.step import Program, TrainState
from msllm.streams import StreamSpec, resolve_visibility

log = logging.getLogger("msllm")


def train(
    config: Config,
    workdir: str | os.PathLike,
    stop: processes.StopSignal | None = None,
    before: float = 0.0,
) -> TrainState:
    """Trains, or continues, the run in `workdir` up to `config.steps`. Raises UserError, RunError.

    In a run of several processes (`processes.connect`) all call it, with the same config and a workdir that they share.

    Args:
      stop: set by a signal or a preemption notice to end the run early.
      before: seconds that this process has been running, for the goodput.
    """
    config = resolve_visibility(config)
    workdir = open_workdir(workdir)
    with processes.exclusive_workdir(workdir):
        return _train(config, workdir, stop, before)


def _train(
    config: Config,
    workdir: epath.Path,
    stop: processes.StopSignal | None,
    before: float,
) -> TrainState:
    from msllm.checkpoint import (
        Checkpoints,  # orbax is slow to import, and not every use of this module needs it
    )
    from msllm.weights.warm_start import initial_parameters

    goodput = Goodput(workdir / "goodput.json", before)
    enable_compilation_cache(config.compilation_cache, workdir / "compiled")
    streams = StreamSpec.from_config(config.streams)
    loader, held_out = _open_data(config, streams)
    config = with_vocabulary(config, loader.tokenizer.vocab_size)
    mesh = make_mesh(config.mesh)
    program = Program(config, streams, mesh, loader.tokenizer.silence_id)
    evaluation = _Evaluation(program, held_out) if held_out else None

    checkpoints = Checkpoints(workdir, config.checkpoint)
    local = (
        Checkpoints(workdir, config.checkpoint, local=True) if config.checkpoint.local_dir else None
    )
    tiers = [checkpoints, local] if local else [checkpoints]
    with goodput.inside("restore"):
        state = (
            local.restore(program, loader.tokenizer, max(checkpoints.steps(), default=-1))
            if local
            else None
        )
        if state is None:
            state = checkpoints.restore(program, loader.tokenizer)
        if state is None:
            state = program.init()
            if config.init_from:
                state = state._replace(parameters=None)  # frees their memory
                state = state._replace(
                    parameters=initial_parameters(config.init_from, program, loader.tokenizer)
                )
            log.info("starting a new run in %s", workdir)
        else:
            log.info("continuing at step %d of %s", int(state.step), workdir)
    start = int(state.step)
    goodput.restored(start)
    goodput.write()
    if start >= config.steps:
        log.info("nothing to do: the run is at step %d of %d", start, config.steps)
        for tier in tiers:
            tier.close()
        return state
    if processes.is_primary():
        write_atomically(workdir / "config.json", to_json(config))

    with goodput.inside("compile"):
        step_function = compile_step(program.step, program.abstract_state, program.abstract_batch)
    writer = Writer(workdir, config.monitor.wandb_project)
    progress = Progress(
        "step",
        config.steps,
        start,
        every=0,
        file=sys.stdout,
        keep=True,
        enabled=processes.is_primary(),
    )
    shares = (
        Shares(loader.plan, config.data.mixture.streams, streams, program.silence_id)
        if loader.plan
        else None
    )
    meter = Meter(program, writer, progress, goodput, processes.DispatchClocks(), shares)
    rows = host_rows(program)
    batches = _batches(program, loader, range(start, config.steps))
    examples = _examples_log(program, loader, workdir) if config.monitor.examples else None
    last_save = 0
    with (
        stop or processes.StopSignal() as stop,
        contextlib.ExitStack() as stack,
        processes.exit_on_error(),
    ):
        stack.callback(goodput.write)
        stack.callback(writer.close)
        stack.callback(progress.close)
        for tier in tiers:
            stack.callback(tier.close)
        goodput.begin("steps")
        for step in range(start, config.steps):
            _profile(config, step, start, workdir)
            with goodput.inside("data"):
                tables, batch = next(batches)
            state, metrics = step_function(state, batch)
            if examples:
                examples(step)
            # The numbers of this step are read after the next one has been dispatched: the device never waits for us.
            meter.dispatched(
                step + 1, metrics, tables, loader.sources(step, rows) if loader.plan else None
            )
            done, stopping = (
                step + 1,
                stop.should_stop(step + 1),
            )  # a signal after this line ends the next step: that one saves
            for tier in tiers:
                tier.check()
            if stopping or done == config.steps or _due(config, done, meter.clock - last_save):
                meter.flush()
                with goodput.inside("checkpoint"):
                    checkpoints.save(state, config, loader.tokenizer)
                goodput.saved(done)
                last_save = meter.clock
            elif local and done % config.checkpoint.local_every == 0:
                meter.flush()
                with goodput.inside("checkpoint"):
                    local.save(state, config, loader.tokenizer)
                goodput.saved(done)
            if evaluation and (done % config.eval_every == 0 or done == config.steps):
                meter.flush()
                with goodput.inside("evaluation"):
                    values = evaluation(state.parameters)
                writer.write(done, values)
                progress.say(
                    f"step {done}  evaluation: "
                    + "  ".join(f"{k[5:]} {v:.4f}" for k, v in values.items())
                )
            if stopping and done < config.steps:
                progress.say(f"stopped at step {done}, saved; the same command continues here")
                break
        meter.flush()
        goodput.begin("checkpoint")  # it is not finished before the last one is written
    return state


def open_workdir(path: str | os.PathLike) -> epath.Path:
    """Creates the directory of a run. Raises UserError if it cannot, or if it is a model."""
    workdir = epath.Path(path)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError) as error:
        remedy = (
            "install msllm[gcs] for gs://, and see that this host may write there"
            if "://" in str(path)
            else "name another"
        )
        raise UserError(f"--workdir is {path}, which cannot be made ({error}): {remedy}") from error
    if (workdir / "description").is_dir():
        raise UserError(
            f"--workdir is {path}, a model: name another, and this one with --config.init_from={path}"
        )
    return workdir


def _open_data(config: Config, streams: StreamSpec) -> tuple[Loader, dict[str, Loader]]:
    """The loader of the training data, and one for the held-out split of each source.

    There are none of the latter if nothing is to be evaluated. Returns once all processes have the
    same data, config and code.
    """
    loader, held_out, facts, error = None, {}, {}, None
    try:
        loader = Loader(config.data, "train", streams, (jax.process_index(), jax.process_count()))
        if config.eval_every and (loader.plan or config.data.eval_percent or config.data.eval_path):
            held_out = _open_held_out(config, loader, streams)
        facts = {
            "config": to_config_dict(config).to_dict(),
            "code": _source_hashes(),
            "jax version": jax.__version__,
            "tokenizer": loader.tokenizer.hash,
            **{
                f"data manifest{name and f' of {name}'}": manifest
                for name, manifest in loader.manifests.items()
            },
        }
    except UserError as problem:
        error = str(problem)
    processes.check_same_everywhere(facts, error)
    return loader, held_out


def _source_hashes() -> dict[str, str]:
    """sha256 of every source file of the package, by its path in it."""
    package = pathlib.Path(msllm.__file__).parent
    files = [path for path in package.rglob("*.*") if path.suffix in (".py", ".cc", ".h")]
    return {str(path.relative_to(package)): file_hash(path) for path in sorted(files)}


def _open_held_out(config: Config, loader: Loader, streams: StreamSpec) -> dict[str, Loader]:
    """The loader of each source's held-out split, by name; in a mixture not every source must have one."""
    parts = by_source(config.data)
    if loader.plan:
        empty = [name for name in parts if not loader.manifests[name]["splits"]["eval"]["tables"]]
        if empty:
            log.warning("nothing is held out of %s: not evaluated", ", ".join(empty))
        parts = {name: part for name, part in parts.items() if name not in empty}
    return {
        name: Loader(part, "eval", streams, (jax.process_index(), jax.process_count()))
        for name, part in parts.items()
    }


def _due(config: Config, done: int, milliseconds: int) -> bool:
    """Whether a checkpoint is due after `done` steps, the last one being so old."""
    every, minutes = config.checkpoint.every, config.checkpoint.every_minutes
    return bool(every and done % every == 0) or bool(minutes and milliseconds >= minutes * 60_000)


def _profile(config: Config, step: int, start: int, workdir: epath.Path) -> None:
    """Starts and ends the trace that `config.monitor` asks for."""
    first = config.monitor.profile_start
    if first and step == max(first, start):
        jax.profiler.start_trace(str(workdir / "profile"))
    if first and step == max(first, start) + config.monitor.profile_steps:
        jax.profiler.stop_trace()


def _examples_log(program: Program, loader: Loader, workdir: epath.Path):
    """A function that logs which examples this process reads for a step: a JSON line with the tables and their ids."""
    folder, rows = workdir / "examples", host_rows(program)
    folder.mkdir(parents=True, exist_ok=True)
    file = append_lines(folder / f"process-{jax.process_index():05d}.jsonl")

    def write(step: int) -> None:
        ids = loader.example_ids(step, rows)
        file.write(
            json.dumps({"step": step, "rows": [rows.start, rows.stop], "examples": ids}) + "\n"
        )
        file.flush()

    return write


def with_vocabulary(config: Config, size: int) -> Config:
    """The config with `model.vocab_size` filled in from the tokenizer. Raises UserError if it is set and too small."""
    if config.model.vocab_size >= size:
        return config
    if config.model.vocab_size:
        raise UserError(
            f"config.model.vocab_size is {config.model.vocab_size}: the data's tokenizer has {size} pieces; set it to "
            "0 (the tokenizer's size) or to at least that"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def host_rows(program: Program) -> range:
    """The tables of a batch of which this host's devices hold a part."""
    segment = program.abstract_batch["segment"]
    indices = segment.sharding.addressable_devices_indices_map(segment.shape).values()
    parts = [index[0].indices(segment.shape[0]) for index in indices]
    return range(min(p[0] for p in parts), max(p[1] for p in parts))


def to_devices(
    program: Program, batch: Mapping[str, np.ndarray], first_row: int = 0
) -> dict[str, jax.Array]:
    """Global arrays from this host's tables of a batch, which start at `first_row`; absent streams are added."""

    def place(name: str, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        array = batch[name]
        if array.ndim == 3:
            array = np.pad(array, [(0, 0), (0, 0), (0, abstract.shape[2] - array.shape[2])])

        def part(index):
            rows, *rest = index
            begin, end, _ = rows.indices(abstract.shape[0])
            return array[(slice(begin - first_row, end - first_row), *rest)]

        return jax.make_array_from_callback(abstract.shape, abstract.sharding, part)

    return {name: place(name, abstract) for name, abstract in program.abstract_batch.items()}


def _batches(
    program: Program, loader: Loader, steps: Sequence[int]
) -> Iterator[tuple[Batch, dict[str, jax.Array]]]:
    """This host's tables and the global arrays of each batch; the former are made ahead of time."""
    rows = host_rows(program)
    for tables in loader.iterate(steps, rows):
        yield tables, to_devices(program, tables, rows.start)


class _Evaluation:
    """Losses on the held-out split of each source, and their mean by the weights that a mixture begins with."""

    def __init__(self, program: Program, loaders: Mapping[str, Loader]):
        self._program, self._loaders = program, loaders
        mixture = program.config.data.mixture
        self._weights = dict(zip(mixture.source_names, mixture.weights))

    def __call__(self, parameters) -> dict[str, float]:
        by_name = {name: self._losses(parameters, loader) for name, loader in self._loaders.items()}
        values = weighted_mean(by_name, self._weights) if self._weights else by_name.pop("")
        for name, losses in by_name.items():
            values |= {f"{name}/{kind}": value for kind, value in losses.items()}
        return {f"eval/{name}": value for name, value in values.items()}

    def _losses(self, parameters, loader: Loader) -> dict[str, float]:
        steps = spread(loader.num_batches, self._program.config.eval_batches or loader.num_batches)
        totals = None
        for _, batch in _batches(self._program, loader, steps):
            sums = jax.tree.map(
                lambda x: np.asarray(x, np.float64), self._program.evaluate(parameters, batch)
            )
            totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        return {
            "loss": float(totals["loss"] / max(totals["weight"], 1)),
            **named_losses(totals, self._program.streams),
        }
