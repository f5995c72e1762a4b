"""Gradient matching: images whose update looks like the message. The iterative attacks of the package.

One state machine serves them all: an objective of the update, a way to the labels, an image prior
whose weight fades in stages, and a batched optimizer. A lane leaves a stage when its steps are used
up, and hands in the stage that a rule without a look at the truth picks (`stages.pick`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.func import vmap

from qleak import random
from qleak.attacks import labels, objectives, priors, routes, stages
from qleak.attacks.closed_form import refuse, solve_lanes
from qleak.client import View, one_hot
from qleak.types import Attack, Guess, Info, Optimizer, Status, Tree

STARTS: dict[str, random.Draw] = {
    "normal": random.normal,
    "uniform": random.uniform,
    "dark": lambda gen, shape: 0.1 * random.uniform(gen, shape),
    "solved": lambda gen, shape: 0.1 * random.uniform(gen, shape),  # where there is nothing to solve
}


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


@dataclass(frozen=True)
class Settings:
    """What distinguishes one matching attack from another.

    Attributes:
        objective: see `qleak.attacks.objectives`.
        labels: "joint" optimises soft labels with the image, "inferred" reads them off first, "errors"
            optimises the output error from its decoded value (see `cells`), "auto" does so where a code
            has more than two bits and infers labels elsewhere.
        slack: unit in which output errors move, in parts of their decoded norm.
        weights: prior weight of each stage; one stage of weight 0 means no prior.
        fade: factor between stages, for a last stage on a channel that is not exact.
        steps: closures of each stage.
        relative: divide the evidence by that of an update of zero, so that weights mean the same on every net.
        box: weight of the penalty on pixels outside [0, 1], times the prior weight or 1.
        patience: closures without 1 % improvement after which a lane counts as converged; 0 never.
        tolerance: a lane whose loss changes by less than this for 20 closures on end has converged; 0 never.
        gain: a stage that lowers the evidence by less than this share is the last one; see `stages.pick`.
        path: go on to the weakest prior in any case, so that the choice can be compared with the others.
    """

    objective: str
    optimizer: Optimizer
    labels: str = "inferred"
    slack: float = 1.0
    weights: tuple[float, ...] = (0.0,)
    fade: float = 0.1
    steps: tuple[int, ...] = (6000,)
    relative: bool = False
    box: float = 0.0
    start: str = "normal"
    patience: int = 0
    tolerance: float = 0.0
    gain: float = 0.0
    path: bool = False
    route: str = "auto"


def matching(settings: Settings, papers: Sequence[str]) -> Attack:
    """The attack that `settings` describe."""
    has_prior = any(settings.weights)

    def applies(view: View) -> str:
        why = refuse(view.model.layers) if settings.start == "solved" else ""
        if why:
            return why
        if settings.labels != "joint" and view.labels is None and view.client.batch > 1:
            return "needs labels that are given, or the gradient of one image to infer them from."
        if settings.labels == "joint" or labels.infer(view) is not None:
            return ""
        return "needs a last linear layer with a gradient to infer the label from, or labels that are given."

    def draw(gen: Generator, view: View) -> Tree:
        start = {"x": STARTS[settings.start](gen, (view.client.batch, *view.model.shape))}
        if settings.labels == "joint":
            start["logits"] = random.normal(gen, (view.client.batch, view.model.classes))
        return start

    def init(view: View, start: Tree) -> MatchState:
        if settings.start == "solved" and view.evidence:
            start = {**start, "x": solve_lanes(view)[0].clamp(0, 1).to(start["x"])}
        x = torch.cat([start[k].flatten(1) for k in start], 1)
        decoded = view.decoded()
        if given(view) == "errors":
            bias = labels.last_bias(decoded, view.model.classes)
            assert bias is not None
            unit = settings.slack * bias.norm(dim=-1, keepdim=True).clamp(min=1e-30)
            x = torch.cat([x, bias / unit], 1)
        else:
            unit = x.new_ones(len(x), 1)
        inferred = None if settings.labels == "joint" else labels.infer(view)
        lane = x.new_zeros(len(x))
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        known = inferred if inferred is not None else count[:, None].expand(-1, view.client.batch).clone()
        inf = lane + torch.inf
        status = count if view.evidence or has_prior else count + Status.FINISHED
        goal = objectives.goal(view, settings.objective)
        size = objectives.size(view, settings.objective, goal) if settings.relative else lane + 1
        points = len(settings.steps)
        return MatchState(
            x=x, optimizer=settings.optimizer.init(x), goal=goal, size=size, unit=unit, labels=known,
            stage=count, since=count.clone(), best_x=x, best_loss=inf, best_evidence=inf,
            trail=x[:, None].expand(-1, points, -1).clone() if points > 1 else x[:, None],
            trace=inf[:, None].expand(-1, points).clone(), trail_loss=inf[:, None].expand(-1, points).clone(),
            last_loss=inf, still=count.clone(), mark_loss=inf, mark_since=count.clone(), status=status,
        )  # fmt: skip

    def given(view: View) -> str:
        wanted = settings.labels == "errors" or (settings.labels == "auto" and labels.readable(view))
        known = wanted and view.client.batch == 1 and not view.client.rows
        return "errors" if known and labels.last_bias(view.params, view.model.classes) is not None else "labels"

    def split(view: View, state: MatchState) -> tuple[Tensor, Tensor]:
        """Images, and what is given to the loss: label probabilities or output errors `[lane b class]`."""
        pixels = view.client.batch * torch.Size(view.model.shape).numel()
        images = state.x[:, :pixels].unflatten(1, (view.client.batch, *view.model.shape))
        rest = state.x[:, pixels:]
        if settings.labels == "joint":
            return images, torch.softmax(rest.unflatten(1, (view.client.batch, -1)), -1)
        if given(view) == "errors":
            return images, (state.unit * rest)[:, None]
        return images, one_hot(state.labels, view.model.classes, images.dtype)

    def step(view: View, state: MatchState) -> tuple[MatchState, Info]:
        images, target = split(view, state)
        weights = torch.tensor(
            stages.weights(settings.weights, settings.fade, view), dtype=images.dtype, device=images.device
        )
        weight = weights[state.stage]
        evidence, dx, dt = _evidence(view, settings, state, images, target, given(view))
        gradient = [dx.flatten(1)]
        loss = evidence
        if has_prior:
            value, slope = _prior(images, weight, settings.box)
            loss = loss + value
            gradient = [gradient[0] + slope.flatten(1)]
        if settings.labels == "joint":  # from probabilities to logits: the softmax's own derivative
            gradient.append((target * (dt - (dt * target).sum(-1, keepdim=True))).flatten(1))
        elif given(view) == "errors":
            gradient.append(state.unit * dt[:, 0])
        flat = torch.cat(gradient, 1)
        broken = ~(loss.isfinite() & flat.isfinite().all(-1))
        loss = torch.where(broken, torch.inf, loss)
        better = loss < state.best_loss
        state = state._replace(
            best_x=torch.where(better[:, None], state.x, state.best_x),
            best_loss=torch.where(better, loss, state.best_loss),
            best_evidence=torch.where(better, evidence, state.best_evidence),
        )
        x, inner_state = settings.optimizer.update(state.optimizer, state.x, loss, flat)
        state = state._replace(x=x, optimizer=inner_state, since=state.since + 1, mark_since=state.mark_since + 1)
        # A line search recovers from a broken trial by itself; an accepted one is lost.
        lost = broken & ~x.isfinite().all(-1)
        state = state._replace(status=torch.where(lost, Status.DIVERGED, state.status))
        still = torch.where((loss - state.last_loss).abs() < settings.tolerance, state.still + 1, 0)
        state = state._replace(last_loss=loss, still=still)
        state = _advance(settings, view, state)
        return state, Info(state.best_loss, state.status)

    def excess(view: View, state: MatchState) -> Tensor:
        """By what share the truth is expected to miss the best fit, `[lane]`; 0 where the message is exact."""
        if not (settings.relative and view.evidence and objectives.is_noisy(view, settings.objective)):
            return torch.zeros_like(state.size)
        images, target = split(view, state._replace(x=state.best_x))
        update = vmap(lambda x, t: routes.update_of(view, x, t, given(view)))(images, target)
        count = objectives.effective(view, update, state.goal)
        pixels = torch.Size(images.shape[1:]).numel()
        return pixels / (count - pixels).clamp(min=1)

    def read(view: View, state: MatchState) -> Guess:
        state = _recorded(state, torch.ones_like(state.status, dtype=torch.bool))
        chosen, _ = stages.pick(state.trace, excess(view, state), settings.gain)
        at = torch.arange(len(chosen), device=chosen.device)
        images, target = split(view, state._replace(x=state.trail[at, chosen]))
        guessed = target.argmax(-1) if settings.labels == "joint" else state.labels
        path = None
        if settings.path:  # stages not reached repeat the one handed in
            there = state.trace.isfinite()[..., None]
            pixels = images[0].numel()
            path = torch.where(there, state.trail, state.trail[at, chosen][:, None])[..., :pixels]
            path = path.unflatten(2, images.shape[1:])
        return Guess(images, guessed, state.trail_loss[at, chosen], path)

    return Attack(
        draw, init, step, read, sum(settings.steps), applies, tuple(papers), has_prior, settings.start != "solved"
    )


def _evidence(
    view: View, settings: Settings, state: MatchState, images: Tensor, target: Tensor, given: str
) -> tuple[Tensor, Tensor, Tensor]:
    if not view.evidence:
        return images.new_zeros(len(images)), torch.zeros_like(images), torch.zeros_like(target)
    closure = routes.closure(view, objectives.objective(view, settings.objective), settings.route, given)
    value, dx, dt = closure(images, target, state.goal)
    wide = state.size.view(-1, 1, 1)
    return value / state.size, dx / wide[..., None, None], dt / wide


def _prior(images: Tensor, weight: Tensor, box: float) -> tuple[Tensor, Tensor]:
    x = images.detach().requires_grad_()
    value = weight * vmap(priors.total_variation)(x) + box * vmap(priors.box)(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), slope


def _advance(settings: Settings, view: View, state: MatchState) -> MatchState:
    """Ends stages that are over, and lanes that are done."""
    active = state.status == Status.ACTIVE
    state = state._replace(status=torch.where(active & (state.still >= 20), Status.CONVERGED, state.status))
    if settings.patience:
        improved = state.best_loss < 0.99 * state.mark_loss
        state = state._replace(
            mark_loss=torch.where(improved, state.best_loss, state.mark_loss),
            mark_since=torch.where(improved, 0, state.mark_since),
        )
        stuck = (state.status == Status.ACTIVE) & (state.mark_since >= settings.patience)
        state = state._replace(status=torch.where(stuck, Status.CONVERGED, state.status))
    budget = torch.tensor(settings.steps, device=state.x.device)
    over = (state.since >= budget[state.stage]) & (state.status == Status.ACTIVE)
    state = _recorded(state, over)
    final = state.stage == len(settings.steps) - 1
    whole = settings.path or objectives.is_noisy(view, settings.objective)
    settled = stages.pick(state.trace, torch.zeros_like(state.size), settings.gain)[1]
    done = over & (final | (settled & (not whole)))
    following = over & ~done
    return state._replace(
        status=torch.where(done, Status.FINISHED, state.status),
        stage=state.stage + following,
        since=torch.where(following, 0, state.since),
        x=torch.where(following[:, None], state.best_x, state.x),
        best_loss=torch.where(following, torch.inf, state.best_loss),
        optimizer=settings.optimizer.restart(state.optimizer, following),
    )


def _recorded(state: MatchState, over: Tensor) -> MatchState:
    """The best of the present stage, written into the trail of the lanes `over`."""
    here = over[:, None] & (torch.arange(state.trace.shape[1], device=over.device) == state.stage[:, None])
    here = here & state.best_loss.isfinite()[:, None]
    return state._replace(
        trail=torch.where(here[..., None], state.best_x[:, None], state.trail),
        trace=torch.where(here, state.best_evidence[:, None], state.trace),
        trail_loss=torch.where(here, state.best_loss[:, None], state.trail_loss),
    )
