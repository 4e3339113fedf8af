"""The code that a process runs: the files of this package."""

from __future__ import annotations

import pathlib

import msllm
from msllm.data.records import file_hash

_PACKAGE = pathlib.Path(msllm.__file__).parent


def hashes() -> dict[str, str]:
    """sha256 (hex) of every source file, by its path in the package."""
    return {str(path.relative_to(_PACKAGE)): file_hash(path) for path in sorted(_files())}


def changed_since_import() -> bool:
    """Whether a source file is newer than what this process runs, for which its hash does not stand then."""
    return any(path.stat().st_ctime >= msllm.imported for path in _files())


def _files() -> list[pathlib.Path]:
    return [path for path in _PACKAGE.rglob("*.*") if path.suffix in (".py", ".cc", ".h")]
