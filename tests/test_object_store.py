"""A workdir in Google Cloud Storage, by its emulator.

What the emulator lacks is added here: the generations and conditions that TensorStore's writes rely
on, and moving objects.
"""

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading

import pytest
from runs import dictation, write_config_file

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(monkeypatch):
    """gs://bucket in a server of this process; yields the environment in which programs find it."""
    from gcp_storage_emulator.handlers import objects

    def generation(storage, bucket, name):
        with contextlib.suppress(Exception):  # there is no such object
            return storage.get_file_obj(bucket, name)["generation"]
        return "0"

    def download(request, response, storage, *rest, inner=objects.download):
        inner(request, response, storage, *rest)
        response["x-goog-generation"] = generation(
            storage, request.params["bucket_name"], request.params["object_id"]
        )

    def insert(request, response, storage, *rest, inner=objects.insert):
        wanted, name = request.query.get("ifGenerationMatch"), request.query.get("name")
        if (
            wanted
            and name
            and generation(storage, request.params["bucket_name"], name[0]) != wanted[0]
        ):
            response.status = http.HTTPStatus.PRECONDITION_FAILED
        else:
            inner(request, response, storage, *rest)

    def move(request, response, storage):
        request.params["dest_bucket_name"] = request.params["bucket_name"]
        objects.copy(request, response, storage)
        objects.delete(request, type(response)(None), storage)

    monkeypatch.setattr(objects, "download", download)
    monkeypatch.setattr(objects, "insert", insert)
    sys.modules.pop("gcp_storage_emulator.server", None)  # its routes hold the functions
    from gcp_storage_emulator import server as emulator

    path = (
        r"(?:/storage/v1)?/b/(?P<bucket_name>[^/]+)/o/(?P<object_id>.+)"
        r"/moveTo/o/(?P<dest_object_id>.+)"
    )
    monkeypatch.setattr(emulator, "HANDLERS", ((path, {"POST": move}), *emulator.HANDLERS))

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # A thread for each connection: else one that a client keeps in reserve would hold up all
    # others. But one request after the other: the emulator's dictionaries are not made for threads.
    monkeypatch.setattr(http.server, "HTTPServer", http.server.ThreadingHTTPServer)
    turn, handle = threading.Lock(), emulator.Router.handle

    def in_turn(router, method):
        with turn:
            handle(router, method)

    monkeypatch.setattr(emulator.Router, "handle", in_turn)
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    server.start()
    address = f"http://localhost:{port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    # Else every file that is opened asks the network for credentials first, and waits.
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    yield {**os.environ, "TENSORSTORE_GCS_HTTP_URL": address}
    server.stop()


def run(environment, command, *arguments):
    line = [sys.executable, "-m", "msllm", command, *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)


def test_a_run_lives_in_a_bucket_and_continues_there(data_dir, bucket, tmp_path):
    from etils import epath

    config = dictation(**{"data.dir": data_dir, "mesh.data": 8, "steps": 3, "eval_every": 0})
    arguments = [
        f"--config={write_config_file(tmp_path / 'config.py', config)}",
        "--workdir=gs://bucket/run",
    ]
    first = run(bucket, "train", *arguments)
    assert first.returncode == 0, first.stderr
    second = run(bucket, "train", *arguments, "--config.steps=5")
    assert second.returncode == 0 and "continuing at step 3 of gs://bucket/run" in second.stderr, (
        second.stderr
    )

    workdir = epath.Path("gs://bucket/run")
    names = {path.name for path in workdir.iterdir()}
    assert names >= {"checkpoints", "config.json", "goodput.json", "metrics.jsonl", "tensorboard"}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"3", "4", "5"}
    assert not (tmp_path / "gs:").exists()

    shown = run(
        bucket, "generate", "--checkpoint=gs://bucket/run", "--rows=2", "--input=user=please take 2"
    )
    assert shown.returncode == 0 and "please" in shown.stdout, shown.stderr
