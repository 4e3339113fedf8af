"""Combination: streams whose next token follows from the hidden states of several streams.

The model, the loss, decoding and the flow certificate read the rules here. docs/semantics.md
describes what they mean, and msllm/model/combine.py computes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from msllm.errors import UserError
from msllm.groups import Group, Roster

MODES = ("own", "mixture", "product")
VOTED = ("answers", "tokens")  # what sampled runs vote on (msllm/decode/vote.py)
_SETTING = "config.streams.combine"


class Combine(NamedTuple):
    """A rule: the next token of a stream follows from these sources, and not from its own state."""

    stream: int
    mode: str  # mixture: of their distributions; product: of their logits
    sources: tuple[int, ...]  # in the order of the setting; may include the stream itself
    # For each source, the name of the group to which it belongs, or "". Empty: none is in a group.
    groups: tuple[str, ...] = ()

    @property
    def entries(self) -> tuple[int, ...]:
        """For each source, its number in the setting, which the members of a group share."""
        if not self.groups:
            return tuple(range(len(self.sources)))
        keys = [group or source for group, source in zip(self.groups, self.sources)]
        return tuple(list(dict.fromkeys(keys)).index(key) for key in keys)

    @property
    def entry_groups(self) -> tuple[str, ...]:
        """For each entry of the setting, the name of the group, or "" for a stream."""
        groups = self.groups or ("",) * len(self.sources)
        return tuple(dict(zip(self.entries, groups)).values())


def parse_combine(
    settings: Iterable[tuple[str, str, str]],
    names: Sequence[str],
    kinds: Sequence[str],
    groups: Sequence[Group] = (),
) -> tuple[Combine, ...]:
    """Reads `config.streams.combine`. Rules of mode `own` are left out.

    Args:
      settings: (stream, mode, sources).
      names, kinds: those of the streams.
      groups: the groups of streams. A source may be a group, which stands for all its members.

    Raises UserError if a rule is invalid.
    """
    rules: list[Combine] = []
    seen: set[str] = set()
    roster = Roster(tuple(names), tuple(groups))
    for stream, mode, listed in settings:
        sources = [name.strip() for name in listed.split(",")] if listed.strip() else []
        for name in (stream, *sources):
            _check_name(name, name != stream or name in sources, roster)
        if mode not in MODES:
            raise UserError(
                f"{_SETTING} holds the mode {mode!r}: must be one of {', '.join(MODES)} (a stream"
                " that attends to others needs no mode, only edges; a vote is an option of"
                " decoding)"
            )
        if kinds[names.index(stream)] == "input":
            raise UserError(
                f"{_SETTING} names {stream!r}, which is of kind input: inputs are given, and not"
                " predicted; name another stream, or change config.streams.kinds"
            )
        if stream in seen:
            raise UserError(f"{_SETTING} names {stream!r} twice: give one rule per stream")
        seen.add(stream)
        if mode == "own":
            if sources:
                raise UserError(
                    f"{_SETTING} gives {stream!r} the mode own with sources {listed!r}: leave the"
                    " sources empty, or choose mixture or product"
                )
            continue
        if not sources or len(set(sources)) < len(sources):
            raise UserError(
                f"{_SETTING} gives {stream!r} the sources {listed!r}: must be one or more"
                " different streams with commas between"
            )
        streams: list[int] = []
        of_groups: list[str] = []
        for name in sources:
            group = roster.find_group(name)
            members = list(group.members) if group else [names.index(name)]
            streams += members
            of_groups += [name if group else ""] * len(members)
        found = tuple(of_groups) if any(of_groups) else ()
        rules.append(Combine(names.index(stream), mode, tuple(streams), found))
    return tuple(sorted(rules))


def _check_name(name: str, may_be_group: bool, roster: Roster) -> None:
    """Raises UserError unless a rule may name this stream or group."""
    if roster.find_group(name):
        if not may_be_group:
            raise UserError(
                f"{_SETTING} gives the group {name!r} a rule: a rule is for a single stream, and a"
                " group can be a source; name a stream that is in no group"
            )
    elif name not in roster.names:
        raise UserError(f"{_SETTING} names {name!r}: {roster.describe()}")
    elif group := roster.group_of(roster.names.index(name)):
        raise UserError(
            f"{_SETTING} names {name!r}, which is of a group: members are interchangeable; name the"
            f" group {group.name!r} as a source, or a stream that is in no group"
        )


def check_edges(
    rules: Iterable[Combine], roster: Roster, lags: Iterable[tuple[str, str, str]], medium: str
) -> None:
    """Raises UserError if a rule reads a source whose edge the config excludes or narrows.

    A combination reads hidden states, like a latent edge. It therefore contradicts an edge that
    `config.streams.lags` lists as `never` or through tokens, and one that goes through tokens
    because all edges do.

    Args:
      rules: the rules.
      roster: the streams.
      lags: `config.streams.lags`.
      medium: `config.streams.visibility_medium`.
    """
    listed = {
        pair: value
        for reader, source, value in lags
        for pair in roster.pairs(reader, source, "config.streams.lags")
    }
    for rule in rules:
        stream = roster.names[rule.stream]
        for s in rule.sources:
            if s == rule.stream:
                continue
            source, value = roster.names[s], listed.get((rule.stream, s))
            if value is None:
                if medium == "latent":
                    continue
                setting = f"config.streams.visibility_medium={medium}"
            elif value == "never" or "tokens" in value:
                setting = f"config.streams.lags lists the edge as {value!r}"
            else:
                continue
            raise UserError(
                f"{_SETTING} lets {stream!r} follow from the hidden states of {source!r}, and"
                f" {setting}: remove the source, or list the edge as latent, such as"
                f" ({stream!r}, {source!r}, '1')"
            )


def sources_of(rules: Iterable[Combine], mode: str = "") -> tuple[tuple[int, int], ...]:
    """The (stream, source) pairs of all rules, or of those of a mode, in order."""
    return tuple(
        (rule.stream, source)
        for rule in rules
        if mode in ("", rule.mode)
        for source in rule.sources
    )
