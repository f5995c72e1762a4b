"""Batched Adam: plain, on the sign of the gradient, or on a sign that softens; with step schedules."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.check import at_least, between, one_of, positive, whole
from qleak.types import Optimizer

SIGNS = ("none", "hard", "soft")
SCHEDULES = ("constant", "steps", "cosine")
DROPS = (3 / 8, 5 / 8, 7 / 8)


class AdamState(NamedTuple):
    """First and second moments `[lane d]`, and the number of updates of every lane."""

    updates: Tensor
    mean: Tensor
    square: Tensor


@factory
def adam(
    lr: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    sign: str = "none",
    schedule: str = "constant",
    total: int = 0,
    warmup: int = 0,
) -> Optimizer:
    """Adam (Kingma & Ba 2015, Algorithm 1) on every lane; defaults but for lr are the paper's.

    Args:
        lr: step length.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to √(second moment).
        sign: "hard" puts sign(g) in place of g, "soft" tanh(s·g)/s with s = 1 − t/total.
        schedule: "steps" divides lr by 10 at 3/8, 5/8 and 7/8 of `total` (Geiping et al. 2020), "cosine"
            multiplies it by ½(1 + cos(π·t/total)).
        total: updates that the schedule and the soft sign count on.
        warmup: updates over which lr rises from 0.
    """
    positive(lr=lr, eps=eps)
    between(0, 1 - 1e-9, beta1=beta1, beta2=beta2)
    one_of(SIGNS, sign=sign)
    one_of(SCHEDULES, schedule=schedule)
    whole(total=total, warmup=warmup)
    at_least(1 if sign == "soft" or schedule != "constant" else 0, total=total)
    at_least(0, warmup=warmup)

    def init(x: Tensor) -> AdamState:
        return AdamState(x.new_zeros(len(x)), torch.zeros_like(x), torch.zeros_like(x))

    def rate(done: Tensor) -> Tensor:
        rate = torch.full_like(done, lr)
        if schedule == "steps":
            for at in DROPS:
                rate = torch.where(done >= total * at, 0.1 * rate, rate)
        if schedule == "cosine":
            rate = rate * 0.5 * (1 + torch.cos(math.pi * (done / total).clamp(max=1)))
        return rate * ((done + 1) / warmup).clamp(max=1) if warmup else rate

    def update(state: AdamState, x: Tensor, loss: Tensor, grad: Tensor) -> tuple[Tensor, AdamState]:
        if sign == "hard":
            grad = grad.sign()
        if sign == "soft":
            sharp = (1 - state.updates / total).clamp(min=1e-3)[:, None]
            grad = torch.tanh(sharp * grad) / sharp
        updates = state.updates + 1
        mean = beta1 * state.mean + (1 - beta1) * grad
        square = beta2 * state.square + (1 - beta2) * grad.square()
        debias1, debias2 = 1 - beta1 ** updates[:, None], 1 - beta2 ** updates[:, None]
        step = (mean / debias1) / ((square / debias2).sqrt() + eps)
        return x - rate(state.updates)[:, None] * step, AdamState(updates, mean, square)

    def restart(state: AdamState, lanes: Tensor) -> AdamState:
        return state  # running moments forget by themselves

    return Optimizer(init, update, restart)


@factory
def sign_adam(lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """Adam on sign(gradient): the optimizer of Geiping et al., "Inverting Gradients" (2020), at a constant step."""
    return adam(lr, beta1, beta2, eps, sign="hard")
