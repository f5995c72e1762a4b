"""The bounds of an audit, beside its attacks: what no attacker could do better, for every channel and victim.

A computation of its own on a prepared audit, so that it can follow a run that is done: it reads the plan, the weights and
the messages that were sent, and adds `bounds.jsonl` and the field `bounds` of the header. No row of the run is touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from qleak import bounds, data, tree
from qleak.attacks import routes
from qleak.bounds import Bound, Prior, Setting
from qleak.bounds.cells import deterministic
from qleak.bounds.chord import MOST as MOST_SWEEPS
from qleak.bounds.chord import WORK
from qleak.bounds.jacobian import Jacobian, jacobian
from qleak.bounds.of import MOST, MOST_ROWS
from qleak.check import Expected
from qleak.engine.audit import Prepared, prepare
from qleak.errors import Failed
from qleak.plans import Audit
from qleak.store import Run

KINDS = ("cramer-rao", "local", "chord", "rate", "dp-unbiased", "dp-reconstruction")
PRIORS = {(3, 32, 32): ("cifar10-12k", "cifar10"), (1, 28, 28): ("mnist5k",)}
"""Public images by shape, first found first, for data sets too small to fit a Gaussian to; for want of any, a spectrum."""

ENOUGH = 1000
"""Images from which on the plan's own data set, without the victims, is the prior: what an attacker may know of such data."""


SHORT = 20.0
"""Seconds up to which the bounds of a run are computed unasked."""


def seconds(plan: Audit) -> float:
    """About how long `run` takes on one core: a colour LeNet's 5 s a Jacobian, 7 s a bound, 18 s a prior, 55 s a walk.

    A Jacobian grows with pixels × weights, a bound and a prior with the third power of the pixels, a walk with both.
    """
    pixels = math.prod(plan.model.shape)
    share = pixels / 3072
    weights = routes.weights(plan.model)
    width, walks = weights / 85_000, sum(deterministic(c) for c in plan.channels) if weights <= MOST_ROWS else 0
    walk = 30 * share**3 + 25 * min(MOST_SWEEPS * pixels * weights / WORK, 1.0)
    each = walks * walk + 5 * share * width + 7 * len(plan.channels) * (share**3 + 0.1 * share**2 * width)
    return 18 * share**3 + plan.client.batch * len(plan.victims) * each


def prior_for(plan: Audit, victims: Tensor) -> Prior:
    """The Gaussian of other images of the plan's data set, or of public ones, without any copy of a victim `[… c h w]`.

    The better the prior, the better the attacker that the bound allows for. Without such images here, natural images'
    spectrum.
    """
    shape = plan.model.shape
    if len(data.load(plan.data).x) >= ENOUGH:
        return bounds.public(plan.data, shape, victims.flatten(0, -4))
    for name in PRIORS.get(shape, ()):
        try:
            data.load(name)
        except (Expected, Failed):
            continue
        return bounds.public(name, shape, victims.flatten(0, -4))
    return bounds.natural(shape)


def rows(
    plan: Audit, prepared: Prepared, prior: Prior, kinds: Sequence[str] = KINDS, memory: float = 1e9
) -> Iterator[tuple[dict[str, Any], Tensor | None]]:
    """A row for every victim, channel and kind of bound, with its map `[b c h w]`, as soon as it is known.

    A victim's Jacobian is made once for all channels.
    """
    setting = Setting(plan.client, plan.model, prepared.params, prepared.buffers)
    for v, victim in enumerate(plan.victims):
        x, y = prepared.secret.x[v], prepared.secret.y[v]
        jac = _shared(setting, plan, x, y, memory)
        for c, channel in enumerate(plan.channels):
            message = prepared.messages[c][v]
            for bound in bounds.bound_of(setting, channel, x, y, prior, message, kinds, jac, memory):
                yield _row(plan, c, victim, bound), bound.map


def _shared(setting: Setting, plan: Audit, x: Tensor, y: Tensor, memory: float) -> Jacobian | None:
    if plan.client.rows or x.numel() > MOST:
        return None
    try:
        return jacobian(*setting, x, y, memory=memory)
    except Expected:
        return None


def _row(plan: Audit, channel: int, victim: int, bound: Bound) -> dict[str, Any]:
    number = lambda v: v if math.isfinite(v) else None  # noqa: E731
    return {
        "key": f"{channel}-{bound.kind}-{victim}", "channel": plan.labels()[channel], "image": victim,
        "bound": bound.kind, "psnr": number(bound.psnr), "mse": number(bound.mse), "mc_error": bound.mc_error,
        "rigorous": bound.rigorous, "estimate": bound.estimate, "assumptions": bound.assumptions, "why": bound.why,
    }  # fmt: skip


def summarise(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One object per channel and kind: the mean PSNR of its images' bounds, `None` with `why` where there is none."""
    out = []
    for key in dict.fromkeys((r["channel"], r["bound"]) for r in found):
        mine = [r for r in found if (r["channel"], r["bound"]) == key]
        told = [r["psnr"] for r in mine if r["psnr"] is not None and not r["why"]]
        first = next((r for r in mine if not r["why"]), mine[0])
        out.append({
            "channel": key[0], "bound": key[1], "images": len(told), "psnr": fmean(told) if told else None,
            "rigorous": all(r["rigorous"] for r in mine), "estimate": first["estimate"],
            "assumptions": first["assumptions"], "why": "" if told else first["why"],
        })  # fmt: skip
    return out


def run(
    plan: Audit, store: Run, prior: Prior | None = None, kinds: Sequence[str] = KINDS, memory: float = 1e9
) -> Iterator[dict[str, Any]]:
    """The bounds of an audit that was run, written beside it: `bounds.jsonl`, maps of the local bound, header `bounds`.

    The messages are those the run stored. Written once all of them are known.
    """
    prepared = prepare(plan)
    for i in range(len(plan.channels)):
        if store.has(f"messages-{i}"):
            prepared.messages[i] = _stored(store, i, prepared)
    prior = prior or prior_for(plan, prepared.secret.x)
    found, maps = [], {}
    for row, map in rows(plan, prepared, prior, kinds, memory):
        found.append(row)
        if map is not None and row["bound"] == "local":
            maps[row["key"]] = map.float()
        yield row
    store.file("bounds.jsonl", "".join(json.dumps(r) + "\n" for r in found).encode())
    if maps:
        store.save("bounds", maps)
    store.update(bounds={"prior": prior.name, "summary": summarise(found)})


def _stored(store: Run, channel: int, prepared: Prepared) -> list[Any]:
    return tree.unflatten(store.load(f"messages-{channel}"), prepared.messages[channel])
