"""The step of an earlier start: when it is loaded, when not, and that it is the same step."""

import logging
import os

import jax
import numpy as np
import pytest
from etils import epath
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from runs import dictation, four_streams, make_program, metrics, place, random_tables

import msllm
from msllm.kept import kept_step
from msllm.runtime.processes import Stop
from msllm.step import Program
from msllm.train import train

pytestmark = pytest.mark.slow

FACTS = {"code": {"step.py": "0123"}}


@pytest.fixture
def cache(tmp_path, compile_once):
    """An empty directory for what JAX compiles."""
    session, seconds = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield tmp_path / "compiled"
    jax.config.update("jax_compilation_cache_dir", session)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()


@pytest.fixture
def traced(monkeypatch):
    """A list that grows with every step that is traced."""
    result, step = [], Program._step
    monkeypatch.setattr(
        Program, "_step", lambda self, *arguments: result.append(self) or step(self, *arguments)
    )
    return result


def small(**dotted):
    return four_streams(**{"model.num_layers": 1} | dotted)


def kept(folder):
    return sorted(folder.glob("msllm-step-*"))


def first_losses(program, step):
    """The losses of two steps, as bits."""
    batch, state = place(program, random_tables(program.config)), program.init()
    losses = []
    for _ in range(2):
        state, values = step(state, batch)
        losses.append(float(values["loss"]).hex())
    return losses


class StopAt3(Stop):
    def at(self, step):
        return step == 3


def test_a_restart_traces_no_step_and_loses_no_bit(data_dir, tmp_path, cache, traced):
    config = dictation(**{"data.dir": data_dir, "mesh.data": 2, "mesh.fsdp": 4})
    assert int(train(config, tmp_path / "run", StopAt3(), command=True).step) == 3
    assert len(traced) == len(kept(cache)) == 1
    continued = train(config, tmp_path / "run", command=True)
    assert len(traced) == 1
    uninterrupted = train(
        config, tmp_path / "other"
    )  # in a notebook, where functions may be other than in the files
    assert len(traced) == 2 and len(kept(cache)) == 1
    jax.tree.map(np.testing.assert_array_equal, continued, uninterrupted)
    losses = [
        [line["loss"] for line in metrics(tmp_path / name) if "loss" in line]
        for name in ("run", "other")
    ]
    assert len(losses[0]) == 8 and losses[0] == losses[1]


def test_what_is_loaded_donates_and_never_compiles(cache):
    config = small()
    for _ in range(2):
        program = make_program(config, 8, data=2, stream=4)
        step = kept_step(program, FACTS)
        state = program.init()
        step(state, place(program, random_tables(config)))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        wider = {k: np.concatenate([x, x]) for k, x in random_tables(config).items()}
        with pytest.raises(TypeError):
            step(program.init(), wider)


@pytest.mark.parametrize(
    "facts, dotted, mesh",
    [
        ({"code": {"step.py": "4567"}}, {}, {"data": 2}),
        (FACTS, {"optim.lr": 0.5}, {"data": 2}),
        (FACTS, {}, {"fsdp": 2}),
    ],
    ids=["code", "config", "mesh"],
)
def test_another_run_compiles_anew(cache, traced, facts, dotted, mesh):
    kept_step(make_program(small(), 2, data=2), FACTS)
    kept_step(make_program(small(), 2, data=2), FACTS)
    assert len(traced) == 1
    kept_step(make_program(small(**dotted), 2, **mesh), facts)
    assert len(traced) == 2


@pytest.mark.parametrize("change", ["flags", "precision", "silence", "version", "devices"])
def test_another_compiler_or_machine_compiles_anew(cache, traced, monkeypatch, change):
    kept_step(make_program(small()), FACTS)
    program, before = make_program(small()), jax.config.jax_default_matmul_precision
    if change == "flags":
        monkeypatch.setenv(
            "XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_enable_fast_math=true"
        )
    elif change == "precision":
        jax.config.update("jax_default_matmul_precision", "highest")
    elif change == "silence":
        program.silence_id = 2
    elif change == "version":
        monkeypatch.setattr("optax.__version__", "0.0")
    elif change == "devices":
        monkeypatch.setattr("jax.devices", lambda real=jax.devices: real()[1:])
        program = make_program(small())
    try:
        kept_step(program, FACTS)
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert len(traced) == 2


def truncate(content):
    return content[: len(content) // 2]


def flip(content):
    return content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:]


@pytest.mark.parametrize(
    "damage", [truncate, flip, lambda content: b""], ids=["truncated", "flipped", "empty"]
)
def test_a_damaged_file_is_passed_over(cache, traced, caplog, damage):
    program = make_program(small())
    expected = first_losses(program, kept_step(program, FACTS))
    (path,) = kept(cache)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING, "msllm"):
        program = make_program(small())
        step = kept_step(program, FACTS)
    (said,) = [record.message for record in caplog.records if record.name == "msllm"]
    assert (
        path.name in said and "its checksum differs): compiling; remove it if it stays so" in said
    )
    assert len(traced) == 2 and first_losses(program, step) == expected


def test_what_a_platform_cannot_load_is_compiled(cache, traced, caplog, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no such thing here")

    kept_step(make_program(small()), FACTS)
    monkeypatch.setattr(serialize_executable, "deserialize_and_load", refuse)
    program = make_program(small())
    assert len(first_losses(program, kept_step(program, FACTS))) == 2
    assert "ValueError: no such thing here" in caplog.text and len(traced) == 2


def test_what_cannot_be_written_is_said_and_leaves_nothing(cache, caplog, monkeypatch):
    def fail(self, target):
        raise OSError(28, "No space left on device")

    program = make_program(small())
    monkeypatch.setattr(type(epath.Path(cache)), "replace", fail)
    assert len(first_losses(program, kept_step(program, FACTS))) == 2
    assert "the compiled step is not kept in" in caplog.text and "No space left" in caplog.text
    assert not kept(cache)  # nor a part of it, whose name begins the same


def test_a_program_of_jax_s_cache_is_not_kept(cache, traced):
    """XLA:CPU writes an executable that it has read without its machine code."""
    program = make_program(small())
    expected = first_losses(program, kept_step(program, FACTS))
    kept(cache)[0].unlink()
    program = make_program(small())
    assert first_losses(program, kept_step(program, FACTS)) == expected
    assert len(traced) == 2 and not kept(cache)


def test_code_that_changed_after_its_import_is_not_kept(cache, monkeypatch):
    monkeypatch.setattr(msllm, "imported", 0.0)
    kept_step(make_program(small()), FACTS)
    assert not kept(cache)


def test_nothing_is_kept_where_nothing_shall_be(cache):
    kept_step(make_program(small(compilation_cache="none")), FACTS)
    kept_step(make_program(small()), None)
    assert not kept(cache)
