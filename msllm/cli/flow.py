"""Show which streams can influence which, how fast and by how many bits.

Follows all paths between the streams of a config or a checkpoint and prints a
table: a row per source, a column per reader. A cell gives the medium and the
fewest rows from a token of the source to logits of the reader that depend on
it. `latent`: the reader sees what the source's hidden states hold. Bits: it
sees at most that many per row, through tokens. `never`: nothing that the source
says or holds changes the reader's logits by one bit (docs/flow.md).
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from msllm.cli.base import Parser, load_model, output_file, write_json, write_text
from msllm.errors import UserError

if TYPE_CHECKING:
    from msllm.config import Config

EXAMPLES = """
msllm flow --config=configs/quickstart.py
msllm flow --config=configs/quickstart.py --config.streams.visibility_medium=tokens
msllm flow --checkpoint=runs/quickstart --html=flow.html
"""


def define_flags(parser: Parser) -> None:
    """Declares the flags of the command."""
    parser.add_config(required=False)
    parser.add_checkpoint(required=False, hugging_face=True)
    parser.add_argument(
        "--html", metavar="FILE", type=output_file, help="Also write a page with a picture."
    )
    parser.add_json()


def run(flags: argparse.Namespace) -> None:
    """Prints the table and writes the files."""
    if (flags.config is None) == (flags.checkpoint is None):
        raise UserError("give either --config=FILE or --checkpoint=DIR (see msllm flow --help)")
    if flags.config is not None and flags.threads is not None:
        raise UserError(
            "--threads is for a checkpoint: with --config, change --config.streams.names"
        )

    from msllm.flow import as_json
    from msllm.streams import StreamSpec, resolve_visibility
    from msllm.view import flow

    if flags.config is None:
        model = load_model(flags)
        title, spec, vocab_size = flags.checkpoint, model.streams, model.config.vocab_size
    else:
        title, vocab_size = flags.config_file, _vocab_size(flags.config)
        spec = StreamSpec.from_config(resolve_visibility(flags.config).streams)
    print(flow.text(spec, vocab_size))
    write_json(flags.json, as_json(spec, vocab_size))
    write_text(flags.html, flow.page(os.path.basename(title.rstrip("/")), spec, vocab_size))


def _vocab_size(config: Config) -> int:
    """The number of tokens of a run; 0 if its data is not prepared and no setting gives it."""
    from msllm.data.mixture import by_source
    from msllm.data.records import MANIFEST, read_manifest

    found = config.model.vocab_size
    for part in by_source(config.data).values():
        if part.dir and os.path.isfile(os.path.join(part.dir, MANIFEST)):
            return max(found, read_manifest(part.dir)["tokenizer"]["vocab_size"])
    trained = 0 if config.data.tokenizer.path else config.data.tokenizer.vocab_size
    return max(found, trained)
