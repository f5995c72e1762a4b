"""Normalisation: out = γ x̂ + β, x̂ = (h − μ)/σ, σ² = var + ε.

μ and σ are numbers (batch norm by running statistics), or statistics of N numbers of h: a group of an image's channels,
or a channel of all images of a lane (batch norm by the batch). There the Jacobian of h ↦ x̂,
J w = (w − mean w − x̂ mean(x̂ w))/σ, is its own transpose, and its change along h′ is
J′ w = −(mean(x̂ h′) J w + x̂′ mean(x̂ w) + x̂ mean(x̂′ w))/σ with x̂′ = J h′.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qleak.types import Buffers, Layer, Params, Tree


class Statistics(NamedTuple):
    """x̂ `[lane·b c …]`, and 1/σ and the number of lanes beside it; `groups` as in `models.layers.norm`."""

    unit: Tensor
    rate: Tensor
    groups: int | str
    lanes: int


def up(layer: Layer, params: Params, buffers: Buffers, h: Tensor, lanes: int) -> tuple[Tensor, Statistics]:
    """(out, statistics)."""
    groups, eps = layer.options["groups"], layer.options["eps"]
    if groups == "running":
        mean, var = (_wide(buffers[f"{layer.options['running']}.running_{end}"], h) for end in ("mean", "var"))
        rate = (var + eps).rsqrt()
        unit = (h - mean) * rate
    else:
        off = h - _mean(h, groups, lanes)
        rate = (_mean(off.square(), groups, lanes) + eps).rsqrt()
        unit = off * rate
    out = _scaled(layer, params, unit)
    if layer.name:
        out = out + _wide(params[f"{layer.name}.bias"], unit)
    return out, Statistics(unit, rate, groups, lanes)


def weigh(kept: Statistics, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Σ δ x̂ and Σ δ over the images and places of a lane, `[lane c]` each."""
    one, other = (w.unflatten(0, (kept.lanes, -1)).sum(1) for w in (delta * kept.unit, delta))
    return one.flatten(2).sum(-1) if one.ndim > 2 else one, other.flatten(2).sum(-1) if one.ndim > 2 else other


def down(layer: Layer, params: Params, kept: Statistics, delta: Tensor) -> Tensor:
    """J γδ."""
    return _jacobian(kept, _scaled(layer, params, delta))


def push(layer: Layer, params: Params, kept: Statistics, tangent: Tensor | None, v: Tree) -> Tensor:
    """γ J h′ + v_γ x̂ + v_β."""
    out = torch.zeros_like(kept.unit) if tangent is None else _scaled(layer, params, _jacobian(kept, tangent))
    if layer.name:
        out = out + _own(v[f"{layer.name}.weight"], out) * kept.unit + _own(v[f"{layer.name}.bias"], out)
    return out


def pull(
    layer: Layer, params: Params, kept: Statistics, delta: Tensor, prime: Tensor, tangent: Tensor | None, v: Tree
) -> Tensor:
    """J (γδ′ + v_γ δ) + J′ γδ."""
    error = _scaled(layer, params, prime)
    if layer.name:
        error = error + _own(v[f"{layer.name}.weight"], delta) * delta
    found = _jacobian(kept, error)
    if tangent is None or kept.groups == "running":
        return found
    w, unit, moved = _scaled(layer, params, delta), kept.unit, _jacobian(kept, tangent)
    mean = lambda w: _mean(w, kept.groups, kept.lanes)  # noqa: E731
    change = mean(unit * tangent) * _jacobian(kept, w) + moved * mean(unit * w) + unit * mean(moved * w)
    return found - kept.rate * change


def _jacobian(kept: Statistics, w: Tensor) -> Tensor:
    if kept.groups == "running":
        return w * kept.rate
    along = _mean(kept.unit * w, kept.groups, kept.lanes)
    return kept.rate * (w - _mean(w, kept.groups, kept.lanes) - kept.unit * along)


def _mean(h: Tensor, groups: int | str, lanes: int) -> Tensor:
    """The mean over the numbers that share statistics, beside each of them: `[lane·b c …] -> [lane·b c 1 …]`."""
    ones = (1,) * (h.ndim - 2)
    if groups == "batch":
        rows = h.unflatten(0, (lanes, -1))
        mean = rows.mean((1, *range(3, rows.ndim)))
        return mean.repeat_interleave(len(h) // lanes, 0).view(*h.shape[:2], *ones)
    mean = h.reshape(len(h), int(groups), -1).mean(-1)
    return mean.repeat_interleave(h.shape[1] // int(groups), 1).view(*h.shape[:2], *ones)


def _scaled(layer: Layer, params: Params, h: Tensor) -> Tensor:
    return h * _wide(params[f"{layer.name}.weight"], h) if layer.name else h


def _wide(weight: Tensor, like: Tensor) -> Tensor:
    """One weight a channel beside `like [n c …]`."""
    return weight.view(-1, *(1,) * (like.ndim - 2))


def _own(v: Tensor, like: Tensor) -> Tensor:
    """A lane's own weights `[lane c]` beside every image of the lane."""
    return v.reshape(*v.shape, *(1,) * (like.ndim - 2)).repeat_interleave(len(like) // len(v), 0)
