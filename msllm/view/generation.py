"""Prints a table while a model generates it, with one line per row and one column per stream."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import rich.console
import rich.text

from msllm.decode.engine import DecodeOptions, Engine, Session
from msllm.decode.lanes import LaneSession, find_lanes
from msllm.decode.script import default_window
from msllm.errors import UserError
from msllm.tokenizer import list_words
from msllm.view import cells
from msllm.weights.load import LoadedModel

log = logging.getLogger("msllm")

WIDTH = 14  # width of a column in characters


def print_generation(
    model: LoadedModel,
    inputs: Mapping[str, str],
    rows: int,
    options: DecodeOptions,
    console: rich.console.Console,
    forced: Mapping[str, str] | None = None,
) -> None:
    """Decodes rows and prints each one at once, and then prints the text of each stream.

    Args:
      model: a model with a tokenizer.
      inputs: {input stream: text}. Each text is fed at one token per row from the first row on.
      rows: the number of rows. The model sees at most as many rows as it was trained on.
      options: how rows are sampled.
      console: where to print.
      forced: {stream: text} that streams of any kind must say, at one token per row from the first
        row on; in a model of lanes, from the row after it on.

    A model of lanes ends its text, and the joined text is printed as well.

    Logs a warning if there are too few rows for a text, or if the tokenizer does not know a word.
    Raises UserError if the model has no tokenizer.
    """
    tokenizer = model.require_tokenizer()
    if rows < 1:
        raise UserError(f"--rows={rows}: must be at least 1")
    session = Engine(model, window=min(max(rows, 2), default_window(model))).open(options)
    text = LaneSession(model, session) if find_lanes(model) else None
    for name, said in inputs.items():
        session.feed(name, said)
    for name, said in (forced or {}).items():
        (text or session).force(name, said)
    streams, widths = model.streams, [5] + [WIDTH] * model.streams.size
    header = [rich.text.Text(name, style="bold") for name in ("row", *streams.names)]
    cells.print_line(console, header, widths)
    shown = []
    for _ in range(rows):
        row = session.step()
        if text:
            row = text.add(row)
        shown.append(row)
        texts = [
            cells.cell(tokenizer, int(row.tokens[stream]), bool(row.present[stream]), kind)
            for stream, kind in enumerate(streams.kinds)
        ]
        cells.print_line(console, [rich.text.Text(str(row.index), style="dim"), *texts], widths)
        if text and text.finished:
            break
    tokens = np.array([row.tokens for row in shown])
    present = np.array([row.present for row in shown])
    console.print()
    cells.print_texts(console, tokenizer, streams.names, tokens, present)
    if text:
        joined = text.result()
        ended = "the text" if joined.ended else "the text, which has no end yet: use more rows"
        console.print(rich.text.Text(f"\n{ended}", style="bold"))
        console.print(rich.text.Text(joined.text), soft_wrap=True)
    for name, said in [*inputs.items(), *(forced or {}).items()]:
        if words := tokenizer.unknown_words(said):
            log.warning("%s: unknown to the model: %s", name, list_words(words))
    _warn_of_rest(session, rows)


def _warn_of_rest(session: Session, rows: int) -> None:
    """Logs a warning if tokens are left that no row holds."""
    left = [
        (count, name, verb)
        for waiting, verb in ((session.waiting, "read"), (session.waiting_forced, "said"))
        for name, count in waiting.items()
        if count
    ]
    if left:
        parts = ", ".join(
            f"{count} tokens of {name} were never {verb}" for count, name, verb in left
        )
        enough = rows + max(count for count, _, _ in left)
        log.warning("%s: use --rows=%d or more", parts, enough)
