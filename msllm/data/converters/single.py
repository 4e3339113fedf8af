"""Plain text in one stream, of several if need be."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from msllm.data.converters.layout import Layout, one_stream
from msllm.data.sources import Part, texts
from msllm.data.tables import Placement, Table

OPTIONS = {"key": "text", "stream": ""}


def convert(layout: Layout, part: Part) -> Iterator[Table]:
    """From texts, each cut to pieces of T rows; of records, the text under `key`.

    A piece begins with the last token of the piece before it: so every token (but a text's first) is predicted once.
    `stream` says it, and the others are silent; empty: there is but one.
    """
    if not (name := layout.options["stream"]):
        one_stream(
            layout,
            "single",
            "; config.data.options.stream names the one of several that says the text",
        )
    stream = layout.spec.index(name) if name else 0
    for where, blocks in texts(part, layout.options["key"], layout.bad):
        for tokens in layout.counted(pieces(layout, blocks)):
            table = layout.table([Placement(stream, 0, tokens)], json.dumps(tokens), closed=False)
            yield table._replace(source=where)


def pieces(layout: Layout, blocks: Iterable[str]) -> Iterator[Sequence[int]]:
    """The tokens of a text in pieces of T, the last one shorter, which overlap by one token."""
    tokens: list[int] = []
    for block in blocks:
        tokens += layout.tokenizer.encode(block)
        start = 0
        while len(tokens) - start >= layout.rows:
            yield tokens[start : start + layout.rows]
            start += layout.rows - 1
        tokens = tokens[start:]
    if len(tokens) > 1:
        yield tokens
