"""Access to the user's input files: local or remote, plain or compressed.

Every problem with a file becomes a UserError that names the file. A byte order mark at the start of
a file, as Windows programs write it, is no part of its text.
"""

from __future__ import annotations

import bz2
import codecs
import collections
import concurrent.futures
import contextlib
import glob
import gzip
import hashlib
import importlib
import io
import lzma
import os
import pathlib
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from msllm.errors import UserError
from msllm.runtime.files import describe_missing

BLOCK_CHARACTERS = 1 << 16  # of plain text read at a time
# The scheme, the bucket and the leading folders of a remote path that hold no wildcards.
_PARTS_WITHOUT_WILDCARDS = re.compile(r"\w+://[^/]*(?:/[^/*?\[]*(?=/|$))*")
COMPRESSED = re.compile(r"\.(gz|zst|xz|bz2)$")
# How files of other formats begin, for messages.
_SIGNATURES = {
    b"\x1f\x8b": "gzip data (.gz)",
    b"\x28\xb5\x2f\xfd": "Zstandard data (.zst)",
    b"\xfd7zXZ": "xz data (.xz)",
    b"BZh": "bzip2 data (.bz2)",
    b"PAR1": "a parquet file (.parquet)",
    b"ARROW1": "an Arrow file (.arrow)",
    b"PK\x03\x04": "a zip archive, such as an Excel or Word file (.zip, .xlsx, .docx)",
    b"%PDF": "a PDF document (.pdf)",
    b"\x80\x04": "a pickle (.pkl)",
    b"SQLite format 3": "an SQLite database",
    codecs.BOM_UTF16_LE: "text in UTF-16",
    codecs.BOM_UTF16_BE: "text in UTF-16",
}


IS_FOLDER = "a folder: name files in it by a glob, for example "


def shared_file(name: str, config_file: str) -> str:
    """Returns the path of a file that the example configs read.

    Args:
      name: the path within the folder that the environment variable MSLLM_SHARED names; by default,
        the folder `shared` beside the repository.
      config_file: `__file__` of a config in the repository's folder `configs`, or in one below it.
    """
    parents = pathlib.Path(config_file).resolve().parents
    configs = next((folder for folder in parents if folder.name == "configs"), parents[0])
    repository = configs.parent
    folder = os.environ.get("MSLLM_SHARED") or repository.with_name("shared")
    return str(pathlib.Path(folder) / name)


def input_files(path: str, setting: str = "path") -> list[str]:
    """Returns the files that a path or glob names, sorted.

    Args:
      path: the path or glob, local or remote.
      setting: the field of `config.data` that holds it, for messages.

    Raises UserError if there is no such file.
    """
    if "://" in path:
        files = _remote_files(path)
    elif os.path.isfile(path):  # a name may hold what a pattern would: chat[1].jsonl
        files = [path]
    else:
        files = [file for file in glob.glob(path, recursive=True) if not os.path.isdir(file)]
    if os.path.isdir(path):
        raise UserError(f"config.data.{setting} is {path!r}: {IS_FOLDER}{example_glob(path)!r}")
    if not files:
        raise UserError(
            f"config.data.{setting} is {path!r}: there is no such file{missing_file(path)}; name"
            f" one with --config.data.{setting}=...{_hint_for_shared(path)}"
        )
    return sorted(files)


def example_glob(folder: str) -> str:
    """Returns a glob of the files in a folder, with the ending that most of them have."""
    endings = collections.Counter(
        os.path.splitext(name)[1] for name in os.listdir(folder) if not name.startswith(".")
    )
    return os.path.join(folder, "*" + (endings.most_common(1)[0][0] if endings else ""))


def missing_file(path: str) -> str:
    """Returns what there is in place of a file that does not exist, in parentheses, for messages.

    Args:
      path: the path or glob. About remote files, which have `://` in their names, nothing is said.
    """
    if "://" in path:
        return ""
    fixed = re.match(r"[^*?\[]*/|", path)  # the folders without wildcards
    if glob.has_magic(path) and fixed and os.path.isdir(fixed[0] or "."):
        path = fixed[0] + os.path.basename(path)
    return f" ({describe_missing(path)})"


def _hint_for_shared(path: str) -> str:
    """Says where the example configs look for data, if a path is one of theirs."""
    folder = os.environ.get("MSLLM_SHARED") or "shared"
    parents = pathlib.Path(path).parents
    if pathlib.Path(folder) not in parents and "shared" not in [p.name for p in parents]:
        return ""
    return (
        ", or set MSLLM_SHARED: the example configs read the folder that it names, by default the"
        " folder `shared` beside the repository"
    )


def _remote_files(path: str) -> list[str]:
    fixed = _PARTS_WITHOUT_WILDCARDS.match(path)
    root = fixed[0] if fixed else path
    pattern = path[len(root) :].lstrip("/")
    with readable(path):
        if pattern:
            return [str(file) for file in epath.Path(root).glob(pattern)]
        return [path] if epath.Path(path).exists() else []


def file_hash(file: str) -> str:
    """Returns the sha256 (hex) of a file."""
    with readable(file), open_raw(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_sizes(files: Sequence[str]) -> dict[str, int]:
    """Returns the size of each file in bytes."""
    return {file: size for file, (size, _) in file_versions(files).items()}


def file_versions(files: Sequence[str]) -> dict[str, tuple[int, int | None]]:
    """Returns the size and the time of the last change of each file: bytes, ns.

    The time is None if the storage does not tell it.
    """
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # remote storage answers slowly
        return dict(zip(files, pool.map(_file_version, files)))


def _file_version(file: str) -> tuple[int, int | None]:
    with readable(file):
        if "://" in file:
            found = epath.Path(file).stat()
            changed = getattr(found, "mtime", None)
            return found.length, round(changed * 1e9) if changed else None
        status = os.stat(file)
        return status.st_size, status.st_mtime_ns


def lines(
    file: str, index: int = 0, count: int = 1, before: int = 0
) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line) of the lines that begin in part `index` of `count` equal parts.

    Args:
      file: the path of the file.
      index, count: the part, counted in decompressed bytes.
      before: the number of lines that begin before the part (`hash_and_lines_before`).
    """
    with readable(file), open_file(file) as stream:
        if count == 1:
            for number, line in enumerate(stream, 1):
                yield number, _without_mark(line) if number == 1 else line
            return
        size = stream.seek(0, io.SEEK_END)
        start, stop = size * index // count, size * (index + 1) // count
        number, position = before, stream.seek(max(start - 1, 0))
        if start:  # the line that holds the byte before `start` belongs to the part before
            position += len(stream.readline())
        while position < stop:
            line = stream.readline()
            number += 1
            position += len(line)
            yield number, _without_mark(line) if number == 1 else line


def _without_mark(line: bytes) -> bytes:
    return line.removeprefix(codecs.BOM_UTF8)


def read_text(file: str) -> str:
    """Returns the text of a small file, in UTF-8, or in UTF-16 with a byte order mark.

    Raises UserError; NotUtf8 if it is neither.
    """
    with readable(file), open_file(file) as stream:
        content = stream.read()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotUtf8(f"{file}: {not_utf8(file, error)}") from error


def not_utf8(file: str, error: UnicodeDecodeError) -> str:
    """Says that a file is not UTF-8, and what it is instead if its first bytes tell."""
    with readable(file), open_file(file) as stream:
        start = stream.read(16)
    for signature, what in _SIGNATURES.items():
        if start.startswith(signature):
            if "text" in what:
                return f"not UTF-8, but {what}: convert the file to UTF-8"
            return (
                f"not UTF-8, but {what}: name the file accordingly, set config.data.format, or"
                " convert the file"
            )
    return f"not UTF-8 ({error}): convert the file to UTF-8"


def hash_and_lines_before(file: str, count: int) -> tuple[str, list[int]]:
    """Reads a file once, to identify and to divide it.

    Returns:
      The sha256 (hex) of the file, and the number of lines that begin before each of `count` equal
      parts. The file is not decompressed.
    """
    if count == 1:
        return file_hash(file), [0]
    digest = hashlib.sha256()
    before, number, line_ended = [], 0, True  # `number` lines begin before `position`
    with readable(file), open_raw(file) as stream:
        size = stream.seek(0, io.SEEK_END)
        position = stream.seek(0)
        for start in (size * index // count for index in range(count)):
            while position < start and (block := stream.read(min(1 << 20, start - position))):
                digest.update(block)
                number += line_ended + block.count(b"\n", 0, -1)
                line_ended = block.endswith(b"\n")
                position += len(block)
            before.append(number)
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest(), before


def text_blocks(file: str) -> Iterator[str]:
    """Yields the text of a file in blocks of whole lines. Raises NotUtf8, a UserError."""
    block, size = [], 0
    for number, line in lines(file):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise NotUtf8(f"{file}:{number}: {not_utf8(file, error)}") from error
        block.append(text)
        size += len(text)
        if size >= BLOCK_CHARACTERS:
            yield "".join(block)
            block, size = [], 0
    if block:
        yield "".join(block)


def open_raw(file: str) -> io.BufferedReader:
    """Opens the stored bytes of a file."""
    return epath.Path(file).open("rb") if "://" in file else open(file, "rb")


@contextlib.contextmanager
def open_file(file: str) -> Iterator[io.BufferedIOBase]:
    """Opens the decompressed bytes of a file."""
    with open_raw(file) as raw:
        if file.endswith(".gz"):
            with gzip.open(raw) as stream:
                yield stream
        elif file.endswith(".xz"):
            with lzma.open(raw) as stream:
                yield stream
        elif file.endswith(".bz2"):
            with bz2.open(raw) as stream:
                yield stream
        elif file.endswith(".zst"):
            yield io.BufferedReader(_BlockStream(_decompress_zst(raw, file)), 1 << 16)
        else:
            yield raw


@contextlib.contextmanager
def readable(file: str) -> Iterator[None]:
    """Turns errors of reading a file inside the `with` block into UserErrors that name the file."""
    try:
        yield
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        what = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: cannot be read ({what}): correct config.data.path") from error
    except ImportError as error:
        raise UserError(
            f"{file}: cannot be read ({error}): install the package that this error names"
        ) from error


def import_optional(module: str, file: str, package: str = "") -> Any:
    """Returns a module that only some files need. Raises UserError if it is not installed.

    Args:
      module: the module.
      file: the file that needs it.
      package: the name of its package, if it is not that of the top-level module.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise UserError(
            f"{file}: needs the package {package}: install it with `pip install {package}`, or"
            " install msllm[data]"
        ) from error


def _decompress_zst(raw: io.BufferedIOBase, file: str) -> Iterator[bytes]:
    """Yields the decompressed bytes of a .zst file.

    The reader of the zstandard package is not used because it accepts truncated files.
    """
    zstandard = import_optional("zstandard", file)
    frame = None
    try:
        while block := raw.read(1 << 16):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise UserError(f"{file}: cannot be read ({error}): correct config.data.path") from error
    if frame is not None:
        raise EOFError("the file ends in the middle of a frame")


class NotUtf8(UserError):
    """A text that is not UTF-8."""


class _BlockStream(io.RawIOBase):
    """A file whose content is a sequence of blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest and (block := next(self._blocks, None)) is not None:
            self._rest = memoryview(block)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size
