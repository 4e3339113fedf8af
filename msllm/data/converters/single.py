"""Plain text in one stream. Other streams, if there are any, are silent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from msllm.data.converters.layout import Layout, require_one_stream
from msllm.data.sources import Part, texts
from msllm.data.tables import Placement, Table

OPTIONS = {"key": "text", "stream": ""}


def convert(layout: Layout, part: Part) -> Iterator[Table]:
    """From texts (text files, or the text under `key` of records), cut to pieces of T rows.

    A piece begins with the last token of the piece before it, so that every token but the first of
    a text is predicted once. `stream` names the stream for the text; empty: the only stream.
    """
    name = layout.options["stream"]
    if not name:
        remedy = "; of several streams, name the one for the text in config.data.options.stream"
        require_one_stream(layout, "single", remedy)
    stream = layout.spec.index(name) if name else 0
    for where, blocks in texts(part, layout.options["key"], layout.bad):
        for tokens in layout.count_empty(pieces(layout, blocks)):
            table = layout.table([Placement(stream, 0, tokens)], json.dumps(tokens), closed=False)
            yield table._replace(source=where)


def pieces(layout: Layout, blocks: Iterable[str]) -> Iterator[Sequence[int]]:
    """Yields the tokens of a text in pieces of T tokens (the last: fewer) that overlap by one."""
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
