"""Rows of a synthesis run to its summary: means over seeds with Student intervals, the floor beside every arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qleak.catalog import short
from qleak.engine import making
from qleak.engine.seeds import mean_interval
from qleak.plans import Synthesis
from qleak.types import Spend

MEASURES = ("accuracy", "accuracy_max", "distance", "copies", "nearest")


def summarise(plan: Synthesis, rows: list[dict[str, Any]], spends: Sequence[Spend]) -> list[dict[str, Any]]:
    """One object per arm, at its last step: the first judge's numbers, the others' under `judges`.

    `accuracy` is that of the last epoch, `accuracy_max` the largest over epochs (chosen by the test set).
    `floor_accuracy` is the accuracy of the one-query floor at the same ε, with the same judge; `cpu_s` training and
    sampling per synthesis, the judge's time not counted.
    """
    judges = [short(c.spec) for c in plan.classifiers]
    out = []
    for a, (arm, spend) in enumerate(zip(plan.arms(), spends, strict=True)):
        mine = [r for r in rows if r["key"].startswith(f"{a}-") and r["step"] == spend.steps]
        first = [r for r in mine if r["classifier"] == judges[0]]
        if not first:
            continue
        found: dict[str, Any] = {
            "method": arm.name, "floor": arm.floor, "target_epsilon": arm.epsilon, "epsilon": first[0]["epsilon"],
            "claimed_epsilon": first[0]["claimed_epsilon"], "delta": plan.delta, "n": len(first), "steps": spend.steps,
            "noise": spend.noise, "classifier": judges[0],
        }  # fmt: skip
        for measure in (*MEASURES, *making.columns(plan)[len(making.COLUMNS) :]):
            found[measure], found[f"{measure}_ci"] = mean_interval(
                [r[measure] for r in first if r[measure] is not None]
            )
        found["cpu_s"] = sum(r["cpu_s"] for r in first) / len(first)
        found["judges"] = [_judged(judge, mine) for judge in judges]
        out.append(found)
    floors = {s["target_epsilon"]: s for s in out if s["floor"]}
    for found in out:
        floor = floors.get(found["target_epsilon"], {})
        found["floor_accuracy"], found["floor_accuracy_ci"] = floor.get("accuracy"), floor.get("accuracy_ci")
    return out


def _judged(judge: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One judge's accuracy over seeds."""
    mine = [r for r in rows if r["classifier"] == judge]
    found: dict[str, Any] = {"classifier": judge}
    for measure in ("accuracy", "accuracy_max"):
        found[measure], found[f"{measure}_ci"] = mean_interval([r[measure] for r in mine if r[measure] is not None])
    return found
