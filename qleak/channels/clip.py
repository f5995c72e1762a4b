"""Norm clipping: the stage that gives later noise a bound to stand on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qleak import tree
from qleak.catalog import factory
from qleak.check import positive
from qleak.types import Belief, Bound, Facts, Shrink, Side, Stage, Tree

Knobs = Mapping[str, Tensor]


@factory
def clip_l2(bound: float = 1.0) -> Stage:
    """X · min(1, bound/‖x‖₂) over all tensors together (Abadi et al. 2016, Algorithm 1)."""
    positive(bound=bound)
    return _shrinking("clip_l2", Shrink(2, "all", _threshold), {"bound": bound})


@factory
def clip_l1(bound: float = 1.0) -> Stage:
    """X · min(1, bound/‖x‖₁) over all tensors together: the bound that Laplace noise needs."""
    positive(bound=bound)
    return _shrinking("clip_l1", Shrink(1, "all", _threshold), {"bound": bound})


@factory
def clip_layers(bound: float = 1.0) -> Stage:
    """X_j · min(1, bound/(√m ‖x_j‖₂)) for each of the m tensors, so that the whole row is no longer than `bound`.

    The per-layer flat clipping of McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent
    Language Models" (ICLR 2018); weight and bias are two tensors.
    """
    positive(bound=bound)

    def factor(knobs: Knobs, norm: Tensor) -> Tensor:
        return _least(knobs["bound"] / math.sqrt(norm.shape[-1]), norm)

    return _shrinking("clip_layers", Shrink(2, "tensor", factor), {"bound": bound})


@factory
def automatic(bound: float = 1.0, gamma: float = 0.01) -> Stage:
    """X · bound/(‖x‖₂ + γ): every row is brought to nearly the same length; no threshold decides which.

    AUTO-S of Bu, Wang, Zha, Karypis, "Automatic Clipping" (NeurIPS 2023, section 4): ‖y‖ < bound, and y keeps
    the order of lengths, which normalising (γ = 0) would lose.

    Args:
        bound: what no row exceeds.
        gamma: γ, in the units of the row; rows much shorter than it stay short.
    """
    positive(bound=bound, gamma=gamma)

    def factor(knobs: Knobs, norm: Tensor) -> Tensor:
        return knobs["bound"] / (norm + knobs["gamma"])

    return _shrinking("automatic", Shrink(2, "all", factor), {"bound": bound, "gamma": gamma})


@factory
def unit() -> Stage:
    """X / ‖x‖₂ over all tensors together: every row has length 1, and its direction is all it says.

    A row of zeros stays zero, and so does one shorter than 1e-18, whose squares float32 cannot hold: scaling it up
    would break the bound. Normalised gradients as in AUTO-V of Bu, Wang, Zha, Karypis, "Automatic Clipping" (NeurIPS
    2023), here for rows of any kind.
    """

    def factor(knobs: Knobs, norm: Tensor) -> Tensor:
        return torch.where(norm > LEAST, 1 / norm.clamp(min=LEAST), 0)

    return _shrinking("unit", Shrink(2, "all", factor), {}, 1.0)


LEAST = 1e-18


def _threshold(knobs: Knobs, norm: Tensor) -> Tensor:
    return _least(knobs["bound"], norm)


def _least(bound: Tensor, norm: Tensor) -> Tensor:
    return (bound / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1)


def _shrinking(name: str, shrink: Shrink, knobs: dict[str, float], bound: float | None = None) -> Stage:
    """The stage of one shrinking; the norm it promises is `bound`, or its knob of that name."""
    p, bound = shrink.p, knobs["bound"] if bound is None else bound

    def send(knobs: Knobs, x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        return tree.zip_map(torch.mul, x, _factors(shrink, knobs, {k: _size(v, p) for k, v in x.items()})), {}, state

    def push(knobs: Knobs, belief: Belief, side: Side | None) -> Belief:
        """With noise in front a squared L2 norm is ‖m‖² + Σvar; the factor is treated as known."""
        sizes = {k: _size(v, p) for k, v in belief.mean.items()}
        if p == 2:
            more = {k: v.sum() for k, v in belief.var.items()}
            sizes = {k: (v + more.get(k, 0)).clamp(min=1e-30) for k, v in sizes.items()}  # √ has no slope at 0
        f = _factors(shrink, knobs, sizes)
        return Belief(tree.zip_map(torch.mul, belief.mean, f), {k: v * f[k].square() for k, v in belief.var.items()})

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        exact = before.exact and before.law == "none"
        sensitivity = Bound(p, 2 * bound, "replace-one")
        return replace(reset, bound=Bound(p, bound), sensitivity=sensitivity, unbiased=False, exact=exact)

    return Stage(name, "value", send, push, fold=fold, knobs=knobs, shrink=shrink)


def _size(v: Tensor, p: int) -> Tensor:
    """What adds up over tensors: Σ|v| or Σv²."""
    return v.abs().sum() if p == 1 else v.square().sum()


def _factors(shrink: Shrink, knobs: Knobs, sizes: Tree) -> Tree:
    """Each tensor's factor, from the sizes of all of one row."""
    each = torch.stack(list(sizes.values()))
    root = torch.abs if shrink.p == 1 else torch.sqrt
    if shrink.scope == "all":
        return dict.fromkeys(sizes, shrink.factor(knobs, root(each.sum())))
    return dict(zip(sizes, shrink.factor(knobs, root(each)).unbind(-1), strict=True))
