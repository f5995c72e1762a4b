"""Sparsifiers: keep some coordinates, be silent on the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.channels.reading import interval, soft_interval, widen
from qleak.check import Expected, at_least, between, one_of, whole
from qleak.types import Belief, Facts, Side, Stage, Tree

SCOPES = ("tensor", "global")


@factory
def top_k(ratio: float | None = None, k: int | None = None, scope: str = "tensor") -> Stage:
    """The k coordinates of largest magnitude of every tensor (or of all together), and where they stand.

    Sends the kept values `[k]` and their indices (k·⌈log₂ n⌉ bits, or an n-bit map if that is
    shorter). Silence speaks too: a dropped coordinate is no larger than the smallest kept one.
    Aji, Heafield, "Sparse Communication for Distributed Gradient Descent" (EMNLP 2017); pruning small
    entries is the defence of Zhu et al. 2019, section 5.2.

    Args:
        ratio: keep ⌈ratio·n⌉ coordinates of each tensor; 0.1 when neither argument is given.
        k: keep min(k, n) coordinates of each tensor.
        scope: "tensor", or "global": one ranking over all tensors.

    Raises:
        Expected: ratio outside (0, 1], k below 1, or both given.
    """
    kept = _kept(ratio, k)
    one_of(SCOPES, scope=scope)

    def shape(like: Tree) -> Tree:
        return {name: v.new_empty(kept(v.numel())) for name, v in _joined(like, scope).items()}

    def choose(flat: Tree) -> Tree:
        # Ranked by magnitude, sent in the order of their places: the order itself should say nothing.
        return {name: v.abs().topk(kept(v.shape[0]), sorted=False).indices.sort().values for name, v in flat.items()}

    def send(knobs: dict, x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        flat = _joined(x, scope)
        index = choose(flat)
        return {name: v.gather(0, index[name]) for name, v in flat.items()}, {"index": index}, state

    def push(knobs: dict, belief: Belief, side: Side | None) -> Belief:
        if side is not None:
            return _gathered(belief, side["index"], scope)
        index = choose({n: v.detach() for n, v in _joined(belief.mean, scope).items()})
        return _masked(belief, index, scope)

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        # Dropping coordinates shrinks every norm, so bounds that follow from it stay. A sensitivity alone does not:
        # the support of two close sums may differ, and a coordinate that is kept in one of them counts in full.
        twice = before.bound and replace(before.bound, adjacency="replace-one")
        twice = twice and replace(twice, value=None if twice.value is None else 2 * twice.value)
        return replace(before, sensitivity=twice, unbiased=False)

    def cost(knobs: dict, before: Tree, after: Tree) -> float:
        pairs = [(_joined(before, scope)[name].numel(), v.numel()) for name, v in after.items()]
        return float(sum(min(m * math.ceil(math.log2(max(n, 2))), n) for n, m in pairs))

    def receive(knobs: dict, values: Tree, side: Side, like: Tree) -> Tree:
        return _placed(values, side["index"], like, scope)

    def cell(knobs: dict, within: tuple[Tree, Tree], side: Side, like: Tree) -> tuple[Tree, Tree]:
        limits = {n: _limit(lo, within[1][n]) for n, lo in within[0].items()}
        low = _placed(within[0], side["index"], like, scope, {n: -v for n, v in limits.items()})
        high = _placed(within[1], side["index"], like, scope, limits)
        pairs = {n: widen(low[n], high[n]) if low[n].numel() else (low[n], high[n]) for n in like}
        return {n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()}

    def dropped(side: Side, belief: Belief, within: tuple[Tree, Tree], law: str) -> Tree:
        ones = {n: torch.zeros_like(v) for n, v in within[0].items()}
        silent = _placed(ones, side["index"], belief.mean, scope, {n: v.new_ones(()) for n, v in ones.items()})
        reach = {n: _limit(lo, within[1][n]) for n, lo in within[0].items()}
        out = {}
        for name, m in belief.mean.items():
            limit = reach[name if scope == "tensor" else ALL].to(m.dtype).expand(m.shape)
            v = belief.var.get(name)
            out[name] = silent[name] * (interval(m, -limit, limit) if v is None else soft_interval(m, -limit, limit, v))
        return out

    return Stage("top_k", "select", send, push, receive, fold, None, cell, dropped, cost, shape)


@factory
def random_k(ratio: float | None = None, k: int | None = None) -> Stage:
    """A random k of every tensor, drawn uniformly, scaled by n/k: unbiased, and blind to magnitude.

    The draw comes from a seed that both ends share, so places cost 32 bits; silence says nothing.
    Konečný et al., "Federated Learning: Strategies for Improving Communication Efficiency" (2016),
    section 3; Wangni et al. (NeurIPS 2018).

    Args:
        ratio: keep ⌈ratio·n⌉ coordinates of each tensor; 0.1 when neither argument is given.
        k: keep min(k, n) coordinates of each tensor.

    Raises:
        Expected: ratio outside (0, 1], k below 1, or both given.
    """
    kept = _kept(ratio, k)

    def grow(n: int) -> float:
        return n / max(kept(n), 1)

    def shape(like: Tree) -> Tree:
        return {name: v.new_empty(kept(v.numel())) for name, v in like.items()}

    def send(knobs: dict, x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        index = {n: noise[n].reshape(-1).argsort()[: kept(v.numel())].sort().values for n, v in x.items()}
        values = {n: v.reshape(-1).gather(0, index[n]) * grow(v.numel()) for n, v in x.items()}
        return values, {"index": index}, state

    def push(knobs: dict, belief: Belief, side: Side | None) -> Belief:
        factor = {n: grow(m.numel()) for n, m in belief.mean.items()}
        if side is not None:
            kept_ = _gathered(belief, side["index"], "tensor")
            return Belief(
                {n: m * factor[n] for n, m in kept_.mean.items()}, {n: v * factor[n] ** 2 for n, v in kept_.var.items()}
            )
        var = {
            n: factor[n] * belief.var.get(n, torch.zeros_like(m)) + (factor[n] - 1) * m.square()
            for n, m in belief.mean.items()
        }
        return Belief(belief.mean, var)

    def receive(knobs: dict, values: Tree, side: Side, like: Tree) -> Tree:
        return _placed(values, side["index"], like, "tensor")

    def cell(knobs: dict, within: tuple[Tree, Tree], side: Side, like: Tree) -> tuple[Tree, Tree]:
        lows, highs = ({n: v / grow(like[n].numel()) for n, v in t.items()} for t in within)
        open_ = {n: v.new_full((), math.inf) for n, v in lows.items()}
        low = _placed(lows, side["index"], like, "tensor", {n: -v for n, v in open_.items()})
        high = _placed(highs, side["index"], like, "tensor", open_)
        pairs = {n: widen(low[n], high[n]) if low[n].numel() else (low[n], high[n]) for n in like}
        return {n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()}

    def dropped(side: Side, belief: Belief, within: tuple[Tree, Tree], law: str) -> Tree:
        return {n: torch.zeros_like(m) for n, m in belief.mean.items()}

    def cost(knobs: dict, before: Tree, after: Tree) -> float:
        return 32.0

    return Stage(
        "random_k", "select", send, push, receive, _shrunk, None, cell, dropped, cost, shape, noise="uniform"
    )  # fmt: skip


def _shrunk(before: Facts, reset: Facts, like: Tree | None) -> Facts:
    return reset  # scaled up: no bound in front survives


def _kept(ratio: float | None, k: int | None) -> Callable[[int], int]:
    if ratio is not None and k is not None:
        raise Expected(f"Expected one of ratio={ratio} and k={k}, got both.")
    if k is not None:
        whole(k=k)
        at_least(1, k=k)
        return lambda n: min(k, n)
    part = 0.1 if ratio is None else ratio
    between(1e-9, 1, ratio=part)
    return lambda n: math.ceil(part * n)


ALL = "all"


def _joined(x: Tree, scope: str) -> Tree:
    """Every tensor flat; one vector of all of them where the ranking is global."""
    flat = {name: v.reshape(-1) for name, v in x.items()}
    return flat if scope == "tensor" else {ALL: torch.cat(list(flat.values()))}


def _gathered(belief: Belief, index: Tree, scope: str) -> Belief:
    def pick(t: Tree) -> Tree:
        return {name: v.gather(0, index[name]) for name, v in _joined(t, scope).items()} if t else {}

    return Belief(pick(belief.mean), pick(belief.var))


def _masked(belief: Belief, index: Tree, scope: str) -> Belief:
    ones = {n: torch.ones_like(i, dtype=next(iter(belief.mean.values())).dtype) for n, i in index.items()}
    mask = _placed(ones, index, belief.mean, scope)
    return Belief(*({n: v * mask[n] for n, v in t.items()} for t in belief))


def _placed(values: Tree, index: Tree, like: Tree, scope: str, fill: Tree | None = None) -> Tree:
    """Kept values back at their places, `fill` (zero) everywhere else."""
    flat = {}
    for name, v in values.items():
        n = like[name].numel() if scope == "tensor" else sum(t.numel() for t in like.values())
        blank = v.new_zeros(()) if fill is None else fill[name].to(v.dtype)
        flat[name] = blank.expand(n).scatter(0, index[name], v)
    if scope == "global":
        flat = dict(zip(like, flat[ALL].split([t.numel() for t in like.values()]), strict=True))
    return {name: v.reshape(like[name].shape).to(like[name].dtype) for name, v in flat.items()}


def _limit(lo: Tensor, hi: Tensor) -> Tensor:
    """The largest magnitude a dropped coordinate can have: that of the smallest kept one, at its cell's far end."""
    return torch.maximum(lo.abs(), hi.abs()).amin() if lo.numel() else lo.new_zeros(())
