"""Disturbs runs at random for some time, and compares them with an undisturbed run.

    PYTHONPATH=. python -m tests.pod.soak --minutes=30 [--seed=S] [--processes=2..4]

Each run is killed, stopped or frozen a few times and then left to finish. Half of the runs keep
their processes and mesh, and must come to the same bits. The others change both between starts.
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

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # as in the tests

from pods import HEARTBEAT, LOST, START, STEPS, Pod, make_files, read, same, saved

NOTICED = HEARTBEAT + 40  # seconds; more than in the tests: hours on busy machines see everything
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
# The last steps are not disturbed: a run that is asked to stop there completes instead.
SPARE = 2


def layouts(most: int) -> list[tuple[int, int, tuple[str, ...]]]:
    """(processes, devices of each, options)."""

    def meshes(**axes):
        return tuple(f"--config.mesh.{axis}={size}" for axis, size in axes.items())

    every = [
        (2, 1, ()),
        (1, 2, ()),
        (1, 4, meshes(data=2, fsdp=2)),
        (2, 2, meshes(data=2, fsdp=1, tensor=2)),
        (2, 2, meshes(data=4, fsdp=1)),
        # The data has three streams: the fourth place is filled with absent cells.
        (4, 1, meshes(data=1, fsdp=1, stream=4)),
        (4, 1, ()),
        (4, 1, meshes(data=2, fsdp=2)),
    ]
    return [layout for layout in every if layout[0] <= most]


def disturb(pod: Pod, count: int, rng: random.Random) -> tuple[str, bool]:
    """Causes one fault at a random moment and waits for the processes to end.

    Returns (kind of fault, whether the run was complete before it). Raises AssertionError if a
    process does not end in time or ends with a wrong status.
    """
    one = rng.randrange(count)
    step = rng.randrange(last(pod.workdir), STEPS - SPARE)
    kind = rng.choice(KINDS)
    which = tuple(range(count)) if "of all" in kind or "to all" in kind else (one,)
    if kind == "SIGKILL at the start":
        end = time.monotonic() + rng.uniform(0, 12)
        # A quick machine is through all steps before that.
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
        # JAX looks for notices once a second, and the processes stop some steps later. If the
        # notice came earlier than that, they have missed it.
        assert step > STEPS - 14, f"{kind} at step {step}: nobody stopped\n{pod.told()}"
        return f"{kind}, too late", True
    for i, status in enumerate(statuses):
        if number in (signal.SIGTERM, signal.SIGINT):
            right = {75 if number == signal.SIGTERM else 0}
        elif i in which:
            right = {-signal.SIGKILL}
        else:
            right = {*LOST, 0} if "start" not in kind else {*LOST}
        assert status in right, f"{kind} (process {one}): statuses are {statuses}\n{pod.told()}"
    return kind, False


def last(workdir: pathlib.Path) -> int:
    """The step of the last checkpoint, 0 where there is none."""
    return max(saved(workdir), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--processes", type=int, default=4, choices=(2, 3, 4), help="the most at a time"
    )
    arguments = parser.parse_args()
    rng, end = random.Random(arguments.seed), time.monotonic() + 60 * arguments.minutes
    folder = pathlib.Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"in {folder}, seed {arguments.seed}", flush=True)
    files, every = make_files(folder), layouts(arguments.processes)
    with Pod(files, folder / "undisturbed") as pod:
        pod.ended(0, 0)
    reference, counts, kinds = (
        read(folder / "undisturbed"),
        collections.Counter(),
        collections.Counter(),
    )
    number = 0
    try:
        while time.monotonic() < end:
            number += 1
            workdir, moves = folder / f"run-{number}", number % 2 == 0
            for _ in range(rng.randrange(2, 6)):
                processes, devices, options = rng.choice(every) if moves else every[0]
                with Pod(
                    files, workdir, *options, processes=processes, devices=devices, wait_seconds=40
                ) as pod:
                    if last(workdir) >= STEPS - SPARE - 1:
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
            processes, devices, options = rng.choice(every) if moves else every[0]
            with Pod(files, workdir, *options, processes=processes, devices=devices) as pod:
                pod.ended(*[0] * processes)
            counts["starts"] += 1
            run = same(workdir, reference, exact=not moves)
            counts["runs", "moved" if moves else "same bits"] += 1
            counts["steps"] += STEPS
            counts["steps done again"] += sum(len(losses) - 1 for losses in run.losses.values())
            print(
                f"run {number}: complete, as the undisturbed one{'' if moves else ', bit by bit'}",
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
        f" {number} runs finished with the examples and losses of the undisturbed one,"
        f" {counts['runs', 'same bits']} of them bit by bit, {counts['runs', 'moved']} with other"
        f" processes and meshes; {counts['steps']} steps, and {counts['steps done again']} again"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
