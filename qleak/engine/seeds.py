"""Rows of a training run to its summary: means over seeds with Student intervals."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from qleak.engine.lessons import extras
from qleak.metrics import student
from qleak.plans import Training

METRICS = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")


def summarise(plan: Training, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One object per channel: means at the last epoch with 95 % Student-t intervals over seeds.

    Accuracies of diverged seeds count as measured; losses are averaged over the seeds where they are finite.
    What the plan asks for beyond the four is summed up in the same way; `claimed_epsilon` (no guarantee) is there where
    the client has a claim. `uplink_mb` is what one training's clients send together, `cpu_s` the sum over seeds.
    """
    out = []
    for c, name in enumerate(plan.labels()):
        mine = [r for r in rows if r["key"].startswith(f"{c}-") and r["epoch"] == plan.epochs]
        if not mine:
            continue
        found: dict[str, Any] = {
            "channel": name, "n": len(mine), "diverged": sum(r["status"] == "diverged" for r in mine),
            "epoch": plan.epochs, "rounds": max(r["round"] for r in mine),
        }  # fmt: skip
        for metric in (*METRICS, *extras(plan)):
            found[metric], found[f"{metric}_ci"] = mean_interval([r[metric] for r in mine if r[metric] is not None])
        eps = [r["epsilon"] for r in mine]
        if "claimed_epsilon" in mine[0]:
            found["claimed_epsilon"] = max((r["claimed_epsilon"] for r in mine if r["claimed_epsilon"]), default=None)
        found |= {
            "bits": mine[0]["bits"], "epsilon": None if None in eps else max(eps),
            "uplink_mb": sum(r["uplink_mb"] for r in mine) / len(mine), "cpu_s": sum(r["cpu_s"] for r in mine),
        }  # fmt: skip
        out.append(found)
    return out


def mean_interval(values: list[float], level: float = 0.95) -> tuple[float | None, list[float | None]]:
    """Mean and x̄ ± t·s/√n with n − 1 degrees of freedom (Student 1908); no interval from one value."""
    if not values:
        return None, [None, None]
    return fmean(values), list(student(values, level)) if len(values) > 1 else [None, None]
