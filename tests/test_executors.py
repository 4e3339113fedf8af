"""Preparation on a Dask cluster of real processes on this machine, and what survives their ends."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
import types

import pytest
from runs import replace, write_config_file

from msllm.config import Config, DataConfig, TokenizerConfig
from msllm.data import duplicates, executors, sources
from msllm.data.prepare import prepare
from msllm.errors import UserError
from msllm.tokenizer import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDS = [{"source": f"w{i} w{i % 7}", "target": f"so w{i}"} for i in range(480)]
WORDS = TokenizerConfig(model_type="word", vocab_size=2048)
PORTIONS = 12
FINISHED = 4  # portions that are finished while the others are held
# A converter that waits at the last portions while the file `hold` exists, and logs its processes.
CONVERTER = """
import os, pathlib, time

HERE = pathlib.Path(__file__).parent

def convert(layout, record):
    source, target = record.text("source"), record.text("target")
    held = int(source.split()[0][1:]) >= 175 and (HERE / "hold").exists()
    if held:
        with open(HERE / "held", "a") as file:
            file.write(f"{os.getpid()}\\n")
    while held and (HERE / "hold").exists():
        time.sleep(0.05)
    yield layout.table([layout.say("user", 0, source), layout.say("output", 1, target)], source)
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config with CONVERTER, and RECORDS in PORTIONS portions."""
    (tmp_path / "held_words.py").write_text(CONVERTER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "held_words", raising=False)  # from another test
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    monkeypatch.setattr(sources, "PORTION_BYTES", path.stat().st_size // PORTIONS + 1)
    tokenizer = train([text for record in RECORDS for text in record.values()], WORDS)
    (tmp_path / "t.model").write_bytes(tokenizer.to_bytes())
    data = DataConfig(
        converter="held_words:convert",
        path=str(path),
        tokenizer=TokenizerConfig(path=str(tmp_path / "t.model")),
        rows=16,
        eval_percent=10.0,
    )
    return Config(data=data)


@pytest.fixture
def processes(tmp_path):
    """A function that starts a process, which is killed at the end of the test."""
    started = []

    def start(*command, **options):
        errors = open(tmp_path / f"errors-{len(started)}", "w")  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=tmp_path, stderr=errors, **options
        )
        process.errors = pathlib.Path(errors.name)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def start_scheduler(processes, file):
    options = ("--host=127.0.0.1", "--port=0", f"--scheduler-file={file}")
    return processes("-m", "distributed.cli.dask_scheduler", *options, "--dashboard-address=:0")


def start_worker(processes, file):
    options = ("--host=127.0.0.1", f"--scheduler-file={file}", "--nthreads=1", "--no-nanny")
    return processes("-m", "distributed.cli.dask_worker", *options, "--no-dashboard")


def start_client(processes, config, out, file):
    """Starts `msllm prepare --cluster=FILE` with small portions."""
    folder = pathlib.Path(file).parent
    path = write_config_file(folder / "config.py", config)
    small = f"from msllm.data import sources; sources.PORTION_BYTES = {sources.PORTION_BYTES}"
    code = f"import sys; from msllm.cli.main import main; {small}; sys.exit(main(sys.argv[1:]))"
    flags = [f"--config={path}", f"--out={out}", f"--cluster={file}"]
    return processes("-c", code, "prepare", *flags)


def wait_for(condition, *alive, seconds=120):
    """Waits until a condition holds; fails if it takes too long or a process ends."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        for process in alive:
            assert process.poll() is None, process.errors.read_text()
        time.sleep(0.05)


def contents(folder):
    """The bytes of each file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finished_shards(out):
    """The time of the last change of each shard of the first portions."""
    paths = [path for n in range(FINISHED) for path in out.glob(f"*-{n:05d}-of-*.array_record")]
    return {path.name: path.stat().st_mtime_ns for path in paths}


def test_finished_portions_survive_a_kill_of_anything(config, tmp_path, processes):
    file, out, held = tmp_path / "scheduler.json", tmp_path / "out", tmp_path / "held"
    expected = prepare(config, tmp_path / "whole")
    scheduler = start_scheduler(processes, file)

    workers = []

    def holding():  # the workers that wait in the middle of a portion
        found = map(int, held.read_text().split()) if held.exists() else ()
        return set(found) & {worker.pid for worker in workers if worker.poll() is None}

    def reports(folder=out):
        return len(list(folder.glob("unfinished/portion-*.json")))

    (tmp_path / "hold").touch()
    wait_for(file.exists, scheduler)
    client = start_client(processes, config, out, file)
    wait_for(lambda: "the cluster has no worker yet" in client.errors.read_text(), client)
    workers += [start_worker(processes, file) for _ in range(4)]
    wait_for(lambda: len(holding()) == 4 and reports() == FINISHED, client, scheduler)
    before = finished_shards(out)
    assert len(before) == 2 * FINISHED
    workers[0].kill()
    workers[0].wait()
    workers.append(start_worker(processes, file))
    wait_for(lambda: workers[-1].pid in holding(), client)  # it works on the lost portion
    client.kill()

    client = start_client(processes, config, out, file)
    wait_for(lambda: "dashboard: http" in client.errors.read_text(), client)
    (tmp_path / "hold").unlink()
    assert client.wait(120) == 0, client.errors.read_text()
    assert "dashboard: http://127.0.0.1:" in client.errors.read_text()
    assert contents(out) == contents(tmp_path / "whole")
    assert finished_shards(out) == before

    held.unlink()
    (tmp_path / "hold").touch()
    second = tmp_path / "second"
    client = start_client(processes, config, second, file)
    wait_for(lambda: len(holding()) == 4 and reports(second) == FINISHED, client)
    before = finished_shards(second)
    scheduler.kill()
    assert client.wait(60) == 1
    last = client.errors.read_text().splitlines()[-1]
    assert last.startswith("error: the cluster was lost while it worked on portion 5 of 12")
    assert last.endswith("finished work is kept, the same command continues")
    (tmp_path / "hold").unlink()
    assert prepare(config, second) == expected  # on this machine
    assert contents(second) == contents(tmp_path / "whole")
    assert finished_shards(second) == before


SBATCH = """#!/bin/bash
script={folder}/job-$$.sh
cp "$1" $script  # which dask-jobqueue removes
bash $script > $script.log 2>&1 < /dev/null &
echo $! >> {folder}/jobs
echo "Submitted batch job $!"
"""


# Not importorskip: `executors` must import dask_jobqueue, which takes over Ctrl-C, without harm.
needs_jobqueue = pytest.mark.skipif(
    importlib.util.find_spec("dask_jobqueue") is None, reason="dask_jobqueue is not installed"
)


@needs_jobqueue
def test_slurm_jobs_are_started_and_ended(config, tmp_path, monkeypatch, capfd):
    """With stand-ins for `sbatch` and `scancel` that run a job's script on this machine."""
    dask = pytest.importorskip("dask")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH.format(folder=tmp_path))
    (tmp_path / "bin/scancel").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/cancelled\n')
    for program in ("sbatch", "scancel"):
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    settings = {
        "jobqueue.slurm.cores": 2,
        "jobqueue.slurm.memory": "1GB",
        "jobqueue.slurm.interface": "lo",
    }
    expected = prepare(config, tmp_path / "whole")
    with dask.config.set(settings), executors.cluster("slurm", 2) as executor:
        assert prepare(config, tmp_path / "out", executor=executor) == expected
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert "dashboard: http" in capfd.readouterr().err
    (job,) = (tmp_path / "jobs").read_text().split()  # one job of two processes
    assert (tmp_path / "cancelled").read_text().split() == [job]
    wait_for(lambda: not pathlib.Path(f"/proc/{job}/cmdline").exists() or is_zombie(job))


def is_zombie(process):
    return "State:\tZ" in pathlib.Path(f"/proc/{process}/status").read_text()


@needs_jobqueue
def test_slurm_needs_the_size_of_a_job(monkeypatch):
    with pytest.raises(UserError, match=r"slurm.cores is None .*DASK_JOBQUEUE__SLURM__CORES"):
        with executors.cluster("slurm", 2):
            pass


class KubeCluster:
    """Stands in for the class of dask_kubernetes.operator: starts threads in this process."""

    def __init__(self, **options):
        import distributed

        self.options, self.scaled = options, []
        KubeCluster.last = self
        self.cluster = distributed.LocalCluster(
            processes=False, n_workers=1, threads_per_worker=1, dashboard_address=":0"
        )

    def __enter__(self):
        return self.cluster

    def __exit__(self, *error):
        self.cluster.close()

    def scale(self, count):
        self.scaled.append(count)


def test_kube_workers_have_one_thread(config, tmp_path, monkeypatch):
    """They also sample texts for the tokenizer and search for duplicates."""
    monkeypatch.setattr(duplicates, "RANGE_IDS", 100)  # the workers are threads of this process
    config = replace(config, "data", tokenizer=WORDS)
    with open(config.data.path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in RECORDS[:9])
    module = types.ModuleType("dask_kubernetes.operator")
    module.KubeCluster = KubeCluster
    monkeypatch.setitem(sys.modules, "dask_kubernetes", types.ModuleType("dask_kubernetes"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    expected = prepare(config, tmp_path / "whole")
    with executors.cluster("kube", 3) as executor:
        assert prepare(config, tmp_path / "out", executor=executor) == expected
    assert expected["duplicates"]["train"] + expected["duplicates"]["eval"] == 9
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    started = KubeCluster.last
    assert started.options["worker_command"] == ["dask", "worker", "--nthreads", "1"]
    assert started.options["n_workers"] == 3 and started.scaled == [3]


@pytest.mark.parametrize(
    "name, processes, message",
    [
        ("slurm", 0, "--processes is 0: with --cluster=slurm, give the number"),
        ("tcp://127.0.0.1:1", 4, "--processes is 4: with --cluster=tcp.*already started"),
        ("tcp://127.0.0.1:1", 0, "--cluster is 'tcp://127.0.0.1:1': cannot be used"),
        ("nowhere.json", 0, "--cluster is 'nowhere.json': cannot be used"),
        ("sluurm", 0, "--cluster is 'sluurm': cannot be used"),
        ("kube", 1, r"--cluster is 'kube', which needs .*pip install \"msllm\[kube\]\""),
    ],
)
def test_a_cluster_that_cannot_be_used(name, processes, message, monkeypatch):
    monkeypatch.setattr(executors, "CONNECT_SECONDS", 1)
    monkeypatch.setitem(sys.modules, "dask_kubernetes", None)
    with pytest.raises(UserError, match=message):
        with executors.cluster(name, processes):
            pass
