"""Compilation: options by platform, the persistent cache, and the memory of the compiler."""

from __future__ import annotations

import ctypes
import functools
import gc
from typing import Any

import jax
from etils import epath

OPTIONS: dict[str, dict[str, int | bool | str]] = {
    # The loops that matter run in libraries, so less work in LLVM makes the start faster and the
    # steps no slower. -O1 halves the compile time of a train step. Turning off fusion emitters
    # (MLIR) and expensive passes takes off another third. LLVM then does not vectorize a loop that
    # overwrites its operand, which costs at most 4 % of a step. The loss has no such loop.
    "cpu": {
        "xla_backend_optimization_level": 1,
        "xla_cpu_use_fusion_emitters": False,
        "xla_llvm_disable_expensive_passes": True,
    },
}


@functools.cache
def compiler_options(platform: str) -> dict[str, int | bool | str]:
    """Options for `jax.jit(..., compiler_options=...)` on devices of a platform (cpu, gpu, tpu).

    Options differ between versions of XLA. Those that the installed compiler lacks are left out.
    """
    options = OPTIONS.get(platform, {})
    # A platform without options needs no check. Its devices may be absent here, because programs
    # can be compiled for other machines.
    if not options or _accepts(platform, options):
        return options
    return {name: value for name, value in options.items() if _accepts(platform, {name: value})}


def _accepts(platform: str, options: dict[str, int | bool | str]) -> bool:
    try:
        with jax.default_device(jax.local_devices(backend=platform)[0]):
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True


def enable_compilation_cache(setting: str, default: epath.Path) -> None:
    """Makes JAX store compiled programs in a directory, so that the next start compiles nothing.

    A cache directory that the user has set in JAX is kept. In a run of several processes the first
    one writes the cache.

    Args:
      setting: `config.compilation_cache`: a directory; `auto`: `default`; `none`: no cache.
      default: the directory for `auto`.
    """
    if setting == "none" or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    jax.config.update("jax_compilation_cache_dir", str(default if setting == "auto" else setting))
    # By default JAX stores only programs that take a second or more to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def compile_step(function: Any, *arguments: Any) -> jax.stages.Compiled:
    """Compiles a jitted function for some arguments.

    Args:
      function: the result of `jax.jit`.
      arguments: arrays, or shapes with dtypes and shardings.

    Returns:
      The compiled function. Calling it never compiles again: other shapes are an error.
    """
    compiled = function.lower(*arguments).compile()
    finish_startup()
    return compiled


def finish_startup() -> None:
    """Releases what only the start of a process needs. Call it once the step is compiled.

    The memory that the compiler used returns to the operating system. On a laptop it is as much as
    a small run needs. If garbage collection is disabled, as it is while a command starts, it is
    enabled again, and ignores the objects that exist by now.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
