"""Mixtures: which source gives each table of a run, as a pure function of the table's index (design: contract 4).

grain's own mix is not used: it rounds the shares down to whole percents of the smallest one, so that 0.7 and 0.3 become
233 and 100, can neither leave a source out nor change shares at a step, and strays by up to three tables among six sources.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from msllm.config import DataConfig, MixtureConfig
from msllm.errors import UserError


def by_source(config: DataConfig) -> dict[str, DataConfig]:
    """{name: the config of that source alone}. Without a mixture there is one source, whose name is empty.

    Each source has a seed of its own, which depends on its name and not on the other sources.
    """
    mixture = config.mixture
    if not mixture.dirs:
        return {"": config}

    def digest(name):
        return hashlib.sha256(f"{config.seed} {name}".encode()).digest()

    def alone(path, name):
        return dataclasses.replace(
            config,
            dir=path,
            mixture=MixtureConfig(),
            seed=int.from_bytes(digest(name)[:4], "little"),
        )

    return {name: alone(path, name) for path, name in zip(mixture.dirs, mixture.source_names)}


def check_alike(manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UserError unless all prepared directories {path: manifest} have the same tokenizer."""
    (first, expected), *others = [
        (path, manifest["tokenizer"]) for path, manifest in manifests.items()
    ]
    for path, tokenizer in others:
        for what in ("sha256", "silence"):
            if tokenizer[what] != expected[what]:
                raise UserError(
                    f"{path} was prepared with another tokenizer than {first} ({what} is {tokenizer[what][:12]!r}, not "
                    f"{expected[what][:12]!r}): prepare it with --config.data.tokenizer.path={first}/{expected['file']} "
                    f"--config.data.tokenizer.silence={expected['silence']!r}, into another directory"
                )


def chosen_tokens(manifest: Mapping[str, Any], streams: Sequence[str]) -> int:
    """Tokens that are not silence in the streams of a prepared directory's training tables. `streams`: empty: all."""
    tokens = manifest["splits"]["train"]["tokens"]
    return sum(tokens[name] for name in streams or tokens)


class Turns:
    """An endless sequence of n sources with given shares.

    Each half of the sources, in their order, takes its share of the turns, rounded to whole turns; within its turns each
    half of that half, and so on. So of any number of first turns a source has its exact share within half a turn for each
    of the ceil(log2 n) halvings: within one turn for up to four sources.
    """

    def __init__(self, shares: Sequence[Fraction]):
        """`shares`: not negative, of any sum but 0."""
        scale = math.lcm(*(share.denominator for share in shares))
        self._sums = list(itertools.accumulate((int(share * scale) for share in shares), initial=0))

    def turn(self, index: int) -> tuple[int, int]:
        """(the source that has the turn `index`, how many turns it had before)."""
        first, last = 0, len(self._sums) - 1
        while last - first > 1:
            middle = (first + last + 1) // 2
            left = self._left(index, first, middle, last)
            if self._left(index + 1, first, middle, last) > left:
                last, index = middle, left
            else:
                first, index = middle, index - left
        return first, index

    def counts(self, index: int) -> list[int]:
        """How many of the first `index` turns each source has."""

        def split(count: int, first: int, last: int) -> list[int]:
            if last - first == 1 or not count:
                return [count] + [0] * (last - first - 1)
            middle = (first + last + 1) // 2
            left = self._left(count, first, middle, last)
            return split(left, first, middle) + split(count - left, middle, last)

        return split(index, 0, len(self._sums) - 1)

    def _left(self, count: int, first: int, middle: int, last: int) -> int:
        """Of `count` turns of the sources first..last those of first..middle, to the nearest whole number."""
        part, whole = self._sums[middle] - self._sums[first], self._sums[last] - self._sums[first]
        return (2 * count * part + whole) // (2 * whole)


class _Phase(NamedTuple):
    """A stretch of the run with the same weights."""

    start: int  # index of its first table
    before: list[int]  # tables of each source before it
    turns: Turns
    targets: list[float]  # shares of the chosen tokens; their sum is 1


class Plan:
    """Which table of which source has which place in a run.

    A table belongs to one source. For a source to have its weight of the chosen tokens, its share of the tables is
    weight / (chosen tokens in a table of it, on average). When the weights change, each source goes on where it was.

    Attributes:
      names: of the sources.
    """

    def __init__(self, config: DataConfig, manifests: Mapping[str, Mapping[str, Any]]):
        """`manifests`: of each source, by name. Raises UserError if one has a weight and nothing that it could count."""
        mixture, self.names = config.mixture, tuple(manifests)
        self._batch_size = config.batch_size
        self._tables = [manifest["splits"]["train"]["tables"] for manifest in manifests.values()]
        tokens = [chosen_tokens(manifest, mixture.streams) for manifest in manifests.values()]
        self._phases: list[_Phase] = []
        for step, weights in ((0, mixture.weights), *mixture.schedule):
            shares = []
            for name, path, weight, tables, count in zip(
                self.names, mixture.dirs, weights, self._tables, tokens
            ):
                if weight and not count:
                    chosen = ", ".join(mixture.streams)
                    where = f"config.data.mixture.streams {chosen}" if chosen else "all streams"
                    raise UserError(
                        f"source {name!r} ({path}) has weight {weight} and only silence in {where}: set it to 0"
                    )
                shares.append(Fraction(repr(weight)) * tables / count if weight else Fraction(0))
            start = step * config.batch_size
            before = self.counts(start) if self._phases else [0] * len(self.names)
            targets = [weight / sum(weights) for weight in weights]
            self._phases.append(_Phase(start, before, Turns(shares), targets))

    def place(self, index: int) -> tuple[int, int]:
        """(the source of the run's table `index`, which of that source's tables it is: 0, 1, ... over all epochs)."""
        phase = self._phase(index)
        source, count = phase.turns.turn(index - phase.start)
        return source, phase.before[source] + count

    def counts(self, index: int) -> list[int]:
        """How many of the run's first `index` tables are of each source."""
        phase = self._phase(index)
        return [
            old + new for old, new in zip(phase.before, phase.turns.counts(index - phase.start))
        ]

    def targets(self, step: int) -> list[float]:
        """The share of the chosen tokens that each source should have in a step."""
        return self._phase(step * self._batch_size).targets

    def epochs(self, steps: int) -> list[float]:
        """How often each source has been read after so many steps."""
        return [
            count / tables
            for count, tables in zip(self.counts(steps * self._batch_size), self._tables)
        ]

    def _phase(self, index: int) -> _Phase:
        return self._phases[
            bisect.bisect_right(self._phases, index, key=lambda phase: phase.start) - 1
        ]
