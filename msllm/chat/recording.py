"""Recordings of live sessions: tables as the model read them, when each row came, and what was done from outside.

A recording is one npz file. It holds what `msllm score --tables` reads (tokens, present and segment), so that it can be
scored as it is, and everything that is needed to show it again without a model. docs/chat.md describes it.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from msllm.errors import UserError
from msllm.evals.score import check_tables
from msllm.runtime.files import write_atomically
from msllm.tokenizer import Tokenizer

FORMAT = "msllm recording 1"
_UNREADABLE = (
    *(
        OSError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
    ),  # of other files
    *(zipfile.BadZipFile, zlib.error),
)
_FIRST_ROWS = 256  # room that a branch begins with


class Branch:
    """One table as it grows, and what was done to it.

    Attributes:
      rows: how many there are.
      events: what was done, in order: {"row": how many rows there were then, "what": ..., ...}. A fork has those of its
        parent first.
      parent, forked: the branch that this one was forked from, and how many rows there were then; None and 0: none.
    """

    def __init__(self, streams: int):
        self.rows, self.events, self.parent, self.forked = 0, [], None, 0
        self._tokens = np.zeros((_FIRST_ROWS, streams), np.int32)
        self._present = np.zeros((_FIRST_ROWS, streams), bool)
        self._time = np.zeros(_FIRST_ROWS)

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
        """[rows] float64, seconds from the first row to each, without the time that the session was paused."""
        return self._time[: self.rows]

    def put(self, row: int, tokens: np.ndarray, present: np.ndarray, seconds: float) -> None:
        """Sets a row, the next one or one that is there: input may still come into the last. [S] each.

        seconds: how long after the row before it came; of a row that is there nothing changes.
        """
        if row == self.rows:
            if row == len(self._time):
                for name in ("_tokens", "_present", "_time"):
                    array = getattr(self, name)
                    setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
            self._time[row] = self._time[row - 1] + seconds if row else 0.0
            self.rows += 1
        self._tokens[row], self._present[row] = tokens, present

    def add(self, what: str, **more: Any) -> None:
        """Writes down what was done now."""
        self.events.append({"row": self.rows, "what": what, **more})

    def muted(self, rows: int) -> frozenset[str]:
        """The streams that were muted when there were so many rows."""
        muted = {}
        for event in self.events:
            if event["what"] in ("mute", "unmute") and event["row"] <= rows:
                muted[event["stream"]] = event["what"] == "mute"
        return frozenset(name for name, yes in muted.items() if yes)

    def fork(self, number: int) -> Branch:
        """A copy that goes on on its own; `number`: of this branch."""
        fork = Branch(self._tokens.shape[1])
        fork.rows, fork.events, fork.parent, fork.forked = (
            self.rows,
            [dict(e) for e in self.events],
            number,
            self.rows,
        )
        fork._tokens, fork._present, fork._time = (
            self._tokens.copy(),
            self._present.copy(),
            self._time.copy(),
        )
        return fork


class Recording:
    """The branches of a session.

    Attributes:
      names, kinds: of the streams.
      tokenizer: what the tokens mean.
      options: what rows were chosen with, as JSON has it.
      branches: at least one.
    """

    def __init__(
        self,
        names: Sequence[str],
        kinds: Sequence[str],
        tokenizer: Tokenizer,
        options: dict[str, Any] | None = None,
    ):
        self.names, self.kinds, self.tokenizer = tuple(names), tuple(kinds), tokenizer
        self.options, self.branches = options or {}, [Branch(len(self.names))]

    def fork(self, number: int) -> int:
        """Adds a fork of a branch; its number."""
        self.branches.append(self.branches[number].fork(number))
        return len(self.branches) - 1

    def save(self, path: str | os.PathLike) -> None:
        """Writes a new file. Raises UserError where there is one already, and where it cannot be written."""
        size, rows = len(self.names), max(branch.rows for branch in self.branches)
        if not rows:
            raise UserError("nothing to save: there is no row yet")
        arrays = {
            "tokens": np.zeros((len(self.branches), rows, size), np.int32),
            "present": np.zeros((len(self.branches), rows, size), bool),
            "segment": np.zeros((len(self.branches), rows), np.int32),
            "time": np.zeros((len(self.branches), rows)),
        }
        for b, branch in enumerate(self.branches):
            for name in ("tokens", "present", "time"):
                arrays[name][b, : branch.rows] = getattr(branch, name)
            arrays["segment"][b, : branch.rows] = 1
        about = {
            "format": FORMAT,
            "names": self.names,
            "kinds": self.kinds,
            "tokenizer": {"kind": self.tokenizer.kind, "silence": self.tokenizer.silence},
            "options": self.options,
            "branches": [
                {"parent": b.parent, "forked": b.forked, "events": b.events} for b in self.branches
            ],
        }
        tokenizer = np.frombuffer(self.tokenizer.to_bytes(), np.uint8)
        data = io.BytesIO()
        np.savez_compressed(data, **arrays, about=np.array(json.dumps(about)), tokenizer=tokenizer)
        _write_new(pathlib.Path(path), data.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recording:
        """Reads what `save` wrote. Raises UserError for anything else."""
        try:
            with np.load(path) as arrays:
                stored = {name: arrays[name] for name in arrays.files}
            about = json.loads(str(stored["about"]))
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']!r}, not {FORMAT!r}")
            tokenizer = Tokenizer.from_bytes(
                about["tokenizer"]["kind"],
                stored["tokenizer"].tobytes(),
                about["tokenizer"]["silence"],
            )
            recording = cls(about["names"], about["kinds"], tokenizer, about["options"])
            tables = check_tables(stored, len(recording.names), tokenizer.vocab_size)
            recording.branches = []
            for b, of_branch in enumerate(about["branches"]):
                branch, rows = Branch(len(recording.names)), int(np.sum(tables["segment"][b] > 0))
                branch.rows, branch._time = rows, stored["time"][b, :rows].astype(float)
                branch._tokens, branch._present = (
                    tables["tokens"][b, :rows],
                    tables["present"][b, :rows],
                )
                branch.parent, branch.forked = of_branch["parent"], of_branch["forked"]
                branch.events = of_branch["events"]
                recording.branches.append(branch)
        except FileNotFoundError as error:
            raise UserError(
                f"there is no recording {path}: give a file that `msllm chat` saved"
            ) from error
        except _UNREADABLE as error:
            raise UserError(
                f"{path} is no recording ({error}): give a file that `msllm chat` saved"
            ) from error
        return recording


def free_name(path: str | os.PathLike) -> pathlib.Path:
    """The path itself, or NAME-2.npz, NAME-3.npz, ...: the first that is not taken."""
    path = candidate = pathlib.Path(path)
    number = 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _write_new(path: pathlib.Path, data: bytes) -> None:
    try:
        write_atomically(path, data, overwrite=False)
    except FileExistsError as error:
        raise UserError(
            f"{path} exists already, and nothing is overwritten: name another file"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): name another file"
        ) from error
