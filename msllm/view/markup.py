"""What reports are made of: aligned columns for a terminal, and the parts of a self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from rich.cells import cell_len

_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #ffffff; --ink: #16181d; --soft: #5c6270; --line: #e3e4e0;
  --c1: #2a6fdb; --c2: #14936a; --c3: #c98500; --c4: #d2453f; --c5: #6b4fc4; --good: #14793f; --bad: #b3261e;
  --track: #eeeeea; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --card: #1b1d21; --ink: #eceef2; --soft: #a1a7b3;
  --line: #2e3138; --c1: #5b97f2; --c2: #38b88a; --c3: #e0a52f; --c4: #f0716a; --c5: #9c86ea; --good: #56c98a;
  --bad: #ff8f86; --track: #26282e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 6px; } h2 { font-size: 17px; margin: 0 0 12px; }
p { margin: 2px 0; } .soft, li { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px;
  margin-top: 18px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px; margin-top: 18px; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.figures b { display: block; font-size: 22px; font-weight: 600; } .figures span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin-top: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; } td.n, th.n { text-align: right; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; } .note { margin-top: 8px; overflow-wrap: anywhere; }
"""


def size_text(size: float) -> str:
    """Bytes in a unit that shows three digits."""
    for unit, factor in _UNITS.items():
        if abs(size) >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size:,.0f} B"


def aligned(rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> list[str]:
    """Lines of a table with aligned columns; `numbers`: the columns that are aligned to the right."""
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def pad(text, i):
        return " " * (widths[i] - cell_len(text))

    def cell(text, i):
        return pad(text, i) + text if i in numbers else text + pad(text, i)

    return ["  " + "  ".join(cell(text, i) for i, text in enumerate(row)).rstrip() for row in rows]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    """An HTML table of texts; `numbers` as in `aligned`."""

    def cell(tag, i, value):
        return f"<{tag}{' class=n' if i in numbers else ''}>{html.escape(value)}</{tag}>"

    def line(tag, values):
        return "<tr>" + "".join(cell(tag, i, v) for i, v in enumerate(values)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<div class=scroll><table>{line('th', header) if header else ''}{body}</table></div>"


def figures(values: Mapping[str, str]) -> str:
    """The numbers to see first, each with what it is."""
    cards = (
        f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>"
        for k, v in values.items()
    )
    return f"<div class=figures>{''.join(cards)}</div>"


def document(title: str, body: str, style: str = "") -> str:
    """A page: no scripts, nothing from elsewhere. `style` adds to the common one."""
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}{style}</style></head>'
    return f"{head}<body><main>{body}</main></body></html>\n"
