"""Runs a checkpoint and prints the table as it grows, one line a row and one column a stream.

    msllm generate --checkpoint=DIR --input "user=Hello there" --rows=40 --temperature=0.7 --top_p=output=0.9

Each input is fed one token a row, from the first row on. Silence is printed as a middle dot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import rich.console
import rich.text
from absl import flags, logging

from msllm import errors
from msllm.decode.engine import DecodeOptions, Engine
from msllm.errors import UserError
from msllm.streams import StreamSpec
from msllm.view import cells
from msllm.weights.load import LoadedModel, load

WIDTH = 14  # characters of a column


def parse_inputs(values: Sequence[str], streams: StreamSpec) -> dict[str, str]:
    """{stream: text} of "stream=text" arguments. Raises UserError for what is no input stream."""
    inputs: dict[str, str] = {}
    for value in values:
        name, separator, text = value.partition("=")
        if not separator:
            raise UserError(
                f"--input={value!r}: write it as stream=text, e.g. --input='{_inputs(streams)[0]}=Hello'"
            )
        if streams.kinds[streams.index(name)] != "input":
            raise UserError(
                f"--input={value!r}: {name} is generated; inputs are {', '.join(_inputs(streams))}"
            )
        inputs[name] = inputs.get(name, "") + text
    return inputs


def per_stream(flag: str, values: Sequence[str], streams: StreamSpec, kind: Callable, default):
    """One value per stream of "value" (all streams) and "stream=value" arguments. Raises UserError."""
    result = [default] * streams.size
    for value in values:
        name, separator, number = value.rpartition("=")
        try:
            parsed = kind(number)
        except ValueError as error:
            raise UserError(
                f"--{flag}={value}: {number!r} is no number; write a value, or stream=value"
            ) from error
        if separator:
            result[streams.index(name)] = parsed
        else:
            result = [parsed] * streams.size
    return tuple(result)


def run(
    model: LoadedModel,
    inputs: dict[str, str],
    rows: int,
    options: DecodeOptions,
    console: rich.console.Console,
) -> None:
    """Decodes `rows` rows of one table and prints each as soon as it is known; then the text of each stream."""
    if model.tokenizer is None:
        raise UserError(
            "the checkpoint has no tokenizer (a Hugging Face folder): use msllm.Engine with token ids"
        )
    if rows < 1:
        raise UserError(f"--rows={rows}: must be at least 1")
    session = Engine(model, window=max(rows, 2)).open(options)
    for name, text in inputs.items():
        session.feed(name, text)
    streams, widths = model.streams, [5] + [WIDTH] * model.streams.size
    cells.print_line(
        console, [rich.text.Text(name, style="bold") for name in ("row", *streams.names)], widths
    )
    for _ in range(rows):
        row = session.step()
        texts = [
            cells.cell(model.tokenizer, int(row.tokens[stream]), bool(row.present[stream]), kind)
            for stream, kind in enumerate(streams.kinds)
        ]
        cells.print_line(console, [rich.text.Text(str(row.index), style="dim"), *texts], widths)
    _, tokens, present = session.transcript()
    console.print()
    cells.print_texts(console, model.tokenizer, streams.names, tokens, present)


def define_options() -> None:
    """Defines the flags that say how rows are chosen."""
    flags.DEFINE_multi_string(
        "temperature", [], "A value, or stream=value; 0 (default): the most likely token."
    )
    flags.DEFINE_multi_string("top_k", [], "A value, or stream=value; 0 (default): all tokens.")
    flags.DEFINE_multi_string("top_p", [], "A value, or stream=value; 1 (default): all tokens.")
    flags.DEFINE_multi_string(
        "silence_penalty", [], "A value, or stream=value: subtracted from silence's logit."
    )
    flags.DEFINE_integer("seed", 0, "Seed of the sampling.")


def options(streams: StreamSpec) -> DecodeOptions:
    """What the flags of `define_options` say. Raises UserError."""
    flag = flags.FLAGS
    return DecodeOptions(
        temperature=per_stream("temperature", flag.temperature, streams, float, 0.0),
        top_k=per_stream("top_k", flag.top_k, streams, int, 0),
        top_p=per_stream("top_p", flag.top_p, streams, float, 1.0),
        silence_penalty=per_stream("silence_penalty", flag.silence_penalty, streams, float, 0.0),
        seed=flag.seed,
    )


def _inputs(streams: StreamSpec) -> list[str]:
    return [name for name, kind in zip(streams.names, streams.kinds) if kind == "input"] or [
        "(none)"
    ]


def main(_) -> None:
    """Generates what the flags say."""
    logging.set_verbosity(logging.WARNING)  # orbax reports everything that it opens
    flag = flags.FLAGS
    model = load(flag.checkpoint)
    streams = model.streams
    run(model, parse_inputs(flag.input, streams), flag.rows, options(streams), cells.console())


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "A checkpoint of msllm.", required=True)
    flags.DEFINE_multi_string(
        "input", [], "stream=text: what an input stream says; may be repeated."
    )
    flags.DEFINE_integer("rows", 64, "Rows to generate.")
    define_options()
    errors.run(main)
