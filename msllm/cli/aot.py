"""Compile the train step for a TPU pod and report whether it fits.

The report also says what the step costs. The step is the one that trains, and
the compiler is the real one (libtpu); no TPU is needed. docs/aot.md explains
the report. Exit status: 0 if the program fits and is within its budget, 1 if
not, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from msllm.cli.base import Parser, Switch, output_file, whole
from msllm.errors import UserError
from msllm.runtime.files import write_atomically

EXAMPLES = """
msllm aot --config=configs/8b_v5e_256.py --topology=v5e:16x16
msllm aot --config=configs/1b_v5e_16.py --topology=v5e:4x4 --html=report.html
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_config()
    parser.add_argument(
        "--topology",
        metavar="NAME",
        required=True,
        help="TPUs to compile for: v5e:2x2, v5e:4x4, v5e:16x16, v6e:8x8, v5p:4x4x4, v4:4x4x4, "
        "tpu7x:4x4x4, ...",
    )
    parser.add_argument(
        "--num_slices",
        metavar="N",
        type=whole(1),
        default=1,
        help="Slices of that topology, joined by the data centre's network.",
    )
    parser.add_argument(
        "--sweep",
        action=Switch,
        default=False,
        help="Compare remat policies and 1, 2 and 4 times the batch, one line each.",
    )
    parser.add_argument(
        "--budget",
        metavar="FILE",
        help="File of limits: fail if memory or collectives exceed one by more than 2 %%.",
    )
    parser.add_argument(
        "--write_budget",
        action=Switch,
        default=False,
        help="Write --budget from this program instead of comparing.",
    )
    for name, text in (
        ("json", "Write the report as JSON."),
        ("html", "Write the report as an HTML page."),
        ("hlo", "Write the text of the compiled program."),
    ):
        parser.add_argument(f"--{name}", metavar="FILE", type=output_file, help=text)


def run(flags: argparse.Namespace) -> int:
    """Compiles, prints the report and compares it with the budget."""
    if flags.write_budget and not flags.budget:
        raise UserError("--write_budget needs --budget=FILE: the file to write")
    if flags.sweep and (flags.budget or flags.html or flags.hlo):
        raise UserError(
            "--sweep compiles many programs: it goes with --json, "
            "not with --budget, --html or --hlo"
        )
    limits = _read_budget(flags.budget) if flags.budget and not flags.write_budget else None

    import jax

    from msllm.pod import aot
    from msllm.pod import report as pages

    # The default backend must not be an accelerator that is in use, and the report shows what a
    # compilation costs.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    devices = aot.topology_devices(flags.topology, flags.num_slices)
    if flags.sweep:
        print(pages.sweep_header())
        rows = aot.sweep(
            flags.config, devices, say=lambda row: print(pages.sweep_line(row), flush=True)
        )
        _write(flags.json, json.dumps(aot.finite(rows), indent=2))
        return 0 if any(row["fits"] for row in rows) else 1

    analysis = aot.analyse(flags.config, devices)
    name = pathlib.Path(flags.config_file).name
    report = {"config": name, "topology": flags.topology, **analysis.report}
    print(pages.text(report))
    status = 0 if analysis.fits else 1
    if analysis.hlo and flags.write_budget:
        budget = aot.budget_of(report, flags.topology)
        _write(flags.budget, json.dumps(budget, indent=2) + "\n")
    elif analysis.hlo and limits is not None:
        report["over_budget"] = aot.over_budget(report, flags.topology, limits)
        for line in report["over_budget"]:
            print(f"over budget: {line}")
        status = 1 if report["over_budget"] else status
    _write(flags.json, json.dumps(report, indent=2))
    _write(flags.html, pages.html(report))
    _write(flags.hlo, analysis.hlo)
    return status


def _read_budget(file: str) -> dict[str, Any]:
    try:
        return json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--budget is {file!r}: {error}; --write_budget makes one") from error


def _write(file: str | pathlib.Path | None, content: str) -> None:
    if file:
        write_atomically(file, content)
