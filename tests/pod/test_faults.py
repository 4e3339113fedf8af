"""Pods of real processes that are stopped, killed, frozen and starved.

What they report, how soon they end, and that the run that continues equals an undisturbed one.
"""

import json
import re
import resource
import shutil
import signal
import subprocess
import time

import pytest
from pods import HEARTBEAT, LOST, STEPS, Pod, make_config, make_files, read, same, saved, wait_for

from msllm.data.loader import Loader
from msllm.streams import StreamSpec

pytestmark = pytest.mark.slow

NOTICED = (
    HEARTBEAT + 20
)  # seconds after which nobody waits for the dead any more; the machine may be busy


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Config and prepared data. Read only."""
    return make_files(tmp_path_factory.mktemp("pod"))


@pytest.fixture(scope="session")
def uninterrupted(files):
    """The workdir of an undisturbed run. Read only."""
    with Pod(files, files / "uninterrupted") as pod:
        pod.ended(0, 0)
    return files / "uninterrupted"


@pytest.fixture(scope="session")
def reference(uninterrupted):
    return read(uninterrupted)


def cut_back(uninterrupted, workdir, step):
    """A workdir with the checkpoints of the undisturbed run up to `step`, and nothing else."""
    shutil.copytree(uninterrupted / "checkpoints", workdir / "checkpoints")
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    return workdir


def continues_like(workdir, reference, first, exact=True):
    """Checks a run that did only the steps after `first`."""
    for values in (reference.examples, reference.losses):
        assert set(values) >= set(range(first + 1, STEPS))
    rest = type(reference)(
        {step: rows for step, rows in reference.examples.items() if step >= first},
        {step: losses for step, losses in reference.losses.items() if step > first},
        {step: losses for step, losses in reference.evaluations.items() if step > first},
        reference.checksums,
    )
    same(workdir, rest, exact)


def test_the_undisturbed_run_consumes_each_example_once(files, reference):
    config = make_config(**{"data.dir": str(files / "data")})
    loader = Loader(config.data, "train", StreamSpec.from_config(config.streams))
    batches = [loader.example_ids(step) for step in range(STEPS)]
    found = [[reference.examples[step][row] for row in range(8)] for step in range(STEPS)]
    assert found == [[{tuple(ids)} for ids in batch] for batch in batches]
    ids = [id for batch in batches for table in batch for id in table]
    assert (
        len(set(ids)) == len(ids) > 2 * 8 * STEPS
    )  # less than an epoch; tables hold several examples
    assert (
        all(len(losses) == 1 for losses in reference.losses.values())
        and len(reference.losses) == STEPS
    )


def test_evaluations_of_the_users_own_see_the_model_in_all_processes(files, tmp_path):
    names = [f"tests.outside.evaluation:{name}" for name in ("answers", "seen_tables")]
    options = (f"--config.evaluations={('held_out', *names)}", "--config.eval_every=2")
    # The tokenizer has less pieces than the vocabulary of the other tests: an untrained model would
    # say tokens without text.
    options += ("--config.steps=2", "--config.model.vocab_size=0")
    with Pod(files, tmp_path / "run", *options) as pod:
        pod.ended(0, 0)
    (line,) = [
        values
        for values in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "eval/loss" in values
    ]
    assert 0 <= line["eval/exact_match"] <= 1 and 0 < line["eval/seen/loss"] != line["eval/loss"]


def test_who_is_asked_to_stop_saves_and_continues(files, reference, tmp_path):
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
            first, _ = pod.ended(*statuses, seconds=NOTICED)
        (stopped,) = re.findall(
            r"stopped at step (\d+), saved; the same command continues here", first
        )
        assert int(stopped) > step and saved(workdir)[-1] == int(stopped)
    with Pod(files, workdir) as pod:
        for log in pod.ended(0, 0):
            assert f"continuing at step {stopped}" in log
    run = same(workdir, reference, exact=True)
    assert all(
        len(losses) == 1 for losses in run.losses.values()
    )  # what was saved is not done again


def test_the_dead_are_noticed_and_the_run_continues_where_it_was_saved(files, reference, tmp_path):
    workdir = tmp_path / "run"

    def die(*which, step, writing=False):
        """Kills processes after a step, or in the middle of a checkpoint; the survivors' log."""
        with Pod(files, workdir) as pod:
            pod.reach(step, process=which[-1])
            if writing:
                pod.stop_while_writing()
            pod.signal(signal.SIGKILL, *which)
            pod.signal(signal.SIGCONT)
            expected = [-signal.SIGKILL if i in which else LOST for i in range(2)]
            logs = pod.ended(*expected, seconds=NOTICED)
        assert bool(leftovers(workdir)) or not writing
        return "".join(log for log, status in zip(logs, expected) if status == LOST)

    assert says_that_one_is_gone(die(1, step=6))
    assert says_that_one_is_gone(die(0, step=6))
    with Pod(
        files, workdir
    ) as pod:  # on a busy machine, these may have died before the first checkpoint was complete
        pod.wait_for(lambda: saved(workdir) != [], 90, "a checkpoint")
        pod.signal(signal.SIGKILL)
    before = saved(workdir)
    assert says_that_one_is_gone(
        die(0, step=before[-1] + 2, writing=True)
    )  # process 0 completes checkpoints
    assert says_that_one_is_gone(die(1, step=before[-1] + 2, writing=True))
    die(0, 1, step=before[-1] + 2, writing=True)
    assert saved(workdir) == before
    with Pod(files, workdir) as pod:
        logs = pod.ended(0, 0)
    assert (
        "its writing was interrupted; it is not used" in logs[0]
        and f"continuing at step {before[-1]}" in logs[0]
    )
    assert not leftovers(workdir)
    run = same(workdir, reference, exact=True)
    assert (
        max(map(len, run.losses.values())) > 1
    )  # some steps were done again, with the same result


def leftovers(workdir):
    return [
        path.name
        for path in (workdir / "checkpoints").iterdir()
        if "orbax-checkpoint-tmp" in path.name
    ]


def says_that_one_is_gone(log):
    """msllm's message, or the one with which JAX's runtime aborts a process."""
    own = (
        "most likely another process is gone, see their logs; the same command continues from the"
        " last checkpoint"
    )
    jax = "Terminating process because the JAX distributed service detected fatal errors"
    return own in log or jax in log


def test_a_run_goes_on_with_more_and_fewer_processes_and_other_meshes(files, reference, tmp_path):
    workdir = tmp_path / "run"
    with Pod(files, workdir) as pod:
        pod.reach(5)
        pod.signal(signal.SIGTERM, 0)
        pod.ended(75, 75, seconds=NOTICED)
    with Pod(files, workdir, processes=4) as pod:
        pod.reach(10)
        pod.signal(signal.SIGKILL, 2)
        logs = pod.ended(LOST, LOST, -signal.SIGKILL, LOST, seconds=NOTICED)
        assert all(says_that_one_is_gone(logs[i]) for i in (0, 1, 3))
    with Pod(files, workdir, processes=1, devices=2) as pod:
        pod.reach(14)
        pod.signal(signal.SIGTERM)
        pod.ended(75, seconds=NOTICED)
    other = ("--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=2")
    with Pod(files, workdir, *other, devices=2) as pod:
        pod.ended(0, 0)
    same(workdir, reference, exact=False)


@pytest.fixture
def small_disk(files, tmp_path):
    """(folder, words before a command that let it see a disk of 1 MB there).

    None on machines that allow no mounts.
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


def test_a_full_disk_ends_the_run_and_it_continues_when_there_is_room(
    files, reference, tmp_path, small_disk
):
    def limit():
        if not small_disk:  # files cannot grow beyond a limit, which gives another error
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))

    print(
        "the full disk is",
        "a tmpfs of 1 MB" if small_disk else "a limit of the size of files: no mounts here",
    )
    folder, prefix = small_disk or (tmp_path / "disk", ())
    with Pod(files, folder / "run", prefix=prefix, limits=limit) as pod:
        logs = pod.ended((1, *LOST), (1, *LOST), seconds=90 + NOTICED)
    # Whatever is written next finds it full: the checkpoint, or a line of metrics.
    checkpoint = rf"a checkpoint could not be written to {folder}/run/checkpoints \(.+\): .*;"
    other = r"process \d could not write \(.*(No space left on device|File too large).*\):"
    failed = f"error: ({checkpoint}|{other}) make room or repair"
    assert any(re.search(failed, log) for log in logs), logs
    if small_disk:
        subprocess.run([*prefix, "mount", "-o", "remount,size=50m", str(folder)], check=True)
    with Pod(files, folder / "run", prefix=prefix) as pod:
        logs = pod.ended(0, 0)
    assert re.search(
        r"continuing at step (4|8|12)\b" if small_disk else "starting a new run", logs[0]
    )
    subprocess.run([*prefix, "cp", "-r", str(folder / "run"), str(tmp_path / "copy")], check=True)
    same(tmp_path / "copy", reference, exact=True)


def test_damaged_checkpoints_are_passed_over_by_all_alike(
    files, uninterrupted, reference, tmp_path
):
    workdir = cut_back(uninterrupted, tmp_path / "run", 20)
    newest = saved(workdir)[-3:]

    def own(step, process):
        files = (workdir / "checkpoints" / str(step)).glob(
            f"parameters/ocdbt.process_{process}/d/*"
        )
        return max(files, key=lambda path: path.stat().st_size)

    cut = own(newest[2], 1)  # what one process has written, the other need not read
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    flipped = own(newest[1], 0)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 4
    flipped.write_bytes(content)
    with Pod(files, workdir) as pod:
        logs = pod.ended(0, 0)
    for log in logs:
        for step in newest[1:]:
            assert f"checkpoint of step {step} is damaged and not used: " in log
        assert f"continuing at step {newest[0]}" in log
    assert {path.name for path in (workdir / "checkpoints" / "damaged").iterdir()} == {
        str(step) for step in newest[1:]
    }
    continues_like(workdir, reference, newest[0])


def test_bad_input_of_one_ends_all_before_the_first_step(files, uninterrupted, tmp_path):
    """Each of two hosts has data of its own, under the same name."""
    hosts = {i: tmp_path / f"host{i}" for i in range(2)}
    for folder in hosts.values():
        shutil.copytree(files / "data", folder / "data")
    workdir = cut_back(uninterrupted, tmp_path / "run", 20)
    host, digest = r"process 1 on \S+", r"[0-9a-f]{12} there, [0-9a-f]{12} here"

    def refused(message, own=None):
        with Pod(files, workdir, folders=hosts, own=own) as pod:
            logs = pod.ended(2, 2)
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


def test_who_never_comes_is_named(files, tmp_path):
    told = "gave up after 8 s: of 3 processes these did not join: 1"
    told += r" \(waiting: 0 on \S+, 2 on \S+\)"
    with Pod(files, tmp_path / "run", processes=3, absent=[1], wait_seconds=8) as pod:
        assert all(re.search(told, log) for log in pod.ended(76, 76, seconds=8 + 20)[::2])


def test_the_late_are_named_and_the_frozen_given_up(files, reference, tmp_path):
    workdir = tmp_path / "run"
    with Pod(files, workdir, "--config.checkpoint.every=16", pipe=0) as pod:
        pod.reach(8)  # the median is of five steps or more
        pod.hold_output(3)  # process 0 waits for whoever reads its output
        late = r"step \d+ took \d\.\d s, \d+ times the median:"
        late += r" process 0 on \S+ dispatched it \d\.\d s after"
        pod.wait_for(lambda: re.search(late, pod.logs[0]), 20, "the report of who was late")
        pod.reach(13)
        pod.signal(signal.SIGSTOP, 1)  # all of it, and its device
        time.sleep(3)
        pod.signal(signal.SIGCONT, 1)
        slow = r"step \d+ took [3-9]\.\d s, \d+ times the median:"
        slow += " (process 1|all processes dispatched it in)"
        pod.wait_for(lambda: re.search(slow, pod.logs[0]), 20, "the report of a slow step")
        pod.signal(signal.SIGSTOP, 1)
        begin = time.monotonic()
        wait_for(lambda: pod.alive == [1], NOTICED, "the end of process 0")
        assert time.monotonic() - begin > HEARTBEAT / 2  # a process may be slow
        pod.signal(signal.SIGCONT, 1)  # it finds out that it was given up
        logs = pod.ended(LOST, LOST, seconds=NOTICED)
    assert all(map(says_that_one_is_gone, logs))
    by_time = ("--config.checkpoint.every=0", "--config.checkpoint.every_minutes=0.01")
    with Pod(files, workdir, *by_time) as pod:
        logs = pod.ended(0, 0)
    steps = [re.findall(r"checkpoint of step (\d+)", log) for log in logs]
    assert steps[0] == steps[1] and len(steps[0]) >= 3  # the clock of process 0 counts
    same(workdir, reference, exact=True)


def test_checkpoints_on_the_hosts_own_disks_are_taken_where_all_have_newer_ones(
    files, reference, tmp_path
):
    workdir, disk = tmp_path / "run", tmp_path / "disk"
    options = [
        "--config.checkpoint.every=10",
        "--config.checkpoint.local_every=3",
        f"--config.checkpoint.local_dir={disk}",
    ]

    def newest():
        kept = [
            {int(p.name) for p in disk.glob(f"*/{i}-of-2/*") if p.name.isdigit()} for i in range(2)
        ]
        return max(set.intersection(*kept), default=0)

    for new_host in (True, False):
        with Pod(files, workdir, *options) as pod:
            pod.reach(12)
            pod.wait_for(
                lambda: newest() > 10, 20, "a checkpoint on both disks"
            )  # it is written beside the steps
            pod.signal(signal.SIGKILL, 1)
            first, _ = pod.wait(NOTICED) and pod.logs
        assert newest() > 10 and saved(workdir) == [10]
        if new_host:
            shutil.rmtree(next(disk.glob("*/1-of-2")))
    assert "continuing at step 10" in first
    with Pod(files, workdir, *options) as pod:
        assert f"continuing at step {newest()}" in pod.ended(0, 0)[0]
    same(workdir, reference, exact=True)
