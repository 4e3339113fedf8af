"""Runs a study: plans it, does its jobs in processes, and collects the results."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from msllm.errors import RunError, UserError
from msllm.runtime.files import write_atomically
from msllm.runtime.progress import Progress, clock_time
from msllm.study import collect, work
from msllm.study.definition import folder_name, load_study
from msllm.study.plan import Plan, Training, code_hash
from msllm.study.results import Results

FORM = "study.json"  # in the folder of a study
POLL_SECONDS = 0.2  # between two looks at running jobs
STOP_SECONDS = 120.0  # how long stopped jobs may take to save their work

log = logging.getLogger("msllm")


def run(
    file: str | os.PathLike,
    out: str | os.PathLike,
    *,
    jobs: int = 1,
    shard: tuple[int, int] = (0, 1),
    small: bool = False,
    only: Sequence[str] = (),
    redo: bool = False,
    remeasure: bool = False,
    collect_only: bool = False,
) -> Results | None:
    """Runs a study, or the part of it that is not done yet.

    Args:
      file: the config file, which defines `get_study()`.
      out: the folder for everything that the study writes.
      jobs: how many jobs run at a time, each in a process; 0: all of them in this process.
      shard: (i, n): only do part i of n, i from 0.
      small: run the small form of the study.
      only: only train and measure these arms, and those from whose models they start.
      redo: delete and repeat finished runs whose settings have changed.
      remeasure: measure again all points of this call.
      collect_only: train and measure nothing. If points are missing, collect the seeds whose points
        are all done.

    Returns:
      The results, or None if points of other shards or arms are missing.

    Raises:
      UserError: the study is invalid, or a finished run has other settings.
      RunError: a job failed. The others are done.
    """
    plan = Plan(load_study(file), pathlib.Path(out).expanduser().absolute(), small)
    points = _points(plan, shard, only)
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out is {out}, which cannot be created ({error}): choose another") from (
            error
        )
    _check_form(plan)
    if collect_only:
        return _collect_done(plan, str(file))
    runner = _Runner(plan, file, jobs)
    runner.run({f"data/{data.id}": needs for data, needs in _data_jobs(plan, points)})
    plan.check_same()
    _check_finished(plan, points, redo, remeasure)
    print(_overview(plan, points, shard))
    runner.run(_jobs(plan, points))
    missing = _missing(plan)
    if missing:
        listed = ", ".join(plan.point_folder(*point).name for point in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        print(
            f"not collected, because points are missing: {listed}{more}; run the other shards and"
            " arms, then the same command again (--collect_only shows the seeds that are done)"
        )
        return None
    _warn_of_other_code(plan)
    return collect.collect(plan, str(file))


def _missing(plan: Plan) -> list[tuple[str, int]]:
    """The points that are not measured."""
    return [
        point
        for point in plan.points()
        if not (plan.point_folder(*point) / work.MEASURED).is_file()
    ]


def _collect_done(plan: Plan, name: str) -> Results:
    """Collects the seeds whose points are all done. Raises UserError if there are none."""
    missing = _missing(plan)
    unfinished = {seed for _, seed in missing}
    seeds = [seed for seed in plan.study.seeds if seed not in unfinished]
    if not seeds:
        listed = ", ".join(plan.point_folder(*point).name for point in missing[:5])
        raise UserError(
            f"{plan.out} has no seed whose points are all measured ({listed}, ... are missing): run"
            " the study without --collect_only first"
        )
    _warn_of_other_code(plan)
    return collect.collect(plan, name, seeds)


def _check_form(plan: Plan) -> None:
    """Keeps the small form of a study out of the folder of its full form, and the reverse."""
    path = plan.out / FORM
    record = work.read_record(path)
    if record is None:
        write_atomically(path, json.dumps({"small": plan.small}))
    elif record["small"] != plan.small:
        there, here = ("small", "full") if record["small"] else ("full", "small")
        raise UserError(
            f"--out is {plan.out}, which holds the {there} form of a study: choose another for the"
            f" {here} form"
        )


def _points(plan: Plan, shard: tuple[int, int], only: Sequence[str]) -> list[tuple[str, int]]:
    """The points of a shard. A shard holds neighbours, so that few shards need a shared run."""
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"--shard is {index}/{count}: must be i/n with i from 0 to n - 1")
    known = {name: name for name in plan.study.arms}
    known |= {folder_name(name): name for name in plan.study.arms}
    for name in only:
        if name not in known:
            listed = ", ".join(map(repr, plan.study.arms))
            raise UserError(f"--only names arm {name!r}: must be one of {listed}")
    arms = {known[name] for name in only} or set(plan.study.arms)
    points = [point for point in plan.points() if point[0] in arms]
    size = len(points)
    return points[index * size // count : (index + 1) * size // count]


def _data_jobs(plan: Plan, points: Sequence[tuple[str, int]]) -> Iterator:
    """(data, names of the jobs before it) of all data that the points need.

    If the steps of points follow from a budget, or if facts are compared, this is all data.
    """
    study = plan.study
    seen: set[str] = set()
    needs_all = study.same or (study.equal != "steps" and study.budget is None)
    wanted = list(points)
    if needs_all:
        wanted += [point for point in plan.points() if point not in points]
    for point in wanted:
        for data in plan.needed_data(*point):
            if not data.is_ready and data.id not in seen:
                seen.add(data.id)
                before = data.tokenizer
                yield data, [f"data/{before.id}"] if before and before.id in seen else []


def _jobs(plan: Plan, points: Sequence[tuple[str, int]]) -> dict[str, list[str]]:
    """{name of a job: names of the jobs before it} for everything that is not done."""
    found: dict[str, list[str]] = {}

    def add_run(training: Training) -> list[str]:
        """Adds the job that trains a run. Returns its name, or nothing if it is done."""
        if work.trained(plan, training) is not None:
            return []
        if not training.arm:
            found.setdefault(f"shared/{training.seed}", [])
            return [f"shared/{training.seed}"]
        return add_point(training.arm, training.seed)

    def add_point(arm: str, seed: int) -> list[str]:
        name = f"points/{plan.point_folder(arm, seed).name}"
        if name not in found:
            training = plan.training(arm, seed)
            before = plan.chain(training)[0].before if plan.study.arm(arm).train else training
            needed = add_run(before) if before is not None else []
            found[name] = needed
        return [name]

    for arm, seed in points:
        if work.measured(plan, arm, seed) is None:
            add_point(arm, seed)
    return found


def _check_finished(
    plan: Plan, points: Sequence[tuple[str, int]], redo: bool, remeasure: bool
) -> None:
    """Deletes what `redo` and `remeasure` ask for, or raises UserError for what has changed."""
    for arm, seed in points:
        training: Training | None = plan.training(arm, seed)
        folder = plan.point_folder(arm, seed)
        while training is not None:
            if redo and work.changes(plan, training):
                print(f"deleted {training.folder}, which was trained with other settings")
                shutil.rmtree(training.folder)
            training = training.before
        if remeasure or (redo and not _is_current(plan, arm, seed)):
            (folder / work.MEASURED).unlink(missing_ok=True)
        work.measured(plan, arm, seed)


def _is_current(plan: Plan, arm: str, seed: int) -> bool:
    try:
        return work.measured(plan, arm, seed) is not None
    except UserError:
        return False


def _warn_of_other_code(plan: Plan) -> None:
    now, missing = code_hash(plan.study.measure), _missing(plan)
    stale = [
        plan.point_folder(*point).name
        for point in plan.points()
        if point not in missing and (work.measured(plan, *point) or {}).get("code") != now
    ]
    if stale:
        log.warning(
            "%d of %d points were measured before the code of study.measure changed (%s, ...): give"
            " --remeasure to measure again",
            len(stale),
            len(plan.points()),
            stale[0],
        )


def _overview(plan: Plan, points: Sequence[tuple[str, int]], shard: tuple[int, int]) -> str:
    jobs = _jobs(plan, points)
    part = "" if shard[1] == 1 else f" (shard {shard[0]} of {shard[1]})"
    done = sum(work.measured(plan, *point) is not None for point in points)
    steps = sum(
        run.config.steps
        for name in jobs
        if name.startswith("points/")
        for point in points
        if name == f"points/{plan.point_folder(*point).name}" and plan.study.arm(point[0]).train
        for run in plan.chain(plan.training(*point))
    )
    form = "small form of the study" if plan.small else "study"
    return (
        f"{form}: {len(plan.study.arms)} arms x {len(plan.study.seeds)} seeds; {len(points)}"
        f" points{part}, {done} done; {len(jobs)} jobs to do, {steps:,} steps without shared runs"
    )


class _Runner:
    """Does jobs in processes, at most `count` at a time, or in this process if `count` is 0."""

    def __init__(self, plan: Plan, file: str | os.PathLike, count: int):
        self._plan, self._file, self._count = plan, str(file), count

    def run(self, jobs: Mapping[str, Sequence[str]]) -> None:
        """Does all jobs.

        Args:
          jobs: {name: names of the jobs that must be done before it}.

        Raises:
          UserError or RunError: a job failed. All jobs that do not need it are done.
        """
        if not jobs:
            return
        if not self._count:
            for name in _in_order(jobs):
                work.do(self._plan, name)
            return
        waiting = {name: set(before) & jobs.keys() for name, before in jobs.items()}
        running: dict[str, subprocess.Popen] = {}
        failed: dict[str, int] = {}
        began = {}
        done = 0
        with Progress("job", len(jobs), every=60) as progress, _raise_on_sigterm():
            try:
                while waiting or running:
                    ready = [name for name, before in waiting.items() if not before]
                    for name in ready[: self._count - len(running)]:
                        del waiting[name]
                        running[name], began[name] = self._start(name), time.monotonic()
                        progress.say(f"started {name}")
                    for name, process in list(running.items()):
                        status = process.poll()
                        if status is None:
                            continue
                        del running[name]
                        if status:
                            failed[name] = status
                            progress.say(f"failed {name}: {self._log(name)}")
                            _drop(waiting, name)
                            continue
                        done += 1
                        for before in waiting.values():
                            before.discard(name)
                        taken = clock_time(time.monotonic() - began[name])
                        progress.say(f"done {name} in {taken} ({done} of {len(jobs)})")
                    progress.show(done, f"{len(running)} running")
                    if running:
                        time.sleep(POLL_SECONDS)
            except BaseException:
                _stop(running.values())
                raise
        if failed:
            self._report(failed, len(jobs) - done)

    def _start(self, name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "msllm", "study", self._file, f"--out={self._plan.out}"]
        command += [f"--job={name}", *(["--small"] if self._plan.small else [])]
        path = self._log(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as output:
            # In a session of its own: Ctrl-C in the terminal reaches this process only, which then
            # stops the jobs.
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _log(self, name: str) -> pathlib.Path:
        return self._plan.out / "logs" / f"{name.replace('/', '-')}.log"

    def _report(self, failed: Mapping[str, int], left: int) -> None:
        name, status = next(iter(failed.items()))
        lines = self._log(name).read_text(errors="replace").strip().splitlines()
        text = lines[-1].removeprefix("error: ") if lines else f"exit status {status}"
        message = f"{name} failed: {text} ({self._log(name)})"
        if left > 1:
            message += f"; {left} of the study's jobs are not done"
        raise (UserError if status == 2 else RunError)(message)


def _in_order(jobs: Mapping[str, Sequence[str]]) -> list[str]:
    order: list[str] = []

    def add(name: str) -> None:
        for before in jobs[name]:
            if before in jobs:
                add(before)
        if name not in order:
            order.append(name)

    for name in jobs:
        add(name)
    return order


def _drop(waiting: dict[str, set[str]], failed: str) -> None:
    """Removes the jobs that need a failed one."""
    for name in [name for name, before in waiting.items() if failed in before]:
        del waiting[name]
        _drop(waiting, name)


def _stop(processes: Iterable[subprocess.Popen]) -> None:
    """Asks jobs to save their work and end, and waits for them."""
    running = list(processes)
    for process in running:
        process.terminate()
    end = time.monotonic() + STOP_SECONDS
    for process in running:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


class _raise_on_sigterm:
    """Inside this context, SIGTERM raises `Stopped` in the main thread."""

    def __enter__(self) -> None:
        def stop(number: int, frame: object) -> None:
            raise work.Stopped("stopped by SIGTERM: run the same command again to continue")

        self._previous: Callable | int | None = None
        try:
            self._previous = signal.signal(signal.SIGTERM, stop)
        except ValueError:  # not in the main thread
            pass

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
