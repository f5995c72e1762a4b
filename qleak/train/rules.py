"""Update rules of the server: what it does with the (averaged, decoded) gradient of a round.

A rule is a pair in optax's manner, `init(params) -> state` and
`update(params, state, grads, lr) -> (params, state)`, with NamedTuples of tensors as state, so
that a step may be vmapped over many models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.check import between, positive
from qleak.tree import zip_map
from qleak.types import Grads, Params


@dataclass(frozen=True)
class Rule:
    """An update rule: `init(params) -> state`, `update(params, state, grads, lr) -> (params, state)`."""

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Grads, float], tuple[Params, Any]]
    spec: str = ""


class SgdState(NamedTuple):
    """The running sum of gradients."""

    velocity: Params


@factory
def sgd(momentum: float = 0.0) -> Rule:
    """Gradient descent, v ← μ·v + g and p ← p − lr·v: `torch.optim.SGD` with `momentum` μ in [0, 1]."""
    between(0, 1, momentum=momentum)

    def init(params: Params) -> SgdState:
        return SgdState({k: torch.zeros_like(v) for k, v in params.items()})

    def update(params: Params, state: SgdState, grads: Grads, lr: float) -> tuple[Params, SgdState]:
        velocity = zip_map(lambda v, g: momentum * v + g, state.velocity, grads)
        return zip_map(lambda p, v: p - lr * v, params, velocity), SgdState(velocity)

    return Rule(init, update)


class AdamState(NamedTuple):
    """Steps taken (a 0-dim float64 tensor), first and second moments."""

    steps: Tensor
    first: Params
    second: Params


@factory
def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Rule:
    """Kingma, Ba 2015, Algorithm 1: `torch.optim.Adam`, with b1 and b2 in [0, 1) and eps > 0.

    m ← b1·m + (1−b1)·g, s ← b2·s + (1−b2)·g², p ← p − lr·m̂ / (√ŝ + eps), where ^ divides by 1 − bᵗ.
    """
    between(0, 1 - 1e-12, b1=b1, b2=b2)
    positive(eps=eps)

    def init(params: Params) -> AdamState:
        zeros = {k: torch.zeros_like(v) for k, v in params.items()}
        return AdamState(torch.zeros((), dtype=torch.float64), zeros, zeros)

    def update(params: Params, state: AdamState, grads: Grads, lr: float) -> tuple[Params, AdamState]:
        steps = state.steps + 1
        first = zip_map(lambda m, g: b1 * m + (1 - b1) * g, state.first, grads)
        second = zip_map(lambda s, g: b2 * s + (1 - b2) * g**2, state.second, grads)
        rate, scale = lr / (1 - b1**steps), 1 - b2**steps
        params = zip_map(lambda p, m, s: p - rate * m / ((s / scale).sqrt() + eps), params, first, second)
        return params, AdamState(steps, first, second)

    return Rule(init, update)


class AdadeltaState(NamedTuple):
    """Running means of squared gradients and of squared steps."""

    squares: Params
    steps: Params


@factory
def adadelta(rho: float = 0.9, eps: float = 1e-6) -> Rule:
    """Zeiler 2012, Algorithm 1: `torch.optim.Adadelta`, with rho in [0, 1] and eps > 0.

    s ← ρs + (1−ρ)g², Δ = g·√(d + eps)/√(s + eps), d ← ρd + (1−ρ)Δ², p ← p − lr·Δ: a step hardly depends on how large
    gradients are, so noise much larger than they are does not make it diverge.
    """
    between(0, 1, rho=rho)
    positive(eps=eps)

    def init(params: Params) -> AdadeltaState:
        zeros = {k: torch.zeros_like(v) for k, v in params.items()}
        return AdadeltaState(zeros, zeros)

    def update(params: Params, state: AdadeltaState, grads: Grads, lr: float) -> tuple[Params, AdadeltaState]:
        squares = zip_map(lambda s, g: rho * s + (1 - rho) * g.square(), state.squares, grads)
        move = zip_map(lambda g, s, d: g * ((d + eps).sqrt() / (s + eps).sqrt()), grads, squares, state.steps)
        steps = zip_map(lambda d, m: rho * d + (1 - rho) * m.square(), state.steps, move)
        return zip_map(lambda p, m: p - lr * m, params, move), AdadeltaState(squares, steps)

    return Rule(init, update)
