"""Mixtures: the source of each table of a run, as a pure function of the table's index.

`grain.MapDataset.mix` is not used for three reasons. It rounds shares down to whole percents of the
smallest share, so that 0.7 and 0.3 become 233 and 100. It can neither leave out a source nor change
shares at a step. With six sources, it deviates from their shares by up to three tables.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from operator import attrgetter
from typing import Any, NamedTuple

from msllm.config import DataConfig, MixtureConfig
from msllm.errors import UserError

Manifest = Mapping[str, Any]


def by_source(config: DataConfig) -> dict[str, DataConfig]:
    """Returns {name: the config of that source alone}.

    Without a mixture there is one source, and its name is empty. The seed of a source in a mixture
    depends on its name, but not on the other sources.
    """
    mixture = config.mixture
    if not mixture.dirs:
        return {"": config}
    return {
        name: dataclasses.replace(
            config, dir=path, mixture=MixtureConfig(), seed=_seed(config.seed, name)
        )
        for path, name in zip(mixture.dirs, mixture.source_names)
    }


def _seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def check_tokenizers(manifests: Mapping[str, Manifest]) -> None:
    """Raises UserError unless all prepared directories {path: manifest} have the same tokenizer."""
    (first, expected), *others = [
        (path, manifest["tokenizer"]) for path, manifest in manifests.items()
    ]
    for path, tokenizer in others:
        for what in ("sha256", "silence"):
            if tokenizer[what] != expected[what]:
                raise UserError(
                    f"{path} was prepared with another tokenizer than {first} ({what} is"
                    f" {tokenizer[what][:12]!r}, not {expected[what][:12]!r}): prepare it with"
                    f" --config.data.tokenizer.path={first}/{expected['file']}"
                    f" --config.data.tokenizer.silence={expected['silence']!r}, into another"
                    " directory"
                )


def count_tokens(manifest: Manifest, streams: Sequence[str]) -> int:
    """Returns the number of tokens in a prepared directory's training tables, without silence.

    Args:
      manifest: the manifest of the directory.
      streams: the names of the streams to count; empty: all.
    """
    tokens = manifest["splits"]["train"]["tokens"]
    return sum(tokens[name] for name in streams or tokens)


class Turns:
    """An endless sequence of turns among n sources with given shares.

    The sources are divided into a first and a second half. Each half takes its share of the turns,
    rounded to whole turns, and divides them in the same way among its own halves, down to single
    sources. Among the first k turns, for any k, a source therefore has its exact share to within
    half a turn for each of the ceil(log2 n) halvings: within one turn for up to four sources.
    """

    def __init__(self, shares: Sequence[Fraction]):
        """Takes the share of each source: not negative, not all 0, and with any sum."""
        scale = math.lcm(*(share.denominator for share in shares))
        self._sums = list(itertools.accumulate((int(share * scale) for share in shares), initial=0))

    def turn(self, index: int) -> tuple[int, int]:
        """Returns (the source that has turn `index`, the number of its turns before that)."""
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
        """Returns the number of turns of each source among the first `index` turns."""
        return self._split(index, 0, len(self._sums) - 1)

    def _split(self, count: int, first: int, last: int) -> list[int]:
        """Returns the turns of each of the sources first..last (exclusive), of `count` turns."""
        if last - first == 1 or not count:
            return [count] + [0] * (last - first - 1)
        middle = (first + last + 1) // 2
        left = self._left(count, first, middle, last)
        return self._split(left, first, middle) + self._split(count - left, middle, last)

    def _left(self, count: int, first: int, middle: int, last: int) -> int:
        """Returns how many of the `count` turns of first..last belong to first..middle, rounded."""
        part, whole = self._sums[middle] - self._sums[first], self._sums[last] - self._sums[first]
        return (2 * count * part + whole) // (2 * whole)


class _Phase(NamedTuple):
    """A part of the run with constant weights."""

    start: int  # index of the first table of the phase
    before: list[int]  # number of tables of each source before the phase
    turns: Turns
    targets: list[float]  # shares of the counted tokens; their sum is 1


class Plan:
    """The source of every table of a run, and the table's number in that source.

    The weights of sources are shares of the counted tokens, but every table belongs to one source.
    So the share of a source in the tables is its weight / (average counted tokens per table of the
    source). When the weights change, each source continues where it stopped.

    Attributes:
      names: the names of the sources.
    """

    def __init__(self, config: DataConfig, manifests: Mapping[str, Manifest]):
        """Takes the manifest of each source, by name.

        Raises UserError if a source has a positive weight but no tokens to count.
        """
        mixture, self.names = config.mixture, tuple(manifests)
        self._batch_size = config.batch_size
        self._tables = [manifest["splits"]["train"]["tables"] for manifest in manifests.values()]
        tokens = [count_tokens(manifest, mixture.streams) for manifest in manifests.values()]
        self._phases: list[_Phase] = []
        for step, weights in ((0, mixture.weights), *mixture.schedule):
            start = step * config.batch_size
            before = self.counts(start) if self._phases else [0] * len(self.names)
            turns = Turns(self._shares(mixture, weights, tokens))
            targets = [weight / sum(weights) for weight in weights]
            self._phases.append(_Phase(start, before, turns, targets))

    def _shares(
        self, mixture: MixtureConfig, weights: Sequence[float], tokens: Sequence[int]
    ) -> list[Fraction]:
        """Returns the share of each source in the tables. Their sum is arbitrary."""
        shares = []
        for i, (weight, count) in enumerate(zip(weights, tokens)):
            if not weight:
                shares.append(Fraction(0))
                continue
            if not count:
                chosen = ", ".join(mixture.streams)
                where = f"config.data.mixture.streams {chosen}" if chosen else "all streams"
                raise UserError(
                    f"source {self.names[i]!r} ({mixture.dirs[i]}) has weight {weight} and only"
                    f" silence in {where}: set its weight to 0"
                )
            # repr gives the decimal number of the config, not its binary approximation.
            shares.append(Fraction(repr(weight)) * self._tables[i] / count)
        return shares

    def place(self, index: int) -> tuple[int, int]:
        """Returns (the source of the run's table `index`, the table's number in that source).

        The number counts over all epochs of the source.
        """
        phase = self._phase(index)
        source, count = phase.turns.turn(index - phase.start)
        return source, phase.before[source] + count

    def counts(self, index: int) -> list[int]:
        """Returns the number of tables of each source among the run's first `index` tables."""
        phase = self._phase(index)
        counts = phase.turns.counts(index - phase.start)
        return [before + count for before, count in zip(phase.before, counts)]

    def targets(self, step: int) -> list[float]:
        """Returns the share of the counted tokens that each source should have in a step."""
        return self._phase(step * self._batch_size).targets

    def epochs(self, steps: int) -> list[float]:
        """Returns how many times each source has been read after this many steps."""
        counts = self.counts(steps * self._batch_size)
        return [count / tables for count, tables in zip(counts, self._tables)]

    def _phase(self, index: int) -> _Phase:
        return self._phases[bisect.bisect_right(self._phases, index, key=attrgetter("start")) - 1]
