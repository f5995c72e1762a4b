"""What an attack on a captured update is worth without its truth: how well a guess explains the message, and who agrees.

The *residual* of a guess is ‖decode(C(g(x̂))) − decoded‖/‖decoded‖: what the client would have sent of it, through the
same channel, against what was captured. It says something only beside that of the controls, which had no evidence or
another message's.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak import tree
from qleak.catalog import short
from qleak.engine.decoys import Held, message_of
from qleak.jobs import Done
from qleak.metrics import match, picture, psnr, score
from qleak.plans import Captured, Chunk
from qleak.types import Message, Status, Tree

EXPLAINED = 0.1
"""A guess explains a message if its residual is below this share of the best control's …"""
ROUGH = 2.0
"""… or below so many times what the truth itself leaves through a channel that draws, and below half the control's."""
SOLVED = ("closed_form", "refine")
"""Attacks that start from one and the same solution: together one witness."""
CATEGORIES = ("images rebuilt", "partly", "nothing found (not a proof)")


class Lane(NamedTuple):
    """One lane's guess as a picture, its row, and whose start it had."""

    x: Tensor
    labels: Tensor
    row: dict[str, Any]
    start: tuple[Any, ...]


def decoded(plan: Captured, given: Held, message: Message) -> Tree:
    """A message as the server reads it."""
    return plan.channels[0].receive(plan.channels[0].knobs(), message, given.params)


def residual(plan: Captured, given: Held, x: Tensor, y: Tensor, index: int) -> float:
    """‖decode(C(g(x, y))) − decoded‖/‖decoded‖ of message `index`; infinite where it is not a number."""
    want = decoded(plan, given, given.messages[index])
    with torch.no_grad():
        got = decoded(plan, given, message_of(plan, given.params, given.buffers, x, y, ("again", index)))
    off = float(tree.norm(tree.sub(got, want)) / tree.norm(want).clamp(min=1e-300))
    return off if math.isfinite(off) else math.inf


def variation(x: Tensor) -> float:
    """Mean |∂x| over both directions: photographs have some hundredths, noise some tenths."""
    return float((x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()) / 2)


def rows(plan: Captured, given: Held, done: list[tuple[Chunk, Done]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One row a lane, and the verdict."""
    lanes = [_lane(plan, given, chunk, d, i) for chunk, d in done for i in range(len(chunk.lanes))]
    mine = sorted((n for n in lanes if n.row["control"] == "none"), key=lambda n: n.row["residual"])
    best = mine[0]
    best.row["selected"] = True
    for lane in lanes:
        if lane.row["control"] != "none":  # a control is not to fail by its label alone
            lane.row["residual"] = min(lane.row["residual"], residual(plan, given, lane.x, best.labels, 0))
    floor = median(residual(plan, given, d.x, d.y, i + 1) for i, d in enumerate(given.decoys))
    control = min((n.row["residual"] for n in lanes if n.row["control"] != "none"), default=math.inf)
    bar = min(max(EXPLAINED * control, ROUGH * floor), control / 2)
    for lane in lanes:
        lane.row["explained"] = lane.row["residual"] <= bar
        lane.row["agreement"] = _agreement(lane, best) if lane.row["control"] == "none" else None
    found = [n.row for n in lanes]
    return found, _verdict(plan, best, mine, found, control=control, floor=floor, bar=bar)


def _lane(plan: Captured, given: Held, chunk: Chunk, done: Done, i: int) -> Lane:
    lane, attack = chunk.lanes[i], plan.attacks[chunk.attack]
    x, labels = picture(done.guess.x[i]).float(), done.guess.labels[i]
    name = short(attack.spec)
    row: dict[str, Any] = {
        "key": f"{chunk.key}-{i}", "id": plan.id, "attack": name, "control": lane.control, "restart": lane.restart,
        "message": lane.victim, "status": Status.NAMES[int(done.status[i])], "loss": float(done.guess.loss[i]),
        "residual": residual(plan, given, x, labels, 0), "variation": variation(x), "labels": labels.tolist(),
        "closures": int(done.closures[i]), "steps": attack.closures(attack.steps), "cpu_s": done.cpu_s / len(chunk.lanes),
        "selected": False, "cut": attack.steps > 1 and done.cpu_s >= plan.share(chunk), "chunk": chunk.key, "lane": i,
    }  # fmt: skip
    if lane.control == "wrong-gradient":
        own = score(x, labels, given.decoys[lane.victim - 1])
        row |= {"own_residual": residual(plan, given, x, labels, lane.victim), "own_psnr": own["psnr"]}
    if given.truth is not None:
        row |= {k: v for k, v in score(x, labels, given.truth).items() if k in ("psnr", "ssim", "order", "label_ok")}
    start = ("solved",) if attack.spec.split("(")[0] in SOLVED else (name, lane.restart)
    return Lane(x, labels, row, start)


def _agreement(lane: Lane, best: Lane) -> list[float] | None:
    """DB between each image of `best` and this lane's; None where both come from one start."""
    if lane.start == best.start:
        return None
    return [float(v) for v in psnr(lane.x[match(lane.x, best.x)], best.x)]


def _verdict(
    plan: Captured, best: Lane, mine: list[Lane], found: list[dict[str, Any]], **levels: float
) -> dict[str, Any]:
    """The category, and every number that it rests on."""
    row, batch = best.row, len(best.x)
    witnesses = [n.row for n in mine if n.start != best.start and n.row["explained"]]
    agree = [max((w["agreement"][j] for w in witnesses), default=None) for j in range(batch)]  # pyright: ignore[reportArgumentType]
    half = [2 * sum(w["agreement"][j] >= plan.success for w in witnesses) >= len(witnesses) for j in range(batch)]
    decoys = [r for r in found if r["control"] == "wrong-gradient" and r["attack"] == row["attack"]]
    tried = [r["own_psnr"] for r in decoys if r["own_residual"] <= levels["bar"]]
    sound = [min(p) >= plan.success for p in tried]
    basis, good = "nothing", [False] * batch
    if "psnr" in row:
        floor = [max((r["psnr"][j] for r in found if r["control"] != "none"), default=0.0) for j in range(batch)]
        basis, good = "truth", [p >= plan.success and p > f for p, f in zip(row["psnr"], floor, strict=True)]
        levels["psnr_control"] = max(floor)
    elif row["explained"] and sum(not s for s in sound) * 2 > len(sound):
        basis = "decoys"  # explained decoys were other pictures: an explanation proves nothing on this model
    elif row["explained"] and witnesses:
        basis = "agreement"
        good = [a is not None and a >= plan.success and h for a, h in zip(agree, half, strict=True)]
    elif row["explained"] and sound and all(sound):
        basis, good = "decoys", [True] * batch
    whole = CATEGORIES[0] if all(good) else CATEGORIES[1] if any(good) or row["explained"] else CATEGORIES[2]
    if basis == "truth" and not any(good):
        whole = CATEGORIES[2]
    return {
        "verdict": whole, "basis": basis, "rebuilt": sum(good), "images": batch, "good": good, "row": row["key"],
        "attack": row["attack"], "restart": row["restart"], "residual": row["residual"], **levels,
        "explained": row["explained"], "agreement": agree if witnesses else None, "witnesses": len(witnesses),
        "starts": len({n.start for n in mine}), "variation": row["variation"], "labels": row["labels"],
        "decoys": [{"residual": r["own_residual"], "psnr": r["own_psnr"]} for r in decoys],
        "psnr": row.get("psnr"), "ssim": row.get("ssim"), "label_ok": row.get("label_ok"),
        "cut": [r["key"] for r in found if r["cut"] and r["closures"] < r["steps"]],
        "cpu_s": sum(r["cpu_s"] for r in found),
    }  # fmt: skip
