"""Measures decoding row by row, with S streams and with one stream of the same model.

Each model has one greedy session, whose window holds all rows. The benchmark repeats the sessions
PASSES times and times each `session.step()`. The host share of a row is the time before the
compiled call and after its results are ready, while the device is idle. The benchmark compares rows
at the start and at the end of a session, because attention reads more rows towards the end. With
`torch`, the same model in torch decodes in turn with them. With edges through tokens, so does the
same model with latent edges.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import jax
import numpy as np

from msllm.bench.timing import Times, timed
from msllm.config import ModelConfig, StreamsConfig
from msllm.decode.engine import Engine, Session
from msllm.decode.sampling import FREE
from msllm.model.model import init_parameters
from msllm.streams import StreamSpec
from msllm.weights.load import LoadedModel

if TYPE_CHECKING:
    from msllm.bench import torch_reference

EDGE = 50  # rows at each end of a session to compare
# Sessions of each model. They alternate, and the medians over them depend less on other work on the
# machine.
PASSES = 3


class _RowTimes(NamedTuple):
    """Times of a row in seconds.

    Attributes:
      cpu: CPU time of this process.
      wall: wall time.
      device: wall time from the compiled call until its results are ready.
    """

    cpu: float
    wall: float
    device: float


class _Measured:
    """A model and its measurements.

    Attributes:
      rows: times of each row, for each pass.
      torch_rows: the same for the model in torch.
      runs: times per row of `session.run`, for each pass.
      same_rows: number of rows before the first one that differs from torch, for each pass.
    """

    def __init__(self, model: LoadedModel, case: dict[str, Any]) -> None:
        self._model, self._case = model, case
        self._engine = _warm_engine(model, case)
        self._other = _torch_model(model) if case["torch"] else None
        self.rows: list[list[_RowTimes]] = []
        self.torch_rows: list[list[Times]] = []
        self.runs: list[Times] = []
        self.same_rows: list[int] = []

    def begin_pass(self) -> None:
        """Opens a session, and with `torch` a second one in torch."""
        prefill = _prefill(self._model, self._case)
        self._session = self._engine.open(prefill=prefill)
        self._session.step()
        self.rows.append([])
        if self._other:
            from msllm.bench import torch_reference

            self._torch_session = torch_reference.Session(self._other, prefill)
            self._torch_session.step()
            self.torch_rows.append([])
            self._torch_tokens: list[np.ndarray] = []

    def step(self) -> None:
        """Decodes and times one row."""
        self.rows[-1].append(_timed_step(self._session))
        if self._other:
            row, *times = timed(self._torch_session.step)
            self.torch_rows[-1].append(Times(*times))
            self._torch_tokens.append(row)

    def end_pass(self) -> None:
        """Times `session.run`, during which rows may leave the window, and closes the session."""
        if self._other:
            self.same_rows.append(self._count_same_rows())
        steps = self._case["steps"]
        _, cpu, wall = timed(self._session.run, steps)
        self.runs.append(Times(cpu / steps, wall / steps))
        self._session.close()

    def _count_same_rows(self) -> int:
        """Returns the number of rows before the first one that differs from torch."""
        theirs = np.array(self._torch_tokens)
        ours = self._session.transcript().tokens[self._case["prefill"] + 1 :][: len(theirs)]
        differs = (ours != theirs).any(axis=1)
        return int(differs.argmax()) if differs.any() else len(theirs)


def decode_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures one case and returns a result for `streams` streams and one for a single stream.

    Args:
      case: the settings of `runner.SETTINGS["decode"]`, with one value of rows, batch and
        cache_dtype. `rows` is the total number of rows. The model reads the first `prefill` rows in
        one pass.
    """
    fields = ModelConfig.__dataclass_fields__
    config = ModelConfig(**{name: value for name, value in case.items() if name in fields})
    size, medium = case["streams"], case["medium"]
    kinds = dict.fromkeys([(size, medium), (size, "latent"), (1, "latent")])
    measured = {kind: _Measured(_make_model(config, *kind), case) for kind in kinds}
    compiled = _Compilations()
    for _ in range(PASSES):
        for one in measured.values():
            one.begin_pass()
        for _ in range(case["rows"] - case["prefill"]):
            for one in measured.values():  # in turn, so that other work affects all of them
                one.step()
        for one in measured.values():
            one.end_pass()
    lines = {kind: _line(case, *kind, one) for kind, one in measured.items()}
    for line in lines.values():
        line["compiled_meanwhile"] = compiled.count
    many = lines[size, medium]
    others = {"cost_of_one_stream": lines[1, "latent"]}
    if medium != "latent":
        others["time_to_latent"] = lines[size, "latent"]
    for name, other in others.items():
        for what in ("cpu", "wall"):
            ratio = many[f"{what}_ms_per_row"] / other[f"{what}_ms_per_row"]
            many[f"{name}_{what}"] = round(ratio, 2)
    return list(lines.values())


def _make_model(config: ModelConfig, size: int, medium: str) -> LoadedModel:
    names = tuple(f"s{i}" for i in range(size))
    streams = StreamSpec.from_config(
        StreamsConfig(names=names, kinds=("output",) * size, visibility_medium=medium)
    )
    make_parameters = jax.jit(functools.partial(init_parameters, config, streams, 0))
    return LoadedModel(config, streams, make_parameters())


def _prefill(model: LoadedModel, case: dict[str, Any]) -> np.ndarray:
    shape = (case["prefill"], model.streams.size)
    return np.random.default_rng(0).integers(0, model.config.vocab_size, shape)


def _warm_engine(model: LoadedModel, case: dict[str, Any]) -> Engine:
    """Returns an engine whose compiled functions include all that a session needs."""
    window = case["rows"] + case["steps"]  # `run` adds `steps` rows
    engine = Engine(model, window=window, cache_dtype=case["cache_dtype"], silence_id=0)
    with engine.open(prefill=_prefill(model, case)) as session:
        session.force(0, [FREE, 1])
        session.step()
        session.run(2)
    return engine


def _torch_model(model: LoadedModel) -> torch_reference.Model:
    from msllm.bench import torch_reference

    return torch_reference.Model(model.config, model.streams.size, model.parameters)


def _timed_step(session: Session) -> _RowTimes:
    """Times `session.step()`, and within it the compiled call until its results are ready."""
    engine, marks = session._engine, []
    advance, collect = engine._program.advance, engine._collect

    def marked_advance(*arguments):
        marks.append(time.perf_counter())
        return advance(*arguments)

    def marked_collect(flight):
        jax.block_until_ready(flight.out)
        marks.append(time.perf_counter())
        return collect(flight)

    with (
        mock.patch.object(engine._program, "advance", marked_advance),
        mock.patch.object(engine, "_collect", marked_collect),
    ):
        _, cpu, wall = timed(session.step)
    begin, end = marks
    return _RowTimes(cpu, wall, end - begin)


def _line(case: dict[str, Any], size: int, medium: str, measured: _Measured) -> dict[str, Any]:
    cpu, wall, device = _milliseconds(measured.rows)
    run_cpu, run_wall = 1e3 * np.median(measured.runs, axis=0)
    line = {
        "benchmark": "decode",
        **case,
        "streams": size,
        "medium": medium,
        "wall_ms_per_row": _median(wall),
        "cpu_ms_per_row": _median(cpu),
        "rows_per_second": round(1e3 / np.median(wall), 1),
        "tokens_per_second": round(size * 1e3 / np.median(wall), 1),
        "rows_per_cpu_second": round(1e3 / np.median(cpu), 1),
        "last_rows_to_first_rows_cpu": _last_to_first(cpu),
        "last_rows_to_first_rows_wall": _last_to_first(wall),
        "host_share": round(float(np.median((wall - device) / wall)), 4),
        "run_wall_ms_per_row": round(run_wall, 3),
        "run_cpu_ms_per_row": round(run_cpu, 3),
        "device_kind": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    if measured.torch_rows:
        cpu, wall = _milliseconds(measured.torch_rows)
        line |= {
            "torch_cpu_ms_per_row": _median(cpu),
            "torch_wall_ms_per_row": _median(wall),
            "torch_time_to_ours_cpu": round(np.median(cpu) / line["cpu_ms_per_row"], 2),
            "torch_time_to_ours_wall": round(np.median(wall) / line["wall_ms_per_row"], 2),
            "torch_last_rows_to_first_rows_cpu": _last_to_first(cpu),
            "torch_last_rows_to_first_rows_wall": _last_to_first(wall),
            "torch_same_rows": min(measured.same_rows),
        }
    return line


def _milliseconds(passes: Sequence[Sequence[tuple[float, ...]]]) -> np.ndarray:
    """Converts times in seconds to milliseconds in an array [fields, passes, rows]."""
    return 1e3 * np.moveaxis(np.array(passes), 2, 0)


def _median(times: np.ndarray) -> float:
    return round(float(np.median(times)), 3)


def _last_to_first(times: np.ndarray) -> float:
    """Returns the ratio of the last rows' time to that of the first, from times [passes, rows]."""
    return _median(np.median(times[:, -EDGE:]) / np.median(times[:, :EDGE]))


class _Compilations:
    """Counts compilations from its creation on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event.endswith("backend_compile_duration")
