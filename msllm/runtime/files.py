"""Folders that are complete or absent."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from msllm.errors import UserError


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A folder to write into, which takes the name `path` if nothing is raised, and is removed otherwise.

    Raises UserError if `path` exists already, unless it is an empty folder.
    """
    path = pathlib.Path(path).absolute()
    refuse_existing(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error}): name another folder to write") from error
    try:
        yield partial
        try:
            os.rename(partial, path)  # over an empty folder it succeeds, too
        except OSError:
            refuse_existing(path)  # it has come about meanwhile
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_existing(path: str | os.PathLike) -> None:
    """Raises UserError if `path` is there and is anything but an empty folder."""
    path = pathlib.Path(path)
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise UserError(
            f"{path} exists already, and nothing is overwritten: remove it, or name another folder to write"
        )
