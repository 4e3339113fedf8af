"""Groups of interchangeable streams, and how settings refer to their members (docs/groups.md).

An entry of `config.streams.names` is the name of a stream, or a group such as "thread * 8". The
members of the group are the streams thread.0, ..., thread.7. They share the parameters of their
entry. `expand` turns entries into streams, and `Roster.pairs` reads the references of
`config.streams.lags` and `config.streams.mail`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from msllm.errors import UserError

MAX_MEMBERS = 1024
_GROUP = re.compile(r"(.*\S)\s*\*\s*([0-9]+)")
# After "@": the reader's index in its group, with a shift or a flipped bit, or a fixed index.
_INDEX = re.compile(r"(i)(?:([+^-])([0-9]+))?|([0-9]+)")
_FORMS = "write GROUP@i, GROUP@i+1, GROUP@i-1, GROUP@i^1 (i: the reader's index) or GROUP@0"

_Value = TypeVar("_Value")


class Group(NamedTuple):
    """Streams that follow each other and share their parameters."""

    name: str
    start: int  # the first member's stream
    size: int  # number of members

    @property
    def members(self) -> range:
        """The streams of the group."""
        return range(self.start, self.start + self.size)


class Roster(NamedTuple):
    """The streams of `config.streams.names`.

    Attributes:
      names: all streams.
      groups: the groups among them.
    """

    names: tuple[str, ...]
    groups: tuple[Group, ...] = ()

    @property
    def classes(self) -> tuple[int, ...]:
        """[S], the entry of each stream: streams of one class share their parameters."""
        first = {stream for group in self.groups for stream in group.members[1:]}
        classes, last = [], -1
        for stream in range(len(self.names)):
            last += stream not in first
            classes.append(last)
        return tuple(classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes: of the group, or of the only stream."""
        names = list(self.names)
        for group in reversed(self.groups):
            names[group.start : group.start + group.size] = [group.name]
        return tuple(names)

    @property
    def indices(self) -> tuple[int, ...]:
        """[S], the index of each stream in its group; -1 for streams that are in none."""
        indices = [-1] * len(self.names)
        for group in self.groups:
            indices[group.start : group.start + group.size] = range(group.size)
        return tuple(indices)

    def find_group(self, name: str) -> Group | None:
        """The group called `name`, or None."""
        return next((group for group in self.groups if group.name == name), None)

    def group_of(self, stream: int) -> Group | None:
        """The group of a stream, or None."""
        return next((group for group in self.groups if stream in group.members), None)

    def members(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names, in which the name of a group stands for all its members."""
        found: list[str] = []
        for name in names:
            group = None if name in self.names else self.find_group(name)
            found += [self.names[s] for s in group.members] if group else [name]
        return tuple(found)

    def per_stream(self, values: Sequence[_Value]) -> tuple[_Value, ...]:
        """The value of each stream, from one value per entry."""
        return tuple(values[entry] for entry in self.classes)

    def describe(self) -> str:
        """The streams and groups, for messages."""
        streams = f"the streams are {', '.join(self.names)}"
        groups = ", ".join(group.name for group in self.groups)
        return f"{streams}; the groups are {groups}" if groups else streams

    def pairs(self, reader: str, source: str, setting: str) -> list[tuple[int, int]]:
        """The pairs of streams (reader, source) that two references name.

        A reference is a stream, a group (all members), or GROUP@INDEX (the member with this index,
        if there is one). The index of a source may depend on the index i of the reader in its own
        group: `i`, `i+K` and `i-K` (cyclic), or `i^K` (with flipped bits). From a group to itself,
        all pairs of different members are meant. Pairs of a stream with itself are left out, unless
        both references are the same stream, or the source is GROUP@i.

        Args:
          reader, source: the references.
          setting: the name of the setting, for messages.

        Raises UserError if a reference is invalid.
        """
        readers, of_source = self._reference(reader, setting), self._reference(source, setting)
        if readers.relative:
            raise UserError(
                f"{setting} has the reader {reader!r}: i is the index of the reader, so only a"
                " source may depend on it; write GROUP for all members, or GROUP@0 for one"
            )
        pairs = []
        for stream in readers.streams:
            sources: Sequence[int] = of_source.streams
            if of_source.relative:
                group = self.group_of(stream)
                if group is None:
                    raise UserError(
                        f"{setting} has the source {source!r} and the reader {reader!r}, which is"
                        " in no group and has no index i; name a group as the reader, or a member"
                        " as the source, such as GROUP@0"
                    )
                sources = of_source.member(stream - group.start)
            itself = readers.is_stream and of_source.is_stream or of_source.is_own
            pairs += [(stream, other) for other in sources if itself or other != stream]
        return pairs

    def _reference(self, text: str, setting: str) -> _Reference:
        """Reads a reference. Raises UserError."""
        if text in self.names:
            stream = self.names.index(text)
            return _Reference(range(stream, stream + 1), is_stream=True)
        if group := self.find_group(text):
            return _Reference(group.members)
        name, at, index = text.rpartition("@")
        group = self.find_group(name)
        if not at or (group is None and not _INDEX.fullmatch(index)):
            raise UserError(f"{setting} names {text!r}: {self.describe()}")
        if group is None:
            groups = ", ".join(other.name for other in self.groups) or "there is none"
            raise UserError(
                f"{setting} names {text!r}: {name!r} is no group ({groups}); name a group before"
                " the @, or a stream without it"
            )
        match = _INDEX.fullmatch(index)
        if match is None:
            raise UserError(f"{setting} names {text!r}: {index!r} is no index; {_FORMS}")
        if match[1]:
            return _Reference(group.members, True, False, match[2] or "+", int(match[3] or 0))
        return _Reference(group.members[int(match[4]) : int(match[4]) + 1])


class _Reference(NamedTuple):
    """What a reference means: streams, or the member of a group that a reader's index gives."""

    streams: range
    relative: bool = False
    is_stream: bool = False  # one stream, by its name
    operation: str = "+"
    operand: int = 0

    @property
    def is_own(self) -> bool:
        """Whether it is the member with the reader's own index."""
        return self.relative and not self.operand

    def member(self, index: int) -> range:
        """The stream for a reader with this index, or none."""
        size = len(self.streams)
        if self.is_own:
            other = index
        elif self.operation == "^":
            other = index ^ self.operand
        else:
            other = (index + self.operand * (1 if self.operation == "+" else -1)) % size
        return self.streams[other : other + 1]


@functools.lru_cache(maxsize=256)
def expand(entries: tuple[str, ...]) -> Roster:
    """The streams of `config.streams.names`. Raises UserError if a group has no valid size."""
    names: list[str] = []
    groups = []
    for entry in entries:
        match = _GROUP.fullmatch(entry)
        if match is None:
            names.append(entry)
            continue
        name, size = match[1], int(match[2])
        if not 1 <= size <= MAX_MEMBERS:
            raise UserError(
                f"config.streams.names holds {entry!r}: a group has 1 to {MAX_MEMBERS} members"
            )
        groups.append(Group(name, len(names), size))
        names += [f"{name}.{index}" for index in range(size)]
    return Roster(tuple(names), tuple(groups))


def resize(
    entries: Sequence[str],
    references: Sequence[tuple[str, str]],
    threads: int | Mapping[str, int],
) -> tuple[str, ...]:
    """Entries with other numbers of members.

    Args:
      entries: `config.streams.names`.
      references: (reader, source) of all edges and mail of the settings.
      threads: the number of members of every group, or of some groups by name.

    Raises UserError if there is no such group, if a reference names a single member of a group that
    would change, or if groups that are paired by index would have different numbers of members.
    """
    roster = expand(tuple(entries))
    old = {group.name: group.size for group in roster.groups}
    if not old:
        raise UserError(
            f"the number of threads cannot change: {roster.describe()}, and there is no group; give"
            " config.streams.names one, such as 'thread * 8', and train again"
        )
    if not isinstance(threads, Mapping):
        if len(set(old.values())) > 1:
            sizes = ",".join(f"{name}={size}" for name, size in old.items())
            raise UserError(
                f"threads is {threads}, and the groups have different numbers of members: give them"
                f" by name, such as {sizes}"
            )
        threads = dict.fromkeys(old, threads)
    for name, size in threads.items():
        if name not in old:
            raise UserError(f"threads names {name!r}: the groups are {', '.join(old)}")
        if not 1 <= size <= MAX_MEMBERS:
            raise UserError(f"threads is {name}={size}: a group has 1 to {MAX_MEMBERS} members")
    new = old | dict(threads)
    changed = {name for name in old if new[name] != old[name]}
    for reference in {text for pair in references for text in pair if text in roster.names}:
        group = roster.group_of(roster.names.index(reference))
        if group and group.name in changed:
            index = reference.rpartition(".")[2]
            raise UserError(
                f"the number of members of {group.name!r} cannot change: edges or mail name"
                f" {reference!r}, a single one; in config.streams.lags and config.streams.mail,"
                f" write {group.name}@{index}, which holds wherever there is such a member"
            )
    for name, other in _linked(roster, references):
        if {name, other} & changed and new[name] != new[other]:
            raise UserError(
                f"threads gives {name!r} {new[name]} members and {other!r} {new[other]}: they are"
                f" paired by index, so give both the same number, such as"
                f" {name}={new[name]},{other}={new[name]}"
            )
    entry_of = {group.name: f"{group.name} * {new[group.name]}" for group in roster.groups}
    return tuple(
        entry if entry in roster.names else entry_of[name]
        for entry, name in zip(entries, roster.class_names)
    )


def _linked(roster: Roster, references: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """The names of groups of which one reads members of the other by its own index."""
    found = set()
    for reader, source in references:
        read = roster._reference(source, "")
        if not read.relative:
            continue
        other = roster.group_of(read.streams[0])
        for stream in roster._reference(reader, "").streams:
            group = roster.group_of(stream)
            if group and other and group.name != other.name:
                found.add((group.name, other.name))
    return found
