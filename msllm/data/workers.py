"""Runs one generator function on many items in several processes.

The processes report their progress. If a process dies, an error names the item that it worked on.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from msllm.errors import RunError, UserError

Work = Callable[[Any], Iterator[Any]]


class Event(NamedTuple):
    """A value that the work on an item yielded or, if `done`, returned."""

    item: int  # the item's index
    value: Any
    done: bool


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(work: Work, items: Sequence, processes: int) -> Generator[Event]:
    """Runs the generator function `work` on each item and yields events as they happen.

    With one process or item, everything happens in this process and in order. Otherwise new
    processes receive `work` and the items, and import the modules that define them. A script
    therefore needs the usual `if __name__ == "__main__":`.

    An exception that `work` raises is raised here. It ends all processes, as does closing the
    iterator. Raises RunError if a process dies.
    """
    processes = min(processes, len(items))
    if processes > 1:
        yield from _Pool(work, items, processes).run()
        return
    for index, item in enumerate(items):
        yield from _events(work, index, item)


class _Pool:
    """Processes that each work on one item at a time."""

    def __init__(self, work: Work, items: Sequence, processes: int):
        self._work, self._items, self._processes = work, items, processes
        self._waiting = iter(range(len(items)))
        self._started: list[BaseProcess] = []
        # The connection to each process that has an item, with the item's index.
        self._busy: dict[Connection, tuple[BaseProcess, int]] = {}

    def run(self) -> Iterator[Event]:
        try:
            for _ in range(self._processes):
                self._start()
            while self._busy:
                ready: list[Any] = multiprocessing.connection.wait(list(self._busy))
                for pipe in ready:
                    yield self._receive(pipe)
        finally:
            for process in self._started:
                if self._busy:
                    process.terminate()
                process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        pipe, other_end = context.Pipe()
        process = context.Process(target=_serve, args=(other_end, self._work), daemon=True)
        process.start()
        self._started.append(process)
        other_end.close()
        self._assign(pipe, process)

    def _assign(self, pipe: Connection, process: BaseProcess) -> None:
        """Sends a process its next item, or None if there is none."""
        index = next(self._waiting, None)
        if index is not None:
            self._busy[pipe] = process, index
        try:
            pipe.send(None if index is None else (index, self._items[index]))
        except OSError:  # the process is dead: `_receive` raises the error
            pass

    def _receive(self, pipe: Connection) -> Event:
        process, index = self._busy[pipe]
        try:
            event = pipe.recv()
        except (EOFError, OSError):
            process.join()
            raise RunError(_describe_death(process.exitcode, self._items[index])) from None
        if isinstance(event, BaseException):
            raise event
        if event.done:
            del self._busy[pipe]
            self._assign(pipe, process)
        return event


def _events(work: Work, index: int, item: Any) -> Iterator[Event]:
    steps = work(item)
    while True:
        try:
            value = next(steps)
        except StopIteration as end:
            yield Event(index, end.value, done=True)
            return
        yield Event(index, value, done=False)


def _serve(pipe: Connection, work: Work) -> None:
    """The main function of a process: works on items until it receives None or the pipe closes."""
    # Ctrl-C reaches all processes; the first process ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        while (task := pipe.recv()) is not None:
            for event in _events_or_error(_events(work, *task)):
                pipe.send(event)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _events_or_error(events: Iterator[Event]) -> Iterator[Event | Exception]:
    """Yields events, and an exception as the last item instead of raising it."""
    try:
        yield from events
    except Exception as error:
        yield _make_portable(error)


def _make_portable(error: Exception) -> Exception:
    """Returns an exception that can be sent to another process.

    A note says where it was raised, unless the message is meant for the user.
    """
    if not isinstance(error, (UserError, RunError)):
        error.add_note(f"in a worker process:\n{''.join(traceback.format_tb(error.__traceback__))}")
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # it cannot be pickled: send its text
        return RuntimeError("".join(traceback.format_exception(error)))


def _describe_death(status: int | None, item: Any) -> str:
    how = f"ended with status {status}"
    if status is not None and status < 0:
        how = f"was killed ({signal.Signals(-status).name}"
        if -status == signal.SIGKILL:
            how += "; the system does this when memory runs out: try fewer --processes"
        how += ")"
    return (
        f"the process that worked on {item} {how}; finished work is kept, the same command"
        " continues"
    )
