"""The one exception that bad input raises, and the wrapper that command lines use to show it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class UserError(ValueError):
    """Bad input. The message names the value, the rule that it breaks and the remedy."""


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs `main(argv)` under absl; a `UserError` becomes one line on stderr and exit status 2."""
    from absl import app

    def guarded(argv: Sequence[str]) -> int:
        if len(argv) > 1:
            print(f"error: unexpected arguments {list(argv[1:])}: write options as --name=value", file=sys.stderr)
            return 2
        try:
            return main(argv) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    app.run(guarded)
