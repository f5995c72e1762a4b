"""`run(plan)` as a stream of events, whatever the plan: the engine of its kind does the work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qleak.engine import audit, captured, study, synthesis, training
from qleak.engine.audit import job_of, prepare
from qleak.engine.events import Event, Finished, Rows, Step
from qleak.looks import NONE, Looks
from qleak.plans import Audit, Captured, Study, Synthesis, Training
from qleak.pool import Workers
from qleak.store import Run

__all__ = ["Event", "Finished", "Rows", "Step", "choices", "estimate", "job_of", "prepare", "run", "size"]

ENGINES: dict[type, Any] = {Audit: audit, Training: training, Synthesis: synthesis, Study: study, Captured: captured}


def run(plan: Any, store: Run, device: str = "cpu", workers: Workers = 1, look: Looks = NONE) -> Iterator[Event]:
    """Runs what the store does not hold yet; see the engine of the plan's kind.

    Args:
        plan: what to run.
        store: its run folder, written by this process alone.
        device: where jobs run: "cpu", "cuda", …; on an executor, a device of its workers.
        workers: 1 for this process, so many worker processes, or any `concurrent.futures.Executor`.
        look: pictures and films of attacks on their way (`looks.asked`); no result depends on it.
    """
    return ENGINES[type(plan)].run(plan, store, device, workers, look)


def size(plan: Any) -> tuple[str, int]:
    """What is counted while it runs, and how many there are at most."""
    return ENGINES[type(plan)].size(plan)


def choices(plan: Any) -> list[str]:
    """Every automatic choice of the engine, with its reason."""
    return ENGINES[type(plan)].choices(plan)


def estimate(plan: Any, device: str = "cpu") -> dict[str, float]:
    """CPU seconds (an upper bound) and bytes of the largest job, from a few timed steps."""
    return ENGINES[type(plan)].estimate(plan, device)
