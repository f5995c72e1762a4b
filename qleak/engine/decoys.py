"""Decoys: updates of images that are nobody's, through the same model, client and channel as the captured one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from qleak import random
from qleak.metrics import Secret
from qleak.plans import Captured
from qleak.types import Buffers, Message, Params, Tree


class Held(NamedTuple):
    """What was captured, and the decoys: message 0 is the captured one; `decoys` are their images and labels."""

    params: Params
    buffers: Buffers
    messages: list[Message]
    decoys: list[Secret]
    truth: Secret | None


def decoys_of(plan: Captured, params: Params, buffers: Buffers) -> tuple[list[Secret], list[Message]]:
    """The plan's decoys, and what the client would have sent of each."""
    decoys = [decoy(plan, i) for i in plan.victims[1:]]
    return decoys, [message_of(plan, params, buffers, x, y, ("decoy", i)) for i, (x, y) in enumerate(decoys)]


def decoy(plan: Captured, index: int) -> Secret:
    """Images that are nobody's, with labels: 1/f noise, mean ½ and deviation 0.2, channels alike by nine parts in ten.

    Amplitudes that fall as 1/f are the second-order statistics of photographs (Field 1987).
    """
    gen = random.generator(plan.seed, "decoy", index)
    x = natural(gen, plan.client.batch, plan.model.shape)
    if plan.labels:
        return Secret(x, torch.tensor(plan.labels))
    return Secret(x, random.integers(gen, plan.model.classes, (plan.client.batch,)))


def natural(gen: Generator, count: int, shape: tuple[int, int, int]) -> Tensor:
    """1/f noise `[count c h w]` in [0, 1]."""
    c, h, w = shape
    fy, fx = torch.fft.fftfreq(h)[:, None], torch.fft.rfftfreq(w)[None]
    falls = 1 / (fy.square() + fx.square()).sqrt().clamp(min=1 / max(h, w))
    falls[0, 0] = 0
    white = random.normal(gen, (count, 1 + c, h, w))
    rough = torch.fft.irfft2(torch.fft.rfft2(white) * falls, s=(h, w))
    rough = rough / rough.std((2, 3), keepdim=True).clamp(min=1e-12)
    mixed = rough[:, :1] * 0.9**0.5 + rough[:, 1:] * 0.1**0.5
    return (0.5 + 0.2 * mixed).clamp(0, 1)


def message_of(
    plan: Captured, params: Params, buffers: Buffers, x: Tensor, y: Tensor, path: tuple[Any, ...]
) -> Message:
    """What the client would have sent of these images; every draw belongs to `path`."""
    draws = plan.client.draw(random.generator(plan.seed, "client", *path), plan.model, len(x), 1.0)
    return sent(plan, params, plan.client.update(plan.model, params, buffers, x, y, draws), path)


def sent(plan: Captured, params: Params, update: Tree, path: tuple[Any, ...]) -> Message:
    """The message of an update through the plan's channel."""
    channel = plan.channels[0]
    noise = channel.draw(random.generator(plan.seed, "channel", *path), params)
    update = {k: update[k].detach() for k in params}
    return channel.send(channel.knobs(), update, noise, channel.init(params), params)[0][-1]
