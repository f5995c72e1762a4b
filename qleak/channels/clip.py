"""Norm clipping: the stage that gives later noise a bound to stand on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from qleak import tree
from qleak.catalog import factory
from qleak.check import positive
from qleak.types import Belief, Bound, Facts, Side, Stage, Tree


@factory
def clip_l2(bound: float = 1.0) -> Stage:
    """X · min(1, bound/‖x‖₂) over all tensors together (Abadi et al. 2016, Algorithm 1)."""
    positive(bound=bound)
    return _clip("clip_l2", 2, bound)


@factory
def clip_l1(bound: float = 1.0) -> Stage:
    """X · min(1, bound/‖x‖₁) over all tensors together: the bound that Laplace noise needs."""
    positive(bound=bound)
    return _clip("clip_l1", 1, bound)


def _clip(name: str, p: Literal[1, 2], bound: float) -> Stage:
    def factor(norm: Tensor, knobs: dict[str, Tensor]) -> Tensor:
        return (knobs["bound"] / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)

    def send(knobs: dict[str, Tensor], x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        return tree.scale(x, factor(tree.norm(x, p), knobs)), {}, state

    def push(knobs: dict[str, Tensor], belief: Belief, side: Side | None) -> Belief:
        """With noise in front the norm is ‖m‖² + Σvar (L2); the factor is treated as known."""
        squared = tree.dot(belief.mean, belief.mean)
        if belief.var and p == 2:
            squared = squared + torch.stack([v.sum() for v in belief.var.values()]).sum()
        norm = squared.clamp(min=1e-30).sqrt() if p == 2 else tree.norm(belief.mean, 1)
        f = factor(norm, knobs)
        return Belief(tree.scale(belief.mean, f), tree.scale(belief.var, f.square()))

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        exact = before.exact and before.law == "none"
        sensitivity = Bound(p, 2 * bound, "replace-one")
        return replace(reset, bound=Bound(p, bound), sensitivity=sensitivity, unbiased=False, exact=exact)

    return Stage(name, "value", send, push, fold=fold, knobs={"bound": bound})
