"""Compute logits and log-probabilities of given tables.

The npz file of --tables holds these arrays:

tokens   [B, T, S] integers, token ids
present  [B, T, S] bool, whether a cell exists (default: all do)
segment  [B, T] integers, the packed example of each row; 0 is an empty row

The npz file of --out receives:

logits   [B, T, S, V] float32; those at (t, s) predict the cell (t + 1, s)
logprob  [B, T, S] float32, log-probability of the token at (t + 1, s) in nats;
         nan where there is no such cell
"""

from __future__ import annotations

import argparse

from msllm.cli.base import Parser, load_model, output_file

EXAMPLES = """
msllm score --checkpoint=runs/quickstart --tables=in.npz --out=out.npz
msllm score --checkpoint=SmolLM2-135M --tables=in.npz --out=out.npz --silence_id=0
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_checkpoint(hugging_face=True)
    parser.add_argument("--tables", metavar="FILE", required=True, help="npz file to read.")
    parser.add_argument(
        "--out", metavar="FILE", type=output_file, required=True, help="npz file to write."
    )
    parser.add_visibility()
    parser.add_argument(
        "--silence_id",
        metavar="TOKEN",
        type=int,
        help="Token id of silence. Default: that of the tokenizer.",
    )


def run(flags: argparse.Namespace) -> None:
    """Scores the tables and writes the result."""
    from msllm.evals.score import read_tables, score, write_scores

    tables = read_tables(flags.tables)
    write_scores(score(load_model(flags), tables, flags.silence_id), flags.out)
