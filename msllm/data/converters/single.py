"""Plain text in one stream. Other streams, if there are any, are silent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from msllm.data.converters.layout import Layout, require_one_stream
from msllm.data.files import NotUtf8
from msllm.data.sources import BadRecord, Part, texts
from msllm.data.tables import Placement, Table
from msllm.tokenizer import TextError

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
        for tokens in layout.count_empty(pieces(layout, blocks, where)):
            table = layout.table([Placement(stream, 0, tokens)], json.dumps(tokens), closed=False)
            yield table._replace(source=where)


def pieces(
    layout: Layout, blocks: Iterable[str], where: str, size: int = 0, overlap: int = 1
) -> Iterator[Sequence[int]]:
    """Yields the tokens of a text in pieces of `size` tokens (the last: fewer).

    The rest of a text that cannot be used is left out, and the text is counted as a bad record.

    Args:
      layout: encodes the text.
      blocks: the text.
      where: the place of the text.
      size: the number of tokens of a piece; 0: T.
      overlap: the number of tokens with which a piece repeats the end of the piece before it.
    """
    size = size or layout.rows
    tokens: list[int] = []
    first = True
    try:
        for block in blocks:
            tokens += layout.encode(block, first)
            first = False
            start = 0
            while len(tokens) - start >= size:
                yield tokens[start : start + size]
                start += size - overlap
            tokens = tokens[start:]
    except TextError as error:
        layout.bad.add(BadRecord(f"{where}: {error}"))
    except NotUtf8 as error:  # names the line
        layout.bad.add(BadRecord(str(error)))
    if len(tokens) > overlap:
        yield tokens
