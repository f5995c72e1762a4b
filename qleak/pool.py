"""Jobs over worker processes: one intra-op thread each, results in whatever order they come."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from qleak import jobs
from qleak.attacks.drive import Progress
from qleak.check import Failed
from qleak.jobs import Done, Job

_progress: Any = None


def _start(channel: Any, parent: int) -> None:
    """In a new worker: where progress goes, who handles Ctrl-C, and what to do when the parent is gone."""
    global _progress
    _progress = channel
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides

    def watch() -> None:
        while True:
            time.sleep(2)
            try:
                os.kill(parent, 0)
            except OSError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Job) -> Done:
    for event in jobs.events(job):
        if isinstance(event, Done):
            return event
        _progress.put((job.chunk.key, event))
    raise AssertionError("a job ends with its result")


def results(todo: list[Job], workers: int) -> Iterator[tuple[str, Progress | Done]]:
    """(chunk key, progress or result) of every job. Stopping the iteration stops the workers.

    Raises:
        Failed: a worker died (for example by the kernel, out of memory).
    """
    method = "forkserver" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["qleak.jobs"])  # torch is imported once, not per worker
    channel = context.Queue()
    executor = ProcessPoolExecutor(workers, context, _start, (channel, os.getpid()))
    try:
        waiting: set[Future[Done]] = {executor.submit(_work, job) for job in todo}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
            yield from _drain(channel)
            for future in finished:
                done = future.result()
                yield done.key, done
    except BrokenProcessPool:
        raise Failed("A worker process died, probably out of memory. Run the same command with --workers 1.") from None
    finally:
        for process in list((executor._processes or {}).values()):
            process.terminate()
        executor.shutdown(wait=True, cancel_futures=True)
        channel.close()
        channel.cancel_join_thread()


def _drain(channel: Any) -> Iterator[tuple[str, Progress]]:
    while True:
        try:
            yield channel.get_nowait()
        except queue.Empty:
            return
