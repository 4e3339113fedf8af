"""Pairs of source and target (translations, questions and solutions), the target k behind the source."""

from __future__ import annotations

from collections.abc import Iterator

from msllm.data.converters.layout import Choice, Layout, each_record
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
}


@each_record
def convert(layout: Layout, record: Record) -> Iterator[Table]:
    """From {"source": text, "target": text}; the options `source` and `target` are their keys.

    unit "token": the target starts `k` rows after the source (never later than the row after its end).
    unit "word": word i of the target (from 0) starts when the source's word i + k - 1 has ended.
    k = -1: the target starts when the source has ended.
    """
    options = layout.options
    source, target = record.text(options["source"]), record.text(options["target"])
    k = layout.draw("k", source)
    if options["unit"] not in ("token", "word"):
        raise UserError(f"config.data.options.unit is {options['unit']!r}: must be token or word")
    if options["unit"] == "token":
        read = layout.say(options["source_stream"], 0, source)
        start = read.end if k < 0 else min(k, read.end)
        yield layout.table([read, layout.say(options["target_stream"], start, target)], source)
        return
    reader, writer = (
        layout.spec.index(options[name]) for name in ("source_stream", "target_stream")
    )
    placements, ends = [], [0]  # rows after the source's words; none is read at row 0
    for word in layout.words(source):
        placements.append(Placement(reader, ends[-1], word))
        ends.append(placements[-1].end)
    free = 0
    for i, word in enumerate(layout.words(target)):
        known = len(ends) - 1 if k < 0 else min(i + k, len(ends) - 1)
        placements.append(Placement(writer, max(free, ends[known]), word))
        free = placements[-1].end
    yield layout.table(placements, source)
