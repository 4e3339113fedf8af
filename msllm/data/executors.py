"""Runs the work of `msllm prepare` on an executor of `concurrent.futures`.

By default the executor starts processes on this machine. `cluster` gives the executor of a Dask
cluster. Any other executor works if its workers read and write the same files as this process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from msllm.errors import RunError, UserError
from msllm.runtime.files import write_atomically

POLL_SECONDS = 1.0  # between two looks at the progress of the workers
CONNECT_SECONDS = 30  # how long to wait for the scheduler of a cluster
CLUSTERS = ("slurm", "kube")  # the values of --cluster that start a cluster
_CONTINUE = "finished work is kept, the same command continues"


class Status(NamedTuple):
    """The progress of the work on an item."""

    examples: int = 0
    tokens: int = 0
    bad: Sequence[str] = ()  # the messages of the first bad records


# Yields its status from time to time and returns the result for an item.
Work = Callable[[Any], Generator[Status, None, Any]]


class Event(NamedTuple):
    """The status of the work on an item or, if `done`, its result."""

    item: int  # the item's index
    value: Any
    done: bool = False
    cpu_seconds: float = 0.0  # if `done`: the CPU time of the work


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Runs work on an executor, or in this process.

    Args:
      executor: where to run; None: in this process.
      local: run a single item in this process, because that is as fast.
    """

    def __init__(self, executor: Executor | None = None, local: bool = True):
        self._executor, self._local = executor, local

    def run(self, work: Work, items: Sequence, folder: pathlib.Path) -> Generator[Event]:
        """Runs `work` on each item and yields events as they happen.

        Without an executor, everything happens in this process and in order. An exception that
        `work` raises is raised here. It cancels the work that has not begun, as does closing the
        iterator.

        Args:
          work: the function. It and the items are pickled for the workers.
          items: str(item) names an item in messages.
          folder: an existing folder that workers share with this process. They write their status
            there.

        Raises RunError if the workers or the cluster are lost.
        """
        if self._executor is None or (self._local and len(items) < 2):
            for index, item in enumerate(items):
                yield from _events(work, index, item)
            return
        status = pathlib.Path(tempfile.mkdtemp(prefix="status-", dir=folder))
        futures: dict[Future, int] = {}
        try:
            yield from self._run(work, items, status, futures)
        finally:
            for future in futures:
                future.cancel()
            shutil.rmtree(status, ignore_errors=True)

    def _run(
        self, work: Work, items: Sequence, status: pathlib.Path, futures: dict[Future, int]
    ) -> Iterator[Event]:
        assert self._executor is not None
        finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
        host = socket.gethostname()
        try:
            for index, item in enumerate(items):
                arguments = (work, item, str(status / f"{index}.json"), host)
                future = self._executor.submit(_work, *arguments)
                futures[future] = index
                future.add_done_callback(finished.put)
        except Exception as error:
            raise _lost(error, []) from error
        seconds = POLL_SECONDS
        while futures:
            try:
                future = finished.get(timeout=seconds)
            except queue.Empty:
                start = time.monotonic()
                yield from _read_status(status)
                # Reading takes at most a twentieth of the time.
                seconds = max(POLL_SECONDS, 20 * (time.monotonic() - start))
                continue
            index = futures.pop(future)
            try:
                value, cpu_seconds = future.result()
            except (Exception, CancelledError) as error:
                if isinstance(error, CancelledError | concurrent.futures.BrokenExecutor):
                    begun = [items[event.item] for event in _read_status(status)]
                    raise _lost(error, begun) from error
                if type(error).__module__.partition(".")[0] == "distributed":
                    raise _lost(error, [items[index]]) from error
                raise
            yield Event(index, value, True, cpu_seconds)


@contextlib.contextmanager
def open_pool(processes: int = 1, executor: Executor | None = None) -> Iterator[Pool]:
    """Yields a pool: on `executor` if it is given, otherwise with `processes` on this machine."""
    if executor is not None:
        yield Pool(executor, local=False)
    elif processes == 1:
        yield Pool()
    else:
        with local_processes(processes) as own:
            yield Pool(own)


@contextlib.contextmanager
def local_processes(count: int) -> Iterator[Executor]:
    """Yields an executor that starts up to `count` processes when they are first needed.

    An exception inside the `with` block ends the processes at once, even while they work. They also
    end if this process is killed. Each process imports the main module, so a script needs the usual
    `if __name__ == "__main__":`.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    reader, writer = context.Pipe(duplex=False)
    executor = concurrent.futures.ProcessPoolExecutor(
        count, context, initializer=_begin_process, initargs=(reader,)
    )
    try:
        yield executor
    except BaseException:
        writer.close()  # ends the processes
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        writer.close()
        reader.close()


def _begin_process(parent: Connection) -> None:
    """Makes a process end when the other end of a pipe is closed. Only its parent holds that end.

    Processes of `concurrent.futures` would otherwise outlive a parent that is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent decides

    def watch() -> None:
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def cluster(name: str, processes: int = 0) -> Iterator[Executor]:
    """Yields the executor of a Dask cluster, and prints the address of its dashboard.

    Args:
      name: the address of a running scheduler (`tcp://HOST:PORT`), or the path of its scheduler
        file (`*.json`); or `slurm` or `kube`, to start workers there for the time of the `with`
        block. Dask's own configuration describes them (docs/large_corpora.md).
      processes: the number of worker processes to start; 0 with the address of a scheduler.

    Raises UserError if a package is missing, the arguments do not fit, or no scheduler answers.
    """
    if (name in CLUSTERS) != (processes > 0):
        raise UserError(
            f"--processes is {processes}: with --cluster={name}, "
            + (
                "give the number of worker processes to start"
                if name in CLUSTERS
                else "leave it out, because the workers of a running cluster are already started"
            )
        )
    distributed = _import("distributed", name, "cluster")
    logging.getLogger("distributed").setLevel(logging.WARNING)
    for module in ("client", "utils"):  # `prepare` reports a lost cluster in one line
        logging.getLogger(f"distributed.{module}").setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        try:
            started = {"slurm": _start_slurm, "kube": _start_kube}.get(name)
            if started is not None:
                address = stack.enter_context(started(processes))
            else:
                address = _reachable_address(name)
            client = stack.enter_context(distributed.Client(address, timeout=CONNECT_SECONDS))
        except (OSError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"--cluster is {name!r}: cannot be used ({type(error).__name__}: {error}); start a"
                " Dask scheduler and give its address, or correct Dask's configuration"
            ) from error
        print(f"dashboard: {client.dashboard_link}", file=sys.stderr, flush=True)
        _describe_workers(client)
        # Without pure=False, equal tasks of two runs would be one task.
        yield client.get_executor(pure=False)


def _reachable_address(name: str) -> str:
    """Returns the address of a scheduler that answers, from its address or scheduler file.

    Dask itself may try for ever. Raises OSError or ValueError.
    """
    address = name
    if name.endswith(".json"):
        address = json.loads(pathlib.Path(name).read_text())["address"]
    parts = urllib.parse.urlsplit(address if "://" in address else f"tcp://{address}")
    if not parts.hostname or not parts.port:
        raise ValueError("an address is tcp://HOST:PORT")
    socket.create_connection((parts.hostname, parts.port), CONNECT_SECONDS).close()
    return address


def _start_slurm(processes: int) -> Any:
    """Starts Slurm jobs with worker processes of one thread each, by dask-jobqueue."""
    jobqueue = _import("dask_jobqueue", "slurm", "slurm")
    dask = importlib.import_module("dask")
    cores = dask.config.get("jobqueue.slurm.cores", None)
    memory = dask.config.get("jobqueue.slurm.memory", None)
    if not cores or not memory:
        raise UserError(
            f"jobqueue.slurm.cores is {cores} and jobqueue.slurm.memory is {memory} in Dask's"
            " configuration: set the cores and memory of one job in ~/.config/dask/jobqueue.yaml,"
            " or with DASK_JOBQUEUE__SLURM__CORES=16 and DASK_JOBQUEUE__SLURM__MEMORY=32GB"
        )
    started = jobqueue.SLURMCluster(processes=cores)
    started.scale(n=processes)
    return started


def _start_kube(processes: int) -> Any:
    """Starts or joins a cluster of the Dask Kubernetes operator."""
    operator = _import("dask_kubernetes.operator", "kube", "kube")
    started = operator.KubeCluster(
        n_workers=processes, worker_command=["dask", "worker", "--nthreads", "1"]
    )
    started.scale(processes)
    return started


def _import(module: str, name: str, extra: str) -> Any:
    handler = signal.getsignal(signal.SIGINT)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--cluster is {name!r}, which needs packages that are not installed ({error}): pip"
            f' install "msllm[{extra}]"'
        ) from error
    finally:
        # dask_jobqueue makes Ctrl-C exit the whole process, which matters to notebooks.
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)


def _describe_workers(client: Any) -> None:
    """Says if there is no worker yet, and warns of workers with several threads."""
    threads = client.nthreads().values()
    if not threads:
        print(
            "the cluster has no worker yet: waiting for the first one", file=sys.stderr, flush=True
        )
    if any(count > 1 for count in threads):
        print(
            f"warning: workers of this cluster have up to {max(threads)} threads, of which one"
            " works at a time: start them with `dask worker --nworkers=auto --nthreads=1`",
            file=sys.stderr,
        )


def _events(work: Work, index: int, item: Any) -> Iterator[Event]:
    steps, start = work(item), time.process_time()
    while True:
        try:
            value = next(steps)
        except StopIteration as end:
            yield Event(index, end.value, True, time.process_time() - start)
            return
        yield Event(index, value)


def _work(work: Work, item: Any, status: str, host: str) -> tuple[Any, float]:
    """Runs in a worker: does the work on an item, and keeps its status in a file.

    Returns the result and the CPU time.
    """
    try:
        _write_status(status, Status())
        for event in _events(work, 0, item):
            if event.done:
                pathlib.Path(status).unlink(missing_ok=True)
                return event.value, event.cpu_seconds
            _write_status(status, event.value)
        raise AssertionError("the last event is done")
    except Exception as error:
        pathlib.Path(status).unlink(missing_ok=True)
        raise _make_portable(error, host) from None


def _write_status(path: str, status: Status) -> None:
    with contextlib.suppress(OSError):  # the folder is gone if the run has ended
        write_atomically(path, json.dumps(status))


def _read_status(folder: pathlib.Path) -> Iterator[Event]:
    """Yields the status of every item on which a worker works."""
    for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem)):
        with contextlib.suppress(OSError, ValueError):  # it has just been finished
            yield Event(int(path.stem), Status(*json.loads(path.read_text())))


def _make_portable(error: Exception, host: str) -> Exception:
    """Returns an exception that can be sent to the process on `host` that started the work.

    Messages for the user name the worker's host if it is another one. A note on other exceptions
    says where they were raised.
    """
    here = socket.gethostname()
    if not isinstance(error, UserError | RunError):
        text = "".join(traceback.format_tb(error.__traceback__))
        error.add_note(f"in a worker process on {here}:\n{text}")
    elif here != host:
        error = type(error)(f"on {here}: {error}")
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # it cannot be pickled: send its text
        return RuntimeError("".join(traceback.format_exception(error)))


def _lost(error: BaseException, begun: Sequence) -> RunError:
    """Returns the error for workers or a cluster that are lost while they worked on `begun`."""
    names = "; ".join(map(str, begun[:4])) + ("; and others" if len(begun) > 4 else "")
    where = f" while it worked on {names}" if begun else ""
    if isinstance(error, concurrent.futures.BrokenExecutor):
        return RunError(
            f"a worker process was killed{where} (the system does this when memory runs out: try"
            f" fewer --processes); {_CONTINUE}"
        )
    if type(error).__name__ == "KilledWorker":  # of Dask, which has tried several workers
        return RunError(
            f"several workers were lost{where} (this happens when memory runs out: give the workers"
            f" more); {_CONTINUE}"
        )
    reason = f": {error}" if str(error) else ""
    return RunError(f"the cluster was lost{where} ({type(error).__name__}{reason}); {_CONTINUE}")
