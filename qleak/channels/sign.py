"""One-bit codes: sign, stochastic sign, and the vote's threshold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.channels.reading import bernoulli, read_cells
from qleak.check import one_of, positive
from qleak.types import Belief, Bound, Facts, Side, Stage, Tree

SCALES = ("mean", "none")


@factory
def sign(scale: str = "mean") -> Stage:
    """One bit a coordinate: x ≥ 0 or not; decoded as ±s per tensor.

    Args:
        scale: "mean" sends s = mean|x| of every tensor in clear (signSGD with mean magnitude, as in
            EF-signSGD, Karimireddy et al. 2019); "none" decodes to ±1 (signSGD, Bernstein et al. 2018).
    """
    one_of(SCALES, scale=scale)

    def send(knobs: dict, x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        code = {k: (v >= 0).to(torch.int32) for k, v in x.items()}
        return (
            code,
            ({"scale": {k: v.abs().sum() / max(v.numel(), 1) for k, v in x.items()}} if scale == "mean" else {}),
            state,
        )

    def cell(knobs: dict, code: Tree, side: Side, like: Tree) -> tuple[Tree, Tree]:
        zero = {k: torch.zeros(c.shape, dtype=like[k].dtype, device=c.device) for k, c in code.items()}
        lo = {k: torch.where(code[k] == 1, z, -math.inf) for k, z in zero.items()}
        return lo, {k: torch.where(code[k] == 1, math.inf, z) for k, z in zero.items()}

    def read(knobs: dict, code: Tree, side: Side, belief: Belief, law: str) -> Tree:
        return read_cells(cell(knobs, code, side, belief.mean), belief)

    def clear(knobs: dict, side: Side, mean: Tree) -> Tree:
        """Half-lines alone fit every shorter gradient too: the magnitude in clear says how long, n(mean|m| − s)²."""
        if scale == "none":
            return {}
        return {k: m.numel() * (m.abs().sum() / max(m.numel(), 1) - side["scale"][k]).square() for k, m in mean.items()}

    def push(knobs: dict, belief: Belief, side: Side | None) -> Belief:
        """Straight through a hard sign there is no gradient: the mean passes, at the decoded magnitude."""
        size = {k: m.detach().abs().mean() if scale == "mean" else m.new_ones(()) for k, m in belief.mean.items()}
        mean = {k: size[k] * torch.tanh(m / m.detach().abs().mean().clamp(min=1e-30)) for k, m in belief.mean.items()}
        return Belief(mean, {k: size[k].square() - m.square() for k, m in mean.items()})

    def cost(knobs: dict, before: Tree, after: Tree) -> float:
        return 32.0 * len(after) if scale == "mean" else 0.0

    return Stage("sign", "code", send, push, _receive, _fold(scale), read, cell, cost=cost, clear=clear)


@factory
def stochastic_sign(cap: float | None = None) -> Stage:
    """P(+1) = ½ + x/2b with b = min(max|x|, cap) per tensor: a coin per coordinate; decoded as ±1.

    Beyond the cap the coin is certain, which is how DataLens clips. The votes are sent, not b.
    Wang et al., "DataLens" (CCS 2021), Algorithm 1.

    Args:
        cap: largest b; None for max|x| alone.
    """
    if cap is not None:
        positive(cap=cap)

    def size(x: Tensor) -> Tensor:
        b = x.abs().amax() if x.numel() else x.new_ones(())
        return b if cap is None else b.clamp(max=cap)

    def mean_of(x: Tensor) -> Tensor:
        b = size(x.detach())
        return (x / torch.where(b > 0, b, 1)).clamp(-1, 1)

    def send(knobs: dict, x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        return {k: (noise[k] < (1 + mean_of(v)) / 2).to(torch.int32) for k, v in x.items()}, {}, state

    def push(knobs: dict, belief: Belief, side: Side | None) -> Belief:
        mean = {k: mean_of(m) * (m.detach() != 0) for k, m in belief.mean.items()}
        return Belief(mean, {k: (belief.mean[k].detach() != 0) * (1 - m.square()) for k, m in mean.items()})

    def read(knobs: dict, code: Tree, side: Side, belief: Belief, law: str) -> Tree:
        return {k: bernoulli((1 + mean_of(m)) / 2, code[k] == 1) for k, m in belief.mean.items()}

    def cell(knobs: dict, code: Tree, side: Side, like: Tree) -> tuple[Tree, Tree]:
        """A coin excludes nothing but the certain opposite: no finite bound."""
        open_ = {k: torch.full(c.shape, math.inf, dtype=like[k].dtype, device=c.device) for k, c in code.items()}
        return {k: -v for k, v in open_.items()}, open_

    return Stage("stochastic_sign", "code", send, push, _receive, _fold("none"), read, cell, noise="uniform")


def _receive(knobs: dict, code: Tree, side: Side, like: Tree) -> Tree:
    scale = side.get("scale", {})
    return {k: ((2 * c - 1).to(like[k].dtype) * scale.get(k, 1)).to(like[k].dtype) for k, c in code.items()}


def _fold(scale: str) -> Any:
    """Codes of ±1 bound the row by construction: ‖·‖₂ = √k over k coordinates, ‖·‖₁ = k."""

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        out = replace(reset, unbiased=False, width=1.0)
        if scale != "none":
            return out
        root = math.sqrt(sum(v.numel() for v in like.values())) if like is not None else None
        twice = None if root is None else 2 * root
        return replace(out, bound=Bound(2, root), sensitivity=Bound(2, twice, "replace-one"))

    return fold


@factory
def threshold(at: float = 1.0) -> Stage:
    """Votes to directions: 1[x > at] − 1[x < −at]; post-processing, free of privacy cost.

    Wang et al., "DataLens" (CCS 2021): at = β·(number of teachers).
    """
    positive(at=at)

    def send(knobs: dict[str, Tensor], x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        return (
            {k: ((v > knobs["at"]).to(torch.int32) - (v < -knobs["at"]).to(torch.int32)) for k, v in x.items()},
            {},
            state,
        )

    def receive(knobs: dict, code: Tree, side: Side, like: Tree) -> Tree:
        return {k: c.to(like[k].dtype) for k, c in code.items()}

    def cell(knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree) -> tuple[Tree, Tree]:
        at_ = {k: knobs["at"].to(like[k].dtype).expand(c.shape) for k, c in code.items()}
        lo = {k: torch.where(c == 1, at_[k], torch.where(c == 0, -at_[k], -math.inf)) for k, c in code.items()}
        return lo, {k: torch.where(c == -1, -at_[k], torch.where(c == 0, at_[k], math.inf)) for k, c in code.items()}

    def read(knobs: dict[str, Tensor], code: Tree, side: Side, belief: Belief, law: str) -> Tree:
        return read_cells(cell(knobs, code, side, belief.mean), belief)

    def push(knobs: dict[str, Tensor], belief: Belief, side: Side | None) -> Belief:
        mean = {k: torch.tanh(m / knobs["at"]) for k, m in belief.mean.items()}
        return Belief(mean, {k: 1 - m.square() for k, m in mean.items()})

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        return replace(reset, unbiased=False, width=math.log2(3))

    return Stage(
        "threshold",
        "code",
        send,
        push,
        receive,
        fold,
        read,
        cell,
        knobs={"at": at},
    )
