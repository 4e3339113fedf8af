"""Training: data in, steps, evaluation, checkpoints, metrics.

    python -m msllm.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.optim.lr=1e-3 ...]

The same command again continues where the run was. Ctrl-C (or SIGTERM) ends the step, saves and exits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import pathlib
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from msllm.compiler import compile_step
from msllm.config import Config, to_json
from msllm.data.loader import Loader
from msllm.errors import UserError
from msllm.metrics import Progress, Writer, memory_mib, named_losses
from msllm.sharding import make_mesh
from msllm.step import Program, TrainState
from msllm.streams import StreamSpec

log = logging.getLogger("msllm")


def train(config: Config, workdir: str | pathlib.Path) -> TrainState:
    """Trains, or continues, the run in `workdir` up to `config.steps`. Raises UserError."""
    from msllm.checkpoint import Checkpoints  # orbax is slow to import, and not every use of this module needs it

    workdir = pathlib.Path(workdir)
    streams = StreamSpec.from_config(config.streams)
    loader = Loader(config.data, "train", streams)
    config = with_vocabulary(config, loader.tokenizer.vocab_size)
    mesh = make_mesh(config.mesh)
    program = Program(config, streams, mesh, loader.tokenizer.silence_id)
    evaluation = _Evaluation(program) if config.eval_every and config.data.eval_percent else None

    checkpoints = Checkpoints(workdir, config.checkpoint)
    state = checkpoints.restore(program, loader.tokenizer)
    if state is None:
        state = program.init()
        log.info("starting a new run in %s", workdir)
    else:
        log.info("continuing at step %d of %s", int(state.step), workdir)
    start = int(state.step)
    if start >= config.steps:
        log.info("nothing to do: the run is at step %d of %d", start, config.steps)
        checkpoints.close()
        return state
    (workdir / "config.json").write_text(to_json(config))

    writer, progress = Writer(workdir), Progress(start, config.steps)
    step_function = compile_step(program.step, program.abstract_state, program.abstract_batch)
    batches = _prefetched(program, loader, start, config.steps)
    meter = _Meter(program, writer, progress)
    with _stop_signal() as stop, contextlib.ExitStack() as stack:
        stack.callback(writer.close)
        stack.callback(progress.close)
        stack.callback(checkpoints.close)
        for step in range(start, config.steps):
            with meter.waiting_for_data():
                batch = next(batches)
            state, metrics = step_function(state, batch)
            # The numbers of this step are read after the next one has been dispatched: the device never waits for us.
            meter.dispatched(step + 1, metrics)
            done, stopping = step + 1, stop.is_set  # a signal after this line ends the next step: that one saves
            if stopping or done == config.steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
                meter.flush()
                checkpoints.save(state, config, loader.tokenizer)
            if evaluation and (done % config.eval_every == 0 or done == config.steps):
                meter.flush()
                values = evaluation(state.parameters)
                writer.write(done, values)
                progress.say(f"step {done}  evaluation: " + "  ".join(f"{k[5:]} {v:.4f}" for k, v in values.items()))
            if stopping and done < config.steps:
                progress.say(f"stopped at step {done}, saved; the same command continues here")
                break
        meter.flush()
    return state


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


def to_devices(program: Program, batch: Mapping[str, np.ndarray], first_row: int = 0) -> dict[str, jax.Array]:
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


def _prefetched(program: Program, loader: Loader, start: int, stop: int) -> Iterator[dict[str, jax.Array]]:
    rows = host_rows(program)
    for batch in loader.iterate(start, stop, rows):
        yield to_devices(program, batch, rows.start)


class _Evaluation:
    """Losses on the held-out split."""

    def __init__(self, program: Program):
        config = program.config
        self._program, self._loader = program, Loader(config.data, "eval", program.streams)
        self._batches = min(config.eval_batches or self._loader.num_batches, self._loader.num_batches)

    def __call__(self, parameters) -> dict[str, float]:
        totals = None
        for batch in _prefetched(self._program, self._loader, 0, self._batches):
            sums = self._program.evaluate(parameters, batch)
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
            totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        values = {"loss": float(totals["loss"] / max(totals["weight"], 1)), **named_losses(totals, self._program.streams)}
        return {f"eval/{name}": value for name, value in values.items()}


class _Meter:
    """Reads the metrics of a step once the next one is under way, writes them, and stops a run that has gone wrong."""

    def __init__(self, program: Program, writer: Writer, progress: Progress):
        self._program, self._writer, self._progress = program, writer, progress
        self._pending: tuple[int, Any] | None = None
        self._since, self._steps, self._data_seconds = time.perf_counter(), 0, 0.0
        self._cells = self._spoken = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self):
        """Counts the time inside as time that training waited for data."""
        begin = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - begin

    def dispatched(self, step: int, metrics) -> None:
        """Takes the metrics of a step that is under way, and reads those of the one before."""
        pending, self._pending = self._pending, (step, metrics)
        if pending:
            self._read(*pending)

    def flush(self) -> None:
        """Reads what is pending."""
        pending, self._pending = self._pending, None
        if pending:
            self._read(*pending)

    def _read(self, step: int, metrics) -> None:
        metrics = jax.device_get(metrics)
        self._steps += 1
        self._cells += float(metrics["cells"])
        self._spoken += float(metrics["spoken"])
        if metrics["skipped_in_row"]:
            self._report_skip(step, metrics)
        config = self._program.config
        if step % config.log_every == 0 or step == config.steps:
            self._write(step, metrics)

    def _write(self, step: int, metrics) -> None:
        now = time.perf_counter()
        seconds = now - self._since
        values = {
            "loss": float(metrics["loss"]),
            **named_losses(metrics, self._program.streams),
            **{k: float(metrics[k]) for k in ("gradient_norm", "parameter_norm", "update_norm", "learning_rate")},
            "skipped_updates": float(metrics["skipped"]),
            "tokens_per_second": self._cells / seconds,
            "spoken_tokens_per_second": self._spoken / seconds,
            "step_seconds": seconds / self._steps,
            "data_wait_share": self._data_seconds / seconds,
            "memory_mib": memory_mib(),
        }
        self._writer.write(step, values)
        self._progress.update(step, values)
        self._since, self._steps, self._cells, self._spoken, self._data_seconds = now, 0, 0.0, 0.0, 0.0

    def _report_skip(self, step: int, metrics) -> None:
        norms = metrics["gradient_norms"]
        bad = [name for name, norm in zip(self._program.parameter_names, norms) if not math.isfinite(norm)]
        what = f"the gradients of {', '.join(bad[:5])}{' and others' if len(bad) > 5 else ''} were" if bad else "the loss was"
        in_row, limit = int(metrics["skipped_in_row"]), self._program.config.optim.max_skipped
        self._progress.say(f"step {step}: {what} not finite; update skipped ({in_row} in a row, {metrics['skipped']} in all)")
        if in_row >= limit:
            raise UserError(
                f"{in_row} updates in a row were skipped because {what} not finite (config.optim.max_skipped is "
                f"{limit}); the last one was step {step}: lower config.optim.lr or look at the data of these steps"
            )


class _StopFlag:
    is_set = False


@contextlib.contextmanager
def _stop_signal():
    """A flag that Ctrl-C or SIGTERM sets; a second Ctrl-C interrupts at once."""
    flag, previous = _StopFlag(), {}

    def handle(number, frame):
        flag.is_set = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with contextlib.suppress(ValueError):  # not in the main thread (a notebook's worker): no handlers
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _main() -> None:
    from absl import flags
    from ml_collections import config_flags

    from msllm.config import from_config_dict
    from msllm.errors import run

    settings = config_flags.DEFINE_config_file("config", None, "Settings of the run, e.g. configs/quickstart.py.")
    workdir = flags.DEFINE_string("workdir", None, "Directory for checkpoints and metrics.")
    flags.mark_flags_as_required(["config", "workdir"])

    def main(_):
        train(from_config_dict(settings.value), workdir.value)

    run(main)


if __name__ == "__main__":
    _main()
