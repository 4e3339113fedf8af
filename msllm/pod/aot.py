"""Compiles the train step for a TPU pod on a machine without one, and says whether it fits and what it moves.

The step is the one that trains, the compiler is the real one (libtpu); docs/aot.md explains the report.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from msllm.config import Config
from msllm.errors import UserError
from msllm.pod import hlo, roofline
from msllm.runtime.hardware import TABLE, Hardware, lookup
from msllm.sharding import make_mesh
from msllm.step import Program
from msllm.streams import StreamSpec

GIB = 2**30
EXAMPLES = "v5e:2x2, v5e:4x4, v5e:16x16, v6e:8x8, v5p:4x4x4, v4:4x4x4, tpu7x:4x4x4"
EXCESS = 0.02  # by which a program may exceed its budget


def topology_devices(name: str, num_slices: int = 1) -> list[Any]:
    """The devices of a TPU topology such as `v5e:16x16`, none of which need exist. Raises UserError."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            'libtpu, the TPU compiler, is not installed: pip install "jax[tpu]" (no TPU is needed)'
        )
    if num_slices < 1:
        raise UserError(f"--num_slices is {num_slices}: must be at least 1")
    # libtpu reads these when it is loaded: it must not look for a TPU, nor for other processes that use one.
    for variable in (
        "TPU_SKIP_MDS_QUERY=1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD=1",
        "TPU_WORKER_HOSTNAMES=localhost",
    ):
        os.environ.setdefault(*variable.split("="))
    from jax.experimental import topologies

    options = {"num_slices": num_slices} if num_slices > 1 else {}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # a chip is one device, as on a TPU VM
    if re.fullmatch(r"\w+:1x1", name):
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(
            topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
        )
    except Exception as error:  # jaxlib raises its own type for bad names, others for bad options
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--topology is {name!r}: {first}; examples: {EXAMPLES}") from error


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What is known of a step after it was compiled, or after the compiler refused it."""

    report: dict[str, Any]  # all of it, for JSON
    hlo: str  # the compiled program; "" if there is none

    @property
    def fits(self) -> bool:
        return self.report["memory"]["fits"]


def analyse(config: Config, devices: Sequence[Any]) -> Analysis:
    """Compiles the train step of `config` for `devices` and reports. Raises UserError."""
    if config.model.vocab_size == 0:
        raise UserError(
            "config.model.vocab_size is 0 (the tokenizer's size): aot reads no data, give a number, e.g. "
            "--config.model.vocab_size=32000"
        )
    hardware = lookup(devices[0].device_kind)
    if hardware is None:
        raise UserError(
            f"no figures for the device {devices[0].device_kind!r}: msllm/runtime/hardware.py knows {', '.join(TABLE)}"
        )
    streams = StreamSpec.from_config(config.streams)
    mesh = make_mesh(config.mesh, devices)
    program = Program(config, streams, mesh)
    shape = roofline.Shape(config, streams, dict(mesh.shape), program.backend.name)

    def local_bytes(leaf):
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    state_bytes = sum(map(local_bytes, jax.tree.leaves(program.abstract_state)))
    report = {
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "slices": len({getattr(device, "slice_index", None) or 0 for device in devices}),
        "mesh": dict(mesh.shape),
        "rows": config.data.rows,
        "streams": streams.size,
        "batch_size": config.data.batch_size,
        "accumulate": config.optim.accumulate,
        "cells_per_device": shape.cells * config.optim.accumulate,
        "remat": config.model.remat,
        "attention": program.backend.name,
        "parameters": sum(
            math.prod(leaf.shape) for leaf in jax.tree.leaves(program.abstract_state.parameters)
        ),
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "hardware": dataclasses.asdict(hardware),
    }
    begin, begin_cpu = time.perf_counter(), time.process_time()
    compiled, refusal = None, ""
    try:
        compiled = program.step.lower(program.abstract_state, program.abstract_batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = "\n".join(str(error).strip().splitlines()[:12])
    report["compile_seconds"] = time.perf_counter() - begin
    report["compile_cpu_seconds"] = time.process_time() - begin_cpu
    report["memory"] = _memory(compiled, refusal, hardware)
    report["memory"]["parts_by_formula"] = roofline.memory_parts(shape, state_bytes)
    report["memory"]["remedies"] = (
        [] if report["memory"]["fits"] else roofline.remedies(shape, state_bytes)
    )
    if compiled is None:
        return Analysis(report, "")
    text = compiled.as_text()
    flat = list(mesh.devices.flat)
    found = hlo.read(text, flat)
    report["collectives"] = _collectives(found, shape)
    report["estimate"] = roofline.estimate(shape, state_bytes, found.collectives, flat, hardware)
    report["assumptions"] = list(roofline.ASSUMPTIONS)
    return Analysis(finite(report), text)


def _memory(compiled, refusal: str, hardware: Hardware) -> dict[str, Any]:
    """Bytes on one device by use, and whether they fit: the compiler places every buffer, and refuses what does not."""
    limit = hardware.hbm_gib * GIB
    if compiled is None:
        return {"fits": False, "limit": limit, "compiler_says": refusal}
    stats = compiled.memory_analysis()
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    total = (
        sum(sizes.values()) - 2 * sizes["aliased"]
    )  # outputs that reuse the memory of donated arguments
    return {
        "fits": True,
        "limit": limit,
        **sizes,
        "total": total,
        "peak": stats.peak_memory_in_bytes,
    }


def _collectives(found: hlo.Program, shape: roofline.Shape) -> dict[str, Any]:
    """Sums by kind, network and mesh axes, and what stands out."""
    rows: dict[tuple, dict[str, Any]] = {}
    by_kind: dict[str, int] = {}
    tables, largest = [], None
    whole_table = sorted(
        (shape.config.model.vocab_size // shape.parts("vocab"), shape.config.model.d_model)
    )
    for one in found.collectives:
        described = {
            "kind": one.kind,
            "network": "DCN" if one.dcn else "ICI",
            "axes": "+".join(hlo.axes_of(one.groups, shape.mesh)) or "none",
            "asynchronous": one.asynchronous,
        }
        row = rows.setdefault(tuple(described.values()), {**described, "count": 0, "bytes": 0})
        row["count"] += one.count
        row["bytes"] += one.total_bytes
        kind = f"{one.kind} over DCN" if one.dcn else one.kind
        by_kind[kind] = by_kind.get(kind, 0) + one.total_bytes
        single = {
            **described,
            "count": one.count,
            "bytes": one.bytes,
            "shapes": list(one.shapes)[:8],
            "source": one.source,
        }
        if any(
            sorted(n for n in dims if n > 1) == whole_table
            for text in one.shapes
            for _, dims in hlo.shapes_of(text)
        ):
            tables.append(single)
        if one.kind == "all-reduce" and (largest is None or one.bytes > largest["bytes"]):
            largest = single
    return {
        "definition": "bytes of the larger side (operands or result) on one device, times executions per step",
        "rows": sorted(rows.values(), key=lambda row: -row["bytes"]),
        "bytes_by_kind": dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        "largest_all_reduce": largest,
        "whole_embedding_tables": tables,
        "loops_of_unknown_length": found.unknown_loops,
        "not_counted": found.unreached,
    }


def finite(value):
    """The same with null for what is not a number: JSON has no nan."""
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
    say=lambda row: None,
) -> list[dict]:
    """One row per remat policy and batch size; goes on after what fails. `say` gets each row as soon as it is known."""
    rows = []
    for remat in ("none", "dots", "full", "offload"):
        failed = False
        for multiple in multiples:
            model = dataclasses.replace(config.model, remat=remat)
            data = dataclasses.replace(config.data, batch_size=config.data.batch_size * multiple)
            row = {"remat": remat, "batch_size": data.batch_size, "fits": False}
            if failed:
                row["error"] = "not tried: a smaller batch does not fit"
            else:
                try:
                    report = analyse(
                        dataclasses.replace(config, model=model, data=data), devices
                    ).report
                    row |= {"fits": report["memory"]["fits"], "bytes": report["memory"].get("peak")}
                    row["compile_seconds"] = report["compile_seconds"]
                    row["error"] = report["memory"].get("compiler_says", "")
                    for name in ("step_seconds", "mfu", "tokens_per_second_and_device"):
                        row[name] = report.get("estimate", {}).get(name)
                except (UserError, jax.errors.JaxRuntimeError) as error:
                    row["error"] = str(error)
                failed = not row["fits"]
            rows.append(row)
            say(row)
    return rows


def budget_of(report: dict[str, Any], topology: str) -> dict[str, Any]:
    """What a budget file holds of a report."""
    return {
        "topology": topology,
        "num_slices": report["slices"],
        "peak_gib": round(report["memory"]["peak"] / GIB, 3),
        "sum_gib": round(report["memory"]["total"] / GIB, 3),
        "collective_bytes": dict(report["collectives"]["bytes_by_kind"]),
    }


def over_budget(report: dict[str, Any], topology: str, budget: dict[str, Any]) -> list[str]:
    """What exceeds the budget by more than EXCESS, one line each. Raises UserError if it is another's budget."""
    now = budget_of(report, topology)
    for key in ("topology", "num_slices"):
        if budget.get(key) != now[key]:
            raise UserError(
                f"the budget is for {key} {budget.get(key)!r}: this is {now[key]!r}; use its own or --write_budget"
            )
    lines = []
    for name in ("peak", "sum"):
        size, allowed = now[f"{name}_gib"], budget[f"{name}_gib"]
        if size > allowed * (1 + EXCESS):
            lines.append(f"memory, {name}: {size:.3f} GiB, the budget is {allowed:.3f} GiB")
    for kind, size in now["collective_bytes"].items():
        allowed = budget["collective_bytes"].get(kind, 0)
        if size > allowed * (1 + EXCESS):
            lines.append(
                f"{kind}: {size / GIB:.3f} GiB a step, the budget is {allowed / GIB:.3f} GiB"
            )
    return lines
