"""Hooks, which run between the steps of a run: the base class and msllm's own hooks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import jax
import numpy as np
from etils import epath

from msllm.checkpoint import Checkpoints, LocalCheckpoints
from msllm.config import Config, find_object
from msllm.data.global_batch import global_batches, host_rows
from msllm.data.loader import Batch, Loader, spread
from msllm.errors import UserError
from msllm.metrics import append_lines, named_losses, weighted_mean
from msllm.monitor import Monitor
from msllm.runtime.processes import StopSignal
from msllm.runtime.progress import clock_time
from msllm.sharding import named_sharding
from msllm.step import Program, TrainState
from msllm.weights.load import LoadedModel


class Hook:
    """Something that a run does besides its steps. Override the methods that you need.

    All processes of a run call the same hooks after the same steps. A hook may compute with the
    run's arrays if it does so in all processes. Write files only if `jax.process_index() == 0`.

    Attributes:
      every: `at_step` is called after each step whose number is a multiple of this, and after the
        last step of the run, `config.steps`. 0: never.
    """

    every: int = 1

    def at_start(self, run: Run) -> None:
        """Called before the first step of this process."""

    def at_step(self, run: Run, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Called after a step has been dispatched, while the devices are still computing it.

        Reading `metrics` or `run.state` waits for the step. A hook that is called after every step
        should not wait: it can keep `metrics` and read them in its next call. A hook that is called
        rarely should work inside `with run.pause(): ...`, so that its time does not count as a slow
        step.

        Args:
          run: the run. `run.state` is the state after the step. The next step reuses its memory.
          step: number of steps done, including this one.
          metrics: what `Program.step` returned.
        """

    def at_save(self, run: Run, step: int) -> None:
        """Called after a checkpoint of `run.state` has been handed to the background writer."""

    def at_end(self, run: Run) -> None:
        """Called after the last step of this process, unless the run ends with an error."""

    def close(self, run: Run) -> None:
        """Called last, also if the run ends with an error. Releases what the hook has opened.

        If an earlier hook fails at the start, this is called although `at_start` was not.
        """


@dataclasses.dataclass
class Run:
    """An open run, as its hooks see it.

    Attributes:
      config: the resolved settings.
      workdir: the folder of the run.
      program: the compiled functions, the mesh and the streams.
      loader: the training data; `loader.tokenizer` is the tokenizer.
      held_out: the held-out split of each source, by name. A run without a mixture has one source,
        named "". Empty if nothing is held out.
      monitor: speed, goodput, and where metrics go.
      state: parameters, optimizer state and counters, after the last step that was dispatched.
      hooks: the hooks, in the order in which they are called.
      step: number of steps done.
      tables: this host's part of the last batch.
      stopping: whether the run ends early, after this step.
      stop_requested: a hook sets this, in all processes, to end the run early.
    """

    config: Config
    workdir: epath.Path
    program: Program
    loader: Loader
    held_out: Mapping[str, Loader]
    monitor: Monitor
    state: TrainState
    hooks: Sequence[Hook] = ()
    step: int = 0
    tables: Batch = dataclasses.field(default_factory=dict)
    stopping: bool = False
    stop_requested: bool = False

    @functools.cached_property
    def host_rows(self) -> range:
        """The tables of a batch that this host reads."""
        return host_rows(self.program.abstract_batch)

    def write(self, values: Mapping[str, float]) -> None:
        """Writes metrics of the current step to all metrics writers."""
        self.monitor.writers.write(self.step, values)

    def say(self, text: str) -> None:
        """Prints a line, in process 0 only, without disturbing the progress bar."""
        self.monitor.progress.say(text)

    @contextlib.contextmanager
    def pause(self, kind: str = "evaluation") -> Iterator[None]:
        """Waits for the last step. The time inside the context counts for `kind` in the goodput.

        Args:
          kind: one of `msllm.monitor.KINDS`.
        """
        with self.monitor.pause(kind):
            yield

    def model(self) -> LoadedModel:
        """The model with the current parameters, on the first device of this process.

        All processes must call this. Use the model before the next step, which reuses the memory of
        the parameters. If a model does not fit on one device, use its sharded form instead:
        `program.evaluate` and `state.parameters`.
        """
        everywhere = named_sharding(self.program.mesh)
        replicated = jax.device_put(self.state.parameters, everywhere)
        parameters = jax.tree.map(lambda x: x.addressable_data(0), replicated)
        return LoadedModel(
            self.config.model,
            self.program.streams,
            parameters,
            self.loader.tokenizer,
            step=self.step,
            run_config=self.config,
        )


class Announce(Hook):
    """Says at the start how large the run is, and after its first steps how long it will take."""

    _TIMED_STEPS = 5

    def __init__(self, step: jax.stages.Compiled):
        """`step` is the compiled train step, which knows the memory that it needs."""
        self._step = step

    def at_start(self, run: Run) -> None:
        for line in (_model_size(run), _data_size(run), _memory_size(run, self._step)):
            if line:
                run.say(line)

    def at_step(self, run: Run, step: int, metrics: Mapping[str, jax.Array]) -> None:
        seconds = run.monitor.step_seconds(self._TIMED_STEPS)
        if seconds is None:
            return
        self.every = 0  # never again
        left = run.config.steps - step
        if left:
            shown = f"{seconds:.2g}" if seconds < 10 else f"{seconds:,.0f}"
            run.say(
                f"time: about {clock_time(seconds * left)} for the {left:,} steps that are left,"
                f" at {shown} s a step, without evaluations and checkpoints"
            )


def _model_size(run: Run) -> str:
    leaves = jax.tree.leaves(run.program.abstract_state.parameters)
    size, streams = sum(leaf.size for leaf in leaves), run.program.streams.names
    pieces = run.loader.tokenizer.vocab_size
    return f"model: {size:,} parameters, {pieces:,} pieces, streams {', '.join(streams)}"


def _data_size(run: Run) -> str:
    data, steps, tables = run.config.data, run.config.steps, run.loader.num_tables
    used = steps * data.batch_size
    line = f"data: {tables:,} tables of {data.rows} rows; {steps:,} steps of {data.batch_size}"
    if run.loader.plan:  # every source has epochs of its own
        return f"{line} tables from {len(run.loader.manifests)} sources are {used:,} tables"
    return f"{line} tables are {used / tables:,.{1 if used < 100 * tables else 0}f} epochs"


def _memory_size(run: Run, step: jax.stages.Compiled) -> str:
    """Describes the memory of a step on one device; "" if the compiler does not tell."""
    try:
        sizes: Any = step.memory_analysis()
        state, others = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
    except (AttributeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return ""
    mib = [f"{size / 2**20:,.{0 if size >= 10 << 20 else 1}f} MiB" for size in (state, others)]
    where = "" if jax.device_count() == 1 else f" on each of {jax.device_count()} devices"
    return f"memory: {mib[0]} for parameters and optimizer, {mib[1]} for a step{where}"


class ReadMetrics(Hook):
    """Reads the metrics of each step once the next one is dispatched, and reports them."""

    def at_step(self, run: Run, step: int, metrics: Mapping[str, jax.Array]) -> None:
        sources = run.loader.sources(step - 1, run.host_rows) if run.loader.plan else None
        run.monitor.after_dispatch(step, metrics, run.tables, sources)

    def at_end(self, run: Run) -> None:
        run.monitor.flush()


class CheckStop(Hook):
    """Ends the run early when a signal, a preemption notice or another hook asks for it."""

    def __init__(self, signal: StopSignal):
        self._signal = signal

    def at_step(self, run: Run, step: int, metrics: Mapping[str, jax.Array]) -> None:
        # A signal that arrives after this line ends the run after the next step.
        run.stopping = self._signal.should_stop(step) or run.stop_requested


class SaveCheckpoints(Hook):
    """Saves checkpoints as `config.checkpoint` says, and when the run ends."""

    def __init__(self, checkpoints: Checkpoints, local: LocalCheckpoints | None):
        self._checkpoints, self._local = checkpoints, local
        self._last_save = 0  # milliseconds, by the monitor's clock
        self._saved_step: int | None = None  # the step of the newest checkpoint of this process

    def at_step(self, run: Run, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self._checkpoints.check_for_errors()
        if self._local:
            self._local.check_for_errors()
        ends = run.stopping or step == run.config.steps
        if ends or self._is_due(run):
            self._save(run, self._checkpoints, even_if_skipping=ends)
            self._last_save = run.monitor.clock
        elif self._local and step % run.config.checkpoint.local_every == 0:
            self._save(run, self._local)

    def at_end(self, run: Run) -> None:
        if run.step < run.config.steps:
            saved = self._saved_step == run.step
            place = "saved; the same command continues here" if saved else "not saved"
            run.say(f"stopped at step {run.step}, {place}")

    def _is_due(self, run: Run) -> bool:
        every, minutes = run.config.checkpoint.every, run.config.checkpoint.every_minutes
        if every and run.step % every == 0:
            return True
        return bool(minutes) and run.monitor.clock - self._last_save >= minutes * 60_000

    def _save(
        self,
        run: Run,
        checkpoints: Checkpoints | LocalCheckpoints,
        even_if_skipping: bool = False,
    ) -> None:
        with run.pause("checkpoint"):
            # While updates are skipped, nothing changes that would be worth a good checkpoint.
            if int(run.state.skipped_in_row) and not even_if_skipping:
                return
            if not checkpoints.save(run.state, run.config, run.loader.tokenizer):
                return
        self._saved_step = run.step
        run.monitor.goodput.saved(run.step)
        for hook in run.hooks:
            hook.at_save(run, run.step)


class Evaluate(Hook):
    """Calls the functions of `config.evaluations` and writes their metrics as `eval/NAME`."""

    def __init__(self, config: Config):
        """Raises UserError if a function cannot be imported."""
        self.every = config.eval_every
        self._evaluations = {
            name: find_object(name, EVALUATIONS, "config.evaluations")
            for name in config.evaluations
        }

    def at_step(self, run: Run, step: int, metrics: Mapping[str, jax.Array]) -> None:
        values: dict[str, float] = {}
        with run.pause("evaluation"):
            for name, evaluation in self._evaluations.items():
                found = {f"eval/{key}": float(value) for key, value in evaluation(run).items()}
                if repeated := values.keys() & found.keys():
                    raise UserError(
                        f"config.evaluations: {name} returns {', '.join(sorted(repeated))}, which"
                        " another evaluation returns as well: give each metric a name of its own"
                    )
                values |= found
        if values:
            run.write(values)
            shown = "  ".join(
                f"{key.removeprefix('eval/')} {value:.4f}" for key, value in values.items()
            )
            run.say(f"step {step}  evaluation: {shown}")


def held_out_losses(run: Run) -> dict[str, float]:
    """Losses on the held-out split.

    For a mixture: the losses of each source, as `SOURCE/NAME`, and their mean, weighted by
    `config.data.mixture.weights`.
    """
    by_source = {
        name: mean_losses(run.program, run.state.parameters, loader)
        for name, loader in run.held_out.items()
    }
    mixture = run.config.data.mixture
    if not mixture.dirs:
        return by_source.get("", {})
    weights = dict(zip(mixture.source_names, mixture.weights, strict=True))
    values = weighted_mean(by_source, weights)
    for name, losses in by_source.items():
        values |= {f"{name}/{kind}": value for kind, value in losses.items()}
    return values


def mean_losses(program: Program, parameters: Any, loader: Loader) -> dict[str, float]:
    """Losses on a split, or on `config.eval_batches` batches of it. All processes must call this.

    Args:
      program: the program of the run.
      parameters: the parameters, on the program's mesh.
      loader: the loader of the split.

    Returns:
      `loss`, and the metrics of `named_losses`.
    """
    steps = spread(loader.num_batches, program.config.eval_batches or loader.num_batches)
    totals: Any = None
    for _, batch in global_batches(loader, program.abstract_batch, steps):
        sums = program.evaluate(parameters, batch)
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    return {
        "loss": float(totals["loss"] / max(totals["weight"], 1e-9)),
        **named_losses(totals, program.streams),
    }


EVALUATIONS: dict[str, Callable[[Run], Mapping[str, float]]] = {"held_out": held_out_losses}


class LogExamples(Hook):
    """Logs the examples that this process reads for each step, in a file of JSON lines.

    A line holds the step (counted from 0), the range of batch rows, and the ids of the examples in
    each row.
    """

    _file: IO[str] | None = None

    def at_start(self, run: Run) -> None:
        folder = run.workdir / "examples"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = append_lines(folder / f"process-{jax.process_index():05d}.jsonl")

    def at_step(self, run: Run, step: int, metrics: Mapping[str, jax.Array]) -> None:
        rows = run.host_rows
        line = {
            "step": step - 1,
            "rows": [rows.start, rows.stop],
            "examples": run.loader.example_ids(step - 1, rows),
        }
        assert self._file
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self, run: Run) -> None:
        if self._file:
            self._file.close()


class Profile(Hook):
    """Records the trace that `config.monitor` asks for, in `profile/`."""

    def __init__(self, config: Config):
        self._first, self._steps = config.monitor.profile_start, config.monitor.profile_steps
        self._running = False

    def at_start(self, run: Run) -> None:
        self._first = max(self._first, run.step)
        if run.step == self._first:
            self._start(run)

    def at_step(self, run: Run, step: int, metrics: Mapping[str, jax.Array]) -> None:
        if step == self._first and not self._running:
            self._start(run)
        elif step == self._first + self._steps:
            self._stop()

    def close(self, run: Run) -> None:
        self._stop()

    def _start(self, run: Run) -> None:
        jax.profiler.start_trace(str(run.workdir / "profile"))
        self._running = True

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
