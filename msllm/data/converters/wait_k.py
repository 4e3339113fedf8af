"""Pairs of source and target, such as translations, with the target k tokens or words behind."""

from __future__ import annotations

from collections.abc import Iterator

from msllm.data.converters.layout import Choice, Layout, check_keys, each_record
from msllm.data.sources import Record
from msllm.data.tables import Placement, Table
from msllm.errors import UserError

OPTIONS = {
    "k": Choice(3, least=-1),
    "unit": "token",
    "source": "source",
    "target": "target",
    "source_stream": "user",
    "target_stream": "output",
    "ignored_keys": [],
}


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"source": text, "target": text}; the options `source` and `target` are their keys.

    With `unit` "token", the target starts `k` rows after the start of the source, and in the row
    after its end at the latest. With `unit` "word", word i of the target (from 0) starts when word
    i + k - 1 of the source has ended. With k = -1, the target starts when the source has ended.
    """
    options = layout.options
    source, target = record.text(options["source"]), record.text(options["target"])
    check_keys(layout, record.value, {options["source"], options["target"]}, record.where)
    layout.bad.add_turn(options["source_stream"], source, record.where)
    layout.bad.add_turn(options["target_stream"], target, record.where)
    k = layout.draw("k", source)
    if options["unit"] == "token":
        placements = _by_token(layout, source, target, k)
    elif options["unit"] == "word":
        placements = _by_word(layout, source, target, k)
    else:
        raise UserError(f"config.data.options.unit is {options['unit']!r}: must be token or word")
    yield layout.table(placements, source)


def _by_token(layout: Layout, source: str, target: str, k: int) -> list[Placement]:
    read = layout.say(layout.options["source_stream"], 0, source)
    start = read.end if k < 0 else min(k, read.end)
    return [read, layout.say(layout.options["target_stream"], start, target)]


def _by_word(layout: Layout, source: str, target: str, k: int) -> list[Placement]:
    reader = layout.spec.index(layout.options["source_stream"])
    writer = layout.spec.index(layout.options["target_stream"])
    placements, ends = [], [0]  # ends[n]: the row after the first n words of the source
    for word in layout.words(source):
        placements.append(Placement(reader, ends[-1], word))
        ends.append(placements[-1].end)
    free = 0  # the row after the target's words so far
    for i, word in enumerate(layout.words(target)):
        known = len(ends) - 1 if k < 0 else min(i + k, len(ends) - 1)
        placements.append(Placement(writer, max(free, ends[known]), word))
        free = placements[-1].end
    return placements
