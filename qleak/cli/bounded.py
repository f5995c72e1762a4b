"""Bounds after a run: computed where they are asked for or take seconds, with a bar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qleak.cli import live

if TYPE_CHECKING:
    from qleak.store import Run


def bounded(plan: Any, run: Run, asked: str, say: live.Console) -> None:
    """The bounds of an audit, or of every audit of a study, once; what was left out is said.

    Args:
        plan: any plan; those without audits have no bounds.
        run: its run, done.
        asked: yes, no or auto; "": as the plan says.
        say: where the bar goes.
    """
    from qleak import store
    from qleak.engine import bounds

    if plan.kind == "study":
        audits = {n: p for n, p in zip(plan.names, plan.parts, strict=True) if p.kind == "audit"}
        by_itself = [p for p in audits.values() if (asked or p.bounds) == "auto"]
        needed = sum(map(bounds.seconds, by_itself))  # seconds each, minutes together
        if needed > bounds.SHORT:
            say.note(bounds.left_out(needed))
        for name, part in audits.items():
            if part not in by_itself or needed <= bounds.SHORT:
                with store.open_run(run.folder / name, part.header()) as inner:
                    bounded(part, inner, asked, say)
        return
    if plan.kind not in ("audit", "captured"):
        return
    now, why_not = bounds.due(plan, run, asked)
    say.note(why_not)
    if now:
        victims = len(plan.victims) if plan.kind == "audit" else 1
        with say.counting("bounds", victims * len(plan.channels) * len(bounds.KINDS)) as count:
            for _ in bounds.beside(plan, run):
                count()
