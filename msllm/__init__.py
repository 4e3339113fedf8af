"""msllm: pretrain and run multi-stream language models in JAX."""

import os as _os
import re as _re

__version__ = "0.1.0"

# XLA reads it when it starts, and has no compiler option for it: to unroll loops takes XLA:CPU a fourth of the time that a
# train step compiles, and makes it no quicker.
if "xla_backend_extra_options" not in (_flags := _os.environ.get("XLA_FLAGS", "")):
    _os.environ["XLA_FLAGS"] = (
        f"{_flags} --xla_backend_extra_options=xla_cpu_disable_loop_unrolling".strip()
    )

# XLA's CPU backend holds a thread in each collective that waits, and has as many threads as cores or devices: virtual
# devices on few cores then wait for each other for ever. Sixteen for each suffice; the backend reads this when it starts.
if _virtual := _re.search(r"--xla_force_host_platform_device_count=(\d+)", _flags):
    _os.environ.setdefault("PJRT_NPROC", str(max(16 * int(_virtual[1]), _os.cpu_count() or 1)))
