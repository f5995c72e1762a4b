"""The bounds of an audit, beside its attacks: what no attacker could do better, for every channel and victim.

A computation of its own on a prepared audit, so that it can follow a run that is done: it reads the plan, the weights and
the messages that were sent, and adds `bounds.jsonl` and the field `bounds` of the header. No row of the run is touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Iterator, Sequence
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
from qleak.engine.captured import held
from qleak.errors import Failed
from qleak.plans import Audit, Captured, label
from qleak.store import Run

KINDS = ("cramer-rao", "local", "chord", "rate", "dp-unbiased", "dp-reconstruction")
PRIORS = {(3, 32, 32): ("cifar10-12k", "cifar10"), (1, 28, 28): ("mnist5k",)}
"""Public images by shape, first found first, for data sets too small to fit a Gaussian to; for want of any, a spectrum."""

ENOUGH = 1000
"""Images from which on the plan's own data set, without the victims, is the prior: what an attacker may know of such data."""


SHORT = 20.0
"""Seconds up to which the bounds of a run are computed unasked."""


def seconds(plan: Audit | Captured) -> float:
    """About how long the bounds take on one core: a colour LeNet's 5 s a Jacobian, 7 s a bound, 18 s a prior, 55 s a walk.

    A Jacobian grows with pixels × weights, a bound and a prior with the third power of the pixels, a walk with both.
    """
    pixels = math.prod(plan.model.shape)
    share = pixels / 3072
    weights = routes.weights(plan.model)
    width, walks = weights / 85_000, sum(deterministic(c) for c in plan.channels) if weights <= MOST_ROWS else 0
    walk = 30 * share**3 + 25 * min(MOST_SWEEPS * pixels * weights / WORK, 1.0)
    each = walks * walk + 5 * share * width + 7 * len(plan.channels) * (share**3 + 0.1 * share**2 * width)
    victims = len(plan.victims) if isinstance(plan, Audit) else 1
    return 18 * share**3 + plan.client.batch * victims * each


def due(plan: Any, store: Run, asked: str = "") -> tuple[bool, str]:
    """Whether a run that is done is to get bounds now, and what to tell where "auto" leaves them out.

    Args:
        plan: an audit, or one of a captured update, which has bounds where its images are known.
        store: its run.
        asked: yes, no or auto; "": as the plan says.
    """
    asked = asked or getattr(plan, "bounds", "auto")
    known = isinstance(plan, Audit) or (isinstance(plan, Captured) and held(plan, store).truth is not None)
    if asked == "no" or not known or store.header.get("bounds"):
        return False, ""
    if asked == "auto" and (needed := seconds(plan)) > SHORT:
        return False, left_out(needed)
    return True, ""


def left_out(needed: float) -> str:
    """What to tell where bounds of so many seconds were not computed."""
    return f"Bounds left out: they take about {needed:.0f} s. The same command with --bounds yes adds them."


def beside(plan: Any, store: Run) -> Iterator[dict[str, Any]]:
    """The rows of the bounds of either kind of audit, as `run` and `captured` make them."""
    return run(plan, store) if isinstance(plan, Audit) else captured(plan, store)


def prior_for(shape: tuple[int, int, int], victims: Tensor, own: str = "") -> Prior:
    """The Gaussian of other images of the data set `own`, or of public ones, without any copy of a victim `[… c h w]`.

    The better the prior, the better the attacker that the bound allows for. Without such images here, natural images'
    spectrum.
    """
    if own and len(data.load(own).x) >= ENOUGH:
        return bounds.public(own, shape, victims.flatten(0, -4))
    for name in PRIORS.get(shape, ()):
        try:
            data.load(name)
        except (Expected, Failed):
            continue
        return bounds.public(name, shape, victims.flatten(0, -4))
    return bounds.natural(shape)


def rows(
    plan: Audit, prepared: Prepared, prior: Prior, kinds: Sequence[str] = KINDS, memory: float = 1e9,
    known: Container[str] = (),
) -> Iterator[tuple[dict[str, Any], Tensor | None]]:  # fmt: skip
    """A row for every victim, channel and kind of bound whose key is not `known`, with its map `[b c h w]`.

    A victim's Jacobian is made once for all channels.
    """
    setting = Setting(plan.client, plan.model, prepared.params, prepared.buffers)
    for v, victim in enumerate(plan.victims):
        x, y = prepared.secret.x[v], prepared.secret.y[v]
        left = {c: [k for k in kinds if f"{c}-{k}-{victim}" not in known] for c in range(len(plan.channels))}
        jac = _shared(setting, plan, x, y, memory) if any(left.values()) else None
        for c, some in left.items():
            message = prepared.messages[c][v]
            for bound in bounds.bound_of(setting, plan.channels[c], x, y, prior, message, some, jac, memory):
                yield _row(plan.labels()[c], f"{c}-{bound.kind}-{victim}", victim, bound), bound.map


def _shared(setting: Setting, plan: Audit, x: Tensor, y: Tensor, memory: float) -> Jacobian | None:
    if plan.client.rows or x.numel() > MOST:
        return None
    try:
        return jacobian(*setting, x, y, memory=memory)
    except Expected:
        return None


def _row(channel: str, key: str, victim: int, bound: Bound) -> dict[str, Any]:
    number = lambda v: v if math.isfinite(v) else None  # noqa: E731
    return {
        "key": key, "channel": channel, "image": victim,
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

    The messages are those the run stored.
    """
    prepared = prepare(plan)
    for i in range(len(plan.channels)):
        if store.has(f"messages-{i}"):
            prepared.messages[i] = _stored(store, i, prepared)
    prior = prior or prior_for(plan.model.shape, prepared.secret.x, plan.data)
    found = _held(store, prior)
    yield from _kept(store, prior, found, rows(plan, prepared, prior, kinds, memory, {r["key"] for r in found}))


def captured(
    plan: Captured, store: Run, prior: Prior | None = None, kinds: Sequence[str] = KINDS, memory: float = 1e9
) -> Iterator[dict[str, Any]]:
    """The bounds of a captured update whose images are known, written beside its audit as `run` does; none without them."""
    given = held(plan, store)
    if given.truth is None:
        return
    x, y = given.truth
    prior = prior or prior_for(plan.model.shape, x)
    setting, channel = Setting(plan.client, plan.model, given.params, given.buffers), plan.channels[0]
    made = bounds.bound_of(setting, channel, x, y, prior, given.messages[0], kinds, memory=memory)
    name = label(channel.spec)
    yield from _kept(store, prior, [], ((_row(name, b.kind, 0, b), b.map) for b in made))


def _held(store: Run, prior: Prior) -> list[dict[str, Any]]:
    """The rows that an interrupted computation with this very prior has left."""
    text = (store.folder / "bounds.jsonl").read_text(encoding="utf-8") if store.holds("bounds.jsonl") else ""
    return [row for row in map(json.loads, text.splitlines()) if row.get("prior") == prior.name]


def _kept(
    store: Run, prior: Prior, found: list[dict[str, Any]], made: Iterable[tuple[dict[str, Any], Tensor | None]]
) -> Iterator[dict[str, Any]]:
    """Hands on every row, `found` first, and writes it at once: a row may take minutes."""
    maps = store.load("bounds") if found and store.has("bounds") else {}
    yield from found
    for row, map in made:
        if map is not None and row["bound"] == "local":
            store.save("bounds", maps := maps | {row["key"]: map.float()})
        found = [*found, row | {"prior": prior.name}]
        store.file("bounds.jsonl", "".join(json.dumps(r) + "\n" for r in found).encode())
        yield found[-1]
    store.update(bounds={"prior": prior.name, "summary": summarise(found)})


def _stored(store: Run, channel: int, prepared: Prepared) -> list[Any]:
    return tree.unflatten(store.load(f"messages-{channel}"), prepared.messages[channel])
