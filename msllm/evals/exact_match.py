"""Held-out examples, answered: how often the output streams say exactly what they should, and how soon.

The input streams of each held-out example are given row by row; the model generates all others. An example counts as
right when the tokens of every output stream, silence left out, are those of the example; with a mark, what they say
after it, where a worked answer comes before. The number of rows is counted from the last token of the input to
the first and to the last token of the answer, over the examples that are right; to the first, over all answers, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from msllm.config import DataConfig, MixtureConfig
from msllm.data.dictation import QUESTION_END, expected_answer, question_end
from msllm.data.loader import Loader, spread
from msllm.data.records import read_manifest
from msllm.data.tables import Table, unpack
from msllm.decode.engine import FREE, generate
from msllm.errors import UserError
from msllm.weights.load import LoadedModel

BATCH = 128  # examples decoded together
SLACK = 8  # rows that an answer may come later than in the example


class Case(NamedTuple):
    """One held-out example as a task."""

    prompt: np.ndarray  # [T, S] int32: the given tokens, FREE where the model chooses
    end: int  # row of the input's last token
    answer: list[list[int]]  # per output stream: its tokens without silence
    one_stream_rows: (
        int  # rows from the end of the question to the answer if it were told in one stream
    )


class Result(NamedTuple):
    """How an example was answered."""

    right: bool
    first: int | None  # rows from the end of the input to the answer's first token; None: no answer
    last: int | None  # to its last


def open_data(loaded: LoadedModel, data: str = "", split: str = "eval") -> Loader:
    """A split of prepared data for a checkpoint; `data`: empty: what it was trained on. Raises UserError.

    Rows and delays are the data's, which parameters know nothing of.
    """
    if loaded.tokenizer is None:
        raise UserError(
            f"{loaded.path or 'the model'} has no tokenizer: import it with --tokenizer=FILE"
            " (docs/weights.md)"
        )
    trained = loaded.run_config.data if loaded.run_config else DataConfig()
    if trained.mixture.dirs and not data:
        sources = ", ".join(trained.mixture.dirs)
        raise UserError(
            f"the checkpoint was trained on a mixture of {sources}: choose one, --data=DIR"
        )
    if not (folder := data or trained.dir):
        raise UserError(
            "the checkpoint was not trained, so it has no data of its own: prepare some, and give --data=DIR"
        )
    manifest = read_manifest(folder)
    tables = manifest["splits"][split]["tables"] if split in manifest["splits"] else 0
    config = dataclasses.replace(
        trained,
        dir=folder,
        rows=manifest["rows"],
        batch_size=max(1, min(trained.batch_size, tables)),  # no batch that is mostly filler
        mixture=MixtureConfig(),
    )
    loader = Loader(
        config,
        split,
        dataclasses.replace(loaded.streams, delays=tuple(manifest["streams"]["delays"])),
    )
    if loader.tokenizer.hash != loaded.tokenizer.hash:
        raise UserError(
            f"{config.dir} was prepared with another tokenizer than the checkpoint's: give its data, --data=DIR"
        )
    return loader


def evaluate(
    loaded: LoadedModel, data: str = "", examples: int = 500, after: str = ""
) -> dict[str, float | int]:
    """Exact match and rows to the answer on held-out examples.

    Args:
      data: the prepared directory; empty: the one that the checkpoint was trained on. examples: at most so many.
      after: the answer is what an output says after the last such text; empty: all that it says.

    Returns: examples, exact_match, answered (the share in which all outputs gave some answer), and medians rows_to_first
      and rows_to_last token of the answer where it is right, answered_rows: rows to the first token of any answer, and
      one_stream_rows: the same as rows_to_first if each question were read, thought about and answered in one stream.
      A median of nothing is nan.
    """
    loader = open_data(loaded, data)
    delays = tuple(loader.manifest["streams"]["delays"])
    loaded = dataclasses.replace(loaded, streams=dataclasses.replace(loaded.streams, delays=delays))
    wanted, number, tables = (
        set(spread(loader.manifest["splits"]["eval"]["examples"], examples)),
        0,
        [],
    )
    for step in range(loader.num_batches):
        for table in unpack(loader.batch(step)):
            if number in wanted:
                tables.append(table)
            number += 1
    one_stream = _converter_of(loaded) == "dictation_single"
    make_case = _single_case if one_stream else streams_case
    cases = [make_case(table, loaded) for table in tables]
    if after:
        cases = [_only_after(case, after, loaded.tokenizer) for case in cases]
    # All batches of one shape: decoding compiles once.
    rows, size = max(len(case.prompt) for case in cases) + SLACK, min(BATCH, len(cases))
    parts = [cases[i : i + size] for i in range(0, len(cases), size)]
    results = [result for part in parts for result in _answer(part, loaded, rows, size, after)]
    answered = [r for r in results if r.first is not None]
    right = [r for r in answered if r.right]

    def median(values):
        return float(np.median(list(values) or [np.nan]))

    return {
        "examples": len(cases),
        "exact_match": len(right) / len(cases),
        "answered": len(answered) / len(cases),
        "rows_to_first": median(r.first for r in right),
        "rows_to_last": median(r.last for r in right),
        "answered_rows": median(r.first for r in answered),
        "one_stream_rows": median(case.one_stream_rows for case in cases),
    }


def _converter_of(loaded: LoadedModel) -> str:
    """The converter of the data that the model was trained on; empty if it was not trained here."""
    return loaded.run_config.data.converter if loaded.run_config else ""


def streams_case(table: Table, loaded: LoadedModel) -> Case:
    """A table as a task: inputs are given, the rest is the model's. Raises UserError without an input or an output."""
    streams, silence = loaded.streams, loaded.tokenizer.silence_id

    def of_kind(kind):
        return [s for s in range(streams.size) if streams.kinds[s] == kind]

    spoken = table.present & (table.tokens != silence)
    inputs = of_kind("input")
    if not inputs or not of_kind("output"):
        raise UserError(
            f"streams {', '.join(streams.names)} have kinds {', '.join(streams.kinds)}: exact match needs an input and an "
            "output; for a single stream see `msllm score`"
        )
    prompt = np.full(table.tokens.shape, FREE)
    prompt[:, inputs] = np.where(spoken[:, inputs], table.tokens[:, inputs], silence)
    answer = [table.tokens[spoken[:, s], s].tolist() for s in of_kind("output")]
    heard = spoken[:, inputs].any(1)
    return Case(
        prompt, int(np.flatnonzero(heard)[-1]), answer, int(spoken[:, of_kind("thought")].sum()) + 1
    )


def _single_case(table: Table, loaded: LoadedModel) -> Case:
    """The one-stream layout of a dictation: question, thoughts, answer; the answer is what follows the last thought."""
    text, tokenizer = table.tokens[:, 0], loaded.tokenizer
    end = question_end(text, tokenizer.encode(QUESTION_END)[0])
    said = text[text != tokenizer.silence_id]
    length = len(_dictation_answer(said[: end + 1], tokenizer))
    prompt = np.where(np.arange(len(text)) <= end, text, FREE)[:, None]
    return Case(prompt, end, [said[-length:].tolist()], len(said) - length - end)


def _dictation_answer(question: Sequence[int], tokenizer) -> list[int]:
    return tokenizer.encode(" ".join(expected_answer(tokenizer.decode(question).split())))


def _only_after(case: Case, mark: str, tokenizer) -> Case:
    """The case with what follows the mark as its answer. Raises UserError if nothing does."""
    answer = [tokens[_end_of_mark(tokens, mark, tokenizer) :] for tokens in case.answer]
    if not all(answer):
        texts = [tokenizer.decode(tokens) for tokens in case.answer]
        raise UserError(
            f"--after={mark}: nothing comes after it in the example's output {texts}: correct the mark"
        )
    worked = sum(map(len, case.answer)) - sum(map(len, answer))
    return case._replace(answer=answer, one_stream_rows=case.one_stream_rows + worked)


def _end_of_mark(tokens: Sequence[int], mark: str, tokenizer) -> int:
    """The place after the last mark in a text, which may be several tokens or part of one; the text's end if there is
    none."""

    def ends_after(start):
        return next(
            (
                end
                for end in range(start + 1, len(tokens) + 1)
                if mark in tokenizer.decode(tokens[start:end])
            ),
            None,
        )

    return next(
        (end for start in reversed(range(len(tokens))) if (end := ends_after(start))), len(tokens)
    )


def _answer(
    cases: Sequence[Case], loaded: LoadedModel, rows: int, batch: int, mark: str = ""
) -> list[Result]:
    """What the model answers, case by case."""
    streams, tokenizer = loaded.streams, loaded.tokenizer
    forced = np.full((batch, rows, streams.size), FREE)
    inputs = [s for s in range(streams.size) if streams.kinds[s] == "input"]
    forced[:, :, inputs] = tokenizer.silence_id
    for b, case in enumerate(cases):
        forced[b, : len(case.prompt)] = case.prompt
    # Nothing predicts a first row: what is not given there is silence, as in the examples.
    forced[:, 0] = np.where(forced[:, 0] == FREE, tokenizer.silence_id, forced[:, 0])
    made = generate(loaded, rows, forced=forced, batch=batch)
    spoken = made.present & (made.shown != tokenizer.silence_id)
    outputs = [s for s in range(streams.size) if streams.kinds[s] == "output"]
    results = []
    for b, case in enumerate(cases):  # the rest of the batch is filler
        where, said = [], []
        for s, answer in zip(outputs, case.answer):
            at = np.flatnonzero(spoken[b, :, s])
            if len(outputs) == streams.size:  # a stream that also holds the question
                at = at[at > case.end][-len(answer) :]
            elif mark:
                at = at[_end_of_mark(made.shown[b, at, s].tolist(), mark, tokenizer) :]
            where.append(at - case.end)
            said.append(made.shown[b, at, s].tolist())
        first = int(min(at[0] for at in where)) if all(len(at) for at in where) else None
        last = int(max(at[-1] for at in where)) if first is not None else None
        results.append(Result(said == case.answer, first, last))
    return results


def describe(result: dict[str, float | int]) -> str:
    """The result of `evaluate` as lines of text."""
    return "\n".join(
        [
            f"{result['exact_match']:.1%} of {result['examples']} held-out examples answered exactly",
            f"rows from the end of the question to the answer: first token "
            f"{result['rows_to_first']:g}, last token {result['rows_to_last']:g} (first token in "
            f"one stream, after reading and thinking: {result['one_stream_rows']:g})",
            f"{result['answered']:.1%} answered at all, right or wrong: first token after "
            f"{result['answered_rows']:g} rows",
        ]
    )
