"""One function on many items, in several processes that tell how far they are. One that dies is named, not waited for."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from msllm.errors import RunError, UserError


class Event(NamedTuple):
    """What the work on an item yielded, or (`done`) returned."""

    item: int  # its index
    value: Any
    done: bool


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(work: Callable[[Any], Iterator], items: Sequence, processes: int) -> Iterator[Event]:
    """Runs the generator function `work` on each item; events come as they happen.

    One process (or item): in this one, in order. More: in new ones, to which `work` and the items are sent; their
    modules are imported anew, so a script that gets here needs the usual `if __name__ == "__main__":`. What `work`
    raises is raised here, and ends them all; so does leaving the iterator. Raises RunError if a process dies.
    """
    processes = min(processes, len(items))
    if processes <= 1:
        for index, item in enumerate(items):
            yield from _events(work, index, item)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    started, busy = [], {}  # busy: {pipe: (process, index of its item)}
    waiting = iter(range(len(items)))

    def give(pipe, process) -> None:
        index = next(waiting, None)
        if index is not None:
            busy[pipe] = process, index
        try:
            pipe.send(None if index is None else (index, items[index]))
        except OSError:  # it is dead: reading from it tells so
            pass

    try:
        for _ in range(processes):
            pipe, other_end = context.Pipe()
            process = context.Process(target=_serve, args=(other_end, work), daemon=True)
            process.start()
            started.append(process)
            other_end.close()
            give(pipe, process)
        while busy:
            for pipe in multiprocessing.connection.wait(list(busy)):
                process, index = busy[pipe]
                try:
                    event = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    raise RunError(_epitaph(process.exitcode, items[index])) from None
                if isinstance(event, BaseException):
                    raise event
                if event.done:
                    del busy[pipe]
                    give(pipe, process)
                yield event
    finally:
        for process in started:
            if busy:
                process.terminate()
            process.join()


def _events(work: Callable[[Any], Iterator], index: int, item: Any) -> Iterator[Event]:
    steps = work(item)
    while True:
        try:
            value = next(steps)
        except StopIteration as end:
            yield Event(index, end.value, True)
            return
        yield Event(index, value, False)


def _serve(pipe, work: Callable[[Any], Iterator]) -> None:
    """A process: works on the items that come until None comes or nobody listens any more."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches all processes: the first one ends the others
    try:
        while (task := pipe.recv()) is not None:
            for event in _safe(_events(work, *task)):
                pipe.send(event)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _safe(events: Iterator[Event]) -> Iterator[Event | Exception]:
    """Events; in place of an error that is raised, the error."""
    try:
        yield from events
    except Exception as error:
        yield _portable(error)


def _portable(error: Exception) -> Exception:
    """An error that another process can read, with where it was raised unless that is the user's business."""
    if not isinstance(error, (UserError, RunError)):
        error.add_note(f"in a worker process:\n{''.join(traceback.format_tb(error.__traceback__))}")
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))


def _epitaph(status: int | None, item: Any) -> str:
    how = f"ended with status {status}"
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        why = (
            "; the system does that where memory runs out: try fewer --processes"
            if name == "SIGKILL"
            else ""
        )
        how = f"was killed ({name}{why})"
    return f"the process that worked on {item} {how}; what is finished is kept, the same command continues"
