"""Convert weights between msllm and other formats.

from_hf    turn a Hugging Face folder into a checkpoint of msllm
from_gguf  turn a GGUF file into a checkpoint of msllm
to_hf      turn a checkpoint of msllm into a Hugging Face folder

score, generate and chat take an imported model as --checkpoint. train starts
from it with --config.init_from=OUT (docs/weights.md).
"""

from __future__ import annotations

import argparse

from msllm.cli.base import Parser, given_flags, positive_int

EXAMPLES = """
msllm convert from_hf SmolLM2-135M smollm2 --streams=user=input,output
msllm convert to_hf runs/quickstart quickstart_hf --dtype=bfloat16
"""

_IMPORT = ("streams", "visibility", "silence", "tokenizer", "vocab_multiple")
_EXPORT = ("dtype", "like")


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    from msllm.streams import PRESETS

    verbs = ["from_hf", "from_gguf", "to_hf"]
    parser.add_argument("verb", metavar="|".join(verbs), choices=verbs, help="Conversion.")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="Hugging Face folder (from_hf), GGUF file (from_gguf), or checkpoint (to_hf).",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        help="Folder to write. It must not exist, and it appears once it is complete.",
    )
    parser.add_argument(
        "--streams",
        metavar="LIST",
        help="from_*: names and kinds of the streams, e.g. "
        "user=input,thought=thought,output=output.",
    )
    parser.add_argument(
        "--visibility",
        choices=PRESETS,
        help="from_*: which streams see each other. docs/weights.md describes the default.",
    )
    parser.add_argument(
        "--silence",
        metavar="TOKEN",
        help="from_*: special token of the tokenizer to use as silence. Default: add <silence>.",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="from_*: tokenizer (.json or .model). Default: that of the source.",
    )
    parser.add_argument(
        "--vocab_multiple",
        metavar="N",
        type=positive_int,
        help="from_*: pad the vocabulary to a multiple of this. Default: 1.",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="to_hf: data type of the tensors. Default: that of the imported model if it loses no "
        "precision, else float32.",
    )
    parser.add_argument(
        "--like",
        metavar="DIR",
        help="to_hf: Hugging Face folder to copy all other settings from. Default: the folder that "
        "the model was imported from.",
    )


def run(flags: argparse.Namespace) -> None:
    """Converts the weights and prints a report."""
    takes = _EXPORT if flags.verb == "to_hf" else _IMPORT
    options = given_flags(flags, _IMPORT + _EXPORT, takes, flags.verb)

    import jax

    from msllm.weights import convert

    # The model may not fit into the memory of one accelerator.
    jax.config.update("jax_platforms", "cpu")
    print(getattr(convert, flags.verb)(flags.source, flags.out, **options))
    print(f"written: {flags.out}")
