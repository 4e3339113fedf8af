"""The C++ kernels against float64 and XLA, on older CPUs, and without a compiler."""

import functools
import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msllm.decode.cache import BITS, PANELS, ROWS_LAST, attend, store, write_row
from msllm.kernels import cpu as cpu_kernels
from msllm.model.linear import linear, linear_back

pytestmark = pytest.mark.skipif(
    cpu_kernels.unavailable_reason() is not None,
    reason=f"no C++ kernels: {cpu_kernels.unavailable_reason()}",
)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 45),
    st.integers(1, 90),
    st.integers(1, 150),
    st.integers(0, 2**31),
    st.sampled_from(("float32", "bfloat16")),
)
def test_products_equal_those_in_float64(m, k, n, seed, dtype):
    random = np.random.default_rng(seed)
    x, w = (
        jnp.asarray(random.standard_normal(shape, np.float32), dtype) for shape in ((m, k), (k, n))
    )
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    sums = cpu_kernels.matmul_table(x, cpu_kernels.TableWeight(w.T))
    packed = [cpu_kernels.pack(w, sum_over_first=True), cpu_kernels.pack(w.T, sum_over_first=False)]
    outs = [cpu_kernels.matmul_packed(x, [weight])[0] for weight in packed]
    assert sums.dtype == jnp.float32 and {out.dtype for out in outs} == {x.dtype}
    for out in (sums, *outs):
        rtol = 2**-8 if out.dtype == jnp.bfloat16 else 1e-5
        out = np.asarray(out, np.float64)
        np.testing.assert_allclose(out, expected, atol=3e-6 * k**0.5, rtol=rtol)


def test_products_large_enough_for_several_threads():
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.standard_normal(shape, np.float32))

    x, weights = draw(10, 600), [draw(600, n) for n in (3000, 7, 900)]
    expected = [np.asarray(x, np.float64) @ np.asarray(w) for w in weights]

    @jax.jit
    def products(x, weights):
        return (
            cpu_kernels.matmul_packed(x, [cpu_kernels.pack(w, True) for w in weights]),
            cpu_kernels.matmul_packed(x, [cpu_kernels.pack(w.T, False) for w in weights]),
            [cpu_kernels.matmul_table(x, cpu_kernels.TableWeight(w.T)) for w in weights],
        )

    for outs in products(x, weights):
        for out, product in zip(outs, expected, strict=True):
            np.testing.assert_allclose(out, product, atol=1e-4)


def test_weights_are_packed_into_panels():
    w = jnp.arange(3 * 70).reshape(3, 7, 10)  # 70 columns: two panels of 32, and 6
    flat, packed = np.asarray(w.reshape(3, 70)), cpu_kernels.pack(w, sum_over_first=True)
    assert packed.shape == w.shape and packed.panels.shape == flat.shape
    expected = [flat[:, :32].ravel(), flat[:, 32:64].ravel(), flat[:, 64:].ravel()]
    np.testing.assert_array_equal(packed.panels.ravel(), np.concatenate(expected))
    back = cpu_kernels.pack(jnp.asarray(flat.T.reshape(70, 3)), sum_over_first=False)
    np.testing.assert_array_equal(back.panels, packed.panels)


def test_packed_weights_give_the_same_products_in_the_model():
    """Tests `linear` and `linear_back` with either type of weight."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(random.standard_normal(shape, np.float32))

    x, weights = draw(2, 3, 24), [draw(24, 5, 8), draw(24, 7)]
    packed = [cpu_kernels.pack(w, sum_over_first=True) for w in weights]
    for ours, theirs in zip(linear(x, packed), linear(x, weights), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    x, weight = draw(2, 3, 5, 8), draw(24, 5, 8)
    ours = linear_back(x, cpu_kernels.pack(weight, sum_over_first=False))
    np.testing.assert_allclose(ours, linear_back(x, weight), atol=1e-5)


DTYPES = ("float32", BITS, "int8")


def attend_both(dtype, q, blocks, *rest):
    """The outputs of `attend` with the kernel and with XLA.

    `blocks` are the blocks of keys and the blocks of values, each [B, R, S, K, H].
    """

    def stored(layout):
        keys, values = (
            [store(x, jnp.dtype(dtype), axes) for x in arrays]
            for axes, arrays in zip(layout, blocks)
        )
        return keys, values

    by_kernel = attend(q, *stored(PANELS), *rest, cpu_kernels.attend_row)
    by_xla = attend(q, *stored(ROWS_LAST), *rest)
    return by_kernel, by_xla


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1, 1),
        (2, 2, 3, 5, 7, 1),
        (1, 2, 2, 10, 64, 2),
        (3, 1, 1, 3, 40, 3),
        (1, 1, 7, 3, 64, 1),
    ],
)
def test_attention_of_a_row_equals_xla(sizes, dtype):
    batch, kv_heads, group, streams, head_dim, rows = sizes
    rows *= cpu_kernels.PANEL
    both = jax.jit(functools.partial(attend_both, dtype))
    for seed in range(4):
        random = np.random.default_rng(seed)

        def draw(*shape, random=random):
            return random.standard_normal(shape, np.float32)

        # Multiples of 1/16 up to 127/16. The kernel can round these queries to bfloat16 or to eight
        # bits without error, also after it scales them by 64 ** -0.5.
        q = np.clip(np.round(48 * draw(batch, 1, streams, kv_heads * group, head_dim)), -127, 127)
        q[..., random.integers(head_dim)] = 127
        q = jnp.asarray(q / 16)
        blocks = [
            [draw(batch, rows, streams, kv_heads, head_dim) for _ in range(2)] for _ in range(2)
        ]
        filled = int(random.integers(1, 2 * rows + 1))
        mask = (random.random((batch, streams, streams, 2 * rows)) < 0.6) & (
            np.arange(2 * rows) < filled
        )
        mask[..., 0] = True  # each query sees at least one key
        # Rounding an attention weight to bfloat16 has an error of 2 ** -9 of the weight, and
        # rounding it to eight bits 2 ** -9 of the largest weight. In sums over keys, most of the
        # errors cancel out.
        exact = dtype == "float32" or head_dim % 32
        largest_error, mean_error = (
            (2e-6, 2e-6) if exact else {BITS: (2**-8, 2**-10), "int8": (2**-7, 2**-7)}[dtype]
        )
        ours, theirs = map(np.asarray, both(q, blocks, mask, filled))
        atol = largest_error * np.abs(blocks[1]).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
        assert np.square(ours - theirs).mean() < mean_error**2 * np.square(theirs).mean()
        # The weight of a single key is 1, which needs no rounding.
        one = np.zeros_like(mask)
        one[..., random.integers(streams), random.integers(filled)] = True
        np.testing.assert_allclose(*both(q, blocks, one, filled), atol=1e-6)


def test_rows_that_are_not_filled_are_not_read():
    """These rows hold nan, which would reach the output."""
    q, filled = jnp.ones((1, 1, 1, 1, 8)), 17
    block = [jnp.full((1, 64, 1, 1, 8), jnp.nan).at[:, :filled].set(1.0)]
    mask = (jnp.arange(64) < filled)[None, None, None]
    by_kernel, _ = attend_both("float32", q, [block, block], mask, jnp.int32(filled))
    np.testing.assert_allclose(by_kernel, 1.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [PANELS, ROWS_LAST], ids=["panels", "rows"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (3, 2, 5, 7, 2), (1, 4, 10, 64, 1)])
def test_a_row_is_written_at_its_index(sizes, layout, dtype):
    """Writes into two blocks. An index beyond them writes nothing."""
    batch, kv_heads, streams, head_dim, rows = sizes
    rows *= cpu_kernels.PANEL
    random = np.random.default_rng(0)

    def draw(rows):
        return [
            random.standard_normal((batch, rows, streams, kv_heads, head_dim), np.float32)
            for _ in range(2)
        ]

    def stored(x, axes):
        return [store(jnp.asarray(part), jnp.dtype(dtype), axes) for part in np.split(x, 2, axis=1)]

    write = jax.jit(write_row, static_argnums=(5, 6))
    for _ in range(6):
        old, new, at = draw(2 * rows), draw(1), random.integers(0, 3 * rows, batch)
        new[0][0, 0, random.integers(streams)] = 0  # an int8 scale of 0
        written = write(*map(stored, old, layout), *new, jnp.asarray(at), layout, rows)
        for b in np.flatnonzero(at < 2 * rows):
            for x, row in zip(old, new):
                x[b, at[b]] = row[b, 0]
        expected = [stored(x, axes) for x, axes in zip(old, layout)]
        jax.tree.map(np.testing.assert_array_equal, list(written), expected)


def test_nan_in_a_row_makes_its_int8_scale_nan():
    empty = [
        [store(jnp.zeros((1, cpu_kernels.PANEL, 2, 1, 8)), jnp.dtype("int8"), axes)]
        for axes in PANELS
    ]
    row = jnp.ones((1, 1, 2, 1, 8)).at[..., 1, :, 3].set(jnp.nan)
    for [written] in write_row(*empty, row, row, jnp.array([5]), PANELS, cpu_kernels.PANEL):
        scale = written.scale.reshape(2, cpu_kernels.PANEL)
        assert scale[0, 5] == jnp.float32(1 / 127)
        assert jnp.isnan(scale[1, 5]) and jnp.isnan(scale).sum() == 1


DECODE = """
import logging
logging.basicConfig(level="INFO")
import jax, numpy as np
from msllm.config import ModelConfig, StreamsConfig
from msllm.decode.engine import Engine
from msllm.model.model import init_parameters
from msllm.streams import StreamSpec
from msllm.weights.load import LoadedModel

sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 64, "num_layers": 2}
config = ModelConfig(**sizes, num_heads=4, num_kv_heads=2, head_dim=8)
streams = StreamSpec.from_config(StreamsConfig(names=("a", "b", "c"), kinds=("output",) * 3))
model = LoadedModel(config, streams, jax.jit(lambda: init_parameters(config, streams, 0))())
tokens = []
for dtype in ("float32", "bfloat16", "int8"):
    session = Engine(model, window=32, cache_dtype=dtype, silence_id=0).open()
    tokens += [session.step().tokens for _ in range(20)]
print("TOKENS", *np.concatenate(tokens))
"""


def decode(tmp_path, **environment):
    """Runs DECODE in a new process; returns (its tokens as text, its log)."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    done = subprocess.run(
        [sys.executable, "-c", DECODE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("TOKENS")[1], done.stderr


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """The tokens that the kernels give when they are compiled for this CPU."""
    folder = tmp_path_factory.mktemp("kernels")
    tokens, log = decode(folder)
    assert "compiling kernels for this CPU" in log
    assert len(list(folder.glob("msllm/native-*.so"))) == 1
    again, log = decode(folder)
    assert "compiling kernels" not in log and again == tokens
    return tokens


@pytest.mark.skipif(
    platform.machine() != "x86_64",
    reason=f"the CPU is {platform.machine()}: needs x86-64",
)
@pytest.mark.parametrize("cpu", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_kernels_for_older_cpus_give_the_same_tokens(decoded, tmp_path, cpu):
    """The vectors hold 4, 8 and 16 numbers, without dot-product instructions for short types."""
    if cpu == "x86-64-v4" and "avx512dq" not in pathlib.Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX-512")
    compiler = tmp_path / "c++"
    real = os.environ.get("CXX", "c++")
    compiler.write_text(
        f'#!/bin/bash\narguments=("${{@/-march=native/-march={cpu}}}")\n'
        f'exec {real} "${{arguments[@]/-O3/-O0}}"\n'  # compiles sooner
    )
    compiler.chmod(0o755)
    tokens, log = decode(tmp_path, CXX=str(compiler))
    assert "compiling kernels for this CPU" in log and "decoding by XLA alone" not in log
    assert tokens == decoded


@pytest.mark.parametrize(
    "compiler, reason", [("/nowhere/c++", "No such file"), ("false", "false failed")]
)
def test_without_a_compiler_decoding_warns_and_gives_the_same_tokens(
    decoded, tmp_path, compiler, reason
):
    tokens, log = decode(tmp_path, CXX=compiler)
    assert "decoding by XLA alone, which is slower with several streams: " in log
    assert reason in log
    assert tokens == decoded
