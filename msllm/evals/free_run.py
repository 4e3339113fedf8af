"""Free runs of held-out examples: the inputs are given, and the model says everything else.

`intervene`, `ablate` and `monitor` start from them. All tables are decoded in batches of one shape,
so that decoding compiles once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from msllm.data.loader import spread
from msllm.data.tables import Table
from msllm.decode.engine import generate
from msllm.decode.script import DecodeOptions
from msllm.errors import UserError
from msllm.evals.exact_match import Case, forced_tables, judge, streams_case, streams_of_kind
from msllm.evals.held_out import examples as held_out_examples
from msllm.evals.held_out import open_split
from msllm.weights.load import LoadedModel

BATCH = 128  # tables that are decoded together


class Examples(NamedTuple):
    """Examples to run.

    Attributes:
      model: the model, with the delays of the data.
      tables: the examples.
      cases: the examples as tasks. All have an answer.
      rows: the rows of the longest run.
      end: a token that ends a run, once every output has said it; None: a run takes the rows of its
        case.
    """

    model: LoadedModel
    tables: list[Table]
    cases: list[Case]
    rows: int
    end: int | None = None


class FreeRun(NamedTuple):
    """What the model said.

    Attributes:
      tokens: [N, R, S] int32.
      present: [N, R, S] bool. Rows after the end of a run are absent.
      right: [N] bool, whether every answer of the example is exact.
    """

    tokens: np.ndarray
    present: np.ndarray
    right: np.ndarray


def read_examples(model: LoadedModel, data: str = "", examples: int = 500) -> Examples:
    """Reads held-out examples that have an answer.

    Args:
      model: a model with a tokenizer.
      data: the prepared directory. Empty: the one that the model was trained on.
      examples: the most examples to use, spread evenly over the split.

    Raises UserError if the data does not fit the model, has no inputs and outputs, or holds no
    answer.
    """
    loader = open_split(model, data)
    model = model.with_streams(delays=tuple(loader.manifest["streams"]["delays"]))
    wanted = set(spread(loader.manifest["splits"]["eval"]["examples"], examples))
    tables = [table for i, table in enumerate(held_out_examples(loader)) if i in wanted]
    return of_tables(model, tables)


def of_tables(model: LoadedModel, tables: Sequence[Table]) -> Examples:
    """The tables that have an answer, as examples. Raises UserError if there are none."""
    pairs = [(table, streams_case(table, model)) for table in tables]
    pairs = [(table, case) for table, case in pairs if any(t.has_answer for t in case.turns)]
    if not pairs:
        raise UserError(
            f"none of {len(tables)} examples has an input and an answer to it: prepare other data,"
            " --data=DIR"
        )
    kept, cases = zip(*pairs)
    return Examples(model, list(kept), list(cases), max(case.rows for case in cases))


def run(
    examples: Examples,
    change: Callable[[int, np.ndarray], None] | None = None,
    model: LoadedModel | None = None,
    options: DecodeOptions | None = None,
) -> FreeRun:
    """Runs all examples.

    Args:
      examples: from `read_examples`.
      change: change(number, forced) changes what is forced in an example, in place: [R, S] tokens,
        FREE where the model chooses. None: nothing but the inputs is forced.
      model: runs in place of that of the examples.
      options: of decoding. None: the most likely tokens.
    """
    model = model or examples.model
    count, size = len(examples.cases), min(BATCH, len(examples.cases))
    tokens: list[np.ndarray] = []
    present: list[np.ndarray] = []
    right: list[bool] = []
    for start in range(0, count, size):
        cases = examples.cases[start : start + size]
        forced = forced_tables(cases, model, examples.rows, size)
        if change:
            for number in range(len(cases)):
                change(start + number, forced[number])
        found = generate(model, examples.rows, options, forced=forced, batch=size)
        kept = found.present & _until_end(examples, cases, found.shown, found.present)
        tokens.extend(found.shown[: len(cases)])
        present.extend(kept[: len(cases)])
        for case, answers in zip(cases, judge(cases, found.shown, kept, model)):
            pairs = [pair for pair in zip(case.turns, answers) if pair[0].has_answer]
            right.append(all(answer.right and answer.first is not None for _, answer in pairs))
    return FreeRun(np.array(tokens), np.array(present), np.array(right))


def _until_end(
    examples: Examples, cases: Sequence[Case], tokens: np.ndarray, present: np.ndarray
) -> np.ndarray:
    """[B, R, 1] bool, which rows belong to the run of each case."""
    rows = np.zeros(len(tokens), int)
    rows[: len(cases)] = [case.rows for case in cases]
    if examples.end is not None:
        outputs = streams_of_kind(examples.model.streams, "output")
        ends = present[:, :, outputs] & (tokens[:, :, outputs] == examples.end)
        first = np.where(ends.any(1), ends.argmax(1), tokens.shape[1])  # [B, outputs]
        rows = np.minimum(rows, first.max(1) + 1)
    return (np.arange(tokens.shape[1]) < rows[:, None])[..., None]


def spoken(model: LoadedModel, found: FreeRun) -> np.ndarray:
    """[N, R, S] bool, which cells are neither absent nor silent."""
    return found.present & (found.tokens != model.require_tokenizer().silence_id)


def said_by_outputs(model: LoadedModel, found: FreeRun) -> list[list[list[int]]]:
    """The tokens of each output stream, without silence, by example."""
    outputs, spoke = streams_of_kind(model.streams, "output"), spoken(model, found)
    return [
        [table[said[:, s], s].tolist() for s in outputs] for table, said in zip(found.tokens, spoke)
    ]


def transcripts(examples: Examples, found: FreeRun) -> Iterator[dict[str, Any]]:
    """What each stream said, by example, as values for JSON.

    Yields: {"example": number, "right": whether the answer is exact, "streams": {name: text}}.
    """
    tokenizer, spoke = examples.model.require_tokenizer(), spoken(examples.model, found)
    for number in range(len(examples.tables)):
        texts = {
            name: tokenizer.decode(found.tokens[number, spoke[number, :, s], s])
            for s, name in enumerate(examples.model.streams.names)
        }
        yield {"example": number, "right": bool(found.right[number]), "streams": texts}


def as_json_lines(records: Iterator[Mapping[str, Any]]) -> str:
    """Transcripts as lines of JSON."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
