"""The report of `msllm aot` as text and as one self-contained HTML page with pictures."""

from __future__ import annotations

import html as escape
from collections.abc import Mapping, Sequence
from typing import Any

from msllm.view.markup import aligned, document, figures, size_text, table

GIB = 2**30
_PARTS = {
    "state": "parameters and moments",
    "gradients": "gradients",
    "kept_activations": "activations kept for the backward pass",
    "one_layer": "one layer at work",
    "gathered_keys": "gathered keys and values",
    "gathered_weights": "gathered weights",
    "logits": "logits of one chunk",
    "tables": "embedding and head",
}


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / GIB:,.2f}"


def _ms(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds * 1e3:,.{1 if seconds > 0.01 else 3}f}"


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.1%}"


def _title(report: Mapping[str, Any]) -> str:
    slices = f"{report['slices']} x " if report["slices"] > 1 else ""
    return f"{report['config']} on {slices}{report['topology']}"


def _facts(report: Mapping[str, Any]) -> list[str]:
    mesh = " x ".join(f"{axis}={n}" for axis, n in report["mesh"].items())
    return [
        f"{report['devices']} devices ({report['device_kind']}), mesh {mesh}",
        f"{report['parameters'] / 1e6:,.1f} M parameters; {report['batch_size']} tables of {report['rows']} rows x "
        f"{report['streams']} streams a step in {report['accumulate']} part(s): "
        f"{report['cells_per_device']:,.0f} cells a device; remat {report['remat']}, attention {report['attention']}",
        f"compiled in {report['compile_seconds']:.0f} s ({report['compile_cpu_seconds']:.0f} CPU-s) by libtpu "
        f"{report['libtpu']}, jax {report['jax']}",
    ]


def _memory_rows(memory: Mapping[str, Any]) -> list[tuple[str, float]]:
    names = {"arguments": "arguments", "outputs": "outputs", "aliased": "aliased (donated)"}
    rows = [
        (names.get(key, key), memory[key])
        for key in ("arguments", "outputs", "aliased", "temporaries", "code")
    ]
    rows = [(name, -size if name.startswith("aliased") else size) for name, size in rows]
    return [*rows, ("sum of these", memory["total"]), ("peak", memory["peak"])]


def _verdict(memory: Mapping[str, Any]) -> str:
    limit = _gib(memory["limit"])
    if "total" not in memory:
        return f"does not fit: the compiler refused it (HBM for a program: {limit} GiB)"
    verdict = f"fits: at most {_gib(memory['peak'])} of {limit} GiB at a time"
    over = memory["total"] - memory["limit"]
    return (
        verdict
        if over <= 0
        else f"{verdict}, but without room for fragments: the sum is {_gib(over)} GiB more"
    )


def _how(row: Mapping[str, Any]) -> str:
    return f"{row['network']}, {'asynchronous' if row['asynchronous'] else 'synchronous'}"


def _notes(collectives: Mapping[str, Any]) -> list[str]:
    notes = []

    def one(c):
        return f"{c['kind']} over {c['axes']}, {size_text(c['bytes'])} x {c['count']}: {', '.join(c['shapes'])}"

    if largest := collectives["largest_all_reduce"]:
        notes.append(f"largest all-reduce: {one(largest)}")
    notes += [
        f"whole embedding table or head: {one(table)}"
        for table in collectives["whole_embedding_tables"]
    ]
    for loop in collectives["loops_of_unknown_length"]:
        notes.append(
            f"the length of the loop {loop} depends on the data: what it holds counts once"
        )
    for name in collectives["not_counted"]:
        notes.append(
            f"NOT COUNTED: collectives in {name}, which is called in a way that msllm/pod/hlo.py does not know"
        )
    return notes


def _estimate_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    estimate, memory = report["estimate"], report["estimate"]["hbm_bytes"]
    work = estimate["flops"]
    rows = [("useful TFLOP", f"{work['useful'] / 1e12:,.3g}")]
    extra = {"remat": "recomputed: remat", "attention_scores_again": "recomputed: attention scores"}
    extra["logits_again"] = "recomputed: logits"
    extra["head_without_weight"] = "head of streams without weight"
    extra["absent_streams"] = "streams that fill up the mesh axis"
    rows += [
        (f"+ {label}", f"{work[key] / 1e12:,.3g}") for key, label in extra.items() if work[key]
    ]
    rows += [
        ("hardware TFLOP", f"{work['hardware'] / 1e12:,.3g}"),
        ("HBM traffic", size_text(memory["total"])),
        *(
            [("to the host, and back", size_text(estimate["host_bytes"]))]
            if estimate["host_bytes"]
            else []
        ),
        (
            "FLOP per byte",
            f"{estimate['arithmetic_intensity']:,.0f} (of the hardware: {estimate['intensity_of_the_hardware']:,.0f})",
        ),
        (
            "step time, ms",
            f"{_ms(estimate['step_seconds'])} ({' to '.join(map(_ms, estimate['step_seconds_bounds']))})",
        ),
        (
            "MFU",
            f"{_percent(estimate['mfu'])} ({' to '.join(map(_percent, estimate['mfu_bounds']))})",
        ),
    ]
    speed = estimate["tokens_per_second_and_device"]
    return rows + [("cells per second and device", "?" if speed is None else f"{speed:,.0f}")]


def _time_rows(estimate: Mapping[str, Any]) -> list[tuple[str, float | None, str]]:
    """(what, seconds, class of its colour) of everything that takes time."""
    rows = [
        ("compute at peak", estimate["compute_seconds"], "c1"),
        ("HBM", estimate["hbm_seconds"], "c2"),
    ]
    for name, times in estimate["network_seconds"].items():
        for kind, colour in (("asynchronous", "c3"), ("synchronous", "c4")):
            if times[kind] is None or times[kind] > 0:
                rows.append((f"{name}, {kind}", times[kind], colour))
    return rows


def text(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    memory = report["memory"]
    lines = [_title(report), *("  " + fact for fact in _facts(report)), "", "Memory of one device"]
    if "total" in memory:
        lines += aligned([(name, size_text(size)) for name, size in _memory_rows(memory)], (1,))
    lines.append(f"  {_verdict(memory)}")
    if "compiler_says" in memory:
        lines += ["", *("  " + line for line in memory["compiler_says"].splitlines())]
    parts = memory["parts_by_formula"]
    largest = sorted(parts, key=parts.get, reverse=True)
    lines += [
        "  by formula: " + ", ".join(f"{_PARTS[part]} {size_text(parts[part])}" for part in largest)
    ]
    lines += [
        f"  change {'first' if i == 0 else 'then'}: {line}"
        for i, line in enumerate(memory["remedies"])
    ]
    if "collectives" in report:
        collectives = report["collectives"]
        lines += ["", f"Collectives of one step ({collectives['definition']})"]
        rows = [("kind", "mesh axes", "network", "times", "bytes")]
        rows += [
            (r["kind"], r["axes"], _how(r), f"{r['count']:,}", size_text(r["bytes"]))
            for r in collectives["rows"]
        ]
        lines += aligned(rows, (3, 4))
        lines += [f"  {note}" for note in _notes(collectives)]
        lines += ["", "Estimate for one device and step (lower and upper bound)"]
        lines += aligned(_estimate_rows(report), ())
        lines += aligned(
            [(name, f"{_ms(seconds)} ms") for name, seconds, _ in _time_rows(report["estimate"])],
            (1,),
        )
        lines += ["", "Assumptions", *(f"  - {line}" for line in report["assumptions"])]
    return "\n".join(lines)


def sweep_header() -> str:
    """Column names of `sweep_line`."""
    return "remat    tables  fits   peak  step ms    MFU  compile s"


def sweep_line(row: Mapping[str, Any]) -> str:
    """One row of a sweep."""
    fits = "yes" if row["fits"] else "no"
    line = f"{row['remat']:<7}  {row['batch_size']:>6}  {fits:<4}"
    if row.get("bytes") is not None:
        line += (
            f"  {_gib(row['bytes']):>5}  {_ms(row['step_seconds']):>7}  {_percent(row['mfu']):>5}"
        )
        return line + f"  {row['compile_seconds']:>9.0f}"
    return f"{line}  {' '.join(row['error'].split())[:160]}"


_STYLE = """
svg { display: block; width: 100%; min-width: 560px; height: auto; }
svg.mark { display: inline; width: 12px; min-width: 12px; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; } svg .soft { fill: var(--soft); }
.track { fill: var(--track); } .limit { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 4 3; }
.c1 { fill: var(--c1); } .c2 { fill: var(--c2); } .c3 { fill: var(--c3); } .c4 { fill: var(--c4); }
.c5 { fill: var(--c5); }
"""


def _svg(width: int, height: int, label: str, body: str) -> str:
    name = escape.escape(label, quote=True)
    return f'<div class=scroll><svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}">{body}</svg></div>'


def _memory_picture(memory: Mapping[str, Any]) -> str:
    """One stacked bar against the memory that there is."""
    width, left = 900, 10
    kept = memory["outputs"] - memory["aliased"]
    parts = [
        ("arguments (state, batch)", memory["arguments"], "c1"),
        ("outputs beyond them", max(kept, 0), "c5"),
        ("temporaries", memory["temporaries"], "c3"),
        ("code", memory["code"], "c2"),
    ]
    scale = (width - 2 * left) / max(memory["limit"], memory["total"])
    body = f'<rect class="track" x="{left}" y="26" width="{memory["limit"] * scale:.1f}" height="44" rx="4"/>'
    x, legend_x, legend = float(left), left, ""
    for name, size, colour in parts:
        title = f"<title>{name}: {size_text(size)}</title>"
        gap = 2 if size * scale > 4 else 0  # a line of background between neighbours
        shown = max(size * scale - gap, 0)
        body += f'<rect class="{colour}" x="{x:.1f}" y="26" width="{shown:.1f}" height="44">{title}</rect>'
        x += size * scale
        legend += f'<rect class="{colour}" x="{legend_x}" y="88" width="12" height="12" rx="2"/>'
        legend += f'<text x="{legend_x + 18}" y="99">{name} {size_text(size)}</text>'
        legend_x += 18 + int(7.4 * len(f"{name} {size_text(size)}")) + 16
    at = left + memory["limit"] * scale
    body += f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="18" y2="78"/>'
    body += f'<text class="soft" x="{at:.1f}" y="13" text-anchor="end">HBM {_gib(memory["limit"])} GiB</text>'
    return _svg(width, 110, "memory of one device by use", body + legend)


def _bars(rows: Sequence[tuple[str, float, str, str]], label: str) -> str:
    """Horizontal bars: (name, value, text of the value, colour)."""
    width, left, right, step = 900, 270, 130, 26
    top = max((value for _, value, _, _ in rows), default=0) or 1
    body = ""
    for i, (name, value, shown, colour) in enumerate(rows):
        length = (width - left - right) * value / top
        y = 4 + i * step
        body += f'<text x="{left - 10}" y="{y + 14}" text-anchor="end">{escape.escape(name)}</text>'
        body += f'<rect class="{colour}" x="{left}" y="{y}" width="{max(length, 1):.1f}" height="18" rx="3">'
        body += f"<title>{escape.escape(name)}: {shown}</title></rect>"
        body += (
            f'<text class="soft" x="{left + max(length, 1) + 8:.1f}" y="{y + 14}">{shown}</text>'
        )
    return _svg(width, 8 + step * len(rows), label, body)


def _legend(entries: Mapping[str, str]) -> str:
    square = '<svg class="mark" viewBox="0 0 12 12"><rect class="{}" width="12" height="12" rx="2"/></svg>'
    return (
        "<p class=soft>"
        + " &nbsp; ".join(f"{square.format(colour)} {name}" for name, colour in entries.items())
        + "</p>"
    )


def html(report: Mapping[str, Any]) -> str:
    """The report as a page: no scripts, nothing from elsewhere."""
    memory = report["memory"]
    tone = "good" if memory["fits"] else "bad"
    part = [f"<h1>{escape.escape(_title(report))}</h1>"]
    part += [f"<p class=soft>{escape.escape(fact)}</p>" for fact in _facts(report)]
    if "estimate" in report:
        estimate, moved = report["estimate"], sum(report["collectives"]["bytes_by_kind"].values())
        first = {
            "GiB of memory at the peak": f"{_gib(memory['peak'])} / {_gib(memory['limit'])}",
            "GiB in collectives": _gib(moved),
            "ms a step, estimated": _ms(estimate["step_seconds"]),
            "MFU, estimated": _percent(estimate["mfu"]),
        }
        part.append(figures(first))
    part.append(
        f"<section><h2>Memory of one device</h2><p class={tone}>{escape.escape(_verdict(memory))}</p>"
    )
    if "total" in memory:
        part.append(_memory_picture(memory))
        part.append(
            table((), [(name, size_text(size)) for name, size in _memory_rows(memory)], (1,))
        )
    if "compiler_says" in memory:
        part.append(f"<pre>{escape.escape(memory['compiler_says'])}</pre>")
    part += [
        f"<p><b>Change {'first' if i == 0 else 'then'}:</b> {escape.escape(r)}</p>"
        for i, r in enumerate(memory["remedies"])
    ]
    formula = sorted(memory["parts_by_formula"].items(), key=lambda item: -item[1])
    part.append("<h2 style='margin-top:20px'>The largest uses, by formula</h2>")
    part.append(
        _bars([(_PARTS[k], v, size_text(v), "c1") for k, v in formula], "memory by formula")
        + "</section>"
    )
    if "collectives" in report:
        collectives = report["collectives"]
        colours = {True: "c3", False: "c4"}
        bars = [
            (
                f"{r['kind']}, {r['axes']}{' (DCN)' if r['network'] == 'DCN' else ''}",
                r["bytes"],
                size_text(r["bytes"]),
                colours[r["asynchronous"]],
            )
            for r in collectives["rows"]
            if r["bytes"] * 500 > collectives["rows"][0]["bytes"]
        ]
        part.append("<section><h2>Collectives of one step, by kind and mesh axis</h2>")
        part.append(
            _legend({"asynchronous": "c3", "synchronous": "c4"})
            + _bars(bars, "bytes of collectives")
        )
        rows = [
            (r["kind"], r["axes"], _how(r), f"{r['count']:,}", size_text(r["bytes"]))
            for r in collectives["rows"]
        ]
        part.append(table(("kind", "mesh axes", "network", "times", "bytes"), rows, (3, 4)))
        part += [f"<p class='soft note'>{escape.escape(note)}</p>" for note in _notes(collectives)]
        part.append(
            f"<p class='soft note'>Counted are {escape.escape(collectives['definition'])}.</p></section>"
        )
        times = [
            (n, s or 0.0, f"{_ms(s)} ms", colour) for n, s, colour in _time_rows(report["estimate"])
        ]
        part.append(
            "<section><h2>Where the time of a step would go</h2>" + _bars(times, "time by resource")
        )
        part.append(table((), _estimate_rows(report), ()))
        part.append(
            "<ul>"
            + "".join(f"<li>{escape.escape(a)}</li>" for a in report["assumptions"])
            + "</ul></section>"
        )
    return document(_title(report), "".join(part), _STYLE)
