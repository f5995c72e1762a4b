"""What a message says about the last layer: its mean gradient, bounds on it, and what the layer's inputs look like.

With mean cross-entropy over B images, ∂L/∂b[c] = (1/B) Σᵢ (pᵢ − yᵢ)[c] and ∂L/∂W[c] = (1/B) Σᵢ (pᵢ − yᵢ)[c]·hᵢ,
where hᵢ is the input of the last linear layer and pᵢ its softmax. All rules for labels start from these two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from qleak import random
from qleak.channels.repeat import Rounds
from qleak.client import View
from qleak.types import Tree

DUMMIES = 64
"""Public inputs, uniform noise, on which the model is looked at where the batch itself says too little."""


class Reading(NamedTuple):
    """One tensor of the mean gradient, `[lane …]` each: the decoded number, the interval it lies in, its variance.

    Without an interval `lo = −inf`, `hi = inf`; `var` is that of rounding (width²/12) or of the channel's noise,
    infinite where a coordinate is missing, zero where the number was sent as it is.
    """

    at: Tensor
    lo: Tensor
    hi: Tensor
    var: Tensor


class Seen(NamedTuple):
    """The last linear layer in a view: its gradient, and its weights `w [class d]`, `b [class]` (zero without a bias).

    `weight [lane class d]`, `bias [lane class]` or None. `cells`: the channel says intervals; `exact`: it says
    nothing of an error.
    """

    weight: Reading
    bias: Reading | None
    w: Tensor
    b: Tensor
    cells: bool
    exact: bool


def last_names(params: Tree, classes: int) -> tuple[str | None, str | None]:
    """Names of the last linear layer's weight `[class d]` and bias `[class]`; None for what it does not have."""
    weight = next((k for k, v in reversed(params.items()) if v.ndim == 2 and len(v) == classes), None)
    last = list(params)[-1]
    bias = last if params[last].ndim == 1 and len(params[last]) == classes else None
    return weight, bias


def why_not(view: View, bias: bool = False) -> str:
    """Why the last layer cannot be looked at, or ""."""
    weight, last = last_names(view.params, view.model.classes)
    if weight is None:
        return f"needs a last linear layer with {view.model.classes} rows."
    return "needs a bias in the last layer." if bias and last is None else ""


def seen(view: View) -> Seen:
    """The gradient of the last layer, as a mean over all images, with what is known of its error."""
    classes = view.model.classes
    weight, bias = last_names(view.params, classes)
    assert weight is not None
    readings = _readings(view, [n for n in (weight, bias) if n])
    kind = _kind(view)
    w = view.params[weight]
    b = view.params[bias] if bias else w.new_zeros(classes)
    return Seen(readings[weight], readings[bias] if bias else None, w, b, kind == "cells", kind == "numbers")


def _kind(view: View) -> str:
    """How the message is read: as "moments" (noise and coins), as "cells", or as plain "numbers"."""
    channel, leg = view.channel, view.leg
    if leg % len(channel.legs) or not channel.stages or channel.depth(leg):
        return "numbers"
    if channel.has_moments(leg):
        return "moments"
    return "cells" if all(s.cell for s in channel.legs[0].stages) else "numbers"


def _readings(view: View, names: list[str]) -> dict[str, Reading]:
    channel, leg = view.channel, view.leg
    unit = view.client.scale * gain(view)
    decoded = view.decoded()
    at = {n: decoded[n].flatten(1, channel.depth(leg)).mean(1) if channel.depth(leg) else decoded[n] for n in names}
    lo = {n: torch.full_like(v, -math.inf) for n, v in at.items()}
    hi = {n: torch.full_like(v, math.inf) for n, v in at.items()}
    var = {n: torch.zeros_like(v) for n, v in at.items()}
    knobs = channel.knobs(device=view.like[names[0]].device)
    if _kind(view) == "moments":
        at, var = _moments(view, knobs, names)
    elif _kind(view) == "cells":
        low, high = vmap(lambda m: channel.cell(knobs, m, view.like, leg))(view.message)
        lo, hi = {n: low[n] for n in names}, {n: high[n] for n in names}
        var = {n: _rounding(lo[n], hi[n], at[n]) for n in names}
    clean = {n: v.nan_to_num(0.0, 0.0, 0.0) / unit for n, v in at.items()}
    return {n: Reading(clean[n], lo[n] / unit, hi[n] / unit, var[n] / unit**2) for n in names}


def _rounding(lo: Tensor, hi: Tensor, at: Tensor) -> Tensor:
    """Variance of a number uniform on its interval; a half-line knows no more than a size, a missing number nothing."""
    wide = (hi - lo).square() / 12
    half = lo.isfinite() | hi.isfinite()
    return torch.where(wide.isfinite(), wide, torch.where(half, at.square(), math.inf))


def _moments(view: View, knobs: object, names: list[str]) -> tuple[Tree, Tree]:
    at, var = vmap(
        lambda m: (
            vmap(lambda r: view.channel.moments(knobs, r, view.like, view.leg))(m)  # pyright: ignore[reportArgumentType]
            if isinstance(view.channel, Rounds)
            else view.channel.moments(knobs, m, view.like, view.leg)  # pyright: ignore[reportArgumentType]
        )
    )(view.message)
    if isinstance(view.channel, Rounds):
        times = view.channel.times
        at, var = {k: v.mean(1) for k, v in at.items()}, {k: v.mean(1) / times for k, v in var.items()}
    return {n: at[n] for n in names}, {n: var[n].expand_as(at[n]) for n in names}


def gain(view: View) -> float:
    """What sums and scalings of the channel multiply a mean over rows by; clipping is not counted."""
    factor = 1.0
    for stage in view.channel.upto(view.leg).stages:
        if stage.kind == "join":
            factor *= max(view.client.count, 1)
        factor *= stage.knobs.get("factor", 1.0) if stage.name == "scale" else 1.0
    return factor


def dummies(view: View) -> tuple[Tensor, Tensor]:
    """Inputs of the last layer `[n d]` and softmax `[n class]` of uniform-noise images, the same in every run.

    The input is ∂ logit₀/∂W[0], so that any model that ends in a linear layer will do.
    """
    weight = last_names(view.params, view.model.classes)[0]
    assert weight is not None
    w = view.params[weight]
    x = random.uniform(random.generator("labels", "dummies"), (DUMMIES, *view.model.shape)).to(w)

    def logit(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = view.model.apply({**view.params, weight: w}, view.buffers, x[None])[0]
        return logits[0], logits

    h, logits = vmap(grad(logit, has_aux=True), in_dims=(None, 0), chunk_size=16)(w, x)
    return h[:, 0], logits.softmax(-1)


def path(view: View) -> list[float]:
    """Shares of the update at which the client took its gradients: 0 alone for one step, t/K for K steps (at most 8)."""
    steps = max(view.client.steps, 1)
    points = min(steps, 8)
    return [(i + 0.5 * (steps > points)) / points * (1.0 if steps > points else points / steps) for i in range(points)]


def softmax_along(view: View, seen: Seen, h: Tensor, shift: Tensor | None = None) -> Tensor:
    """Mean of softmax(W h + b + shift) over the weights of the client's steps: `h [lane n d]` -> `[lane n class]`.

    Between θ₀ and θ₀ − update the last layer is taken to move on a straight line. `shift [lane class]` is added to
    all logits.
    """
    moved = view.client.scale
    total = 0.0
    shares = path(view)
    for share in shares:
        logits = h @ seen.w.mT + seen.b + (0 if shift is None else shift[:, None])
        if share:
            logits = logits - share * moved * (h @ seen.weight.at.mT)
            if seen.bias is not None:
                logits = logits - share * moved * seen.bias.at[:, None]
        total = total + logits.softmax(-1)
    return total / len(shares)  # pyright: ignore[reportReturnType]
