"""Stress test: sessions that are opened, fed, forked and closed at random do not mix.

    PYTHONPATH=. python -m tests.many_sessions --minutes=10 [--sessions=200] [--seed=S]

Each session is fed its own tokens, and its events are logged. The log is then replayed in a second
engine without other sessions. Every row must have the same tokens, log-probabilities and entropies.

Products of other shapes round differently, so the two runs may choose different tokens where two
tokens are equally likely to five digits. Such ties must be rare. Even then the log-probabilities
must agree, or the distributions where tokens are sampled. Memory and compilations are counted after
everything has been used once.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import time

import jax
import numpy as np

from msllm.config import ModelConfig, StreamsConfig
from msllm.decode.engine import DecodeOptions, Engine
from msllm.metrics import memory_mib
from msllm.model.model import init_parameters
from msllm.streams import StreamSpec
from msllm.weights.load import LoadedModel

WINDOW, SILENCE = 16, 0
SIZES = {
    "vocab_size": 64,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "d_ff": 32,
}


def tiny_model() -> LoadedModel:
    """A model of three streams with parameters so large that every token matters."""
    config = ModelConfig(**SIZES)
    names, kinds = ("user", "thought", "output"), ("input", "thought", "output")
    streams = StreamSpec.from_config(StreamsConfig(names=names, kinds=kinds))
    parameters = init_parameters(config, streams, 0)
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    return LoadedModel(config, streams, jax.tree.unflatten(tree, leaves))


class Check:
    """Uses an engine at random and compares each session with a replay of it alone.

    Attributes:
      engine: the engine in use.
      logs: {open session: (arguments it was opened with, [event])}.
      counts: how often each kind of event and comparison happened.
      compiled: number of programs compiled after the warm-up.
    """

    def __init__(self, sessions: int, seed: int, replay_sessions: int = 2):
        """Makes and warms up both engines.

        Args:
          sessions: sessions of the engine in use.
          seed: of the random events.
          replay_sessions: sessions of the engine for replays. If equal to `sessions`, both engines
            share one compiled program.
        """
        self.rng, self.counts, self.compiled = random.Random(seed), collections.Counter(), 0
        model = tiny_model()

        def make_engine(sessions):
            engine = Engine(model, sessions=sessions, window=WINDOW, silence_id=SILENCE)
            engine.warm_up()
            return engine

        self.engine, self._replay_engine = make_engine(sessions), make_engine(replay_sessions)
        self.logs: dict = {}
        self._sessions = sessions
        jax.monitoring.register_event_duration_secs_listener(self._count_compilation)

    def _count_compilation(self, name: str, *_, **__) -> None:
        self.compiled += name.endswith("backend_compile_duration")

    def act(self) -> None:
        """Does one random action, then steps a random choice of the sessions."""
        kind = self.rng.choices(("open", "feed", "fork", "close"), (4, 6, 2, 2))[0]
        open_now = list(self.logs)
        full = not self.engine.free
        if kind == "open" and not full:
            self._open()
        elif kind == "feed" and open_now:
            self._feed(self.rng.choice(open_now))
        elif kind == "fork" and open_now and not full:
            self._fork(self.rng.choice(open_now))
        elif kind == "close" and open_now and (full or len(open_now) > self._sessions // 2):
            self._close(self.rng.choice(open_now))
            self.counts["closed"] += 1
        self._step()

    def _open(self) -> None:
        rng = self.rng
        options = DecodeOptions(
            temperature=rng.choice((0.0, 1.0, 2.0)),
            top_k=rng.choice((0, 5)),
            seed=rng.getrandbits(32),
        )
        arguments = {"keep": rng.randrange(4)}
        if rng.random() < 0.5:
            rows = range(rng.randrange(1, WINDOW))
            arguments["prefill"] = np.array([[rng.randrange(64) for _ in range(3)] for _ in rows])
        self.logs[self.engine.open(options, **arguments)] = ((options, arguments), [])
        self.counts["opened"] += 1

    def _feed(self, session) -> None:
        tokens = [self.rng.randrange(1, 64) for _ in range(self.rng.randrange(1, 6))]
        session.feed("user", tokens)
        self.logs[session][1].append(("feed", tokens))
        self.counts["fed"] += 1

    def _fork(self, session) -> None:
        seed = self.rng.getrandbits(32)
        opened_with, log = self.logs[session]
        self.logs[session.fork(seed)] = (opened_with, [*log, ("fork", seed)])
        self.counts["forked"] += 1

    def _close(self, session) -> None:
        self._replay(*self.logs.pop(session))
        session.close()

    def _step(self) -> None:
        chosen = [session for session in self.logs if self.rng.random() < 0.8]
        for session, row in zip(chosen, self.engine.step(chosen)):
            self.logs[session][1].append(("row", row))
            self.counts["rows"] += 1

    def finish(self) -> None:
        """Checks all sessions that are still open, and that ties were rare."""
        for session in list(self.logs):
            self._close(session)
        assert self.counts["ties"] <= 1 + self.counts["rows compared"] / 1000, self.counts

    def _replay(self, opened_with, log) -> None:
        """Repeats a session without other sessions and compares each row."""
        options, arguments = opened_with
        session = self._replay_engine.open(options, **arguments)
        for number, (what, value) in enumerate(log):
            if what == "feed":
                session.feed("user", value)
            elif what == "fork":
                parent, session = session, session.fork(value)
                parent.close()
            else:
                alone = session.step()
                same_tokens = np.array_equal(alone.tokens, value.tokens)
                same_logprob = _close(alone.logprob, value.logprob)
                # Different sampled tokens have different log-probabilities.
                sampled_tie = not same_tokens and session.options.temperature
                if not _close(alone.entropy, value.entropy) or not (same_logprob or sampled_tie):
                    raise AssertionError(
                        f"event {number}, opened with {opened_with}: {value} among other sessions,"
                        f" {alone} alone"
                    )
                if not same_tokens:
                    self.counts["ties"] += 1
                    break
                self.counts["rows compared"] += 1
        session.close()
        self.counts["sessions compared"] += 1


def _close(a, b) -> bool:
    return np.allclose(a, b, rtol=0, atol=1e-3, equal_nan=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    check = Check(arguments.sessions, arguments.seed)
    end = time.monotonic() + 60 * arguments.minutes
    memory = {}
    while time.monotonic() < end:
        check.act()
        if not check.engine.free:
            memory.setdefault("once full", memory_mib())
    memory["at the end"] = memory_mib()
    check.finish()
    mib = ", ".join(f"{value:.0f} MiB {when}" for when, value in memory.items())
    done = ", ".join(f"{count} {what}" for what, count in check.counts.items())
    print(f"{done}; {check.compiled} programs compiled after warming up; {mib}")
    return int(check.compiled > 0)


if __name__ == "__main__":
    sys.exit(main())
