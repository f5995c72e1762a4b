"""Batched Adam, and Adam on the sign of the gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.check import between, positive
from qleak.types import Optimizer


class AdamState(NamedTuple):
    """First and second moments `[lane d]`, and the number of updates of every lane."""

    updates: Tensor
    mean: Tensor
    square: Tensor


@factory
def adam(lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """Adam (Kingma & Ba 2015, Algorithm 1) on every lane; defaults but for lr are the paper's."""
    return _adam(lr, beta1, beta2, eps, signed=False)


@factory
def sign_adam(lr: float = 0.1, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """Adam on sign(gradient): the optimizer of Geiping et al., "Inverting Gradients" (2020)."""
    return _adam(lr, beta1, beta2, eps, signed=True)


def _adam(lr: float, beta1: float, beta2: float, eps: float, signed: bool) -> Optimizer:
    positive(lr=lr, eps=eps)
    between(0, 1 - 1e-9, beta1=beta1, beta2=beta2)

    def init(x: Tensor) -> AdamState:
        return AdamState(x.new_zeros(len(x)), torch.zeros_like(x), torch.zeros_like(x))

    def update(state: AdamState, x: Tensor, loss: Tensor, grad: Tensor) -> tuple[Tensor, AdamState]:
        grad = grad.sign() if signed else grad
        updates = state.updates + 1
        mean = beta1 * state.mean + (1 - beta1) * grad
        square = beta2 * state.square + (1 - beta2) * grad.square()
        debias1, debias2 = 1 - beta1 ** updates[:, None], 1 - beta2 ** updates[:, None]
        step = (mean / debias1) / ((square / debias2).sqrt() + eps)
        return x - lr * step, AdamState(updates, mean, square)

    def restart(state: AdamState, lanes: Tensor) -> AdamState:
        return state  # running moments forget by themselves

    return Optimizer(init, update, restart)
