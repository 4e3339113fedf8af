"""Compiler options by hardware, each with its reason."""

from __future__ import annotations

import ctypes
import functools
import gc

import jax
from etils import epath

OPTIONS: dict[str, dict[str, int | bool | str]] = {
    # The loops that matter run in libraries, so what makes LLVM's work less makes the start quicker and steps no slower:
    # -O1 compiles a train step in half the time; without fusion emitters (MLIR) and expensive passes, in a third less. LLVM
    # then vectorizes no loop that overwrites its operand, which costs a step 4 % at most: the loss has none (loss.py).
    "cpu": {
        "xla_backend_optimization_level": 1,
        "xla_cpu_use_fusion_emitters": False,
        "xla_llvm_disable_expensive_passes": True,
    },
}


@functools.cache
def compiler_options(platform: str) -> dict[str, int | bool | str]:
    """Options for `jax.jit(..., compiler_options=...)` on devices of `platform` (cpu, gpu, tpu), as far as the installed
    compiler has them: they come and go with its versions."""
    options = OPTIONS.get(platform, {})
    if not options or _exists(
        platform, options
    ):  # the platform of no option may be absent: programs are compiled for it, too
        return options
    return {name: value for name, value in options.items() if _exists(platform, {name: value})}


def _exists(platform: str, option: dict[str, int | bool | str]) -> bool:
    try:
        with jax.default_device(jax.local_devices(backend=platform)[0]):
            jax.jit(lambda: 0, compiler_options=option).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True


def keep_compiled(setting: str, default: epath.Path) -> None:
    """Keeps compiled programs for the next start, in the directory `setting`; `auto`: in `default`; `none`: nowhere.

    A directory that the user has given to JAX stays. In a run of several processes, the first one writes it.
    """
    if setting == "none" or jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", str(default if setting == "auto" else setting))
    # By default JAX keeps only what takes a second: here, a restart should compile nothing.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def compile_step(function, *arguments):
    """Compiles a jitted function for arguments (arrays or shapes); calling the result can never compile again."""
    compiled = function.lower(*arguments).compile()
    settle()
    return compiled


def settle() -> None:
    """To be called when the step is there: what a start needed, and a run does not, goes.

    Returns the memory that the compiler used to the operating system: on a laptop it is as much as a small run needs. If
    garbage collection is off, as while a command starts, it is on from here, and passes over what exists by now.
    """
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
