"""Who attacks a captured update, and in how many steps, so that it fits the budget."""

from __future__ import annotations

from dataclasses import replace

import torch

from qleak import tree
from qleak.attacks.closed_form import refuse
from qleak.catalog import build, several, short
from qleak.channels import Channel
from qleak.check import Expected
from qleak.client import is_gradient
from qleak.engine import captured
from qleak.engine.decoys import Held, decoys_of
from qleak.plans import Captured
from qleak.types import Attack, Buffers, Client, Message, Model, Params

RESTARTS = 4
SIZES = (  # how much of a full run the budget must hold, and what is run then
    (1.0, ""),
    (0.5, "steps=50, last=100"),
    (0.2, "stages=3, fade=0.03, steps=30, last=70"),
    (0.1, "stages=2, weight=0.01, fade=0.1, steps=20, last=40"),
    (0.0, "stages=1, weight=0.001, steps=20, last=30"),
)
"""Sizes of `cells`, from its default down; the clock cuts what is still too long."""


def choose(
    model: Model, client: Client, channel: Channel, given: str = "", restarts: int = 0
) -> tuple[tuple[Attack, ...], int, str]:
    """The attacks, the restarts of those that start at random, and why.

    `closed_form` where an exact gradient of one image and a net that can be solved meet, `refine` behind a channel;
    `cells` beside them as a second witness, and alone for batches and every other net; `any_order(cells)` for local steps.
    """
    count = restarts or RESTARTS
    if given:
        return several("attacks", given, ()), count, "attacks as asked"
    if not is_gradient(client):
        return (build("attacks", "any_order(cells())"),), min(count, 2), "any_order(cells): an update of several steps"
    cells = build("attacks", "cells")
    if client.batch == 1 and not refuse(model.layers):
        first = "refine" if channel.stages else "closed_form"
        return (
            (build("attacks", first), cells),
            count,
            f"{first}: one image, and a net that can be solved; cells as a second witness",
        )
    why = "a batch" if client.batch > 1 else "a net that cannot be solved layer by layer"
    return (cells,), count, f"cells: {why}"


def fitted(
    plan: Captured, params: Params, buffers: Buffers, message: Message, fixed: bool, asked: bool
) -> tuple[Captured, list[str]]:
    """The plan with `cells` in a size and a number of restarts that the budget holds, and what was decided."""
    decoys, sent = decoys_of(plan, params, buffers)
    try:
        captured_one = tree.unflatten(tree.flatten(message), sent[0])
        torch.stack([next(iter(captured_one.code.values())), next(iter(sent[0].code.values()))])
    except (KeyError, RuntimeError):
        raise Expected(
            "Expected a message of the shape that the channel sends: give --channel, or --channel 'chain()'."
        ) from None
    per = captured.pace(plan, Held(params, buffers, [captured_one, *sent], decoys, None))
    whole = _seconds(plan, per)
    share = plan.budget / whole if whole else 1.0
    said = [f"a full run takes about {whole:.0f} CPU seconds, the budget is {plan.budget:g}"]
    if fixed or share >= 1:
        return plan, said
    if not asked and plan.restarts > 2:
        plan = replace(plan, restarts=2)
        share = plan.budget / _seconds(plan, per)
        said.append("2 restarts in place of 4")
    size = next(text for least, text in SIZES if share >= least)
    if size:
        made = [_sized(a, size) for a in plan.attacks]
        plan = replace(plan, attacks=tuple(made))
        said.append(f"fewer steps: {', '.join(short(a.spec) for a in made if a.steps > 1)}")
    return plan, said


def _seconds(plan: Captured, per: dict[int, float]) -> float:
    """CPU seconds of all chunks, from those of one closure of one lane by attack."""
    return sum(per.get(c.attack, 0.0) * len(c.lanes) * plan.attacks[c.attack].steps for c in plan.chunks())


def _sized(attack: Attack, size: str) -> Attack:
    name = short(attack.spec)
    if name == "cells":
        return build("attacks", f"cells({size})")
    return build("attacks", f"any_order(cells({size}))") if name.startswith("any_order") else attack
