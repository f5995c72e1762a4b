"""What a client computes before the channel, and what an observer of the channel holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from qleak import tree
from qleak.catalog import factory
from qleak.channels import Channel
from qleak.check import Expected, at_least, between, positive, whole
from qleak.types import Buffers, Client, Message, Model, Params, Tree

Slope = Callable[[Params, Tensor, Tensor], Tree]


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
        statistics: what the client's batch norms saw of its batch, `[lane …]`, only where the threat model shares it
            (see `Model.statistics`).
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
    statistics: Tree | None = None
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
        statistics = None if self.statistics is None else {k: v[lanes] for k, v in self.statistics.items()}
        return self._replace(message=Message(code, side), labels=labels, statistics=statistics)


def loss(model: Model, params: Params, buffers: Buffers, x: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy −(1/b)Σ target·log softmax(logits) of `x [b c h w]` for probabilities `target [b class]`."""
    return -(target * F.log_softmax(model.apply(params, buffers, x), dim=-1)).sum(-1).mean()


def linear_loss(model: Model, params: Params, buffers: Buffers, x: Tensor, error: Tensor) -> Tensor:
    """⟨error, logits⟩: its gradient in θ is the backpropagation of an output error `[b class]` that is known.

    At the client's batch, with error = (softmax − target)/b, it has the same gradient as `loss`.
    """
    return (error * model.apply(params, buffers, x)).sum()


LOSSES = {"labels": loss, "errors": linear_loss}


def slope(model: Model, buffers: Buffers, given: str = "labels") -> Slope:
    """`(params, x, target) -> ∇_θ` of a loss of `LOSSES`."""
    return lambda params, x, target: grad(lambda p: LOSSES[given](model, p, buffers, x, target))(params)


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
    return _client(lambda slope, params, x, target: slope(params, x, target), 0, batch, part=batch)


@factory
def per_example(batch: int = 1) -> Client:
    """g_i = ∇_θ cross-entropy of example i, stacked `[b …]`: what private training clips before it sums."""
    whole(batch=batch)
    at_least(0, batch=batch)

    def respond(slope: Slope, params: Params, x: Tensor, target: Tensor) -> Tree:
        if not len(x):  # a Poisson batch can be empty; vmap cannot
            return {k: v.new_zeros(0, *v.shape) for k, v in params.items()}
        return vmap(lambda x, t: slope(params, x[None], t[None]), randomness="error")(x, target)

    return _client(respond, 1, batch, batch)


@factory
def local_sgd(steps: int = 5, epochs: int = 0, batch: int = 10, lr: float = 0.1, momentum: float = 0.0) -> Client:
    """θ₀ − θ_K after K steps v ← μv + ∇, θ ← θ − lr·v on own minibatches: FedAvg (McMahan et al. 2017, Algorithm 1).

    Minibatches are taken from the images in the order given, so the update is a function of its
    arguments. Divided by `scale` = lr·Σ_k Σ_(j≤k) μ^(k−j), lr·K without momentum, it is a gradient
    averaged along the path; at K = 1 it is lr·∇ exactly.

    Args:
        steps: K, and the number of minibatches of images the client takes at a time.
        epochs: passes over those images instead of K steps (0: K steps, beginning again when images run out).
        batch: images of one minibatch.
        lr: the client's own learning rate.
        momentum: μ of the client's own optimizer, forgotten between updates.
    """
    whole(steps=steps, epochs=epochs, batch=batch)
    at_least(1, steps=steps, batch=batch)
    at_least(0, epochs=epochs)
    positive(lr=lr)
    between(0, 1, momentum=momentum)

    def respond(slope: Slope, params: Params, x: Tensor, target: Tensor) -> Tree:
        parts = list(zip(x.split(batch), target.split(batch), strict=True))
        here, speed = params, None
        for step in range(epochs * len(parts) if epochs else steps):
            pull = slope(here, *parts[step % len(parts)])
            speed = {k: v + momentum * speed[k] for k, v in pull.items()} if speed and momentum else pull
            here = {k: v - lr * speed[k] for k, v in here.items()}
        return {k: v - here[k] for k, v in params.items()}

    taken = epochs * steps if epochs else steps
    scale = lr * sum(momentum ** (k - j) for k in range(taken) for j in range(k + 1)) if momentum else lr * taken
    return _client(respond, 0, steps * batch, 1, taken, batch, scale)


@factory
def crowd(client: Client | None = None, clients: int = 4) -> Client:
    """Updates of several clients with the same work, stacked `[client …]`: rows for a channel that joins them.

    Behind `chain(total(), mean…)` the attacker sees the aggregate only: secure aggregation
    (Bonawitz et al. 2017). The images are dealt out in order, `client.batch` to each.

    Args:
        client: what each of them computes; `gradient()` by default.
        clients: how many there are.
    """
    client = client or gradient()
    whole(clients=clients)
    at_least(1, clients=clients)
    if client.rows:
        raise Expected(f"Expected client={client.spec} with one update, got rows of its own.")

    def respond(slope: Slope, params: Params, x: Tensor, target: Tensor) -> Tree:
        x, target = (v.unflatten(0, (clients, -1)) for v in (x, target))
        return vmap(lambda x, t: client.respond(slope, params, x, t), randomness="error")(x, target)

    return _client(respond, 1, clients * client.batch, clients, client.steps, client.part, client.scale)


def is_gradient(client: Client) -> bool:
    """Whether an update is `scale` times one gradient of all its images: no rows, one step."""
    return not client.rows and client.steps == 1


def as_one_gradient(client: Client) -> Client:
    """The client as an attacker sees it who takes its update for `scale` times one mean gradient of all images."""
    scale = client.scale
    return _client(lambda f, p, x, t: tree.scale(f(p, x, t), scale), 0, client.batch, 1, 1, client.batch, scale)


def _client(
    respond: Callable[..., Tree],
    rows: int,
    batch: int,
    count: int = 1,
    steps: int = 1,
    part: int = 1,
    scale: float = 1.0,
) -> Client:
    def update(model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor) -> Tree:
        _fits(model, x, y)
        return respond(slope(model, buffers), params, x, one_hot(y, model.classes, x.dtype))

    return Client(update, respond, rows, batch, count, steps, part, scale)


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
