"""How programs are compiled: options by platform, the persistent cache, and memory after it."""

from __future__ import annotations

import ctypes
import functools
import gc
from typing import Any

import jax
from etils import epath

OPTIONS: dict[str, dict[str, int | bool | str]] = {
    # The loops that matter run in libraries, so less work for LLVM makes the start quicker and the
    # steps no slower. -O1 halves the time to compile a train step; without fusion emitters (MLIR)
    # and expensive passes it falls by another third. LLVM then does not vectorize a loop that
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

    Options come and go with versions of XLA: those that the installed compiler lacks are left out.
    """
    options = OPTIONS.get(platform, {})
    # A platform without options needs no check, which is as well: it may be absent here, because
    # programs can be compiled for other machines.
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
    """Lets JAX keep compiled programs in a directory, so that the next start compiles nothing.

    A directory that the user has given to JAX is left as it is. In a run of several processes the
    first one writes the cache.

    Args:
      setting: `config.compilation_cache`: a directory; `auto`: `default`; `none`: no cache.
      default: the directory for `auto`.
    """
    if setting == "none" or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    jax.config.update("jax_compilation_cache_dir", str(default if setting == "auto" else setting))
    # By default JAX keeps only programs that take a second to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def compile_step(function: Any, *arguments: Any) -> jax.stages.Compiled:
    """Compiles a jitted function for arguments: arrays, or shapes with shardings.

    Calling the result never compiles again: other shapes are an error.
    """
    compiled = function.lower(*arguments).compile()
    finish_startup()
    return compiled


def finish_startup() -> None:
    """Gives back what only the start of a process needs. Call it once the step is compiled.

    The memory that the compiler used returns to the operating system: on a laptop it is as much as
    a small run needs. If garbage collection is disabled, as it is while a command starts, it is
    enabled from here on, and ignores the objects that exist by now.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
