"""Causes random faults in runs, and compares the runs with an undisturbed one.

    PYTHONPATH=. python -m tests.pod.soak --minutes=30 [--seed=S] [--processes=2..4]

Each run is killed, stopped or frozen a few times and then left to finish. Half of the runs keep
their number of processes and their mesh, and must equal the undisturbed run bit by bit. The others
change both between starts.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

# pytest adds these folders for the tests.
sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).parents[:2]]

from pods import (
    HEARTBEAT,
    PEER_LOST,
    START,
    STEPS,
    Pod,
    assert_same_run,
    make_files,
    read_run,
    saved,
)

NOTICED = HEARTBEAT + 40  # seconds; more than in the tests, since this script may run for hours
KINDS = (
    "SIGKILL of one",
    "SIGKILL of all",
    "SIGKILL at the start",
    "SIGKILL of one in a checkpoint",
    "SIGKILL of all in a checkpoint",
    "SIGTERM to one",
    "SIGTERM to all",
    "SIGINT to one",
    "SIGSTOP of one",
    "SIGSTOP for a while",
)
# The last steps are not disturbed, because a run that is asked to stop there completes.
SPARE = 2


Layout = tuple[int, int, tuple[str, ...]]  # (processes, devices of each process, options)


def layouts(max_processes: int) -> list[Layout]:
    """All layouts with at most `max_processes` processes; the first is that of `make_files`."""

    def mesh(**axes):
        return tuple(f"--config.mesh.{axis}={size}" for axis, size in axes.items())

    choices = [
        (2, 1, ()),
        (1, 2, ()),
        (1, 4, mesh(data=2, fsdp=2)),
        (2, 2, mesh(data=2, fsdp=1, tensor=2)),
        (2, 2, mesh(data=4, fsdp=1)),
        # The data has three streams, so the fourth device holds absent cells.
        (4, 1, mesh(data=1, fsdp=1, stream=4)),
        (4, 1, ()),
        (4, 1, mesh(data=2, fsdp=2)),
    ]
    return [layout for layout in choices if layout[0] <= max_processes]


def disturb(pod: Pod, count: int, rng: random.Random) -> tuple[str, bool]:
    """Causes one fault at a random moment and waits for the processes to end.

    Args:
      pod: the processes.
      count: number of processes.
      rng: source of random choices.

    Returns:
      (kind of fault, whether the run completed before it took effect).

    Raises:
      AssertionError: a process does not end in time, or ends with a wrong status.
    """
    one = rng.randrange(count)
    step = rng.randrange(last_step(pod.workdir), STEPS - SPARE)
    kind = rng.choice(KINDS)
    which = tuple(range(count)) if "of all" in kind or "to all" in kind else (one,)
    if kind == "SIGKILL at the start":
        end = time.monotonic() + rng.uniform(0, 12)
        # A fast machine may complete the run in that time, so stop waiting at the first step.
        while time.monotonic() < end and pod.step(one) < 0:
            time.sleep(0.005)
    elif "checkpoint" in kind:
        pod.wait_for(lambda: pod.step(one) >= min(step, STEPS - 6), START, "a step")
        pod.stop_while_writing()
    else:
        pod.wait_for(lambda: pod.step(one) >= step, START, f"step {step} in process {one}")
        time.sleep(rng.uniform(0, 0.2))
    number = {
        "SIGK": signal.SIGKILL,
        "SIGT": signal.SIGTERM,
        "SIGI": signal.SIGINT,
        "SIGS": signal.SIGSTOP,
    }[kind[:4]]
    pod.signal(number, *which)
    if "checkpoint" in kind:
        pod.signal(signal.SIGCONT)
    if kind == "SIGSTOP for a while":
        time.sleep(rng.uniform(0.5, HEARTBEAT / 2))
        pod.signal(signal.SIGCONT)
        pod.signal(signal.SIGTERM, one)
        number = signal.SIGTERM
    if number == signal.SIGSTOP:
        pod.wait_for(lambda: pod.alive == [one], NOTICED, "the end of all but the frozen process")
        pod.signal(signal.SIGKILL, one)
    statuses = pod.wait(NOTICED if kind != "SIGKILL at the start" else NOTICED + 60)
    if set(statuses) == {0} and number != signal.SIGINT:
        # JAX looks for preemption notices once a second, and the processes stop a few steps later.
        # They must have stopped if the notice came early enough.
        assert step > STEPS - 14, f"{kind} at step {step}: no process stopped\n{pod.log_ends()}"
        return f"{kind}, too late", True
    for i, status in enumerate(statuses):
        if number in (signal.SIGTERM, signal.SIGINT):
            allowed = {75 if number == signal.SIGTERM else 0}
        elif i in which:
            allowed = {-signal.SIGKILL}
        else:
            allowed = {*PEER_LOST, 0} if "start" not in kind else {*PEER_LOST}
        assert status in allowed, (
            f"{kind} (process {one}): statuses are {statuses}\n{pod.log_ends()}"
        )
    return kind, False


def last_step(workdir: pathlib.Path) -> int:
    """The step of the last checkpoint; 0 if there is none."""
    return max(saved(workdir), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--processes", type=int, default=4, choices=(2, 3, 4), help="most processes at a time"
    )
    arguments = parser.parse_args()
    rng, end = random.Random(arguments.seed), time.monotonic() + 60 * arguments.minutes
    folder = pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"in {folder}, seed {arguments.seed}", flush=True)
    files, choices = make_files(folder), layouts(arguments.processes)
    with Pod(files, folder / "undisturbed") as pod:
        pod.expect_end(0, 0)
    reference = read_run(folder / "undisturbed")
    counts: collections.Counter = collections.Counter()
    kinds: collections.Counter = collections.Counter()
    number = 0
    try:
        while time.monotonic() < end:
            number += 1
            workdir, moves = folder / f"run-{number}", number % 2 == 0
            for _ in range(rng.randrange(2, 6)):
                processes, devices, options = rng.choice(choices) if moves else choices[0]
                with Pod(
                    files, workdir, *options, processes=processes, devices=devices, wait_seconds=40
                ) as pod:
                    if last_step(workdir) >= STEPS - SPARE - 1:
                        break
                    kind, complete = disturb(pod, processes, rng)
                counts["starts"] += 1
                kinds[kind] += 1
                print(
                    f"run {number}: {processes} processes of {devices} {' '.join(options)}: {kind}",
                    flush=True,
                )
                if complete:
                    break
            processes, devices, options = rng.choice(choices) if moves else choices[0]
            with Pod(files, workdir, *options, processes=processes, devices=devices) as pod:
                pod.expect_end(*[0] * processes)
            counts["starts"] += 1
            run = assert_same_run(workdir, reference, exact=not moves)
            counts["runs", "moved" if moves else "same bits"] += 1
            counts["steps"] += STEPS
            counts["repeated steps"] += sum(len(losses) - 1 for losses in run.losses.values())
            print(
                f"run {number}: equals the undisturbed one{'' if moves else ' bit by bit'}",
                flush=True,
            )
            shutil.rmtree(workdir)
    except AssertionError as error:
        print(f"FAILED in run {number}, kept in {folder}: {error}", flush=True)
        return 1
    shutil.rmtree(folder)
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(
        f"passed: {counts['starts']} starts, {sum(kinds.values())} faults ({faults});"
        f" {number} runs have the examples and losses of the undisturbed one,"
        f" {counts['runs', 'same bits']} of them bit by bit, {counts['runs', 'moved']} with other"
        f" processes and meshes; {counts['steps']} steps, {counts['repeated steps']} repeated"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
