"""Compiles the train step for a TPU pod on a CPU machine and reports memory and collectives.

The step is the function that training runs, and the compiler is libtpu, as on a TPU. docs/aot.md
explains the report.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from msllm.config import Config
from msllm.errors import UserError
from msllm.pod import collectives, hlo, roofline
from msllm.pod.collectives import Collective
from msllm.runtime.hardware import TABLE, Hardware, lookup
from msllm.sharding import make_mesh
from msllm.step import Program
from msllm.streams import StreamSpec, resolve_visibility

GIB = 2**30
EXAMPLES = "v5e:2x2, v5e:4x4, v5e:16x16, v6e:8x8, v5p:4x4x4, v4:4x4x4, tpu7x:4x4x4"
BUDGET_TOLERANCE = 0.02  # share by which a program may exceed its budget
SHOWN_SHAPES = 8  # operands that the report lists for one collective
# libtpu reads these variables when it is loaded. Without them it looks for a TPU and for other
# processes that use one.
_LIBTPU_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def topology_devices(name: str, num_slices: int = 1) -> list[Any]:
    """Returns the devices of a TPU topology for compilation. No TPU is needed.

    Args:
      name: the topology of a slice, such as "v5e:16x16".
      num_slices: number of such slices, connected by the data centre network.

    Raises:
      UserError: libtpu is not installed or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            'libtpu, the TPU compiler, is not installed: pip install "jax[tpu]" (no TPU is needed)'
        )
    if num_slices < 1:
        raise UserError(f"--num_slices is {num_slices}: must be at least 1")
    for variable, value in _LIBTPU_VARIABLES.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if name.startswith("v4:"):
        # Both cores of a chip form one device, as on a TPU VM.
        options["chip_config_name"] = "megacore"
    if re.fullmatch(r"\w+:1x1", name):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        return list(topology.devices)
    except Exception as error:  # the type depends on what is wrong with the name
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--topology is {name!r}: {first}; examples: {EXAMPLES}") from error


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The result of compiling a step, whether or not the compiler accepted it.

    Attributes:
      report: all figures, as JSON values.
      hlo: the text of the compiled program; "" if the compiler refused it.
    """

    report: dict[str, Any]
    hlo: str

    @property
    def fits(self) -> bool:
        """Whether the program fits in the memory of a device."""
        return self.report["memory"]["fits"]


def _with_stand_ins(config: Config) -> Config:
    """Replaces the texts in `streams.token_sets` by ids. Which ids makes no difference here."""
    sets = {name: tuple(range(len(x))) for name, x in config.streams.token_sets.items()}
    streams = dataclasses.replace(config.streams, token_sets=sets)
    return dataclasses.replace(config, streams=streams)


def analyse(config: Config, devices: Sequence[Any]) -> Analysis:
    """Compiles the train step of a config and analyses the program.

    Args:
      config: the run to analyse. Its `model.vocab_size` must not be 0.
      devices: the devices to compile for, e.g. those of `topology_devices`.

    Raises:
      UserError: the config cannot be compiled for these devices.
    """
    config, hardware = resolve_visibility(config), _checked_hardware(config, devices)
    config = _with_stand_ins(config)
    streams = StreamSpec.from_config(config.streams)
    mesh = make_mesh(config.mesh, devices)
    program = Program(config, streams, mesh)
    shape = roofline.Shape(config, streams, dict(mesh.shape), program.backend.name)
    state_bytes = sum(map(_local_bytes, jax.tree.leaves(program.abstract_state)))
    report = _facts(program, shape, devices, hardware)

    begin, begin_cpu = time.perf_counter(), time.process_time()
    compiled, refusal = _compile(program)
    report["compile_seconds"] = time.perf_counter() - begin
    report["compile_cpu_seconds"] = time.process_time() - begin_cpu

    memory = report["memory"] = _memory(compiled, refusal, hardware)
    memory["parts_by_formula"] = roofline.memory_parts(shape, state_bytes)
    memory["remedies"] = [] if memory["fits"] else roofline.remedies(shape, state_bytes)
    if compiled is None:
        return Analysis(report, "")
    text, in_mesh = compiled.as_text() or "", list(mesh.devices.flat)
    found = collectives.read(text, in_mesh)
    report["collectives"] = _collectives(found, shape)
    report["estimate"] = roofline.estimate(shape, state_bytes, found.collectives, in_mesh, hardware)
    report["assumptions"] = list(roofline.ASSUMPTIONS)
    return Analysis(finite(report), text)


def _checked_hardware(config: Config, devices: Sequence[Any]) -> Hardware:
    if config.model.vocab_size == 0:
        raise UserError(
            "config.model.vocab_size is 0, which means the size of the tokenizer: aot reads no "
            "tokenizer, so give a number, e.g. --config.model.vocab_size=32000"
        )
    kind = devices[0].device_kind
    hardware = lookup(kind)
    if hardware is None:
        raise UserError(
            f"no figures for the device {kind!r}: add it to msllm/runtime/hardware.py, which has "
            f"{', '.join(TABLE)}"
        )
    return hardware


def _local_bytes(leaf: Any) -> int:
    """Returns the bytes of an abstract array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _facts(
    program: Program, shape: roofline.Shape, devices: Sequence[Any], hardware: Hardware
) -> dict[str, Any]:
    """Returns the part of the report that needs no compilation."""
    config, parameters = program.config, jax.tree.leaves(program.abstract_state.parameters)
    return {
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "slices": len({getattr(device, "slice_index", None) or 0 for device in devices}),
        "mesh": shape.mesh,
        "rows": config.data.rows,
        "streams": shape.streams.size,
        "batch_size": config.data.batch_size,
        "accumulate": config.optim.accumulate,
        "cells_per_device": shape.cells * config.optim.accumulate,
        "remat": config.model.remat,
        "attention": shape.attention,
        "parameters": sum(math.prod(leaf.shape) for leaf in parameters),
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "hardware": dataclasses.asdict(hardware),
    }


def _compile(program: Program) -> tuple[jax.stages.Compiled | None, str]:
    """Compiles the step. Returns (step, ""), or (None, the compiler's message) if out of memory."""
    lowered = program.step.lower(program.abstract_state, program.abstract_batch)
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, "\n".join(str(error).strip().splitlines()[:12])


def _memory(
    compiled: jax.stages.Compiled | None, refusal: str, hardware: Hardware
) -> dict[str, Any]:
    """Returns the bytes on one device by use, and whether they fit.

    The compiler places every buffer and refuses a program that does not fit.
    """
    limit = hardware.hbm_gib * GIB
    if compiled is None:
        return {"fits": False, "limit": limit, "compiler_says": refusal}
    stats = compiled.memory_analysis()
    assert stats is not None, "the compiler returned no memory analysis"
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    # Aliased outputs reuse the memory of donated arguments, so the sum counts that memory twice.
    total = sum(sizes.values()) - 2 * sizes["aliased"]
    peak = stats.peak_memory_in_bytes
    return {"fits": True, "limit": limit, **sizes, "total": total, "peak": peak}


def _collectives(found: collectives.Program, shape: roofline.Shape) -> dict[str, Any]:
    """Sums up the collectives by kind, network and mesh axes, and lists notable ones."""
    rows: dict[tuple, dict[str, Any]] = {}
    by_kind: dict[str, int] = {}
    whole_tables, largest = [], None
    for collective in found.collectives:
        described = _described(collective, shape)
        key = tuple(described.values())
        row = rows.setdefault(key, {**described, "count": 0, "bytes": 0})
        row["count"] += collective.count
        row["bytes"] += collective.total_bytes
        kind = f"{collective.kind} over DCN" if collective.dcn else collective.kind
        by_kind[kind] = by_kind.get(kind, 0) + collective.total_bytes
        single = {
            **described,
            "count": collective.count,
            "bytes": collective.bytes,
            "shapes": list(collective.shapes)[:SHOWN_SHAPES],
            "source": collective.source,
        }
        if _holds_whole_table(collective, shape):
            whole_tables.append(single)
        if collective.kind == "all-reduce":
            if largest is None or single["bytes"] > largest["bytes"]:
                largest = single
    return {
        "definition": "bytes of the larger side, operands or result, on one device, times "
        "executions per step",
        "rows": sorted(rows.values(), key=lambda row: -row["bytes"]),
        "bytes_by_kind": dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        "largest_all_reduce": largest,
        "whole_embedding_tables": whole_tables,
        "loops_of_unknown_length": found.unknown_loops,
        "not_counted": found.unreached,
    }


def _described(collective: Collective, shape: roofline.Shape) -> dict[str, Any]:
    return {
        "kind": collective.kind,
        "network": "DCN" if collective.dcn else "ICI",
        "axes": "+".join(collectives.axes_of(collective.groups, shape.mesh)) or "none",
        "asynchronous": collective.asynchronous,
    }


def _holds_whole_table(collective: Collective, shape: roofline.Shape) -> bool:
    """Whether a collective moves an embedding or a head with its full d_model."""
    model = shape.config.model
    table = sorted((model.vocab_size // shape.parts("vocab"), model.d_model))
    arrays = [array for text in collective.shapes for array in hlo.shapes_of(text)]
    return any(sorted(size for size in dims if size > 1) == table for _, dims in arrays)


def finite(value: Any) -> Any:
    """Converts a value to JSON values: None for infinities and nan, lists for tuples."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def sweep(
    config: Config,
    devices: Sequence[Any],
    multiples: Sequence[int] = (1, 2, 4),
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Analyses every remat policy with several batch sizes.

    Args:
      config: the run to vary.
      devices: the devices to compile for.
      multiples: factors for the batch size, in ascending order. After one that does not fit, larger
        ones are not tried.
      on_row: called with each row as soon as it is known.

    Returns:
      One row per combination. A row without figures has the reason in `error`.
    """
    rows = []
    for remat in ("none", "dots", "full", "offload"):
        model, fits = dataclasses.replace(config.model, remat=remat), True
        for multiple in multiples:
            data = dataclasses.replace(config.data, batch_size=config.data.batch_size * multiple)
            row: dict[str, Any] = {"remat": remat, "batch_size": data.batch_size, "fits": False}
            if fits:
                row |= _figures(dataclasses.replace(config, model=model, data=data), devices)
            else:
                row["error"] = "not tried: a smaller batch does not fit"
            fits = row["fits"]
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return rows


def _figures(config: Config, devices: Sequence[Any]) -> dict[str, Any]:
    """Returns the figures of one sweep row, or the error that compiling its config raised."""
    try:
        report = analyse(config, devices).report
    except (UserError, jax.errors.JaxRuntimeError) as error:
        return {"error": str(error)}
    memory, estimate = report["memory"], report.get("estimate", {})
    return {
        "fits": memory["fits"],
        "bytes": memory.get("peak"),
        "compile_seconds": report["compile_seconds"],
        "error": memory.get("compiler_says", ""),
        "step_seconds": estimate.get("step_seconds"),
        "mfu": estimate.get("mfu"),
        "tokens_per_second_and_device": estimate.get("tokens_per_second_and_device"),
    }


def budget_of(report: dict[str, Any], topology: str) -> dict[str, Any]:
    """Returns the content of a budget file for a report."""
    return {
        "topology": topology,
        "num_slices": report["slices"],
        "peak_gib": round(report["memory"]["peak"] / GIB, 3),
        "sum_gib": round(report["memory"]["total"] / GIB, 3),
        "collective_bytes": dict(report["collectives"]["bytes_by_kind"]),
    }


def over_budget(report: dict[str, Any], topology: str, budget: dict[str, Any]) -> list[str]:
    """Returns one line for each figure that exceeds its budget by more than BUDGET_TOLERANCE.

    Args:
      report: the report of the program.
      topology: the topology that it was compiled for.
      budget: the content of a budget file.

    Raises:
      UserError: the budget is for another topology or another number of slices.
    """
    now = budget_of(report, topology)
    for key in ("topology", "num_slices"):
        if budget.get(key) != now[key]:
            raise UserError(
                f"the budget is for {key} {budget.get(key)!r}, but the program is for "
                f"{now[key]!r}: give a budget for the same {key}, or write one with --write_budget"
            )
    lines = []
    for name in ("peak", "sum"):
        size, allowed = now[f"{name}_gib"], budget[f"{name}_gib"]
        if size > allowed * (1 + BUDGET_TOLERANCE):
            lines.append(f"memory, {name}: {size:.3f} GiB, the budget is {allowed:.3f} GiB")
    for kind, size in now["collective_bytes"].items():
        allowed = budget["collective_bytes"].get(kind, 0)
        if size > allowed * (1 + BUDGET_TOLERANCE):
            now_gib, budget_gib = size / GIB, allowed / GIB
            lines.append(f"{kind}: {now_gib:.3f} GiB a step, the budget is {budget_gib:.3f} GiB")
    return lines
