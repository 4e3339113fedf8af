"""Building blocks of reports: HTML pages from templates, and aligned columns for a terminal."""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Sequence
from typing import Any

from rich.cells import cell_len

# The folder of the package, because a template lies beside the module that fills it.
TEMPLATES = pathlib.Path(__file__).parents[1]
_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def render(template: str, **values: Any) -> str:
    """Fills a template of this package, such as "view/prepared.html", with `values`.

    Values are escaped. Pages based on "view/page.html" have no scripts and load no other files.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def size_text(size: float) -> str:
    """A number of bytes as text, in the largest unit in which it is at least 1."""
    for unit, factor in _UNITS.items():
        if abs(size) >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size:,.0f} B"


def aligned(rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> list[str]:
    """The lines of a table with aligned columns.

    Args:
      rows: texts, the same number in each row.
      numbers: columns that are aligned to the right.
    """
    columns = range(len(rows[0]))
    widths = [max(cell_len(row[column]) for row in rows) for column in columns]
    lines = []
    for row in rows:
        line = ""
        for column, text in enumerate(row):
            padding = " " * (widths[column] - cell_len(text))
            line += "  " + (padding + text if column in numbers else text + padding)
        lines.append(line.rstrip())
    return lines
