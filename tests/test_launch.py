"""The launchers: the commands that they print, and their restart loops.

The loops run with real processes and signals. Stand-in programs replace msllm, gcloud and Slurm.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import jsonschema
import kubernetes_validate
import psutil
import pytest
import yaml

from msllm.errors import UserError
from msllm.pod import aot

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
POD = ("--name=pod", "--zone=us-west4-a", "--project=mine")
TRAIN = ("--config=configs/8b_v5e_256.py", "--workdir=gs://bucket/run")
TPU_VM = ("launch/tpu_vm.sh", *POD, *TRAIN, "--type=v5litepod-256")
SLURM = ("launch/slurm.sh", "--config=configs/1b_h100_8.py")
JOBSET = (
    sys.executable,
    "launch/gke/jobset.py",
    "--image=here/msllm:1",
    "--name=mine",
    "--workdir=gs://bucket/run",
)


def launch(*command, timeout=120, cwd=ROOT, **environment):
    """Runs a command, by default in the root, without variables that the launchers should set."""
    unset = ("XLA_FLAGS", "JAX_PLATFORMS", "SLURM_JOB_ID")
    clean = {key: value for key, value in os.environ.items() if key not in unset}
    clean["PYTHONPATH"] = str(ROOT)
    clean |= {key: str(value) for key, value in environment.items()}
    return subprocess.run(
        command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=timeout
    )


def write_program(path, text):
    """Writes an executable shell script and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


@contextlib.contextmanager
def started(*command, **options):
    """Runs a command in the root folder in the background.

    Kills the command if the test fails. Leaving the context of subprocess.Popen alone would wait.
    """
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition, seconds=15):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(0.05)


def running(pid):
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def values_of(hardware):
    """The variables that launch/flags.env sets for this hardware."""
    lines = (LAUNCH / "flags.env").read_text().splitlines()
    entries = [line.split(" ", 1) for line in lines if not line.startswith("#")]
    return dict(value.split("=", 1) for name, value in entries if name == hardware)


# All scripts


def test_shellcheck_finds_nothing(tmp_path):
    job = tmp_path / "job.sh"
    job.write_text(launch(*SLURM, f"--workdir={tmp_path}", "--per=node", "--dry-run").stdout)
    folder = pathlib.Path(sys.executable).parent
    checker = shutil.which("shellcheck", path=f"{folder}:{os.environ['PATH']}")
    found = launch(checker, *sorted(map(str, LAUNCH.rglob("*.sh"))), str(job))
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    "script", ["local_pod.sh", "tpu_vm.sh", "on_host.sh", "slurm.sh", "gke/jobset.py"]
)
def test_help_names_every_option(script):
    command = [sys.executable] if script.endswith(".py") else []
    shown = launch(*command, f"launch/{script}", "--help")
    assert shown.stdout and "error" not in shown.stderr
    if script in ("local_pod.sh", "tpu_vm.sh", "slurm.sh"):
        assert shown.returncode == 0
        text = (LAUNCH / script).read_text().replace("\\\n", "")
        names = re.search(r"^take_arguments +(.*) train \"\$@\"$", text, re.M)[1]
        accepted = {f"--{name}" for name in re.findall("[a-z-]+", names)}
        assert "--dry-run" in accepted and accepted <= set(re.findall(r"--[a-z-]+", shown.stdout))


@pytest.mark.parametrize(
    "command, message",
    [
        (
            ("launch/local_pod.sh", "0", "configs/quickstart.py"),
            "PROCESSES is '0': must be a whole number",
        ),
        (
            ("launch/local_pod.sh", "2", "configs/none.py"),
            "'configs/none.py': there is no such file",
        ),
        (("launch/local_pod.sh", "2"), "CONFIG are missing:"),
        (
            ("launch/local_pod.sh", "2", "configs/quickstart.py", "--restarts=x"),
            "--restarts is 'x'",
        ),
        (
            ("launch/local_pod.sh", "2", "configs/quickstart.py", "--workdir=gs://a/b"),
            "are local files",
        ),
        (
            ("launch/local_pod.sh", "2", "configs/quickstart.py", "--lr=1"),
            "unknown argument --lr=1",
        ),
        (("launch/tpu_vm.sh", "fly", *POD), "unknown command 'fly'"),
        (("launch/tpu_vm.sh", "create", "--name=pod", "--zone=z"), "--project is missing"),
        ((*TPU_VM, "create", "--name=Pod"), "--name is 'Pod': lower-case"),
        ((*TPU_VM, "create", "--type=v5e"), "--type is 'v5e': must be an accelerator type"),
        ((*TPU_VM, "create", "--type=v9-8"), "has no runtime version for it"),
        ((*TPU_VM, "create", "--spot", "--reserved"), "exclude each other"),
        ((*TPU_VM, "start", "--workdir=runs/x"), "every host must see the same place"),
        ((*TPU_VM, "install", "--commit=none"), "git knows no such commit"),
        ((*TPU_VM, "start", "--env=3=4"), "--env is '3=4'"),
        ((*TPU_VM, "start", "--env=HF_TOKEN=x"), "export HF_TOKEN and give --env=HF_TOKEN"),
        ((*TPU_VM, "start", "--env=NOT_SET_HERE"), "there is no such variable here"),
        ((*TPU_VM, "start", "--config=/etc/passwd"), "the hosts get only files of this repository"),
        ((*TPU_VM, "stop", "--config.steps=3"), "stop takes no --config.steps=3: only start"),
        ((*TPU_VM, "stop", "--env=A=3"), "stop takes no --env=A: only start and run"),
        ((*TPU_VM, "stop", "--keep=yes"), "--keep takes no value"),
        ((*TPU_VM, "stop", "--slice", "1"), "--slice has no value: write --slice=VALUE"),
        ((*TPU_VM, "stop", "start"), "unexpected argument 'start'"),
        ((*TPU_VM, "start", "--config.steps", "3"), "write --config.KEY=VALUE, in one word"),
        ((*TPU_VM, "start", "--config.a;b=3"), "write --config.KEY=VALUE"),
        ((*TPU_VM, "start", "--workdir=/a\nrm -rf x"), "a line break or another control character"),
        (
            (*TPU_VM, "start", "--heartbeat_timeout=x"),
            "--heartbeat_timeout is 'x':",
        ),
        ((*TPU_VM, "start", "-config.steps=3"), "unknown argument -config.steps=3"),
        ((*SLURM, "--workdir=/tmp/x", "--per=core"), "--per is 'core': must be node or gpu"),
        ((*SLURM, "--workdir=/tmp/x", "--time=9"), "--time is '9'"),
        ((*SLURM, "--workdir=/tmp/x", "--gpus=08"), "--gpus is '08': must be a whole number"),
        ((*SLURM, "--workdir=/tmp/x", "--time=0:05:00"), "must be longer than --save-seconds=300"),
        ((*SLURM, "--workdir=/tmp/a\nsbatch"), "a line break or another control character"),
        ((*SLURM, "--workdir=/tmp/a\\b"), "sbatch reads a backslash as an escape"),
        ((*SLURM, "--workdir=/tmp/x", "--sbatch=-p gpu"), "must be one option of sbatch"),
        ((*SLURM, "--workdir=/tmp/x", "--sbatch=--nodes=2"), "this script sets --nodes"),
        ((*SLURM, "--workdir=/tmp/x", "extra"), "unexpected argument 'extra'"),
        (("launch/quickstart.sh", "--heartbeat_timeout=3"), "unknown argument --heartbeat_timeout"),
        (("launch/check_budgets.sh", "--config.steps=3"), "this script overrides no config"),
        (SLURM, "--workdir is ''"),
        ((*JOBSET, "--topology=v5e:16x16"), "--config must be given"),
        (
            (*JOBSET, "--config=configs/8b_v5e_256.py", "--topology=v5e:4x4"),
            "does not fit 16 devices",
        ),
        (
            (*JOBSET, "--config=configs/8b_v5e_256.py", "--topology=v5e:16x16", "--restarts=-1"),
            "--restarts is -1",
        ),
        ((*JOBSET, "-config.optim.lr=1"), "unknown flag -config.optim.lr"),
        ((*JOBSET, "--flagfile=x"), "unknown flag --flagfile"),
        ((*JOBSET, "--env=HF_TOKEN=x"), "keep it in a Kubernetes Secret"),
        ((*JOBSET, "--image=a b"), "--image is 'a b'"),
        (
            (*JOBSET, "--config=configs/8b_v5e_256.py", "--topology=v5e:16x16", "--config.KEY=1"),
            "unknown config key config.KEY",
        ),
    ],
)
def test_bad_arguments_end_with_status_2(command, message):
    found = launch(*command, "--dry-run")
    assert found.returncode == 2 and message in found.stderr
    # libtpu may print a line of its own first.
    assert found.stderr.startswith(("error: ", "Failed to find host"))


def test_cdpath_and_the_folder_of_the_caller_do_not_change_what_a_script_does(tmp_path):
    # A folder of the same name, to which `cd launch/..` would go.
    (tmp_path / "launch").mkdir()
    options = ("--workdir=/shared/x", "--dry-run")
    expected = launch(*SLURM, *options).stdout
    assert f"\ncd {ROOT} " in expected
    assert launch("bash", *SLURM, *options, CDPATH=tmp_path).stdout == expected
    config = "--config=../configs/1b_h100_8.py"
    assert launch("bash", "slurm.sh", config, *options, cwd=LAUNCH).stdout == expected
    # Relative paths begin in the folder of the caller.
    relative = launch(f"{ROOT}/{SLURM[0]}", SLURM[1], "--workdir=x", "--dry-run", cwd=tmp_path)
    assert f"--output={tmp_path}/x/slurm-%j.log\n" in relative.stdout
    home = launch(*SLURM, "--workdir=~/x", "--dry-run", HOME=tmp_path)
    assert f"--output={tmp_path}/x/slurm-%j.log\n" in home.stdout


def test_jaxlib_knows_the_xla_flags():
    flags = " ".join(values_of(hardware)["XLA_FLAGS"] for hardware in ("cpu", "gpu"))
    # XLA ends a process that sets an unknown flag.
    show = "import jax; print(len(jax.devices()))"
    assert launch(sys.executable, "-c", show, XLA_FLAGS=flags, JAX_PLATFORMS="cpu").stdout == "1\n"


# local_pod.sh

STUB = """
for argument; do
  case $argument in --process_id=*) id=${argument#*=} ;; --workdir=*) workdir=${argument#*=} ;; esac
done
saved() { echo saved; exit 75; }
trap saved TERM
busy() { while true; do sleep 0.1; done; }
"""


def local_pod(tmp_path, body, *options):
    """A command that runs a shell script `body` in three processes instead of msllm."""
    stub = write_program(tmp_path / "stub", STUB + body)
    return (
        "launch/local_pod.sh",
        "3",
        "configs/quickstart.py",
        f"--python={stub}",
        f"--workdir={tmp_path}/run",
        *options,
    )


def logs(tmp_path, attempt):
    """The output of each process of an attempt; empty if there was no such attempt."""
    folder = tmp_path / "run" / "logs" / f"attempt-{attempt}"
    return [path.read_text() for path in sorted(folder.glob("*.log"))]


def assert_no_orphans(tmp_path):
    pids = [path.read_text() for path in tmp_path.rglob("*.pid")]
    assert pids and not any(map(running, pids))


def test_local_pod_prints_its_commands(tmp_path):
    shown = launch(*local_pod(tmp_path, "", "--devices=4", "--config.steps=3", "--dry-run"))
    commands = [shlex.split(line) for line in shown.stdout.splitlines()]
    assert shown.returncode == 0 and len(commands) == 3 and not (tmp_path / "run").exists()
    for i, command in enumerate(commands):
        assert {
            "--num_processes=3",
            f"--process_id={i}",
            "--config.steps=3",
            "JAX_PLATFORMS=cpu",
        } <= set(command)
        assert any(word.endswith("--xla_force_host_platform_device_count=4") for word in command)
    words = [word for command in commands for word in command]
    addresses = [word for word in words if word.startswith("--coordinator_address=127.0.0.1:")]
    assert len(addresses) == 3 and len(set(addresses)) == 1


def test_local_pod_logs_each_process_and_shows_the_first(tmp_path):
    body = 'echo "process $id of $XLA_FLAGS on $JAX_PLATFORMS"'
    found = launch(*local_pod(tmp_path, body, "--devices=2"), XLA_FLAGS="--mine=1")
    assert found.returncode == 0, found.stderr
    assert found.stdout == logs(tmp_path, 1)[0] and "count=2 --mine=1 on cpu" in found.stdout
    assert [line.split(" of ")[0] for line in logs(tmp_path, 1)] == [
        "process 0",
        "process 1",
        "process 2",
    ]


def test_local_pod_does_not_repeat_bad_input(tmp_path):
    body = "if [[ $id == 1 ]]; then exit 2; fi; sleep 0.4; exit 1"
    found = launch(*local_pod(tmp_path, body, "--restarts=3"))
    assert found.returncode == 2 and len(logs(tmp_path, 1)) == 3 and not logs(tmp_path, 2)
    assert_no_orphans(tmp_path)


def test_local_pod_starts_again_after_a_process_dies(tmp_path):
    # In the first attempt process 1 dies, process 2 notices it and process 0 hangs.
    body = """
    if [[ -e $workdir/again-$id ]]; then exit 0; fi
    touch "$workdir/again-$id"
    case $id in
      0) trap '' TERM; busy ;;
      1) kill -KILL $$ ;;
      2) sleep 0.4; echo noticed; exit 1 ;;
    esac
    """
    found = launch(*local_pod(tmp_path, body, "--restarts=1", "--grace=3"))
    assert found.returncode == 0, found.stderr
    assert "noticed" in logs(tmp_path, 1)[2] and len(logs(tmp_path, 2)) == 3
    assert "process 1 ended with status 137" in found.stderr
    assert "killed by SIGKILL, by hand or by the kernel for lack of memory" in found.stderr
    assert "waiting up to 3 s (--grace) for 2 process(es) to end by themselves: 0 2" in found.stderr
    assert found.stderr.index("waiting up to") < found.stderr.index("process 2 ended")
    assert "killing 1 process" in found.stderr
    assert_no_orphans(tmp_path)


@pytest.mark.parametrize(
    "lines, status, cause",
    [
        (("error: no such data", "and more"), 2, "no such data"),
        (
            ("Traceback", "  File x", "pkg.OwnError: bad shape", "at exit"),
            1,
            "pkg.OwnError: bad shape",
        ),
        (("F1130 08:40:19.2   15 client.h:80] Lost", "    @ 0x7f  absl::Log()"), 134, "Lost"),
        (("Fatal Python error: Aborted", "Thread 0x7f:"), 134, "Fatal Python error: Aborted"),
        (("fine",), 143, "killed by SIGTERM"),
        (("fine",), 7, "its log does not say why"),
    ],
)
def test_local_pod_says_why_a_process_ended(tmp_path, lines, status, cause):
    words = " ".join(map(shlex.quote, lines))
    body = f"if [[ $id == 1 ]]; then printf '%s\\n' {words}; exit {status}; fi; sleep 0.5; exit 76"
    found = launch(*local_pod(tmp_path, body))
    assert found.returncode == status
    assert f"process 1 ended with status {status}: {cause} (" in found.stderr


def test_local_pod_keeps_stacks_off_the_screen(tmp_path):
    lines = [
        "step 1",
        "E1130 08:40:19.2 15 coordination_service.cc:1] Lost",
        "    @ 0x7f  absl::Log()",
    ]
    words = " ".join(map(shlex.quote, lines))
    found = launch(*local_pod(tmp_path, f"printf '%s\\n' {words}; exit 134"))
    assert found.stdout == "step 1\n"
    assert logs(tmp_path, 1)[0].splitlines() == lines


def test_local_pod_starts_again_after_a_preemption(tmp_path):
    body = 'if [[ -e $workdir/again-$id ]]; then exit 0; fi; touch "$workdir/again-$id"; exit 75'
    found = launch(*local_pod(tmp_path, body, "--restarts=1"))
    assert found.returncode == 0 and len(logs(tmp_path, 2)) == 3 and not logs(tmp_path, 3)


def test_local_pod_gives_up_after_its_restarts(tmp_path):
    body = "if [[ $id == 0 ]]; then exit 9; fi; exit 75"
    found = launch(*local_pod(tmp_path, body, "--restarts=1"))
    assert found.returncode == 9 and logs(tmp_path, 2) and not logs(tmp_path, 3)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 0)])
def test_local_pod_passes_signals_on(tmp_path, number, status):
    command = local_pod(tmp_path, "echo ready; busy", "--restarts=3")
    with started(*command, stderr=subprocess.DEVNULL, start_new_session=True) as pod:
        wait_for(lambda: sum("ready" in log for log in logs(tmp_path, 1)) == 3)
        if number == signal.SIGINT:  # a terminal sends it to the whole group
            os.killpg(pod.pid, number)
        else:
            pod.send_signal(number)
        assert pod.wait(10) == status
    assert all("saved" in log for log in logs(tmp_path, 1)) and not logs(tmp_path, 2)
    assert_no_orphans(tmp_path)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv (util-linux)")
def test_processes_of_a_killed_local_pod_save_and_end(tmp_path):
    with started(*local_pod(tmp_path, "echo ready; busy")) as pod:
        wait_for(lambda: sum("ready" in log for log in logs(tmp_path, 1)) == 3)
        pod.kill()
    wait_for(lambda: all("saved" in log for log in logs(tmp_path, 1)))
    wait_for(lambda: not any(running(path.read_text()) for path in tmp_path.rglob("*.pid")))


# tpu_vm.sh


def printed_commands(*command):
    """The commands that a dry run prints, as lists of words."""
    shown = launch(*command, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    return [shlex.split(line) for line in shown.stdout.splitlines()]


def test_tpu_vm_requests_one_slice_or_several():
    resources = ["gcloud", "compute", "tpus", "queued-resources"]
    place = ["--zone=us-west4-a", "--project=mine"]
    what = ["--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite"]
    assert printed_commands(*TPU_VM, "create") == [
        [*resources, "create", "pod", *what, "--node-id=pod", *place]
    ]
    several = [*what, "--node-count=2", "--node-prefix=pod", "--spot", "--service-account=me@x"]
    options = ("--slices=2", "--spot", "--service-account=me@x")
    assert printed_commands(*TPU_VM, "create", *options) == [
        [*resources, "create", "pod", *several, *place]
    ]
    assert printed_commands(*TPU_VM, "delete") == [
        [*resources, "delete", "pod", "--force", "--quiet", *place]
    ]
    for type_, runtime in (
        ("v6e-256", "v2-alpha-tpuv6e"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v4-128", "tpu-ubuntu2204-base"),
    ):
        (create,) = printed_commands(*TPU_VM, "create", f"--type={type_}")
        assert f"--runtime-version={runtime}" in create


def test_tpu_vm_quotes_arguments_for_the_shell_of_a_host():
    lags = "--config.streams.lags=(('output', 'user', '3'),)"
    (command,) = printed_commands(*TPU_VM, "start", lags, "--ssh-option=--tunnel-through-iap")
    assert {"--node=all", "--worker=all", "--tunnel-through-iap"} <= set(command)
    (sent,) = [word.removeprefix("--command=") for word in command if word.startswith("--command=")]
    assert shlex.split(sent) == [
        "bash",
        "msllm/launch/on_host.sh",
        "start",
        "--",
        *TRAIN,
        lags,
    ]


def test_a_dry_run_of_tpu_vm_run_prints_all_commands():
    def verbs(*options):
        commands = printed_commands(*TPU_VM, "run", *options)
        return [command[4] if command[0] == "gcloud" else command[0] for command in commands]

    assert verbs() == ["create", "list", "git", "scp", "ssh", "ssh", "ssh", "delete"]
    assert verbs("--keep") == verbs()[:-1]


# A stand-in for gcloud. The only host is a folder, and the state of the queued resource is a file.
GCLOUD = """
echo "$4 $*" >>"$CLOUD/calls"
for argument; do
  case $argument in
    --command=*) sent=${argument#*=} ;;
    --filter=*) filter=${argument#*=} ;;
  esac
done
case $4 in
  list)
    [[ $filter == 'name ~ /queuedResources/pod$' ]] || exit 1
    cat "$CLOUD/state" 2>/dev/null
    if [[ $(cat "$CLOUD/state" 2>/dev/null) == WAITING_FOR_RESOURCES ]]; then
      echo ACTIVE >"$CLOUD/state"
    fi
    ;;
  create) [[ ! -e $CLOUD/state ]] || exit 1; echo WAITING_FOR_RESOURCES >"$CLOUD/state" ;;
  delete) rm "$CLOUD/state" ;;
  scp) cp "$5" "$CLOUD/host/${6#pod:}" ;;
  ssh) cd "$CLOUD/host" && HOME=$CLOUD/host bash -c "$sent" ;;
  *) exit 1 ;;
esac
"""
# A stand-in for the Python of the host. Each training ends with the next status in the file
# `statuses`.
TRAINING = """
if [[ $1 == -c ]]; then exit 0; fi
echo "train $* $JAX_PLATFORMS"
trap 'exit 75' TERM
status=$(head -n 1 "$CLOUD/statuses")
sed -i 1d "$CLOUD/statuses"
if [[ $status == wait ]]; then while true; do sleep 0.1; done; fi
if [[ $status == preempted ]]; then echo SUSPENDED >"$CLOUD/state"; exit 75; fi
exit "$status"
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """(folder of a stand-in for Google Cloud, environment in which the launcher finds it)."""
    write_program(tmp_path / "bin" / "gcloud", GCLOUD)
    write_program(tmp_path / "host" / "msllm" / ".venv" / "bin" / "python", TRAINING)
    stamp = tmp_path / "host" / "msllm" / ".venv" / "installed-tpu"  # nothing to install
    stamp.touch()
    os.utime(stamp, (2**32, 2**32))
    # Install the files of the working tree: this makes a commit of them that is on no branch.
    who = {
        f"GIT_{role}_{what}": "test"
        for role in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    commit = launch("git", "stash", "create", **who).stdout.strip() or "HEAD"
    monkeypatch.setattr(sys.modules[__name__], "TPU_VM", (*TPU_VM, f"--commit={commit}"))
    return tmp_path, {
        "CLOUD": tmp_path,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "TMPDIR": tmp_path,
    }


def calls(folder):
    return [line.split()[0] for line in (folder / "calls").read_text().splitlines()]


def test_tpu_vm_runs_until_complete(cloud):
    folder, environment = cloud
    (folder / "statuses").write_text("preempted\n1\n0\n")
    found = launch(*TPU_VM, "run", "--poll=1", "--env=MINE=1", **environment)
    assert found.returncode == 0, found.stderr
    assert calls(folder).count("create") == calls(folder).count("delete") == 2
    assert not (folder / "state").exists()
    log = (folder / "host" / "msllm-run" / "train.log").read_text().splitlines()
    assert log == [f"train -m msllm train {' '.join(TRAIN)} tpu,cpu"] * 3


def test_tpu_vm_sends_variables_in_a_file_that_it_deletes(cloud):
    folder, environment = cloud
    (folder / "statuses").write_text("0\n")
    python = folder / "host" / "msllm" / ".venv" / "bin" / "python"
    python.write_text(python.read_text().replace("echo", 'printf "%s|" "$A" "$HF_TOKEN"\necho'))
    options = ("--poll=1", "--env=A=b 'c'", "--env=HF_TOKEN")
    found = launch(*TPU_VM, "run", *options, HF_TOKEN="secret\nword", **environment)
    assert found.returncode == 0, found.stderr
    log = (folder / "host" / "msllm-run" / "train.log").read_text()
    assert log.startswith("b 'c'|secret\nword|train")
    assert "secret" not in (folder / "calls").read_text() + found.stderr + found.stdout
    assert not list(folder.glob("msllm.*")) and not (folder / "host/msllm-environment").exists()


def test_tpu_vm_does_not_watch_a_run_with_other_arguments(cloud):
    folder, environment = cloud
    (folder / "statuses").write_text("wait\n")
    (folder / "state").write_text("ACTIVE")
    for verb in ("install", "start"):
        options = ["--config.steps=3"] if verb == "start" else []
        assert launch(*TPU_VM, verb, *options, **environment).returncode == 0
    found = launch(*TPU_VM, "run", "--poll=1", "--config.steps=4", **environment)
    assert found.returncode == 2 and "--config.steps=3; give these, or end it" in found.stderr
    assert launch(*TPU_VM, "stop", **environment).returncode == 0


def test_tpu_vm_refuses_a_config_that_the_hosts_do_not_get(tmp_path):
    config = ROOT / "configs" / "not_committed.py"
    config.touch()
    try:
        found = launch(*TPU_VM, "run", "--config=configs/not_committed.py", "--dry-run")
    finally:
        config.unlink()
    assert found.returncode == 2 and "has no such file; commit it" in found.stderr


def test_tpu_vm_stops_at_bad_input(cloud):
    folder, environment = cloud
    (folder / "statuses").write_text("2\n")
    found = launch(*TPU_VM, "run", "--poll=1", **environment)
    assert found.returncode == 2 and "train -m msllm train" in found.stderr
    assert calls(folder).count("create") == calls(folder).count("delete") == 1


def test_tpu_vm_gives_up_after_crashes_and_keeps_the_machines(cloud):
    folder, environment = cloud
    (folder / "statuses").write_text("1\n134\n0\n")
    found = launch(*TPU_VM, "run", "--poll=1", "--restarts=1", **environment)
    assert found.returncode == 1
    assert "it still costs money" not in found.stderr
    assert "still there and costs" in found.stderr
    assert "delete" not in calls(folder)


def test_tpu_vm_run_continues_to_watch_a_run_and_ends_after_stop(cloud):
    folder, environment = cloud
    (folder / "statuses").write_text("wait\n0\n")
    variables = os.environ | {key: str(value) for key, value in environment.items()}
    with started(*TPU_VM, "run", "--poll=1", env=variables, start_new_session=True) as watch:
        wait_for((folder / "host" / "msllm-run" / "pid").exists)
        os.killpg(watch.pid, signal.SIGINT)
        assert watch.wait(10) == 130
    assert launch(*TPU_VM, "status", **environment).stdout.split() == ["ACTIVE", "1", "running"]
    with started(*TPU_VM, "run", "--poll=1", env=variables) as watch:
        time.sleep(1)
        assert launch(*TPU_VM, "stop", **environment).returncode == 0
        assert watch.wait(15) == 75
    assert calls(folder).count("scp") == 1 and "delete" not in calls(folder)
    assert not running((folder / "host" / "msllm-run" / "pid").read_text())
    # The same command continues with the existing machines.
    assert launch(*TPU_VM, "run", "--poll=1", **environment).returncode == 0
    assert calls(folder).count("create") == 1


def test_tpu_vm_ends_on_ctrl_c_even_if_gcloud_ignores_it(cloud):
    folder, environment = cloud
    write_program(
        folder / "bin" / "gcloud", 'trap "" INT; touch "$CLOUD/asked"; sleep 1; echo ACTIVE'
    )
    variables = os.environ | {key: str(value) for key, value in environment.items()}
    with started(*TPU_VM, "run", "--poll=1", env=variables, start_new_session=True) as watch:
        wait_for((folder / "asked").exists)
        os.killpg(watch.pid, signal.SIGINT)
        assert watch.wait(10) == 130


# slurm.sh

SRUN = """
echo "srun $*"
case $MODE in
  signal)
    trap 'exit 75' TERM
    echo $$ >"$CLUSTER/pid"
    for i in {1..100}; do sleep 0.1; done
    exit 1
    ;;
  *) exit "$MODE" ;;
esac
"""
SCONTROL = """
echo "scontrol $*" >>"$CLUSTER/calls"
if [[ $1 == show ]]; then echo "   JobState=${STATE:-RUNNING} Reason=None Requeue=1 Restarts=0"; fi
"""


@pytest.fixture
def cluster(tmp_path):
    """(folder of a stand-in for Slurm with a submitted job, environment of the job)."""
    write_program(tmp_path / "bin" / "sbatch", 'cat >"$CLUSTER/job.sh"')
    write_program(tmp_path / "bin" / "srun", SRUN)
    write_program(tmp_path / "bin" / "scontrol", SCONTROL)
    write_program(
        tmp_path / "bin" / "scancel",
        '[[ $* == "--signal=TERM 7" ]] && kill -TERM "$(cat "$CLUSTER/pid")"',
    )
    environment = {"CLUSTER": tmp_path, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    submitted = launch(
        *SLURM, f"--workdir={tmp_path}/run", "--requeues=1", "--python=/opt/python", **environment
    )
    assert submitted.returncode == 0, submitted.stderr
    return tmp_path, environment | {"SLURM_JOB_ID": "7"}


def run_job(cluster, **environment):
    """Runs the job script, and returns (status of the job, whether it was requeued)."""
    folder, base = cluster
    (folder / "calls").write_text("")
    found = launch("bash", f"{folder}/job.sh", **base, **environment)
    return found.returncode, "scontrol requeue 7" in (folder / "calls").read_text()


def test_slurm_job_requests_its_resources(tmp_path):
    per_node = launch(
        *SLURM,
        "--workdir=runs/x",
        "--nodes=2",
        "--sbatch=--partition=gpu",
        "--dry-run",
        "--env=A=b c",
    ).stdout
    options = set(re.findall(r"^#SBATCH (.*)", per_node, re.M))
    assert {
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--signal=B:TERM@300",
        "--requeue",
        "--partition=gpu",
        "--open-mode=append",
        "--time=24:00:00",
        f"--output={ROOT}/runs/x/slurm-%j.log",
    } <= options
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n" in per_node
    assert "export A='b c'\n" in per_node
    assert all(f"export {key}={value}\n" in per_node for key, value in values_of("gpu").items())
    per_gpu = launch(*SLURM, "--workdir=runs/x", "--per=gpu", "--gpus=4", "--dry-run").stdout
    assert "#SBATCH --ntasks-per-node=4\n" in per_gpu and "JAX_LOCAL_DEVICE_IDS" not in per_gpu
    assert per_node.index("\ntrap ") < per_node.index("\nsrun ")


def sbatch_options(script):
    """The options in a job's script, split into words as sbatch does: \\ also escapes in quotes."""
    options = []
    for line in re.findall(r"^#SBATCH(.*)", script, re.M):
        words, quote, escaped = [""], "", False
        for character in line.strip():
            if escaped or not (character == "\\" or (not quote and character in " '\"#")):
                if character != quote or escaped:
                    words[-1] += character
                else:
                    quote = ""
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == "#":
                break
            elif character == " ":
                words.append("")
            else:
                quote = character
        options += words
    return options


def test_slurm_quotes_paths_and_options():
    workdir = "/shared/it's my #1 run %j $(touch x)"
    script = launch(
        *SLURM, f"--workdir={workdir}", "--sbatch=--constraint=a b|c", "--dry-run"
    ).stdout
    options = sbatch_options(script)
    assert f"--output={workdir.replace('%', '%%')}/slurm-%j.log" in options
    assert "--constraint=a b|c" in options
    (srun,) = re.findall("^srun (.*) &$", script, re.M)
    assert f"--workdir={workdir}" in shlex.split(srun)
    crashes = re.search("^crashes_file=.*", script, re.M)[0]
    shown = launch("bash", "-c", f'{crashes}; echo "$crashes_file"', SLURM_JOB_ID="7").stdout
    assert shown == f"{workdir}/slurm-7.crashes\n"


def test_slurm_passes_variables_on_without_writing_their_values(cluster):
    folder, environment = cluster
    options = (f"--workdir={folder}/run", "--env=HF_TOKEN", "--python=/opt/python")
    assert launch(*SLURM, *options, HF_TOKEN="secret", **environment).returncode == 0
    script = (folder / "job.sh").read_text()
    assert "secret" not in script and "--export=ALL" in sbatch_options(script)
    assert run_job(cluster, MODE="0", HF_TOKEN="secret") == (0, False)
    assert run_job(cluster, MODE="0") == (2, False)


def test_slurm_checks_the_arguments_before_it_submits(cluster):
    folder, environment = cluster
    (folder / "job.sh").unlink()
    options = (f"--workdir={folder}/run", f"--python={sys.executable}", "--config.stepz=3")
    found = launch(*SLURM, *options, **environment)
    assert found.returncode == 2 and "did you mean config.steps?" in found.stderr
    assert not (folder / "job.sh").exists()


@pytest.mark.parametrize("mode, requeued", [("0", False), ("2", False), ("75", True)])
def test_slurm_job_requeues_a_run_that_was_stopped_and_saved(cluster, mode, requeued):
    assert run_job(cluster, MODE=mode) == (int(mode), requeued)


def test_slurm_job_gives_up_after_crashes(cluster):
    assert [run_job(cluster, MODE="137") for _ in range(2)] == [(137, True), (137, False)]
    assert run_job(cluster, MODE="75") == (75, True)


def test_a_cancelled_slurm_job_is_not_requeued(cluster):
    assert run_job(cluster, MODE="75", STATE="CANCELLED") == (75, False)


def test_slurm_job_saves_before_its_time_limit(cluster):
    folder, base = cluster
    environment = os.environ | {key: str(value) for key, value in base.items()} | {"MODE": "signal"}
    with started("bash", f"{folder}/job.sh", env=environment) as batch:
        wait_for((folder / "pid").exists)
        batch.send_signal(signal.SIGTERM)  # Slurm sends it to the script only
        assert batch.wait(10) == 75
    assert "scontrol requeue 7" in (folder / "calls").read_text()


# gke/jobset.py

OBJECT = {"type": "object", "additionalProperties": False}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
RULE = OBJECT | {
    "required": ["name", "action"],
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
        "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
        "onJobFailureReasons": {
            "type": "array",
            "items": {"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]},
        },
        "onJobFailureMessagePatterns": {"type": "array", "items": {"type": "string"}},
    },
}
# The fields of jobset.x-k8s.io/v1alpha2 that jobset.py uses, from
# api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset.
JOBSET_SCHEMA = OBJECT | {
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": OBJECT
        | {"required": ["name"], "properties": {"name": {"type": "string"}, "annotations": TEXTS}},
        "spec": OBJECT
        | {
            "required": ["replicatedJobs"],
            "properties": {
                "failurePolicy": OBJECT
                | {
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "restartStrategy": {
                            "enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]
                        },
                        "rules": {"type": "array", "items": RULE},
                    }
                },
                "network": OBJECT
                | {
                    "properties": {
                        "enableDNSHostnames": {"type": "boolean"},
                        "publishNotReadyAddresses": {"type": "boolean"},
                    }
                },
                "replicatedJobs": {
                    "type": "array",
                    "items": OBJECT
                    | {
                        "required": ["name", "template"],
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": OBJECT
                            | {"properties": {"spec": {"type": "object"}}},  # of a Job
                        },
                    },
                },
            },
        },
    },
}


@pytest.fixture(scope="module")
def jobset():
    """The module launch/gke/jobset.py."""
    spec = importlib.util.spec_from_file_location("jobset", LAUNCH / "gke" / "jobset.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["jobset"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def validated(manifest):
    """Validates a manifest against the schemas of JobSet and Job, and returns the Job's spec."""
    jsonschema.validate(manifest, JOBSET_SCHEMA)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": spec}
    kubernetes_validate.validate(job, "1.35", strict=True)
    # The API server requires this of a Job with a pod failure policy. The schema does not say so.
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    return spec


def test_jobset_of_a_slice(tmp_path):
    out = tmp_path / "job.yaml"
    options = (
        "--config=configs/8b_v5e_256.py",
        "--topology=v5e:16x16",
        "--config.optim.lr=1e-3",
        "--config.log_every",
        "7",
        "--noconfig.monitor.examples",
        "--config.data.options.text=$(A) $$",
        "--heartbeat_timeout=50",
        f"--out={out}",
    )
    made = launch(*JOBSET, *options)
    assert made.returncode == 0, made.stderr
    manifest = yaml.safe_load(out.read_text())
    job = validated(manifest)
    assert manifest["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (64, 64, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == [
        "python",
        "-m",
        "msllm",
        "train",
        *TRAIN,
        "--config.optim.lr=1e-3",
        "--config.log_every",
        "7",
        "--noconfig.monitor.examples",
        "--config.data.options.text=$$(A) $$$$",  # $$ stands for $ in a manifest
        "--heartbeat_timeout=50",
    ]
    assert {entry["name"]: entry["value"] for entry in container["env"]} == values_of("tpu")
    # To save 8.2e9 parameters of 12 bytes on 64 hosts at 50 MB/s takes 31 s, which is rounded up to
    # a multiple of half a minute. Another minute is for the step that is running.
    assert pod["terminationGracePeriodSeconds"] == 60 + 60


def test_jobset_refuses_a_config_that_is_not_in_the_image(tmp_path):
    config = shutil.copy(ROOT / "configs" / "8b_v5e_256.py", tmp_path)
    found = launch(*JOBSET, f"--config={config}", "--topology=v5e:16x16")
    assert found.returncode == 2 and "the image has only files of" in found.stderr


def test_jobset_of_several_slices(jobset):
    shape = jobset.Slice("tpu-v6e-slice", "16x16", hosts=64, chips_per_host=4)
    options = {
        "service_account": "trainer",
        "data_bucket": "data",
        "spot": True,
        "host_network": True,
        "variables": {"A": "$B"},
        "secrets": ["keys"],
    }
    manifest = jobset.manifest("mine", "image", ["--workdir=gs://b/r"], shape, 3, 90, 5, **options)
    pod = validated(manifest)["template"]["spec"]
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 3
    variables = {entry["name"]: entry for entry in pod["containers"][0]["env"]}
    assert variables["MEGASCALE_NUM_SLICES"]["value"] == "3"
    assert variables["MEGASCALE_COORDINATOR_ADDRESS"]["value"] == "mine-slice-0-0.mine"
    index = "metadata.annotations['jobset.sigs.k8s.io/job-index']"
    assert variables["MEGASCALE_SLICE_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == index
    assert variables["A"]["value"] == "$$B"
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "keys"}}]
    assert pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    mounts = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
    assert mounts == ["/dev/shm", "/data"]


@pytest.mark.parametrize(
    "code, disrupted, action",
    [
        (2, False, "FailJobSet"),
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, False, None),  # no rule: a restart that counts against --restarts
        (1, False, None),
    ],
)
def test_the_jobset_reacts_to_exit_statuses(jobset, code, disrupted, action):
    """Applies the failure policies of pods and of the JobSet as the controllers do."""
    shape = jobset.Slice("tpu-v6e-slice", "2x4", hosts=2, chips_per_host=4)
    manifest = jobset.manifest("mine", "image", [], shape, 1, 90, 5)
    reason, message = "BackoffLimitExceeded", ""
    for rule in validated(manifest)["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", []):
            # The wording of pkg/controller/job/pod_failure_policy.go in kubernetes.
            message = (
                f"Container msllm for pod default/p failed with exit code {code} matching FailJob "
                "rule at index 0"
            )
        elif disrupted and "onPodConditions" in rule:
            message = (
                "Pod default/p has condition DisruptionTarget matching FailJob rule at index 2"
            )
        if message:
            reason = "PodFailurePolicy"
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(
            re.search(pattern, message) for pattern in patterns
        ):
            assert rule["action"] == action
            return
    assert action is None


def test_jobset_describes_slices_of_each_generation(jobset):
    def devices(hosts, chips=4, slices=1):
        return [
            types.SimpleNamespace(process_index=s * hosts + h, slice_index=s)
            for s in range(slices)
            for h in range(hosts)
            for _ in range(chips)
        ]

    assert jobset.describe("v5p:4x4x4", devices(16), 1) == jobset.Slice(
        "tpu-v5p-slice", "4x4x4", 16, 4
    )
    assert jobset.describe("tpu7x:4x4x4", devices(16, chips=8), 1) == jobset.Slice(
        "tpu7x", "4x4x4", 16, 4
    )
    assert jobset.describe("v5e:4x4", devices(4, slices=2), 2) == jobset.Slice(
        "tpu-v5-lite-podslice", "4x4", 4, 4
    )
    for example in aot.EXAMPLES.split(", "):
        assert jobset.describe(example, devices(1), 1).accelerator
    with pytest.raises(UserError, match="launch/tpus.txt"):
        jobset.describe("v3:4x4", devices(4), 1)


def test_jobset_names_are_valid_and_leave_room_for_the_names_of_pods(jobset):
    shape = jobset.Slice("tpu-v6e-slice", "2x4", hosts=2, chips_per_host=4)
    longest = "a" * (63 - len("-slice-0-1-abcde"))
    jobset.manifest(longest, "image", [], shape, 1, 90, 5)
    for name in (longest + "a", "Mine", "mine-"):
        with pytest.raises(UserError, match="--name is"):
            jobset.manifest(name, "image", [], shape, 1, 90, 5)
