"""Runs every test on eight CPU devices, and provides fixtures with small models and data."""

import ctypes
import gc
import importlib.metadata
import os
import signal
import sys
import threading

# A shell starts background jobs with SIGINT ignored, and child processes inherit that. Some tests
# interrupt the processes that they start, so restore the default.
if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):
    signal.signal(signal.SIGINT, signal.default_int_handler)

# XLA reads these flags when jax starts. Compilation takes most of the tests' time, so these flags
# reduce LLVM's optimizations. XLA itself compiles the same program.
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # With eight devices on two busy cores, a device may reach a collective late without a deadlock.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
# Without MLIR's fusion emitters a sharded step compiles in a third of the time. Later versions of
# jaxlib have no other emitters.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS += ("--xla_cpu_use_fusion_emitters=false",)
_GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_GIVEN, *(flag for flag in _FLAGS if flag.split("=")[0] not in _GIVEN)]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from runs import dictation

import msllm
from msllm import step as step_lib
from msllm.config import ModelConfig, StreamsConfig, TokenizerConfig
from msllm.data.loader import Loader
from msllm.data.prepare import prepare
from msllm.model.model import init_parameters
from msllm.sharding import make_mesh
from msllm.step import Program
from msllm.streams import StreamSpec
from msllm.tokenizer import Tokenizer
from msllm.tokenizer import train as train_tokenizer
from msllm.training import with_vocabulary
from msllm.weights.load import LoadedModel

# The backend of this process has read its settings for eight devices. Subprocesses may have fewer
# devices, so they must not inherit PJRT_NPROC.
msllm.configure_jax()
jax.devices()
os.environ.pop("PJRT_NPROC")

# Examples that compile take seconds, so there is no deadline. `derandomize` draws the same examples
# in every run, which makes failures repeatable.
hypothesis.settings.register_profile("msllm", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("msllm")


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    """Frees compiled programs after each module; together they fill a small machine's memory."""
    yield
    jax.clear_caches()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@pytest.fixture(autouse=True)
def restored_signals():
    """Fails a test that changes how this process handles signals. Later tests could end it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    after = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if after[number] is not handler:
            signal.signal(number, handler)
    assert after == before


@pytest.fixture
def make_model():
    """A function make_model(streams=3, seed=0, lag=None, **settings) that makes a small model.

    `settings` are fields of ModelConfig, or visibility, skip_silence, delays and combine of
    StreamsConfig.
    """

    def make(streams=3, seed=0, lag=None, **settings) -> LoadedModel:
        names = ("user", "thought", "output", "tool", "system")[:streams]
        kinds = ("input", "thought", "output", "input", "input")[:streams]
        if streams == 1:
            kinds = ("output",)
        fields = {
            field: settings.pop(field)
            for field in ("visibility", "skip_silence", "delays", "lags", "combine")
            if field in settings
        }
        spec = StreamSpec.from_config(StreamsConfig(names=names, kinds=kinds, **fields))
        sizes = {
            "vocab_size": 32,
            "d_model": 16,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "d_ff": 32,
        }
        config = ModelConfig(**(sizes | settings))
        parameters = init_parameters(config, spec, seed)
        # Freshly initialized parameters are nearly symmetric (norms of 1, no biases) and could hide
        # mistakes, so add noise.
        leaves, tree = jax.tree.flatten(parameters)
        keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
        noise = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
        parameters = jax.tree.unflatten(tree, [leaf + extra for leaf, extra in zip(leaves, noise)])
        model = LoadedModel(config, spec, parameters)
        if lag is not None:
            model = model.with_streams(lag=tuple(map(tuple, np.asarray(lag).tolist())))
        return model

    return make


@pytest.fixture
def letters() -> Tokenizer:
    """A character tokenizer for the letters a to i and the space."""
    config = TokenizerConfig(model_type="char", vocab_size=16)
    return train_tokenizer(["abc def ghi"] * 20, config)


@pytest.fixture
def make_unimportable(monkeypatch):
    """A function make_unimportable(name) that removes a module in tests/, such as outside.layer."""

    def remove(name: str) -> None:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.endswith("tests")])

    return remove


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """Caches compiled programs on disk for the test session and its subprocesses."""
    folder = str(tmp_path_factory.getbasetemp() / "compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def compile_fast():
    """Compiles steps without LLVM's optimizations.

    Not for tests that compare with a subprocess: subprocesses compile with them.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_lib, "compiler_options", lambda platform: {})
        yield


@pytest.fixture
def data_dir(tmp_path_factory):
    """A directory of prepared dictation examples, shared by all tests of a session. Read only."""
    out = tmp_path_factory.getbasetemp() / "dictation"
    prepare(dictation(), out)
    return str(out)


@pytest.fixture
def loaded(data_dir) -> LoadedModel:
    """An untrained model for the examples in `data_dir`, as if loaded from a checkpoint."""
    config = dictation(**{"data.dir": data_dir})
    streams = StreamSpec.from_config(config.streams)
    tokenizer = Loader(config.data, "eval", streams).tokenizer
    config = with_vocabulary(config, tokenizer.vocab_size)
    program = Program(config, streams, make_mesh(config.mesh), tokenizer.silence_id)
    parameters = program.init().parameters
    return LoadedModel(config.model, streams, parameters, tokenizer, "", 0, config)


class Clock:
    """Stands in for the module `time`. The time is `now`, which only the test changes."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    time = process_time = monotonic


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock that `msllm.monitor` and `msllm.runtime.progress` read."""
    clock = Clock()
    monkeypatch.setattr("msllm.monitor.time", clock)
    monkeypatch.setattr("msllm.runtime.progress.time", clock)
    return clock
