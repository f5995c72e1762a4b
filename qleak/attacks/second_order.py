"""Gradient inversion as nonlinear least squares: Levenberg–Marquardt over lanes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.func import vmap

from qleak import random, tree
from qleak.attacks import boxes, gauss_newton, labels, objectives, priors, routes, stages
from qleak.attacks.device import finite
from qleak.attacks.drive import lanes_at
from qleak.catalog import factory
from qleak.check import at_least, between, one_of, positive, whole
from qleak.client import View, one_hot
from qleak.types import Attack, Guess, Info, Status, Tree

PAPERS = (
    "Levenberg. A method for the solution of certain non-linear problems in least squares. 1944.",
    "Marquardt. An Algorithm for Least-Squares Estimation of Nonlinear Parameters. 1963.",
    "Nielsen. Damping Parameter in Marquardt's Method. 1999 (gain ratio; Madsen, Nielsen, Tingleff 2004).",
    "Nocedal, Wright. Numerical Optimization. 2006, chapters 7.1 and 10.3.",
)
STARTS = {
    "dark": lambda gen, shape: 0.1 * random.uniform(gen, shape),
    "uniform": random.uniform,
    "normal": random.normal,
}


class MarquardtState(NamedTuple):
    """`lane` first everywhere.

    `x` is the flat vector under optimisation (images, then output errors in units of `unit`); a rejected step is
    undone, so it is also the best of its stage. `damping` is λ (0: not chosen yet), `growth` its factor at the next
    rejection. `trail [lane stage n]` and `trace [lane stage]` hold guess and evidence of every stage left.
    """

    x: Tensor
    goal: boxes.Box | boxes.Point
    size: Tensor
    unit: Tensor
    labels: Tensor
    damping: Tensor
    growth: Tensor
    stage: Tensor
    since: Tensor
    loss: Tensor
    trail: Tensor
    trace: Tensor
    trail_loss: Tensor
    status: Tensor


@factory
def levenberg_marquardt(
    weight: float = 0.1,
    fade: float = 0.1,
    stages: int = 6,
    steps: int = 4,
    last: int = 40,
    iterations: int = 60,
    forcing: float = 0.01,
    tau: float = 1e-3,
    settle: float = 0.2,
    gain: float = 0.02,
    slack: float = 0.01,
    start: str = "dark",
) -> Attack:
    """The attacker of `cells`, whose misfit is a sum of squares, by Levenberg–Marquardt in place of L-BFGS.

    Minimises ‖√w·(u(x) − proj_box u(x))‖²/‖decoded‖² + weight·TV(x) + box(x), u the client's update. One step
    linearises u and solves (JᵀMwJ + P + λI) δ = −gradient by conjugate gradients, M masking coordinates inside
    their cell, P the reweighted total variation. λ follows the gain ratio ρ of actual to predicted decrease: a
    step with ρ ≤ 0 is undone and λ grows by 2, 4, 8 …; otherwise λ is multiplied by max(1/3, 1 − (2ρ − 1)³).

    One step is not one closure: it costs two updates, one reverse pass that keeps its graph, and per conjugate
    gradient iteration one J v and one Jᵀ w, each about as dear as a reverse pass; with all `iterations` about
    as much CPU time as that many closures of `cells`. JᵀJ is so ill-conditioned that conjugate gradients need more of
    them than L-BFGS does over a whole attack: on the untrained colour LeNet `cells` is ahead at equal CPU time.

    Args:
        weight: prior weight of the first stage.
        fade: factor from one stage to the next.
        stages: number of stages with a prior.
        steps: largest number of steps in each of them.
        last: largest number of steps of the final stage, without a prior on an exact channel.
        iterations: conjugate gradient iterations of one step at most.
        forcing: relative residual at which conjugate gradients stop.
        tau: first λ in parts of the curvature along the gradient.
        settle: an accepted step that lowers the objective by a smaller share ends its stage (not the final one).
        gain: a stage that lowers the evidence by less than this share is handed in, see `stages.pick`.
        slack: unit in which the output error moves beside the pixels, see `cells`.
        start: "dark" (uniform in [0, 0.1)), "uniform" in [0, 1) or "normal".
    """
    whole(stages=stages, steps=steps, last=last, iterations=iterations)
    at_least(1, stages=stages, steps=steps, last=last, iterations=iterations)
    positive(weight=weight, tau=tau, slack=slack)
    between(1e-6, 1, fade=fade)
    between(0, 1, gain=gain, settle=settle, forcing=forcing)
    one_of(STARTS, start=start)
    budget = (steps,) * stages + (last,)
    path = (*(weight * fade**i for i in range(stages)), 0.0)

    def applies(view: View) -> str:
        if not objectives.objective(view, "cells").box:
            return "needs a message that pins the update to a box: this channel's reading is no sum of squares."
        if labels.infer(view) is None:
            return "needs a last linear layer with a gradient to infer labels from, or labels that are given."
        return ""

    def draw(gen: Generator, view: View) -> Tree:
        return {"x": STARTS[start](gen, (view.client.batch, *view.model.shape))}

    def init(view: View, begin: Tree) -> MarquardtState:
        x = begin["x"].flatten(1)
        unit = x.new_ones(len(x), 1)
        if _given(view) == "errors":
            unit, error = labels.error_in_units(view, slack)
            x = torch.cat([x, error], 1)
        known = labels.infer(view)
        assert known is not None
        lane = x.new_zeros(len(x))
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        goal = objectives.goal(view, "cells")
        return MarquardtState(
            x=x, goal=goal, size=objectives.size(view, "cells", goal), unit=unit, labels=known, damping=lane,
            growth=lane + 2, stage=count, since=count.clone(), loss=lane + torch.inf,
            trail=x[:, None].expand(-1, len(budget), -1).clone(),
            trace=(lane + torch.inf)[:, None].expand(-1, len(budget)).clone(),
            trail_loss=(lane + torch.inf)[:, None].expand(-1, len(budget)).clone(), status=count.clone(),
        )  # fmt: skip

    def step(view: View, state: MarquardtState) -> tuple[MarquardtState, Info]:
        active = torch.nonzero(state.status == Status.ACTIVE)[:, 0]
        if 0 < len(active) < len(state.x):  # lanes that are done cost nothing until they are taken out
            part, _ = step(view.at(active), lanes_at(state, active))
            state = tree.nested_map(lambda whole, new: whole.index_copy(0, active, new), state, part)
        elif len(active):
            state = _advance(view, _stepped(view, state))
        return state, Info(state.loss, state.status)

    def _stepped(view: View, state: MarquardtState) -> MarquardtState:
        weights = torch.tensor(_weights(view), dtype=state.x.dtype, device=state.x.device)[state.stage]
        lo, hi, pull = _flat(view, state)
        size = state.size[:, None]
        local = gauss_newton.linearize(lambda x: _update(view, state, x), state.x)
        error = local.value - local.value.clamp(lo, hi)
        evidence = (pull * error.square()).sum(1) / state.size
        outside = pull * ((error != 0) | (lo == hi)) / size
        images = _images(view, state.x)
        smooth = gauss_newton.smoothing(images, weights)
        off = images - images.clamp(0, 1)
        pixels = images[0].numel()

        def prior(p: Tensor) -> Tensor:
            picture = _images(view, p)
            bent = smooth(picture) + (off != 0) * picture / pixels
            return torch.cat([bent.flatten(1), torch.zeros_like(p[:, pixels:])], 1)

        slope = torch.cat([(smooth(images) + off / pixels).flatten(1), torch.zeros_like(state.x[:, pixels:])], 1)
        gradient = local.pull(pull * error / size) + slope
        loss = evidence + _prior(images, weights)
        along = (outside * local.push(gradient).square()).sum(1) + (gradient * prior(gradient)).sum(1)
        first = tau * along / gradient.square().sum(1).clamp(min=1e-38)
        damping = torch.where(state.damping > 0, state.damping, first.clamp(min=1e-30))
        delta = gauss_newton.solve(local, outside, prior, gradient, damping, iterations, forcing)
        trial = state.x + delta
        with torch.no_grad():
            moved = _update(view, state, trial)
        there = (pull * (moved - moved.clamp(lo, hi)).square()).sum(1) / state.size
        reached = there + _prior(_images(view, trial), weights)
        # Every iterate of conjugate gradients has δᵀ(H + λ)δ = −gᵀδ, so the model's decrease needs no product.
        predicted = -(gradient * delta).sum(1) + damping * delta.square().sum(1)
        ratio = (loss - reached) / predicted.clamp(min=1e-38)
        better = (reached < loss) & finite(trial)
        factor = (1 - (2 * ratio - 1).clamp(max=1) ** 3).clamp(1 / 3, 2)
        stuck = ~better & (damping > 1e8 * first)
        over = (better & (reached > (1 - settle) * loss)) | stuck
        state = state._replace(
            x=torch.where(better[:, None], trial, state.x),
            loss=torch.where(better, reached, loss),
            damping=torch.where(better, damping * factor, damping * state.growth).clamp(1e-30, 1e30),
            growth=torch.where(better, 2.0, (2 * state.growth).clamp(max=1e6)),
            since=state.since + 1,
            status=torch.where(loss.isfinite(), state.status, Status.DIVERGED),
        )
        final = state.stage == len(budget) - 1
        allowed = torch.tensor(budget, device=state.x.device)[state.stage]
        ended = torch.where(final, stuck, over)
        state = state._replace(since=torch.where(ended, allowed, state.since))
        return _recorded(state, torch.where(better, there, evidence))

    def _advance(view: View, state: MarquardtState) -> MarquardtState:
        allowed = torch.tensor(budget, device=state.x.device)[state.stage]
        over = (state.since >= allowed) & (state.status == Status.ACTIVE)
        final = state.stage == len(budget) - 1
        left = torch.arange(len(budget), device=over.device) < (state.stage + over)[:, None]
        settled = _pick(state._replace(trace=torch.where(left, state.trace, torch.inf)), torch.zeros_like(state.size))[
            1
        ]
        done = over & (final | (settled & (not objectives.is_noisy(view, "cells"))))
        following = over & ~done
        return state._replace(
            status=torch.where(done, Status.FINISHED, state.status),
            stage=state.stage + following,
            since=torch.where(following, 0, state.since),
            damping=torch.where(following, 0, state.damping),
            growth=torch.where(following, 2.0, state.growth),
        )

    def _pick(state: MarquardtState, excess: Tensor) -> tuple[Tensor, Tensor]:
        return pick(state.trace, excess, gain)

    def _weights(view: View) -> list[float]:
        return fading(path, fade, view)

    def read(view: View, state: MarquardtState) -> Guess:
        chosen, _ = _pick(state, _excess(view, state))
        at = torch.arange(len(chosen), device=chosen.device)
        return Guess(_images(view, state.trail[at, chosen]), state.labels, state.trail_loss[at, chosen])

    return Attack(draw, init, step, read, sum(budget), applies, PAPERS, prior=True)


pick, fading = stages.pick, stages.weights  # the factory's own `stages` is a number


def _given(view: View) -> str:
    return "errors" if labels.readable(view) and labels.one_error(view) else "labels"


def _images(view: View, x: Tensor) -> Tensor:
    pixels = view.client.batch * torch.Size(view.model.shape).numel()
    return x[:, :pixels].unflatten(1, (view.client.batch, *view.model.shape))


def _tree(view: View, state: MarquardtState, x: Tensor) -> Tree:
    """The client's update of every lane's guess `[lane n]`."""
    images, given = _images(view, x), _given(view)
    errors = given == "errors"
    rest = (state.unit * x[:, images[0].numel() :])[:, None]
    target = rest if errors else one_hot(state.labels, view.model.classes, x.dtype)
    return routes.updates(view, images, target, given)


def _update(view: View, state: MarquardtState, x: Tensor) -> Tensor:
    return torch.cat([v.flatten(1) for v in _tree(view, state, x).values()], 1)


def _flat(view: View, state: MarquardtState) -> tuple[Tensor, Tensor, Tensor]:
    """Box and weight `[lane d]`; the weight is zero in the prior-only control."""
    lo = torch.cat([v.flatten(1) for v in state.goal.lo.values()], 1)
    hi = torch.cat([v.flatten(1) for v in state.goal.hi.values()], 1)
    weight = torch.cat([(state.goal.weight.get(k, 1) + 0 * v).flatten(1) for k, v in state.goal.lo.items()], 1)
    return lo, hi, weight if view.evidence else torch.zeros_like(weight)


def _prior(images: Tensor, weight: Tensor) -> Tensor:
    return weight * vmap(priors.total_variation)(images) + vmap(priors.box)(images)


def _excess(view: View, state: MarquardtState) -> Tensor:
    """See `objectives.excess`; 0 where the message is exact."""
    if not (view.evidence and objectives.is_noisy(view, "cells")):
        return torch.zeros_like(state.size)
    with torch.no_grad():
        update = _tree(view, state, state.x)
    return objectives.excess(view, update, state.goal, view.client.batch * torch.Size(view.model.shape).numel())


def _recorded(state: MarquardtState, evidence: Tensor) -> MarquardtState:
    """The present guess, written into its stage's place of the trail."""
    lane = torch.arange(len(state.x), device=state.x.device)
    at = (lane, state.stage)
    good = state.loss.isfinite()
    return state._replace(
        trail=state.trail.index_put(at, torch.where(good[:, None], state.x, state.trail[at])),
        trace=state.trace.index_put(at, torch.where(good, evidence, state.trace[at])),
        trail_loss=state.trail_loss.index_put(at, torch.where(good, state.loss, state.trail_loss[at])),
    )
