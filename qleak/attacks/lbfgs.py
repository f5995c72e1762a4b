"""Batched L-BFGS in compact form: every lane its own history, one closure per lane and step.

The inverse Hessian of a lane is γI + [S γY] M [S γY]ᵀ (Byrd, Nocedal, Schnabel 1994, theorem 2.2),
so a direction costs two batched passes over the pairs and no loop over the history. M is made of YᵀY, the diagonal
of SᵀY and R⁻¹, R the upper triangle of SᵀY by age. The inverse itself is kept: a new pair adds one column to it, as in
the usual inversion of a triangle column by column, and dropping the oldest pair drops a row and a column. None of that
asks where in the triangle a pair stands, so pairs and matrices sit in a ring and nothing is ever put in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qleak import native
from qleak.attacks.device import maybe
from qleak.catalog import factory
from qleak.check import at_least, positive, whole
from qleak.types import Optimizer


class LbfgsState(NamedTuple):
    """`lane` first everywhere. `stored` pairs are there since the last restart; `calls` counts updates.

    Place i of the ring holds `pairs [lane m+1 2 d]` (sᵢ, yᵢ), row i of `diagonal [lane m+1]` (sᵢᵀyᵢ), `inverse [lane m+1 m+1]` (R⁻¹)
    and `yy` (YᵀY); places without a pair are zero in the last three. Into place m, which nobody reads, go the pairs
    that are not stored: so every lane writes, and none asks first.
    """

    calls: Tensor
    stored: Tensor
    pairs: Tensor
    diagonal: Tensor
    inverse: Tensor
    yy: Tensor
    gamma: Tensor
    x: Tensor
    loss: Tensor
    grad: Tensor
    direction: Tensor
    step: Tensor
    slope: Tensor
    started: Tensor


@factory
def lbfgs(history: int = 100, armijo: bool = True, lr: float = 1.0, shrink: float = 0.5) -> Optimizer:
    """Limited-memory BFGS (Liu & Nocedal 1989).

    Without line search it takes torch.optim.LBFGS's steps: first −g·min(1, 1/‖g‖₁)·lr, then −Hg·lr,
    a pair is stored when sᵀy > 1e-10. With `armijo` a step that does not lower the loss enough
    (f > f₀ + 1e-4·t·gᵀd) is shortened and tried again at the next call.

    Args:
        history: pairs kept; fewer than about 100 do not converge on gradient matching.
        armijo: backtrack, or accept every step as the 2019 attack does.
        lr: length of the first trial along a direction.
        shrink: factor of a rejected step.
    """
    whole(history=history)
    at_least(1, history=history)
    positive(lr=lr, shrink=shrink)

    def init(x: Tensor) -> LbfgsState:
        lanes, d = x.shape
        lane, places = x.new_zeros(lanes), history + 1
        gram = torch.zeros(lanes, places, places, dtype=torch.float64, device=x.device)
        count = torch.zeros(lanes, dtype=torch.int64, device=x.device)
        return LbfgsState(
            calls=torch.zeros((), dtype=torch.int64), stored=count, pairs=x.new_zeros(lanes, places, 2, d),
            diagonal=gram[:, 0].clone(), inverse=gram, yy=gram.clone(),
            gamma=lane + 1, x=x, loss=lane + torch.inf, grad=torch.zeros_like(x), direction=torch.zeros_like(x),
            step=lane, slope=lane.clone(), started=count > 0,
        )  # fmt: skip

    def update(state: LbfgsState, x: Tensor, loss: Tensor, grad: Tensor) -> tuple[Tensor, LbfgsState]:
        accept, x0, g0, f0 = torch.ones_like(state.started), x, grad, loss
        if armijo:
            accept = ~state.started | (loss <= state.loss + 1e-4 * state.step * state.slope)
            x0, g0 = (torch.where(accept[:, None], *v) for v in ((x, state.x), (grad, state.grad)))
            f0 = torch.where(accept, loss, state.loss)
        wanted = accept & state.started
        state, d = _turned(state, wanted, x - state.x, grad - state.grad, g0, history, relative=armijo)
        d = torch.where(accept[:, None], d, state.direction) if armijo else d
        slope, stored = (d * g0).sum(-1), state.stored
        # A direction that does not descend (rounding, or a lost history) starts again from −g.
        bad = accept & ~(slope < 0)
        if maybe(bad):
            d = torch.where(bad[:, None], -g0, d)
            slope = torch.where(bad, -g0.square().sum(-1), slope)
            stored = torch.where(bad, 0, stored)
            for part in (state.diagonal, state.inverse, state.yy):
                part.masked_fill_(bad.view(-1, *(1,) * (part.ndim - 1)), 0)
        # torch shortens its very first step only, and goes on with −g·lr if that stored no pair.
        begin = stored == 0 if armijo else (stored == 0) & (bad | ~state.started)
        fresh = torch.full_like(slope, lr)
        if maybe(begin):
            if armijo:  # move every number by about a tenth; the line search takes it back if that was too far
                first = 0.1 * lr * x.shape[1] ** 0.5 / g0.norm(dim=-1).clamp(min=1e-30)
            else:
                first = lr * (1 / g0.abs().sum(-1).clamp(min=1e-30)).clamp(max=1)
            fresh = torch.where(begin, first, fresh)
        step = torch.where(accept, fresh, state.step * shrink) if armijo else fresh
        state = state._replace(
            calls=state.calls + 1, stored=stored, x=x0, loss=f0, grad=g0, direction=d, step=step, slope=slope,
            started=torch.ones_like(state.started),
        )  # fmt: skip
        return torch.addcmul(x0, step[:, None], d), state

    def restart(state: LbfgsState, lanes: Tensor) -> LbfgsState:
        # Old curvature still describes most of the new objective; only the pair across the change is skipped.
        return state._replace(started=state.started & ~lanes)

    return Optimizer(init, update, restart)


def _turned(
    state: LbfgsState, wanted: Tensor, s: Tensor, y: Tensor, g: Tensor, history: int, relative: bool
) -> tuple[LbfgsState, Tensor]:
    """Puts (s, y) into the ring of every wanted lane with positive curvature, and returns −Hg `[lane d]`, too.

    Writes into the state's own buffers, so the state that was passed in is used up. `calls` bounds
    the pairs of every lane without a look at the device.
    """
    sy, yy = (s * y).sum(-1), (y * y).sum(-1)
    # torch's rule is absolute, and stores nothing once a loss is small; ours is free of units.
    least = 1e-6 * (s.square().sum(-1) * yy).sqrt() if relative else 1e-10
    keep = wanted & (sy > least)
    used = max(1, min(int(state.calls), history))
    lane, place = torch.arange(len(s), device=s.device), torch.where(keep, state.stored % history, history)
    state.pairs[lane, place] = torch.stack([s, y], 1)
    gamma = torch.where(keep, sy / yy.clamp(min=1e-30), state.gamma)
    state, pivot = state._replace(stored=state.stored + keep, gamma=gamma), torch.where(keep, sy, 1)
    if native.serves(g):
        rings = (state.pairs, state.inverse, state.yy, state.diagonal)
        return state, native.lbfgs(*rings, place, pivot, gamma, y, g, used)
    # One pass over the pairs serves the new columns and the coming direction: few rows times many.
    rows, pairs = torch.stack([y, g], 1), state.pairs[:, :used].flatten(1, 2)
    products = torch.bmm(rows, pairs.mT).double().unflatten(2, (used, 2))
    _enter(state, place, pivot.double(), products[:, 0])
    weights = _weights(state, products[:, 1]).to(g.dtype)
    return state, torch.bmm(weights, pairs)[:, 0].addcmul(gamma[:, None], g).neg_()


def _enter(state: LbfgsState, place: Tensor, pivot: Tensor, products: Tensor) -> None:
    """The new pairs' rows and columns of the small matrices, from Sy and Yy `[lane used 2]`, pivot sᵀy."""
    used, places = products.shape[1], state.diagonal.shape[1]
    column, gram = F.pad(products.mT, (0, places - used)).unbind(1)
    lane, at = torch.arange(len(place), device=place.device), place[:, None]
    column = column.scatter(1, at, 0)  # what stood in that place is gone
    column[:, :used] = torch.bmm(state.inverse[:, :used, :used], column[:, :used, None])[:, :, 0] / -pivot[:, None]
    column.scatter_(1, at, 1 / pivot[:, None])
    state.inverse[lane, place] = 0
    state.inverse[lane, :, place] = column
    state.yy[lane, place] = gram
    state.yy[lane, :, place] = gram
    state.diagonal.scatter_(1, at, pivot[:, None])


def _weights(state: LbfgsState, products: Tensor) -> Tensor:
    """Of every pair's s and y in Hg − γg `[lane 1 2·used]`, from Sg and Yg `[lane used 2]`; none without pairs."""
    used = products.shape[1]
    sg, yg = products.unbind(2)
    inverse, gamma = state.inverse[:, :used, :used], state.gamma.double()[:, None]
    u = torch.bmm(inverse, sg[:, :, None])
    bent = state.diagonal[:, :used] * u[:, :, 0] + gamma * (torch.bmm(state.yy[:, :used, :used], u)[:, :, 0] - yg)
    top = torch.bmm(bent[:, None], inverse)[:, 0]
    return torch.stack([top, -gamma * u[:, :, 0]], 2).flatten(1)[:, None]
