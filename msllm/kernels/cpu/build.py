"""Compiles the CPU kernels for this machine and registers them with XLA."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import shutil
import subprocess

import jax
import jaxlib

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
TARGETS = (
    "msllm_attend_row",
    "msllm_attention",
    "msllm_attention_gradients",
    "msllm_matmul_packed",
    "msllm_matmul_table",
    "msllm_write_row",
)

log = logging.getLogger("msllm")


@functools.cache
def unavailable_reason() -> str | None:
    """Returns None if the kernels can be called, else the reason why they cannot.

    The first call compiles the kernels (a few seconds) and registers them with XLA. The compiled
    library is cached in `$XDG_CACHE_HOME/msllm` (by default `~/.cache/msllm`) for later processes.
    `$CXX` names the compiler; the default is the first of c++, g++ and clang++ that exists.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        return "there is no C++ compiler (c++, g++ or clang++; $CXX names another)"
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except subprocess.CalledProcessError as error:
        first_line = (error.stderr.strip().splitlines() or ["no message"])[0]
        return f"{compiler} failed: {first_line}"
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        return str(error)
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def _build(compiler: str) -> pathlib.Path:
    """Returns the path of the compiled library, and compiles it if the cache does not hold it.

    The file's name contains a hash of everything the library depends on: the sources, the version
    of XLA's interface, the compiler and the instruction sets of this CPU.
    """
    folder = pathlib.Path(__file__).parent
    sources = sorted(path for path in folder.iterdir() if path.suffix in (".cc", ".h"))
    # The predefined macros contain the compiler's version and the CPU's instruction sets.
    macros = _run(compiler, *FLAGS, "-dM", "-E", "-x", "c++", "-")
    inputs = [path.read_text() for path in sources] + [jaxlib.__version__, macros]
    digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "msllm"
    library = cache / f"native-{digest}.so"
    if not _is_complete(library):
        log.info("compiling kernels for this CPU with %s: %s", compiler, library)
        cache.mkdir(parents=True, exist_ok=True)
        # Several processes may compile at once: each renames a complete file into place.
        partial = library.with_suffix(f".{os.getpid()}")
        units = [str(path) for path in sources if path.suffix == ".cc"]
        try:
            _run(compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", *units, "-o", str(partial))
            content = partial.read_bytes()
            partial.write_bytes(content + hashlib.sha256(content).digest())
            partial.replace(library)
        finally:
            partial.unlink(missing_ok=True)
    return library


def _is_complete(library: pathlib.Path) -> bool:
    """Returns whether a library ends with the sha256 of its content, which the loader ignores.

    Loading a library that was cut short would end the process.
    """
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _run(*command: str) -> str:
    """Runs a command and returns its output. Raises subprocess.CalledProcessError."""
    return subprocess.run(
        command, check=True, text=True, stdin=subprocess.DEVNULL, capture_output=True
    ).stdout
