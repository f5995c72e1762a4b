"""What private and robust training computes of a batch: rows of one forward pass, adversarial images, noisy weights."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Generator, Tensor
from torch.func import vmap

from qleak import random
from qleak.catalog import factory
from qleak.check import Expected, at_least, between, one_of, positive, whole
from qleak.client.losses import MASK, Slope
from qleak.client.perturb import KEY, SCALE, image_slope, noisy, project
from qleak.client.responses import following, made, per_example
from qleak.types import Buffers, Client, Model, Params, Tree

START = "adversarial/start"
CHUNK = 8  # rows at a time: more are slower on a CPU
UNSOUND = (
    "weight noise serves one forward pass and is thrown away: nothing that is released carries it, and it does not add up "
    "over the steps as their sensitivity does"
)


@factory
def per_loss(batch: int = 32) -> Client:
    """g_i = ∇_θ ℓ_i, the loss of example i in one forward pass of the whole batch: rows of a Jacobian, `[b …]`.

    Equal to `per_example` where the model keeps examples apart, and quicker for nothing. Where it couples them
    (batch norm by the batch) row i depends on every example, and clipping rows bounds no example's share.

    ℓ_i is the mean loss of the batch with the targets of all others zero, times b; the forward pass is one for
    `CHUNK` rows.
    """
    whole(batch=batch)
    at_least(1, batch=batch)

    def respond(slope: Slope, params: Params, x: Tensor, target: Tensor, *masks: Tree) -> Tree:
        if not len(x):
            return {k: v.new_zeros(0, *v.shape) for k, v in params.items()}

        def row(which: Tensor) -> Tree:
            return slope(params, x, len(x) * which[:, None] * target, *masks)

        each = torch.eye(len(x), dtype=target.dtype, device=x.device)
        return vmap(row, randomness="error", chunk_size=CHUNK)(each)

    return made(respond, 1, batch, batch, part=batch)


@factory
def adversarial(
    client: Client | None = None, epsilon: float = 0.03, step_size: float = 0.01, steps: int = 20, start: str = "zero"
) -> Client:
    """The client on images that PGD has made of its own, at the weights it was sent (Madry et al. 2018).

    x ← clamp(Π_ε(x + α·sign ∇ₓ Σ_j ℓ_j), 0, 1), K times; no gradient flows through it. Where the model keeps examples
    apart each image is changed by itself, a step in front of its gradient that costs no privacy.

    Args:
        client: what is computed of these images; `per_example(batch=32)` by default.
        epsilon: radius of the L∞ ball, in pixel units.
        step_size: α.
        steps: K.
        start: at the image itself ("zero"), or uniform in the ball ("random").
    """
    client = client or per_example(batch=32)
    whole(steps=steps)
    at_least(1, steps=steps)
    between(0, 1, epsilon=epsilon)
    positive(step_size=step_size)
    one_of(["zero", "random"], start=start)
    inner = client

    def draw(gen: Generator, model: Model, count: int, lr: float) -> Tree:
        drawn = inner.draw(gen, model, count, lr)
        if start == "random":
            drawn = drawn | {START: epsilon * (2 * random.uniform(gen, (count, *model.shape)) - 1)}
        return drawn

    def prepare(
        model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, draws: Tree
    ) -> tuple[Params, Tensor]:
        held = buffers | {k: v for k, v in draws.items() if k.startswith(MASK)}
        moved = project(x + draws[START], x, epsilon, "linf") if START in draws else x
        for k in range(steps if len(x) else 0):
            g = image_slope(model, noisy(params, draws, 1 + k), held, moved, y)
            moved = project(moved + step_size * g.sign(), x, epsilon, "linf")
        return inner.prepare(model, params, buffers, moved.detach(), y, draws)

    return following(replace(client, draw=draw, prepare=prepare))


@factory
def weight_noise(
    client: Client | None = None, noise_multiplier: float = 10.0, clip: float = 3.1, root: bool = True
) -> Client:
    """The client at θ + s·ξ, s = lr·clip·multiplier/√b, ξ standard normal: noise that is never released. No guarantee.

    One ξ a step for the whole batch, and another for every inner step of `adversarial`; the gradient is that with
    respect to the clean weights, which has the same numbers. Behind it stands `chain(clip_l2(clip), total(), mean(b))`.
    A published mechanism that is reported with the ε of DP-SGD, kept here to be measured: `Client.unsound` says why the
    claim does not hold, and rows carry it as `claimed_epsilon` beside ε = none.

    Args:
        client: what is computed there; `per_loss(batch=32)` by default.
        noise_multiplier: the multiplier that the claim counts.
        clip: the bound that the channel clips to.
        root: divide by √b (the later of two published versions), or by b.
    """
    client = client or per_loss()
    positive(noise_multiplier=noise_multiplier, clip=clip)
    if client.claimed:
        raise Expected("Expected weight noise once.")
    inner = client

    def draw(gen: Generator, model: Model, count: int, lr: float) -> Tree:
        scale = lr * clip * noise_multiplier / (math.sqrt(inner.batch) if root else inner.batch)
        return inner.draw(gen, model, count, lr) | {
            KEY: random.integers(gen, 2**62, ()),
            SCALE: torch.tensor(scale),
        }

    def prepare(
        model: Model, params: Params, buffers: Buffers, x: Tensor, y: Tensor, draws: Tree
    ) -> tuple[Params, Tensor]:
        params, x = inner.prepare(model, params, buffers, x, y, draws)
        return noisy(params, draws, 0), x

    unsound = "; ".join(filter(None, [client.unsound, UNSOUND]))
    return following(replace(client, draw=draw, prepare=prepare, unsound=unsound, claimed=float(noise_multiplier)))
