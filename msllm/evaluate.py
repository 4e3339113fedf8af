"""Held-out examples, answered: how often the output streams say exactly what they should, and how soon.

    python -m msllm.evaluate --checkpoint=runs/quickstart [--data=DIR] [--examples=500] [--json=FILE]

The input streams of each held-out example are given row by row; the model generates all others. An example counts as
right when the tokens of every output stream, silence left out, are those of the example. The number of rows is counted
from the last token of the input to the first and to the last token of the answer, over the examples that are right.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from msllm.checkpoint import Loaded, load_model
from msllm.config import MixtureConfig
from msllm.data.dictation import QUESTION_END, expected_answer, question_end
from msllm.data.loader import Loader
from msllm.data.tables import Table, unpack
from msllm.decode import FREE, generate
from msllm.errors import UserError
from msllm.load import from_parameters

BATCH = 128  # examples decoded together
SLACK = 8  # rows that an answer may come later than in the example


class Case(NamedTuple):
    """One held-out example as a task."""

    prompt: np.ndarray  # [T, S] int32: the given tokens, FREE where the model chooses
    end: int  # row of the input's last token
    answer: list[list[int]]  # per output stream: its tokens without silence
    one_stream_rows: int  # rows from the end of the question to the answer if it were told in one stream


def open_data(loaded: Loaded, data: str = "", split: str = "eval") -> Loader:
    """A split of prepared data for a checkpoint; `data`: empty: what it was trained on. Raises UserError."""
    trained = loaded.config.data
    if trained.mixture.dirs and not data:
        sources = ", ".join(trained.mixture.dirs)
        raise UserError(f"the checkpoint was trained on a mixture of {sources}: choose one, --data=DIR")
    config = dataclasses.replace(trained, dir=data or trained.dir, mixture=MixtureConfig())
    loader = Loader(config, split, loaded.streams)
    if loader.tokenizer.hash != loaded.tokenizer.hash:
        raise UserError(f"{config.dir} was prepared with another tokenizer than the checkpoint's: give its data, --data=DIR")
    return loader


def evaluate(loaded: Loaded, data: str = "", examples: int = 500) -> dict[str, float | int]:
    """Exact match and rows to the answer on held-out examples.

    Args:
      data: the prepared directory; empty: the one that the checkpoint was trained on. examples: at most so many.

    Returns: examples, exact_match, and medians rows_to_first and rows_to_last token of the answer, and
      one_stream_rows: the same as rows_to_first if each question were read, thought about and answered in one stream.
    """
    loader = open_data(loaded, data)
    tables = []
    for step in range(loader.num_batches):
        tables += unpack(loader.batch(step))
        if len(tables) >= examples:
            break
    make_case = _single_case if loaded.config.data.converter == "dictation_single" else streams_case
    cases = [make_case(table, loaded) for table in tables[:examples]]
    # All batches of one shape: decoding compiles once.
    rows = max(len(case.prompt) for case in cases) + SLACK
    results = [r for i in range(0, len(cases), BATCH) for r in _answer(cases[i : i + BATCH], loaded, rows, BATCH)]
    right = [(first, last) for ok, first, last in results if ok]
    median = lambda values: float(np.median(list(values))) if right else float("nan")
    return {
        "examples": len(cases),
        "exact_match": len(right) / len(cases),
        "rows_to_first": median(first for first, _ in right),
        "rows_to_last": median(last for _, last in right),
        "one_stream_rows": float(np.median([case.one_stream_rows for case in cases])),
    }


def streams_case(table: Table, loaded: Loaded) -> Case:
    """A table as a task: inputs are given, the rest is the model's. Raises UserError without an input or an output."""
    streams, silence = loaded.streams, loaded.tokenizer.silence_id
    of_kind = lambda kind: [s for s in range(streams.size) if streams.kinds[s] == kind]
    spoken = table.present & (table.tokens != silence)
    inputs = of_kind("input")
    if not inputs or not of_kind("output"):
        raise UserError(
            f"streams {', '.join(streams.names)} have kinds {', '.join(streams.kinds)}: exact match needs an input and an "
            "output; for a single stream see `msllm.score`"
        )
    prompt = np.full(table.tokens.shape, FREE)
    prompt[:, inputs] = np.where(spoken[:, inputs], table.tokens[:, inputs], silence)
    answer = [table.tokens[spoken[:, s], s].tolist() for s in of_kind("output")]
    heard = spoken[:, inputs].any(1)
    return Case(prompt, int(np.flatnonzero(heard)[-1]), answer, int(spoken[:, of_kind("thought")].sum()) + 1)


def _single_case(table: Table, loaded: Loaded) -> Case:
    """The one-stream layout of a dictation: question, thoughts, answer; the answer is what follows the last thought."""
    text, tokenizer = table.tokens[:, 0], loaded.tokenizer
    end = question_end(text, tokenizer.encode(QUESTION_END)[0])
    said = text[text != tokenizer.silence_id]
    length = len(_dictation_answer(said[: end + 1], tokenizer))
    prompt = np.where(np.arange(len(text)) <= end, text, FREE)[:, None]
    return Case(prompt, end, [said[-length:].tolist()], len(said) - length - end)


def _dictation_answer(question: Sequence[int], tokenizer) -> list[int]:
    return tokenizer.encode(" ".join(expected_answer(tokenizer.decode(question).split())))


def _answer(cases: Sequence[Case], loaded: Loaded, rows: int, batch: int) -> list[tuple[bool, int, int]]:
    """Per case: right or not, and the rows from the end of the input to the answer's first and last token."""
    streams, silence = loaded.streams, loaded.tokenizer.silence_id
    forced = np.full((batch, rows, streams.size), FREE)
    inputs = [s for s in range(streams.size) if streams.kinds[s] == "input"]
    forced[:, :, inputs] = silence
    for b, case in enumerate(cases):
        forced[b, : len(case.prompt)] = case.prompt
    # Nothing predicts a first row: what is not given there is silence, as in the examples.
    forced[:, 0] = np.where(forced[:, 0] == FREE, silence, forced[:, 0])
    model = from_parameters(loaded.config.model, streams, loaded.parameters, loaded.tokenizer)
    tokens = generate(model, rows, forced=forced, batch=batch).shown
    outputs = [s for s in range(streams.size) if streams.kinds[s] == "output"]
    results = []
    for b, case in enumerate(cases):  # the rest of the batch is filler
        after = case.end + 1 if len(outputs) == streams.size else 0  # a stream that also holds the question
        columns = [tokens[b, after:, s] for s in outputs]
        said = [column[column != silence].tolist() for column in columns]
        if after:
            said = [words[-len(answer) :] for words, answer in zip(said, case.answer)]
        spoken_rows = np.flatnonzero(np.any([column != silence for column in columns], axis=0)) + after - case.end
        answer_rows = spoken_rows[-max(map(len, case.answer)) :]
        first, last = (int(answer_rows[0]), int(answer_rows[-1])) if len(answer_rows) else (0, 0)
        results.append((said == case.answer, first, last))
    return results


def _main() -> None:
    from absl import flags

    from msllm.errors import run

    checkpoint = flags.DEFINE_string("checkpoint", None, "A workdir of msllm.train, or one of its checkpoints.")
    data = flags.DEFINE_string("data", "", "Prepared data; the default is what the checkpoint was trained on.")
    examples = flags.DEFINE_integer("examples", 500, "At most so many held-out examples.")
    out = flags.DEFINE_string("json", "", "Also write the result to this file.")
    flags.mark_flag_as_required("checkpoint")

    def main(_):
        loaded = load_model(checkpoint.value)
        result = evaluate(loaded, data.value, examples.value)
        print(f"step {loaded.step}: {result['exact_match']:.1%} of {result['examples']} held-out examples answered exactly")
        print(
            f"rows from the end of the question to the answer: first token {result['rows_to_first']:g}, "
            f"last token {result['rows_to_last']:g} (first token in one stream, after reading and thinking: "
            f"{result['one_stream_rows']:g})"
        )
        if out.value:
            pathlib.Path(out.value).write_text(json.dumps(result) + "\n")

    run(main)


if __name__ == "__main__":
    _main()
