"""Decoding measured in one process: S streams against one stream of the same model, in turn, row by
row.

One session each, greedy, whose window holds all rows; then the same once more, and once more. A row
is `session.step()`; the
share of the host is the time of a row in which the device has nothing to do: before the compiled
call, and when its results are there. Rows at the start and at the end of a session are compared:
attention reads more and more rows. With `torch`, the same model in torch decodes beside them.
"""

from __future__ import annotations

import time

import jax
import numpy as np

from msllm.bench.timing import timed
from msllm.config import ModelConfig, StreamsConfig
from msllm.decode.engine import Engine
from msllm.decode.sampling import FREE
from msllm.model.model import init_parameters
from msllm.streams import StreamSpec
from msllm.weights.load import LoadedModel

EDGE = 50  # rows at either end that are compared
PASSES = 3  # sessions of each model, one after the other: what else the machine does then shows less in the medians


def decode_case(case: dict) -> list[dict]:
    """One line for `streams` streams and one for a single one. `rows`: rows in the table at the
    end, of which the first `prefill` are read in one pass.
    """
    config = ModelConfig(
        **{name: case[name] for name in ModelConfig.__dataclass_fields__ if name in case}
    )
    sizes = dict.fromkeys((case["streams"], 1))
    models = {size: _model(config, size) for size in sizes}
    engines = {size: _engine(model, case) for size, model in models.items()}
    torch_models = (
        {size: _torch_model(model) for size, model in models.items()} if case["torch"] else {}
    )
    compiled = _Compilations()
    steps, others_steps, runs, same = ({size: [] for size in sizes} for _ in range(4))
    for _ in range(PASSES):
        sessions = {size: _session(engine, case) for size, engine in engines.items()}
        others = {
            size: _torch_session(other, engines[size], case) for size, other in torch_models.items()
        }
        rows, others_rows = {size: [] for size in sizes}, {size: [] for size in others}
        for _ in range(case["rows"] - case["prefill"]):
            for size, session in sessions.items():  # in turn, so that all see the same machine
                rows[size].append(_timed(session))
                if others:
                    others_rows[size].append(timed(others[size].step))
        for size, session in sessions.items():
            steps[size].append(rows[size])
            if others:
                same[size].append(_same_rows(session, [row for row, *_ in others_rows[size]], case))
                others_steps[size].append([row[1:] for row in others_rows[size]])
            runs[size].append(_timed_run(session, case["steps"]))  # rows may fall out now
            session.close()
    lines = [_line(case, size, steps[size], runs[size]) for size in sizes]
    if others:
        lines = [
            line | _torch_line(line, others_steps[line["streams"]], min(same[line["streams"]]))
            for line in lines
        ]
    for line in lines:
        line["compiled_meanwhile"] = compiled.count
    many, one = lines[0], lines[-1]
    many["cost_of_one_stream_cpu"] = round(many["cpu_ms_per_row"] / one["cpu_ms_per_row"], 2)
    many["cost_of_one_stream_wall"] = round(many["wall_ms_per_row"] / one["wall_ms_per_row"], 2)
    return lines


def _model(config: ModelConfig, size: int) -> LoadedModel:
    names = tuple(f"s{i}" for i in range(size))
    streams = StreamSpec.from_config(StreamsConfig(names=names, kinds=("output",) * size))
    return LoadedModel(config, streams, jax.jit(lambda: init_parameters(config, streams, 0))())


def _prefill(model: LoadedModel, case: dict) -> np.ndarray:
    shape = (case["prefill"], model.streams.size)
    return np.random.default_rng(0).integers(0, model.config.vocab_size, shape)


def _engine(model: LoadedModel, case: dict) -> Engine:
    """It has compiled all that a session needs."""
    # Rows of `run` come after those that are stepped.
    window = case["rows"] + case["steps"]
    engine = Engine(model, window=window, cache_dtype=case["cache_dtype"], silence_id=0)
    with engine.open(prefill=_prefill(model, case)) as warm:
        warm.force(0, [FREE, 1])
        warm.step(), warm.run(2)
    return engine


def _session(engine: Engine, case: dict):
    session = engine.open(prefill=_prefill(engine.model, case))
    session.step()
    return session


def _torch_model(model: LoadedModel):
    from msllm.bench import torch_reference as bench_torch

    return bench_torch.Model(model.config, model.streams.size, model.parameters)


def _torch_session(other, engine: Engine, case: dict):
    from msllm.bench import torch_reference as bench_torch

    session = bench_torch.Session(other, _prefill(engine.model, case))
    session.step()
    return session


def _same_rows(session, theirs: list[np.ndarray], case: dict) -> int:
    """How many rows are the same in both before the first that is not."""
    ours = session.transcript().tokens[case["prefill"] + 1 :][: len(theirs)]
    differs = (ours != np.array(theirs)).any(1)
    return int(differs.argmax()) if differs.any() else len(theirs)


def _milliseconds(passes: list) -> np.ndarray:
    """What was measured of each row, one after the other: [., passes, rows]."""
    return 1e3 * np.moveaxis(np.array(passes), 2, 0)


def _median(times: np.ndarray) -> float:
    return round(float(np.median(times)), 3)


def _last_to_first(times: np.ndarray) -> float:
    return _median(np.median(times[:, -EDGE:]) / np.median(times[:, :EDGE]))


def _torch_line(line: dict, steps: list, same: int) -> dict:
    cpu, wall = _milliseconds(steps)
    return {
        "torch_cpu_ms_per_row": _median(cpu),
        "torch_wall_ms_per_row": _median(wall),
        "torch_time_to_ours_cpu": round(np.median(cpu) / line["cpu_ms_per_row"], 2),
        "torch_time_to_ours_wall": round(np.median(wall) / line["wall_ms_per_row"], 2),
        "torch_last_rows_to_first_rows_cpu": _last_to_first(cpu),
        "torch_last_rows_to_first_rows_wall": _last_to_first(wall),
        "torch_same_rows": same,
    }


def _timed(session) -> tuple[float, float, float]:
    """(wall, CPU, wall from the compiled call until its results are there) of a row, seconds."""
    engine, times = session._engine, []
    advance, collect = engine._program.advance, engine._collect

    def begun(*arguments):
        times.append(time.perf_counter())
        return advance(*arguments)

    def ended(flight):
        jax.block_until_ready(flight.out)
        times.append(time.perf_counter())
        return collect(flight)

    engine._program.advance, engine._collect = begun, ended
    try:
        _, cpu, wall = timed(session.step)
    finally:
        engine._program.advance, engine._collect = advance, collect
    return wall, cpu, times[1] - times[0]


def _timed_run(session, rows: int) -> tuple[float, float]:
    _, cpu, wall = timed(lambda: session.run(rows))
    return wall / rows, cpu / rows


def _line(case: dict, size: int, passes: list, runs: list) -> dict:
    wall, cpu, inside = _milliseconds(passes)
    run_wall, run_cpu = 1e3 * np.median(runs, axis=0)
    return {
        "benchmark": "decode",
        **case,
        "streams": size,
        "wall_ms_per_row": _median(wall),
        "cpu_ms_per_row": _median(cpu),
        "rows_per_second": round(1e3 / np.median(wall), 1),
        "tokens_per_second": round(size * 1e3 / np.median(wall), 1),
        "rows_per_cpu_second": round(1e3 / np.median(cpu), 1),
        "last_rows_to_first_rows_cpu": _last_to_first(cpu),
        "last_rows_to_first_rows_wall": _last_to_first(wall),
        "host_share": round(float(np.median((wall - inside) / wall)), 4),
        "run_wall_ms_per_row": round(run_wall, 3),
        "run_cpu_ms_per_row": round(run_cpu, 3),
        "device_kind": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


class _Compilations:
    """Counts the programs that are compiled from now on."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, name: str, *_, **__) -> None:
        self.count += name.endswith("backend_compile_duration")
