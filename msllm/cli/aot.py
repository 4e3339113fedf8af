"""Compile the train step for a TPU pod and report whether it fits.

Reports memory and collectives, and estimates step time and MFU (docs/aot.md).
Needs no TPU: libtpu compiles the train step for the topology on any CPU machine
(pip install "jax[tpu]").

Exit status: 0 if the program fits and is within its budget, 1 if not, 2 for bad
input.
"""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from msllm.cli.base import Parser, Switch, output_file, positive_int, write_json, write_text
from msllm.errors import UserError
from msllm.runtime.files import read_object

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
        help="TPU slice to compile for, e.g. v5e:2x2, v5e:16x16, v6e:8x8, v5p:4x4x4, v4:4x4x4 or "
        "tpu7x:4x4x4.",
    )
    parser.add_argument(
        "--num_slices",
        metavar="N",
        type=positive_int,
        default=1,
        help="Number of such slices, connected by the data centre network (DCN).",
    )
    parser.add_argument(
        "--sweep",
        action=Switch,
        default=False,
        help="Compile every remat policy with 1, 2 and 4 times the batch size, and print one line "
        "for each.",
    )
    parser.add_argument(
        "--budget",
        metavar="FILE",
        help="JSON file with limits. Exit with status 1 if memory or collectives exceed one of "
        "them by more than 2 %%.",
    )
    parser.add_argument(
        "--write_budget",
        action=Switch,
        default=False,
        help="Write the figures of this program to the --budget file instead of comparing.",
    )
    for name, text in (
        ("json", "Write the report as JSON."),
        ("html", "Write the report as an HTML page."),
        ("hlo", "Write the text of the compiled program."),
    ):
        parser.add_argument(f"--{name}", metavar="FILE", type=output_file, help=text)


def run(flags: argparse.Namespace) -> int:
    """Compiles the step, prints the report and compares it with the budget."""
    if flags.write_budget and not flags.budget:
        raise UserError("--write_budget needs --budget=FILE, the file to write")
    if flags.sweep and (flags.budget or flags.html or flags.hlo):
        raise UserError(
            "--sweep compiles many programs: use it without --budget, --html and --hlo; "
            "--json works"
        )
    limits = _read_budget(flags.budget) if flags.budget and not flags.write_budget else None

    import jax

    from msllm.pod import aot
    from msllm.pod import report as pages

    # An accelerator of this machine may be in use by another process.
    jax.config.update("jax_platforms", "cpu")
    # The report shows the time of a real compilation.
    jax.config.update("jax_enable_compilation_cache", False)
    devices = aot.topology_devices(flags.topology, flags.num_slices)
    if flags.sweep:
        print(pages.sweep_header())
        rows = aot.sweep(
            flags.config, devices, on_row=lambda row: print(pages.sweep_line(row), flush=True)
        )
        write_json(flags.json, aot.finite(rows))
        return 0 if any(row["fits"] for row in rows) else 1

    analysis = aot.analyse(flags.config, devices)
    name = pathlib.Path(flags.config_file).name
    report = {"config": name, "topology": flags.topology, **analysis.report}
    print(pages.text(report))
    status = 0 if analysis.fits else 1
    if analysis.hlo and flags.write_budget:
        write_json(flags.budget, aot.budget_of(report, flags.topology))
    elif analysis.hlo and limits is not None:
        report["over_budget"] = aot.over_budget(report, flags.topology, limits)
        for line in report["over_budget"]:
            print(f"over budget: {line}")
        status = 1 if report["over_budget"] else status
    write_json(flags.json, report)
    write_text(flags.html, pages.html(report))
    write_text(flags.hlo, analysis.hlo)
    return status


def _read_budget(file: str) -> dict[str, Any]:
    remedy = "correct --budget, or add --write_budget to write it"
    try:
        budget = read_object(file, remedy)
    except OSError as error:
        raise UserError(f"--budget is {file!r}: {error}; {remedy}") from error
    bytes_of = budget.get("collective_bytes")
    numbers = [budget.get("peak_gib"), budget.get("sum_gib")]
    numbers += bytes_of.values() if isinstance(bytes_of, dict) else [None]
    if not all(isinstance(number, int | float) for number in numbers):
        raise UserError(f"--budget is {file!r}: it holds no budget; {remedy}")
    return budget
