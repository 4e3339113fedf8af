"""Generate a table and print it row by row.

Prints one line per row and one column per stream. Each input text is fed one
token per row, starting with the first row. A middle dot stands for silence.

A model that was trained on lanes stops at the end of its text, and the text is
printed as well, joined from its parts.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from msllm.cli.base import Parser, load_model, positive_int

if TYPE_CHECKING:
    from msllm.decode.script import DecodeOptions
    from msllm.streams import StreamSpec

EXAMPLES = """
msllm generate --checkpoint=runs/quickstart --input="user=take 4 add 3 ?" --rows=20
msllm generate --checkpoint=runs/quickstart --temperature=0.7 --top_p=output=0.9 --seed=1
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_checkpoint()
    parser.add_argument(
        "--input",
        metavar="STREAM=TEXT",
        action="append",
        default=[],
        help="Text of an input stream. Repeatable, for several streams. Default: inputs are "
        "silent.",
    )
    parser.add_argument(
        "--force",
        metavar="STREAM=TEXT",
        action="append",
        default=[],
        help="Text that a stream of any kind says, from the first row on. Repeatable.",
    )
    parser.add_argument(
        "--rows",
        metavar="N",
        type=positive_int,
        help="Number of rows to generate. Default: 64; of a model of lanes, those of the tables "
        "that it was trained on.",
    )
    define_sampling_flags(parser)


def define_sampling_flags(parser: Parser) -> None:
    """Declares the sampling flags, which `sampling_options` reads."""
    for name, text in (
        ("temperature", "Sampling temperature. Default: 0, which takes the most likely token."),
        ("top_k", "Sample from the X most likely tokens. Default: 0, which means all."),
        (
            "top_p",
            "Sample from the most likely tokens whose probabilities add up to X. Default: 1, "
            "which means all.",
        ),
        ("silence_penalty", "Subtract X from the logit of silence. Default: 0."),
    ):
        parser.add_argument(
            f"--{name}",
            metavar="[STREAM=]X",
            action="append",
            default=[],
            help=f"{text} STREAM=X sets one stream only. Repeatable.",
        )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="Seed for sampling.")


def sampling_options(flags: argparse.Namespace, streams: StreamSpec) -> DecodeOptions:
    """Returns the decoding options that the sampling flags describe.

    Raises UserError if a value is not a number or a stream does not exist.
    """
    from msllm.decode.arguments import parse_values
    from msllm.decode.script import DecodeOptions

    return DecodeOptions(
        temperature=parse_values("temperature", flags.temperature, streams, float, 0.0),
        top_k=parse_values("top_k", flags.top_k, streams, int, 0),
        top_p=parse_values("top_p", flags.top_p, streams, float, 1.0),
        silence_penalty=parse_values("silence_penalty", flags.silence_penalty, streams, float, 0.0),
        seed=flags.seed,
    )


def run(flags: argparse.Namespace) -> None:
    """Generates a table and prints it."""
    from msllm.decode.arguments import parse_inputs, parse_texts
    from msllm.decode.lanes import find_lanes
    from msllm.decode.script import default_window
    from msllm.view import cells
    from msllm.view.generation import print_generation

    model = load_model(flags)
    inputs = parse_inputs(flags.input, model.streams)
    forced = parse_texts("force", flags.force, model.streams)
    options = sampling_options(flags, model.streams)
    rows = flags.rows or (default_window(model) if find_lanes(model) else 64)
    print_generation(model, inputs, rows, options, cells.console(), forced)
