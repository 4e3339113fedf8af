"""The kernels in C++ against float64 and against XLA, and what happens without a compiler."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msllm import native
from msllm.cache import PANELS, Stored, attend, store

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no kernels in C++: {native.missing()}")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 45), st.integers(1, 90), st.integers(1, 150), st.integers(0, 2**31))
def test_products_are_products(m, k, n, seed):
    random = np.random.default_rng(seed)
    x, w = (random.standard_normal(shape, np.float32) for shape in ((m, k), (k, n)))
    right = x.astype(np.float64) @ w
    outs = [native.products(x, [native.pack(jnp.asarray(w.T if axis else w), axis)], axis)[0] for axis in (0, 1)]
    for out in (*outs, native.product_transposed(x, jnp.asarray(w.T))):
        np.testing.assert_allclose(out, right, atol=3e-6 * k**0.5, rtol=1e-5)


def test_large_products_are_shared_among_threads():
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape, np.float32))
    x, weights = draw(10, 600), [draw(600, n) for n in (3000, 7, 900)]
    right = [np.asarray(x, np.float64) @ np.asarray(w) for w in weights]

    @jax.jit
    def products(x, weights):
        packed = lambda axis: [native.pack(w.T if axis else w, axis) for w in weights]
        both = [native.products(x, packed(axis), axis) for axis in (0, 1)]
        return *both, [native.product_transposed(x, w.T) for w in weights]

    for outs in products(x, weights):
        for out, expected in zip(outs, right, strict=True):
            np.testing.assert_allclose(out, expected, atol=1e-4)


def test_weights_are_packed_panel_after_panel():
    w = jnp.arange(3 * 70).reshape(3, 7, 10)  # 70 columns: two panels and six
    flat, packed = np.asarray(w.reshape(3, 70)), native.pack(w, 0)
    assert packed.shape == w.shape
    expected = [flat[:, :32].ravel(), flat[:, 32:64].ravel(), flat[:, 64:].ravel()]
    np.testing.assert_array_equal(packed.ravel(), np.concatenate(expected))
    back = native.pack(jnp.asarray(flat.T.reshape(70, 3)), 1)
    np.testing.assert_array_equal(back.ravel(), packed.ravel())


def attend_by_kernel(q, keys, values, *rest):
    """`attend`, with blocks whose rows are last put in panels."""
    by_row = lambda block: block.values.transpose(0, 4, 3, 1, 2)
    packed = [[store(by_row(block), jnp.float32, axes) for block in blocks] for axes, blocks in zip(PANELS, (keys, values))]
    return attend(q, *packed, *rest, native.attend_row)


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 40), st.integers(1, 3)),
    st.integers(0, 2**31),
)
def test_attention_of_a_row_is_that_of_xla(sizes, seed):
    batch, kv_heads, of_head, streams, head_dim, rows = sizes
    rows *= native.PANEL
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape, np.float32))
    q = 3 * draw(batch, 1, streams, kv_heads * of_head, head_dim)
    blocks = [[Stored(draw(batch, kv_heads, head_dim, streams, rows), None) for _ in range(2)] for _ in range(2)]
    filled = int(random.integers(1, 2 * rows + 1))
    mask = (random.random((batch, streams, streams, 2 * rows)) < 0.6) & (np.arange(2 * rows) < filled)
    mask[..., 0] = True  # a query sees something
    case = (q, *blocks, jnp.asarray(mask), jnp.int32(filled))
    np.testing.assert_allclose(attend_by_kernel(*case), attend(*case), atol=5e-6)


def test_rows_that_are_not_filled_are_not_read():
    q, filled = jnp.ones((1, 1, 1, 1, 8)), 17
    nothing = [Stored(jnp.full((1, 1, 8, 1, 64), jnp.nan).at[..., :filled].set(1.0), None)]
    mask = (jnp.arange(64) < filled)[None, None, None]
    np.testing.assert_allclose(attend_by_kernel(q, nothing, nothing, mask, jnp.int32(filled)), 1.0, rtol=1e-6)


DECODE = """
import logging; logging.basicConfig(level="INFO")
import jax, numpy as np
from msllm.config import ModelConfig, StreamsConfig
from msllm.decode import Engine
from msllm.load import from_parameters
from msllm.model import init_parameters
from msllm.streams import StreamSpec
config = ModelConfig(vocab_size=64, d_model=32, d_ff=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
streams = StreamSpec.from_config(StreamsConfig(names=("a", "b", "c"), kinds=("output",) * 3))
model = from_parameters(config, streams, jax.jit(lambda: init_parameters(config, streams, 0))())
session = Engine(model, window=32, silence_id=0).open()
print("TOKENS", *np.concatenate([session.step().tokens for _ in range(20)]))
"""


def decode(tmp_path, **environment):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", DECODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("TOKENS")[1], done.stderr


def test_without_a_compiler_decoding_says_so_and_gives_the_same(tmp_path):
    with_kernels, said = decode(tmp_path)
    assert "making kernels for this CPU" in said and len(list(tmp_path.glob("msllm/native-*.so"))) == 1
    again, said = decode(tmp_path)
    assert "making kernels" not in said and again == with_kernels
    for compiler, reason in (("/nowhere/c++", "No such file"), ("false", "false failed")):
        without, said = decode(tmp_path, CXX=compiler)
        assert f"decoding by XLA alone, which is slower with several streams: " in said and reason in said
        assert without == with_kernels
