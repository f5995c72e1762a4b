"""Rounds of DP-SGD whose clipping bound follows a quantile of the norms (`private/adaptive.py`), one client."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qleak import random
from qleak.channels import Channel
from qleak.check import Expected
from qleak.private import adaptive, fused
from qleak.train.federated import Federation, State, draws_of, minibatch, noise_of
from qleak.types import Client


def widened(channel: Channel, sigma: float) -> float:
    """z_Δ/z: how much more noise the sum needs, so that sum and count together cost what the channel's ε says.

    Raises:
        Expected: the channel's noise on the sum is not Gaussian, or σ_b is too small for it.
    """
    z = getattr(channel.facts().event, "noise_multiplier", None)
    if z is None or not any(stage.name == "gaussian" for stage in channel.stages):
        raise Expected(f"Expected clip_l2, total and gaussian in {channel.spec} with an adaptive clipping bound.")
    return adaptive.multiplier(z, sigma) / z


def check(client: Client, channel: Channel, sigma: float) -> None:
    """Refuses a channel whose bound cannot follow the norms.

    Raises:
        Expected: it does not clip one norm of each example's gradient and add Gaussian noise to the sum.
    """
    joined = fused.split(client, channel)
    if joined is None or joined.stage.name != "clip_l2":
        raise Expected(
            f"Expected clip_l2 and total in {channel.spec} behind per_example with an adaptive clipping bound."
        )
    widened(channel, sigma)


def knobs(channel: Channel, factor: Tensor, more: float) -> Any:
    """The channel's knobs with its bound times `factor` = C_t/C_0, and its noise times `factor` · `more`."""
    scales = {"clip_l2": ("bound", factor), "gaussian": ("size", factor * more)}
    return tuple(
        tuple(
            {k: v * scales[s.name][1] if s.name in scales and k == scales[s.name][0] else v for k, v in each.items()}
            for s, each in zip(leg.stages, held, strict=True)
        )
        for leg, held in zip(channel.legs, channel.knobs(device=factor.device), strict=True)
    )


def advance(fed: Federation, state: State, lr: float) -> State:
    """One round: clipped at C_t, noise in proportion, and C_(t+1) from a noisy count of the gradients left whole."""
    assert fed.adaptive is not None
    number, settings = int(state.round), fed.adaptive
    joined = fused.split(fed.client, fed.channel, fed.model)
    assert joined is not None
    first = torch.tensor(joined.stage.knobs["bound"], device=state.bound["bound"].device)
    now = knobs(fed.channel, state.bound["bound"] / first, widened(fed.channel, settings.sigma))
    x, y = minibatch(fed, 0, int(state.taken[0]))
    noise, draws = noise_of(fed, number, 0, len(x), state.params), draws_of(fed, number, 0, len(x), lr)
    summed, norms = fused.update(fed.client, joined, now, fed.model, state.params, fed.buffers, x, y, draws)
    messages, after = joined.rest.send(now[1:], summed, noise[1:], state.memory[0][1:], state.params)
    decoded = joined.rest.receive(now[1:], messages[-1], state.params)
    coin = random.normal(random.generator(fed.seed, "count", fed.index, number), ()).to(first.device)
    bound = adaptive.update(settings, adaptive.State(state.bound["bound"]), norms, coin).bound
    params, rule = fed.rule.update(state.params, state.rule, decoded, lr)
    memory = ((state.memory[0][0], *after),)
    return State(params, rule, memory, state.taken + 1, state.round + 1, {}, {}, {"bound": bound})
