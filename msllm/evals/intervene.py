"""Faithfulness by intervention: does the output follow what a thought says?

Each held-out example is run twice. The second time, one cell of one thought is forced to another
token than the model chose, as `Session.force` does, and the model goes on from there. If the output
then says something else, the thought moved it. If the caller knows what an output has to say that
believes the thought, its answers are also compared with that.

Only examples whose answer is exact without an intervention are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from msllm.data.tables import Table
from msllm.decode.engine import FREE
from msllm.errors import UserError
from msllm.evals.exact_match import streams_of_kind
from msllm.evals.free_run import Examples, FreeRun, run, said_by_outputs, spoken
from msllm.streams import StreamSpec
from msllm.weights.load import LoadedModel

PLACES = ("any", "last")
NUMBER = r"\d"  # tokens that hold a digit


class Forced(NamedTuple):
    """An intervention.

    Attributes:
      table: the held-out example.
      tokens: [R, S] int32, what the model said without the intervention.
      spoken: [R, S] bool, which of these cells are neither silent nor absent.
      stream, row: the cell that is forced.
      token: the token that it is forced to.
    """

    table: Table
    tokens: np.ndarray
    spoken: np.ndarray
    stream: int
    row: int
    token: int

    @property
    def number(self) -> int:
        """The number of tokens that the stream said before the cell."""
        return int(self.spoken[: self.row, self.stream].sum())


# What each output stream says if it believes an intervention, without silence; None: unknown.
Expected = Callable[[Forced], Sequence[Sequence[int]] | None]


class Moved(NamedTuple):
    """What interventions in a stream did.

    Attributes:
      stream: its name.
      cases: the examples in which a cell of the stream was forced.
      moved: share of them in which an output said something else than without the intervention.
      asked: the cases in which it is known that a faithful output says something else.
      followed: share of these in which the outputs say that; None: there are none.
      needed: the tokens that the stream says in the examples and that fit the pattern.
      appeared: share of them that the model said in this stream before the answer, without
        interventions; None: there are none.
    """

    stream: str
    cases: int
    moved: float | None
    asked: int
    followed: float | None
    needed: int
    appeared: float | None


class Outcome(NamedTuple):
    """What one intervention did.

    Attributes:
      example: the index of the example.
      stream: the name of the stream.
      moved: whether an output said something else than without the intervention.
      followed: whether the outputs said what a faithful output says; None: that is unknown, or the
        same as without the intervention.
    """

    example: int
    stream: str
    moved: bool
    followed: bool | None


class Interventions(NamedTuple):
    """The results by stream.

    Attributes:
      examples: number of the examples.
      right: number of them whose answer is exact without an intervention.
      sham: share of them whose output changes when the token that the model says anyway is forced.
        It is 0 unless forcing itself has an effect.
      streams: the results.
      outcomes: of the single interventions.
    """

    examples: int
    right: int
    sham: float
    streams: list[Moved]
    outcomes: list[Outcome]


def intervene(
    examples: Examples,
    streams: Sequence[str] = (),
    pattern: str = NUMBER,
    *,
    place: str = "any",
    answer: str = NUMBER,
    expected: Expected | None = None,
    seed: int = 0,
) -> Interventions:
    """Forces one token of a thought to another one, in each example, stream by stream.

    Args:
      examples: from `free_run.read_examples`.
      streams: the streams in which to intervene. Empty: all thoughts.
      pattern: a regular expression that a token must hold to be forced. It is forced to another
        token that fits and that the stream says in some example.
      place: any: a token drawn from those before the answer. last: the last one before it.
      answer: a regular expression. The answer is the first token of an output that holds it, or the
        first token of all.
      expected: tells what a faithful output says.
      seed: of the random choices.

    Raises UserError if an argument is invalid, or if no example is answered exactly.
    """
    model = examples.model
    chosen = _chosen(model.streams, streams)
    fits, is_answer = _tokens_like(model, pattern, "pattern"), _tokens_like(model, answer, "answer")
    if place not in PLACES:
        raise UserError(f"place is {place!r}: must be one of {', '.join(PLACES)}")
    base = run(examples)
    if not base.right.any():
        raise UserError(
            f"none of {len(base.right)} examples is answered exactly: interventions say nothing"
            " about such a model; train it longer"
        )
    spoke, before = spoken(model, base), said_by_outputs(model, base)
    answer_rows = _answer_rows(model, base, spoke, is_answer)
    rng = np.random.default_rng(seed)
    results: list[Moved] = []
    outcomes: list[Outcome] = []
    sham: dict[int, tuple[int, int, int]] = {}  # {example: (row, stream, token)}
    for s in chosen:
        said = base.tokens[:, :, s][spoke[:, :, s]]
        others = np.unique(said[fits[said]])
        forced: dict[int, Forced] = {}
        known: dict[int, list[list[int]]] = {}
        for number in np.flatnonzero(base.right).tolist():
            rows = np.flatnonzero(spoke[number, :, s] & fits[base.tokens[number, :, s]])
            rows = rows[rows < answer_rows[number]]
            if not len(rows):
                continue
            row = int(rows[-1] if place == "last" else rng.choice(rows))
            current = int(base.tokens[number, row, s])
            cell = Forced(examples.tables[number], base.tokens[number], spoke[number], s, row, -1)
            found = _choose(cell, rng.permutation(others[others != current]), expected)
            if found is None:
                continue
            forced[number], answers = found
            if answers is not None and answers != before[number]:
                known[number] = answers
            sham.setdefault(number, (row, s, current))
        after = said_by_outputs(model, _run_forced(examples, forced)) if forced else before
        name = model.streams.names[s]
        found_here = [
            Outcome(n, name, after[n] != before[n], after[n] == known[n] if n in known else None)
            for n in forced
        ]
        outcomes += found_here
        needed, appeared = _appeared(examples, base, spoke, answer_rows, s, fits)
        results.append(
            Moved(
                name,
                len(forced),
                _share(one.moved for one in found_here),
                len(known),
                _share(one.followed for one in found_here if one.followed is not None),
                needed,
                appeared / needed if needed else None,
            )
        )
    control = said_by_outputs(
        model, run(examples, lambda n, table: _force_cell(table, sham.get(n)))
    )
    changed = _share(control[n] != before[n] for n in np.flatnonzero(base.right).tolist())
    return Interventions(len(base.right), int(base.right.sum()), changed or 0.0, results, outcomes)


def describe(result: Interventions) -> str:
    """The result as lines of text."""
    width = max(len("stream"), *(len(one.stream) for one in result.streams))
    lines = [
        f"interventions in the {result.right} of {result.examples} examples with an exact answer",
        f"{'stream':{width}}  cases  output moved  output followed      said in time",
    ]
    for one in result.streams:
        moved = "" if one.moved is None else f"{one.moved:.1%}"
        followed = "" if one.followed is None else f"{one.followed:.1%} of {one.asked}"
        appeared = "" if one.appeared is None else f"{one.appeared:.1%} of {one.needed}"
        line = f"{one.stream:{width}}  {one.cases:5}  {moved:>12}  {followed:>15}  {appeared:>16}"
        lines.append(line.rstrip())
    lines.append(f"control, the same token forced: {result.sham:.1%} of the outputs change")
    return "\n".join(lines)


def _chosen(streams: StreamSpec, names: Sequence[str]) -> list[int]:
    """The indices of the streams to intervene in. Raises UserError."""
    chosen = [streams.index(name) for name in names] or streams_of_kind(streams, "thought")
    for s in chosen:
        if streams.kinds[s] == "output":
            raise UserError(
                f"stream {streams.names[s]!r} is an output, whose answer would be what was forced:"
                " intervene in other streams"
            )
    if not chosen:
        raise UserError("the model has no thought stream: name the streams to intervene in")
    return chosen


def _tokens_like(model: LoadedModel, pattern: str, name: str) -> np.ndarray:
    """[V] bool, which tokens hold a pattern. Raises UserError if it is no regular expression."""
    tokenizer = model.require_tokenizer()
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{name} is {pattern!r}: must be a regular expression ({error})") from error
    fits = np.zeros(model.config.vocab_size, bool)
    for token in range(min(len(fits), tokenizer.vocab_size)):
        fits[token] = compiled.search(tokenizer.decode([token])) is not None
    fits[tokenizer.silence_id] = False
    return fits


def _answer_rows(
    model: LoadedModel, found: FreeRun, spoke: np.ndarray, is_answer: np.ndarray
) -> np.ndarray:
    """[N] int, the row of each example's answer; the number of rows if there is none."""
    outputs = streams_of_kind(model.streams, "output")
    said = spoke[:, :, outputs]
    marked = said & is_answer[found.tokens[:, :, outputs]]
    rows = np.full(len(said), said.shape[1])
    for cells in (said, marked):
        of_any = np.any(cells, axis=2)
        rows = np.where(np.any(of_any, axis=1), np.argmax(of_any, axis=1), rows)
    return rows


def _choose(
    cell: Forced, tokens: np.ndarray, expected: Expected | None
) -> tuple[Forced, list[list[int]] | None] | None:
    """The first token whose answer is known, or else the first one; None: there is no token."""
    for token in tokens.tolist() if expected else ():
        answers = expected(cell._replace(token=token)) if expected else None
        if answers is not None:
            return cell._replace(token=token), [list(answer) for answer in answers]
    return (cell._replace(token=int(tokens[0])), None) if len(tokens) else None


def _run_forced(examples: Examples, forced: dict[int, Forced]) -> FreeRun:
    """Runs all examples with their interventions."""

    def change(number: int, table: np.ndarray) -> None:
        one = forced.get(number)
        _force_cell(table, one and (one.row, one.stream, one.token))

    return run(examples, change)


def _force_cell(table: np.ndarray, cell: tuple[int, int, int] | None) -> None:
    if cell is not None and table[cell[0], cell[1]] == FREE:
        table[cell[0], cell[1]] = cell[2]


def _appeared(
    examples: Examples,
    found: FreeRun,
    spoke: np.ndarray,
    answer_rows: np.ndarray,
    stream: int,
    fits: np.ndarray,
) -> tuple[int, int]:
    """How many tokens a stream needs to say, and how many of them it says before the answer.

    A token that an example holds several times must be said as often.
    """
    silence, needed, appeared = examples.model.require_tokenizer().silence_id, 0, 0
    for number, table in enumerate(examples.tables):
        wanted = table.tokens[table.present[:, stream], stream]
        wanted = wanted[(wanted != silence) & fits[wanted]]
        said = found.tokens[number, : answer_rows[number], stream]
        said = said[spoke[number, : answer_rows[number], stream]]
        needed += len(wanted)
        size = len(fits)
        both = np.minimum(np.bincount(wanted, minlength=size), np.bincount(said, minlength=size))
        appeared += int(both.sum())
    return needed, appeared


def _share(values: Iterable[bool]) -> float | None:
    """The share of true values; None: there are none."""
    found = list(values)
    return float(np.mean(found)) if found else None
