"""What a client computes before the channel, and what an observer of the channel holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from qleak.catalog import factory
from qleak.channels import Channel
from qleak.check import Expected, at_least, positive, whole
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
    return (y[..., None] == torch.arange(classes, device=y.device)).to(
        dtype
    )  # F.one_hot looks at values: not under vmap


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
    try:
        low, high = (int(y.min()), int(y.max())) if len(y) else (0, 0)
    except RuntimeError:  # inside vmap values cannot be looked at
        return
    if not 0 <= low <= high < model.classes:
        raise Expected(f"Expected labels in 0 … {model.classes - 1}, got {low} … {high}.")


@factory
def local_sgd(steps: int = 5, epochs: int = 0, batch: int = 10, lr: float = 0.1) -> Client:
    """θ₀ − θ_K after K steps θ ← θ − lr·∇ on the client's own minibatches: FedAvg (McMahan et al. 2017, Algorithm 1).

    Minibatches are taken from the images in the order given, so the update is a function of its
    arguments. Divided by lr·K it is a gradient averaged along the path; at K = 1 it is lr·∇ exactly.

    Args:
        steps: K, and the number of minibatches of images the client takes at a time.
        epochs: passes over those images instead of K steps (0: K steps, beginning again when images run out).
        batch: images of one minibatch.
        lr: the client's own learning rate.
    """
    whole(steps=steps, epochs=epochs, batch=batch)
    at_least(1, steps=steps, batch=batch)
    at_least(0, epochs=epochs)
    positive(lr=lr)

    def update(model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor) -> Tree:
        _fits(model, x, y)
        parts = list(zip(x.split(batch), y.split(batch), strict=True))
        here = params
        for step in range(epochs * len(parts) if epochs else steps):
            some, labels = parts[step % len(parts)]
            target = one_hot(labels, model.classes, some.dtype)
            slope = grad(lambda p, some=some, target=target: loss(model, p, buffers, some, target))(here)
            here = {k: v - lr * slope[k] for k, v in here.items()}
        return {k: v - here[k] for k, v in params.items()}

    return Client(update, 0, steps * batch)
