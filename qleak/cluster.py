"""A dask cluster as an executor: its scheduler runs again what a lost worker held (extra `cluster`).

Only the client writes rows, each under its key, so that a cell which ran twice is one row.
"""

from __future__ import annotations

import gc
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NamedTuple

from qleak import machine
from qleak.check import Expected, Failed
from qleak.executors import Watched
from qleak.plans import Audit, Captured

PATIENCE = 60.0
"""Seconds without any worker after which a run gives up."""
ANSWER = 10.0
"""Seconds that a scheduler has to answer."""
TRIES = 4
"""How often a cell is handed in. The scheduler starts it again by itself where a worker dies, three times by default
(`distributed.scheduler.allowed-failures`); it also counts workers that died of the cell running beside it."""


class Cluster(Watched):
    """A dask scheduler and its workers, whoever they are at the moment.

    Attributes:
        late: one line for each worker that came later and may compute other last digits.
    """

    def __init__(self, client: Any, address: str, patience: float = PATIENCE) -> None:
        self.client, self.address, self.patience = client, address, patience
        self.inner = client.get_executor(pure=False)
        self.seen = time.monotonic()
        self.known: set[machine.Identity] = set()
        self.late: list[str] = []
        self.tries: Counter[str] = Counter()
        self._slots = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The call as a task of its own, on whichever worker is free."""
        if self.client.status != "running":
            raise self._lost()
        return self.inner.submit(fn, *args, **kwargs)

    def slots(self) -> int:
        """Workers of the last look; each does one job at a time."""
        if self._slots == 0:
            self.check()
        return self._slots

    def check(self) -> None:
        """Looks who is there.

        Raises:
            Failed: the scheduler does not answer, or no worker has been there for `patience` seconds.
        """
        self._slots = len(self._threads())
        now = time.monotonic()
        self.seen = now if self._slots else self.seen
        if now - self.seen > self.patience:
            raise Failed(
                f"Expected a worker at {self.address}, got none for {self.patience:.0f} s: start some with `dask worker "
                f"{self.address} --nthreads 1`. The same command goes on."
            )

    def again(self, key: str, error: BaseException) -> bool:
        """Whether a cell whose workers died is handed in once more: they may have died of others."""
        from distributed.scheduler import KilledWorker

        self.tries[key] += isinstance(error, KilledWorker)
        return isinstance(error, KilledWorker) and self.tries[key] < TRIES

    def explain(self, error: BaseException) -> BaseException:
        """What a user can do about it."""
        from distributed.scheduler import KilledWorker

        if isinstance(error, KilledWorker):
            return Failed(
                f"Expected a worker at {self.address} to survive a cell, got {TRIES} rounds of dead ones, probably out of "
                "memory: give them more (--memory-limit) or use a smaller --chunk. The same command goes on."
            )
        if re.search(r"No module named 'qleak|Can't get attribute|deserializ", str(error)):
            return Failed(f"Expected the same qleak on every worker at {self.address}, got one that says: {error}.")
        if isinstance(error, CancelledError | OSError) and self.client.status != "running":
            return self._lost()
        if isinstance(error, CancelledError):
            return Failed(f"The cells were cancelled at {self.address}. The same command goes on.")
        return error

    def met(self, who: machine.Identity) -> None:
        """Notes a worker that was not there at the start, where its digits may differ."""
        if who not in self.known:
            self.known.add(who)
            self.late += [line for line in [_differs(who, machine.identity(), 1)] if line]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Lets go of the client's tasks; the cluster goes on without it."""
        if self.client.status == "running":
            self.inner.shutdown(wait=wait and not cancel_futures)

    def _threads(self) -> dict[str, int]:
        if self.client.status != "running":
            raise self._lost()
        try:
            return self.client.sync(self.client.scheduler.ncores, callback_timeout=ANSWER)
        except (OSError, RuntimeError):  # dask's and asyncio's timeouts are OSErrors
            raise self._lost() from None

    def _lost(self) -> Failed:
        return Failed(f"Lost the scheduler at {self.address}. Start it again; the same command goes on.")


class Placed(NamedTuple):
    """Where a run goes: the device of its jobs, its workers, how many, and why."""

    device: str
    workers: int | Executor
    number: int
    reasons: list[str]


@contextmanager
def placed(address: str, device: str, workers: int, plan: Any = None) -> Iterator[Placed]:
    """On the cluster at `address`, or, if that is empty, on this machine; see `connect` and `machine.place`."""
    if not address:
        device, count, reasons = machine.place(device, workers)
        yield Placed(device, count, count, reasons)
        return
    if workers:
        raise Expected(
            f"Expected --cluster {address} or --workers {workers}, got both: the cluster has its own workers."
        )
    with connect(address) as team:
        where, reasons = survey(team, device)
        yield Placed(where, team, team.slots(), [*reasons, *needs(plan)])


@contextmanager
def connect(address: str, patience: float = PATIENCE) -> Iterator[Cluster]:
    """A running scheduler as an executor, for `engine.run(plan, store, device, workers=…)`.

    Leaving cancels what waits; the cluster itself goes on.

    Raises:
        Expected: the extra is missing, or this is no address.
        Failed: nobody answers there.
    """
    try:
        from dask import config
        from distributed import Client
    except ImportError:
        raise Expected("Expected dask.distributed for --cluster: pip install 'qleak[cluster]'.") from None
    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what a user can do about it is said in one line
    try:
        with config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
            client: Any = None
            why: Exception = Failed(f"Expected a dask scheduler at {address}, got no answer for {ANSWER:.0f} s.")
            try:
                client = Client(address, timeout=ANSWER, set_as_default=False, name="qleak")
            except OSError:
                pass
            except (ValueError, TypeError) as error:
                why = Expected(f"Expected --cluster tcp://HOST:PORT, got {address!r}: {error}.")
            if client is None:
                gc.collect()  # the half-made client closes itself, which must not happen inside of the next one's lock
                raise why
            team = Cluster(client, address, patience)
            try:
                yield team
            finally:
                team.shutdown(wait=False)
                client.close(timeout=ANSWER)
    finally:
        log.setLevel(level)


def survey(team: Cluster, device: str = "auto") -> tuple[str, list[str]]:
    """The device that "auto" means there, and what there is, with a line for each kind of worker that differs from here.

    Raises:
        Expected: workers without the asked device, or, with "auto", some with a GPU and some without.
        Failed: no worker comes, or one has another qleak.
    """
    while not (threads := team._threads()):
        team.check()
        time.sleep(0.2)
    own = machine.identity()
    try:
        versions = team.client.run(version, "qleak", on_error="return")
        for worker, found in versions.items():
            if found != own.qleak:
                got = f"{found!r}" if isinstance(found, BaseException) else found
                raise Failed(
                    f"Expected qleak {own.qleak} on every worker, got {got} on {worker}: install the same there."
                )
        there: dict[str, Any] = team.client.run(machine.identity, on_error="return")
    except OSError:
        raise team._lost() from None
    for worker, who in there.items():
        if getattr(who, "code", None) != own.code:
            got = getattr(who, "code", repr(who))
            raise Failed(
                f"Expected qleak {own.qleak} with code {own.code} on every worker, got {got} on {worker}: install the "
                "same there and start it again."
            )
    team.known |= set(there.values())
    device = _device(device, there)
    kinds = Counter(there.values())
    said = [f"cluster {team.address} ({len(threads)} worker{'s' * (len(threads) > 1)})", f"device {device}"]
    said += [line for who, count in kinds.items() if (line := _differs(who, own, count))]
    if busy := sum(n > 1 for n in threads.values()):
        said.append(f"warning: {busy} workers have several threads, of which one works: start them with --nthreads 1")
    return device, said


def needs(plan: Any) -> list[str]:
    """What a worker has to have for the plan's cells, beside qleak."""
    parts = getattr(plan, "parts", (plan,))
    named = sorted({p.data for p in parts if not isinstance(p, Audit | Captured) and hasattr(p, "data")})
    return [f"every worker reads data {', '.join(named)} itself ($QLEAK_DATA there)"] if named else []


def _device(device: str, there: dict[str, machine.Identity]) -> str:
    gpus = sum(bool(who.gpu) for who in there.values())
    if device == "auto" and 0 < gpus < len(there):
        raise Expected(
            f"Expected all workers with or all without a GPU for --device auto, got {gpus} of {len(there)} with one: "
            "choose --device cpu, or stop the others."
        )
    if device.startswith("cuda") and gpus < len(there):
        raise Expected(f"Expected a GPU on every worker for --device {device}, got one on {gpus} of {len(there)}.")
    return ("cuda" if gpus else "cpu") if device == "auto" else device


def _differs(who: machine.Identity, own: machine.Identity, count: int) -> str:
    """Where equal bits cannot be promised, and why; "" where they can."""
    pairs = {name: (getattr(who, name), getattr(own, name)) for name in ("torch", "chip", "gpu")}
    other = [
        f"{name} {there or 'none'} there, {here or 'none'} here"
        for name, (there, here) in pairs.items()
        if there != here
    ]
    if not other:
        return ""
    return f"warning: {count} worker{'s' * (count > 1)} ({who.host}) may differ in the last digits: {'; '.join(other)}"
