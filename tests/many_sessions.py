"""Sessions opened, fed, forked and closed at random, each compared with itself run alone.

    PYTHONPATH=. python -m tests.many_sessions --minutes=10 [--sessions=200] [--seed=S]

Each session is fed tokens of its own. What happened to it is written down, and played again in an
engine in which it is alone: every row must have the same tokens, log-probabilities and entropies.
Products of other shapes round differently: where two tokens are equally likely to five digits,
the two may part; their log-probabilities or, where tokens are drawn, their distributions must be
the same even then, and it must be rare. Memory and compilations are counted after everything has
been used once.
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


def tiny_model():
    """Three streams; random parameters large enough that every token matters."""
    config = ModelConfig(**SIZES)
    names, kinds = ("user", "thought", "output"), ("input", "thought", "output")
    streams = StreamSpec.from_config(StreamsConfig(names=names, kinds=kinds))
    parameters = init_parameters(config, streams, 0)
    leaves, tree = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
    return LoadedModel(config, streams, jax.tree.unflatten(tree, leaves))


class Check:
    """An engine in use, and what was done to each of its sessions.

    Attributes:
      compiled: programs compiled since everything had been used once. The others are counts.
    """

    def __init__(self, sessions: int, seed: int, alone: int = 2):
        """`alone`: room in the engine in which a session is alone."""
        self.rng, self.counts, self.compiled = random.Random(seed), collections.Counter(), 0
        model = tiny_model()

        def make(room):
            return Engine(model, sessions=room, window=WINDOW, silence_id=SILENCE)

        self.engine, self.alone = make(sessions), make(alone)
        self.engine.warm_up(), self.alone.warm_up()
        self.logs: dict = {}  # session: (how it was opened, what followed)
        self.room = sessions
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, name: str, *_, **__) -> None:
        self.compiled += name.endswith("backend_compile_duration")

    def act(self) -> None:
        """One random thing, and a step of some sessions."""
        rng, open_now = self.rng, list(self.logs)
        kind = rng.choices(("open", "feed", "fork", "close"), (4, 6, 2, 2))[0]
        if kind == "open" and self.engine.free:
            temperature, top_k, seed = (
                rng.choice((0.0, 1.0, 2.0)),
                rng.choice((0, 5)),
                rng.getrandbits(32),
            )
            options = DecodeOptions(temperature=temperature, top_k=top_k, seed=seed)
            first = {"keep": rng.randrange(4)}
            if rng.random() < 0.5:
                rows = range(rng.randrange(1, WINDOW))
                first["prefill"] = np.array([[rng.randrange(64) for _ in range(3)] for _ in rows])
            self.logs[self.engine.open(options, **first)] = ((options, first), [])
            self.counts["opened"] += 1
        elif kind == "feed" and open_now:
            session, tokens = (
                rng.choice(open_now),
                [rng.randrange(1, 64) for _ in range(rng.randrange(1, 6))],
            )
            session.feed("user", tokens)
            self.logs[session][1].append(("feed", tokens))
            self.counts["fed"] += 1
        elif kind == "fork" and open_now and self.engine.free:
            session, seed = rng.choice(open_now), rng.getrandbits(32)
            how, log = self.logs[session]
            self.logs[session.fork(seed)] = (how, [*log, ("seed", seed)])
            self.counts["forked"] += 1
        elif (
            kind == "close"
            and open_now
            and (not self.engine.free or len(open_now) > self.room // 2)
        ):
            session = rng.choice(open_now)
            self._replay(*self.logs.pop(session))
            session.close()
            self.counts["closed"] += 1
        chosen = [session for session in self.logs if rng.random() < 0.8]
        for session, row in zip(chosen, self.engine.step(chosen)):
            self.logs[session][1].append(("row", row))
            self.counts["rows"] += 1

    def finish(self) -> None:
        """Checks all sessions that are still open."""
        for session in list(self.logs):
            self._replay(*self.logs.pop(session))
            session.close()
        assert self.counts["ties"] <= 1 + self.counts["rows compared"] / 1000, self.counts

    def _replay(self, how, log) -> None:
        options, first = how
        session = self.alone.open(options, **first)
        for number, (what, value) in enumerate(log):
            if what == "feed":
                session.feed("user", value)
            elif what == "seed":
                session = (session.fork(value), session.close())[0]
            else:
                alone = session.step()
                same = np.array_equal(alone.tokens, value.tokens)

                def pair(name):
                    return (getattr(alone, name), getattr(value, name))

                def close(name):
                    return np.allclose(*pair(name), rtol=0, atol=1e-3, equal_nan=True)

                if not close("entropy") or not (
                    close("logprob") or not same and session.options.temperature
                ):
                    raise AssertionError(
                        f"event {number}, opened by {how}: {value} in the crowd, {alone} alone"
                    )
                if not same:
                    self.counts["ties"] += 1
                    break
                self.counts["rows compared"] += 1
        session.close()
        self.counts["sessions compared"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    check, end = (
        Check(arguments.sessions, arguments.seed),
        time.monotonic() + 60 * arguments.minutes,
    )
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
