"""Files that a reader finds complete or not at all and that show damage, and locks."""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from msllm.errors import UserError

# Errors of storage that is full, missing or broken. They are not bugs of the program.
STORAGE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
)
# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_SHOWN_NAMES = 5  # of a folder, in messages

_held: set[str] = set()  # lock files that this process holds: to the system it is a single holder
_held_guard = threading.Lock()


def describe_missing(path: str | os.PathLike) -> str:
    """Says what there is in place of a local file or folder that does not exist, for messages.

    Returns, for example, "data holds mine, quickstart", or "there is no folder data".
    """
    folder = pathlib.Path(path).parent
    if not folder.is_dir():
        while not folder.parent.is_dir():
            folder = folder.parent
        return f"there is no folder {folder}"
    where = "this folder" if folder == pathlib.Path() else str(folder)
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return f"{where} cannot be read"
    if not names:
        return f"{where} is empty"
    wanted = pathlib.Path(path).name
    close = [name for name in names if name.partition(".")[0] == wanted]  # but for its ending
    close += difflib.get_close_matches(wanted, names, n=_SHOWN_NAMES)
    shown = list(dict.fromkeys([*close, *names]))[:_SHOWN_NAMES]
    more = f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else ""
    return f"{where} holds {', '.join(shown)}{more}"


def write_atomically(
    path: str | os.PathLike,
    content: str | bytes | Callable[[BinaryIO], object],
    *,
    overwrite: bool = True,
) -> None:
    """Writes a file so that its name always refers to complete content, the old or the new.

    The content goes into a new file in the same folder, which is then renamed to `path`. If the
    process is killed or the disk is full, `path` keeps its old content.

    Two kinds of paths are written directly: objects in an object store (`gs://...`), which appear
    only once they are complete, and paths that are not regular files, such as `/dev/stdout`.

    Args:
      path: the file. Its folder must exist.
      content: bytes, text (written as UTF-8), or a function that writes into the open binary file.
      overwrite: whether to replace a file that exists.

    Raises:
      FileExistsError: `overwrite` is false and the file exists.
      OSError: the file cannot be written.
    """
    if isinstance(content, str):
        content = content.encode()
    if "://" in str(path):
        from etils import epath

        file = epath.Path(path)
        if not overwrite and file.exists():
            raise FileExistsError(f"{path} exists already")
        with file.open("wb") as stream:
            _write(stream, content)
        return
    path = pathlib.Path(os.path.realpath(path))  # writes to the target of a link
    if path.exists():
        if not overwrite:
            raise FileExistsError(f"{path} exists already")
        if not path.is_file():
            with path.open("wb") as stream:
                _write(stream, content)
            return
    # Processes of several hosts, or of containers, may have the same id.
    partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as stream:
            _write(stream, content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write(stream: BinaryIO, content: bytes | Callable[[BinaryIO], object]) -> None:
    if callable(content):
        content(stream)
    else:
        stream.write(content)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a new folder to write into.

    On success the folder is renamed to `path`. If an error is raised, it is removed.

    Raises:
      UserError: `path` exists already and is not an empty folder, or cannot be created.
    """
    path = pathlib.Path(path).absolute()
    refuse_existing(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{path} cannot be created ({error}): choose another folder") from error
    try:
        yield partial
        try:
            os.rename(partial, path)  # also succeeds if `path` is an empty folder
        except OSError:
            refuse_existing(path)  # another process has created it in the meantime
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_existing(path: str | os.PathLike) -> None:
    """Raises UserError if `path` exists, unless it is an empty folder."""
    path = pathlib.Path(path)
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise UserError(
            f"{path} exists already, and nothing is overwritten: remove it, or choose another"
            " folder"
        )


def read_object(path: str | os.PathLike, remedy: str) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Args:
      path: the file, also in an object store.
      remedy: what to do about a damaged file, for the message.

    Raises:
      UserError: the file does not hold a JSON object.
      OSError: the file cannot be read.
    """
    from etils import epath

    try:
        value = json.loads(epath.Path(path).read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or no JSON file ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds {value!r:.40} and not an object: {remedy}")
    return value


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with the entry `digest`, from which damage is recognized."""
    return dict(content) | {"digest": _digest(content)}


def digest_differs(content: Mapping[str, Any]) -> bool:
    """Returns whether a JSON object is not as `with_digest` returned it."""
    return content.get("digest") != _digest(content)


def _digest(content: Mapping[str, Any]) -> str:
    entries = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def lock_file(path: str | os.PathLike, *, remove: bool = False) -> Iterator[str | None]:
    """Holds a lock file inside the `with` block, or yields who holds it.

    The lock also ends with the process, and holds for all hosts that share the file. On a file
    system without locks, or if its storage is full or broken, nothing is locked.

    Args:
      path: the lock file. Its folder must exist.
      remove: whether to remove the file at the end.

    Yields:
      None, or a text that names the other process that holds the lock.

    Raises:
      OSError: the file cannot be written.
    """
    path = os.path.realpath(path)
    this = f"process {os.getpid()} on {socket.gethostname()}"
    with _held_guard:
        held_here = path in _held
        if not held_here:
            _held.add(path)
    if held_here:
        yield this
        return
    try:
        with contextlib.ExitStack() as stack:
            yield _lock(path, this, remove, stack)
    finally:
        with _held_guard:
            _held.discard(path)


def _lock(path: str, this: str, remove: bool, stack: contextlib.ExitStack) -> str | None:
    """Locks a file until `stack` closes. Returns the text of another holder, or None."""
    try:
        while True:
            file = stack.enter_context(open(path, "a+"))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file after it was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "another process"
    except OSError as error:
        if error.errno in (*STORAGE_ERRORS, *_NO_LOCKS):
            return None  # the next write reports an error of storage
        raise
    if remove:
        stack.callback(pathlib.Path(path).unlink, missing_ok=True)
    with contextlib.suppress(OSError):
        file.truncate(0)
        print(this, file=file, flush=True)
    return None
