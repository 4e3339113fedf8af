"""Mail: rules by which what a stream said is copied into the column of an input stream, by row.

Decoding, preparing and evaluating read the rules here. docs/semantics.md describes what they mean.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from msllm.errors import UserError
from msllm.groups import Group, Roster

MAX_ROWS = 1 << 31  # the devices count rows in int32
_SETTING = "config.streams.mail"
_NUMBER = re.compile("[0-9]+")
_ROWS = re.compile("([0-9]+)(?:(:)([0-9]*)(?::([0-9]+))?)?")
_FORMS = "rows are '5', '5:12' (5 to 11), '5:12:2' or '5:', or several of these with commas between"


class Mail(NamedTuple):
    """A rule: in these rows, the reader's cell is what the source said `lag` rows before."""

    reader: int  # the stream that gets the mail, of kind input
    source: int  # the stream whose cells are copied
    lag: int  # rows; 0: what the source says in the same row
    rows: tuple[range, ...]  # rows of the reader, from the start of the example or session

    def describe(self, names: Sequence[str]) -> tuple[str, str, str, str]:
        """The rule as in `config.streams.mail`."""
        rows = ",".join(map(_describe_rows, self.rows))
        return names[self.reader], names[self.source], str(self.lag), rows


class Cell(NamedTuple):
    """A cell of an input stream that gets mail, and the cell that is copied into it."""

    row: int
    reader: int
    source_row: int
    source: int

    @property
    def is_copy(self) -> bool:
        """Whether the source is in the same row, so that the cell is filled after all others."""
        return self.row == self.source_row


class Conflict(ValueError):
    """A cell that gets mail holds something else."""


def parse_mail(
    settings: Iterable[tuple[str, str, str, str]],
    names: Sequence[str],
    kinds: Sequence[str],
    groups: Sequence[Group] = (),
) -> tuple[Mail, ...]:
    """Reads `config.streams.mail`. The order of the rules and of their rows does not matter.

    Args:
      settings: (reader, source, lag, rows). Reader and source may refer to groups.
      names, kinds: those of the streams.
      groups: the groups of streams.

    Raises UserError if a rule is invalid, or if two of them fill the same cell.
    """
    roster = Roster(tuple(names), tuple(groups))
    parsed = [rule for setting in settings for rule in _parse(setting, roster, kinds)]
    mail = tuple(sorted(parsed, key=_order))
    for reader in {rule.reader for rule in mail}:
        row = _common_row([rows for rule in mail if rule.reader == reader for rows in rule.rows])
        if row is not None:
            raise UserError(
                f"{_SETTING} fills row {row} of {names[reader]!r} twice: each cell gets mail once;"
                " change the rows of one of the rules"
            )
    copies = {rule.reader for rule in mail if not rule.lag}
    for rule in mail:
        if not rule.lag and rule.source in copies:
            raise UserError(
                f"{_SETTING} copies {names[rule.source]!r} into {names[rule.reader]!r} in the same"
                f" row (lag 0), and {names[rule.source]!r} gets such a copy itself: name the stream"
                " that it copies as the source"
            )
    return mail


def _parse(setting: tuple[str, str, str, str], roster: Roster, kinds: Sequence[str]) -> list[Mail]:
    """The rules of a setting: one for each pair of streams that it names."""
    reader, source, lag, rows = setting
    pairs = roster.pairs(reader, source, _SETTING)
    for stream, other in pairs:
        if kinds[stream] != "input":
            raise UserError(
                f"{_SETTING} has the reader {reader!r}, which is of kind {kinds[stream]}: mail goes"
                " into input streams; name an input, or change config.streams.kinds"
            )
        if stream == other:
            raise UserError(
                f"{_SETTING} copies {reader!r} into itself: name another stream as the source"
            )
    if not _NUMBER.fullmatch(lag) or not 0 <= int(lag) < MAX_ROWS:
        raise UserError(
            f"{_SETTING} holds lag {lag!r}: must be a number of rows in [0, {MAX_ROWS}); '1' copies"
            " from the row before, and '0' from the same row"
        )
    parsed = sorted((_parse_rows(part, int(lag)) for part in rows.split(",")), key=_start)
    return [Mail(stream, other, int(lag), tuple(parsed)) for stream, other in pairs]


def _start(rows: range) -> int:
    return rows.start


def _order(rule: Mail) -> tuple[int, int, int, int]:
    return rule.reader, rule.source, rule.lag, rule.rows[0].start


def _parse_rows(text: str, lag: int) -> range:
    match = _ROWS.fullmatch(text.strip())
    if not match:
        raise UserError(f"{_SETTING} holds rows {text!r}: {_FORMS}")
    first, colon, end, step = match.groups()
    start = int(first)
    stop = start + 1 if not colon else int(end) if end else MAX_ROWS
    if stop > MAX_ROWS or step is not None and not int(step):
        raise UserError(
            f"{_SETTING} holds rows {text!r}: rows are below {MAX_ROWS}, and steps at least 1"
        )
    if stop <= start:
        raise UserError(f"{_SETTING} holds rows {text!r}, which are none: {_FORMS}")
    if start < lag:
        raise UserError(
            f"{_SETTING} holds rows {text!r} with lag {lag}: there is no row {start - lag} to copy"
            f" from; begin at row {lag} or later"
        )
    rows = range(start, stop, int(step or 1))
    if stop < MAX_ROWS:  # the same rows always give the same range
        rows = range(start, rows[-1] + 1, rows.step if len(rows) > 1 else 1)
    return rows


def _describe_rows(rows: range) -> str:
    if len(rows) == 1:
        return str(rows.start)
    stop = "" if rows.stop == MAX_ROWS else str(rows.stop)
    return f"{rows.start}:{stop}" + (f":{rows.step}" if rows.step > 1 else "")


def _common_row(ranges: Collection[range]) -> int | None:
    """A row that two of the ranges share; None if there is none."""
    single = [rows.start for rows in ranges if len(rows) == 1]
    several = [rows for rows in ranges if len(rows) > 1]
    if len(set(single)) < len(single):
        return next(row for row in single if single.count(row) > 1)
    for row, rows in itertools.product(single, several):
        if row in rows:
            return row
    found = itertools.starmap(_first_common, itertools.combinations(several, 2))
    return next((row for row in found if row is not None), None)


def _first_common(a: range, b: range) -> int | None:
    """The first element of two ranges with positive steps that both have."""
    divisor = math.gcd(a.step, b.step)
    if (b.start - a.start) % divisor:
        return None
    # Solve a.start + k * a.step = b.start (mod b.step) for k.
    modulus = b.step // divisor
    k = (b.start - a.start) // divisor * pow(a.step // divisor, -1, modulus) % modulus
    first, period = a.start + k * a.step, a.step * modulus
    first += max(0, -(-(b.start - first) // period)) * period
    return first if first < min(a.stop, b.stop) else None


def _place(cell: Cell) -> tuple[int, bool, int]:
    return cell.row, cell.is_copy, cell.reader


def mail_in(mail: tuple[Mail, ...], row: int) -> list[Cell]:
    """The cells of a row that get mail."""
    return [
        Cell(row, rule.reader, row - rule.lag, rule.source)
        for rule in mail
        if any(row in rows for rows in rule.rows)
    ]


@functools.lru_cache(maxsize=1024)  # one entry for each length of an example
def mailed_cells(mail: tuple[Mail, ...], rows: int) -> tuple[Cell, ...]:
    """The cells of the first `rows` rows that get mail, in an order in which they can be filled."""
    cells = [
        Cell(row, rule.reader, row - rule.lag, rule.source)
        for rule in mail
        for some in rule.rows
        for row in range(some.start, min(some.stop, rows), some.step)
    ]
    return tuple(sorted(cells, key=_place))


def is_mailed(mail: tuple[Mail, ...], rows: int, streams: int) -> np.ndarray:
    """Which cells of the first rows get mail, [rows, streams] bool."""
    mask = np.zeros((rows, streams), bool)
    for cell in mailed_cells(mail, rows):
        mask[cell.row, cell.reader] = True
    return mask


def deliver_to_example(
    tokens: np.ndarray,
    present: np.ndarray,
    mail: tuple[Mail, ...],
    names: Sequence[str],
    delays: Sequence[int],
    silence_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Fills the cells of an example that get mail, as decoding shows them.

    Args:
      tokens: [T, S] int32, with delays.
      present: [T, S] bool.
      mail, names: the rules, and the names of the streams.
      delays: the number of rows at the start in which each stream is absent.
      silence_id: the silence token. Silent and absent cells count as not filled yet.

    Returns: new tokens and present.

    Raises Conflict if a cell holds another token than its mail.
    """
    tokens, present = tokens.copy(), present.copy()
    for row, reader, source_row, source in mailed_cells(mail, len(tokens)):
        if row < delays[reader]:
            continue
        old, there = int(tokens[row, reader]), bool(present[source_row, source])
        new = int(tokens[source_row, source]) if there else 0
        if present[row, reader] and old != silence_id and (old != new or not there):
            said = f"said token {new}" if there else "is absent"
            raise Conflict(
                f"row {row} of {names[reader]!r} holds token {old}, but by {_SETTING} it gets mail"
                f" from {names[source]!r}, which {said} in row {source_row}: leave the cell silent"
                " (it is filled), or correct one of the two"
            )
        tokens[row, reader], present[row, reader] = new, there
    return tokens, present


def deliver_to_prefill(
    tokens: np.ndarray, present: np.ndarray, mail: tuple[Mail, ...], silence_id: int | None
) -> None:
    """Fills the silent cells of a prefill that get mail, in place. Other tokens stay.

    Args:
      tokens: [P, S] int32.
      present: [P, S] bool. Absent cells stay absent.
      mail: the rules.
      silence_id: the silence token; None: no cell is silent.
    """
    for row, reader, source_row, source in mailed_cells(mail, len(tokens)):
        if present[row, reader] and tokens[row, reader] == silence_id:
            present[row, reader] = present[source_row, source]
            tokens[row, reader] = tokens[source_row, source] * present[row, reader]
