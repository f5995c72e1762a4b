"""A study: its parts one after another, each in a run folder of its own below the study's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qleak import store as stores
from qleak.engine import audit, training
from qleak.engine.events import Event, Finished, Step
from qleak.looks import NONE, Looks
from qleak.plans import Audit, Study, Training
from qleak.pool import Workers
from qleak.store import Run, now

ENGINES: dict[type, Any] = {Audit: audit, Training: training}
SHARED = ("versions", "git", "cpu", "cores", "system", "device", "workers", "choices")


def run(plan: Study, store: Run, device: str = "cpu", workers: Workers = 1, look: Looks = NONE) -> Iterator[Event]:
    """Runs every part that is not done; the study has no rows of its own.

    The joined table is written into its summary by whoever reads the parts (see `report.frontier`).
    """
    parts = [{"name": n, "folder": n, "kind": p.kind} for n, p in zip(plan.names, plan.parts, strict=True)]
    store.update(status="running", started=store.header.get("started") or now(), parts=parts)
    for name, part in zip(plan.names, plan.parts, strict=True):
        shared = {k: store.header[k] for k in SHARED if k in store.header}
        with stores.open_run(store.folder / name, part.header() | shared, fresh=not store.resumed) as inner:
            if inner.header.get("status") == "done":
                continue
            for event in ENGINES[type(part)].run(part, inner, device, workers, look):
                if isinstance(event, Step):
                    yield event._replace(key=f"{name}/{event.key}", label=f"{name} · {event.label}", done=weight(event))
    store.update(status="done", finished=now())
    yield Finished([])


def weight(event: Step) -> int:
    """Thousandths of a job: closures and epochs cannot be added up."""
    return round(1000 * event.done / max(event.total, 1))


def size(plan: Study) -> tuple[str, int]:
    """Thousandths of all jobs."""
    jobs = sum(len(p.chunks()) if isinstance(p, Audit) else len(p.members()) for p in plan.parts)
    return "jobs/1000", 1000 * jobs


def choices(plan: Study) -> list[str]:
    """Every automatic choice of the parts' engines."""
    return list(dict.fromkeys(c for part in plan.parts for c in ENGINES[type(part)].choices(part)))


def estimate(plan: Study, device: str = "cpu") -> dict[str, float]:
    """CPU seconds of all parts, bytes of the largest job."""
    each = [ENGINES[type(part)].estimate(part, device) for part in plan.parts]
    return {"cpu_s": sum(e["cpu_s"] for e in each), "bytes": max(e["bytes"] for e in each)}
