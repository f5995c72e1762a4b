"""Clip and sum as one operation: where a channel's first leg shrinks rows by their norm and the next begins with a sum.

The result is that of the channel as it stands, to rounding; what changes is that no row is ever sent, so the message
of the first leg does not exist. The rest of the channel (noise, mean, codes) takes the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qleak.channels import Channel
from qleak.channels.channel import Leg
from qleak.client import one_hot
from qleak.client.losses import MASK
from qleak.client.responses import fits
from qleak.private import chunks, separable, taps
from qleak.types import Buffers, Client, Model, Params, Shrink, Stage, Tree


class Fused(NamedTuple):
    """A channel in two: the stage that shrinks rows (their sum included), and what takes the sum."""

    stage: Stage
    rest: Channel

    @property
    def shrink(self) -> Shrink:
        """How the stage shrinks."""
        assert self.stage.shrink is not None
        return self.stage.shrink


def split(client: Client, channel: Channel, model: Model | None = None) -> Fused | None:
    """`chain(shrink, total(), …)` in two where `client` sends each example's own gradient; None elsewhere.

    A model that keeps examples apart makes that of clients who take one forward pass of the batch, too.
    """
    if len(channel.legs) < 2:
        return None
    first, second = channel.legs[:2]
    alone = first.join is None and len(first.stages) == 1 and first.stages[0].shrink is not None
    if not alone or second.join is None or second.join.name != "total":
        return None
    if not is_per_example(client, model is not None and separable.alone(model)):
        return None
    return Fused(first.stages[0], replace(channel, legs=(Leg(None, second.stages), *channel.legs[2:])))


@functools.lru_cache(maxsize=256)
def is_per_example(client: Client, apart: bool = False) -> bool:
    """Whether row b of the update is the gradient of example b alone, at the weights as they are.

    Tried on a made-up slope and not read from names: other clients have rows as well. With `apart` the slope of a batch
    is the mean of its examples' and linear in each target, as that of cross-entropy is; otherwise it mixes them.
    """
    if client.rows != 1 or client.steps != 1:
        return False
    b = max(1, client.batch)
    x = (torch.arange(b, dtype=torch.float64) + 1).reshape(b, 1, 1, 1) / b
    target = torch.stack([x.flatten() ** 2, 1 - x.flatten()], -1)
    params = {"w": torch.tensor([0.3, 0.7], dtype=torch.float64)}

    def slope(params: Params, x: Tensor, target: Tensor, masks: Tree | None = None) -> Tree:
        seen = (params["w"] * (2.0 + x.flatten(1).sum(1, keepdim=True)) ** 2).sin()
        if apart:
            return {"w": (seen * (target * torch.tensor([1.0, 0.4])).sum(1, keepdim=True)).mean(0)}
        return {"w": seen.sum(0) ** 2 + (target.sum(0) + x.mean()).exp()}

    try:
        got = client.respond(slope, params, x, target)["w"]
        want = torch.stack([slope(params, x[i : i + 1], target[i : i + 1])["w"] for i in range(b)])
    except Exception:  # a response that needs more of its slope than this one knows is another client's
        return False
    return got.shape == want.shape and torch.allclose(got, want, rtol=1e-10)


def pick(model: Model, shrink: Shrink) -> tuple[str, str]:
    """("taps" or "chunks", why) for the clipped sums of a model."""
    if shrink.p == 1:
        return "chunks", "an L1 norm needs every entry of every example's gradient"
    if model.tapped is None:
        return "chunks", "the model has parameters that are not each used once by a known layer"
    if not separable.alone(model):
        return "chunks", "the model mixes the images of a batch, or its opened form is another net"
    return "taps", "one backward pass for the whole batch, norms from each layer's input and output gradient"


def clipped_sum(
    model: Model,
    params: Params,
    buffers: Buffers,
    x: Tensor,
    target: Tensor,
    shrink: Shrink,
    knobs: Mapping[str, Tensor],
) -> tuple[Tree, Tensor]:
    """(Σ_b f(‖g_b‖)·g_b, norms `[b]`, or `[b tensor]` of scope "tensor"), the quicker way; zero of an empty batch."""
    if not len(x):
        shape = (0, len(params)) if shrink.scope == "tensor" else (0,)
        return {k: torch.zeros_like(v) for k, v in params.items()}, next(iter(params.values())).new_zeros(shape)
    way = taps if pick(model, shrink)[0] == "taps" else chunks
    return way.clipped_sum(model, params, buffers, x, target, shrink, knobs)


def update(
    client: Client,
    fused: Fused,
    knobs: Any,
    model: Model,
    params: Params,
    buffers: Buffers,
    x: Tensor,
    y: Tensor,
    draws: Tree | None = None,
) -> tuple[Tree, Tensor]:
    """(What `fused.rest` takes, norms): as `client.update` and the channel's first leg and join give it, row by row.

    `knobs` are the whole channel's. The norms are each example's before clipping: not private, never to be released.
    """
    fits(model, x, y)
    draws = draws or {}
    params, x = client.prepare(model, params, buffers, x, y, draws)
    masks = {k: v for k, v in draws.items() if k.startswith(MASK)}
    target = one_hot(y, model.classes, x.dtype)
    return clipped_sum(model, params, buffers | masks, x, target, fused.shrink, knobs[0][0])


def through(
    client: Client,
    fused: Fused,
    knobs: Any,
    model: Model,
    params: Params,
    buffers: Buffers,
    x: Tensor,
    y: Tensor,
    noise: Any,
    memory: Any,
    draws: Tree | None = None,
) -> tuple[Tree, Any]:
    """(Decoded update, memory) of one client behind the whole channel: no draws.

    Knobs, noise and memory are the whole channel's; its first leg draws nothing and remembers nothing.
    """
    summed, _ = update(client, fused, knobs, model, params, buffers, x, y, draws)
    messages, after = fused.rest.send(knobs[1:], summed, noise[1:], memory[1:], params)
    return fused.rest.receive(knobs[1:], messages[-1], params), (memory[0], *after)
