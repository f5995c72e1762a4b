"""Guesses to rows, rows to a summary. `score` is the only function that sees a Secret."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from typing import Any

from qleak.catalog import short
from qleak.jobs import Done
from qleak.metrics import Secret, score, wilson
from qleak.plans import CONTROLS, Audit, Chunk
from qleak.types import Status


def score_group(
    plan: Audit, secret: Secret, channel: int, attack: int, bits: float, epsilon: float | None,
    chunks: Iterable[tuple[Chunk, Done]],
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one channel × attack: one per lane and image.

    `selected` marks, for each victim, the restart of lowest own loss. `success` needs the plan's PSNR
    *and* a PSNR above both controls of the same image.
    """
    rows = []
    for chunk, done in chunks:
        for i, lane in enumerate(chunk.lanes):
            truth = Secret(secret.x[lane.victim], secret.y[lane.victim])
            scores = score(done.guess.x[i], done.guess.labels[i], truth)
            for j in range(len(truth.x)):
                victim = plan.victims[lane.victim] + j
                key = f"{channel}-{attack}-{lane.control}-{victim}-{lane.restart}"
                rows.append({
                    "key": key, "id": plan.id, "model": short(plan.model.spec), "client": short(plan.client.spec),
                    "channel": plan.labels()[channel], "attack": short(plan.attacks[attack].spec),
                    "control": lane.control, "image": victim, "seed": lane.restart,
                    "status": Status.NAMES[int(done.status[i])], "loss": _finite(float(done.guess.loss[i])),
                    **{k: v[j] for k, v in scores.items()},
                    "selected": False, "success": False, "closures": int(done.closures[i]),
                    "cpu_s": done.cpu_s / len(chunk.lanes), "bits": bits, "epsilon": _finite(epsilon),
                    "chunk": chunk.key, "lane": i,
                })  # fmt: skip
    for image in {r["image"] for r in rows}:
        mine = [r for r in rows if r["image"] == image]
        floor = max((r["psnr"] for r in mine if r["control"] != "none"), default=-math.inf)
        for r in mine:
            r["success"] = r["control"] == "none" and r["psnr"] >= plan.success and r["psnr"] > floor
        for control in CONTROLS:
            lanes = [r for r in mine if r["control"] == control]
            if lanes:
                min(lanes, key=lambda r: math.inf if r["loss"] is None else r["loss"])["selected"] = True
    return rows


def summarise(plan: Audit, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One object per channel × attack × control.

    `psnr_selected` is the mean over images of the restart chosen by the attacker's own loss;
    `psnr_oracle` that of the best restart, which only the truth can tell.
    """
    out = []
    # In the plan's order, whatever order the workers finished in.
    order = {(c, short(a.spec)): i for i, (c, a) in enumerate(product(plan.labels(), plan.attacks))}
    present = {(r["channel"], r["attack"], r["control"]) for r in rows}
    for key in sorted(present, key=lambda k: (order[k[:2]], CONTROLS.index(k[2]))):
        mine = [r for r in rows if (r["channel"], r["attack"], r["control"]) == key]
        images = sorted({r["image"] for r in mine})
        chosen = [r["psnr"] for r in mine if r["selected"]]
        best = [max(r["psnr"] for r in mine if r["image"] == i) for i in images]
        wins = sum(r["success"] for r in mine)
        out.append({
            "channel": key[0], "attack": key[1], "control": key[2], "n": len(mine), "images": len(images),
            "psnr_selected": _mean(chosen), "psnr_selected_max": max(chosen), "psnr_oracle": _mean(best),
            "ssim_selected": _mean([r["ssim"] for r in mine if r["selected"]]),
            "recovered": sum(r["success"] for r in mine if r["selected"]),
            "success_rate": wins / len(mine), "success_ci": list(wilson(wins, len(mine))),
            "label_accuracy": _mean([float(r["label_ok"]) for r in mine]),
            "bits": mine[0]["bits"], "epsilon": mine[0]["epsilon"], "cpu_s": sum(r["cpu_s"] for r in mine),
        })  # fmt: skip
    return out


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
