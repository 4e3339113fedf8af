"""Combination: streams whose next token follows from the hidden states of several streams.

The model, the loss, decoding and the flow certificate read the rules here. docs/semantics.md
describes what they mean, and msllm/model/combine.py computes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from msllm.errors import UserError

MODES = ("own", "mixture", "product")
_SETTING = "config.streams.combine"


class Combine(NamedTuple):
    """A rule: the next token of a stream follows from these sources, and not from its own state."""

    stream: int
    mode: str  # mixture: of their distributions; product: of their logits
    sources: tuple[int, ...]  # in the order of the setting; may include the stream itself


def parse_combine(
    settings: Iterable[tuple[str, str, str]], names: Sequence[str], kinds: Sequence[str]
) -> tuple[Combine, ...]:
    """Reads `config.streams.combine`. Rules of mode `own` are left out.

    Args:
      settings: (stream, mode, sources).
      names, kinds: those of the streams.

    Raises UserError if a rule is invalid.
    """
    rules: list[Combine] = []
    seen: set[str] = set()
    for stream, mode, listed in settings:
        sources = [name.strip() for name in listed.split(",")] if listed.strip() else []
        for name in (stream, *sources):
            if name not in names:
                raise UserError(f"{_SETTING} names {name!r}: the streams are {', '.join(names)}")
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
        rules.append(Combine(names.index(stream), mode, tuple(map(names.index, sources))))
    return tuple(sorted(rules))


def check_edges(
    rules: Iterable[Combine],
    names: Sequence[str],
    lags: Iterable[tuple[str, str, str]],
    medium: str,
) -> None:
    """Raises UserError if a rule reads a source whose edge the config excludes or narrows.

    A combination reads hidden states, like a latent edge. It therefore contradicts an edge that
    `config.streams.lags` lists as `never` or through tokens, and one that goes through tokens
    because all edges do.

    Args:
      rules: the rules.
      names: the streams.
      lags: `config.streams.lags`.
      medium: `config.streams.visibility_medium`.
    """
    listed = {(reader, source): value for reader, source, value in lags}
    for rule in rules:
        stream = names[rule.stream]
        for source in (names[s] for s in rule.sources if s != rule.stream):
            value = listed.get((stream, source))
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
    """The (stream, source) pairs of all rules, or of those of a mode, in order.

    The parameters of a combination have one entry for each pair of all rules.
    """
    return tuple(
        (rule.stream, source)
        for rule in rules
        if mode in ("", rule.mode)
        for source in rule.sources
    )
