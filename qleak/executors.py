"""Jobs over any `concurrent.futures.Executor`: threads, processes, MPI ranks, a cluster's workers.

Such an executor has no way back for progress, so that a worker does a *stint*: it runs a job to its end, or to the first
checkpoint after a while, and hands in what it has. Whoever dies in between has lost one stint, not a training.
"""

from __future__ import annotations

import functools
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from typing import Any, NamedTuple

from qleak import machine
from qleak.check import Failed

SECONDS = 60.0
"""Seconds after which a stint ends with the next checkpoint: what a dead worker may cost."""
BYTES = 2**26
"""Bytes of checkpoints after which it does, too: what a worker holds of them at most."""
# Intra-op threads and the levels of forward derivatives belong to the process: one job at a time.
_ONE = threading.Lock()


class Ask(NamedTuple):
    """What a worker is sent, pickled: bytes cross every border as they are."""

    code: str
    runner: Callable[[Any], Iterator[Any]]
    job: Any
    seconds: float


class Handed(NamedTuple):
    """What comes back: the events that have a `key` (results; the others are signs of life), and whether that was all."""

    events: list[Any]
    over: bool
    who: machine.Identity


def stint(blob: bytes) -> bytes:
    """Runs on the worker: an `Ask` to a `Handed`, both pickled.

    Raises:
        Failed: this worker has another qleak, or lacks the device.
    """
    ask: Ask = pickle.loads(blob)
    who = machine.identity()
    if ask.code != who.code:
        raise Failed(
            f"Expected workers with the code of this qleak ({ask.code}), got {who.code} of version {who.qleak} on "
            f"{who.host}: install the same qleak there and start the worker again."
        )
    if str(getattr(ask.job, "device", "cpu")).startswith("cuda") and not who.gpu:
        raise Failed(f"Expected a GPU on every worker, got none on {who.host}: stop that worker, or use --device cpu.")
    with _ONE:
        _settle()
        events: list[Any] = []
        began, held, over = time.monotonic(), 0, True
        for event in ask.runner(ask.job):
            if not hasattr(event, "key"):
                continue
            events.append(event)
            saved = getattr(event, "saved", b"")
            if saved and saved != ask.job.saved:  # a training that is over says its last checkpoint again
                held += len(saved)
                if held > BYTES or time.monotonic() - began > ask.seconds:
                    over = False  # if it ended just here, it comes back once more with nothing left to do
                    break
        return pickle.dumps(Handed(events, over, who), protocol=5)


@functools.cache
def _settle() -> None:
    from qleak.pool import keep_heap

    keep_heap()


class Watched(Executor):
    """An executor that knows more about its workers than the standard asks for."""

    def slots(self) -> int:
        """Jobs that run at the same time; may change."""
        raise NotImplementedError

    def check(self) -> None:
        """Called every second or so while nothing comes.

        Raises:
            Failed: nothing will come any more.
        """

    def again(self, key: str, error: BaseException) -> bool:
        """Whether a job is worth another try after its worker failed it."""
        return False

    def explain(self, error: BaseException) -> BaseException:
        """An error of the executor's own as one line; others as they are."""
        if isinstance(error, BrokenExecutor):
            return Failed("A worker of the executor died, probably out of memory. The same command goes on.")
        if isinstance(error, CancelledError):
            return Failed("The executor cancelled its jobs. The same command goes on.")
        return error

    def met(self, who: machine.Identity) -> None:
        """Called with the worker of every result."""


class _Plain(Watched):
    """What is assumed of an executor that is no `Watched`."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self.inner.submit(fn, *args, **kwargs)

    def slots(self) -> int:
        return getattr(self.inner, "_max_workers", None) or machine.cpus()


def results(
    todo: Iterable[Any], runner: Callable[[Any], Iterator[Any]], executor: Executor, seconds: float | None = None
) -> Iterator[tuple[str, Any]]:
    """(key of the job, result) of every job, as they come; the executor is the caller's and stays open.

    Two jobs a slot are under way at most, so that not all of them lie in memory. Stopping the iteration cancels what
    waits; what runs on a worker runs to the end of its stint, and nobody reads it.

    Args:
        todo: jobs with a `key`; those whose results have `saved` have a field `saved` as well, to go on from there.
        runner: a module-level function.
        executor: any.
        seconds: the length of a stint, `SECONDS` by default.

    Raises:
        Failed: the executor broke, was shut down, or cannot reach its workers.
    """
    team = executor if isinstance(executor, Watched) else _Plain(executor)
    jobs, waiting = iter(todo), dict[Future[bytes], Any]()
    seconds = SECONDS if seconds is None else seconds

    def send(job: Any) -> None:
        blob = pickle.dumps(Ask(machine.identity().code, runner, job, seconds), protocol=5)
        try:
            waiting[team.submit(stint, blob)] = job
        except BrokenExecutor as error:
            raise team.explain(error) from None
        except RuntimeError as error:  # "cannot schedule new futures after shutdown"
            raise Failed(f"Expected an executor that takes jobs: {error}. The same command goes on.") from None

    def refill() -> None:
        while len(waiting) < max(2 * team.slots(), 2) and (job := next(jobs, None)) is not None:
            send(job)

    try:
        refill()
        while waiting:
            finished, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            if not finished:
                team.check()
            for future in finished:
                job = waiting.pop(future)
                try:
                    handed: Handed = pickle.loads(future.result())
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt) or not team.again(job.key, error):
                        raise team.explain(error) from None
                    send(job)
                    continue
                team.met(handed.who)
                if not handed.over:
                    send(job._replace(saved=handed.events[-1].saved))
                refill()
                yield from ((job.key, event) for event in handed.events)
            refill()
    finally:
        for future in waiting:
            future.cancel()
