"""Exact match: how often the output streams say exactly what they should, and how soon.

The input streams of each held-out example are given row by row, and the model generates all other
streams. An answer is right if the tokens of every output stream, without silence, equal those of
the example. If an output holds working before the answer, a mark separates the two, and only the
tokens after the mark are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from msllm.data.dictation import QUESTION_END, expected_answer, question_end
from msllm.data.loader import spread
from msllm.data.tables import Table
from msllm.decode.engine import FREE, generate
from msllm.errors import UserError
from msllm.evals.held_out import examples as held_out_examples
from msllm.evals.held_out import open_split
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer
from msllm.weights.load import LoadedModel

BATCH = 128  # examples that are decoded together
SLACK = 8  # rows by which an answer may come later than in the example


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """The answers to held-out examples. Rows are counted from the last token of the input.

    Attributes:
      examples: number of examples.
      exact_match: share of the examples with an exact answer.
      answered: share of the examples in which every output stream gave an answer, right or wrong.
      rows_to_first: median number of rows to the first token of the answer, over exact answers.
      rows_to_last: median number of rows to the last token of the answer, over exact answers.
      answered_rows: median number of rows to the first token of the answer, over all answers.
      one_stream_rows: median number of rows to the first token of the answer if a single stream
        held the question, the thoughts and the answer.

    A median over no values is nan.
    """

    examples: int
    exact_match: float
    answered: float
    rows_to_first: float
    rows_to_last: float
    answered_rows: float
    one_stream_rows: float


def evaluate(
    model: LoadedModel, data: str = "", examples: int = 500, after: str = ""
) -> ExactMatch:
    """Answers held-out examples and counts the exact answers.

    Args:
      model: a model with a tokenizer.
      data: the prepared directory. Empty: the one that the model was trained on.
      examples: the most examples to use, spread evenly over the split.
      after: compare only the tokens of an output after the last occurrence of this text. Empty:
        compare all of them.

    Raises UserError if the data does not fit the model or has no inputs and outputs.
    """
    loader = open_split(model, data)
    model = model.with_streams(delays=tuple(loader.manifest["streams"]["delays"]))
    wanted = set(spread(loader.manifest["splits"]["eval"]["examples"], examples))
    tables = [table for i, table in enumerate(held_out_examples(loader)) if i in wanted]
    converter = model.run_config.data.converter if model.run_config else ""
    make_case = _single_case if converter == "dictation_single" else streams_case
    cases = [make_case(table, model) for table in tables]
    if after:
        cases = [_only_after(case, after, model.require_tokenizer()) for case in cases]
    # All batches have the same shape, so decoding compiles once.
    rows, size = max(len(case.prompt) for case in cases) + SLACK, min(BATCH, len(cases))
    answers: list[Answer] = []
    for start in range(0, len(cases), size):
        answers += _answer(cases[start : start + size], model, rows, size, after)
    answered = [answer for answer in answers if answer.first is not None]
    right = [answer for answer in answered if answer.right]
    return ExactMatch(
        examples=len(cases),
        exact_match=len(right) / len(cases),
        answered=len(answered) / len(cases),
        rows_to_first=_median(answer.first for answer in right),
        rows_to_last=_median(answer.last for answer in right),
        answered_rows=_median(answer.first for answer in answered),
        one_stream_rows=_median(case.one_stream_rows for case in cases),
    )


def describe(result: ExactMatch) -> str:
    """The result as lines of text."""
    return "\n".join(
        [
            f"{result.exact_match:.1%} of {result.examples} held-out examples answered exactly",
            "rows from the end of the question to the answer: first token"
            f" {result.rows_to_first:g}, last token {result.rows_to_last:g} (first token in one"
            f" stream, after reading and thinking: {result.one_stream_rows:g})",
            f"{result.answered:.1%} answered at all, right or wrong: first token after"
            f" {result.answered_rows:g} rows",
        ]
    )


class Case(NamedTuple):
    """One held-out example as a task.

    Attributes:
      prompt: [T, S] int32, the given tokens; FREE where the model samples.
      end: the row of the input's last token.
      answer: the tokens of each output stream without silence.
      one_stream_rows: rows from the end of the question to the first token of the answer if a
        single stream held the example.
    """

    prompt: np.ndarray
    end: int
    answer: list[list[int]]
    one_stream_rows: int


class Answer(NamedTuple):
    """The answer of a model to an example.

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

    Raises UserError if the model has no input or no output stream.
    """
    streams, silence = model.streams, model.require_tokenizer().silence_id
    inputs, outputs = _streams_of_kind(streams, "input"), _streams_of_kind(streams, "output")
    if not inputs or not outputs:
        raise UserError(
            f"streams {', '.join(streams.names)} have kinds {', '.join(streams.kinds)}: exact match"
            " needs an input and an output; use `msllm score` for a single stream"
        )
    spoken = table.present & (table.tokens != silence)
    prompt = np.full(table.tokens.shape, FREE)
    prompt[:, inputs] = np.where(spoken[:, inputs], table.tokens[:, inputs], silence)
    thoughts = spoken[:, _streams_of_kind(streams, "thought")]
    return Case(
        prompt=prompt,
        end=int(np.flatnonzero(spoken[:, inputs].any(1))[-1]),
        answer=[table.tokens[spoken[:, s], s].tolist() for s in outputs],
        one_stream_rows=int(thoughts.sum()) + 1,
    )


def _single_case(table: Table, model: LoadedModel) -> Case:
    """A dictation in one stream as a task: the model generates the thoughts and the answer."""
    text, tokenizer = table.tokens[:, 0], model.require_tokenizer()
    end = question_end(text, tokenizer.encode(QUESTION_END)[0])
    spoken = text[text != tokenizer.silence_id]
    question = tokenizer.decode(spoken[: end + 1]).split()
    length = len(tokenizer.encode(" ".join(expected_answer(question))))
    prompt = np.where(np.arange(len(text)) <= end, text, FREE)[:, None]
    return Case(prompt, end, [spoken[-length:].tolist()], len(spoken) - length - end)


def _only_after(case: Case, mark: str, tokenizer: Tokenizer) -> Case:
    """The case with only the tokens after the mark as its answer.

    Raises UserError if no token follows the mark.
    """
    answer = [tokens[_end_of_mark(tokens, mark, tokenizer) :] for tokens in case.answer]
    if not all(answer):
        texts = [tokenizer.decode(tokens) for tokens in case.answer]
        raise UserError(
            f"--after={mark}: nothing comes after it in the example's output {texts}: correct the"
            " mark"
        )
    working = sum(map(len, case.answer)) - sum(map(len, answer))
    return case._replace(answer=answer, one_stream_rows=case.one_stream_rows + working)


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
) -> list[Answer]:
    """Generates answers to at most `batch` cases, in tables of `rows` rows."""
    forced = forced_tables(cases, model, rows, batch)
    generated = generate(model, rows, forced=forced, batch=batch)
    spoken = generated.present & (generated.shown != model.require_tokenizer().silence_id)
    return [
        _judge(case, generated.shown[b], spoken[b], model, mark) for b, case in enumerate(cases)
    ]


def forced_tables(cases: Sequence[Case], model: LoadedModel, rows: int, batch: int) -> np.ndarray:
    """The prompts of at most `batch` cases, as the forced tokens of `generate`.

    Inputs are silent after the prompt. Tables without a case are filler.

    Returns: [batch, rows, S], FREE where the model samples.
    """
    streams, silence = model.streams, model.require_tokenizer().silence_id
    forced = np.full((batch, rows, streams.size), FREE)
    forced[:, :, _streams_of_kind(streams, "input")] = silence
    for table, case in zip(forced, cases):
        table[: len(case.prompt)] = case.prompt
    # No row predicts the first one. Its free cells are silence, as in the examples.
    forced[:, 0] = np.where(forced[:, 0] == FREE, silence, forced[:, 0])
    return forced


def _judge(
    case: Case, tokens: np.ndarray, spoken: np.ndarray, model: LoadedModel, mark: str
) -> Answer:
    """Compares generated tokens with the answer of a case.

    Args:
      tokens: [T, S].
      spoken: [T, S] bool, which cells are neither silent nor absent.
    """
    outputs = _streams_of_kind(model.streams, "output")
    rows, said = [], []  # the answer's rows and tokens, per output stream
    for s, answer in zip(outputs, case.answer):
        at = np.flatnonzero(spoken[:, s])
        if len(outputs) == model.streams.size:  # the stream also holds the question and the working
            at = at[at > case.end][-len(answer) :]
        elif mark:
            at = at[_end_of_mark(tokens[at, s].tolist(), mark, model.require_tokenizer()) :]
        rows.append(at - case.end)
        said.append(tokens[at, s].tolist())
    if not all(len(at) for at in rows):
        return Answer(said == case.answer, None, None)
    first, last = min(at[0] for at in rows), max(at[-1] for at in rows)
    return Answer(said == case.answer, int(first), int(last))


def _streams_of_kind(streams: StreamSpec, kind: str) -> list[int]:
    return [s for s in range(streams.size) if streams.kinds[s] == kind]


def _median(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.median(known or [np.nan]))
