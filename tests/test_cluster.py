"""Files that killed processes left half written, and errors caused by other processes."""

import json
import logging

import jax
import pytest
from etils import epath
from jax._src.distributed import global_state

from msllm.monitor import Goodput
from msllm.runtime import files, processes


@pytest.mark.parametrize("text", ["", '{"seconds": {"st', "null"])
def test_a_damaged_goodput_file_is_reported_and_replaced(tmp_path, text, caplog):
    path = epath.Path(tmp_path / "goodput.json")
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "msllm"):
        goodput = Goodput(path)
    assert goodput.attempts == 1
    assert f"{path} is damaged: the times of earlier attempts are lost" in caplog.text
    goodput.write()
    assert Goodput(path).attempts == 2


def test_a_goodput_file_is_never_half_written(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "goodput.json")
    Goodput(path, 5.0).write()
    before = json.loads(path.read_text())

    def full(stream, content):
        stream.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(OSError):
        Goodput(path).write()
    assert json.loads(path.read_text()) == before


def test_the_join_watch_ignores_empty_and_missing_files(tmp_path, monkeypatch):
    """A process may be writing its file, or may just have joined and removed it."""
    folder = tmp_path / "waiting"
    folder.mkdir()
    (folder / "1").write_text("host-1 7 1")
    (folder / "3").write_text("")
    monkeypatch.setattr(global_state, "num_processes", 4)
    monkeypatch.setattr(global_state, "process_id", 0)
    exits = []

    def exit_process(message, status):
        exits.append((message, status))
        watch._done.set()

    monkeypatch.setattr(processes, "exit_process", exit_process)
    read, texts = processes._read_text, iter(["host-1 7 2", "", "host-1 7 3"])
    monkeypatch.setattr(
        processes,
        "_read_text",
        lambda path: next(texts, "host-1 7 4") if path.name == "1" else read(path),
    )
    assert read(epath.Path(folder / "5")) == ""
    watch = processes._JoinWatch(epath.Path(folder), 2.5)
    with watch:
        watch._thread.join(20)
    ((message, status),) = exits
    assert status == processes.EXIT_PEER_LOST
    assert "of 4 processes these did not join: 2, 3 (waiting: 0 on " in message


@pytest.mark.parametrize(
    "error, from_peer",
    [
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), False),
        (
            ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device"),
            False,
        ),
    ],
)
def test_errors_from_lost_peers_are_recognized(monkeypatch, error, from_peer):
    assert not processes.is_peer_failure(error)  # a single process has no peers
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    assert processes.is_peer_failure(error) == from_peer
    wrapped = TimeoutError("a barrier")
    wrapped.__cause__ = error
    assert processes.is_peer_failure(wrapped) == from_peer


@pytest.mark.parametrize("count", [1, 2])
def test_full_storage_is_distinguished_from_other_errors(monkeypatch, count):
    monkeypatch.setattr(processes.jax, "process_count", lambda: count)
    monkeypatch.setattr(processes, "exit_process", lambda message, status: _raise(message))
    with pytest.raises(
        RuntimeError,
        match=r"process 0 could not write \(.*No space left.*\): make room or repair the",
    ):
        with processes.exit_on_error():
            raise OSError(28, "No space left on device", "metrics.jsonl")
    # With one process the error is raised as it is.
    expected, message = (
        (FileNotFoundError, "No such file")
        if count == 1
        else (RuntimeError, "FileNotFoundError in process 0: see above")
    )
    with pytest.raises(expected, match=message):
        with processes.exit_on_error():
            raise FileNotFoundError(2, "No such file or directory", "gone")


def _raise(message):
    raise RuntimeError(message)
