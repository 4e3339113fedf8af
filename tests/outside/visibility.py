"""A custom visibility: no other stream sees a thought, and inputs see only themselves."""

from collections.abc import Sequence


def private_thoughts(names: Sequence[str], kinds: Sequence[str]) -> list[list[int | str]]:
    """Returns the lag matrix. Rows are readers, columns are sources."""

    def lag(reader: int, source: int) -> int | str:
        if reader == source:
            return 1
        if kinds[reader] == "input" or kinds[source] == "thought":
            return "never"
        return 1

    streams = range(len(names))
    return [[lag(reader, source) for source in streams] for reader in streams]
