"""Generate a table and print it as it grows.

It is printed one line a row and one column a stream. Each input is fed one
token a row, from the first row on. Silence is printed as a middle dot.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from msllm.cli.base import Parser, whole

if TYPE_CHECKING:
    from msllm.decode.script import DecodeOptions
    from msllm.streams import StreamSpec

EXAMPLES = """
msllm generate --checkpoint=runs/quickstart --input="user=hello" --rows=24
msllm generate --checkpoint=runs/quickstart --temperature=0.7 --top_p=output=0.9 --seed=1
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        required=True,
        help="A run, one of its checkpoints, or an imported model.",
    )
    parser.add_allow_code()
    parser.add_argument(
        "--input",
        metavar="STREAM=TEXT",
        action="append",
        default=[],
        help="What an input stream says. Repeat it for several streams.",
    )
    parser.add_argument(
        "--rows", metavar="N", type=whole(1), default=64, help="Number of rows to generate."
    )
    define_sampling_flags(parser)


def define_sampling_flags(parser: Parser) -> None:
    """Declares the flags that say how tokens are sampled; `sampling_options` reads them."""
    for name, text in (
        ("temperature", "Sampling temperature. 0 (the default): the most likely token."),
        ("top_k", "Sample from the k most likely tokens. 0 (the default): from all."),
        ("top_p", "Sample from the most likely tokens of total probability p. Default: 1, all."),
        ("silence_penalty", "Subtracted from the logit of silence. Default: 0."),
    ):
        parser.add_argument(
            f"--{name}",
            metavar="[STREAM=]X",
            action="append",
            default=[],
            help=f"{text} For all streams or for one; may be repeated.",
        )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="Seed of the sampling.")


def sampling_options(flags: argparse.Namespace, streams: StreamSpec) -> DecodeOptions:
    """The options that the flags of `define_sampling_flags` ask for. Raises UserError."""
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
    """Generates and prints."""
    from msllm.decode.arguments import parse_inputs
    from msllm.view import cells
    from msllm.view.generation import print_generation
    from msllm.weights.load import load

    model = load(flags.checkpoint, flags.allow_code)
    inputs = parse_inputs(flags.input, model.streams)
    options = sampling_options(flags, model.streams)
    print_generation(model, inputs, flags.rows, options, cells.console())
