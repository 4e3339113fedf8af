"""Exact match: how often the output streams say exactly what they should, and how soon.

The input streams of each held-out example are given row by row, and the model generates all other
streams. Mail comes from what the model says, and not from the example. If the input and the outputs
of an example take turns, each turn has an answer of its own; otherwise the example has one answer.
An answer is right if the tokens of every output stream, without silence, equal those of the
example. If an output holds working before the answer, a mark separates the two, and only the tokens
after the mark are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from msllm.data.dictation import QUESTION_END, expected_answer, question_ends, work_out
from msllm.data.loader import spread
from msllm.data.tables import Table
from msllm.decode.engine import FREE, DecodeOptions, Engine, Row, generate
from msllm.decode.script import check_number
from msllm.decode.vote import (
    check_about,
    check_samples,
    elect,
    run_groups,
    seeds,
    streams_of_vote,
)
from msllm.errors import UserError
from msllm.evals.held_out import examples as held_out_examples
from msllm.evals.held_out import open_split
from msllm.mail import is_mailed
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer
from msllm.weights.load import LoadedModel

BATCH = 128  # examples that are decoded together
SLACK = 8  # rows by which an answer may come later than in the example


class NoAnswers(UserError):
    """There is nothing to compare the answers of a model with."""


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """The answers to held-out examples. Rows are counted from the last token of a turn's input.

    Attributes:
      examples: number of examples.
      answers: number of the answers that the examples hold, one for each turn that has one.
      exact_match: share of the answers that are exact.
      answered: share of the turns in which every output stream gave an answer, right or wrong.
      by_turn: share of exact answers among the first turns of the examples, the second ones, ...
      rows_to_first: median number of rows to the first token of the answer, over exact answers.
      rows_to_last: median number of rows to the last token of the answer, over exact answers.
      answered_rows: median number of rows to the first token of the answer, over all answers.
      one_stream_rows: median number of rows to the first token of the answer if a single stream
        held the question, the thoughts and the answer.

    A median over no values is None.
    """

    examples: int
    answers: int
    exact_match: float
    answered: float
    by_turn: tuple[float, ...]
    rows_to_first: float | None
    rows_to_last: float | None
    answered_rows: float | None
    one_stream_rows: float | None


class Vote(NamedTuple):
    """How several sampled runs of an example decide on its answer (msllm/decode/vote.py).

    Attributes:
      votes: the number of runs.
      about: answers: the most frequent answer of an example. tokens: in each row, the most frequent
        token of each output.
      options: of decoding. The seed of each run is derived from that of the options.
    """

    votes: int
    about: str = "answers"
    options: DecodeOptions = DecodeOptions(temperature=1.0)


def evaluate(
    model: LoadedModel,
    data: str = "",
    examples: int = 500,
    after: str = "",
    vote: Vote | None = None,
) -> ExactMatch:
    """Answers held-out examples and counts the exact answers.

    Args:
      model: a model with a tokenizer.
      data: the prepared directory. Empty: the one that the model was trained on.
      examples: the most examples to use, spread evenly over the split.
      after: compare only the tokens of an output after the last occurrence of this text. Empty:
        compare all of them.
      vote: answer each example by a vote of several runs. None: one run, with the most likely
        tokens.

    Raises UserError if the data does not fit the model or has no inputs and outputs; NoAnswers if
    no example has an input and an answer.
    """
    loader = open_split(model, data)
    model = model.with_streams(delays=tuple(loader.manifest["streams"]["delays"]))
    wanted = set(spread(loader.manifest["splits"]["eval"]["examples"], examples))
    tables = [table for i, table in enumerate(held_out_examples(loader)) if i in wanted]
    if _is_single_dictation(model):
        cases = [case for table in tables for case in _single_cases(table, model)]
    else:
        cases = [streams_case(table, model) for table in tables]
    cases = [case for case in cases if any(turn.has_answer for turn in case.turns)]
    if not cases:
        raise NoAnswers(
            f"none of {len(tables)} held-out examples has an input and an answer to it: prepare"
            " other data, --data=DIR"
        )
    if after:
        cases = [_only_after(case, after, model.require_tokenizer()) for case in cases]
    # All batches have the same shape, so decoding compiles once.
    at_once = max(1, BATCH // vote.votes) if vote else BATCH
    rows, size = max(case.rows for case in cases), min(at_once, len(cases))
    answers: list[list[Answer]] = []
    voting = _Voting(model, vote, rows, size, after) if vote else None
    for start in range(0, len(cases), size):
        part = cases[start : start + size]
        if voting:
            answers += voting.answer(part, start)
        else:
            answers += _answer(part, model, rows, size, after)
    turns = [turn for case in cases for turn in case.turns if turn.has_answer]
    given, by_turn = [], dict[int, list[bool]]()
    for case, of_case in zip(cases, answers):
        for number, (turn, answer) in enumerate(zip(case.turns, of_case), case.first_turn):
            if turn.has_answer:
                given.append(answer)
                by_turn.setdefault(number, []).append(answer.right and answer.first is not None)
    answered = [answer for answer in given if answer.first is not None]
    right = [answer for answer in answered if answer.right]
    return ExactMatch(
        examples=len(tables),
        answers=len(given),
        exact_match=len(right) / len(given),
        answered=len(answered) / len(given),
        by_turn=tuple(sum(by_turn[n]) / len(by_turn[n]) for n in sorted(by_turn)),
        rows_to_first=_median(answer.first for answer in right),
        rows_to_last=_median(answer.last for answer in right),
        answered_rows=_median(answer.first for answer in answered),
        one_stream_rows=_median(turn.one_stream_rows for turn in turns),
    )


def describe(result: ExactMatch) -> str:
    """The result as lines of text. Figures that do not exist are left out."""
    what = f"{result.examples} held-out examples answered exactly"
    if result.answers != result.examples:
        what = f"{result.answers} answers in {result.examples} held-out examples are exact"
    lines = [f"{result.exact_match:.1%} of {what}"]
    if len(result.by_turn) > 1:
        shares = [f"turn {number} {share:.1%}" for number, share in enumerate(result.by_turn, 1)]
        lines.append("by turn: " + ", ".join(shares))
    if result.rows_to_first is not None and result.rows_to_last is not None:
        lines.append(
            f"exact answers: first token {_after(result.rows_to_first)}, last token"
            f" {_after(result.rows_to_last)} (first token in one stream, after reading and"
            f" thinking: {_rows(result.one_stream_rows)} after it)"
        )
    answered = f"{result.answered:.1%} answered at all, right or wrong"
    if result.answered_rows is not None:
        answered += f": first token {_after(result.answered_rows)}"
    return "\n".join([*lines, answered])


def _after(rows: float) -> str:
    """Says where a row lies that comes `rows` rows after the end of the input."""
    return f"{_rows(abs(rows))} {'before' if rows < 0 else 'after'} the end of the input"


def _rows(number: float | None) -> str:
    return f"{number:g} {'row' if number == 1 else 'rows'}"


class Turn(NamedTuple):
    """A question and its answer, in a held-out example.

    Attributes:
      end: the row of the last token of the turn's input.
      answer: the tokens of each output stream without silence.
      one_stream_rows: rows from the end of the question to the first token of the answer if a
        single stream held the example.
    """

    end: int
    answer: list[list[int]]
    one_stream_rows: int

    @property
    def has_answer(self) -> bool:
        """Whether the example answers it; the last turn of a conversation may have no answer."""
        return any(self.answer)


class Case(NamedTuple):
    """One held-out example as a task.

    Attributes:
      prompt: [T, S] int32, the given tokens; FREE where the model samples, and for mail.
      turns: the turns to answer, in order.
      first_turn: the number of the first one of them in the example, from 0.
    """

    prompt: np.ndarray
    turns: list[Turn]
    first_turn: int = 0

    @property
    def rows(self) -> int:
        """The rows of a run that count, however many rows the other runs of a batch take."""
        return len(self.prompt) + SLACK

    def rows_of(self, turn: int) -> slice:
        """The rows in which the answer to a turn may come.

        An answer comes after the end of its input and at the latest with the end of the next one.
        The answer of the only turn may come in any row.
        """
        if len(self.turns) == 1:
            return slice(0, self.rows)
        last = turn + 1 == len(self.turns)
        end = self.rows if last else self.turns[turn + 1].end + 1
        return slice(self.turns[turn].end + 1, end)


class Answer(NamedTuple):
    """The answer of a model to a turn.

    Attributes:
      right: whether the answer equals that of the example.
      first: rows from the end of the input to the first token of the answer; None: no answer.
      last: rows from the end of the input to the last token of the answer; None: no answer.
    """

    right: bool
    first: int | None
    last: int | None


def streams_case(table: Table, model: LoadedModel) -> Case:
    """A table as a task: the inputs are given and the model generates all other streams.

    Cells that get mail are neither given nor input.

    Raises UserError if the model has no input or no output stream.
    """
    streams, silence = model.streams, model.require_tokenizer().silence_id
    _check_streams(streams)
    inputs, outputs = streams_of_kind(streams, "input"), streams_of_kind(streams, "output")
    spoken = table.present & (table.tokens != silence)
    prompt = np.full(table.tokens.shape, FREE)
    prompt[:, inputs] = np.where(spoken[:, inputs], table.tokens[:, inputs], silence)
    prompt[is_mailed(streams.mail, len(prompt), streams.size)] = FREE
    thoughts = spoken[:, streams_of_kind(streams, "thought")]
    ends = turn_ends(table, model)
    case = Case(prompt, [Turn(end, [], 0) for end in ends])
    last = 0  # the row after the last token of the answer before
    for number, turn in enumerate(case.turns):
        rows = case.rows_of(number)
        answer = [table.tokens[rows, s][spoken[rows, s]].tolist() for s in outputs]
        # In one stream, all thoughts since the last answer would come after the question.
        since, said = last, np.flatnonzero(spoken[rows][:, outputs].any(1))
        last = rows.start + int(said[-1]) + 1 if len(said) else turn.end + 1
        working = thoughts[since : last if number + 1 < len(case.turns) else None]
        case.turns[number] = Turn(turn.end, answer, one_stream_rows=int(working.sum()) + 1)
    return case


def is_applicable(model: LoadedModel) -> bool:
    """Returns whether there is an input and an output that answers it."""
    return _is_single_dictation(model) or {"input", "output"} <= set(model.streams.kinds)


def _is_single_dictation(model: LoadedModel) -> bool:
    config = model.run_config
    return config is not None and config.data.converter == "dictation_single"


def _check_streams(streams: StreamSpec) -> None:
    """Raises UserError if there is no input or no output."""
    if not {"input", "output"} <= set(streams.kinds):
        raise UserError(
            f"streams {', '.join(streams.names)} have kinds {', '.join(streams.kinds)}: exact match"
            " needs an input and an output; use `msllm score` for a single stream"
        )


def turn_ends(table: Table, model: LoadedModel) -> list[int]:
    """The last row of each turn's input in an example. Mail is no input.

    A turn ends where an input speaks again after the outputs began to answer it. An example in
    which inputs and outputs speak at the same time is a single turn. Of a dictation, every question
    is a turn. There are no turns if no input says anything.
    """
    tokenizer, kinds = model.require_tokenizer(), np.array(model.streams.kinds)
    inputs = np.flatnonzero(kinds == "input")
    spoken = table.present & (table.tokens != tokenizer.silence_id)
    spoken &= ~is_mailed(model.streams.mail, *spoken.shape)
    config = model.run_config
    if config is not None and config.data.converter == "dictation" and len(inputs):
        end_id = tokenizer.encode(QUESTION_END)[0]
        user = np.where(spoken, table.tokens, tokenizer.silence_id)[:, inputs[0]]
        return question_ends(user, end_id)
    return _turn_ends(spoken[:, inputs].any(1), spoken[:, kinds == "output"].any(1))


def _turn_ends(listening: np.ndarray, speaking: np.ndarray) -> list[int]:
    """`turn_ends` from the rows in which an input speaks and those in which an output does.

    Args:
      listening: [T] bool.
      speaking: [T] bool.
    """
    said = np.flatnonzero(listening)
    if not len(said):
        return []
    ends = []
    for row, following in zip(said, said[1:]):
        if speaking[row + 1 : following].any():
            ends.append(int(row))
    ends.append(int(said[-1]))
    first = int(np.flatnonzero(speaking)[0]) if speaking.any() else ends[0] + 1
    if first <= ends[0] or (listening & speaking).any():
        return ends[-1:]
    return ends


def _single_cases(table: Table, model: LoadedModel) -> list[Case]:
    """Dictations in one stream as tasks: the model generates the thoughts and the answer.

    Each question is a case of its own, in which everything before the question is given.
    """
    text, tokenizer = table.tokens[:, 0], model.require_tokenizer()
    text = text[text != tokenizer.silence_id]
    cases = []
    start = 0  # of the question
    ends = question_ends(text, tokenizer.encode(QUESTION_END)[0])
    for number, end in enumerate(ends):
        question = tokenizer.decode(text[start : end + 1]).split()
        answer = tokenizer.encode(" ".join(expected_answer(question)))
        thoughts = sum(len(words) for _, words in work_out(question)[0])
        start = end + 1 + thoughts + len(answer)  # of the next question
        prompt = np.where(np.arange(start) <= end, text[:start], FREE)[:, None]
        cases.append(Case(prompt, [Turn(end, [answer], thoughts + 1)], number))
    return cases


def _only_after(case: Case, mark: str, tokenizer: Tokenizer) -> Case:
    """The case with only the tokens after the mark as its answers.

    Raises UserError if no token follows the mark.
    """
    turns = []
    for turn in case.turns:
        if not turn.has_answer:
            turns.append(turn)
            continue
        answer = [tokens[_end_of_mark(tokens, mark, tokenizer) :] for tokens in turn.answer]
        if not all(answer):
            texts = [tokenizer.decode(tokens) for tokens in turn.answer]
            raise UserError(
                f"--after={mark}: nothing comes after it in the example's output {texts}: correct"
                " the mark"
            )
        working = sum(map(len, turn.answer)) - sum(map(len, answer))
        turns.append(Turn(turn.end, answer, turn.one_stream_rows + working))
    return case._replace(turns=turns)


def _end_of_mark(tokens: Sequence[int], mark: str, tokenizer: Tokenizer) -> int:
    """The index after the last occurrence of a mark; the number of tokens if there is none.

    The mark may span several tokens, or be a part of one.
    """
    for start in reversed(range(len(tokens))):
        for end in range(start + 1, len(tokens) + 1):
            if mark in tokenizer.decode(tokens[start:end]):
                return end
    return len(tokens)


def _answer(
    cases: Sequence[Case], model: LoadedModel, rows: int, batch: int, mark: str = ""
) -> list[list[Answer]]:
    """Generates the answers of at most `batch` cases, in tables of `rows` rows."""
    forced = forced_tables(cases, model, rows, batch)
    generated = generate(model, rows, forced=forced, batch=batch)
    return judge(cases, generated.shown, generated.present, model, mark)


class _Voting:
    """Votes of batches of cases, with one engine."""

    def __init__(self, model: LoadedModel, vote: Vote, rows: int, batch: int, mark: str):
        """Makes the engine. The arguments are those of `_answer`. Raises UserError."""
        check_about(vote.about)
        check_number("votes", vote.votes, int, "[1, 2147483648)")
        check_samples(vote.options, vote.votes)
        self._model, self._vote, self._rows, self._mark = model, vote, rows, mark
        self._batch, self._streams = batch, streams_of_vote(model.streams, ())
        self._engine = Engine(model, sessions=batch * vote.votes, window=max(rows, 2))

    def answer(self, cases: Sequence[Case], first: int) -> list[list[Answer]]:
        """The answers of at most `batch` cases.

        Args:
          cases: the cases.
          first: the number of the first one, which gives the seeds.
        """
        forced = forced_tables(cases, self._model, self._rows, self._batch)
        votes, seed = self._vote.votes, self._vote.options.seed
        groups = []
        for number, table in enumerate(forced):
            of_case = seeds(seeds(seed, first + number + 1)[-1], votes)
            group = [
                self._engine.open(dataclasses.replace(self._vote.options, seed=one))
                for one in of_case
            ]
            for session in group:
                for stream in range(self._model.streams.size):
                    session.force(stream, table[:, stream].tolist())
            groups.append(group)
        found = run_groups(groups, self._rows, self._streams, self._vote.about)
        for group in groups:
            for session in group:
                session.close()
        return [_elected(*pair, self._model, self._mark) for pair in zip(cases, found)]


def _elected(
    case: Case, runs: Sequence[Sequence[Row]], model: LoadedModel, mark: str
) -> list[Answer]:
    """The answers of the run that won a vote. A run with no answer has a vote as well."""
    tokens = np.array([[row.tokens for row in run] for run in runs])
    present = np.array([[row.present for row in run] for run in runs])
    spoken = present & (tokens != model.require_tokenizer().silence_id)
    turns = range(len(case.turns))
    said = [
        str([_said(case, turn, *run, model, mark)[1] for turn in turns])
        for run in zip(tokens, spoken)
    ]
    winner, _ = elect(said)
    return [_judge(case, turn, tokens[winner], spoken[winner], model, mark) for turn in turns]


def judge(
    cases: Sequence[Case],
    tokens: np.ndarray,
    present: np.ndarray,
    model: LoadedModel,
    mark: str = "",
) -> list[list[Answer]]:
    """Compares generated tables with the answers of their cases.

    Args:
      cases: the cases of the first tables.
      tokens, present: [B, T, S], the tables.
      model: gives the streams and the tokenizer.
      mark: as `after` in `evaluate`.

    Returns: the answers of each case, one for each turn.
    """
    spoken = present & (tokens != model.require_tokenizer().silence_id)
    return [
        [_judge(case, turn, tokens[b], spoken[b], model, mark) for turn in range(len(case.turns))]
        for b, case in enumerate(cases)
    ]


def forced_tables(cases: Sequence[Case], model: LoadedModel, rows: int, batch: int) -> np.ndarray:
    """The prompts of at most `batch` cases, as the forced tokens of `generate`.

    Inputs are silent after the prompt, except for mail. Tables without a case are filler.

    Returns: [batch, rows, S], FREE where the model samples, and for mail.
    """
    streams, silence = model.streams, model.require_tokenizer().silence_id
    forced = np.full((batch, rows, streams.size), FREE)
    forced[:, :, streams_of_kind(streams, "input")] = silence
    mailed = is_mailed(streams.mail, rows, streams.size)
    forced[:, mailed] = FREE
    for table, case in zip(forced, cases):
        table[: len(case.prompt)] = case.prompt
    # No row predicts the first one. Its free cells are silence, as in the examples.
    forced[:, 0] = np.where((forced[:, 0] == FREE) & ~mailed[0], silence, forced[:, 0])
    return forced


def _judge(
    case: Case, number: int, tokens: np.ndarray, spoken: np.ndarray, model: LoadedModel, mark: str
) -> Answer:
    """Compares generated tokens with the answer to turn `number` of a case. See `_said`."""
    turn = case.turns[number]
    rows, said = _said(case, number, tokens, spoken, model, mark)
    if not all(len(at) for at in rows):
        return Answer(said == turn.answer, None, None)
    first, last = min(at[0] for at in rows), max(at[-1] for at in rows)
    return Answer(said == turn.answer, int(first), int(last))


def _said(
    case: Case, number: int, tokens: np.ndarray, spoken: np.ndarray, model: LoadedModel, mark: str
) -> tuple[list[np.ndarray], list[list[int]]]:
    """The rows, from the end of the input, and the tokens of the answer of each output stream.

    Args:
      tokens: [T, S].
      spoken: [T, S] bool, which cells are neither silent nor absent.
    """
    outputs = streams_of_kind(model.streams, "output")
    turn, window = case.turns[number], case.rows_of(number)
    rows, said = [], []  # the answer's rows and tokens, per output stream
    for s, answer in zip(outputs, turn.answer):
        at = np.flatnonzero(spoken[window, s]) + window.start
        if len(outputs) == model.streams.size:  # the stream also holds the question and the working
            at = at[at > turn.end][: turn.one_stream_rows - 1 + len(answer)][-len(answer) :]
        elif mark:
            at = at[_end_of_mark(tokens[at, s].tolist(), mark, model.require_tokenizer()) :]
        rows.append(at - turn.end)
        said.append(tokens[at, s].tolist())
    return rows, said


def streams_of_kind(streams: StreamSpec, kind: str) -> list[int]:
    """The indices of the streams of a kind."""
    return [s for s in range(streams.size) if streams.kinds[s] == kind]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
