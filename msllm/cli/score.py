"""Compute the log-probability of every cell of data, texts or tables.

Give one of --data, --text and --tables. Without --out, prints a line for each
cell that is predicted: its example, row, stream and token, its log-probability
in nats, and whether no other token is more likely.

The name of --out chooses the format:

*.jsonl  a JSON object for each cell: example, source, row, stream, token, id,
         logprob, likeliest
*.npz    tokens   [B, T, S], present [B, T, S], segment [B, T]: the tables
         logprob  [B, T, S] float32; the value at (t, s) is that of the token
                  at (t + 1, s); nan where there is no such cell
         streams  [S], the names of the streams
         logits   [B, T, S, V] float32, with --logits or --tables; those at
                  (t, s) predict the cell (t + 1, s)

The npz file of --tables holds these arrays:

tokens   [B, T, S] integers, token ids
present  [B, T, S] bool, whether a cell exists (default: all do)
segment  [B, T] integers, the packed example of each row; 0 is an empty row
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from msllm.cli.base import Parser, Switch, load_model, output_file, positive_int
from msllm.errors import UserError
from msllm.runtime.files import write_atomically

if TYPE_CHECKING:
    from msllm.evals.score import Examples
    from msllm.weights.load import LoadedModel

EXAMPLES_READ = 500  # of prepared data, at most
EXAMPLES = """
msllm score --checkpoint=runs/quickstart --data=data/quickstart --examples=2
msllm score --checkpoint=runs/mine --text=chats.jsonl --out=scores.jsonl
msllm score --checkpoint=SmolLM2-135M --tables=in.npz --out=out.npz --silence_id=0
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_checkpoint(hugging_face=True)
    parser.add_argument(
        "--data", metavar="DIR", help="Directory that msllm prepare wrote, to score its examples."
    )
    parser.add_argument(
        "--split", choices=["train", "eval"], help="Split of --data to read. Default: eval."
    )
    parser.add_argument(
        "--examples",
        metavar="N",
        type=positive_int,
        help="Maximum number of examples of --data, spread evenly over all of them. "
        f"Default: {EXAMPLES_READ}.",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="Text, or records of any form that msllm prepare reads. They become tables as the "
        "data of the model did (docs/getting_started.md).",
    )
    parser.add_argument("--tables", metavar="FILE", help="npz file of tables to score.")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=output_file,
        help="File to write, *.jsonl or *.npz. Default: print the cells.",
    )
    parser.add_argument("--force", action=Switch, default=False, help="Replace --out if it exists.")
    parser.add_argument(
        "--logits",
        action=Switch,
        help="Also write all logits to an npz file. Default: with --tables only.",
    )
    parser.add_visibility()
    parser.add_argument(
        "--silence_id",
        metavar="TOKEN",
        type=int,
        help="Token id of silence. Default: that of the tokenizer.",
    )


def run(flags: argparse.Namespace) -> None:
    """Scores the input and writes or prints the result."""
    from msllm.evals import score
    from msllm.view import scores

    suffix = _check(flags)
    model = load_model(flags)
    silence, names = model.silence_token(flags.silence_id), model.streams.names
    examples = _read(flags, model)
    if suffix == ".npz":
        keeps_logits = bool(flags.tables) if flags.logits is None else flags.logits
        compute = score.score if keeps_logits else score.likelihood
        result = compute(model, examples.tables, silence)
        with _existing(flags.out):
            score.write_scores(result, flags.out, examples.tables, names, flags.force)
        print(f"wrote {flags.out}")
        return
    found = score.likelihood(model, examples.tables, silence)
    cells = list(scores.scored_cells(*examples, *found, names, model.tokenizer))
    if flags.out:
        with _existing(flags.out):
            write_atomically(flags.out, scores.as_json_lines(cells), overwrite=flags.force)
    else:
        print("\n".join(scores.as_table(cells)))
    print("\n".join(scores.summary(cells, names, silence)))
    if flags.out:
        print(f"wrote {flags.out}")


def _check(flags: argparse.Namespace) -> str:
    """Checks the flags before the model is loaded, and returns the suffix of the output file."""
    given = [name for name in ("data", "text", "tables") if getattr(flags, name) is not None]
    if len(given) != 1:
        what = " and ".join(f"--{name}" for name in given) or "none"
        raise UserError(f"give one of --data, --text and --tables: {what} is given")
    for name in ("split", "examples"):
        if getattr(flags, name) is not None and flags.data is None:
            raise UserError(f"--{name} needs --data")
    suffix = flags.out.suffix if flags.out else ""
    if flags.out and suffix not in (".npz", ".jsonl"):
        raise UserError(f"--out={flags.out}: the name must end in .jsonl or .npz")
    if flags.logits and suffix != ".npz":
        raise UserError("--logits needs an npz file: --out=FILE.npz")
    if flags.out and flags.out.is_file() and not flags.force:
        raise UserError(_exists(flags.out))
    return suffix


def _read(flags: argparse.Namespace, model: LoadedModel) -> Examples:
    from msllm.evals import score

    if flags.data is not None:
        split, count = flags.split or "eval", flags.examples or EXAMPLES_READ
        return score.read_data(model, flags.data, split, count)
    if flags.text is not None:
        return score.read_text(model, flags.text, flags.allow_code)
    return score.read_tables(flags.tables, model)


@contextlib.contextmanager
def _existing(path: pathlib.Path) -> Iterator[None]:
    """Turns the error for a file that exists into a message."""
    try:
        yield
    except FileExistsError:
        raise UserError(_exists(path)) from None


def _exists(path: pathlib.Path) -> str:
    return f"--out={path}: the file exists; choose another name, or replace it with --force"
