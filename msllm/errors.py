"""The one exception that bad input raises, and the wrapper that command lines use to show it."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Sequence


class UserError(ValueError):
    """Bad input. The message names the value, the rule that it breaks and the remedy."""


class RunError(RuntimeError):
    """A run that cannot go on, though its input is good. The message says what happened and how to continue."""


def run(main: Callable[[Sequence[str]], int | None], positional: int = 0) -> None:
    """Runs `main(argv)` under absl; a `UserError` becomes one line on stderr and exit status 2, a `RunError` status 1.

    `positional`: arguments without a name that `main` takes.
    """
    from absl import app

    def guarded(argv: Sequence[str]) -> int:
        # What msllm has to say is shown as it is; of the libraries below it, warnings only.
        logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
        logging.getLogger("msllm").setLevel(logging.INFO)
        try:
            if len(argv) > 1 + positional:
                raise UserError(
                    f"unexpected arguments {list(argv[1 + positional :])}: write options as --name=value"
                )
            return main(argv) or 0
        except (UserError, RunError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2 if isinstance(error, UserError) else 1

    def parse(argv: Sequence[str]) -> Sequence[str]:
        try:
            return app.parse_flags_with_usage(argv)
        except (AttributeError, ImportError, OSError, TypeError, UserError, ValueError) as error:
            # A config file that does not load, or --config.KEY=VALUE with a key that does not exist.
            close = re.search(r'Did you mean "(.*?)" instead of "(.*?)"', str(error))
            what = (
                f"unknown key {close[2]}: did you mean {close[1]}?"
                if close
                else f"{error}: no such setting or file"
            )
            print(f"error: --config: {what} (msllm/config.py lists all settings)", file=sys.stderr)
            sys.exit(2)

    app.run(guarded, flags_parser=parse)
