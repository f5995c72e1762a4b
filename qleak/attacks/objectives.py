"""How far an update lies from a message: the attacker's evidence term.

Most messages pin the update to a box: a point for numbers sent in clear, an interval for codes, a point
with a known spread for codes drawn by a coin. The misfit is then Σ w·dist(u, [lo, hi])², and what can be
worked out from the message once (the box and its weights) is the objective's `goal`. The other readings
go through the channel's own likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from qleak import tree
from qleak.attacks import boxes, structured
from qleak.attacks.boxes import Box, Point, is_point, outside, pulled
from qleak.attacks.structured import Slope
from qleak.channels import Channel
from qleak.channels.repeat import Rounds
from qleak.check import one_of
from qleak.client import View, is_gradient
from qleak.types import Message, Tree

OBJECTIVES = ("cells", "graded", "l2", "weighted", "cosine", "straight_through")


class Objective(NamedTuple):
    """`misfit(update, goal) -> scalar` of one lane; `box`: the goal is a `Box` or a `Point`: a projection is enough."""

    misfit: Callable[[Tree, Any], Tensor]
    box: bool


def objective(view: View, kind: str) -> Objective:
    """The evidence term of an attacker.

    - "l2": Σ‖g′ − decoded‖² over all tensors, whatever the channel was: the attacker of 2019 (no ½, sum
      over layers; Zhu et al. 2019, equation 4).
    - "weighted": the same with 1/step² of every tensor as weight: least squares for rounding errors.
    - "cosine": 1 − cos(g′, decoded) (Geiping et al. 2020, equation 4).
    - "straight_through": ‖Q(g′) − decoded‖² with the quantizer's derivative taken as the identity (Bengio et al. 2013).
    - "cells": the channel's own reading: zero inside the message's cell; behind a coin or noise a
      Gaussian of the code's own variance, which keeps L-BFGS smooth where the exact likelihood has kinks;
      elsewhere the exact likelihood. On the identity channel it is the same as "l2".
    - "graded": "cells", but an even grid so fine that its rounding errors are small noise is read as numbers with
      an error of variance step²/12 (Bennett 1948): among many small cells the middle is a better guess than any
      point of the cells' common ground. On a coarse grid it is not.
    """
    one_of(OBJECTIVES, objective=kind)
    kind = _resolved(view, kind)
    if kind == "graded":
        return Objective(_distance, True)
    knobs = view.channel.knobs(device=next(iter(view.params.values())).device)
    if view.client.rows and kind != "cells":  # face value: what the joins would make of the guessed rows
        plain = _cosine if kind == "cosine" else _distance
        return Objective(lambda u, goal: plain(view.channel.expect(knobs, u, view.like, view.leg), goal), False)
    if kind == "cosine":
        return Objective(_cosine, False)
    if kind == "straight_through" and _has_middle(view):
        return Objective(lambda u, goal: _straight_through(view, knobs, u, goal), False)
    if kind == "cells" and not (_is_plain(view) or _has_cell(view) or _has_moments(view)):
        return Objective(lambda u, m: view.channel.misfit(knobs, m, u, view.like, view.leg, moments=True), False)
    return Objective(_distance, True)


def goal(view: View, kind: str) -> Any:
    """What `objective` needs of the messages, worked out once and stacked over lanes."""
    found = _goal(view, kind)
    if not isinstance(found, Point) or not is_gradient(view.client) or not structured.supports(view.model.layers):
        return found
    return boxes.with_splits(view.model.layers or (), found, view.client.batch)


def _goal(view: View, kind: str) -> Any:
    kind = _resolved(view, kind)
    knobs = view.channel.knobs(device=next(iter(view.params.values())).device)
    if kind == "graded":
        return vmap(lambda m: _graded(view, knobs, m))(view.message)
    if kind == "cosine":
        return view.decoded()
    if kind == "straight_through" and _has_middle(view):
        return view.decoded()
    if kind == "weighted" and view.channel.stages and not view.client.rows:
        return vmap(lambda m: _weighted(view, knobs, m))(view.message)
    if kind == "cells" and not _is_plain(view):
        if _has_cell(view):
            lo, hi = vmap(lambda m: view.channel.cell(knobs, m, view.like, view.leg))(view.message)
            return Box(lo, hi, {})
        if _has_moments(view):
            return vmap(lambda m: _moments(view, knobs, m))(view.message)
        return view.message
    decoded = view.decoded()
    return Point(decoded, {}, {})


def is_noisy(view: View, kind: str) -> bool:
    """Whether the message gives numbers with a random error, so that even the truth does not fit it exactly."""
    kind = _resolved(view, kind)
    return kind == "graded" or (
        kind == "cells" and bool(view.channel.stages) and not _has_cell(view) and _has_moments(view)
    )


KURTOSIS = {"uniform": 2.4, "normal": 3.0, "laplace": 6.0}
"""E r⁴/(E r²)² of a stage's error; a fair coin between two grid points at its average over the place between them."""


ROUNDING = 1.8
"""The same of an error that is uniform in its cell."""


def effective(view: View, update: Tree, goal: Box | Point) -> Tensor:
    """How many of a message's errors count, `[lane]`: κ·(Σ r²)²/Σ r⁴ of the weighted residuals r.

    κ is the kurtosis of the widest law in the channel, so that n equal errors count as n: a fine grid gives
    all coordinates, a grid so coarse that most codes are zero the few others.
    """
    laws = [KURTOSIS[s.noise] for s in view.channel.stages if s.noise] or [ROUNDING]
    squares = [goal.weight.get(k, 1) * (u - goal.lo[k]).square() for k, u in update.items()]
    total = torch.stack([q.flatten(1).sum(1) for q in squares]).sum(0)
    fourth = torch.stack([q.flatten(1).square().sum(1) for q in squares]).sum(0)
    return max(laws) * total.square() / fourth.clamp(min=1e-38)


def excess(view: View, update: Tree, goal: Any, pixels: int) -> Tensor:
    """By what share the best guess is expected to miss the best fit, `[lane]`; 0 where a lane's message is exact.

    n errors and p free pixels: the truth misses it by p/(n − p). The best prior weight leaves about half of the
    pixels free and so fits half as much of the noise.
    """
    count = effective(view, update, goal)
    noisy = is_point(goal) if isinstance(goal, Box | Point) else count > 0
    return torch.where(noisy, 0.5 * pixels / (count - pixels).clamp(min=1), 0)


def size(view: View, kind: str, goal: Any) -> Tensor:
    """The misfit of an update of zero, `[lane]`, so that evidence runs from 1 to 0 on every net and channel."""
    kind = _resolved(view, kind)
    if kind == "cosine":
        return torch.ones(view.lanes, device=next(iter(view.params.values())).device)
    if (kind == "weighted" and not view.client.rows) or (
        kind == "cells" and not _is_plain(view) and not _has_cell(view)
    ):
        rows = (view.client.count,) * view.client.rows
        zero = {k: v.new_zeros(view.lanes, *rows, *v.shape) for k, v in view.like.items()}
        return value_and_slope(objective(view, kind), zero, goal)[0].clamp(min=1e-30)
    decoded = view.decoded()
    whole = vmap(tree.dot)(decoded, decoded).clamp(min=1e-30)
    if kind == "graded":
        zero = {k: torch.zeros_like(v) for k, v in decoded.items()}
        weighed = value_and_slope(objective(view, kind), zero, goal)[0].clamp(min=1e-30)
        return torch.where(is_point(goal), weighed, whole)
    return whole


def value_and_slope(objective: Objective, update: Tree, goal: Any) -> tuple[Tensor, Tree]:
    """Misfit `[lane]` and its gradient in the update, for all lanes: `{name: [lane …]}` each."""
    if not objective.box:
        slope, value = vmap(grad_and_value(objective.misfit))(update, goal)
        return value, slope
    value, half = pulled(outside(update, goal), goal.weight)
    return value, {k: 2 * v for k, v in half.items()}


def half_slope(objective: Objective) -> Slope:
    """The same as the explicit formulas want it: half the gradient, and a point taken off the update as it is made."""

    def half(update: Tree, goal: Any) -> tuple[Tensor, Tree]:
        if isinstance(goal, Point) and objective.box:
            return pulled(update, goal.weight)
        if objective.box:
            return pulled(outside(update, goal), goal.weight)
        value, slope = value_and_slope(objective, update, goal)
        return value, {k: 0.5 * v for k, v in slope.items()}

    def less(goal: Any) -> dict[str, Any] | None:
        if not objective.box:
            return None
        return goal.at | goal.splits if isinstance(goal, Point) else boxes.cells(goal)

    return Slope(half, less)


def _distance(update: Tree, goal: Box | Point) -> Tensor:
    squares = {k: e.square() for k, e in outside(update, goal).items()}
    return torch.stack([(goal.weight[k] * v if k in goal.weight else v).sum() for k, v in squares.items()]).sum()


def _cosine(update: Tree, decoded: Tree) -> Tensor:
    lengths = (tree.dot(update, update) * tree.dot(decoded, decoded)).clamp(min=1e-30).sqrt()
    return 1 - tree.dot(update, decoded) / lengths


STILL = {"uniform": 0.5, "normal": 0.0, "laplace": 0.0}
"""The middle of every draw: rounding to nearest, no noise."""


def _straight_through(view: View, knobs: Any, update: Tree, decoded: Tree) -> Tensor:
    channel, like = Channel(view.channel.legs), view.like
    still = {k: v.detach() for k, v in update.items()}
    noise = [
        tuple({k: torch.full_like(v, STILL[s.noise or ""]) for k, v in shape.items()} for s, shape in pairs)
        for pairs in (
            zip(leg.stages, each, strict=True) for leg, each in zip(channel.legs, channel.draws(still), strict=True)
        )
    ]
    messages, _ = channel.send(knobs, still, tuple(noise), channel.init(like), like)
    sent = channel.receive(knobs, messages[-1], like)
    error = {k: u + (sent[k] - still[k]) - decoded[k] for k, u in update.items()}
    return tree.dot(error, error)


def _has_middle(view: View) -> bool:
    """A channel that can be sent without drawing: nobody knows which coordinates a coin would have kept."""
    stages = view.channel.stages
    return bool(stages) and not any(s.kind == "join" or (s.kind == "select" and s.noise) for s in stages)


def _weighted(view: View, knobs: Any, message: Message) -> Box | Point:
    """Weight 1/step² of every tensor, step being the middle cell's width, or the decoded numbers' size where it is open."""
    decoded = view.channel.receive(knobs, message, view.like, view.leg)
    size = {k: v.square().mean().sqrt() if v.numel() else v.new_ones(()) for k, v in decoded.items()}
    step = size
    if _has_cell(view):
        lo, hi = view.channel.cell(knobs, message, view.like, view.leg)
        wide = {k: (hi[k] - lo[k]).flatten() for k in lo if lo[k].numel()}
        middle = {k: w.kthvalue((w.numel() + 1) // 2).values for k, w in wide.items()}
        step = {k: torch.where(middle[k].isfinite(), middle[k], size[k]) if k in middle else size[k] for k in size}
    elif _has_moments(view):
        step = {k: w.clamp(min=1e-30).rsqrt().sum() for k, w in _moments(view, knobs, message).weight.items()}
    weight = {k: (1 / v.clamp(min=1e-15).square()).reshape((1,) * decoded[k].ndim) for k, v in step.items()}
    return Point(decoded, weight, {})


FINE = 0.01
"""Share of ‖decoded‖² up to which rounding errors count as small noise; chosen on other images than any recipe's."""


def _resolved(view: View, kind: str) -> str:
    """The name "graded" says something of its own only where the leg is one deterministic code."""
    if kind != "graded":
        return kind
    stages = view.channel.stages
    grid = len(stages) == 1 and stages[0].kind == "code" and _has_cell(view) and not view.client.rows
    return "graded" if grid else "cells"


def _graded(view: View, knobs: Any, message: Message) -> Box | Point:
    """The cell of a lane, or where the grid is even and fine its decoded numbers with weight ½/variance per tensor."""
    decoded = view.channel.receive(knobs, message, view.like, view.leg)
    lo, hi = view.channel.cell(knobs, message, view.like, view.leg)
    width = {k: (hi[k] - lo[k]).flatten() for k in lo if lo[k].numel()}
    even = torch.stack([w.amax() <= 1.05 * w.median() + 1e-30 for w in width.values()]).all()  # half a cell at the ends
    var = {k: w.square().mean() / 12 for k, w in width.items()}
    noise = torch.stack([v * width[k].numel() for k, v in var.items()]).sum()
    fine = even & (noise <= FINE * tree.dot(decoded, decoded))
    least = torch.stack([torch.where(v > 0, v, torch.inf) for v in var.values()]).amin()
    least = torch.where(least.isfinite(), least, 1)
    weight = {}
    for k, v in decoded.items():
        known = var.get(k, least)
        weighed = 0.5 / torch.where(known > 0, known, least)
        weight[k] = torch.where(fine, weighed, 1.0).to(v).reshape((1,) * v.ndim)
    at = {k: (torch.where(fine, v, lo[k]), torch.where(fine, v, hi[k])) for k, v in decoded.items()}
    return Box({k: a for k, (a, _) in at.items()}, {k: b for k, (_, b) in at.items()}, weight)


def _moments(view: View, knobs: Any, message: Message) -> Box | Point:
    """Decoded number of every coordinate and ½/variance of every tensor; several rounds count as their mean."""
    channel = view.channel
    if isinstance(channel, Rounds):
        at, var = vmap(lambda m: channel.moments(knobs, m, view.like, view.leg))(message)
        at, var = {k: v.mean(0) for k, v in at.items()}, {k: v.mean(0) / channel.times for k, v in var.items()}
    else:
        at, var = channel.moments(knobs, message, view.like, view.leg)
    # One weight a tensor: buckets of very unequal norm would make a problem that L-BFGS cannot walk through.
    mean = {k: v.sum() / max(v.numel(), 1) for k, v in var.items()}
    known = torch.stack([torch.where(v > 0, v, torch.inf) for v in mean.values()]).amin()
    best = torch.where(known.isfinite(), known, 1)  # a tensor that was sent exactly weighs like the best-known one
    weight = {k: (0.5 / torch.where(v > 0, v, best)).reshape((1,) * at[k].ndim) for k, v in mean.items()}
    return Point(at, weight, {})


def _is_plain(view: View) -> bool:
    return not view.channel.stages


def _has_cell(view: View) -> bool:
    return view.channel.has_cell(view.leg)


def _has_moments(view: View) -> bool:
    return view.channel.has_moments(view.leg)
