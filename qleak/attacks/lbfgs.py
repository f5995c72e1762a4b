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
from torch import Tensor

from qleak.catalog import factory
from qleak.check import at_least, positive, whole
from qleak.types import Optimizer


class LbfgsState(NamedTuple):
    """`lane` first everywhere. `pairs` were stored since the last restart; `calls` counts updates.

    Row i of `s [lane m d]`, `y`, `diagonal [lane m]` (sᵢᵀyᵢ), `inverse [lane m m]` (R⁻¹) and `yy` (YᵀY) is place i of the ring;
    places without a pair are zero in the last three.
    """

    calls: Tensor
    pairs: Tensor
    s: Tensor
    y: Tensor
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
        lane = x.new_zeros(lanes)
        gram = torch.zeros(lanes, history, history, dtype=torch.float64, device=x.device)
        pairs = x.new_zeros(lanes, history, d)
        count = torch.zeros(lanes, dtype=torch.int64, device=x.device)
        return LbfgsState(
            calls=torch.zeros((), dtype=torch.int64), pairs=count, s=pairs, y=pairs.clone(),
            diagonal=gram[:, 0].clone(), inverse=gram, yy=gram.clone(),
            gamma=lane + 1, x=x, loss=lane + torch.inf, grad=torch.zeros_like(x), direction=torch.zeros_like(x),
            step=lane, slope=lane.clone(), started=count > 0,
        )  # fmt: skip

    def update(state: LbfgsState, x: Tensor, loss: Tensor, grad: Tensor) -> tuple[Tensor, LbfgsState]:
        enough = loss <= state.loss + 1e-4 * state.step * state.slope
        accept = ~state.started | enough if armijo else torch.ones_like(state.started)
        col = accept[:, None]
        x0, g0 = torch.where(col, x, state.x), torch.where(col, grad, state.grad)
        f0 = torch.where(accept, loss, state.loss)
        state, sg, yg = _store(state, accept & state.started, x - state.x, grad - state.grad, g0, history, armijo)
        d = torch.where(col, _direction(state, g0, sg, yg), state.direction)
        slope = (d * g0).sum(-1)
        # A direction that does not descend (rounding, or a lost history) starts again from −g.
        bad = accept & ~(slope < 0)
        d = torch.where(bad[:, None], -g0, d)
        slope = torch.where(bad, -g0.square().sum(-1), slope)
        count = torch.where(bad, 0, state.pairs)
        _forget(state, bad)
        first = lr * (1 / g0.abs().sum(-1).clamp(min=1e-30)).clamp(max=1)
        if armijo:  # move every number by about a tenth; the line search takes it back if that was too far
            first = 0.1 * lr * x.shape[1] ** 0.5 / g0.norm(dim=-1).clamp(min=1e-30)
        # torch shortens its very first step only, and goes on with −g·lr if that stored no pair.
        begin = count == 0 if armijo else (count == 0) & (bad | ~state.started)
        step = torch.where(accept, torch.where(begin, first, lr), state.step * shrink)
        state = state._replace(
            calls=state.calls + 1, pairs=count, x=x0, loss=f0, grad=g0, direction=d, step=step, slope=slope,
            started=torch.ones_like(state.started),
        )  # fmt: skip
        return x0 + step[:, None] * d, state

    def restart(state: LbfgsState, lanes: Tensor) -> LbfgsState:
        # Old curvature still describes most of the new objective; only the pair across the change is skipped.
        return state._replace(started=state.started & ~lanes)

    return Optimizer(init, update, restart)


def _store(
    state: LbfgsState, wanted: Tensor, s: Tensor, y: Tensor, g: Tensor, history: int, relative: bool
) -> tuple[LbfgsState, Tensor, Tensor]:
    """Puts (s, y) into the ring of every wanted lane with positive curvature; returns Sg and Yg as well.

    Writes into the state's own buffers, so the state that was passed in is used up. `calls` bounds
    the pairs of every lane without a look at the device.
    """
    sy, yy = (s * y).sum(-1), (y * y).sum(-1)
    # torch's rule is absolute, and stores nothing once a loss is small; ours is free of units.
    least = 1e-6 * (s.square().sum(-1) * yy).sqrt() if relative else 1e-10
    keep = wanted & (sy > least)
    lane, slot = torch.arange(len(s), device=s.device), state.pairs % history
    used = max(1, min(int(state.calls), history))
    mine = keep[:, None]
    state.s[lane, slot] = torch.where(mine, s, state.s[lane, slot])
    state.y[lane, slot] = torch.where(mine, y, state.y[lane, slot])
    # One pass over the pairs serves the new columns and the coming direction: few rows times many.
    rows = torch.stack([y, g], 1)
    by_s, by_y = (torch.bmm(rows, pairs[:, :used].mT).double() for pairs in (state.s, state.y))
    inverse, gram = state.inverse[:, :used, :used], state.yy[:, :used, :used]
    inverse[lane, slot] = torch.where(mine, 0, inverse[lane, slot])
    before, column = inverse[lane, :, slot], by_s[:, 0].clone()
    pivot = torch.where(mine, column[lane, slot][:, None], 1)
    inverse[lane, :, slot] = torch.where(mine, 0, before)
    column = -torch.bmm(inverse, column[:, :, None])[:, :, 0] / pivot
    column[lane, slot] = 1 / pivot[:, 0]
    inverse[lane, :, slot] = torch.where(mine, column, before)
    state.diagonal[lane, slot] = torch.where(keep, pivot[:, 0], state.diagonal[lane, slot])
    gram[lane, slot] = torch.where(mine, by_y[:, 0], gram[lane, slot])
    gram[lane, :, slot] = gram[lane, slot]
    gamma = torch.where(keep, sy / yy.clamp(min=1e-30), state.gamma)
    return state._replace(pairs=state.pairs + keep, gamma=gamma), by_s[:, 1], by_y[:, 1]


def _direction(state: LbfgsState, g: Tensor, sg: Tensor, yg: Tensor) -> Tensor:
    """−Hg by the compact form; lanes without pairs get −γg."""
    used = sg.shape[1]
    inverse, gamma = state.inverse[:, :used, :used], state.gamma.double()[:, None]
    u = torch.bmm(inverse, sg[:, :, None])
    bent = state.diagonal[:, :used] * u[:, :, 0] + gamma * (torch.bmm(state.yy[:, :used, :used], u)[:, :, 0] - yg)
    top = torch.bmm(bent[:, None], inverse)
    low = -gamma[..., None] * u.mT
    combined = torch.bmm(top.to(g.dtype), state.s[:, :used]) + torch.bmm(low.to(g.dtype), state.y[:, :used])
    return -(state.gamma[:, None] * g + combined[:, 0])


def _forget(state: LbfgsState, lanes: Tensor) -> None:
    """Empties the rings of some lanes, in the state's own buffers."""
    for part in (state.diagonal, state.inverse, state.yy):
        part.masked_fill_(lanes.view(-1, *(1,) * (part.ndim - 1)), 0)
