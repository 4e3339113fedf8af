"""Settings that XLA reads only from environment variables when it starts."""

from __future__ import annotations

import os
import re
import sys
import warnings

from msllm.errors import UserError

# Loop unrolling takes a quarter of the time in which XLA:CPU compiles a train step, and does not
# make the step faster.
_UNROLLING = "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling"
_THREADS_PER_DEVICE = 16


def configure_jax() -> None:
    """Sets the environment variables that make XLA compile fast and run well on CPU.

    Commands call this when they start. Notebooks and scripts should call it before jax first uses a
    device, for example before the first `jnp` array. A later call has no effect, and warns with a
    RuntimeWarning. Variables that are already set keep their values.
    """
    wanted = _settings()
    if not wanted:
        return
    if jax_has_started():
        warnings.warn(
            f"{' and '.join(wanted)} cannot be set any more, because jax has already started: "
            "call msllm.configure_jax() before jax first uses a device",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    os.environ.update(wanted)


def refuse_x64() -> None:
    """Raises UserError if JAX would compute in 64 bits.

    Arrays would silently get other types than checkpoints and compiled programs have.
    """
    enabled = os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true", "t", "yes", "y", "on")
    if "jax" in sys.modules:
        import jax

        enabled = jax.config.read("jax_enable_x64")
    if enabled:
        raise UserError(
            "JAX_ENABLE_X64 is on: msllm computes in 32 bits and below; unset JAX_ENABLE_X64, and"
            " do not set jax_enable_x64"
        )


def jax_has_started() -> bool:
    """Returns whether JAX has initialized its backends, and so read the environment."""
    if "jax" not in sys.modules:
        return False
    # There is no public function. jax.distributed asks in the same way.
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def _settings() -> dict[str, str]:
    """The environment variables to change, with their new values."""
    wanted = {}
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_extra_options" not in flags:
        wanted["XLA_FLAGS"] = f"{flags} {_UNROLLING}".strip()
    # A waiting collective occupies a thread of XLA's CPU backend, which has as many threads as
    # there are cores or devices. So several virtual devices on few cores can wait for each other
    # forever. Sixteen threads per device are enough.
    virtual = re.search(r"--xla_force_host_platform_device_count=(\d+)", flags)
    if virtual and "PJRT_NPROC" not in os.environ:
        threads = max(_THREADS_PER_DEVICE * int(virtual[1]), os.cpu_count() or 1)
        wanted["PJRT_NPROC"] = str(threads)
    return wanted
