"""Convert weights between msllm and other formats.

from_hf and from_gguf make a checkpoint of msllm from a Hugging Face folder or a
GGUF file, to train, run or score. to_hf writes a checkpoint as a Hugging Face
folder (docs/weights.md).
"""

from __future__ import annotations

import argparse

from msllm.cli.base import Parser, given_flags, whole

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
    parser.add_argument("verb", metavar="|".join(verbs), choices=verbs, help="What to do.")
    parser.add_argument(
        "source", metavar="SOURCE", help="A Hugging Face folder, a GGUF file, or a checkpoint."
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        help="The folder to write. It appears when it is complete; nothing is overwritten.",
    )
    parser.add_argument(
        "--streams",
        metavar="LIST",
        help="from_*: the streams, NAME=KIND,..., e.g. user=input,thought=thought,output=output.",
    )
    parser.add_argument(
        "--visibility",
        choices=PRESETS,
        help="from_*: which streams see each other. The default is in docs/weights.md.",
    )
    parser.add_argument(
        "--silence",
        metavar="TOKEN",
        help="from_*: a special token of the tokenizer that means silence. Default: <silence>, "
        "which is added.",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="from_*: a tokenizer (.json or .model) in place of the source's.",
    )
    parser.add_argument(
        "--vocab_multiple",
        metavar="N",
        type=whole(1),
        help="from_*: pad the vocabulary to a multiple of this. Default: 1.",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="to_hf: type of the tensors. Default: the imported model's if that is exact, else "
        "float32.",
    )
    parser.add_argument(
        "--like",
        metavar="DIR",
        help="to_hf: a Hugging Face folder whose other settings are taken over. Default: the one "
        "that the model was imported from.",
    )


def run(flags: argparse.Namespace) -> None:
    """Converts and prints the report."""
    takes = _EXPORT if flags.verb == "to_hf" else _IMPORT
    options = given_flags(flags, _IMPORT + _EXPORT, takes, flags.verb)

    import jax

    from msllm.weights import convert

    jax.config.update("jax_platforms", "cpu")  # a model may be larger than one accelerator
    print(getattr(convert, flags.verb)(flags.source, flags.out, **options))
    print(f"written: {flags.out}")
