"""Compiles the train step for a TPU pod on a machine without one, and reports whether it fits and
what it moves.

The step is the one that trains, and the compiler is the real one (libtpu). docs/aot.md explains the
report.
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
EXCESS = 0.02  # by which a program may exceed its budget
SHOWN_SHAPES = 8  # of a collective with many operands
# libtpu reads these when it is loaded. Otherwise it looks for a TPU, and for other processes that
# use one.
_LIBTPU_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def topology_devices(name: str, num_slices: int = 1) -> list[Any]:
    """The devices of a TPU topology, none of which need exist.

    Args:
      name: such as "v5e:16x16".
      num_slices: slices of that topology, joined by the network of the data centre.

    Raises:
      UserError: libtpu is not installed, or it does not know the topology.
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
        options["chip_config_name"] = "megacore"  # a chip is one device, as on a TPU VM
    if re.fullmatch(r"\w+:1x1", name):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
        return list(topology.devices)
    except Exception as error:  # jaxlib raises its own type for bad names, others for bad options
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--topology is {name!r}: {first}; examples: {EXAMPLES}") from error


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What is known of a step after it was compiled, or after the compiler refused it."""

    report: dict[str, Any]  # in JSON's types
    hlo: str  # the compiled program; "" if there is none

    @property
    def fits(self) -> bool:
        """Whether the program fits into the memory of a device."""
        return self.report["memory"]["fits"]


def analyse(config: Config, devices: Sequence[Any]) -> Analysis:
    """Compiles the train step of `config` for `devices` and reports.

    Raises:
      UserError: the config cannot be compiled for these devices.
    """
    config, hardware = resolve_visibility(config), _checked_hardware(config, devices)
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
            "config.model.vocab_size is 0 (the tokenizer's size): aot reads no data, give a "
            "number, e.g. --config.model.vocab_size=32000"
        )
    kind = devices[0].device_kind
    hardware = lookup(kind)
    if hardware is None:
        raise UserError(
            f"no figures for the device {kind!r}: msllm/runtime/hardware.py knows "
            f"{', '.join(TABLE)}"
        )
    return hardware


def _local_bytes(leaf: Any) -> int:
    """Bytes of an abstract array on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _facts(
    program: Program, shape: roofline.Shape, devices: Sequence[Any], hardware: Hardware
) -> dict[str, Any]:
    """What is known before the step is compiled."""
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
    """The compiled step and ""; or None and what the compiler says if it does not fit."""
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
    """Bytes on one device by use, and whether they fit.

    The compiler places every buffer, and refuses a program that does not fit.
    """
    limit = hardware.hbm_gib * GIB
    if compiled is None:
        return {"fits": False, "limit": limit, "compiler_says": refusal}
    stats = compiled.memory_analysis()
    assert stats is not None, "the compiler gives no memory analysis"
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    # Aliased outputs reuse the memory of donated arguments.
    total = sum(sizes.values()) - 2 * sizes["aliased"]
    peak = stats.peak_memory_in_bytes
    return {"fits": True, "limit": limit, **sizes, "total": total, "peak": peak}


def _collectives(found: collectives.Program, shape: roofline.Shape) -> dict[str, Any]:
    """Sums by kind, network and mesh axes, and what stands out."""
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
            largest = max(largest or single, single, key=lambda one: one["bytes"])
    return {
        "definition": "bytes of the larger side (operands or result) on one device, times "
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
    """Whether it moves an embedding or a head that is not spread along d_model."""
    model = shape.config.model
    table = sorted((model.vocab_size // shape.parts("vocab"), model.d_model))
    arrays = [array for text in collective.shapes for array in hlo.shapes_of(text)]
    return any(sorted(size for size in dims if size > 1) == table for _, dims in arrays)


def finite(value: Any) -> Any:
    """The value in JSON's types: null for what is not a finite number, lists for tuples."""
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
    say: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Analyses every remat policy with several batch sizes.

    Args:
      config: what to vary.
      devices: what to compile for.
      multiples: factors on the batch size, ascending. After one that does not fit, larger ones are
        not tried.
      say: called with each row as soon as it is known.

    Returns:
      A row for each combination. `error` says why there are no figures.
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
            if say is not None:
                say(row)
    return rows


def _figures(config: Config, devices: Sequence[Any]) -> dict[str, Any]:
    """What a row of a sweep says about a config, or the error that it gives."""
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
    """The content of a budget file for a report."""
    return {
        "topology": topology,
        "num_slices": report["slices"],
        "peak_gib": round(report["memory"]["peak"] / GIB, 3),
        "sum_gib": round(report["memory"]["total"] / GIB, 3),
        "collective_bytes": dict(report["collectives"]["bytes_by_kind"]),
    }


def over_budget(report: dict[str, Any], topology: str, budget: dict[str, Any]) -> list[str]:
    """What exceeds the budget by more than EXCESS, one line each.

    Raises:
      UserError: the budget is for another topology or another number of slices.
    """
    now = budget_of(report, topology)
    for key in ("topology", "num_slices"):
        if budget.get(key) != now[key]:
            raise UserError(
                f"the budget is for {key} {budget.get(key)!r}: this is {now[key]!r}; "
                "use its own or --write_budget"
            )
    lines = []
    for name in ("peak", "sum"):
        size, allowed = now[f"{name}_gib"], budget[f"{name}_gib"]
        if size > allowed * (1 + EXCESS):
            lines.append(f"memory, {name}: {size:.3f} GiB, the budget is {allowed:.3f} GiB")
    for kind, size in now["collective_bytes"].items():
        allowed = budget["collective_bytes"].get(kind, 0)
        if size > allowed * (1 + EXCESS):
            now_gib, budget_gib = size / GIB, allowed / GIB
            lines.append(f"{kind}: {now_gib:.3f} GiB a step, the budget is {budget_gib:.3f} GiB")
    return lines
