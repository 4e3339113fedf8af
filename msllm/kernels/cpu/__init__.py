"""Kernels for CPUs in C++, where XLA's own are far from the machine's limits; `*.cc` beside this file, called through JAX's
foreign function interface.

The machine's own compiler makes them for its own CPU when they are first needed (some seconds), and they stay in
`~/.cache/msllm` (`$XDG_CACHE_HOME`). Without a compiler everything runs without them: `missing` says why.
"""

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
import jax.numpy as jnp
import jaxlib
import numpy as np

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
PANEL = 32  # see products.h
TARGETS = (
    *("msllm_products", "msllm_product_transposed", "msllm_attend_row", "msllm_write_row"),
    *("msllm_attention", "msllm_attention_gradients"),
)

log = logging.getLogger("msllm")


@functools.cache
def unavailable_reason() -> str | None:
    """Makes the kernels known to XLA. Returns why that is not possible; None if they are there."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        return "there is no C++ compiler (c++, g++ or clang++; $CXX names another)"
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {(error.stderr.strip().splitlines() or ['it says nothing'])[0]}"
    except (OSError, RuntimeError) as error:  # the latter: nobody's home
        return str(error)
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def _build(compiler: str) -> pathlib.Path:
    """The library, made if it is not there yet. Its name says what it was made of: sources, XLA's interface, compiler, CPU."""
    folder = pathlib.Path(__file__).parent
    sources = sorted(path for path in folder.iterdir() if path.suffix in (".cc", ".h"))
    run = functools.partial(
        subprocess.run, check=True, text=True, stdin=subprocess.DEVNULL, capture_output=True
    )
    macros = run(
        [compiler, *FLAGS, "-dM", "-E", "-x", "c++", "-"]
    ).stdout  # the compiler and what the CPU can do
    made_of = [path.read_text() for path in sources] + [jaxlib.__version__, macros]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "msllm"
    library = cache / f"native-{digest}.so"
    if not library.exists():
        log.info("making kernels for this CPU with %s: %s", compiler, library)
        cache.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        units = [str(path) for path in sources if path.suffix == ".cc"]
        try:
            run([compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", *units, "-o", str(part)])
            part.replace(library)
        finally:
            part.unlink(missing_ok=True)
    return library


def pack(weight: jax.Array, axis: int) -> jax.Array:
    """The same numbers, and the same shape, in the order in which `products` reads them: PANEL columns at a time.

    Args:
      weight: [K, ...] (`axis` 0) or [N, ...] (`axis` 1); its other dimensions are taken as one.
    """
    rows = weight.reshape(weight.shape[0], -1)
    columns = rows if axis else rows.T  # [N, K]
    end = len(columns) // PANEL * PANEL
    panels = columns[:end].reshape(-1, PANEL, columns.shape[1]).swapaxes(1, 2)
    return jnp.concatenate([panels.ravel(), columns[end:].T.ravel()]).reshape(weight.shape)


def products(x: jax.Array, weights: list[jax.Array], axis: int) -> list[jax.Array]:
    """x [M, K] times each packed weight [K, N] (`axis` 0) or [N, K] (`axis` 1): [M, N]; all float32, or all bfloat16, summed in
    float32."""
    out = [jax.ShapeDtypeStruct((x.shape[0], w.shape[1 - axis]), x.dtype) for w in weights]
    return jax.ffi.ffi_call("msllm_products", out)(x, *weights, axis=axis)


def product_transposed(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, K] times w [N, K], which is not packed, both float32 or both bfloat16: [M, N] float32. It reads w once for M up to
    a hundred."""
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32)
    return jax.ffi.ffi_call("msllm_product_transposed", out)(x, w)


def attend_row(
    q, keys, values, mask, filled, scales, masked: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one row over some rows R of a cache, for `cache.attend`, in float32. For keys and values in bfloat16, queries
    and weights are rounded to it, as a TPU and a GPU do, where the CPU multiplies it (AVX-512 BF16) and H is a multiple of 32.
    For int8 they are rounded to eight bits, where it multiplies those (AVX-512 VNNI, VBMI): a query by its largest number, as
    SageAttention does (arXiv 2410.02367), and weights, times the scales of the values, by the largest of a stream.

    Args:
      q: [B, K, Q, H], float32, scaled; Q: heads of a kv head times S. keys: [B, K, S', R / PANEL, H, PANEL]; values:
        [B, K, S', R / PANEL, PANEL, H]; both float32, int8, or uint16, the bits of bfloat16. mask: [B, S, S', R] bool.
      filled: [] int32: rows from here on are not visible, and not read. masked: the score of what is not visible.
      scales: of int8, of keys and of values: R numbers in float32 for each of the S'; else empty.

    Returns: highest scores and sums of e^(score - highest) [B, K, Q, 1], values weighted by these powers [B, K, Q, H].
    """
    one = jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32)
    call = jax.ffi.ffi_call(
        "msllm_attend_row", (one, one, jax.ShapeDtypeStruct(q.shape, jnp.float32))
    )
    return call(q, keys, values, mask, filled, *scales, masked=np.float32(masked))


def write_row(block: list[jax.Array], k: jax.Array, v: jax.Array, at: jax.Array) -> list[jax.Array]:
    """Puts one row of each session into a block of the cache, in its memory, in the numbers that `cache.store` makes of it; a place
    outside of the block writes nothing.

    Args:
      block: keys, with their scales if they are int8, then values in the same way, as `attend_row` has them.
      k, v: [B, 1, S, K, H] float32. at: [B] int32: places in the block.
    """
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in block]
    same = {3 + i: i for i in range(len(block))}
    return jax.ffi.ffi_call("msllm_write_row", out, input_output_aliases=same)(at, k, v, *block)
