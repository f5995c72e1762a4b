"""Guesses to rows, rows to a summary. `score` is the only function that sees a Secret."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from qleak.catalog import short
from qleak.jobs import Done
from qleak.metrics import Secret, match, psnr, score, student, wilson
from qleak.plans import CONTROLS, Audit, Chunk
from qleak.types import Status


def score_group(
    plan: Audit, secret: Secret, channel: int, attack: int, bits: float, coded: float, epsilon: float | None,
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
                    "cpu_s": done.cpu_s / len(chunk.lanes), "bits": bits, "bits_entropy": coded,
                    "epsilon": _finite(epsilon), **_best_weight(done, i, j), **_race(done, i, j),
                    "chunk": chunk.key, "lane": i,
                })  # fmt: skip
    wrong = max((r["psnr"] for r in rows if r["control"] == "wrong-gradient"), default=-math.inf)
    for image in {r["image"] for r in rows}:
        mine = [r for r in rows if r["image"] == image]
        floor = max((r["psnr"] for r in mine if r["control"] != "none"), default=-math.inf)
        if not any(r["control"] == "wrong-gradient" for r in mine):  # not run for this image: any other's counts
            floor = max(floor, wrong)
        for r in mine:
            r["success"] = r["control"] == "none" and r["psnr"] >= plan.success and r["psnr"] > floor
        for control in CONTROLS:
            lanes = [r for r in mine if r["control"] == control]
            if lanes:
                min(lanes, key=lambda r: math.inf if r["loss"] is None else r["loss"])["selected"] = True
    return rows


def rate_path(done: Done, chunk: Chunk, secret: Secret) -> Done:
    """PSNRs in place of images: of the guesses an attack chose its prior's weight among, and of those on its way."""
    if done.guess.path is not None:
        rated = _rated(done.guess.path, chunk, secret)
        done = done._replace(guess=done.guess._replace(path=None), path_psnr=rated)
    if done.seen is not None and done.seen.ndim > 3:
        done = done._replace(seen=_rated(done.seen, chunk, secret))
    return done


def _rated(points: Tensor, chunk: Chunk, secret: Secret) -> Tensor:
    """Images `[lane point b c h w]` -> PSNR `[lane point b]`."""
    truths = [secret.x[lane.victim] for lane in chunk.lanes]
    lanes = [[psnr(p[match(p, x)], x) for p in line] for line, x in zip(points, truths, strict=True)]
    return torch.stack([torch.stack(line) for line in lanes]).float()


def _race(done: Done, lane: int, image: int) -> dict[str, list[list[float]]]:
    """[seconds, PSNR] on the way of a lane that had a time limit."""
    if done.seen is None or done.seen_at is None:
        return {}
    pairs = zip(done.seen_at.tolist(), done.seen[lane, :, image].tolist(), strict=True)
    return {"psnr_at": [[round(t, 3), round(p, 3)] for t, p in pairs]}


def _best_weight(done: Done, lane: int, image: int) -> dict[str, float]:
    """The PSNR at the prior weight that only the truth could have picked."""
    return {} if done.path_psnr is None else {"psnr_best_weight": float(done.path_psnr[lane, :, image].max())}


def summarise(plan: Audit, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One object per channel × attack × control.

    `psnr_selected` is the mean over images of the restart chosen by the attacker's own loss;
    `psnr_oracle` that of the best restart and `psnr_weight_oracle` that of the best prior weight, which
    only the truth can tell.
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
            "psnr_selected": _mean(chosen), "psnr_ci": _interval(chosen), "psnr_selected_max": max(chosen),
            "psnr_oracle": _mean(best), **_weight_oracle(mine),
            "ssim_selected": _mean([r["ssim"] for r in mine if r["selected"]]),
            "recovered": sum(r["success"] for r in mine if r["selected"]),
            "success_rate": wins / len(mine), "success_ci": list(wilson(wins, len(mine))),
            "label_accuracy": _mean([float(r["label_ok"]) for r in mine]),
            **({"counts_exact": _counts_exact(mine)} if plan.client.batch > 1 else {}),
            "bits": mine[0]["bits"], "bits_entropy": mine[0]["bits_entropy"], "epsilon": mine[0]["epsilon"],
            "cpu_s": sum(r["cpu_s"] for r in mine),
        })  # fmt: skip
    return out


def _counts_exact(rows: list[dict[str, Any]]) -> float:
    """Share of lanes all of whose labels are right: of batches whose classes are counted without a mistake."""
    right: dict[tuple[str, int], bool] = {}
    for r in rows:
        lane = (r["chunk"], r["lane"])
        right[lane] = right.get(lane, True) and r["label_ok"]
    return sum(right.values()) / len(right)


def _weight_oracle(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The same restarts with the prior weight that the truth would pick; only where an attack kept its path."""
    best = [r["psnr_best_weight"] for r in rows if r["selected"] and "psnr_best_weight" in r]
    return {"psnr_weight_oracle": _mean(best)} if best else {}


def _interval(values: list[float]) -> list[float] | None:
    """95 % Student-t interval of the mean over images; None for one image."""
    return list(student(values)) if len(values) > 1 else None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
