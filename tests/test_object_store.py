"""A workdir in Google Cloud Storage, stood in for by an emulator.

The fixture adds what the emulator lacks: moving objects, and the generations and conditions that
TensorStore's writes rely on.
"""

import contextlib
import functools
import http.server
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import pytest
from etils import epath
from runs import dictation, metrics, write_config_file

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(monkeypatch):
    """Serves gs://bucket in this process; yields an environment in which programs find it."""
    from gcp_storage_emulator.handlers import objects

    def generation(storage, bucket, name):
        with contextlib.suppress(Exception):  # there is no such object
            return storage.get_file_obj(bucket, name)["generation"]
        return "0"

    def download(request, response, storage, *rest, inner=objects.download):
        inner(request, response, storage, *rest)
        place = request.params["bucket_name"], request.params["object_id"]
        response["x-goog-generation"] = generation(storage, *place)

    def insert(request, response, storage, *rest, inner=objects.insert):
        wanted, name = request.query.get("ifGenerationMatch"), request.query.get("name")
        if wanted and name:
            if generation(storage, request.params["bucket_name"], name[0]) != wanted[0]:
                response.status = http.HTTPStatus.PRECONDITION_FAILED
                return
        inner(request, response, storage, *rest)

    def move(request, response, storage):
        request.params["dest_bucket_name"] = request.params["bucket_name"]
        objects.copy(request, response, storage)
        objects.delete(request, type(response)(None), storage)

    monkeypatch.setattr(objects, "download", download)
    monkeypatch.setattr(objects, "insert", insert)
    # Import the server again, because its table of routes holds the original functions.
    sys.modules.pop("gcp_storage_emulator.server", None)
    from gcp_storage_emulator import server as emulator

    path = (
        r"(?:/storage/v1)?/b/(?P<bucket_name>[^/]+)/o/(?P<object_id>.+)"
        r"/moveTo/o/(?P<dest_object_id>.+)"
    )
    # Serve each connection in its own thread, because an idle connection would block all others.
    # Handle one request at a time, because the emulator is not thread-safe, but read and write the
    # sockets outside of the lock, because a client that stalls would block all others.
    monkeypatch.setattr(http.server, "HTTPServer", http.server.ThreadingHTTPServer)
    lock = threading.Lock()

    def alone(handler, request, response, storage, *rest):
        _ = request.data  # reads the body, which the request keeps
        with lock:
            return handler(request, response, storage, *rest)

    handlers = [
        (path, {method: functools.partial(alone, handler) for method, handler in by_method.items()})
        for path, by_method in ((path, {"POST": move}), *emulator.HANDLERS)
    ]
    monkeypatch.setattr(emulator, "HANDLERS", handlers)

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    server.start()
    address = f"http://localhost:{port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    # Without this, opening a file waits for credentials from the network.
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    yield {**os.environ, "TENSORSTORE_GCS_HTTP_URL": address}
    server.stop()


def run(environment, command, *arguments):
    """Runs a command of msllm. If it hangs, its stderr ends with the stacks of its threads."""
    line = [sys.executable, "-X", "faulthandler", "-m", "msllm", command, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env=environment, **pipes) as process:
        try:
            out, errors = process.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            out, errors = process.communicate()
    return subprocess.CompletedProcess(line, process.returncode, out, errors)


def test_a_run_lives_in_a_bucket_and_continues_there(data_dir, bucket, tmp_path):
    config = dictation(**{"data.dir": data_dir, "mesh.data": 8, "steps": 3, "eval_every": 0})
    arguments = [
        f"--config={write_config_file(tmp_path / 'config.py', config)}",
        "--workdir=gs://bucket/run",
    ]
    first = run(bucket, "train", *arguments)
    assert first.returncode == 0, first.stderr
    second = run(bucket, "train", *arguments, "--config.steps=5")
    assert second.returncode == 0, second.stderr
    assert "continuing at step 3 of gs://bucket/run" in second.stderr

    workdir = epath.Path("gs://bucket/run")
    names = {path.name for path in workdir.iterdir()}
    assert names >= {"checkpoints", "config.json", "goodput.json", "metrics.jsonl", "tensorboard"}
    assert [line["step"] for line in metrics(workdir)] == [1, 2, 3, 4, 5]
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"3", "4", "5"}
    assert not pathlib.Path("gs:").exists()  # nothing was written to the local disk

    shown = run(
        bucket, "generate", "--checkpoint=gs://bucket/run", "--rows=2", "--input=user=please take 2"
    )
    assert shown.returncode == 0 and "please" in shown.stdout, shown.stderr
