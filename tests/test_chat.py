"""Live sessions with and without a screen, recordings, replays, and the server in docs/chat.md."""

import asyncio
import collections
import dataclasses
import json
import os
import pathlib
import re
import signal
import sys

import numpy as np
import pytest
from textual import events

from msllm.chat.player import Live, Pacer, Replay
from msllm.chat.recording import Recording, free_name
from msllm.chat.screen import KEYS, ChatApp, Line
from msllm.cli import chat
from msllm.cli.main import parser_of
from msllm.decode.engine import DecodeOptions, Engine
from msllm.errors import UserError
from msllm.evals import score
from msllm.view import cells

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs/chat.md"
OPTIONS = DecodeOptions(temperature=1.5, seed=4)
WINDOW, FAST = 128, 1000.0


@pytest.fixture
def engine(make_model, letters):
    """An engine for two sessions. All have the same shape, so their program is compiled once."""
    model = dataclasses.replace(make_model(4, vocab_size=letters.vocab_size), tokenizer=letters)
    return Engine(model, sessions=2, window=WINDOW)


async def until(condition, seconds=60.0):
    """Waits until a condition holds; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


def running(player, body):
    """Runs `body(player)` while the player makes rows."""

    async def both():
        rows = asyncio.create_task(player.run())
        try:
            return await body(player)
        finally:
            rows.cancel()

    return asyncio.run(both())


async def press(driver, *keys):
    """Presses keys. The pilot's own method would wait for a pause between rows."""
    for key in keys:
        driver.app.post_message(events.Key(key, key if len(key) == 1 else None))
        await asyncio.sleep(0.005)


async def redraw(driver):
    """Waits until the screen shows everything that has happened."""
    await driver.pause(0.02)
    await driver.pause(0.02)


def pilot(app, body, size=(80, 24)):
    """Runs `body(pilot)` while the app runs on a screen of this size."""

    async def run():
        async with app.run_test(size=size) as driver:
            return await body(driver)

    return asyncio.run(run())


def lines(app):
    """The lines that the screen shows."""
    return [
        "".join(segment.text for segment in strip).rstrip()
        for strip in app.screen._compositor.render_strips()
    ]


def without_a_screen(engine, branch, options=OPTIONS):
    """(tokens, present) of a session that is stepped by hand with the events of a branch."""
    with engine.open(options) as session:
        events = collections.deque(branch.events)
        while True:
            while events and events[0]["row"] == session.rows:
                event = events.popleft()
                if event["what"] == "feed":
                    session.feed(event["stream"], event["text"])
                    continue
                if event["what"] == "drop":
                    session.drop()
                    continue
                ablated = set(session.options.ablated)
                if event["what"] == "mute":
                    ablated.add(event["stream"])
                else:
                    ablated.discard(event["stream"])
                session.options = dataclasses.replace(session.options, ablated=tuple(ablated))
            if session.rows == branch.rows:
                assert not events
                return session.transcript()[1:]
            session.step()


def check(engine, branch):
    """Checks that a branch has the tokens of a session without a screen."""
    tokens, present = without_a_screen(engine, branch)
    np.testing.assert_array_equal(branch.tokens, tokens)
    np.testing.assert_array_equal(branch.present, present)


def test_pacer():
    pacer = Pacer()
    assert pacer.wait(5.0, 0.5) == 0  # the first row
    pacer.record(5.0, 0.5)
    assert pacer.wait(5.1, 0.5) == pytest.approx(0.4)
    assert pacer.wait(5.1, 0.2) == pytest.approx(0.1)  # the pace has changed
    pacer.record(5.6, 0.5)  # 0.1 s late; the next row is due as if this one had been on time
    assert pacer.wait(5.6, 0.5) == pytest.approx(0.4)
    # Much too late: the next row is due at once, and the other missed rows are skipped.
    pacer.record(8.0, 0.5)
    assert pacer.wait(8.0, 0.5) == 0
    pacer.record(8.0, 0.5)
    assert pacer.wait(8.0, 0.5) == pytest.approx(0.5)
    assert pacer.rate is None and pacer.wait(8.0, float("inf")) == float("inf")
    pacer.record(8.5, 0.5)
    assert pacer.rate == pytest.approx(4 / 3.5)
    pacer.restart()
    assert pacer.wait(8.5, 0.5) == 0 and pacer.rate is None


def test_pace_of_a_player(engine):
    live = Live(engine, OPTIONS, pace=3.0)
    live.change_pace(1)
    assert live.pace == 5
    live.change_pace(-2)
    assert live.pace == 1
    live.change_pace(-10)
    assert live.pace == 0.1
    live.change_pace(100)
    assert live.pace == 5000

    async def body(live):
        await until(lambda: live.rows > 40)
        assert live.late and live.rate < 5000  # no engine is that fast
        live.change_pace(-100)
        live.pause()
        live.pause(False)
        await until(lambda: live.rows > 41)
        before = live.rows
        await asyncio.sleep(0.1)
        assert live.rows <= before + 1 and not live.late  # 0.1 rows per second
        live.pace = 1e-3
        live.change_pace(-1)
        live.change_pace(100)  # applies at once, not after the 1000 s that were left
        await until(lambda: live.rows > before + 20)

    running(live, body)
    with pytest.raises(UserError, match="the pace is 0"):
        Live(engine, pace=0)


def test_a_live_session_equals_one_without_a_screen(engine):
    """Feeds, mutes and forks a session while it makes rows.

    Each branch must equal a session that is stepped by hand.
    """
    live = Live(engine, OPTIONS, FAST)

    async def body(live):
        await until(lambda: live.rows > 3)
        live.feed("user", "abcdefgh")
        live.feed("tool", "de")
        await until(lambda: live.rows > 6)
        live.mute("output")
        live.mute("user")
        await until(lambda: live.rows > 12)
        assert live.muted == {"output", "user"} and live.waiting["user"] > 0
        live.fork()
        # Only the fork is fed this, even if the first branch is still making a row.
        live.feed("tool", "ihg")
        await until(lambda: live.branch == 1 and live.rows > 20)
        live.mute("user")
        live.mute("output")
        await until(lambda: live.rows > 28)
        assert not live.muted and live.waiting == {"user": 0, "tool": 0}
        live.pause()
        live.switch(0)
        await until(lambda: live.branch == 0)
        rows = live.rows
        live.step()
        await until(lambda: live.rows == rows + 1)
        await asyncio.sleep(0.05)
        assert live.rows == rows + 1 and live.muted == {"output", "user"}

    running(live, body)
    live.close()
    first, second = live.recording.branches
    assert (second.parent, second.forked, first.rows) == (0, first.rows - 1, first.rows)
    check(engine, first)
    check(engine, second)

    def text(branch, stream):
        return engine.model.tokenizer.decode(branch.tokens[:, stream])

    assert text(second, 0) == "abcdefgh"
    assert text(first, 0) in "abcdefgh" and text(first, 0) != "abcdefgh"
    assert text(second, 3) == "deihg" and text(first, 3) == "de"
    muted = next(event["row"] for event in first.events if event["what"] == "mute")
    assert np.all(first.tokens[muted:, 2] == engine.silence_id)
    assert np.any(first.tokens[:muted, 2] != engine.silence_id)
    assert np.all(np.diff(first.time) >= 0) and first.time[0] == 0
    with pytest.raises(UserError, match="'output' is not an input: inputs are user, tool"):
        live.feed("output", "a")
    with pytest.raises(UserError, match="there is no branch 2: give a number from 0 to 1"):
        live.switch(2)


def test_rows_beyond_the_window_are_kept(engine):
    live = Live(engine, OPTIONS, 5000.0)
    # More rows than the branch's first arrays hold.
    running(live, lambda live: until(lambda: live.rows > 2 * WINDOW + 50))
    with engine.open(OPTIONS) as session:
        expected = [session.step().tokens for _ in range(live.rows)]
    np.testing.assert_array_equal(live.current.tokens, expected)


def test_recording(engine, tmp_path):
    live = Live(engine, OPTIONS, FAST)
    path = tmp_path / "chat.npz"
    with pytest.raises(UserError, match="nothing to save"):
        live.recording.save(path)

    async def body(live):
        live.feed("user", "abc")
        await until(lambda: live.rows > 5)
        live.fork()
        await until(lambda: live.branch == 1 and live.rows > 12)

    running(live, body)
    live.recording.save(path)
    kept = path.read_bytes()
    with pytest.raises(UserError, match="exists already, and nothing is overwritten"):
        live.recording.save(path)
    assert path.read_bytes() == kept and free_name(path) == tmp_path / "chat-2.npz"
    with pytest.raises(UserError, match="cannot be written"):
        live.recording.save(tmp_path / "nowhere" / "chat.npz")

    loaded = Recording.load(path)
    assert (loaded.names, loaded.kinds) == (engine.streams.names, engine.streams.kinds)
    assert loaded.tokenizer.hash == engine.model.tokenizer.hash
    assert loaded.options == json.loads(json.dumps(dataclasses.asdict(OPTIONS)))
    for ours, theirs in zip(live.recording.branches, loaded.branches, strict=True):
        for name in ("tokens", "present", "time"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        for name in ("events", "parent", "forked"):
            assert getattr(ours, name) == getattr(theirs, name)

    # The score command reads recordings.
    tables = score.read_tables(str(path), engine.model).tables
    np.testing.assert_array_equal(
        tables["tokens"][0, : loaded.branches[0].rows], loaded.branches[0].tokens
    )
    assert tables["segment"].sum(axis=1).tolist() == [branch.rows for branch in loaded.branches]

    (tmp_path / "text.npz").write_text("no recording")
    np.savez(tmp_path / "tables.npz", tokens=np.zeros((1, 2, 3), int))
    (tmp_path / "half.npz").write_bytes(kept[: len(kept) // 2])
    for name in ("text", "tables", "half"):
        with pytest.raises(UserError, match=f"{name}.npz is not a recording"):
            Recording.load(tmp_path / f"{name}.npz")
    with pytest.raises(UserError, match="there is no recording"):
        Recording.load(tmp_path / "none.npz")


def shown_rows(app):
    """{row: words} of the table on the screen."""
    rows = [line.split() for line in lines(app) if re.match(r"\d+ ", line)]
    return {int(row[0]): row[1:] for row in rows}


def drawn(recording, branch):
    """{row: words} that the screen should show of a branch."""
    table = zip(branch.tokens.tolist(), branch.present.tolist())

    def draw(tokens, present):
        return [
            cells.cell(recording.tokenizer, *cell).plain
            for cell in zip(tokens, present, recording.kinds)
        ]

    return {row: draw(*both) for row, both in enumerate(table)}


def test_screen(engine, tmp_path):
    """Types while the model makes rows, pauses, mutes, forks, saves; then replays the recording."""
    live, out = Live(engine, OPTIONS, 20.0), tmp_path / "chat.npz"
    app = ChatApp(live, str(out))

    async def body(driver):
        before = live.rows
        for letter in "bad":
            await press(driver, letter)
            await until(lambda: live.rows > before)  # the model does not wait
            before = live.rows
        await press(driver, "enter", "tab", *"hi", "enter")
        await until(lambda: len(live.current.events) == 2 and not any(live.waiting.values()))
        await press(driver, "f2")
        await until(lambda: live.rows > before + 5)
        await press(driver, "ctrl+p")
        await until(lambda: live.paused)
        await driver.pause(0.1)  # a row that has begun is completed
        rows = live.rows
        await driver.pause(0.2)  # the time of four rows
        assert live.rows == rows and live.paused
        assert f"row {rows - 1} · 20 rows/s · paused" in "\n".join(lines(app))
        await press(driver, "ctrl+n")
        await until(lambda: live.rows == rows + 1)
        await press(driver, "ctrl+f", *"ace", "enter", "ctrl+p")
        await until(lambda: live.rows > rows + 6)
        await press(driver, "ctrl+p", "f2")
        await redraw(driver)
        assert live.recording.branches[0].rows == rows + 1  # the first branch has stopped
        assert "branch 2 of 2, forked from 1" in "\n".join(lines(app))
        await press(driver, "ctrl+q")  # does not quit before the session is saved
        assert app.is_running and app._exit is False
        await press(driver, "ctrl+s")
        await redraw(driver)
        shown = [(lines(app)[0], shown_rows(app))]
        await press(driver, "ctrl+o")
        await redraw(driver)
        return [*shown, (lines(app)[0], shown_rows(app))]

    (header, second), (muted, first) = pilot(app, body, size=(80, 140))
    assert header.split() == ["row", "user", "thought", "output", "▸tool"]
    assert muted.split() == ["row", "user", "✕thought", "output", "▸tool"]
    recording = Recording.load(out)
    for branch, shown in zip(recording.branches, (first, second), strict=True):
        assert shown == drawn(recording, branch) and len(shown) == branch.rows < WINDOW
        done = [(event["what"], event["stream"]) for event in branch.events]
        assert done[:3] == [("feed", "user"), ("feed", "tool"), ("mute", "thought")]
    live.close()
    for branch in recording.branches:
        check(engine, branch)
    muted_at = recording.branches[0].events[2]["row"]
    assert {cells[1] for row, cells in first.items() if row >= muted_at} == {"·"}
    assert [row[3] for row in second.values() if row[3] != "·"] == list("hiace")

    player = Replay(recording, pace=20.0)
    app = ChatApp(player)

    async def again(driver):
        await until(lambda: player.ended)
        await press(driver, "ctrl+f", "f1", "x")  # keys without a meaning in a replay
        await redraw(driver)
        shown = [shown_rows(app)]
        assert "the end" in "\n".join(lines(app)) and "fork" not in lines(app)[-1]
        await press(driver, "ctrl+o")
        await until(lambda: player.branch == 1 and player.ended)
        await redraw(driver)
        return [*shown, shown_rows(app)]

    assert pilot(app, again, size=(80, 140)) == [first, second]


def test_a_replay_keeps_its_times(engine):
    now = 0.0
    recording = Recording(engine.streams.names, engine.streams.kinds, engine.model.tokenizer)
    for row, seconds in enumerate((9.0, 1.0, 1.0, 1.0, 1.0, 20.0)):
        recording.branches[0].put(row, np.zeros(4, int), np.ones(4, bool), seconds)
    assert recording.branches[0].time.tolist() == [0, 1, 2, 3, 4, 24]
    player = Replay(recording, 2.0, clock=lambda: now)

    async def body(player):
        nonlocal now
        for rows in range(1, 6):
            await until(lambda: player.rows == rows)
            now += 0.5
            player.change_pace(0)  # makes the player look at the clock
        await asyncio.sleep(0.02)
        now += 9.4
        player.change_pace(0)
        await asyncio.sleep(0.02)
        assert player.rows == 5 and not player.late
        now += 0.2
        player.change_pace(0)
        await until(lambda: player.ended)

    running(player, body)


def test_narrow_screens(engine):
    """Columns share the width, hidden columns are counted, text wraps, scroll positions stay."""
    live = Live(engine, OPTIONS, 100.0)

    async def body(driver):
        app = driver.app
        await press(driver, *"abcabcabc", "enter", "d", "tab")
        await until(lambda: app.columns.target == "tool")
        assert app.query_one("Line").value == "d" and live.current.events[0]["stream"] == "user"
        await until(lambda: live.rows > 40)
        live.pause()
        await redraw(driver)
        narrow = lines(app)
        assert max(map(len, narrow)) <= 28 and narrow[0].split()[0] == "row" and "…" in narrow[0]
        await driver.click("Columns", offset=(11, 0))
        assert live.muted == {"thought"}
        await driver.click("Columns", offset=(11, 0))
        assert not live.muted
        await driver.click("Columns", offset=(11, 1))  # below the names
        assert not live.muted
        last = live.rows - 1
        assert max(shown_rows(app)) == last
        await press(driver, "pageup")
        await redraw(driver)
        back = shown_rows(app)
        assert max(back) < last
        for _ in range(3):
            live.step()
            await until(lambda: live.rows == last + 2)
            last += 1
        await redraw(driver)
        assert shown_rows(app) == back
        await press(driver, "pagedown", "pagedown", "ctrl+t")
        await redraw(driver)
        text = lines(app)[1 : app.columns.size.height]
        user = [line[:6].strip() for line in text]
        assert "".join(user) == "abcabcabc" and max(map(len, user)) < 7
        await driver.resize_terminal(14, 30)
        await redraw(driver)
        assert "1 of 4 streams hidden" in app._status()

    pilot(ChatApp(live), body, size=(28, 40))


def test_an_error_stops_rows_and_loses_none(engine, tmp_path):
    live = Live(engine, OPTIONS, FAST)
    app = ChatApp(live, str(tmp_path / "chat.npz"))

    async def body(driver):
        await until(lambda: live.rows > 3)
        engine._dispatch = lambda sessions: 1 / 0
        await until(lambda: live.paused)
        await press(driver, "ctrl+p", "ctrl+s")
        await redraw(driver)
        assert "stopped by ZeroDivisionError: division by zero" in "\n".join(lines(app))

    pilot(app, body)
    assert Recording.load(tmp_path / "chat.npz").branches[0].rows == live.rows > 3


@pytest.mark.parametrize("key", ["ctrl+q", "ctrl+c"])
def test_a_running_session_can_be_left(engine, tmp_path, key):
    """The second key quits although rows have come since the first, and not after other events."""
    live = Live(engine, OPTIONS, 200.0)
    app = ChatApp(live, str(tmp_path / "chat.npz"))

    async def rows(count):
        before = live.rows
        await until(lambda: live.rows >= before + count)

    def warnings():
        return sum("Not saved" in note.message for note in app._notifications)

    async def body(driver):
        await press(driver, *"abc", "enter")
        await rows(8)
        await press(driver, key)
        await until(lambda: warnings() == 1)
        await press(driver, "d", "enter")  # the session goes on
        await until(lambda: len(live.current.events) == 2)
        await press(driver, key)
        await until(lambda: warnings() == 2)
        assert app._exit is False
        await rows(8)
        await press(driver, key)
        await until(lambda: app._exit)

    pilot(app, body)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_session_is_saved_when_the_terminal_closes(engine, tmp_path, number):
    live = Live(engine, OPTIONS, 200.0)
    app = ChatApp(live, str(tmp_path / "chat.npz"))

    async def body(driver):
        await press(driver, *"abc", "enter")
        await until(lambda: live.rows > 3)
        os.kill(os.getpid(), number)
        await until(lambda: app._exit)

    before = signal.signal(number, signal.SIG_DFL)  # `nohup` ignores SIGHUP, and so does the chat
    try:
        pilot(app, body)
    finally:
        signal.signal(number, before)
    assert Recording.load(tmp_path / "chat.npz").branches[0].rows > 3


def test_silent_rows_after_saving_are_not_unsaved(engine, tmp_path):
    muted = dataclasses.replace(OPTIONS, ablated=("thought", "output"))
    live = Live(engine, muted, 200.0)
    app = ChatApp(live, str(tmp_path / "chat.npz"))

    async def body(driver):
        await press(driver, *"abc", "enter")
        await until(lambda: live.rows > 8 and not any(live.waiting.values()))
        await press(driver, "ctrl+s")
        await until(lambda: (tmp_path / "chat.npz").exists())
        rows = live.rows
        await until(lambda: live.rows > rows + 3)
        await press(driver, "ctrl+q")
        await until(lambda: app._exit)

    pilot(app, body)


def test_a_recording_is_left_by_either_key(engine):
    recording = Recording(engine.streams.names, engine.streams.kinds, engine.model.tokenizer)
    recording.branches[0].put(0, np.zeros(4, int), np.ones(4, bool), 0.0)
    for key in ("ctrl+q", "ctrl+c"):
        app = ChatApp(Replay(recording))

        async def body(driver, key=key, app=app):
            await press(driver, key)
            await until(lambda: app._exit)

        pilot(app, body)


def test_words_that_the_model_does_not_know_are_named(engine):
    live = Live(engine, OPTIONS, FAST)
    app = ChatApp(live)

    async def body(driver):
        await press(driver, *"abc", "enter", *"[b] x", "enter")
        await until(lambda: len(live.current.events) == 2)
        await redraw(driver)
        (note,) = app._notifications
        assert note.message == "unknown to the model: '[b]', 'x'" and not note.markup

    pilot(app, body)


def test_the_page_lists_all_keys():
    rows = re.findall(r"^\| (.+?) \|", DOCS.read_text(), flags=re.M)
    assert {bound.shown for bound in KEYS} <= set(rows)


def test_arguments(monkeypatch):
    for message, arguments in {
        "give either --checkpoint=DIR": ("--checkpoint=runs/x", "--replay=chat.npz"),
        "there is no recording": ("--replay=none.npz",),
        "there is no checkpoint": ("--checkpoint=none",),
    }.items():
        with pytest.raises(UserError, match=message):
            chat.open_player(parser_of("chat").parse(arguments))
    monkeypatch.delitem(sys.modules, "msllm.chat.screen")
    monkeypatch.setitem(sys.modules, "textual", None)
    with pytest.raises(UserError, match=re.escape("pip install 'msllm[chat]'")):
        chat.run(parser_of("chat").parse([]))


def test_the_server_of_the_page(engine):
    """Clients share two sessions: each gets the answer to its own text and frees its session."""
    source = re.search(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S)[1]
    server = {"__name__": "server"}
    exec(compile(source, "docs/chat.md", "exec"), server)
    server["BEAT"] = 0.01
    sessions_per_step = []
    dispatch = engine._dispatch

    def counting_dispatch(sessions):
        sessions_per_step.append(len(sessions))
        return dispatch(sessions)

    engine._dispatch = counting_dispatch

    async def client(port, texts):
        """Sends texts and returns the rows of the answer, or the error if there is no session."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        def line():
            return asyncio.wait_for(reader.readline(), 60)

        got = [json.loads(await line())]
        if "error" in got[0]:
            return got[0]["error"]
        for text in texts:
            writer.write(json.dumps({"stream": "user", "text": text}).encode() + b"\n")
            for _ in range(4):
                got.append(json.loads(await line()))
        writer.write(b'{"stream": "output", "text": "a"}\n')
        while "error" not in got[-1]:
            got.append(json.loads(await line()))
        assert "'output' is not an input" in got.pop()["error"]
        writer.close()
        assert [row["row"] for row in got] == list(range(len(got)))
        assert set(got[0]["text"]) == set(engine.streams.names)
        return got

    async def run_clients():
        async with await server["serve"](engine, 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            pair = [asyncio.create_task(client(port, texts)) for texts in (["abc", "de"], ["ihg"])]
            await until(lambda: not engine.free)
            assert "all 2 sessions are open" in await client(port, [])
            done = await asyncio.gather(*pair)
            await until(lambda: engine.free == 2)
            return done, await client(port, ["abc"])

    (first, second), later = asyncio.run(run_clients())
    assert len(first) > 8 and isinstance(second, list) and isinstance(later, list)
    assert max(sessions_per_step) == 2  # a step makes rows of both sessions


def test_pasted_lines_are_sent_and_waiting_text_is_dropped(engine):
    live = Live(engine, OPTIONS)
    app = ChatApp(live)

    async def body(driver):
        live.pause()
        line = app.query_one(Line)
        line.focus()
        await press(driver, "a")
        line.post_message(events.Paste("abc\rdef\r\ngh"))
        await redraw(driver)
        assert line.value == "aabc\ndef\ngh"
        assert "aabc\N{RETURN SYMBOL}def\N{RETURN SYMBOL}gh" in "".join(lines(app))
        await press(driver, "enter")
        await redraw(driver)
        assert live.current.events[-1]["text"] == "aabc\ndef\ngh" and not line.value
        assert sum(live.waiting.values()) > 0
        await press(driver, "escape")
        await redraw(driver)
        assert sum(live.waiting.values()) == 0 and live.current.events[-1]["what"] == "drop"

        def fail(*_):
            raise RuntimeError("no such text")

        live.feed, feed = fail, live.feed
        await press(driver, "b", "enter")
        await until(lambda: any("no such text" in n.message for n in app._notifications))
        assert line.value == "b"  # what was typed is not lost, and the session goes on
        live.feed = feed
        live.pause(False)
        await until(lambda: live.rows > 2)

    pilot(app, body)
    check(engine, live.current)
