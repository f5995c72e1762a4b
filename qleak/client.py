"""What a client computes before the channel, and what an observer of the channel holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from qleak.catalog import factory
from qleak.channels import Channel
from qleak.check import Expected, at_least, whole
from qleak.types import Buffers, Client, Message, Model, Params, Tree


class View(NamedTuple):
    """Everything the attacker may see, and nothing else (law 2).

    Attributes:
        model: the architecture.
        params: the weights the update was computed at.
        buffers: the buffers, where the threat model shares them.
        channel: the channel, with its levels and its facts.
        client: what the client computes (its kind and batch size).
        message: the messages of one leg, stacked over lanes.
        leg: which leg of the channel is seen.
        labels: `[lane b]` only where the threat model grants them.
        evidence: False in the prior-only control: the gradient term is removed.
    """

    model: Model
    params: Params
    buffers: Buffers
    channel: Channel
    client: Client
    message: Message
    leg: int = -1
    labels: Tensor | None = None
    evidence: bool = True

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return len(next(iter(self.message.code.values())))

    @property
    def like(self) -> Tree:
        """The tree of one row."""
        return self.params

    def decoded(self) -> Tree:
        """The server's dense numbers, `[lane …]`."""
        knobs = self.channel.knobs(device=next(iter(self.params.values())).device)
        return vmap(lambda m: self.channel.receive(knobs, m, self.like, self.leg))(self.message)

    def at(self, lanes: Tensor) -> View:
        """The same view of some lanes."""
        code = {k: v[lanes] for k, v in self.message.code.items()}
        side = tuple({n: {k: v[lanes] for k, v in t.items()} for n, t in s.items()} for s in self.message.side)
        labels = None if self.labels is None else self.labels[lanes]
        return self._replace(message=Message(code, side), labels=labels)


def loss(model: Model, params: Params, buffers: Buffers, x: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy −(1/b)Σ target·log softmax(logits) of `x [b c h w]` for probabilities `target [b class]`."""
    return -(target * F.log_softmax(model.apply(params, buffers, x), dim=-1)).sum(-1).mean()


def linear_loss(model: Model, params: Params, buffers: Buffers, x: Tensor, error: Tensor) -> Tensor:
    """⟨error, logits⟩: its gradient in θ is the backpropagation of an output error `[b class]` that is known.

    At the client's batch, with error = (softmax − target)/b, it has the same gradient as `loss`.
    """
    return (error * model.apply(params, buffers, x)).sum()


LOSSES = {"labels": loss, "errors": linear_loss}


def one_hot(y: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Labels `[…]` as probabilities `[… class]`."""
    return F.one_hot(y, classes).to(dtype)


@factory
def gradient(batch: int = 1) -> Client:
    """G = ∇_θ mean cross-entropy over one batch: federated SGD (McMahan et al. 2017), the 2019 threat model."""
    whole(batch=batch)
    at_least(1, batch=batch)

    def update(model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor) -> Tree:
        _fits(model, x, y)
        return grad(lambda p: loss(model, p, buffers, x, one_hot(y, model.classes, x.dtype)))(params)

    return Client(update, 0, batch)


@factory
def per_example(batch: int = 1) -> Client:
    """g_i = ∇_θ cross-entropy of example i, stacked `[b …]`: what private training clips before it sums."""
    whole(batch=batch)
    at_least(0, batch=batch)

    def update(model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor) -> Tree:
        _fits(model, x, y)
        if not len(x):  # a Poisson batch can be empty; vmap cannot
            return {k: v.new_zeros(0, *v.shape) for k, v in params.items()}

        def one(x: Tensor, y: Tensor) -> Tree:
            target = one_hot(y[None], model.classes, x.dtype)
            return grad(lambda p: loss(model, p, buffers, x[None], target))(params)

        return vmap(one, randomness="error")(x, y)

    return Client(update, 1, batch)


def _fits(model: Model, x: Tensor, y: Tensor) -> None:
    if tuple(x.shape[1:]) != model.shape or len(x) != len(y):
        raise Expected(
            f"Expected images [b, {model.shape}] with as many labels, got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < model.classes:
        raise Expected(f"Expected labels in 0 … {model.classes - 1}, got {int(y.min())} … {int(y.max())}.")
