"""The parts of `msllm bench gpu`. A worker process runs them (`python -m msllm.bench.gpu_parts`).

A part is a generator of results, which are dictionaries for JSON. `line` is text for the terminal.
`passed` is false if a check failed, and `error` is the traceback of one that raised an error.

Without a GPU only the smallest sizes run. The kernels are then interpreted, and XLA's attention
stands in for cuDNN.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from msllm.bench.timing import timed
from msllm.bench.train import accelerator_rates, random_tables
from msllm.config import (
    Config,
    DataConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    StreamsConfig,
)
from msllm.decode.engine import Engine
from msllm.errors import UserError
from msllm.model.attention.backend import Backend
from msllm.model.attention.dispatch import choose_backend, get_backend
from msllm.model.attention.gpu import TILES, Tile, Tiles, gpu_attention
from msllm.model.attention.reference import reference_attention
from msllm.model.model import init_parameters
from msllm.runtime import environment
from msllm.runtime.compiler import compile_step
from msllm.runtime.flops import attention_flops, train_flops, visible_pairs
from msllm.runtime.hardware import lookup
from msllm.sharding import make_mesh
from msllm.step import Program
from msllm.streams import NEVER, Cells, StreamSpec, Visibility, lag_matrix, make_cells
from msllm.weights.load import LoadedModel

Result = dict[str, Any]
Results = Iterator[Result]
Attend = Callable[..., jax.Array]  # see `Backend.attend`


class Case(NamedTuple):
    """Inputs of attention on which a backend is compared with the reference."""

    name: str
    streams: int
    lag: str  # a preset of `lag_matrix`, or `random`
    packed: bool = False  # several examples, absent and silent cells, and empty rows
    head_dim: int = 128
    float32: bool = False  # also in float32
    large: bool = False  # as many cells as in training, and one table with fewer heads


CASES = (
    Case("s8", 8, "block_causal"),
    Case("s8_packed", 8, "block_causal", packed=True, float32=True),
    Case("s8_random_packed", 8, "random", packed=True, float32=True),
    Case("s8_same_row_packed", 8, "same_row", packed=True),
    Case("s8_isolated_packed", 8, "isolated", packed=True),
    Case("s1", 1, "block_causal"),
    Case("s8_large_packed", 8, "block_causal", packed=True, large=True),
    Case("s10_random_packed_h64", 10, "random", packed=True, head_dim=64),
    Case("s1_packed_h64", 1, "same_row", packed=True, head_dim=64, float32=True),
    Case("s32_random_packed_h16", 32, "random", packed=True, head_dim=16),
)


class Sizes(NamedTuple):
    """The sizes of all parts.

    Attributes:
      model: the model of training and decoding.
      cells: L = T * S, the cells of a table in training.
      batch: tables of a training step.
      steps: measured training steps.
      attention_batch: tables for attention alone.
      matmul: width of the square matrices of the measured matmul.
      copied_mib: MiB of the measured copy.
      numerics_cells: L of the small cases of `numerics`; the large one has `cells`.
      filled: rows of a session before decoding is measured.
      calls: measured calls of `Session.run`, of 32 rows each.
      decoded: numbers of streams with which decoding is measured.
      cases: the cases of `numerics`.
      forms: the forms of attention that are measured alone, each with its number of streams.
    """

    model: ModelConfig
    cells: int
    batch: int
    steps: int
    attention_batch: int
    matmul: int
    copied_mib: int
    numerics_cells: int
    filled: int
    calls: int
    decoded: tuple[int, ...]
    cases: tuple[Case, ...]
    forms: tuple[tuple[str, int], ...]


FULL = Sizes(
    # Qwen3-1.7B: 1.72 B parameters with one stream.
    model=ModelConfig(
        vocab_size=151_936,
        d_model=2048,
        d_ff=6144,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        compute_dtype="bfloat16",
    ),
    cells=8192,
    batch=4,
    steps=8,
    attention_batch=2,
    matmul=8192,
    copied_mib=4096,
    numerics_cells=2048,
    filled=512,
    calls=4,
    decoded=(8, 1, 10),
    cases=CASES,
    forms=(("gpu", 8), ("cudnn", 1), ("gpu", 1), ("dense", 8), ("cudnn_mask", 8)),
)
SMALL = Sizes(
    model=ModelConfig(
        vocab_size=64,
        d_model=32,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        compute_dtype="bfloat16",
    ),
    cells=64,
    batch=2,
    steps=2,
    attention_batch=1,
    matmul=128,
    copied_mib=1,
    numerics_cells=64,
    filled=32,
    calls=1,
    decoded=(8,),
    cases=tuple(case for case in CASES if case.name == "s8_random_packed"),
    forms=(("gpu", 8), ("cudnn_mask", 8)),
)
# The block sizes of interpreted kernels.
_INTERPRETED = Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2))
# In float32 blocks take twice the memory. The model does not use the kernels in float32. Here they
# tell an error of the algorithm from rounding.
_FLOAT32_TILES = Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))


def serve(sizes: Sizes) -> int:
    """Runs the parts whose names arrive on standard input, and prints results as JSON lines.

    After each part it prints {"end": error}, where the error is empty if the part ran to its end.
    After an error the process ends, because the state of the GPU is not known.

    Returns:
      The exit status.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the results

    def emit(result: Result) -> None:
        print(json.dumps(result), file=out, flush=True)

    if not on_gpu():  # compiling takes longer than running
        jax.config.update("jax_disable_most_optimizations", True)

    for line in sys.stdin:
        error = ""
        try:
            for result in PARTS[line.strip()](sizes):
                emit(result)
        except UserError as problem:
            error = str(problem)
        except Exception:  # the parent records it
            error = traceback.format_exc()
        emit({"end": error})
        if error:
            return 1
        # The next part needs the memory.
        jax.clear_caches()
        gc.collect()
    return 0


def _measure(setting: Result, function: Callable[[], Results]) -> Results:
    """Yields the results of one measurement of a part, or its error: the others go on."""
    try:
        yield from function()
    except Exception:  # a compiler or a GPU may raise anything
        yield {**setting, "passed": False, "error": traceback.format_exc()}


def on_gpu() -> bool:
    """Whether the first device is a GPU."""
    return jax.devices()[0].platform == "gpu"


# The device.


def device(sizes: Sizes) -> Results:
    """Versions, and the rates of a matmul and of a copy: what the GPU reaches in practice."""
    first = jax.devices()[0]
    if sizes is not SMALL and not on_gpu():
        raise UserError(
            f"bench gpu needs a GPU, but jax finds {first.device_kind!r}; --small runs anywhere"
        )
    if on_gpu():
        lag = lag_matrix("block_causal", 8)
        model = dataclasses.replace(sizes.model, attention="gpu")
        choose_backend(model, lag, sizes.cells // 8, make_mesh(MeshConfig(), [first]))
    yield {
        "device_kind": first.device_kind,
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform_version": " ".join(first.client.platform_version.split()),
        "memory_limit_gib": round((first.memory_stats() or {}).get("bytes_limit", 0) / 2**30, 1),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "line": first.device_kind,
    }
    # Random numbers: GPUs multiply zeros faster.
    key = jax.random.key(0)
    a = jax.random.normal(key, (sizes.matmul, sizes.matmul), jnp.bfloat16)
    seconds = _seconds(jax.jit(jnp.matmul), (a, a))
    matmul = 2 * sizes.matmul**3 / seconds
    x = jax.random.normal(key, (sizes.copied_mib * 2**18,), jnp.float32)
    copy = 2 * x.nbytes / _seconds(jax.jit(jnp.negative), (x,))
    yield {
        "matmul_tflop_per_second": round(matmul / 1e12, 3),
        "copy_gb_per_second": round(copy / 1e9, 1),
        "line": f"matmul {matmul / 1e12:.0f} TFLOP/s, copy {copy / 1e9:.0f} GB/s",
    }


def _seconds(function: Callable, inputs: Sequence[Any], repeats: int = 5, queued: int = 4) -> float:
    """Returns the median time of a call. `queued` calls at a time wait for the device."""

    def call() -> None:
        out = None
        for _ in range(queued):
            out = function(*inputs)
        jax.block_until_ready(out)

    call()  # compiles
    return float(np.median([timed(call)[2] for _ in range(repeats)])) / queued


# Numerics.


# The largest errors, as shares of the largest value. bfloat16 has 8 bits (0.4 %), and operands and
# results are rounded. In float32 the kernels compute in full precision, while XLA may round the
# operands of products to TF32, which has 11 bits.
LIMITS = {"gpu_bfloat16": 0.01, "gpu_float32": 1e-4, "chunked_float32": 0.01}


def numerics(sizes: Sizes) -> Results:
    """Compares attention and its gradients with the reference in float32."""
    worst: dict[str, float] = {}
    checks = failures = 0
    for case in sizes.cases:
        for result in _measure({"case": case.name}, functools.partial(_compare, case, sizes)):
            checks, failures = checks + 1, failures + (not result["passed"])
            if "errors" in result:
                name = result["backend"]
                worst[name] = max(worst.get(name, 0.0), *result["errors"].values())
            yield result
    shown = ", ".join(f"{name} {error:.2g}" for name, error in worst.items())
    yield {"line": f"{checks - failures} of {checks} checks passed; largest errors: {shown}"}


def _compare(case: Case, sizes: Sizes) -> Results:
    """Compares the backends on a case. Each result has the error of each array.

    An error is the largest difference to the reference, relative to its largest value.
    """
    q, k, v, weight, cells, lag = _numerics_inputs(case, sizes)
    (expected,) = _run_attention(reference_attention, (q, k, v, weight), cells, lag, jnp.float32)
    runs: dict[str, tuple[Attend, Any, str]] = {
        "gpu_bfloat16": (gpu_backend().attend, jnp.bfloat16, "highest")
    }
    if case.float32:
        tiles: dict[str, Any] = {"tiles": _FLOAT32_TILES, "interpret": not on_gpu()}
        kernels = functools.partial(gpu_attention, **tiles)
        runs["gpu_float32"] = kernels, jnp.float32, "highest"
        # What a model in float32 uses on a GPU, in the precision that it gets.
        runs["chunked_float32"] = get_backend("chunked").attend, jnp.float32, "default"
    for name, (attend, dtype, precision) in runs.items():
        ours, again = _run_attention(
            attend, (q, k, v, weight), cells, lag, dtype, precision, calls=2
        )
        errors = {}
        for array, mine, reference in zip(("out", "d_q", "d_k", "d_v"), ours, expected):
            largest = max(np.abs(reference).max(), 0.1)  # d_q is 0 if cells see only themselves
            errors[array] = float(f"{np.abs(mine - reference).max() / largest:.3g}")
        repeatable = all(map(np.array_equal, ours, again))
        yield {
            "case": case.name,
            "backend": name,
            "shape": list(q.shape),
            "errors": errors,
            "limit": LIMITS[name],
            "repeatable": repeatable,  # if not, the kernel has a race
            # Not <=: nan fails.
            "passed": all(error < LIMITS[name] for error in errors.values()) and repeatable,
        }


def _run_attention(
    attend: Attend,
    inputs: Sequence[jax.Array],
    cells: Cells,
    lag: np.ndarray,
    dtype: Any,
    precision: str = "highest",
    calls: int = 1,
) -> list[list[np.ndarray]]:
    """Returns, for each call, the output and the gradients of q, k and v as float32.

    Args:
      attend: the backend's function.
      inputs: q, k, v, and the gradient of the output.
      cells: the cells.
      lag: the lag matrix.
      dtype: in which the backend computes.
      precision: of matrix products in float32.
      calls: number of calls with the same inputs.
    """

    @jax.jit
    def run(q, k, v, weight, cells):
        visibility = Visibility(cells, cells, lag, jnp.arange(lag.shape[0]))
        out, pull_back = jax.vjp(lambda *x: attend(*x, visibility), q, k, v)
        return [x.astype(jnp.float32) for x in (out, *pull_back(weight))]

    with jax.default_matmul_precision(precision):
        arrays = [x.astype(dtype) for x in inputs]
        return [jax.device_get(run(*arrays, cells)) for _ in range(calls)]


def _numerics_inputs(case: Case, sizes: Sizes) -> tuple:
    """Returns q, k, v, the gradient of the output (all bfloat16), the cells, and the lags."""
    rng, streams = np.random.default_rng(len(case.name)), case.streams
    batch, heads, kv_heads = (1, 2, 1) if case.large else (2, 4, 2)
    # An odd number of rows, so that the cells do not fill the last block.
    rows = (sizes.cells if case.large else sizes.numerics_cells) // streams - 1
    head_dim = min(case.head_dim, sizes.model.head_dim)

    def make(heads: int) -> jax.Array:
        shape = (batch, rows, streams, heads, head_dim)
        return jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)

    present, silent = np.ones((batch, rows, streams), bool), None
    segment = np.ones((batch, rows), np.int32)
    if case.packed:
        present, silent = rng.random(present.shape) >= 0.2, rng.random(present.shape) < 0.2
        segment = np.sort(rng.integers(1, 4, segment.shape), axis=1).astype(np.int32)
        segment[0, rows - rows // 5 :] = 0
    cells = jax.tree.map(jnp.asarray, make_cells(present, segment, silent))
    if case.lag == "random":
        lag = rng.choice([0, 1, 2, 5, NEVER], (streams, streams)).astype(np.int32)
    else:
        lag = lag_matrix(case.lag, streams)
    return make(heads), make(kv_heads), make(kv_heads), make(heads), cells, lag


# Forms of attention.


def gpu_backend(tiles: Tiles | None = None) -> Backend:
    """The kernels of msllm; interpreted if there is no GPU."""
    if on_gpu():
        return get_backend("gpu").with_options(tiles=tiles)
    return get_backend("gpu").with_options(tiles=_INTERPRETED, interpret=True)


def _implementation(name: str) -> Any:
    """`name`, an implementation in `jax.nn.dot_product_attention`, or "xla" without a GPU."""
    return name if on_gpu() else "xla"


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility) -> jax.Array:
    """Causal attention of full tables with one stream by cuDNN (`Backend.attend`)."""
    del visibility

    def attend(q, k, v):
        implementation = _implementation("cudnn")
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return save_residuals(attend)(*(x[:, :, 0] for x in (q, k, v)))[:, :, None]


def dense_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, visibility: Visibility, *, cudnn: bool = False
) -> jax.Array:
    """Attention over the cells of all streams as one sequence, with a mask [B, 1, L, L].

    Args:
      q, k, v, visibility: as in `Backend.attend`.
      cudnn: True: cuDNN gets the mask as a bias. False: XLA computes all scores [B, N, L, L].
    """
    batch, rows, streams = q.shape[:3]
    cells = rows * streams
    mask = visibility.mask().reshape(batch, 1, cells, cells)

    def attend(q, k, v):
        implementation = _implementation("cudnn" if cudnn else "xla")
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

    flat = (x.reshape(batch, cells, *x.shape[3:]) for x in (q, k, v))
    # XLA's residuals hold all scores, which is too much to save for each layer.
    out = (save_residuals(attend) if cudnn and on_gpu() else attend)(*flat)
    return out.reshape(q.shape)


def save_residuals(attend: Attend) -> Attend:
    """Wraps attention so that the remat policies save all that its backward pass needs.

    They save what is named "attention". Without the name, the backward pass would compute the
    forward pass again, which the kernels of msllm do not have to.
    """

    def forward(q, k, v):
        out, pull_back = jax.vjp(attend, q, k, v)
        leaves, tree = jax.tree.flatten(pull_back)
        given = {id(x) for x in (q, k, v)}  # saved under another name
        named = [x if id(x) in given else checkpoint_name(x, "attention") for x in leaves]
        return checkpoint_name(out, "attention"), jax.tree.unflatten(tree, named)

    wrapped = jax.custom_vjp(attend)
    wrapped.defvjp(forward, lambda pull_back, d_out: pull_back(d_out))
    return wrapped


def backend_of(form: str) -> Backend:
    """The backend of a form of attention: gpu, cudnn, dense or cudnn_mask."""
    if form == "gpu":
        return gpu_backend()
    return {
        "cudnn": Backend("cudnn", cudnn_attention),
        "dense": Backend("dense", dense_attention),
        "cudnn_mask": Backend("cudnn_mask", functools.partial(dense_attention, cudnn=True)),
    }[form]


def _rates(flops: float, seconds: float) -> Result:
    """Returns TFLOP/s, and the share of the device's peak if it is known."""
    return accelerator_rates(jax.devices()[0], flops / seconds, "bfloat16")


# Training.


def train_program(sizes: Sizes, form: str, streams: int) -> Program:
    """The program of a training part.

    Args:
      sizes: the sizes.
      form: as in `backend_of`.
      streams: S. A table has `sizes.cells` cells.
    """
    # The dense form holds the scores of one table at a time.
    accumulate = sizes.batch if form == "dense" else 1
    config = Config(
        model=dataclasses.replace(sizes.model, attention="chunked", remat="dots"),
        streams=_streams_config(streams),
        data=DataConfig(rows=sizes.cells // streams, batch_size=sizes.batch),
        loss=LossConfig(chunk_tokens=min(2048, sizes.cells)),
        optim=OptimConfig(accumulate=accumulate),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = Program(config, StreamSpec.from_config(config.streams), mesh)
    program.backend = backend_of(form)
    return program


def _streams_config(size: int) -> StreamsConfig:
    return StreamsConfig(names=tuple(f"s{i}" for i in range(size)), kinds=("output",) * size)


def train(sizes: Sizes, form: str, streams: int) -> Results:
    """Measures the train step. The tables are full, and `flops.py` counts what they need."""
    program = train_program(sizes, form, streams)
    config = program.config
    setting = {
        "attention": form,
        "rows": config.data.rows,
        "batch": sizes.batch,
        "accumulate": config.optim.accumulate,
        "remat": config.model.remat,
        "parameters": sum(x.size for x in jax.tree.leaves(program.abstract_state.parameters)),
    }
    yield setting
    tables = random_tables(
        {
            "batch": sizes.batch,
            "rows": config.data.rows,
            "streams": streams,
            "vocab_size": config.model.vocab_size,
        }
    )
    batch = {
        name: jax.device_put(tables[name], x.sharding) for name, x in program.abstract_batch.items()
    }
    state = program.init()
    step, _, seconds = timed(compile_step, program.step, state, batch)
    memory: Any = step.memory_analysis()
    yield {
        "compile_seconds": round(seconds, 1),
        "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 2),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 2),
    }
    state, metrics = jax.block_until_ready(step(state, batch))
    first = {name: float(metrics[name]) for name in ("loss", "gradient_norm")}
    # Equal parameters and tables: comparable between forms with the same number of streams.
    yield {**first, "passed": bool(np.isfinite(list(first.values())).all())}

    times = []
    for _ in range(sizes.steps):
        (state, metrics), _, wall = timed(_run_step, step, state, batch)
        times.append(wall)
    wall = float(np.median(times))
    flops = train_flops(config.model, program.streams, sizes.batch, config.data.rows)
    rates = _rates(flops, wall)
    tokens = sizes.batch * sizes.cells / wall
    share = f"MFU {100 * rates['mfu']:.1f} %, " if "mfu" in rates else ""
    yield {
        "seconds_per_step": [round(x, 4) for x in times],
        "useful_tflop_per_step": round(flops / 1e12, 6),
        "tokens_per_second": round(tokens, 1),
        **rates,
        "last_loss": float(metrics["loss"]),
        "passed": bool(np.isfinite(float(metrics["loss"]))),
        "line": f"{share}{wall:.3f} s per step, {tokens:.0f} tokens/s",
    }


def _run_step(step: Callable, state: Any, batch: Any) -> Any:
    return jax.block_until_ready(step(state, batch))


# Decoding.


def decode(sizes: Sizes) -> Results:
    """Measures decoding of one session.

    `bytes_per_row` is the least that a row must read: each parameter once in the compute dtype, and
    the keys and values of the rows so far.
    """
    for streams in sizes.decoded:
        function = functools.partial(_measure_decoding, sizes, streams)
        yield from _measure({"streams": streams}, function)
    # Single steps come last, because they compile another function.
    session = _decoding_engine(sizes, sizes.decoded[-1]).open()
    session.run(2)
    session.step()
    walls = [timed(session.step)[2] for _ in range(32 * sizes.calls)]
    yield {"step_streams": sizes.decoded[-1], "step_ms_per_row": _ms(np.median(walls))}


def _decoding_engine(sizes: Sizes, streams: int) -> Engine:
    spec = StreamSpec.from_config(_streams_config(streams))
    parameters = jax.jit(functools.partial(init_parameters, sizes.model, spec, 0))()
    model = LoadedModel(sizes.model, spec, parameters)
    return Engine(model, window=2 * sizes.filled, sessions=2, silence_id=0)


def _measure_decoding(sizes: Sizes, streams: int) -> Results:
    engine, model = _decoding_engine(sizes, streams), sizes.model
    session = engine.open()
    session.run(sizes.filled + 1)  # compiles; and the first row takes no computation
    walls, rows = [], 32
    for _ in range(sizes.calls):
        walls.append(timed(session.run, rows)[2] / rows)
    seen = sizes.filled + rows * sizes.calls / 2  # on average
    itemsize = jnp.dtype(model.compute_dtype).itemsize
    weights = sum(x.size for x in jax.tree.leaves(engine.model.parameters)) * itemsize
    cells = 2 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize * streams
    read, wall = weights + cells * seen, float(np.median(walls))
    session.close()
    result = {
        "streams": streams,
        "ms_per_row": _ms(wall),
        "rows_per_second": round(1 / wall, 1),
        "tokens_per_second": round(streams / wall, 1),
        "rows_seen": round(seen),
        "bytes_per_row": round(read),
        "gb_per_second": round(read / wall / 1e9, 3),
        "line": f"S = {streams}: {_ms(wall)} ms per row",
    }
    if hardware := lookup(jax.devices()[0].device_kind):
        share = result["bandwidth_share"] = round(read / wall / hardware.hbm_bandwidth, 4)
        result["line"] += f", {100 * share:.0f} % of the bandwidth"
    yield result


def _ms(seconds: float) -> float:
    return round(1e3 * float(seconds), 3)


# Attention alone.


def attention(sizes: Sizes) -> Results:
    """Measures the forms of attention alone, with the heads of the model and full tables."""
    for form, streams in sizes.forms:
        setting = {"attention": form, "streams": streams}
        function = functools.partial(_measure_form, sizes, setting)
        yield from _measure(setting, function)


def _measure_form(sizes: Sizes, setting: Result) -> Results:
    backend = backend_of(setting["attention"])
    yield {**setting, **_measure_attention(sizes, backend, setting["streams"], setting)}


def _measure_attention(
    sizes: Sizes, backend: Backend, streams: int, setting: Result, forward: bool = True
) -> Result:
    """Returns times and rates of the forward pass, and of forward and backward (`both`)."""
    model, batch, rows = sizes.model, sizes.attention_batch, sizes.cells // streams
    shape = (batch, rows, streams)

    def make(seed: int, heads: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), (*shape, heads, model.head_dim), "bfloat16")

    q, k, v = (make(i, n) for i, n in enumerate((model.num_heads, *[model.num_kv_heads] * 2)))
    full = make_cells(np.ones(shape, bool), np.ones(shape[:2], np.int32))
    cells, lag = jax.tree.map(jnp.asarray, full), lag_matrix("block_causal", streams)

    def attend(q, k, v, cells):
        return backend.attend(q, k, v, Visibility(cells, cells, lag, jnp.arange(streams)))

    def both(q, k, v, cells):
        out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, cells), q, k, v)
        return out, pull_back(out)

    flops = attention_flops(model.num_heads, model.head_dim, batch * visible_pairs(lag, rows))
    result: dict[str, Any] = {}
    shown: list[str] = []
    passes = {"forward": (attend, flops), "both": (both, 3 * flops)}
    for name in ("forward", "both") if forward else ("both",):
        function, work = passes[name]
        seconds = _seconds(jax.jit(function), (q, k, v, cells))
        rates = _rates(work, seconds)
        result |= {f"{name}_ms": _ms(seconds), **{f"{name}_{x}": rates[x] for x in rates}}
        shown.append(f"{rates['tflop_per_second_per_device']:.0f}")
    title = " ".join(f"{value}" for value in setting.values())
    return {**result, "line": f"{title}: {' and '.join(shown)} TFLOP/s"}


def tiles(sizes: Sizes) -> Results:
    """Measures other block sizes, one kernel at a time."""
    if not on_gpu():
        yield {"line": "needs a GPU"}
        return
    default = TILES[sizes.model.head_dim if sizes.model.head_dim in TILES else 64]
    yield {"tiles": "default", **_measure_attention(sizes, gpu_backend(), 8, {"": "default"})}
    others = {
        "forward": [(128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 8, 4)],
        "d_kv": [(64, 64, 4, 2), (32, 128, 8, 3), (64, 128, 8, 1), (128, 128, 8, 2)],
        "d_q": [(128, 64, 8, 3), (64, 64, 4, 2), (128, 32, 8, 3), (128, 128, 8, 2)],
    }
    for kernel, choices in others.items():
        for choice in choices:
            setting = {"kernel": kernel, "tile": list(choice)}
            backend = gpu_backend(default._replace(**{kernel: Tile(*choice)}))
            try:
                result = _measure_attention(sizes, backend, 8, {}, forward=kernel == "forward")
                del result["line"]
                yield {**setting, **result}
            except Exception:  # too much shared memory, most likely: no failure
                yield {**setting, "refused": traceback.format_exc()}


PARTS: dict[str, Callable[[Sizes], Results]] = {
    "device": device,
    "numerics": numerics,
    "train_gpu_s8": functools.partial(train, form="gpu", streams=8),
    "train_cudnn_s1": functools.partial(train, form="cudnn", streams=1),
    "decode": decode,
    "train_dense_s8": functools.partial(train, form="dense", streams=8),
    "attention": attention,
    "train_cudnn_mask_s8": functools.partial(train, form="cudnn_mask", streams=8),
    "train_gpu_s1": functools.partial(train, form="gpu", streams=1),
    "tiles": tiles,
}


def main() -> int:
    """Runs a worker: its one argument says in JSON whether the sizes are small."""
    environment.configure_jax()
    return serve(SMALL if json.loads(sys.argv[1]) else FULL)
