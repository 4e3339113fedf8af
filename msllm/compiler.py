"""Compiler options by hardware, each with its reason."""

from __future__ import annotations

import jax

OPTIONS: dict[str, dict[str, int | bool | str]] = {
    # LLVM at -O1 compiles a train step in half the time; the loops that matter run in libraries, so steps take the same.
    "cpu": {"xla_backend_optimization_level": 1},
}


def compiler_options() -> dict[str, int | bool | str]:
    """Options for `jax.jit(..., compiler_options=...)` on the default backend."""
    return OPTIONS.get(jax.default_backend(), {})
