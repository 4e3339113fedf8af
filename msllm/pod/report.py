"""Renders the report of `msllm aot` as text for a terminal and as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from msllm.view.pages import aligned, render, size_text

GIB = 2**30
SMALLEST = 1 / 500  # share of the largest collective below which one gets no bar
_PARTS = {
    "state": "parameters and moments",
    "gradients": "gradients",
    "kept_activations": "activations saved for the backward pass",
    "one_layer": "activations of the current layer",
    "gathered_keys": "gathered keys and values",
    "gathered_weights": "gathered weights",
    "logits": "logits of one loss chunk",
    "tables": "embedding and head",
}
_EXTRA_WORK = {
    "remat": "recomputation: remat",
    "attention_scores_again": "recomputation: attention scores",
    "logits_again": "recomputation: logits",
    "head_without_weight": "head of streams without loss weight",
    "absent_streams": "padding of the stream axis",
}
_COLLECTIVE_COLUMNS = ("kind", "mesh axes", "network", "times", "bytes")
_NUMBERS = (3, 4)  # the columns with numbers
# CSS classes of the colours in view/page.html.
_BLUE, _GREEN, _YELLOW, _RED, _VIOLET = "c1", "c2", "c3", "c4", "c5"


class Bar(NamedTuple):
    """One bar of a chart.

    Attributes:
      name: the label.
      size: the length, relative to the other bars.
      text: the size with its unit.
      color: a CSS class.
    """

    name: str
    size: float
    text: str
    color: str = _BLUE


def text(report: Mapping[str, Any]) -> str:
    """Renders a report as text for a terminal."""
    lines = [_title(report), *_indented(_facts(report)), "", *_memory_lines(report["memory"])]
    if "collectives" in report:
        lines += ["", *_collective_lines(report["collectives"])]
        lines += ["", *_estimate_lines(report["estimate"])]
        lines += ["", "Assumptions", *(f"  - {line}" for line in report["assumptions"])]
    return "\n".join(lines)


def html(report: Mapping[str, Any]) -> str:
    """Renders a report as an HTML page without scripts or external resources."""
    memory = report["memory"]
    values = {
        "title": _title(report),
        "facts": _facts(report),
        "fits": memory["fits"],
        "verdict": _verdict(memory),
        "memory_parts": _memory_parts(memory) if "total" in memory else [],
        "limit": memory["limit"],
        "limit_text": f"HBM {_gib(memory['limit'])} GiB",
        "memory_rows": _size_texts(_memory_rows(memory)) if "total" in memory else [],
        "compiler_says": memory.get("compiler_says", ""),
        "remedies": _remedies(memory),
        "uses": [Bar(name, size, size_text(size)) for name, size in _uses(memory)],
        "collectives": None,
    }
    if "collectives" in report:
        collectives, estimate = report["collectives"], report["estimate"]
        moved = sum(collectives["bytes_by_kind"].values())
        values |= {
            "figures": {
                "GiB of memory at peak": f"{_gib(memory['peak'])} / {_gib(memory['limit'])}",
                "GiB in collectives": _gib(moved),
                "ms per step, estimated": _ms(estimate["step_seconds"]),
                "MFU, estimated": _percent(estimate["mfu"]),
            },
            "collectives": _collective_bars(collectives["rows"]),
            "collective_columns": _COLLECTIVE_COLUMNS,
            "collective_rows": _collective_rows(collectives["rows"]),
            "numbers": _NUMBERS,
            "notes": [*_notes(collectives), f"Bytes are {collectives['definition']}."],
            "times": _times(estimate),
            "estimate_rows": _estimate_rows(estimate),
            "assumptions": report["assumptions"],
        }
    return render("pod/report.html", **values)


def sweep_header() -> str:
    """Returns the column names of `sweep_line`."""
    return "remat    tables  fits   peak  step ms    MFU  compile s"


def sweep_line(row: Mapping[str, Any]) -> str:
    """Renders one row of a sweep."""
    line = f"{row['remat']:<7}  {row['batch_size']:>6}  {'yes' if row['fits'] else 'no':<4}"
    if row.get("bytes") is None:
        return f"{line}  {' '.join(row['error'].split())[:160]}"
    line += f"  {_gib(row['bytes']):>5}  {_ms(row['step_seconds']):>7}  {_percent(row['mfu']):>5}"
    return f"{line}  {row['compile_seconds']:>9.0f}"


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / GIB:,.2f}"


def _ms(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds * 1e3:,.{1 if seconds > 0.01 else 3}f}"


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.1%}"


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _title(report: Mapping[str, Any]) -> str:
    slices = f"{report['slices']} x " if report["slices"] > 1 else ""
    return f"{report['config']} on {slices}{report['topology']}"


def _facts(report: Mapping[str, Any]) -> list[str]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    return [
        f"{report['devices']} devices ({report['device_kind']}), mesh {mesh}",
        f"{report['parameters'] / 1e6:,.1f} M parameters; "
        f"{report['batch_size']} tables of {report['rows']} rows x {report['streams']} streams "
        f"per step in {report['accumulate']} micro-batch(es): {report['cells_per_device']:,.0f} "
        f"cells per device; remat {report['remat']}, attention {report['attention']}",
        f"compiled in {report['compile_seconds']:.0f} s ({report['compile_cpu_seconds']:.0f} "
        f"CPU-s) by libtpu {report['libtpu']}, jax {report['jax']}",
    ]


# Memory


def _memory_lines(memory: Mapping[str, Any]) -> list[str]:
    lines = ["Memory of one device"]
    if "total" in memory:
        lines += aligned(_size_texts(_memory_rows(memory)), (1,))
    lines += _indented([_verdict(memory)])
    if "compiler_says" in memory:
        lines += ["", *_indented(memory["compiler_says"].splitlines())]
    uses = aligned(_size_texts(_uses(memory)), (1,))
    lines += ["", "Memory by formula, largest use first", *uses]
    return [*lines, *_indented(_remedies(memory))]


def _memory_rows(memory: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [
        ("arguments", memory["arguments"]),
        ("outputs", memory["outputs"]),
        ("aliased (donated)", -memory["aliased"]),
        ("temporaries", memory["temporaries"]),
        ("code", memory["code"]),
        ("sum", memory["total"]),
        ("peak", memory["peak"]),
    ]


def _memory_parts(memory: Mapping[str, Any]) -> list[Bar]:
    """Returns the parts of the sum, without outputs that reuse the memory of arguments."""
    beyond = max(memory["outputs"] - memory["aliased"], 0)
    parts = [
        ("arguments (state, batch)", memory["arguments"], _BLUE),
        ("other outputs", beyond, _VIOLET),
        ("temporaries", memory["temporaries"], _YELLOW),
        ("code", memory["code"], _GREEN),
    ]
    return [Bar(name, size, size_text(size), color) for name, size, color in parts]


def _size_texts(rows: Iterable[tuple[str, float]]) -> list[tuple[str, str]]:
    return [(name, size_text(size)) for name, size in rows]


def _verdict(memory: Mapping[str, Any]) -> str:
    limit = _gib(memory["limit"])
    if "total" not in memory:
        return f"does not fit: the compiler refused it (HBM for a program: {limit} GiB)"
    verdict = f"fits: {_gib(memory['peak'])} of {limit} GiB at peak"
    over = memory["total"] - memory["limit"]
    if over > 0:
        verdict += f", but with no room for fragmentation: the sum exceeds HBM by {_gib(over)} GiB"
    return verdict


def _uses(memory: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Returns (use, bytes) by formula, largest first."""
    parts = memory["parts_by_formula"]
    return [(_PARTS[part], parts[part]) for part in sorted(parts, key=parts.get, reverse=True)]


def _remedies(memory: Mapping[str, Any]) -> list[str]:
    order = ["first", *["then"] * len(memory["remedies"])]
    return [f"change {when}: {line}" for when, line in zip(order, memory["remedies"], strict=False)]


# Collectives


def _collective_lines(collectives: Mapping[str, Any]) -> list[str]:
    rows = [_COLLECTIVE_COLUMNS, *_collective_rows(collectives["rows"])]
    return [
        f"Collectives of one step ({collectives['definition']})",
        *aligned(rows, _NUMBERS),
        *_indented(_notes(collectives)),
    ]


def _collective_rows(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Returns table rows with the columns _COLLECTIVE_COLUMNS."""
    texts: list[tuple[str, ...]] = []
    for row in rows:
        network = f"{row['network']}, {_hiding(row['asynchronous'])}"
        count, size = f"{row['count']:,}", size_text(row["bytes"])
        texts.append((row["kind"], row["axes"], network, count, size))
    return texts


def _collective_bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    bars = []
    for row in rows:
        if row["bytes"] > SMALLEST * rows[0]["bytes"]:
            dcn = " (DCN)" if row["network"] == "DCN" else ""
            color = _YELLOW if row["asynchronous"] else _RED
            name = f"{row['kind']}, {row['axes']}{dcn}"
            bars.append(Bar(name, row["bytes"], size_text(row["bytes"]), color))
    return bars


def _hiding(asynchronous: bool) -> str:
    return "asynchronous" if asynchronous else "synchronous"


def _notes(collectives: Mapping[str, Any]) -> list[str]:
    notes = []
    if largest := collectives["largest_all_reduce"]:
        notes.append(f"largest all-reduce: {_collective(largest)}")
    for table in collectives["whole_embedding_tables"]:
        notes.append(f"whole embedding table or head: {_collective(table)}")
    for loop in collectives["loops_of_unknown_length"]:
        notes.append(
            f"the trip count of the loop {loop} depends on the data: its collectives count once"
        )
    for name in collectives["not_counted"]:
        notes.append(
            f"NOT COUNTED: collectives in {name}, because msllm/pod/collectives.py does not know "
            "how it is called"
        )
    return notes


def _collective(one: Mapping[str, Any]) -> str:
    size, shapes = size_text(one["bytes"]), ", ".join(one["shapes"])
    return f"{one['kind']} over {one['axes']}, {size} x {one['count']}: {shapes}"


# Time


def _estimate_lines(estimate: Mapping[str, Any]) -> list[str]:
    times = [(bar.name, bar.text) for bar in _times(estimate)]
    return [
        "Estimate for one device and step (in parentheses: lower to upper bound)",
        *aligned(_estimate_rows(estimate)),
        *aligned(times, (1,)),
    ]


def _estimate_rows(estimate: Mapping[str, Any]) -> list[tuple[str, str]]:
    work, speed = estimate["flops"], estimate["tokens_per_second_and_device"]
    rows = [("useful TFLOP", f"{work['useful'] / 1e12:,.3g}")]
    for key, label in _EXTRA_WORK.items():
        if work[key]:
            rows.append((f"+ {label}", f"{work[key] / 1e12:,.3g}"))
    rows.append(("hardware TFLOP", f"{work['hardware'] / 1e12:,.3g}"))
    rows.append(("HBM traffic", size_text(estimate["hbm_bytes"]["total"])))
    if estimate["host_bytes"]:
        rows.append(("to the host and back", size_text(estimate["host_bytes"])))
    intensity, balance = estimate["arithmetic_intensity"], estimate["intensity_of_the_hardware"]
    seconds = " to ".join(map(_ms, estimate["step_seconds_bounds"]))
    mfu = " to ".join(map(_percent, estimate["mfu_bounds"]))
    return [
        *rows,
        ("FLOP per byte", f"{intensity:,.0f} (hardware: {balance:,.0f})"),
        ("step time, ms", f"{_ms(estimate['step_seconds'])} ({seconds})"),
        ("MFU", f"{_percent(estimate['mfu'])} ({mfu})"),
        ("cells per second and device", "?" if speed is None else f"{speed:,.0f}"),
    ]


def _times(estimate: Mapping[str, Any]) -> list[Bar]:
    """Returns a bar for each resource, in seconds; 0 where a hardware figure is unknown."""
    times = [
        ("compute at peak", estimate["compute_seconds"], _BLUE),
        ("HBM", estimate["hbm_seconds"], _GREEN),
    ]
    for network, seconds in estimate["network_seconds"].items():
        for asynchronous, color in ((True, _YELLOW), (False, _RED)):
            kind = _hiding(asynchronous)
            if seconds[kind] is None or seconds[kind] > 0:
                times.append((f"{network}, {kind}", seconds[kind], color))
    return [Bar(name, seconds or 0.0, f"{_ms(seconds)} ms", c) for name, seconds, c in times]
