"""Gradient matching: images whose update looks like the message. The iterative attacks of the package.

One state machine serves them all: an objective of the update, a way to the labels, an image prior
whose weight fades in stages, and a batched optimizer. A lane leaves a stage when its steps are used
up, and hands in the stage that a rule without a look at the truth picks (`stages.pick`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.func import vmap

from qleak import random
from qleak.attacks import labels, objectives, penalties, priors, routes, stages
from qleak.attacks.closed_form import refuse, solve_lanes
from qleak.attacks.device import finite, maybe
from qleak.attacks.group import grouped
from qleak.attacks.settings import STARTS, Settings
from qleak.client import View, one_hot
from qleak.types import Attack, Guess, Info, Status, Tree


class MatchState(NamedTuple):
    """`lane` first everywhere.

    `x` is the flat vector under optimisation (images, then label logits); `goal` is what the
    objective worked out from the message, `size` what the evidence is divided by, and `unit` what
    output errors are counted in. `trail [lane stage d]` and `trace [lane stage]` hold the guess and the evidence of every stage left.
    """

    x: Tensor
    optimizer: Any
    goal: Any
    size: Tensor
    unit: Tensor
    labels: Tensor
    stage: Tensor
    since: Tensor
    best_x: Tensor
    best_loss: Tensor
    best_evidence: Tensor
    trail: Tensor
    trace: Tensor
    trail_loss: Tensor
    last_loss: Tensor
    still: Tensor
    mark_loss: Tensor
    mark_since: Tensor
    status: Tensor
    key: Tensor


def matching(settings: Settings, papers: Sequence[str]) -> Attack:
    """The attack that `settings` describe."""

    def applies(view: View) -> str:
        why = refuse(view.model.layers) if settings.start == "solved" else ""
        if why:
            return why
        if settings.labels == "joint" or labels.infer(view, settings.rule) is not None:
            return ""
        return "needs a last linear layer with a gradient to infer the label from, or labels that are given."

    def draw(gen: Generator, view: View) -> Tree:
        start = {"x": STARTS[settings.start](gen, (view.client.batch, *view.model.shape))}
        if settings.labels == "joint":
            start["logits"] = random.normal(gen, (view.client.batch, view.model.classes))
        elif view.client.steps > 1:  # which step saw which label is anybody's guess
            start["order"] = random.permutation(gen, view.client.batch).float()
        if settings.langevin:
            start["key"] = random.integers(gen, 2**24, (1,)).float()  # a float32 holds it exactly
        return start

    def init(view: View, start: Tree) -> MatchState:
        if settings.start == "solved" and view.evidence:
            start = {**start, "x": solve_lanes(view)[0].clamp(0, 1).to(start["x"])}
        x = torch.cat([start[k].flatten(1) for k in ("x", "logits") if k in start], 1)
        unit = x.new_ones(len(x), 1)
        if given(view) == "errors":
            unit, error = labels.error_in_units(view, settings.slack)
            x = torch.cat([x, error], 1)
        inferred = None if settings.labels == "joint" else labels.infer(view, settings.rule)
        if inferred is not None and "order" in start:
            inferred = inferred.gather(1, start["order"].to(torch.int64))
        lane = x.new_zeros(len(x))
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        known = inferred if inferred is not None else count[:, None].expand(-1, view.client.batch).clone()
        inf = lane + torch.inf
        status = count if view.evidence or settings.has_prior else count + Status.FINISHED
        goal = objectives.goal(view, settings.objective)
        size = objectives.size(view, settings.objective, goal) if settings.relative else lane + 1
        points = len(settings.steps)
        return MatchState(
            x=x, optimizer=settings.optimizer.init(x), goal=goal, size=size, unit=unit, labels=known,
            stage=count, since=count.clone(), best_x=x, best_loss=inf, best_evidence=inf,
            trail=x[:, None].expand(-1, points, -1).clone() if points > 1 else x[:, None],
            trace=inf[:, None].expand(-1, points).clone(), trail_loss=inf[:, None].expand(-1, points).clone(),
            last_loss=inf, still=count.clone(), mark_loss=inf, mark_since=count.clone(), status=status,
            key=start["key"][:, 0].to(torch.int64) if "key" in start else count.clone(),
        )  # fmt: skip

    def given(view: View) -> str:
        wanted = settings.labels == "errors" or (settings.labels == "auto" and labels.readable(view))
        return "errors" if wanted and labels.one_error(view) else "labels"

    def split(view: View, state: MatchState, kind: str) -> tuple[Tensor, Tensor]:
        """Images, and what is given to the loss: label probabilities or output errors `[lane b class]`."""
        pixels = view.client.batch * torch.Size(view.model.shape).numel()
        images = state.x[:, :pixels].unflatten(1, (view.client.batch, *view.model.shape))
        rest = state.x[:, pixels:]
        if settings.labels == "joint":
            return images, torch.softmax(rest.unflatten(1, (view.client.batch, -1)), -1)
        if kind == "errors":
            return images, (state.unit * rest)[:, None]
        return images, one_hot(state.labels, view.model.classes, images.dtype)

    def step(view: View, state: MatchState) -> tuple[MatchState, Info]:
        kind = given(view)
        images, target = split(view, state, kind)
        weights = torch.tensor(
            stages.weights(settings.weights, settings.fade, view), dtype=images.dtype, device=images.device
        )
        weight = weights[state.stage]
        evidence, dx, dt = _evidence(view, settings, state, images, target, kind)
        gradient = [dx.flatten(1)]
        loss = evidence
        if settings.has_prior:
            value, slope = _prior(view, settings, images, target, weight)
            loss = loss + value
            gradient = [gradient[0] + slope.flatten(1)]
        if settings.labels == "joint":  # from probabilities to logits: the softmax's own derivative
            gradient.append((target * (dt - (dt * target).sum(-1, keepdim=True))).flatten(1))
        elif kind == "errors":
            gradient.append(state.unit * dt[:, 0])
        flat = torch.cat(gradient, 1)
        broken = ~(loss.isfinite() & finite(flat))
        loss = torch.where(broken, torch.inf, loss)
        better = loss < state.best_loss
        state = state._replace(
            best_x=torch.where(better[:, None], state.x, state.best_x),
            best_loss=torch.where(better, loss, state.best_loss),
            best_evidence=torch.where(better, evidence, state.best_evidence),
        )
        if settings.langevin:
            flat = flat + settings.langevin * random.counted(state.key, state.since, flat.shape[1]).to(flat)
        x, inner_state = settings.optimizer.update(state.optimizer, state.x, loss, flat)
        if settings.clamp:
            pixels = images[0].numel()
            x = torch.cat([x[:, :pixels].clamp(0, 1), x[:, pixels:]], 1)
        state = state._replace(x=x, optimizer=inner_state, since=state.since + 1, mark_since=state.mark_since + 1)
        if maybe(broken):  # a line search recovers from a broken trial by itself; an accepted one is lost
            state = state._replace(status=torch.where(broken & ~finite(x), Status.DIVERGED, state.status))
        still = torch.where((loss - state.last_loss).abs() < settings.tolerance, state.still + 1, 0)
        state = state._replace(last_loss=loss, still=still)
        state = stages.advance(settings, state, settings.path or objectives.is_noisy(view, settings.objective))
        return state, Info(state.best_loss, state.status)

    def excess(view: View, state: MatchState) -> Tensor:
        """See `objectives.excess`; 0 where the prior's weight means nothing."""
        if not (settings.relative and view.evidence and objectives.is_noisy(view, settings.objective)):
            return torch.zeros_like(state.size)
        kind = given(view)
        images, target = split(view, state._replace(x=state.best_x), kind)
        update = vmap(lambda x, t: routes.update_of(view, x, t, kind))(images, target)
        return objectives.excess(view, update, state.goal, images[0].numel())

    def read(view: View, state: MatchState) -> Guess:
        state = stages.recorded(state, torch.ones_like(state.status, dtype=torch.bool))
        chosen, _ = stages.pick(state.trace, excess(view, state), settings.gain)
        at = torch.arange(len(chosen), device=chosen.device)
        images, target = split(view, state._replace(x=state.trail[at, chosen]), given(view))
        guessed = target.argmax(-1) if settings.labels == "joint" else state.labels
        path = None
        if settings.path:  # stages not reached repeat the one handed in
            there = state.trace.isfinite()[..., None]
            pixels = images[0].numel()
            path = torch.where(there, state.trail, state.trail[at, chosen][:, None])[..., :pixels]
            path = path.unflatten(2, images.shape[1:])
        return Guess(images, guessed, state.trail_loss[at, chosen], path)

    made = Attack(
        draw, init, step, read, sum(settings.steps), applies, tuple(papers), settings.has_prior,
        settings.start not in ("solved", "zeros"),
    )  # fmt: skip
    return grouped(made, settings.group) if settings.group > 1 else made


def _evidence(
    view: View, settings: Settings, state: MatchState, images: Tensor, target: Tensor, given: str
) -> tuple[Tensor, Tensor, Tensor]:
    if not view.evidence:
        return images.new_zeros(len(images)), torch.zeros_like(images), torch.zeros_like(target)
    closure = routes.closure(view, objectives.objective(view, settings.objective), settings.route, given)
    value, dx, dt = closure(images, target, state.goal)
    size = state.size / settings.factor
    wide = size.view(-1, 1, 1)
    return value / size, dx / wide[..., None, None], dt / wide


def _prior(view: View, settings: Settings, images: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = images.new_zeros(len(images)), torch.zeros_like(images)
    if any(settings.weights):
        value, slope = priors.value_and_slope(images, weight, settings.box)
    if not settings.penalties:
        return value, slope
    x, target = images.detach().requires_grad_(), target.detach()
    parts = [f * penalties.PENALTIES[name](view, x, target, settings.group) for name, f in settings.penalties]
    extra = torch.stack(parts).sum(0)
    (more,) = torch.autograd.grad(extra.sum(), x)
    return value + extra.detach(), slope + more
