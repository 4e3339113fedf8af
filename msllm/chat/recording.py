"""Recordings of live sessions: tables as the model read them, times of rows, and events.

A recording is one npz file. It holds the arrays that `msllm score --tables` reads (tokens, present
and segment), so it can be scored as it is. It also holds everything that is needed to replay it
without a model. docs/chat.md describes the format.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pathlib
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from msllm.errors import UserError
from msllm.evals.score import check_tables
from msllm.runtime.files import write_atomically
from msllm.tokenizer import Tokenizer

FORMAT = "msllm recording 1"
_FIRST_ROWS = 256  # the initial capacity of a branch, in rows
# The errors of reading a file that is not a recording.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    MemoryError,  # an array's header names a size that the file does not hold
    tokenize.TokenError,  # numpy parses such a header as Python
    zipfile.BadZipFile,
    zlib.error,
)


class Branch:
    """A growing table and its events.

    Attributes:
      rows: number of rows.
      events: actions of the user in order: {"row": number of rows at that time, "what": ..., ...}.
        The events of a fork begin with those of its parent.
      parent: number of the branch that this one was forked from; None: it is not a fork.
      forked: number of rows at the fork.
    """

    def __init__(self, streams: int):
        self.rows = 0
        self.events: list[dict[str, Any]] = []
        self.parent: int | None = None
        self.forked = 0
        # Arrays with spare capacity, so that most rows are appended without a copy.
        self._tokens = np.zeros((_FIRST_ROWS, streams), np.int32)
        self._present = np.zeros((_FIRST_ROWS, streams), bool)
        self._time = np.zeros(_FIRST_ROWS)

    @classmethod
    def stored(
        cls, about: Mapping[str, Any], tokens: np.ndarray, present: np.ndarray, time: np.ndarray
    ) -> Branch:
        """A branch from the contents of a file.

        Args:
          about: the branch's `parent`, `forked` and `events`.
          tokens: [rows, S] int32.
          present: [rows, S] bool.
          time: [rows] float64.
        """
        branch = cls(tokens.shape[1])
        branch.rows, branch.events = len(tokens), about["events"]
        branch.parent, branch.forked = about["parent"], about["forked"]
        branch._tokens, branch._present, branch._time = tokens, present, time
        return branch

    @property
    def tokens(self) -> np.ndarray:
        """[rows, S] int32."""
        return self._tokens[: self.rows]

    @property
    def present(self) -> np.ndarray:
        """[rows, S] bool."""
        return self._present[: self.rows]

    @property
    def time(self) -> np.ndarray:
        """[rows] float64, seconds from the first row to each row, without pauses."""
        return self._time[: self.rows]

    def put(self, row: int, tokens: np.ndarray, present: np.ndarray, seconds: float) -> None:
        """Appends a row, or replaces one, because input may still change the last row.

        Args:
          row: number of the row, at most `rows`.
          tokens: [S] int.
          present: [S] bool.
          seconds: time from the previous row to this one; ignored for a row that is replaced.
        """
        if row == self.rows:
            if row == len(self._time):
                self._double_capacity()
            self._time[row] = self._time[row - 1] + seconds if row else 0.0
            self.rows += 1
        self._tokens[row], self._present[row] = tokens, present

    def _double_capacity(self) -> None:
        for name in ("_tokens", "_present", "_time"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate([array, np.zeros_like(array)]))

    def add_event(self, what: str, **details: Any) -> None:
        """Records an event after the last row."""
        self.events.append({"row": self.rows, "what": what, **details})

    def muted(self, rows: int) -> frozenset[str]:
        """The streams that were muted when the branch had `rows` rows."""
        muted = set()
        for event in self.events:
            if event["row"] > rows:
                continue
            if event["what"] == "mute":
                muted.add(event["stream"])
            elif event["what"] == "unmute":
                muted.discard(event["stream"])
        return frozenset(muted)

    def fork(self, number: int) -> Branch:
        """An independent copy; `number` is the number of this branch."""
        fork = copy.deepcopy(self)
        fork.parent, fork.forked = number, self.rows
        return fork


class Recording:
    """The branches of a session.

    Attributes:
      names: names of the streams.
      kinds: kinds of the streams.
      tokenizer: the tokenizer of the tokens.
      options: the fields of `DecodeOptions`, as in JSON.
      branches: the branches, at least one.
    """

    def __init__(
        self,
        names: Sequence[str],
        kinds: Sequence[str],
        tokenizer: Tokenizer,
        options: dict[str, Any] | None = None,
    ):
        """Makes a recording of one branch without rows."""
        self.names, self.kinds, self.tokenizer = tuple(names), tuple(kinds), tokenizer
        self.options, self.branches = options or {}, [Branch(len(self.names))]

    def fork(self, number: int) -> int:
        """Adds a fork of a branch, and returns its number."""
        self.branches.append(self.branches[number].fork(number))
        return len(self.branches) - 1

    def save(self, path: str | os.PathLike) -> None:
        """Writes a new file.

        Raises:
          UserError: there is no row yet, the file exists, or it cannot be written.
        """
        content = self.to_bytes()
        try:
            write_atomically(path, content, overwrite=False)
        except FileExistsError as error:
            raise UserError(
                f"{path} exists already, and nothing is overwritten: name another file"
            ) from error
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}): name another file"
            ) from error

    def to_bytes(self) -> bytes:
        """The content of the file. Raises UserError if there is no row yet."""
        if not any(branch.rows for branch in self.branches):
            raise UserError("nothing to save: there is no row yet; wait for the first one")
        data = io.BytesIO()
        np.savez_compressed(
            data,
            **self._arrays(),
            about=np.array(json.dumps(self._about())),
            tokenizer=np.frombuffer(self.tokenizer.to_bytes(), np.uint8),
        )
        return data.getvalue()

    def copy(self) -> Recording:
        """An independent copy, which can be saved in another thread while this one grows."""
        copied = copy.copy(self)
        copied.branches = copy.deepcopy(self.branches)
        return copied

    def _arrays(self) -> dict[str, Any]:
        """tokens and present [B, T, S], segment and time [B, T], padded to the longest branch."""
        branches, streams = len(self.branches), len(self.names)
        rows = max(branch.rows for branch in self.branches)
        arrays = {
            "tokens": np.zeros((branches, rows, streams), np.int32),
            "present": np.zeros((branches, rows, streams), bool),
            "segment": np.zeros((branches, rows), np.int32),
            "time": np.zeros((branches, rows)),
        }
        for b, branch in enumerate(self.branches):
            for name in ("tokens", "present", "time"):
                arrays[name][b, : branch.rows] = getattr(branch, name)
            arrays["segment"][b, : branch.rows] = 1
        return arrays

    def _about(self) -> dict[str, Any]:
        """The part of the file that is JSON."""
        return {
            "format": FORMAT,
            "names": self.names,
            "kinds": self.kinds,
            "tokenizer": {"kind": self.tokenizer.kind, "silence": self.tokenizer.silence},
            "options": self.options,
            "branches": [
                {"parent": branch.parent, "forked": branch.forked, "events": branch.events}
                for branch in self.branches
            ],
        }

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recording:
        """Reads a file that `save` wrote. Raises UserError for any other file."""
        try:
            with np.load(path) as file:
                return cls._from_arrays({name: file[name] for name in file.files})
        except FileNotFoundError as error:
            raise UserError(
                f"there is no recording {path}: give a file that `msllm chat` saved"
            ) from error
        except _UNREADABLE as error:
            raise UserError(
                f"{path} is not a recording ({error}): give a file that `msllm chat` saved"
            ) from error

    @classmethod
    def _from_arrays(cls, stored: dict[str, np.ndarray]) -> Recording:
        about = json.loads(str(stored["about"]))
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']!r}, not {FORMAT!r}")
        kind, silence = about["tokenizer"]["kind"], about["tokenizer"]["silence"]
        tokenizer = Tokenizer.from_bytes(kind, stored["tokenizer"].tobytes(), silence)
        recording = cls(about["names"], about["kinds"], tokenizer, about["options"])
        tables = check_tables(stored, len(recording.names), tokenizer.vocab_size)
        time = stored["time"]
        if time.shape != tables["segment"].shape or time.dtype.kind != "f":
            raise ValueError(f"time is {time.dtype} {time.shape}: must be floats, one per row")
        recording.branches = []
        for b, about_branch in enumerate(about["branches"]):
            rows = int(np.sum(tables["segment"][b] > 0))
            recording.branches.append(
                Branch.stored(
                    about_branch,
                    tables["tokens"][b, :rows],
                    tables["present"][b, :rows],
                    time[b, :rows].astype(float),
                )
            )
        return recording


def free_name(path: str | os.PathLike) -> pathlib.Path:
    """The path itself, or the first of NAME-2.npz, NAME-3.npz, ... that does not exist."""
    path = candidate = pathlib.Path(path)
    number = 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate
