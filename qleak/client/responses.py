"""What a client computes before the channel: pure responses to its images, and the one step in front of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Generator, Tensor
from torch.func import vmap

from qleak import tree
from qleak.catalog import factory
from qleak.check import Expected, at_least, between, positive, whole
from qleak.client.losses import MASK, Slope, one_hot, slope
from qleak.types import Buffers, Client, Model, Params, Tree


@factory
def gradient(batch: int = 1) -> Client:
    """G = ∇_θ mean cross-entropy over one batch: federated SGD (McMahan et al. 2017), the 2019 threat model."""
    whole(batch=batch)
    at_least(1, batch=batch)
    return made(lambda slope, params, *given: slope(params, *given), 0, batch, part=batch)


@factory
def per_example(batch: int = 1) -> Client:
    """g_i = ∇_θ cross-entropy of example i, stacked `[b …]`: what private training clips before it sums."""
    whole(batch=batch)
    at_least(0, batch=batch)

    def respond(slope: Slope, params: Params, x: Tensor, target: Tensor, *masks: Tree) -> Tree:
        if not len(x):  # a Poisson batch can be empty; vmap cannot
            return {k: v.new_zeros(0, *v.shape) for k, v in params.items()}

        def one(*mine: Any) -> Tree:
            return slope(params, *tree.nested_map(lambda v: v[None], mine))

        return vmap(one, randomness="error")(x, target, *masks)

    return made(respond, 1, batch, batch)


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

    def respond(slope: Slope, params: Params, x: Tensor, target: Tensor, *masks: Tree) -> Tree:
        cuts = [slice(i, i + batch) for i in range(0, len(x), batch)]
        parts = [(x[cut], target[cut], *(tree.at(m, cut) for m in masks)) for cut in cuts]
        here, speed = params, None
        for step in range(epochs * len(parts) if epochs else steps):
            pull = slope(here, *parts[step % len(parts)])
            speed = {k: v + momentum * speed[k] for k, v in pull.items()} if speed and momentum else pull
            here = {k: v - lr * speed[k] for k, v in here.items()}
        return {k: v - here[k] for k, v in params.items()}

    taken = epochs * steps if epochs else steps
    scale = lr * sum(momentum ** (k - j) for k in range(taken) for j in range(k + 1)) if momentum else lr * taken
    return made(respond, 0, steps * batch, 1, taken, batch, scale)


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

    def respond(slope: Slope, params: Params, *given: Any) -> Tree:
        dealt = tree.nested_map(lambda v: v.unflatten(0, (clients, -1)), given)
        return vmap(lambda *mine: client.respond(slope, params, *mine), randomness="error")(*dealt)

    return made(respond, 1, clients * client.batch, clients, client.steps, client.part, client.scale)


def is_gradient(client: Client) -> bool:
    """Whether an update is `scale` times one gradient of all its images: no rows, one step."""
    return not client.rows and client.steps == 1


def as_one_gradient(client: Client) -> Client:
    """The client as an attacker sees it who takes its update for `scale` times one mean gradient of all images."""
    scale = client.scale
    return made(lambda f, p, *given: tree.scale(f(p, *given), scale), 0, client.batch, 1, 1, client.batch, scale)


def made(
    respond: Callable[..., Tree],
    rows: int,
    batch: int,
    count: int = 1,
    steps: int = 1,
    part: int = 1,
    scale: float = 1.0,
) -> Client:
    """The client of a response: it draws what its model draws (dropout masks), and changes neither image nor weight."""

    def draw(gen: Generator, model: Model, count: int, lr: float) -> Tree:
        return model.masks(gen, count) if model.masks else {}

    return following(Client(_never, respond, rows, batch, count, steps, part, scale, draw=draw))


def following(client: Client) -> Client:
    """The client whose `update` follows from what else it says: prepare, then respond."""

    def update(model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, draws: Tree | None = None) -> Tree:
        fits(model, x, y)
        draws = draws or {}
        params, x = client.prepare(model, params, buffers, x, y, draws)
        masks = {k: v for k, v in draws.items() if k.startswith(MASK)}
        target = one_hot(y, model.classes, x.dtype)
        return client.respond(slope(model, buffers), params, x, target, *([masks] if masks else []))

    return replace(client, update=update)


def _never(*given: Any) -> Tree:
    raise NotImplementedError


def fits(model: Model, x: Tensor, y: Tensor) -> None:
    """Refuses images or labels that are not the model's.

    Raises:
        Expected: another shape, another number of labels, or a label that is no class.
    """
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
