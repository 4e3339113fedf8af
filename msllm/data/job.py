"""What the workers of `msllm prepare` do: read input, sample texts, count, build and compare.

A job is small, because it is sent to the workers with every piece of work. They read everything
else from files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import socket
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

from msllm.config import Config
from msllm.data import build, converters, duplicates, files, identity
from msllm.data.build import SPLITS, WORK, Portion
from msllm.data.duplicates import IdRange
from msllm.data.executors import Status
from msllm.data.sources import BadRecords, Part
from msllm.errors import RunError, UserError
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer

# Files in WORK, the folder of an unfinished run:
STATE = "state.json"  # its settings
IDS = "ids.json"  # the names of all files of ids, for each split
SHARED_SECONDS = 30  # after which all hosts see a file that was written to shared storage


class Input(NamedTuple):
    """A file to hash, and the number of parts whose lines are counted (1: lines do not count)."""

    file: str
    parts: int

    @classmethod
    def of(cls, part: Part) -> Input:
        """Returns the input that a part belongs to."""
        return cls(part.file, part.count if part.counts_lines else 1)


class InputGroup(tuple[Input, ...]):
    """Input files that one worker reads at a time."""

    def __str__(self) -> str:
        return f"{self[0].file}" + (f" to {self[-1].file}" if len(self) > 1 else "")


class Sample(NamedTuple):
    """A portion of the input that gives texts for the tokenizer."""

    parts: Sequence[Part | None]
    characters: float  # the least number of characters to give

    def __str__(self) -> str:
        return f"the sample for the tokenizer from {[part.file for part in self.parts if part]}"


class Sampled(NamedTuple):
    """Texts of a portion."""

    texts: list[str]
    all_read: bool  # whether they are the texts of all records
    records: dict[str, Any]  # `BadRecords.counts` of the records read


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of `prepare`, as its workers know it.

    Attributes:
      config: the settings of the run.
      out: the folder of the data, as an absolute path that all workers share.
      run: the sha256 (hex) of the file STATE, which identifies the run.
      code: `identity.code_versions` of the process that started the run.
      tokenizer: name, kind and sha256 (hex) of the tokenizer file in `out`; None: not known yet.
    """

    config: Config
    out: str
    run: str
    code: Mapping[str, str]
    tokenizer: tuple[str, str, str] | None = None

    def sample(self, item: Sample) -> Generator[Status, None, Sampled]:
        """Returns texts of a portion of the input."""
        self._check()
        yield Status()
        bad = BadRecords(self.config.data.bad_percent)
        texts, all_read = converters.portion_texts(
            self.config, self._spec(), item.parts, bad, item.characters
        )
        return Sampled(texts, all_read, bad.counts())

    def count(self, portion: Portion) -> Generator[Status, None, int]:
        """Returns the number of examples of a portion."""
        self._check()
        return (yield from build.count(self.config, self._spec(), self._tokenizer(), portion))

    def build(self, portion: Portion) -> Generator[Status, None, dict[str, Any]]:
        """Writes the files of a portion and returns its report."""
        self._check()
        return (
            yield from build.build(
                self.config,
                self._spec(),
                self._tokenizer(),
                pathlib.Path(self.out),
                portion,
                lambda: check_run(self.out, self.run),
            )
        )

    def count_distinct(self, ids: IdRange) -> Generator[Status, None, dict[str, int]]:
        """Counts the distinct ids of a range in the files of ids that IDS lists."""
        self._check()
        yield Status()
        folder = pathlib.Path(self.out) / WORK
        names = json.loads((folder / IDS).read_text())
        paths = {split: [folder / name for name in names[split]] for split in SPLITS}
        return duplicates.count_distinct(paths, ids)

    def _check(self) -> None:
        _read_shared(str(pathlib.Path(self.out) / WORK / STATE), self.run)
        current = identity.code_versions(self.config.data)
        different = [name for name in self.code if self.code[name] != current.get(name)]
        if different:
            name = different[0]
            raise UserError(
                f"the worker on {socket.gethostname()} has {name} {current.get(name)}, but the run"
                f" was started with {self.code[name]}: install the same versions everywhere"
            )

    def _spec(self) -> StreamSpec:
        return StreamSpec.from_config(self.config.streams)

    def _tokenizer(self) -> Tokenizer:
        assert self.tokenizer is not None
        return _load_tokenizer(self.out, *self.tokenizer, self.config.data.tokenizer.silence)


def read_inputs(inputs: InputGroup) -> Generator[Status, None, list[tuple[str, list[int]]]]:
    """Returns the result of `files.hash_and_lines_before` for each of some files."""
    found = []
    for file, parts in inputs:
        yield Status()
        found.append(files.hash_and_lines_before(file, parts))
    return found


def run_id(out: str | pathlib.Path) -> str:
    """Returns the sha256 (hex) that identifies the unfinished run in `out`; "" if there is none."""
    try:
        return hashlib.sha256((pathlib.Path(out) / WORK / STATE).read_bytes()).hexdigest()
    except OSError:
        return ""


def check_run(out: str, run: str) -> None:
    """Raises RunError if the run has ended or another one has taken its place."""
    if run_id(out) != run:
        raise RunError(f"the run in {out} has ended, so this worker discards its work")


def _read_shared(path: str, sha256: str) -> bytes:
    """Returns the content of a file that the process that started the run has written.

    Raises UserError if it is still not the right one after SHARED_SECONDS.
    """
    end = time.monotonic() + SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError):
            content = pathlib.Path(path).read_bytes()
            if hashlib.sha256(content).hexdigest() == sha256:
                return content
        if time.monotonic() > end:
            raise UserError(
                f"{path} is not there, or is not the file of this run: all workers must share the"
                " folder of the data; name another --out, or mount it at the same path everywhere"
            )
        time.sleep(1)


@functools.lru_cache(1)  # of a process: it builds many portions with the same tokenizer
def _load_tokenizer(out: str, name: str, kind: str, sha256: str, silence: str) -> Tokenizer:
    content = _read_shared(str(pathlib.Path(out) / name), sha256)
    return Tokenizer.from_bytes(kind, content, silence)
