"""Plain training as pure functions: one step, and epochs as a generator, with a rule of `train/rules.py`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value

from qleak import random
from qleak.check import Expected, Failed, at_least, positive, whole
from qleak.data import batches
from qleak.train.rules import Rule, adam
from qleak.types import Buffers, Dataset, Model, Params


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
