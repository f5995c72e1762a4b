"""Jobs over worker processes, or any executor: one intra-op thread each, results in whatever order they come."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

from qleak import executors
from qleak.check import Failed

Runner = Callable[[Any], Iterator[Any]]
"""`runner(job)` yields progress and, last, the job's result; a module-level function, so that it can be sent."""

Workers = int | Executor
"""Where jobs run: 1 for this process, so many processes, or an executor, which has no way back for progress."""

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h

GRACE = 5.0  # seconds in which the executor itself should see that a worker is dead

_progress: Any = None  # in a worker: the pipe to the parent, and its lock


def keep_heap() -> None:
    """Lets the C library keep freed memory for the next step, where it is glibc's; elsewhere nothing.

    It would give blocks of a few hundred kilobytes back to the kernel, which clears every page again when the
    next step asks for it: of a small net's step that is a fifth.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((M_MMAP_THRESHOLD, 2**26), (M_TRIM_THRESHOLD, 2**29), (M_TOP_PAD, 2**26)):
            mallopt(option, value)


def _start(pipe: Connection, lock: Any, parent: int) -> None:
    """In a new worker: where progress goes, who handles Ctrl-C, and what to do when the parent is gone."""
    global _progress
    _progress = pipe, lock
    keep_heap()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides

    def watch() -> None:
        while True:
            time.sleep(2)
            try:
                os.kill(parent, 0)
            except OSError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(runner: Runner, job: Any) -> Any:
    events = runner(job)
    last = next(events)
    pipe, lock = _progress
    for event in events:
        with lock:
            pipe.send((job.key, last))
        last = event
    return last


def at_most(workers: Workers, jobs: int) -> Workers:
    """No more processes than jobs; an executor stays as it is."""
    return min(workers, jobs) if isinstance(workers, int) else workers


def results(todo: Iterable[Any], runner: Runner, workers: Workers) -> Iterator[tuple[str, Any]]:
    """(key of the job, progress or result) of every job, in this process or over workers.

    Stopping the iteration stops the workers. Jobs have a `key`; an iterator of jobs is asked for the next one
    when a worker is about to need it, so that not all of them lie in memory.

    Raises:
        Failed: a worker died (for example by the kernel, out of memory).
    """
    if not isinstance(workers, int):
        yield from executors.results(todo, runner, workers)
        return
    if workers <= 1:
        keep_heap()
        yield from ((job.key, event) for job in todo for event in runner(job))
        return
    method = "forkserver" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["qleak.jobs"])  # torch is imported once, not per worker
    # A worker may be killed amid a message: only a thread of its own may wait for the rest, which never comes.
    reader, writer = context.Pipe(duplex=False)
    told: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    listener = threading.Thread(target=_listen, args=(reader, told), daemon=True)
    listener.start()
    executor = ProcessPoolExecutor(workers, context, _start, (writer, context.Lock(), os.getpid()))
    answers: Any = executor._result_queue
    try:
        jobs = iter(todo)
        waiting: dict[Future[Any], str] = {}
        dead = 0.0

        def refill() -> None:
            for job in itertools.islice(jobs, workers + 1 - len(waiting)):
                waiting[executor.submit(_work, runner, job)] = job.key

        refill()
        while waiting:
            finished, _ = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
            while not told.empty():
                yield told.get()
            for future in finished:
                key = waiting.pop(future)
                refill()
                yield key, future.result()
            # The executor waits for the rest of a result, too, where its worker was killed amid it.
            dead = (dead or time.monotonic()) if _died(executor) else 0.0
            if dead and time.monotonic() - dead > GRACE:
                raise BrokenProcessPool
    except BrokenProcessPool:
        raise Failed("A worker process died, probably out of memory. Run the same command with --workers 1.") from None
    finally:
        for process in list((executor._processes or {}).values()):
            process.terminate()
        answers._writer.close()  # with the workers gone, whoever reads half a message meets its end
        executor.shutdown(wait=True, cancel_futures=True)
        writer.close()
        listener.join(GRACE)
        reader.close()


def _listen(reader: Connection, told: queue.SimpleQueue[tuple[str, Any]]) -> None:
    """Hands messages on until all writers are gone."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            told.put(reader.recv())


def _died(executor: ProcessPoolExecutor) -> bool:
    """Whether a worker has ended; they do so by themselves only when they are told to."""
    return bool(connection.wait([p.sentinel for p in list((executor._processes or {}).values())], 0))
