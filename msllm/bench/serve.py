"""Measures `msllm serve` over loopback: many sessions on one beat, with clients that come and go.

The server runs in a process of its own, as in use. The clients of all sessions share this one. Each
client feeds a short text from time to time. A share of the sessions is closed and replaced by new
ones every minute. Rows are on time if the server has them ready before the next beat is due; their
latency is the time from one row to the next at the client, minus the beat.
"""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import os
import random
import re
import time
import urllib.request
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from msllm.config import ModelConfig, StreamsConfig, TokenizerConfig

_TEXT = "take 4 add 3 no wait add 2 ?"
_FEED_EVERY_S = 2.0


def serve_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Measures one case.

    Args:
      case: the settings of `runner.SETTINGS["serve"]`. `churn` is the share of sessions that is
        replaced each minute, in percent.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    server = spawn.Process(target=_serve, args=(case, theirs), daemon=True)
    server.start()
    try:
        port = ours.recv()
        before = _metrics(port)
        clients = asyncio.run(_measure(case, port))
        after = _metrics(port)
        ours.send("stop")
        cpu = ours.recv()
    finally:
        server.join(30)
        server.kill()
    rows = after["msllm_rows_total"] - before["msllm_rows_total"]
    on_time = after["msllm_rows_on_time_total"] - before["msllm_rows_on_time_total"]
    return [
        {
            "benchmark": "serve",
            **case,
            "rows": int(rows),
            "on_time": round(on_time / rows, 5) if rows else None,
            "late_p99_ms": _quantile(before, after, 0.99),
            **clients,
            "server_cpu_ms_per_beat": round(
                1e3 * cpu / (1e3 * case["seconds"] / case["beat_ms"]), 2
            ),
        }
    ]


def _serve(case: dict[str, Any], pipe: Connection) -> None:
    """Runs the server. Sends its port when it is ready, and its CPU time at the end."""
    import jax

    from msllm.decode.engine import Engine
    from msllm.model.model import init_parameters
    from msllm.runtime.environment import configure_jax
    from msllm.serve.app import Server
    from msllm.serve.run import Uvicorn, listen
    from msllm.streams import StreamSpec
    from msllm.tokenizer import train
    from msllm.weights.load import LoadedModel

    configure_jax()
    fields = ModelConfig.__dataclass_fields__
    config = ModelConfig(**{name: value for name, value in case.items() if name in fields})
    names = tuple(f"s{i}" for i in range(case["streams"]))
    kinds = ("input", *("output",) * (case["streams"] - 1))
    streams = StreamSpec.from_config(StreamsConfig(names=names, kinds=kinds))
    parameters = jax.jit(functools.partial(init_parameters, config, streams, 0))()
    tokenizer = train([_TEXT] * 50, TokenizerConfig(vocab_size=min(512, case["vocab_size"])))
    model = LoadedModel(config, streams, parameters, tokenizer)
    engine = Engine(model, sessions=case["sessions"], window=case["window"])
    server = Server(engine, beat_seconds=case["beat_ms"] / 1e3)

    async def run() -> None:
        uvicorn = Uvicorn(server, 0.0)
        listening = listen("127.0.0.1", 0)
        serving = asyncio.create_task(uvicorn.serve(sockets=[listening]))
        while not server.sessions.ready:
            await asyncio.sleep(0.05)
        pipe.send(listening.getsockname()[1])
        cpu = sum(os.times()[:2])
        await asyncio.to_thread(pipe.recv)
        pipe.send(sum(os.times()[:2]) - cpu)
        uvicorn.begin_to_drain()
        await serving

    asyncio.run(run())


async def _measure(case: dict[str, Any], port: int) -> dict[str, Any]:
    """Runs the clients, and returns what they saw."""
    beat, late, counts = case["beat_ms"] / 1e3, list[float](), {"opened": 0, "dropped": 0}
    end = time.monotonic() + case["seconds"]
    # A session lives as long as the churn asks for, on average.
    life = 6000.0 / case["churn"] if case["churn"] else float("inf")

    async def talk(number: int) -> None:
        dice = random.Random(number)
        await asyncio.sleep(dice.random() * min(1.0, case["seconds"] / 4))
        while time.monotonic() < end:
            stop = time.monotonic() + (dice.expovariate(1 / life) if life < 1e9 else life)
            counts["dropped"] += not await _talk(port, number, min(stop, end), beat, late, dice)
            counts["opened"] += 1

    await asyncio.gather(*(talk(number) for number in range(case["sessions"])))
    p50, p99 = np.percentile(late, [50, 99]) if late else (np.nan, np.nan)
    return {
        **counts,
        "latency_p50_ms": round(1e3 * float(p50), 2),
        "latency_p99_ms": round(1e3 * float(p99), 2),
    }


async def _talk(
    port: int, number: int, end: float, beat: float, late: list[float], dice: random.Random
) -> bool:
    """Holds one session until `end`. Returns whether it went well."""
    import websockets
    from websockets.asyncio.client import connect

    from msllm.serve.protocol import Error, Row, decode_server

    url = f"ws://127.0.0.1:{port}/v1/sessions"
    try:
        async with connect(url, compression=None, proxy=None) as socket:
            sampling = f'{{"temperature": 1.0, "seed": {number}}}'
            await socket.send(f'{{"type": "configure", "sampling": {sampling}}}')
            last, feed_at = None, time.monotonic() + dice.random() * _FEED_EVERY_S
            while (now := time.monotonic()) < end:
                frame = decode_server(await asyncio.wait_for(socket.recv(), 30))
                if isinstance(frame, Error):
                    return False
                if not isinstance(frame, Row):
                    continue
                now = time.monotonic()
                if last is not None:
                    late.append(max(now - last - beat, 0.0))
                last = now
                if now >= feed_at:
                    feed_at = now + _FEED_EVERY_S
                    await socket.send(f'{{"type": "feed", "stream": "s0", "text": "{_TEXT}"}}')
            await socket.send('{"type": "close"}')
    except (OSError, TimeoutError, websockets.ConnectionClosed):
        return False
    return True


def _metrics(port: int) -> dict[str, float]:
    """The server's metrics by name, with labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(msllm\S+) (\S+)$", text, re.M)}


def _quantile(before: dict[str, float], after: dict[str, float], share: float) -> float | None:
    """The upper end, in ms, of the bucket of `msllm_row_late_seconds` that holds a quantile."""
    name = 'msllm_row_late_seconds_bucket{le="'
    buckets = {
        float(key.removeprefix(name)[:-2]): value - before.get(key, 0)
        for key, value in after.items()
        if key.startswith(name)
    }
    total = max(buckets.values(), default=0.0)
    found = [end for end, count in sorted(buckets.items()) if total and count >= share * total]
    return 1e3 * found[0] if found else None
