"""Estimates whether the targets of generated streams can be known in time.

A cell is predicted in the row before its own, from the cells that are visible there
(`streams.visible`). If what a stream says follows from a cell that is not visible by then, the
model can only guess it, however long it trains. Data that are placed one row too early look
plausible and end in a high loss.

The estimate looks for such cells. From half of a sample of examples it learns to predict each
target from the predicting cell and one cell of another stream, d rows before the target, and it
tests this on the other half. It compares the best visible cell with the best hidden one. As a model
sees more than one cell, the shares are lower bounds of what a model can learn. The comparison tells
where the evidence is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from msllm.data.tables import Table
from msllm.streams import NEVER

ROWS_AFTER = 3  # hidden rows that are searched after the row of the target
ROWS_SEEN = 8  # visible rows that are searched
MIN_TARGETS = 50  # tokens of a stream that an estimate needs
MARGIN = 0.05  # share of the tokens that hidden evidence must predict in addition, for a warning
MIN_COPIED = 4  # equal tokens of an example that are no coincidence
SIMILAR = 0.01  # shares that differ by less count as equal; the nearer evidence is then named
MAX_TARGETS = 20_000  # cells of a stream that are predicted for the estimate
MAX_WORK = 400_000  # the same, times the number of pairs of streams
_ABSENT = -1  # the token of a cell that does not exist


class Clue(NamedTuple):
    """A cell from which the token of a target follows.

    Attributes:
      source: number of the stream.
      rows: how many rows the cell lies before the target; 0: in its row; below 0: after it.
      known: share of the target stream's tokens that it predicts correctly, between 0 and 1.
    """

    source: int
    rows: int
    known: float


class Evidence(NamedTuple):
    """What the targets of a generated stream follow from.

    Attributes:
      stream: number of the stream.
      targets: number of its tokens in the sample.
      visible: the best evidence that is visible where the targets are predicted. It may be of the
        stream itself. None: too few targets to tell.
      hidden: the best evidence that is not visible; None: there is none.
      copied: share of the tokens that equal a visible token of another stream, at the distance at
        which most tokens of the example do.
      copied_late: share of the tokens that equal a hidden one, in examples in which those are more
        than half of the tokens and more than the visible ones.
    """

    stream: int
    targets: int
    visible: Clue | None
    hidden: Clue | None
    copied: float = 0.0
    copied_late: float = 0.0

    @property
    def is_late(self) -> bool:
        """Whether hidden evidence explains at least half of what visible evidence does not."""
        if self.visible is None or self.hidden is None:
            return False
        open_visible, open_hidden = 1 - self.visible.known, 1 - self.hidden.known
        return open_visible - open_hidden >= MARGIN and open_hidden <= open_visible / 2


def estimate(
    examples: Iterable[Table],
    kinds: Sequence[str],
    lag: np.ndarray,
    silence_id: int,
    copies: Collection[tuple[int, int]] = (),
) -> list[Evidence]:
    """Estimates for each stream that is not an input what its targets follow from.

    Args:
      examples: single examples, with delays applied. Only as many as needed are read.
      kinds: the kinds of the S streams.
      lag: [S, S] int, lag[reader, source].
      silence_id: the token of silence. Silent targets count as errors if they are predicted to
        speak.
      copies: (reader, source) of mail. That a reader repeats what a stream has said, later or in
        the same row, is no evidence for what the stream says.
    """
    size = len(kinds)
    limit = int(np.clip(MAX_WORK // max(1, size * (size - 1)), 2000, MAX_TARGETS))
    sample = _Sample(examples, size, limit, silence_id)
    return [
        sample.evidence(stream, lag, {reader for reader, source in copies if source == stream})
        for stream, kind in enumerate(kinds)
        if kind != "input" and size > 1
    ]


class _Sample:
    """Examples below one another, with absent rows between them.

    Attributes:
      tokens: [N, S] int, small numbers in place of token ids; _ABSENT where there is no cell.
      example: [N] int, the number of the example; _ABSENT between examples.
      silence: the number of silence.
    """

    def __init__(self, examples: Iterable[Table], streams: int, limit: int, silence_id: int):
        """Takes examples until they have `limit` rows. A longer one is cut."""
        # As many rows as the farthest cell that is looked at lies from a target.
        gap = np.full((ROWS_SEEN + ROWS_AFTER + 2, streams), _ABSENT, np.int64)
        parts, numbers, rows = [gap], [gap[:, 0]], 0
        for number, table in enumerate(examples):
            cells = np.where(table.present, table.tokens, _ABSENT)[: limit - rows]
            parts += [cells.astype(np.int64), gap]
            numbers += [np.full(len(cells), number), gap[:, 0]]
            rows += len(cells)
            if rows >= limit:
                break
        stacked = np.concatenate(parts)
        everything = np.append(stacked.ravel(), (_ABSENT, silence_id))
        ids, tokens = np.unique(everything, return_inverse=True)
        self.size = len(ids)  # numbers are below this
        self.silence = int(tokens[-1]) - 1
        self.tokens = tokens[:-2].reshape(stacked.shape) - 1  # the smallest id is _ABSENT
        self.example = np.concatenate(numbers)

    def evidence(self, stream: int, lag: np.ndarray, copies: Collection[int]) -> Evidence:
        """Compares the evidence for the targets of a stream.

        Args:
          stream: the stream.
          lag: [S, S] int.
          copies: the streams that get its mail.
        """
        own = self.tokens[:, stream]
        rows = np.flatnonzero((own[1:] != _ABSENT) & (own[:-1] != _ABSENT)) + 1
        said = int((own[rows] != self.silence).sum())
        if said < MIN_TARGETS:
            return Evidence(stream, said, None, None)
        state = self._state(stream, rows, remembers=lag[stream, stream] <= 1)
        guess = _Guess(own[rows], state, self._fold(rows), self.size, self.silence)
        visible, hidden = [Clue(stream, 1, guess.known())], list[Clue]()
        for source in range(len(lag)):
            first = int(lag[stream, source]) + 1  # the nearest visible row
            nearest = 2 if source == stream else -ROWS_AFTER
            last = ROWS_SEEN if first > NEVER else first + ROWS_SEEN - 1
            for distance in range(nearest, last + 1):
                if source == stream and distance < first:
                    continue
                if source in copies and distance < first:
                    continue
                clue = Clue(source, distance, guess.known(self.tokens[rows - distance, source]))
                (visible if distance >= first else hidden).append(clue)
        copied, late = self._copied(stream, rows, lag, copies)
        # The nearest visible rows and the latest hidden ones that need the shortest shift.
        shift = {clue: int(lag[stream, clue.source]) + 1 - clue.rows for clue in hidden}
        best = min(_best(hidden), key=shift.__getitem__) if hidden else None
        return Evidence(
            stream,
            said,
            min(_best(visible), key=lambda c: c.rows),
            best,
            copied / said,
            late / said,
        )

    def _state(self, stream: int, rows: np.ndarray, remembers: bool) -> np.ndarray:
        """[n] int, what the predicting cell of each target holds.

        It is the cell's token or, if that is silence, the last token that the stream said before.
        """
        own = self.tokens[:, stream]
        before = own[rows - 1]
        if not remembers:
            return before
        spoken = (own != self.silence) & (own != _ABSENT)
        at = np.maximum.accumulate(np.where(spoken, np.arange(len(own)), 0))[rows - 1]
        known = spoken[at] & (self.example[at] == self.example[rows])
        last = np.where(known, own[at], self.silence)
        return last * 2 + (before == self.silence)

    def _fold(self, rows: np.ndarray) -> np.ndarray:
        """[n] bool, the half of the sample that each target belongs to."""
        examples = self.example[rows]
        if examples.min() == examples.max():
            return np.arange(len(rows)) >= len(rows) // 2
        return examples % 2 == 1

    def _copied(
        self, stream: int, rows: np.ndarray, lag: np.ndarray, copies: Collection[int]
    ) -> tuple[int, int]:
        """Counts the tokens that equal a visible token of another stream, and a hidden one.

        In each example, they are compared at the distance at which the most tokens are equal. This
        finds copies whose distance differs between examples.
        """
        said = rows[self.tokens[rows, stream] != self.silence]
        example, target = self.example[said], self.tokens[said, stream]
        number = int(self.example.max()) + 1
        seen, unseen = np.zeros((2, number), np.int64)
        for source in range(len(lag)):
            first = int(lag[stream, source]) + 1
            if source == stream or first > NEVER:
                continue
            nearest = first if source in copies else -ROWS_AFTER
            for distance in range(nearest, first + ROWS_SEEN):
                equal = self.tokens[said - distance, source] == target
                counts = np.bincount(example, equal, number).astype(np.int64)
                best = seen if distance >= first else unseen
                np.maximum(best, counts, out=best)
        late = (unseen > seen) & (2 * unseen > np.bincount(example, minlength=number))
        late &= unseen >= MIN_COPIED
        return int(seen.sum()), int(unseen[late].sum())


def _best(clues: Sequence[Clue]) -> list[Clue]:
    """The clues that predict the most, up to SIMILAR."""
    most = max(clue.known for clue in clues)
    return [clue for clue in clues if clue.known > most - SIMILAR]


class _Guess:
    """Predicts targets from what was most frequent in the other half of the sample."""

    def __init__(
        self, target: np.ndarray, state: np.ndarray, fold: np.ndarray, size: int, silence: int
    ):
        """Takes the targets, the states of the predicting cells and the folds, [n] each."""
        self._target, self._fold, self._size, self._silence = target, fold, size, silence
        self._state = state
        self._said = int((target != silence).sum())
        most = np.full(len(target), np.bincount(target).argmax())
        self._by_state = self._update(most, state, 1)
        self._by_nothing = most

    def known(self, clue: np.ndarray | None = None) -> float:
        """The share of the tokens that are predicted in the right row, less those in wrong rows.

        Args:
          clue: [n] int, a token for each target; None: predict from the states alone.
        """
        if clue is None:
            return self._share(self._by_state)
        spoken = (clue != self._silence) & (clue != _ABSENT)
        both = self._state.astype(np.int64) * (self._size + 1) + clue + 1
        copied = np.where(spoken, clue, self._by_nothing)
        alone = self._update(copied, clue + 1, 1)
        return max(
            self._share(self._update(alone, both, 2)),
            self._share(self._update(self._by_state, both, 2)),
        )

    def _share(self, guess: np.ndarray) -> float:
        return max(0.0, 1 - int((guess != self._target).sum()) / self._said)

    def _update(self, guess: np.ndarray, key: np.ndarray, least: int) -> np.ndarray:
        """Replaces guesses by the most frequent target of the same key in the other fold.

        Args:
          guess: [n] int.
          key: [n] int.
          least: the least number of times that a key must have occurred.
        """
        guess = guess.copy()
        for fold in (False, True):
            train, test = self._fold != fold, self._fold == fold
            pairs, counts = np.unique(
                key[train].astype(np.int64) * self._size + self._target[train], return_counts=True
            )
            order = np.lexsort((counts, pairs // self._size))
            keys, targets = pairs[order] // self._size, pairs[order] % self._size
            last = np.append(keys[1:] != keys[:-1], True)[: len(keys)]  # the most frequent target
            totals = np.diff(np.append(0, np.cumsum(counts[order])[last]))
            found, modes = keys[last][totals >= least], targets[last][totals >= least]
            if not len(found):
                continue
            place = np.minimum(np.searchsorted(found, key[test]), len(found) - 1)
            guess[test] = np.where(found[place] == key[test], modes[place], guess[test])
        return guess


def describe(
    found: Sequence[Evidence], names: Sequence[str], lag: np.ndarray, read: str = ""
) -> list[str]:
    """Describes an estimate in lines of text, one for each stream; none if there are no streams.

    Args:
      found: the result of `estimate`.
      names: names of the S streams.
      lag: [S, S] int, as for `estimate`.
      read: what the sample is.
    """
    if not found:
        return []
    title = "can the targets be known in time?" + (f" ({read})" if read else "")
    return [title, *(f"  {names[one.stream]}: {_text(one, names, lag)}" for one in found)]


def _text(one: Evidence, names: Sequence[str], lag: np.ndarray) -> str:
    if one.visible is None:
        return f"too few tokens to tell ({one.targets:,})"
    seen, hidden = one.visible, one.hidden
    if one.is_late and hidden is not None:
        name, first = names[hidden.source], int(lag[one.stream, hidden.source]) + 1
        if first > NEVER:
            sees = f"it never sees {name}"
            remedy = "let it see that stream (config.streams.visibility, config.streams.lags)"
        else:
            rows = _rows(first - hidden.rows)
            sees = f"when it is predicted, {name} is visible only up to {_where(first)}"
            remedy = f"place it {rows} later, or delay it by {rows} (config.streams.delays)"
            if hidden.rows > 0 and first > 1:
                remedy += ", or let it see the same row (config.streams.visibility)"
        return (
            f"WARNING: {hidden.known:.0%} of its tokens follow from {name} {_where(hidden.rows)},"
            f" but {sees}, and what is visible predicts {seen.known:.0%}: {remedy}"
        )
    if one.copied_late >= MARGIN:
        return (
            f"WARNING: {one.copied_late:.0%} of its tokens repeat another stream in examples in"
            " which the repeated token is not visible yet when they are predicted: place it later"
            " in these examples, or delay it (config.streams.delays)"
        )
    source = "itself" if seen.source == one.stream else names[seen.source]
    where = f"{source} {_where(seen.rows)}"
    if seen.known >= 0.5:
        return f"yes: {seen.known:.0%} of its tokens follow from {where}, which it sees"
    if one.copied >= 0.5:
        return f"yes: {one.copied:.0%} of its tokens repeat another stream, which it sees in time"
    rest = "" if hidden is None else f"; the best that it does not see predicts {hidden.known:.0%}"
    return (
        "no sign that anything comes too late: the best single cell that it"
        f" sees ({where}) predicts {seen.known:.0%} of its tokens{rest}"
    )


def _where(rows: int) -> str:
    if rows == 0:
        return "in the same row"
    return f"{_rows(abs(rows))} {'before' if rows > 0 else 'after'}"


def _rows(rows: int) -> str:
    return f"{rows} row" if rows == 1 else f"{rows} rows"
