"""Sparsifiers: keep some coordinates, be silent on the others."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.channels.reading import interval, soft_interval, widen
from qleak.check import Expected, at_least, between, whole
from qleak.types import Belief, Facts, Side, Stage, Tree


@factory
def top_k(ratio: float | None = None, k: int | None = None) -> Stage:
    """The k coordinates of largest magnitude of every tensor, and where they stand.

    Sends the kept values `[k]` and their indices (k·⌈log₂ n⌉ bits, or an n-bit map if that is
    shorter). Silence speaks too: a dropped coordinate is no larger than the smallest kept one.

    Args:
        ratio: keep ⌈ratio·n⌉ coordinates of each tensor; 0.1 when neither argument is given.
        k: keep min(k, n) coordinates of each tensor.

    Raises:
        Expected: ratio outside (0, 1], k below 1, or both given.
    """
    if ratio is not None and k is not None:
        raise Expected(f"Expected one of ratio={ratio} and k={k}, got both.")
    if k is not None:
        whole(k=k)
        at_least(1, k=k)
    else:
        ratio = 0.1 if ratio is None else ratio
        between(1e-9, 1, ratio=ratio)

    def kept(n: int) -> int:
        return min(k, n) if k is not None else math.ceil((ratio or 0) * n)

    def shape(like: Tree) -> Tree:
        return {name: v.new_empty(kept(v.numel())) for name, v in like.items()}

    def send(knobs: dict, x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        flat = {name: v.reshape(-1) for name, v in x.items()}
        index = {name: v.abs().topk(kept(v.shape[0]), sorted=False).indices.sort().values for name, v in flat.items()}
        return {name: v.gather(0, index[name]) for name, v in flat.items()}, {"index": index}, state

    def push(knobs: dict, belief: Belief, side: Side | None) -> Belief:
        if side is not None:
            gather = lambda t: {name: v.reshape(-1).gather(0, side["index"][name]) for name, v in t.items()}  # noqa: E731
            return Belief(gather(belief.mean), gather(belief.var))
        mean, _, _ = send(knobs, belief.mean, {}, ())
        mask = {}
        for name, v in belief.mean.items():
            index = v.detach().abs().reshape(-1).topk(mean[name].shape[0], sorted=False).indices
            mask[name] = (
                torch.zeros_like(v.reshape(-1)).scatter(0, index, torch.ones_like(index, dtype=v.dtype)).view_as(v)
            )
        masked = lambda t: {name: v * mask[name] for name, v in t.items()}  # noqa: E731
        return Belief(masked(belief.mean), masked(belief.var))

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        # Dropping coordinates shrinks every norm, so bounds that follow from it stay.
        return replace(before, unbiased=False)

    def cost(knobs: dict, before: Tree, after: Tree) -> float:
        pairs = [(before[name].numel(), v.numel()) for name, v in after.items()]
        return float(sum(min(m * math.ceil(math.log2(max(n, 2))), n) for n, m in pairs))

    return Stage("top_k", "select", send, push, _receive, fold, None, _cell, _dropped, cost, shape)


def _scatter(values: Tensor, index: Tensor, like: Tensor, fill: Tensor) -> Tensor:
    flat = fill.to(values.dtype).expand(like.numel())
    return flat.scatter(0, index, values).reshape(like.shape)


def _receive(knobs: dict, values: Tree, side: Side, like: Tree) -> Tree:
    zero = {name: v.new_zeros(()) for name, v in values.items()}
    return {
        name: _scatter(v, side["index"][name], like[name], zero[name]).to(like[name].dtype)
        for name, v in values.items()
    }


def _limit(lo: Tensor, hi: Tensor) -> Tensor:
    """The largest magnitude a dropped coordinate can have: that of the smallest kept one, at its cell's far end."""
    return torch.maximum(lo.abs(), hi.abs()).amin() if lo.numel() else lo.new_zeros(())


def _cell(knobs: dict, kept: tuple[Tree, Tree], side: Side, like: Tree) -> tuple[Tree, Tree]:
    lows, highs = {}, {}
    for name, lo in kept[0].items():
        hi = kept[1][name]
        limit = _limit(lo, hi)
        low, high = (_scatter(v, side["index"][name], like[name], s * limit) for v, s in ((lo, -1), (hi, 1)))
        lows[name], highs[name] = widen(low, high) if low.numel() else (low, high)
    return lows, highs


def _dropped(side: Side, belief: Belief, kept: tuple[Tree, Tree], law: str) -> Tree:
    out = {}
    for name, m in belief.mean.items():
        limit = _limit(kept[0][name], kept[1][name])
        silent = _scatter(torch.zeros_like(kept[0][name], dtype=m.dtype), side["index"][name], m, m.new_ones(()))
        v = belief.var.get(name)
        limits = -limit.expand(m.shape), limit.expand(m.shape)
        out[name] = silent * (interval(m, *limits) if v is None else soft_interval(m, *limits, v))
    return out
