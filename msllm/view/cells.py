"""Draws the cells of a table as text, with one line per row and one column per stream.

Silence is a dim middle dot. An absent cell is blank.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import rich.console
import rich.text

from msllm.tokenizer import Tokenizer

SILENT, ABSENT = "\N{MIDDLE DOT}", ""
SPACE = "\N{OPEN BOX}"
NARROWEST = 3  # the width in characters below which no column is cut
# Unicode categories that are escaped: control and format characters, surrogates, private use,
# unassigned, line and paragraph separators, and spaces other than " ".
_ESCAPED = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")


class Cell(NamedTuple):
    """A drawn cell."""

    text: str
    state: Literal["token", "silence", "absent"]


class _Console(rich.console.Console):
    def on_broken_pipe(self) -> None:
        raise  # the command line handles the error; rich would end the process


def console(**options: Any) -> rich.console.Console:
    """A console for tables, without styles if the output is not a terminal or NO_COLOR is set.

    `options` are passed to `rich.console.Console`.
    """
    # With NO_COLOR, rich drops colours but still writes the codes for bold and dim.
    system = None if os.environ.get("NO_COLOR") else "auto"
    return _Console(**{"color_system": system, "highlight": False, **options})


def visible(text: str) -> str:
    """The text on one line with every character visible.

    Control characters and the other characters of `_ESCAPED` are escaped as in Python's string
    literals.
    """
    shown = "".join(map(_visible_character, text))
    if shown and unicodedata.category(shown[0]).startswith("M"):
        # A combining mark would attach to the column on its left.
        return f"\N{DOTTED CIRCLE}{shown}"
    return shown


def _visible_character(character: str) -> str:
    if character != " " and unicodedata.category(character) in _ESCAPED:
        return character.encode("unicode_escape").decode()
    return character


def spelling(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token in a cell. It never looks like silence or an absent cell.

    The space before a word is left out. Other leading and trailing spaces are shown as SPACE. A
    token that is only a part of a character is spelled as in the vocabulary.
    """
    piece = tokenizer.piece(token)
    if tokenizer.kind == "tokenizers":
        # Byte-level BPE spells bytes in an alphabet of its own, which decoding resolves.
        decoded = tokenizer.decode([token])
        if decoded and "\N{REPLACEMENT CHARACTER}" not in decoded:
            piece = decoded
    piece = piece.replace("\u2581", " ")  # sentencepiece's symbol for a space
    if len(piece) > 1 and piece[0] == " " != piece[1]:
        piece = piece[1:]
    inner = piece.strip(" ")
    leading = len(piece) - len(piece.lstrip(" ")) if inner else len(piece)
    trailing = len(piece) - leading - len(inner)
    shown = SPACE * leading + visible(inner) + SPACE * trailing
    return f"<{shown or token}>" if shown in (SILENT, ABSENT) else shown


def draw(tokenizer: Tokenizer, token: int, present: bool) -> Cell:
    """Draws a cell that holds `token`, or an absent cell."""
    if not present:
        return Cell(ABSENT, "absent")
    if token == tokenizer.silence_id:
        return Cell(SILENT, "silence")
    return Cell(spelling(tokenizer, token), "token")


def cell(tokenizer: Tokenizer, token: int, present: bool, kind: str) -> rich.text.Text:
    """Draws a cell of a stream of kind `kind` (input, output or thought) for a terminal."""
    return styled(draw(tokenizer, token, present), kind)


def styled(cell: Cell, kind: str) -> rich.text.Text:
    """Styles a drawn cell of a stream of kind `kind` for a terminal."""
    style = "cyan" if kind == "input" else ""
    return rich.text.Text(cell.text, style={"silence": "dim", "absent": ""}.get(cell.state, style))


def fit(widths: Sequence[int], room: int) -> list[int]:
    """Reduces the largest widths until all columns fit into `room` characters.

    A space follows each column. No column is cut below NARROWEST, even if the columns do not fit.
    """
    cap = max(widths, default=0)
    while cap > NARROWEST and sum(min(width, cap) + 1 for width in widths) > room:
        cap -= 1
    return [min(width, cap) for width in widths]


def line(texts: Sequence[rich.text.Text], widths: Sequence[int]) -> rich.text.Text:
    """One line of a table: the row number and the cells, cut or padded to their widths."""
    joined = rich.text.Text()
    for text, width in zip(texts, widths, strict=True):
        text.truncate(width, overflow="ellipsis", pad=True)
        joined.append_text(text).append(" ")
    joined.rstrip()
    return joined


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
    """Prints the text of each stream of a table.

    Args:
      console: where to print.
      tokenizer: the tokenizer of the tokens.
      names: names of the streams.
      tokens: [T, S] int.
      present: [T, S] bool.
    """
    for stream, name in enumerate(names):
        text = tokenizer.decode(tokens[present[:, stream], stream])
        lines = "\n".join(map(visible, text.split("\n")))
        console.print(rich.text.Text.assemble((f"{name}: ", "bold"), lines), soft_wrap=True)
