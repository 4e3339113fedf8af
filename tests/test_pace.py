"""The training loop keeps the device busy.

It compiles nothing twice, copies no state, and dispatches a step before it reads the last one.
"""

import jax
import numpy as np
import pytest
from runs import dictation, metrics

from msllm import training
from msllm.checkpoint import Checkpoints
from msllm.training import train

pytestmark = pytest.mark.slow


@pytest.fixture
def watch_steps(monkeypatch):
    """A function watch_steps(before, after) that wraps the compiled step.

    A step gets the state that before(number, state, batch) returns. The loop gets the state and the
    metrics that after(number, old state, state, metrics) returns.
    """
    compile_step = training.compile_step

    def watch(before, after):
        def watched(*arguments):
            compiled, numbers = compile_step(*arguments), iter(range(1, 1000))

            def step(state, batch):
                number = next(numbers)
                state = before(number, state, batch)
                return after(number, state, *compiled(state, batch))

            return step

        monkeypatch.setattr(training, "compile_step", watched)

    return watch


def test_nothing_compiles_after_everything_ran_once(data_dir, tmp_path, watch_steps):
    """Steps 1 to 4 include an evaluation and a checkpoint, and so do steps 5 to 8."""
    compiled, started, deleted = [], [], []

    def listen(name, seconds, **_):
        if started and name.startswith("/jax/core/compile/"):
            compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)

    def before(number, state, batch):
        if number == 5:
            started.append(number)
        return state

    def after(number, old, state, values):
        deleted.append(all(leaf.is_deleted() for leaf in jax.tree.leaves(old)))
        return state, values

    watch_steps(before, after)
    config = dictation(
        **{"data.dir": data_dir, "mesh.data": 2, "mesh.fsdp": 4, "checkpoint.every": 4}
    )
    try:
        train(config, tmp_path)
        assert compiled == []
        jax.jit(lambda x: x + 1)(np.ones(3))
        assert compiled  # the listener works
    finally:
        started.clear()  # the listener stays registered
    assert deleted == [True] * config.steps


class Watched:
    """An array that calls `on_use` when the host uses its value or waits for it."""

    def __init__(self, value, on_use):
        self.value, self.on_use = value, on_use

    def __getattr__(self, name):
        self.on_use()
        return getattr(self.value, name)

    def __array__(self, *args, **kwargs):
        self.on_use()
        return np.asarray(self.value, *args, **kwargs)

    def __float__(self):
        return float(self.__array__())

    def __int__(self):
        return int(self.__array__())

    def __bool__(self):
        return bool(self.__array__())


def test_a_step_is_dispatched_before_the_last_one_is_read(data_dir, tmp_path, watch_steps):
    dispatched = []  # steps
    reads = []  # (step whose results are used, number of steps dispatched by then)

    def watched(number, tree):
        def on_use():
            reads.append((number, len(dispatched)))

        return jax.tree.map(lambda x: Watched(x, on_use), tree)

    def before(number, state, batch):
        dispatched.append(number)
        # The call would copy other arrays to the devices.
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(batch))
        return jax.tree.map(lambda x: x.value if isinstance(x, Watched) else x, state)

    def after(number, old, state, values):
        return watched(number, state), watched(number, values)

    watch_steps(before, after)
    mesh = {"mesh.data": 2, "mesh.fsdp": 4}
    config = dictation(**{"data.dir": data_dir, "eval_every": 0, "checkpoint.every": 0}, **mesh)
    # Saving the last step would read it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *_: None)
        train(config, tmp_path)
    assert {step for step, _ in reads} == set(range(1, config.steps + 1))
    before_last = {(step, count) for step, count in reads if step < config.steps}
    assert before_last == {(n, n + 1) for n in range(1, config.steps)}
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, config.steps + 1))
