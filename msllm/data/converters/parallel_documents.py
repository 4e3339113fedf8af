"""Plain text in all streams at once, with different documents in each stream."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from msllm.data.converters.layout import Layout
from msllm.data.converters.single import pieces
from msllm.data.sources import Part, texts
from msllm.data.tables import Placement, Table

OPTIONS = {"key": "text", "shuffle": 0}
_Item = TypeVar("_Item")


def convert(layout: Layout, part: Part) -> Iterator[Table]:
    """From documents (text files, or the text under `key` of records).

    Documents are cut to pieces as by `single`. Each piece goes to the fullest stream that has room
    for it in T rows. A row of silence follows the end of a document if there is room. Cells below
    the last document of a stream are absent.

    With `shuffle`, pieces are drawn at random from a buffer of that size. Without it, the streams
    of a table hold neighbouring pieces of a text, and a batch of such pieces teaches less than a
    batch of unrelated ones.
    """
    columns: list[list[int]] = [[] for _ in layout.spec.names]
    source = ""
    for where, piece, is_last in _shuffled(_pieces(layout, part), layout.options["shuffle"]):
        fitting = [column for column in columns if len(column) + len(piece) <= layout.rows]
        if not fitting:
            yield _table(layout, columns)._replace(source=source)
            columns = fitting = [[] for _ in layout.spec.names]
        source = source if any(columns) else where
        column = max(fitting, key=len)
        column += piece
        if is_last and len(column) < layout.rows:
            column.append(layout.tokenizer.silence_id)
    if any(columns):
        yield _table(layout, columns)._replace(source=source)


def _pieces(layout: Layout, part: Part) -> Iterator[tuple[str, Sequence[int], bool]]:
    """Yields (place of the document, piece, whether it is the last piece of the document)."""
    for where, blocks in texts(part, layout.options["key"], layout.bad):
        before = None
        for piece in layout.count_empty(pieces(layout, blocks, where)):
            if before is not None:
                yield where, before, False
            before = piece
        if before is not None:
            yield where, before, True


def _shuffled(items: Iterable[_Item], size: int) -> Iterator[_Item]:
    """Yields items in random order, the same in every run, each at most `size` places early."""
    # Python guarantees the same numbers in every version only for random(), not for shuffle().
    rng, waiting = random.Random(0), []
    for item in items:
        waiting.append(item)
        if len(waiting) > size:
            yield _take(waiting, rng)
    while waiting:
        yield _take(waiting, rng)


def _take(items: list[_Item], rng: random.Random) -> _Item:
    place = int(rng.random() * len(items))
    items[place], items[-1] = items[-1], items[place]
    return items.pop()


def _table(layout: Layout, columns: list[list[int]]) -> Table:
    placements = [Placement(stream, 0, column) for stream, column in enumerate(columns)]
    table = layout.table(placements, json.dumps(columns), closed=False)
    for stream, column in enumerate(columns):
        table.present[len(column) :, stream] = False
    table.tokens[~table.present] = 0
    return table
