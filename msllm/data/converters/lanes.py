"""Plain text in lanes: contiguous parts of one text, side by side in the rows of one table.

A table of S lanes holds n tokens in about n / S rows. Its layout, in rows from the start of each
stream (that is, without delays):

- Row 0 is silence: all lanes begin with it, and it is not predicted.
- The parts have R = ceil(n / S) tokens, or one less. The longer ones come first, in rows 1 to R.
  The shorter ones are silent in row 1, and begin in row 2.
- In row R + 1 the first lane is silent, which ends the text in all lanes. All other cells of this
  row are absent. There is no such row if R + 1 rows fill a table.

Only the first lane thus predicts where the text ends, as in a table of one lane. Which cells are
present follows from cells before them, so the likelihood of a table is exact: the probabilities of
all tables sum to one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.config import Config, VaryConfig
from msllm.data.converters.layout import Layout
from msllm.data.converters.single import pieces
from msllm.data.sources import Part, texts
from msllm.data.tables import Placement, Table
from msllm.errors import UserError
from msllm.streams import StreamSpec

OPTIONS: dict[str, Any] = {"key": "text", "lanes": [], "plan": "", "plan_tokens": 4}


def convert(layout: Layout, part: Part) -> Iterator[Table]:
    """From texts (text files, or the text under `key` of records), cut into lanes.

    `lanes` lists streams or groups, in the order of the parts; empty: all output streams. A text
    that is longer than a table is cut into pieces that fill one each, and a last one. With `plan`,
    the stream of this name says the first `plan_tokens` tokens of the second and each later part,
    one part after the other, from row 1 on.
    """
    options = layout.options
    lanes = lane_streams(layout.spec, options["lanes"])
    plan = layout.spec.index(options["plan"]) if options["plan"] else None
    size = len(lanes) * (layout.rows - 1)
    for where, blocks in texts(part, options["key"], layout.bad):
        for tokens in layout.count_empty(pieces(layout, blocks, where, size, overlap=0)):
            parts = cut(tokens, len(lanes))
            table = _table(layout, lanes, parts, json.dumps(tokens))
            if plan is not None:
                said = [token for one in parts[1:] for token in one[: options["plan_tokens"]]]
                said = said[: len(parts[0])]
                table.tokens[1 : 1 + len(said), plan] = said
            yield table._replace(source=where)


def cut(tokens: Sequence[int], lanes: int) -> list[Sequence[int]]:
    """Cuts a text into parts for lanes; the first ones may have one token more than the others."""
    short, longer = divmod(len(tokens), lanes)
    ends = [lane * short + min(lane, longer) for lane in range(lanes + 1)]
    return [tokens[start:end] for start, end in zip(ends, ends[1:])]


def _table(layout: Layout, lanes: Sequence[int], parts: Sequence[Sequence[int]], key: str) -> Table:
    rows, silence = len(parts[0]), layout.tokenizer.silence_id
    placements = [
        Placement(lane, 1 + rows - len(part), part) for lane, part in zip(lanes, parts, strict=True)
    ]
    has_end = rows + 1 < layout.rows
    if has_end:
        placements[0] = placements[0]._replace(tokens=[*parts[0], silence])
    table = layout.table(placements, key, closed=False)
    if has_end:
        others = np.arange(layout.spec.size) != lanes[0]
        table.present[rows + 1, others] = False
        table.tokens[rows + 1, others] = 0
    return table


def lane_streams(spec: StreamSpec, names: Sequence[str]) -> tuple[int, ...]:
    """The streams of the lanes, in order.

    Args:
      spec: the streams.
      names: streams and groups; empty: all output streams.

    Raises UserError if a name is unknown, if a stream occurs twice, or if one is an input.
    """
    if names:
        found = tuple(stream for name in names for stream in spec.members(name))
    else:
        found = tuple(s for s, kind in enumerate(spec.kinds) if kind == "output")
    option = f"config.data.options.lanes is {list(names)}"
    if not found:
        raise UserError(f"{option}, and no stream is an output: name the streams of the lanes")
    if len(set(found)) < len(found):
        raise UserError(f"{option}: name each stream once")
    for stream in found:
        if spec.kinds[stream] == "input":
            raise UserError(
                f"{option}, and {spec.names[stream]} is an input: the model says what is in lanes;"
                " name outputs or thoughts"
            )
    return found


def check(config: Config, spec: StreamSpec, options: Mapping[str, Any]) -> None:
    """Raises UserError if the settings do not fit lanes."""
    for name, value, default in (
        ("vary", config.data.vary, VaryConfig()),
        ("streams", config.data.streams, ()),
    ):
        if value != default:
            raise UserError(
                f"config.data.{name} is {value}: the converter 'lanes' writes the streams of the"
                f" model as they are, because the first silence of its first lane ends the text;"
                f" leave config.data.{name} at its default"
            )
    lanes = lane_streams(spec, options["lanes"])
    plan = options["plan"]
    if plan and spec.index(plan) in lanes:
        raise UserError(f"config.data.options.plan is {plan!r}, a lane: name another stream")
    if options["plan_tokens"] < 1:
        raise UserError(
            f"config.data.options.plan_tokens is {options['plan_tokens']}: must be at least 1"
        )
    if spec.delays and spec.delays[lanes[0]] > min(spec.delays):
        raise UserError(
            f"config.streams.delays is {config.streams.delays}: the delay of"
            f" {spec.names[lanes[0]]}, the first lane, must not be greater than that of another"
            " stream, because its end is that of all streams"
        )


class Lanes(NamedTuple):
    """Where the text is in a table of lanes.

    Attributes:
      streams: the streams of the lanes, in the order of the parts.
      delays: [S], the delays of all streams.
      silence_id: the silence token.
    """

    streams: tuple[int, ...]
    delays: tuple[int, ...]
    silence_id: int

    @property
    def first(self) -> int:
        """The first lane, which ends the text."""
        return self.streams[0]

    def text_rows(self, rows: int) -> int:
        """R of a table of `rows` rows that it fills."""
        return max(rows - 1 - max(self.delays), 0)

    def length(self, tokens: np.ndarray) -> int | None:
        """R of a table with delays, [T, S]; None: the text has no end."""
        start = self.delays[self.first] + 1
        silent = np.flatnonzero(tokens[start:, self.first] == self.silence_id)
        return int(silent[0]) if len(silent) else None

    def join(self, tokens: np.ndarray) -> list[int]:
        """The tokens of the text of a table with delays, [T, S].

        Of a text without an end, each part has as many rows as the table has for all of them.
        """
        rows = self.length(tokens)
        rows = self.text_rows(len(tokens)) if rows is None else rows
        parts = [tokens[self.delays[s] + 1 :, s][:rows].tolist() for s in self.streams]
        return [token for part in parts for token in part if token != self.silence_id]
