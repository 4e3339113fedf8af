"""The logs of sessions: recordings, as `msllm chat` writes them, one for each session.

A log holds the options that a session began with and all that its client did, so
`msllm.chat.events.replay` repeats it bit for bit.
"""

from __future__ import annotations

import logging
import os
import pathlib
import time

from msllm.chat.recording import Branch, Recording
from msllm.decode.engine import Engine
from msllm.decode.script import DecodeOptions
from msllm.errors import UserError
from msllm.serve.protocol import Log
from msllm.serve.sampling import stored

logger = logging.getLogger("msllm")


def new_log(engine: Engine, options: DecodeOptions) -> Recording:
    """A log without rows. The model must have a tokenizer."""
    streams, tokenizer = engine.streams, engine.model.require_tokenizer()
    return Recording(streams.names, streams.kinds, tokenizer, stored(options))


def forked_log(log: Recording) -> Recording:
    """The log of a fork. It begins with the rows and events of its parent, so it stands alone."""
    forked = Recording(log.names, log.kinds, log.tokenizer, log.options)
    branch = log.branches[0].fork(0)
    branch.parent, branch.forked = None, 0
    forked.branches = [branch]
    return forked


def log_frame(log: Recording) -> Log:
    """The frame that sends a log. Raises UserError if there is no row yet."""
    branch: Branch = log.branches[0]
    return Log(rows=branch.rows, options=log.options, events=branch.events, file=log.to_bytes())


class LogFolder:
    """Saves the logs of sessions that have ended."""

    def __init__(self, folder: str | os.PathLike):
        """Raises UserError if the folder cannot be made or written to."""
        self._folder = pathlib.Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--logs={folder}: cannot be made ({error.strerror}): name another folder"
            ) from error
        if not os.access(self._folder, os.W_OK):
            raise UserError(f"--logs={folder}: cannot be written to: name another folder")

    def save(self, log: Recording, name: str) -> None:
        """Saves a log under a name that the server made. A session without rows has none.

        A failure is logged, because the other logs must still be saved.
        """
        if not log.branches[0].rows:
            return
        path = self._folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}.npz"
        try:
            log.save(path)
        except UserError as error:
            logger.error("the log of session %s is lost: %s", name, error)
