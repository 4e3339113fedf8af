"""The training loop keeps the device busy.

Nothing compiles again, no state is copied, and no result is waited for.
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
    """watch_steps(before, after) wraps the compiled step.

    A step is given the state that before(number, state, batch) returns, and the loop gets what
    after(number, old state, state, metrics) returns.
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
    """Steps 1 to 4 contain a step, an evaluation and a checkpoint; the four after them the same."""
    seen, started = [], []

    def listen(name, seconds, **_):
        return seen.append(name) if started and name.startswith("/jax/core/compile/") else None

    jax.monitoring.register_event_duration_secs_listener(listen)
    deleted = []

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
        assert seen == []
        jax.jit(lambda x: x + 1)(np.ones(3))
        assert seen  # the listener would have heard it
    finally:
        started.clear()
    assert deleted == [True] * config.steps


class Watched:
    """An array that tells when the host uses its value or waits for it."""

    def __init__(self, value, used):
        self.value, self.used = value, used

    def __getattr__(self, name):
        self.used()
        return getattr(self.value, name)

    def __array__(self, *args, **kwargs):
        self.used()
        return np.asarray(self.value, *args, **kwargs)

    def __float__(self):
        return float(self.__array__())

    def __int__(self):
        return int(self.__array__())

    def __bool__(self):
        return bool(self.__array__())


def test_a_step_is_dispatched_before_the_last_one_is_read(data_dir, tmp_path, watch_steps):
    dispatched, reads = [], []  # steps; (step whose results are used, steps dispatched by then)

    def watched(number, tree):
        return jax.tree.map(
            lambda x: Watched(x, lambda: reads.append((number, len(dispatched)))), tree
        )

    def before(number, state, batch):
        dispatched.append(number)
        assert all(
            isinstance(x, jax.Array) for x in jax.tree.leaves(batch)
        )  # nothing is copied by the call itself
        return jax.tree.map(lambda x: x.value if isinstance(x, Watched) else x, state)

    watch_steps(
        before, lambda number, old, state, values: (watched(number, state), watched(number, values))
    )
    config = dictation(
        **{
            "data.dir": data_dir,
            "mesh.data": 2,
            "mesh.fsdp": 4,
            "eval_every": 0,
            "checkpoint.every": 0,
        }
    )
    # The last step is saved, which reads it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *_: None)
        train(config, tmp_path)
    assert {step for step, _ in reads} == set(range(1, config.steps + 1))
    assert {(step, by) for step, by in reads if step < config.steps} == {
        (n, n + 1) for n in range(1, config.steps)
    }
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, config.steps + 1))
