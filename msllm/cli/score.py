"""Compute logits and log-probabilities of given tables.

The file of --tables holds tokens [B, T, S] and optionally present [B, T, S]
bool (default: all cells exist) and segment [B, T] (packed example of each row;
0: an empty row). The file of --out gets logits [B, T, S, V] float32, which
predict the cell (t + 1, s), and logprob [B, T, S] float32, the log-probability
of that cell's token, or nan where there is no such cell.
"""

from __future__ import annotations

import argparse

from msllm.cli.base import Parser, Switch, output_file

EXAMPLES = """
msllm score --checkpoint=runs/quickstart --tables=in.npz --out=out.npz
msllm score --checkpoint=SmolLM2-135M --tables=in.npz --out=out.npz --silence_id=0
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    from msllm.streams import PRESETS

    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        required=True,
        help="A run, one of its checkpoints, or a Hugging Face folder.",
    )
    parser.add_allow_code()
    parser.add_argument(
        "--tables", metavar="FILE", required=True, help="The npz file with the tables."
    )
    parser.add_argument(
        "--out", metavar="FILE", type=output_file, required=True, help="The npz file to write."
    )
    parser.add_argument(
        "--visibility",
        choices=PRESETS,
        help="Which streams see each other. Default: as in the checkpoint.",
    )
    parser.add_argument(
        "--skip_silence",
        action=Switch,
        help="Hide silent cells from attention. Default: as in the checkpoint.",
    )
    parser.add_argument(
        "--silence_id",
        metavar="TOKEN",
        type=int,
        help="Id of the silence token. Default: the tokenizer's.",
    )


def run(flags: argparse.Namespace) -> None:
    """Scores the tables and writes the result."""
    from msllm.evals.score import read_tables, score, write_scores
    from msllm.weights.load import load

    tables = read_tables(flags.tables)
    model = load(flags.checkpoint, flags.allow_code)
    if flags.visibility:
        model = model.with_visibility(flags.visibility)
    if flags.skip_silence is not None:
        model = model.with_streams(skip_silence=flags.skip_silence)
    write_scores(score(model, tables, flags.silence_id), flags.out)
