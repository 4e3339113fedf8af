"""Checkpoints: damage, checkpoints of other runs, which are kept, and self-containedness."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from runs import flip_a_bit, four_streams, host, make_program, replace

from msllm import tokenizer as tokenizer_lib
from msllm.checkpoint import Checkpoints, LocalCheckpoints, checksums
from msllm.config import CheckpointConfig, TokenizerConfig
from msllm.errors import RunError, UserError
from msllm.runtime import processes
from msllm.training import open_workdir
from msllm.weights.load import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    words = " ".join(f"word{i}" for i in range(20))
    return tokenizer_lib.train([words] * 3, TokenizerConfig(model_type="word", vocab_size=32))


@pytest.fixture(scope="module")
def program(tokenizer):
    return make_program(
        four_streams(**{"model.vocab_size": tokenizer.vocab_size}), 8, data=2, fsdp=4
    )


@pytest.fixture(scope="module")
def state(program):
    """An initial state with random moments, because zeros could hide mistakes in reading them."""
    rng = np.random.default_rng(0)

    def noise(x):
        return np.where(x.ndim > 0, rng.normal(size=x.shape), x).astype(x.dtype)

    state = program.init()
    return jax.device_put(
        state._replace(opt_state=jax.tree.map(noise, state.opt_state)), program.state_shardings
    )


def at_step(program, state, step):
    """The state with another step, and parameters that depend on the step."""
    numbered = jax.tree.map(lambda x: x + np.float32(step), state.parameters)
    state = state._replace(step=np.int32(step), parameters=numbered)
    return jax.device_put(state, program.state_shardings)


@pytest.fixture(scope="module")
def three(program, state, tokenizer, tmp_path_factory):
    """A workdir with the checkpoints of steps 10, 20 and 30. Read only."""
    workdir = tmp_path_factory.mktemp("three")
    save(workdir, program, state, tokenizer, (10, 20, 30))
    return workdir


@pytest.fixture
def workdir(three, tmp_path):
    """A copy of `three` to damage."""
    return shutil.copytree(three, tmp_path / "run")


def save(workdir, program, state, tokenizer, steps, **settings):
    """Saves checkpoints of the given steps."""
    checkpoints = Checkpoints(workdir, CheckpointConfig(**settings))
    for step in steps:
        checkpoints.save(at_step(program, state, step), program.config, tokenizer)
    checkpoints.close()


def test_saving_does_not_ask_for_preemption(tmp_path, program, state, tokenizer, monkeypatch):
    """JAX's service would take the step of the checkpoint for the current step of this process."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    save(tmp_path, program, state, tokenizer, (10, 20))
    assert not asked


def restore(workdir, program, tokenizer):
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    try:
        return checkpoints.restore(program, tokenizer)
    finally:
        checkpoints.close()


def check_restored(restored, program, state, step):
    expected = at_step(program, state, step)
    jax.tree.map(np.testing.assert_array_equal, host(restored), host(expected))
    assert jax.tree.map(lambda x: x.sharding, restored) == program.state_shardings


def damage_arrays(item, change):
    """Applies `change` to the largest file in each folder of array data."""
    for folder in item.rglob("d"):
        change(max(folder.iterdir(), key=lambda path: path.stat().st_size))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_description(step):
    file = next((step / "description").glob("metadata"))
    description = json.loads(file.read_text())
    description["config"]["seed"] = 7
    file.write_text(json.dumps(description))


def take_parameters_of_another(step):
    """Replaces the parameters with intact files, which only msllm's checksums detect."""
    shutil.rmtree(step / "parameters")
    shutil.copytree(step.parent / "20" / "parameters", step / "parameters")


def names_of_folders(folder):
    return {path.name for path in folder.iterdir() if path.is_dir()}


DAMAGES = {
    "another step's parameters": take_parameters_of_another,
    "cut file": lambda step: damage_arrays(step / "parameters", cut),
    "flipped bit": lambda step: damage_arrays(step / "parameters", flip_a_bit),
    "cut moments": lambda step: damage_arrays(step / "rest", cut),
    "flipped bit in the moments": lambda step: damage_arrays(step / "rest", flip_a_bit),
    "missing file": lambda step: damage_arrays(step / "parameters", os.unlink),
    "missing item": lambda step: shutil.rmtree(step / "rest"),
    "changed description": change_description,
    "empty description": lambda step: next((step / "description").glob("metadata")).write_text(""),
    "missing description": lambda step: shutil.rmtree(step / "description"),
}


def test_restores_the_newest_on_any_mesh(three, program, state, tokenizer):
    check_restored(restore(three, program, tokenizer), program, state, 30)
    other = make_program(program.config, 4, fsdp=2, stream=2)
    check_restored(restore(three, other, tokenizer), other, state, 30)


def test_restore_returns_none_in_a_new_workdir(tmp_path, program, tokenizer):
    assert restore(tmp_path, program, tokenizer) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_moved_aside(workdir, program, state, tokenizer, damage, caplog):
    folder = workdir / "checkpoints"
    DAMAGES[damage](folder / "30")
    with caplog.at_level(logging.WARNING, "msllm"):
        check_restored(restore(workdir, program, tokenizer), program, state, 20)
    assert "checkpoint of step 30 is damaged and not used: " in caplog.text
    assert names_of_folders(folder) == {"10", "20", "damaged"}
    assert [path.name for path in (folder / "damaged").iterdir()] == ["30"]
    save(workdir, program, state, tokenizer, (30,))  # the run reaches this step again
    check_restored(restore(workdir, program, tokenizer), program, state, 30)


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
        ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"),
    ],
    ids=["no memory", "another process died"],
)
def test_other_failures_do_not_move_checkpoints(workdir, program, tokenizer, monkeypatch, error):
    def failing(self, *_):
        raise error

    monkeypatch.setattr(Checkpoints, "_restore_step", failing)
    monkeypatch.setattr(processes, "is_peer_failure", lambda error: "Gloo" in str(error))
    with pytest.raises(type(error), match=re.escape(str(error))):
        restore(workdir, program, tokenizer)
    assert names_of_folders(workdir / "checkpoints") == {"10", "20", "30"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_uses_the_newest_good_parameters(workdir, state, damage, caplog):
    DAMAGES[damage](workdir / "checkpoints" / "30")
    loaded = load(workdir)
    # `load` does not read the moments.
    unread = damage in ("cut moments", "flipped bit in the moments", "missing item")
    assert loaded.step == (30 if unread else 20)
    expected = jax.tree.map(lambda x: x + np.float32(loaded.step), host(state.parameters))
    jax.tree.map(np.testing.assert_array_equal, host(loaded.parameters), expected)
    assert ("damaged and not used" in caplog.text) != unread


def test_a_run_never_starts_over_silently(workdir, program, tokenizer):
    for step in ("10", "20", "30"):
        damage_arrays(workdir / "checkpoints" / step / "parameters", flip_a_bit)
    rule = r"none of the checkpoints in .* \(step 30: .*; step 20: .*; step 10: .*\).*--workdir"
    with pytest.raises(UserError, match=rule):
        restore(workdir, program, tokenizer)
    assert names_of_folders(workdir / "checkpoints") == {"10", "20", "30"}
    with pytest.raises(
        UserError, match=r"no checkpoint in .* can be read \(30: .*restore one from a copy"
    ):
        load(workdir)


def test_an_interrupted_write_is_not_used(workdir, program, state, tokenizer, caplog):
    leftover = workdir / "checkpoints" / "40.orbax-checkpoint-tmp-12"
    shutil.copytree(workdir / "checkpoints" / "30", leftover)
    with caplog.at_level(logging.WARNING, "msllm"):
        check_restored(restore(workdir, program, tokenizer), program, state, 30)
    assert f"incomplete checkpoint {leftover.name}" in caplog.text
    assert load(workdir).step == 30


@pytest.mark.parametrize(
    "section, changes, message",
    [
        ("model", {"d_model": 24}, "model.d_model is 16 there and 24 here"),
        ("model", {"tie_embeddings": False}, "model.tie_embeddings is True there and False here"),
        (
            "streams",
            {"names": ("user", "tool", "thought", "voice")},
            "streams.names is .*'output'.* and .*'voice'",
        ),
        (
            "streams",
            {"visibility": "isolated"},
            "streams.visibility is 'block_causal' there and 'isolated' here",
        ),
        ("streams", {"skip_silence": True}, "streams.skip_silence is False there and True here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    three, program, tokenizer, section, changes, message
):
    other = make_program(replace(program.config, section, **changes))
    with pytest.raises(UserError, match=message):
        restore(three, other, tokenizer)


def test_the_attention_backend_and_remat_may_change(three, program, state, tokenizer):
    other = make_program(replace(program.config, "model", attention="reference", remat="full"))
    check_restored(restore(three, other, tokenizer), other, state, 30)


def test_a_checkpoint_of_another_tokenizer_is_refused(three, program, tokenizer):
    words = " ".join(f"other{i}" for i in range(20))
    other = tokenizer_lib.train([words] * 3, TokenizerConfig(model_type="word", vocab_size=32))
    assert other.vocab_size == tokenizer.vocab_size
    with pytest.raises(
        UserError, match=f"another tokenizer .{tokenizer.hash[:12]}, the data has {other.hash[:12]}"
    ):
        restore(three, program, other)


def test_a_changed_learning_rate_is_reported(three, program, state, tokenizer, caplog):
    other = make_program(replace(program.config, "optim", lr=0.5))
    with caplog.at_level(logging.WARNING, "msllm"):
        check_restored(restore(three, other, tokenizer), other, state, 30)
    assert "config.optim.lr was 0.001 when the checkpoint was written and is 0.5 now" in caplog.text


def test_the_last_and_every_nth_checkpoint_are_kept(tmp_path, program, state, tokenizer):
    save(tmp_path, program, state, tokenizer, range(1, 8), keep_last=2, keep_every=3)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"3", "6", "7"}


def test_local_checkpoints_are_restored_by_the_mesh_that_wrote_them(
    tmp_path, program, state, tokenizer, caplog
):
    config = CheckpointConfig(local_dir=str(tmp_path / "disk"))

    def with_local(action, workdir=tmp_path / "run"):
        checkpoints = LocalCheckpoints(workdir, config)
        try:
            return action(checkpoints)
        finally:
            checkpoints.close()

    def restored(program, newer_than=-1):
        with caplog.at_level(logging.WARNING, "msllm"):
            return with_local(lambda local: local.restore(program, tokenizer, newer_than))

    def saved(step):
        with_local(
            lambda local: local.save(at_step(program, state, step), program.config, tokenizer)
        )

    for step in (2, 4, 6):
        saved(step)
    # Two are kept, since local disks are small.
    assert with_local(lambda local: local.steps()) == [4, 6]
    assert with_local(lambda local: local.steps(), tmp_path / "another run") == []
    (newest,) = (tmp_path / "disk").glob("*/0-of-1/6")
    damage_arrays(newest / "parameters", flip_a_bit)
    check_restored(restored(program), program, state, 4)
    assert "local checkpoint of step 6 is not used: " in caplog.text
    assert restored(make_program(program.config, 8, fsdp=8)) is None
    assert (
        "local checkpoint of step 4 is not used: it was written by other processes or on another"
        " mesh" in caplog.text
    )
    assert with_local(lambda local: local.steps()) == []  # the run will write these steps again
    saved(6)
    check_restored(restored(program, newer_than=5), program, state, 6)
    assert restored(program, newer_than=6) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_a_checksum_sees_every_value(dtype):
    """A user's optimizer may have a state of any type."""
    values = jax.numpy.array([0.25, 0.5, 1.0]) if "float" in dtype else jax.numpy.arange(3) % 2
    values = values.astype(dtype)
    one = checksums({"rest": {"x": values}})
    for i in range(3):
        changed = values.at[i].set(jax.numpy.array(0 if values[i] else 1, dtype))
        assert checksums({"rest": {"x": changed}}) != one


def test_saving_a_step_again_changes_nothing(workdir, program, state, tokenizer):
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    checkpoints.save(
        at_step(program, state, 30)._replace(skipped=np.int32(5)), program.config, tokenizer
    )
    checkpoints.close()
    assert int(restore(workdir, program, tokenizer).skipped) == 0


def test_a_checkpoint_is_self_contained(workdir, program, state, tokenizer, tmp_path):
    moved = tmp_path / "elsewhere"
    (workdir / "checkpoints" / "20").rename(moved)
    shutil.rmtree(workdir)
    loaded = load(moved)
    assert (loaded.step, loaded.run_config, loaded.streams) == (20, program.config, program.streams)
    assert loaded.tokenizer.to_bytes() == tokenizer.to_bytes()
    assert loaded.tokenizer.silence_id == tokenizer.silence_id
    expected = jax.tree.map(lambda x: x + np.float32(20), host(state.parameters))
    jax.tree.map(np.testing.assert_array_equal, host(loaded.parameters), expected)

    command = [sys.executable, "-m", "msllm", "generate", f"--checkpoint={moved}"]
    command += ["--input=user=word1 word2", "--rows=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "user: word1 word2" in done.stdout


def test_no_checkpoint_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="there is no checkpoint in .*: give a workdir"):
            load(path)


def test_a_newer_format_is_refused(workdir, program, tokenizer, monkeypatch):
    monkeypatch.setattr("msllm.checkpoint.FORMAT", 2)
    with pytest.raises(UserError, match="has format 1: this version of msllm reads 2"):
        restore(workdir, program, tokenizer)


def test_a_state_that_is_not_finite_is_not_saved(workdir, program, state, tokenizer, caplog):
    broken = at_step(program, state, 40)
    name = "final_norm"
    broken.parameters[name] = broken.parameters[name].at[0].set(np.nan)
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep_last=3))
    with caplog.at_level(logging.WARNING, "msllm"):
        assert not checkpoints.save(broken, program.config, tokenizer)
    assert checkpoints.save(at_step(program, state, 50), program.config, tokenizer)
    checkpoints.close()
    assert checkpoints.steps() == [20, 30, 50]
    assert f"no checkpoint of step 40: parameters/{name} and 0 other arrays" in caplog.text


@pytest.mark.parametrize("damage", ["description", "rest"])
def test_a_checkpoint_that_cannot_be_read_back_ends_the_run(
    tmp_path, program, state, tokenizer, damage
):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(at_step(program, state, 5), program.config, tokenizer)
    checkpoints._manager.wait_until_finished()
    shutil.rmtree(tmp_path / "checkpoints" / "5" / damage)
    with pytest.raises(RunError, match="step 5 was written to .* and cannot be read"):
        checkpoints.check_for_errors()
    checkpoints.check_for_errors()  # it is said once
    checkpoints.close()


@pytest.mark.parametrize("name", ["exp[lr=1e-3]", "a\\b", "what?", "*"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="checkpoints cannot be kept in a path with"):
        open_workdir(tmp_path / name)
    with pytest.raises(UserError, match="checkpoints cannot be kept in a path with"):
        Checkpoints(tmp_path / name, CheckpointConfig())
    assert not list(tmp_path.iterdir())
