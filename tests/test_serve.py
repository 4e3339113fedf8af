"""The server: sessions over real sockets, its limits, and what survives bad clients."""

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import threading
import types

import jax
import numpy as np
import pytest
import websockets
from websockets.asyncio.client import connect

from msllm.chat.events import replay
from msllm.chat.recording import Recording
from msllm.cli.main import main
from msllm.config import TokenizerConfig
from msllm.decode.engine import DecodeOptions, Engine
from msllm.errors import UserError
from msllm.serve import protocol
from msllm.serve.access import Access, check_exposure
from msllm.serve.app import Server
from msllm.serve.limits import Bucket, Limits
from msllm.serve.log import LogFolder
from msllm.serve.metrics import Metrics
from msllm.serve.run import Uvicorn, listen
from msllm.serve.sampling import changed_options
from msllm.serve.sessions import CellTexts
from msllm.tokenizer import train

SESSIONS, WINDOW, BEAT = 3, 8, 0.004
PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs/serving.md"
TOKEN = "0123456789abcdef"


@pytest.fixture
def model(make_model):
    """A small model whose tokenizer has bytes. All engines share their compiled functions."""
    tokenizer = train(["abc def ghi"] * 20, TokenizerConfig(vocab_size=320))
    return dataclasses.replace(make_model(vocab_size=tokenizer.vocab_size), tokenizer=tokenizer)


@pytest.fixture
def serve(model):
    """A function serve(body, ...) that runs `body(Site)` beside a server."""

    def run(body, beat=BEAT, drain=0.0, logs=None, access=None, **limits):
        engine = Engine(model, sessions=SESSIONS, window=WINDOW)
        server = Server(
            engine, beat_seconds=beat, limits=Limits(**limits), logs=logs, access=access
        )

        async def both():
            uvicorn = Uvicorn(server, drain)
            with listen("127.0.0.1", 0) as listening:
                site = Site(server, uvicorn, listening.getsockname()[1])
                serving = asyncio.create_task(uvicorn.serve(sockets=[listening]))
                try:
                    async with asyncio.timeout(300):  # the cores may be busy
                        while not server.sessions.ready:
                            await asyncio.sleep(0.01)
                        return await body(site)
                finally:
                    if not serving.done():
                        uvicorn.begin_to_drain()
                    await serving

        return asyncio.run(both())

    return run


class Site:
    """A running server."""

    def __init__(self, server, uvicorn, port):
        self.server, self.uvicorn, self.port = server, uvicorn, port

    def connect(self, **options):
        url = f"ws://127.0.0.1:{self.port}/v1/sessions"
        return connect(url, compression=None, proxy=None, **options)

    async def open(self, kind="configure", sock=None, **fields):
        """A client whose first frame was granted."""
        client = Client(await self.connect(**({"sock": sock} if sock else {})))
        await client.send(kind, **fields)
        client.granted = await client.receive()
        return client

    async def get(self, path, **headers):
        """(status, headers, body) of a GET request."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        headers = {"host": f"127.0.0.1:{self.port}", "connection": "close"} | headers
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        first, *rest = head.decode().split("\r\n")
        return int(first.split()[1]), dict(x.lower().split(": ", 1) for x in rest), body.decode()


class Client:
    """A client's end of a connection."""

    def __init__(self, socket):
        self.socket, self.rows, self.granted = socket, [], None

    async def send(self, kind, **fields):
        await self.socket.send(json.dumps({"type": kind, **fields}))

    async def receive(self):
        frame = protocol.decode_server(await self.socket.recv())
        if isinstance(frame, protocol.Row):
            self.rows.append(frame)
        return frame

    async def until(self, kind):
        """The next frame of a kind."""
        while not isinstance(frame := await self.receive(), kind):
            pass
        return frame

    async def more(self, rows):
        """Receives this many rows."""
        for _ in range(rows):
            await self.until(protocol.Row)

    async def error(self, kind, **fields):
        """The code of the error that a frame causes."""
        await self.send(kind, **fields)
        return (await self.until(protocol.Error)).code

    async def closed(self):
        """(code of the last error or reason of `done`, close code)."""
        last = ""
        try:
            while True:
                frame = await self.receive()
                last = getattr(frame, "code", None) or getattr(frame, "reason", last)
        except websockets.ConnectionClosed as error:
            return last, error.rcvd.code

    async def save(self):
        """The log of the session."""
        await self.send("save")
        return await self.until(protocol.Log)


def details(rows):
    """What tests compare of rows that came over the network."""
    return [(r.row, r.tokens, r.entropy, r.logprob) for r in rows]


def alone(model, rows):
    """The same of rows of an engine."""
    names = model.streams.names

    def numbers(values):
        return {name: float(x) for name, x in zip(names, values) if not np.isnan(x)}

    return [
        (r.index, dict(zip(names, r.tokens.tolist())), numbers(r.entropy), numbers(r.logprob))
        for r in rows
    ]


def check(model, log, rows):
    """Checks that rows equal those of the log's session alone, bit for bit."""
    engine = Engine(model, sessions=SESSIONS, window=WINDOW)
    expected = alone(model, replay(engine, log.options, log.events, log.rows))
    assert details(rows) == expected[rows[0].row : rows[-1].row + 1]


ALL = {"show": ["tokens", "entropy", "logprob"]}


def test_sessions_equal_those_that_run_alone(serve, model, tmp_path):
    """Three clients do all that a client can do, at once, and are compared with sessions alone."""
    compiled = []

    async def steered(site):
        """A paused client, whose actions fall on known rows."""
        sampling = {"temperature": {"output": 1.5, "thought": 0.7}, "top_k": 50, "seed": 3}
        client = await site.open(paused=True, sampling=sampling, **ALL)
        await client.send("feed", stream="user", text="abc d")
        await client.send("resume", rows=4)
        await client.more(4)
        await client.send("force", stream="thought", text=[7, -1, 9])
        await client.send("mute", stream="output")
        await client.send("feed", stream="user", text="né")
        await client.send("resume", rows=3)
        await client.more(3)
        await client.send("mute", stream="output", muted=False)
        await client.send("allow", stream="output", text="abc")
        await client.send("drop")
        await client.send("sample", sampling={"temperature": 2})
        await client.send("resume", rows=2 * WINDOW)
        await client.more(2 * WINDOW)
        return client

    async def live(site, seed):
        """A client that acts at any time."""
        client = await site.open(sampling={"temperature": 1, "seed": seed}, **ALL)
        for stream in ("thought", "output"):
            await client.more(3)
            await client.send("feed", stream="user", text="abc def ghi")
            await client.send("mute", stream=stream)
            await client.more(4)
            await client.send("mute", stream=stream, muted=False)
        await client.more(40)
        return client

    async def body(site):
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
        )
        steady, moving = await asyncio.gather(steered(site), live(site, 1))
        await moving.send("fork", seed=9)
        forked = await moving.until(protocol.Forked)
        fork = await site.open("reconnect", session=forked.session)
        assert fork.granted.row == forked.row and fork.granted.options["seed"] == 9
        await fork.send("feed", stream="user", text="ihg")
        await asyncio.gather(fork.more(12), moving.more(12))
        # Another client of the same log gets the same rows.
        for client in (steady, moving):
            await client.send("pause")
        logs = [await client.save() for client in (steady, moving, fork)]
        await steady.send("close")
        assert await steady.closed() == ("closed", 1000)
        log = logs[1]
        again = await site.open(
            sampling={k: v for k, v in log.options.items() if k != "ablated"},
            events=log.events,
            stop={"rows": log.rows},
            **ALL,
        )
        assert await again.closed() == ("stop", 1000)
        assert details(again.rows) == details(moving.rows[: log.rows])
        return [client.rows for client in (steady, moving, fork)], logs

    rows, logs = serve(body)
    jax.monitoring.clear_event_listeners()
    assert not compiled
    for one, log in zip(rows, logs, strict=True):
        check(model, log, [row for row in one if row.row < log.rows])

    # The steered session once more, with the calls of the library.
    engine = Engine(model, sessions=SESSIONS, window=WINDOW)
    options = DecodeOptions(temperature=(0.0, 0.7, 1.5), top_k=50, seed=3)
    with engine.open(options) as session:
        session.feed("user", "abc d")
        shown = [session.step() for _ in range(4)]
        session.force("thought", [7, -1, 9])
        session.options = dataclasses.replace(options, ablated=("output",))
        session.feed("user", "né")
        shown += [session.step() for _ in range(3)]
        session.options = dataclasses.replace(options, temperature=2)
        session.allow("output", "abc")
        session.drop()
        shown += [session.step() for _ in range(2 * WINDOW)]
        read = session.transcript()
    assert details(rows[0]) == alone(model, shown)
    path = tmp_path / "log.npz"
    path.write_bytes(logs[0].file)
    branch = Recording.load(path).branches[0]
    np.testing.assert_array_equal(branch.tokens[-WINDOW:], read.tokens)


def test_input_is_read_in_the_next_row_and_its_text_is_whole(serve, model):
    async def body(site):
        client = await site.open(paused=True, show=["tokens"])
        await client.send("resume", rows=1)
        await client.more(1)
        await client.send("feed", stream="user", text="né a")
        await client.send("resume", rows=7)
        await client.more(7)
        return client.rows

    rows = serve(body)
    ids = model.tokenizer.encode("né a")
    assert rows[1].tokens_before == {"user": ids[0]} and rows[1].tokens["user"] == ids[1]
    cells = [rows[1].before["user"]] + [row.text.get("user", "") for row in rows[1:]]
    assert "".join(cells) == "né a"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(cells) and "" in cells[: len(ids)]
    assert rows[1].waiting == {"user": len(ids) - 2}
    assert [row.seq for row in rows] == list(range(1, 9))


def test_texts_of_cells_follow_what_is_read(model):
    """A token that replaces another one of the row shown last takes its text back."""
    silence = model.tokenizer.silence_id
    texts = CellTexts(types.SimpleNamespace(model=model, streams=model.streams, silence_id=silence))
    a, b, *smile = model.tokenizer.encode("xy🙂")

    def row(index, token):
        tokens = np.array([token, silence, silence], np.int32)
        return types.SimpleNamespace(
            index=index, tokens=tokens, present=np.ones(3, bool), text=("", "", "")
        )

    table = np.full((6, 3), silence)
    assert texts.add(row(0, a), table) == ({}, {"user": "x"})
    table[0, 0] = b
    assert texts.add(row(1, silence), table) == ({"user": "y"}, {})
    table[1, 0] = smile[0]
    assert texts.add(row(2, smile[1]), table) == ({"user": ""}, {"user": ""})
    table[2, 0] = smile[1]
    copied = texts.copy()
    assert texts.add(row(3, smile[2]), table) == ({}, {"user": ""})
    table[3, 0] = smile[2]
    assert texts.add(row(4, smile[3]), table) == ({}, {"user": "🙂"})
    assert copied.add(row(3, a), table)[1] != {"user": ""}  # it has not seen the third byte


def test_bad_frames_are_refused_by_name(serve):
    async def body(site):
        client = await site.open(paused=True)
        for text in ("{", "[]", '{"type":"exec"}', '{"type":"pause","x":1}', "NaN", "[" * 9999):
            await client.socket.send(text)
            assert (await client.until(protocol.Error)).code == "bad_frame", text
        await client.socket.send(b"\xff\xfe")
        assert (await client.until(protocol.Error)).code == "bad_frame"
        assert await client.error("feed", stream="user", text="\ud800") == "bad_frame"
        for kind, fields in {
            "feed": {"stream": "output", "text": "a"},
            "force": {"stream": "nowhere", "text": "a"},
            "allow": {"stream": "output", "text": []},
            "mute": {"stream": "nowhere"},
            "sample": {"sampling": {"temperature": -1}},
            "show": {"show": ["weights"]},
        }.items():
            assert await client.error(kind, id=kind, **fields) == "invalid", kind
        assert await client.error("feed", stream="user", text=[10**6]) == "invalid"
        assert await client.error("sample", sampling={"ablated": 1}) == "invalid"
        assert await client.error("sample", sampling={"seed": {"user": 1}}) == "invalid"
        await client.send("configure")
        error = await client.until(protocol.Error)
        assert (error.code, error.id) == ("out_of_order", "")
        assert await client.error("save", id="x") == "invalid"  # there is no row yet
        await client.send("resume", rows=1)
        await client.more(1)  # the session is as it was
        assert (await client.save()).events == []
        for first, code in {
            '{"type":"pause"}': "out_of_order",
            '{"type":"reconnect","session":"guess"}': "unknown_session",
            '{"type":"configure","events":[{"row":0,"what":"exec"}]}': "invalid",
            '{"type":"configure","events":[{"row":-1,"what":"drop"}]}': "invalid",
            '{"type":"configure","allow":{"output":[]}}': "invalid",
        }.items():
            other = Client(await site.connect())
            await other.socket.send(first)
            assert await other.closed() == (code, 1008), first
        bad = [{"row": 2, "what": "feed", "stream": "output", "text": "a"}]
        other = await site.open(events=bad)
        assert await other.closed() == ("failed", 1011) and len(other.rows) == 2
        assert len(site.server.sessions.engine.sessions) == 1
        for _ in range(2 * SESSIONS):  # sessions whose last frames nobody fetches
            other = await site.open()
            await other.send("close")
            other.socket.transport.abort()
        while (
            len(site.server.sessions.open_ones) > 1 or len(site.server.sessions.all) > SESSIONS + 1
        ):
            await asyncio.sleep(0.02)

    serve(body, frames_at_once=1000)


def test_limits(serve):
    async def body(site):
        sessions = site.server.sessions
        client = await site.open(paused=True)
        await client.send("feed", stream="user", text="xyz")
        for kind, stream in (("feed", "user"), ("force", "output")):
            assert await client.error(kind, stream=stream, text="x" * 8) == "pending_tokens"
        assert await client.error("feed", stream="user", text="a" * 3000) == "frame_bytes"
        assert sessions.open_ones[0].session.waiting == {"user": 3}
        with contextlib.suppress(websockets.ConnectionClosed):
            for _ in range(200):
                await client.send("pause")
        assert await client.closed() == ("frame_rate", 1008)
        while sessions.engine.free < SESSIONS:  # nobody reconnects
            await asyncio.sleep(0.02)

        others = [await site.open(paused=True) for _ in range(SESSIONS)]
        full = Client(await site.connect())
        await full.send("configure")
        error = await full.receive()
        assert (error.code, error.retry_s) == ("full", 7.0)
        assert await full.closed() == ("", 1013)
        assert await others[0].error("fork") == "full"
        for other in others:
            await other.send("resume")
            assert await other.closed() == ("rows", 1000) and len(other.rows) == 20

        waiting = [await site.connect() for _ in range(SESSIONS + 2)]
        with pytest.raises(websockets.InvalidStatus) as refused:
            await site.connect()
        assert refused.value.response.status_code == 503
        assert refused.value.response.headers["retry-after"] == "7"
        for one in waiting:
            await one.close()
        idle = await site.open(paused=True)
        sessions.open_ones[0].last_frame -= 901
        assert await idle.closed() == ("idle", 1000)

    serve(
        body,
        rows=20,
        pending_tokens=10,
        frame_bytes=2000,
        frames_per_s=20,
        frames_at_once=30,
        grace_s=0.1,
        spare_connections=2,
        retry_s=7,
    )


def test_the_first_frame_must_come_in_time(serve):
    async def body(site):
        silent = Client(await site.connect())
        assert await silent.closed() == ("no_configure", 1008)

    serve(body, configure_s=0.1)


def test_a_bucket_fills_at_its_rate():
    bucket = Bucket(2.0, 3, now=10.0)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert bucket.take(10.5) and not bucket.take(10.6)
    assert [bucket.take(99.0) for _ in range(4)] == [True, True, True, False]
    with pytest.raises(UserError, match="held_frames is 2: must be"):
        Limits(held_frames=2)


def test_a_slow_reader_is_dropped_and_delays_nobody(serve):
    async def body(site):
        # Small buffers, so that few rows fill them.
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", site.port))
        slow = await site.open(sock=sock, show=["tokens", "entropy", "logprob"])
        slow.socket.transport.pause_reading()
        served = site.server.sessions.open_ones[0]
        quick = await site.open()
        while served.outbox.reader:
            await quick.more(1)
        assert served.outbox._frames[0][1] and quick.rows[-1].row > 20
        assert not served.ended and not served.advances
        await quick.more(3)
        errors = site.server.metrics.errors.labels("slow_reader")
        while not errors._value.get():
            await quick.more(1)
        # It can come back for what it missed.
        back = await site.open("reconnect", session=slow.granted.session, seen=served.outbox.seq)
        await back.more(3)
        return [row.late_ms for row in quick.rows]

    # The beat is as fast as the engine, so only a wait for the slow reader would be so long.
    assert max(serve(body, beat=0.001, unsent_frames=20, held_frames=20)) < 500


def test_a_client_reconnects_without_a_gap(serve, model):
    async def body(site):
        client = await site.open(sampling={"temperature": 1.0}, **ALL)
        await client.more(5)
        await client.send("feed", stream="user", text="abc def")
        await client.more(2)
        client.socket.transport.abort()
        served = site.server.sessions.open_ones[0]
        while served.advances:
            await asyncio.sleep(0.005)
        rows = served.session.rows
        await asyncio.sleep(10 * BEAT)
        assert served.session.rows - rows <= 1  # it waits for its client
        seen = client.rows[-1].seq
        back = await site.open("reconnect", session=client.granted.session, seen=seen)
        await back.more(10)
        assert [row.seq for row in back.rows] == list(range(seen + 1, seen + 11))
        log = await back.save()
        taker = await site.open("reconnect", session=client.granted.session, seen=back.rows[-1].seq)
        assert await back.closed() == ("replaced", 1008)
        await taker.more(1)
        for seen, code in ((10**6, "missed"), (0, "missed")):
            other = Client(await site.connect())
            await taker.more(1 if seen else 30)
            await other.send("reconnect", session=client.granted.session, seen=seen)
            assert await other.closed() == (code, 1008)
        await taker.send("close")
        assert await taker.closed() == ("closed", 1000)
        assert not site.server.sessions.all
        return client.rows + back.rows, log

    rows, log = serve(body, unsent_frames=30, held_frames=30)
    check(model, log, [row for row in rows if row.row < log.rows])


def test_a_session_without_a_client_expires(serve):
    async def body(site):
        client = await site.open()
        await client.more(1)
        await client.socket.close()
        while site.server.sessions.all:
            await asyncio.sleep(0.02)
        assert site.server.sessions.engine.free == SESSIONS
        ended = site.server.metrics.ended.labels("expired")
        assert ended._value.get() == 1

    serve(body, grace_s=0.1)


def test_who_may_connect(serve):
    async def body(site):
        host = f"127.0.0.1:{site.port}"
        for headers, status in (
            ({"origin": f"http://{host}"}, None),
            ({"origin": "https://friend.example"}, None),
            ({"origin": "https://evil.example"}, 403),
            ({"origin": "null"}, 403),
        ):
            if status:
                with pytest.raises(websockets.InvalidStatus) as refused:
                    await site.connect(additional_headers=headers)
                assert refused.value.response.status_code == status
            else:
                await (await site.connect(additional_headers=headers)).close()
        for fields in ({}, {"token": TOKEN[:-1]}, {"token": "\u00e9"}):
            client = Client(await site.connect())
            await client.send("configure", **fields)
            assert await client.closed() == ("unauthorized", 1008)
        client = await site.open(token=TOKEN)
        other = Client(await site.connect())
        await other.send("reconnect", session=client.granted.session)
        assert await other.closed() == ("unauthorized", 1008)
        bearer = {"authorization": f"Bearer {TOKEN}"}
        other = Client(await site.connect(additional_headers=bearer))
        await other.send("configure")
        assert isinstance(await other.receive(), protocol.Granted)
        assert (await site.get("/metrics"))[0] == 401
        status, _, body = await site.get("/metrics", **bearer)
        assert status == 200 and "msllm_sessions 2.0" in body and TOKEN not in body
        assert (await site.get("/healthz"))[0] == (await site.get("/readyz"))[0] == 200
        status, headers, body = await site.get("/")
        assert status == 200 and "script-src 'sha256-" in headers["content-security-policy"]
        # Nothing that comes from a model can become HTML.
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval", body)
        for path in ("/../setup.py", "/%2e%2e/setup.py", "/etc/passwd"):
            assert (await site.get(path))[0] == 404

    serve(body, access=Access(TOKEN, ["https://friend.example"]))

    async def open_site(site):
        # A name that an attacker had resolved to this machine.
        assert (await site.get("/readyz", host=f"evil.example:{site.port}"))[0] == 403
        for host in (f"localhost:{site.port}", "[::1]:80", "127.0.0.1"):
            assert (await site.get("/readyz", host=host))[0] == 200

    serve(open_site)


def test_listening_elsewhere_needs_a_token():
    check_exposure("127.0.0.1", "")
    check_exposure("::1", "")
    check_exposure("0.0.0.0", TOKEN)
    for host in ("0.0.0.0", "::", "example.org", "10.0.0.1"):
        with pytest.raises(UserError, match="set --token or MSLLM_TOKEN"):
            check_exposure(host, "")
    with pytest.raises(UserError, match="at least 16 printable"):
        check_exposure("0.0.0.0", "short")


def test_sampling_of_streams(model):
    options = DecodeOptions(temperature=0.5, seed=1)
    changed = changed_options(options, {"temperature": {"output": 1}, "top_k": 3}, model.streams)
    assert changed == DecodeOptions(temperature=(0.5, 0.5, 1), top_k=3, seed=1)
    again = changed_options(changed, {"temperature": {"user": 2}}, model.streams)
    assert again.temperature == (2, 0.5, 1)
    with pytest.raises(UserError, match="unknown option 'heat' in sampling: options are temp"):
        changed_options(options, {"heat": 1}, model.streams)
    with pytest.raises(UserError, match="one for each of the 3 streams"):
        changed_options(options, {"top_p": [1, 1]}, model.streams)


def test_the_examples_and_tables_of_the_documentation():
    frames = re.findall(r"^([<>]) ({.*?})(?=\n[<>`])", PAGE.read_text(), flags=re.M | re.S)
    kinds = set()
    for side, text in frames:
        frame = (protocol.decode if side == ">" else protocol.decode_server)(text)
        assert set(json.loads(text)) <= {"type", *frame.__struct_fields__}, text
        kinds.add(type(frame).__name__)
    assert kinds == {
        *"Configure Reconnect Feed Force Allow Drop Mute Sample Show Fork Pause Resume".split(),
        *"Save Close Granted Row Forked Notice Error Done".split(),
    }
    page = PAGE.read_text()
    for name in (*protocol.ERRORS, *protocol.REASONS, *protocol.DETAILS):
        assert f"`{name}`" in page, name
    page = page.partition("## Limits")[2]
    for field in dataclasses.fields(Limits):
        shown = re.search(rf"^\|.*`(--)?{field.name}`.*$", page, flags=re.M)
        assert field.name == "retry_s" or f"{field.default:g}"[:5] in shown[0], field.name
    for name in re.findall(r"`msllm_(\w+)", page):
        assert f"msllm_{name}" in Metrics().text().decode()


def test_a_signal_drains_the_server(serve, tmp_path, model):
    async def body(site):
        client = await site.open(sampling={"temperature": 1.0}, **ALL)
        leaving = await site.open()
        await client.more(5)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await client.until(protocol.Notice)).code == "draining"
        assert (await site.get("/readyz"))[0] == 503 and (await site.get("/healthz"))[0] == 200
        late = Client(await site.connect())
        await late.send("configure")
        assert await late.closed() == ("draining", 1013)
        await client.send("feed", stream="user", text="abc")  # sessions go on for a while
        await client.more(3)
        await leaving.send("close")
        assert await leaving.closed() == ("closed", 1000)
        assert await client.closed() == ("draining", 1012)
        return client.rows

    rows = serve(body, drain=0.5, logs=LogFolder(tmp_path / "logs"))
    logs = [Recording.load(path) for path in (tmp_path / "logs").iterdir()]
    assert len(logs) == 2
    log = max(logs, key=lambda log: len(log.branches[0].events))
    branch = log.branches[0]
    assert branch.rows == len(rows) and branch.events[0]["text"] == "abc"
    engine = Engine(model, sessions=SESSIONS, window=WINDOW)
    expected = alone(model, replay(engine, log.options, branch.events, branch.rows))
    assert details(rows) == expected


def test_the_command(monkeypatch, model, tmp_path, capfd, caplog):
    """The command serves until a signal comes, and saves the logs."""
    monkeypatch.setattr("msllm.cli.serve.load_model", lambda flags: model)
    monkeypatch.setenv("MSLLM_TOKEN", TOKEN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen = []

    def client():
        async def talk():
            async with asyncio.timeout(300):
                while True:
                    try:
                        url = f"ws://127.0.0.1:{port}/v1/sessions"
                        one = Client(await connect(url, proxy=None))
                        await one.send("configure", token=TOKEN)
                        if isinstance(await one.receive(), protocol.Granted):
                            break
                    except (OSError, websockets.ConnectionClosed):
                        pass
                    await asyncio.sleep(0.05)
                await one.more(3)
                seen.extend(one.rows)

        try:
            asyncio.run(talk())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=client)
    thread.start()
    flags = [f"--port={port}", f"--sessions={SESSIONS}", f"--window={WINDOW}", "--beat_ms=4"]
    status = main(["serve", "--checkpoint=x", f"--logs={tmp_path}", "--drain=0", *flags])
    thread.join()
    assert status == 0 and len(seen) == 3
    assert len(list(tmp_path.iterdir())) == 1
    output = capfd.readouterr()
    assert TOKEN not in output.out + output.err + caplog.text

    monkeypatch.delenv("MSLLM_TOKEN")
    for flag, words in {
        "--host=0.0.0.0": "there is no token",
        "--beat_ms=0": "--beat_ms is 0.0: must be",
        "--grace_s=-1": "grace_s is -1.0: must be",
        f"--logs={__file__}": "cannot be made",
    }.items():
        assert main(["serve", "--checkpoint=x", flag]) == 2
        assert words in capfd.readouterr().err
