"""Compiler options by hardware, each with its reason."""

from __future__ import annotations

import ctypes

OPTIONS: dict[str, dict[str, int | bool | str]] = {
    # LLVM at -O1 compiles a train step in half the time; the loops that matter run in libraries, so steps take the same.
    "cpu": {"xla_backend_optimization_level": 1},
}


def compiler_options(platform: str) -> dict[str, int | bool | str]:
    """Options for `jax.jit(..., compiler_options=...)` on devices of a platform (cpu, tpu, gpu)."""
    return OPTIONS.get(platform, {})


def compile_step(function, *arguments):
    """Compiles a jitted function for arguments (arrays or shapes); calling the result can never compile again.

    Returns the memory that the compiler used to the operating system: on a laptop it is as much as a small run needs.
    """
    compiled = function.lower(*arguments).compile()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return compiled
