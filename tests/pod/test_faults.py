"""Pods of real processes that are stopped, killed, frozen, or out of disk space.

The tests check what the processes report, how soon they end, and that a continued run equals an
undisturbed one.
"""

import re
import resource
import shutil
import signal
import subprocess
import time

import pytest
from pods import (
    HEARTBEAT,
    PEER_LOST,
    STEPS,
    Pod,
    assert_same_run,
    make_config,
    make_files,
    read_run,
    saved,
    wait_for,
)
from runs import flip_a_bit, metrics

from msllm.data.loader import Loader
from msllm.streams import StreamSpec

pytestmark = pytest.mark.slow

# Seconds within which all processes end after one is lost; the machine may be busy.
NOTICED = HEARTBEAT + 20


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with a config and prepared data. Read only."""
    return make_files(tmp_path_factory.mktemp("pod"))


@pytest.fixture(scope="session")
def uninterrupted(files):
    """The workdir of an undisturbed run. Read only."""
    with Pod(files, files / "uninterrupted") as pod:
        pod.expect_end(0, 0)
    return files / "uninterrupted"


@pytest.fixture(scope="session")
def reference(uninterrupted):
    """The records of the undisturbed run."""
    return read_run(uninterrupted)


def cut_back(uninterrupted, workdir, step):
    """Makes a workdir with only the checkpoints of the undisturbed run up to `step`."""
    shutil.copytree(uninterrupted / "checkpoints", workdir / "checkpoints")
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    return workdir


def assert_continues_like(workdir, reference, first):
    """Checks a run that began at step `first` against the undisturbed run."""
    for values in (reference.examples, reference.losses):
        assert set(values) >= set(range(first + 1, STEPS))
    rest = type(reference)(
        {step: rows for step, rows in reference.examples.items() if step >= first},
        {step: losses for step, losses in reference.losses.items() if step > first},
        {step: losses for step, losses in reference.evaluations.items() if step > first},
        reference.checksums,
    )
    assert_same_run(workdir, rest, exact=True)


def test_the_undisturbed_run_consumes_each_example_once(files, reference):
    config = make_config(**{"data.dir": str(files / "data")})
    loader = Loader(config.data, "train", StreamSpec.from_config(config.streams))
    batches = [loader.example_ids(step) for step in range(STEPS)]
    found = [[reference.examples[step][row] for row in range(8)] for step in range(STEPS)]
    assert found == [[{tuple(ids)} for ids in batch] for batch in batches]
    ids = [id for batch in batches for table in batch for id in table]
    # The run is shorter than an epoch, so no example repeats. A table holds several examples.
    assert len(set(ids)) == len(ids) > 2 * 8 * STEPS
    assert len(reference.losses) == STEPS
    assert all(len(losses) == 1 for losses in reference.losses.values())


def test_user_evaluations_see_the_model_in_all_processes(files, tmp_path):
    names = [f"tests.outside.evaluation:{name}" for name in ("answers", "seen_tables")]
    options = (f"--config.evaluations={('held_out', *names)}", "--config.eval_every=2")
    # The tokenizer has fewer pieces than the vocabulary size of the other tests. With that size an
    # untrained model would generate tokens without text.
    options += ("--config.steps=2", "--config.model.vocab_size=0")
    with Pod(files, tmp_path / "run", *options) as pod:
        pod.expect_end(0, 0)
    (line,) = [values for values in metrics(tmp_path / "run") if "eval/loss" in values]
    assert 0 <= line["eval/exact_match"] <= 1 and 0 < line["eval/seen/loss"] != line["eval/loss"]


def test_a_run_that_is_asked_to_stop_saves_and_continues(files, reference, tmp_path):
    workdir = tmp_path / "run"
    for step, number, which, statuses in (
        (2, signal.SIGTERM, (), (75, 75)),  # to all
        (6, signal.SIGTERM, (1,), (75, 75)),  # to one
        (9, signal.SIGINT, (0,), (0, 0)),
        (13, signal.SIGINT, (1,), (0, 0)),
    ):
        with Pod(files, workdir) as pod:
            pod.reach(step)
            pod.signal(number, *which)
            first, _ = pod.expect_end(*statuses, seconds=NOTICED)
        (stopped,) = re.findall(
            r"stopped at step (\d+), saved; the same command continues here", first
        )
        assert int(stopped) > step and saved(workdir)[-1] == int(stopped)
    with Pod(files, workdir) as pod:
        for log in pod.expect_end(0, 0):
            assert f"continuing at step {stopped}" in log
    run = assert_same_run(workdir, reference, exact=True)
    assert all(len(losses) == 1 for losses in run.losses.values())  # no step was repeated


def test_killed_processes_are_noticed_and_the_run_continues(files, reference, tmp_path):
    workdir = tmp_path / "run"

    def kill(*which, step, writing=False):
        """Kills processes after a step, or while they write a checkpoint.

        Returns the logs of the other processes.
        """
        with Pod(files, workdir) as pod:
            pod.reach(step, process=which[-1])
            if writing:
                pod.stop_while_writing()
            pod.signal(signal.SIGKILL, *which)
            pod.signal(signal.SIGCONT)
            expected = [-signal.SIGKILL if i in which else PEER_LOST for i in range(2)]
            logs = pod.expect_end(*expected, seconds=NOTICED)
        assert incomplete_checkpoints(workdir) or not writing
        return "".join(log for log, status in zip(logs, expected) if status == PEER_LOST)

    assert reports_lost_peer(kill(1, step=6))
    assert reports_lost_peer(kill(0, step=6))
    # On a busy machine, the runs above may have ended before the first checkpoint was complete.
    with Pod(files, workdir) as pod:
        pod.wait_for(lambda: saved(workdir) != [], 90, "a checkpoint")
        pod.signal(signal.SIGKILL)
    before = saved(workdir)
    # Process 0 completes checkpoints, so test the loss of each process.
    assert reports_lost_peer(kill(0, step=before[-1] + 2, writing=True))
    assert reports_lost_peer(kill(1, step=before[-1] + 2, writing=True))
    kill(0, 1, step=before[-1] + 2, writing=True)
    assert saved(workdir) == before
    with Pod(files, workdir) as pod:
        first, _ = pod.expect_end(0, 0)
    assert "is not used: writing it was interrupted" in first
    assert f"continuing at step {before[-1]}" in first
    assert not incomplete_checkpoints(workdir)
    run = assert_same_run(workdir, reference, exact=True)
    assert max(map(len, run.losses.values())) > 1  # some steps were repeated


def incomplete_checkpoints(workdir):
    return [
        path.name
        for path in (workdir / "checkpoints").iterdir()
        if "orbax-checkpoint-tmp" in path.name
    ]


def reports_lost_peer(log):
    """Whether the log has msllm's message, or that with which JAX's runtime aborts a process."""
    own = (
        "most likely another process is gone, see their logs; the same command continues from the"
        " last checkpoint"
    )
    jax = "Terminating process because the JAX distributed service detected fatal errors"
    return own in log or jax in log


def test_a_run_continues_with_more_and_fewer_processes_and_other_meshes(files, reference, tmp_path):
    workdir = tmp_path / "run"
    with Pod(files, workdir) as pod:
        pod.reach(5)
        pod.signal(signal.SIGTERM, 0)
        pod.expect_end(75, 75, seconds=NOTICED)
    with Pod(files, workdir, processes=4) as pod:
        pod.reach(10)
        pod.signal(signal.SIGKILL, 2)
        logs = pod.expect_end(PEER_LOST, PEER_LOST, -signal.SIGKILL, PEER_LOST, seconds=NOTICED)
        assert all(reports_lost_peer(logs[i]) for i in (0, 1, 3))
    with Pod(files, workdir, processes=1, devices=2) as pod:
        pod.reach(14)
        pod.signal(signal.SIGTERM)
        pod.expect_end(75, seconds=NOTICED)
    other = ("--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=2")
    with Pod(files, workdir, *other, devices=2) as pod:
        pod.expect_end(0, 0)
    assert_same_run(workdir, reference, exact=False)


@pytest.fixture
def small_disk(files, tmp_path):
    """A folder with a disk of 1 MB: (folder, words before a command that make it see the disk).

    None on machines that do not allow mounts.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("unshare"):
        yield None
        return
    mount = f"mount -t tmpfs -o size=1m tmpfs {folder} && echo mounted && exec sleep 600"
    holder = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", mount], stdout=subprocess.PIPE, text=True
    )
    enter = ("nsenter", f"--target={holder.pid}", "--user", "--mount", "--preserve-credentials")
    enter += ("env", f"--chdir={files}")
    try:
        yield (folder, enter) if holder.stdout.readline() == "mounted\n" else None
    finally:
        holder.kill()
        holder.wait()


def test_a_full_disk_ends_the_run_which_continues_once_there_is_room(
    files, reference, tmp_path, small_disk
):
    def limit():
        if not small_disk:  # limit the size of files instead, which gives another error
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))

    limited_by = "a tmpfs of 1 MB" if small_disk else "a file size limit: mounts are not allowed"
    print("the disk is limited by", limited_by)
    folder, prefix = small_disk or (tmp_path / "disk", ())
    with Pod(files, folder / "run", prefix=prefix, limits=limit) as pod:
        logs = pod.expect_end((1, *PEER_LOST), (1, *PEER_LOST), seconds=90 + NOTICED)
    # The write that fails may be that of a checkpoint, or of a line of metrics.
    checkpoint = rf"a checkpoint could not be written to {folder}/run/checkpoints \(.+\): .*;"
    other = r"process \d could not write \(.*(No space left on device|File too large).*\):"
    failed = f"error: ({checkpoint}|{other}) make room or repair"
    assert any(re.search(failed, log) for log in logs), logs
    if small_disk:
        subprocess.run([*prefix, "mount", "-o", "remount,size=50m", str(folder)], check=True)
    with Pod(files, folder / "run", prefix=prefix) as pod:
        first, _ = pod.expect_end(0, 0)
    begin = r"continuing at step (4|8|12)\b" if small_disk else "starting a new run"
    assert re.search(begin, first)
    subprocess.run([*prefix, "cp", "-r", str(folder / "run"), str(tmp_path / "copy")], check=True)
    assert_same_run(tmp_path / "copy", reference, exact=True)


def test_all_processes_skip_the_same_damaged_checkpoints(files, uninterrupted, reference, tmp_path):
    workdir = cut_back(uninterrupted, tmp_path / "run", 20)
    newest = saved(workdir)[-3:]

    def largest_file(step, process):
        """The largest file of parameters that a process has written. The other need not read it."""
        folder = workdir / "checkpoints" / str(step) / "parameters" / f"ocdbt.process_{process}"
        return max(folder.glob("d/*"), key=lambda path: path.stat().st_size)

    cut = largest_file(newest[2], process=1)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    flip_a_bit(largest_file(newest[1], process=0))
    with Pod(files, workdir) as pod:
        logs = pod.expect_end(0, 0)
    for log in logs:
        for step in newest[1:]:
            assert f"checkpoint of step {step} is damaged and not used: " in log
        assert f"continuing at step {newest[0]}" in log
    assert {path.name for path in (workdir / "checkpoints" / "damaged").iterdir()} == {
        str(step) for step in newest[1:]
    }
    assert_continues_like(workdir, reference, newest[0])


def test_bad_input_of_one_process_ends_all_before_the_first_step(files, uninterrupted, tmp_path):
    """Each of two hosts has its own data directory, with the same name."""
    hosts = {i: tmp_path / f"host{i}" for i in range(2)}
    for folder in hosts.values():
        shutil.copytree(files / "data", folder / "data")
    workdir = cut_back(uninterrupted, tmp_path / "run", 20)
    host, digest = r"process 1 on \S+", r"[0-9a-f]{12} there, [0-9a-f]{12} here"

    def refused(message, own=None):
        with Pod(files, workdir, folders=hosts, own=own) as pod:
            logs = pod.expect_end(2, 2)
        for log in logs:
            assert re.search(f"^error: .*{message}", log, re.M), log
        assert not (workdir / "examples").exists()

    missing = next((hosts[1] / "data").glob("train-00002*"))
    kept = missing.read_bytes()
    missing.unlink()
    refused(r"train-00002\S+ is missing \(manifest.json lists it\): restore it")
    missing.write_bytes(kept)

    rate = r"\(optim.lr is 0.002 there, 0.001 here\); start all with the same"
    refused(
        f"{host} has another config than process 0 on .*: {digest} {rate}",
        {1: ["--config.optim.lr=2e-3"]},
    )

    shutil.rmtree(hosts[1] / "data")
    make_files(hosts[1], **{"data.eval_percent": 6.0})
    refused(f"{host} has another data manifest than process 0 on .*: {digest} .*")

    shutil.rmtree(hosts[1] / "data")
    make_files(hosts[1], **{"data.options": {"examples": 1200, "seed": 1}})
    refused(f"{host} has another tokenizer than process 0 on .*: {digest}; start all with the same")


def test_a_process_that_never_joins_is_named(files, tmp_path):
    message = "gave up after 8 s: of 3 processes these did not join: 1"
    message += r" \(waiting: 0 on \S+, 2 on \S+\)"
    with Pod(files, tmp_path / "run", processes=3, absent=[1], wait_seconds=8) as pod:
        first, _, third = pod.expect_end(76, 76, seconds=8 + 20)
    assert re.search(message, first) and re.search(message, third)


def test_a_late_process_is_named_and_a_frozen_one_ends_the_run(files, reference, tmp_path):
    workdir = tmp_path / "run"
    with Pod(files, workdir, "--config.checkpoint.every=16", pipe=0) as pod:
        pod.reach(8)  # slow steps are reported once there is a median of at least five steps
        pod.hold_output(3)  # process 0 blocks when it writes to the full pipe
        late = r"step \d+ took \d\.\d s, \d+ times the median:"
        late += r" process 0 on \S+ dispatched it \d\.\d s after"
        pod.wait_for(lambda: re.search(late, pod.logs[0]), 20, "the report of the late process")
        pod.reach(13)
        pod.signal(signal.SIGSTOP, 1)  # stops the process's device as well
        time.sleep(3)
        pod.signal(signal.SIGCONT, 1)
        slow = r"step \d+ took [3-9]\.\d s, \d+ times the median:"
        slow += " (process 1|all processes dispatched it in)"
        pod.wait_for(lambda: re.search(slow, pod.logs[0]), 20, "the report of a slow step")
        pod.signal(signal.SIGSTOP, 1)
        begin = time.monotonic()
        wait_for(lambda: pod.alive == [1], NOTICED, "the end of process 0")
        assert time.monotonic() - begin > HEARTBEAT / 2  # a slow process is not given up at once
        pod.signal(signal.SIGCONT, 1)  # it notices that process 0 has ended
        logs = pod.expect_end(PEER_LOST, PEER_LOST, seconds=NOTICED)
    assert all(map(reports_lost_peer, logs))
    by_time = ("--config.checkpoint.every=0", "--config.checkpoint.every_minutes=0.01")
    with Pod(files, workdir, *by_time) as pod:
        logs = pod.expect_end(0, 0)
    steps = [re.findall(r"checkpoint of step (\d+)", log) for log in logs]
    assert steps[0] == steps[1] and len(steps[0]) >= 3  # process 0's clock decides for all
    assert_same_run(workdir, reference, exact=True)


def test_newer_local_checkpoints_are_used_if_all_hosts_have_them(files, reference, tmp_path):
    workdir, disk = tmp_path / "run", tmp_path / "disk"
    options = [
        "--config.checkpoint.every=10",
        "--config.checkpoint.local_every=3",
        f"--config.checkpoint.local_dir={disk}",
    ]

    def newest():
        """The newest step that is on the disks of both hosts."""
        kept = [
            {int(p.name) for p in disk.glob(f"*/{i}-of-2/*") if p.name.isdigit()} for i in range(2)
        ]
        return max(set.intersection(*kept), default=0)

    for new_host in (True, False):
        with Pod(files, workdir, *options) as pod:
            pod.reach(12)
            # Checkpoints are written in the background, so the run may be ahead of them.
            pod.wait_for(lambda: newest() > 10, 20, "a checkpoint on both disks")
            pod.signal(signal.SIGKILL, 1)
            pod.wait(NOTICED)
            first, _ = pod.logs
        assert newest() > 10 and saved(workdir) == [10]
        if new_host:
            shutil.rmtree(next(disk.glob("*/1-of-2")))
    assert "continuing at step 10" in first
    begin = newest()
    with Pod(files, workdir, *options) as pod:
        first, _ = pod.expect_end(0, 0)
    assert f"continuing at step {begin}" in first
    assert_same_run(workdir, reference, exact=True)
