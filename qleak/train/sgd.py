"""Plain training as pure functions: update rules on parameter dicts, one step, and epochs as a generator.

A rule is a pair in optax's manner, `init(params) -> state` and
`update(params, state, grads, lr) -> (params, state)`, with NamedTuples of tensors as state, so
that a step may be vmapped over many models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value

from qleak import random
from qleak.check import Expected, Failed, at_least, between, positive, whole
from qleak.data import batches
from qleak.tree import zip_map
from qleak.types import Buffers, Dataset, Grads, Model, Params


@dataclass(frozen=True)
class Rule:
    """An update rule: `init(params) -> state`, `update(params, state, grads, lr) -> (params, state)`."""

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Grads, float], tuple[Params, Any]]


class SgdState(NamedTuple):
    """The running sum of gradients."""

    velocity: Params


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


def cosine(progress: float) -> float:
    """The factor on the learning rate that falls from 1 to 0 along half a cosine; `progress` in [0, 1]."""
    return (1 + math.cos(math.pi * progress)) / 2


def step(model: Model, rule: Rule) -> Callable[..., tuple[Params, Any, Tensor]]:
    """`f(params, state, buffers, x [b c h w], y [b], lr) -> (params, state, loss)` of the mean cross-entropy."""

    def loss(params: Params, buffers: Buffers, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model.apply(params, buffers, x), y)

    def learn(
        params: Params, state: Any, buffers: Buffers, x: Tensor, y: Tensor, lr: float
    ) -> tuple[Params, Any, Tensor]:
        grads, value = grad_and_value(loss)(params, buffers, x, y)
        return *rule.update(params, state, grads, lr), value

    return learn


class Epoch(NamedTuple):
    """The parameters after an epoch, and the mean loss over its images while they were learnt."""

    params: Params
    loss: float


def fit(
    model: Model,
    params: Params,
    buffers: Buffers,
    data: Dataset,
    epochs: int = 10,
    batch: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    rule: Rule | None = None,
    schedule: Callable[[float], float] = lambda progress: 1.0,
) -> Iterator[Epoch]:
    """Trains, and hands out the parameters after every epoch.

    Args:
        model: the network; its buffers stay as they are.
        params: where to start; never written to.
        buffers: of the model.
        data: images of the model's shape.
        epochs: passes over `data`, each in its own random order of path (seed, "fit", epoch).
        batch: images in a step; the last step of an epoch may have fewer.
        lr: learning rate at progress 0.
        seed: of the orders.
        rule: the update rule, `adam()` by default.
        schedule: factor on `lr` by progress through all steps, from 0 to 1; see `cosine`.

    Raises:
        Expected: an argument out of range, or images and classes that do not fit the model.
        Failed: the loss is no longer finite.
    """
    whole(epochs=epochs, batch=batch)
    at_least(1, epochs=epochs, batch=batch)
    positive(lr=lr)
    _fits(model, data)
    return _epochs(model, params, buffers, data, epochs, batch, lr, seed, rule or adam(), schedule)


def _epochs(
    model: Model,
    params: Params,
    buffers: Buffers,
    data: Dataset,
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
    rule: Rule,
    schedule: Callable[[float], float],
) -> Iterator[Epoch]:
    learn, state, done = step(model, rule), rule.init(params), itertools.count()
    total = epochs * math.ceil(len(data.x) / batch)
    for epoch in range(epochs):
        losses = []
        for x, y in batches(data, batch, random.generator(seed, "fit", epoch)):
            params, state, loss = learn(params, state, buffers, x, y, lr * schedule(next(done) / total))
            losses.append(loss * len(x))
        mean = float(torch.stack(losses).sum()) / len(data.x)
        if not math.isfinite(mean):
            raise Failed(f"Training diverged in epoch {epoch + 1}: the loss is {mean}. Lower lr={lr:g}.")
        yield Epoch(params, mean)


def accuracy(model: Model, params: Params, buffers: Buffers, data: Dataset, batch: int = 1000) -> float:
    """The share of `data` in [0, 1] whose largest logit is its label."""
    _fits(model, data)
    with torch.no_grad():
        hits = [
            (model.apply(params, buffers, x).argmax(1) == y).sum()
            for x, y in zip(data.x.split(batch), data.y.split(batch), strict=True)
        ]
    return int(torch.stack(hits).sum()) / len(data.x)


def _fits(model: Model, data: Dataset) -> None:
    if tuple(data.x.shape[1:]) != model.shape or data.classes > model.classes:
        raise Expected(
            f"Expected images {model.shape} of at most {model.classes} classes for the model, "
            f"got {tuple(data.x.shape[1:])} of {data.classes} in {data.name}."
        )
