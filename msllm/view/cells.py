"""How a table is drawn: one line a row, one column a stream. Silence is a dim middle dot, an absent cell is blank."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence

import numpy as np
import rich.console
import rich.text

from msllm.tokenizer import Tokenizer

SILENT, ABSENT = "\N{MIDDLE DOT}", ""
SPACE = "\N{OPEN BOX}"
NARROWEST = 3  # characters of a column that has to make room for others
_ESCAPED = (
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
    "Zl",
    "Zp",
    "Zs",
)  # controls, format marks, unassigned, unusual spaces


def console(**options) -> rich.console.Console:
    """Where tables are printed: without any styles where the output is no terminal, or if NO_COLOR is set."""
    # By itself rich drops only the colours for NO_COLOR: bold and dim would stay, as codes.
    system = None if os.environ.get("NO_COLOR") else "auto"
    return rich.console.Console(**{"color_system": system, "highlight": False, **options})


def visible(text: str) -> str:
    """A text as characters that take a place on one line: controls and the like are escaped as Python does."""
    shown = "".join(
        c.encode("unicode_escape").decode()
        if c != " " and unicodedata.category(c) in _ESCAPED
        else c
        for c in text
    )
    combining = shown and unicodedata.category(shown[0]).startswith(
        "M"
    )  # it would join the column before
    return f"\N{DOTTED CIRCLE}{shown}" if combining else shown


def spelling(tokenizer: Tokenizer, token: int) -> str:
    """How one token is written in a cell, never as silence or as an absent cell is.

    The space before a word is left out, other outer spaces are shown. A token that is no whole character is spelled as
    the vocabulary does.
    """
    piece = tokenizer.piece(token)
    if tokenizer.kind == "tokenizers":  # some of these have an alphabet of their own for bytes
        text = tokenizer.decode([token])
        piece = text if text and "\N{REPLACEMENT CHARACTER}" not in text else piece
    piece = piece.replace("\u2581", " ")  # sentencepiece's mark of a space
    if len(piece) > 1 and piece[0] == " " != piece[1]:
        piece = piece[1:]
    inner = piece.strip(" ")
    before = len(piece) - len(piece.lstrip(" ")) if inner else len(piece)
    shown = SPACE * before + visible(inner) + SPACE * (len(piece) - before - len(inner))
    return f"<{shown or token}>" if shown in (SILENT, ABSENT) else shown


def cell(tokenizer: Tokenizer, token: int, present: bool, kind: str) -> rich.text.Text:
    """A cell of a stream of that kind."""
    if not present:
        return rich.text.Text(ABSENT)
    if token == tokenizer.silence_id:
        return rich.text.Text(SILENT, style="dim")
    return rich.text.Text(spelling(tokenizer, token), style="cyan" if kind == "input" else "")


def fit(widths: Sequence[int], room: int) -> list[int]:
    """Column widths that fill at most `room`, with one space after each; the widest give way, down to NARROWEST."""
    cap = max(widths, default=0)
    while cap > NARROWEST and sum(min(width, cap) + 1 for width in widths) > room:
        cap -= 1
    return [min(width, cap) for width in widths]


def line(texts: Sequence[rich.text.Text], widths: Sequence[int]) -> rich.text.Text:
    """One line of a table: the number of the row, then the cells, each cut or padded to its column's width."""
    whole = rich.text.Text()
    for text, width in zip(texts, widths, strict=True):
        text.truncate(width, overflow="ellipsis", pad=True)
        whole.append_text(text).append(" ")
    whole.rstrip()
    return whole


def print_line(
    console: rich.console.Console, texts: Sequence[rich.text.Text], widths: Sequence[int]
) -> None:
    """Prints a line of a table."""
    console.print(line(texts, widths), overflow="ignore", no_wrap=True, crop=False)


def print_texts(
    console: rich.console.Console,
    tokenizer: Tokenizer,
    names: Sequence[str],
    tokens: np.ndarray,
    present: np.ndarray,
) -> None:
    """What each stream of a table [T, S] says."""
    for stream, name in enumerate(names):
        text = tokenizer.decode(tokens[present[:, stream], stream])
        lines = "\n".join(map(visible, text.split("\n")))
        console.print(rich.text.Text.assemble((f"{name}: ", "bold"), lines), soft_wrap=True)
