"""Unbiased quantizers of a magnitude and a sign: QSGD and TernGrad."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.channels.grid import Groups, groups, largest
from qleak.channels.reading import coded, read_coin, widen
from qleak.check import at_least, one_of, whole
from qleak.types import Belief, Facts, Side, Stage, Tree

NORMS = ("l2", "max")


@factory
def qsgd(levels: int = 15, norm: str = "l2", bucket: int = 512) -> Stage:
    """QSGD: norm · sign(x) · ξ/levels with E ξ = levels·|x|/norm, rounded by a fair coin; unbiased.

    The norm of every bucket travels in clear (32 bits). Alistarh et al., "QSGD" (NeurIPS 2017),
    section 3.1, and section 4 for buckets and the max-norm. Codes are counted at ⌈log₂(2·levels + 1)⌉
    bits; their entropy, which Elias coding comes near, is the second figure.

    Args:
        levels: positive quantization levels s; 15 with a sign makes 5 bits.
        norm: "l2", or "max" as in the paper's experiments.
        bucket: coordinates that share a norm.
    """
    whole(levels=levels)
    at_least(1, levels=levels)
    one_of(NORMS, norm=norm)
    return _magnitude("qsgd", groups("bucket", bucket), norm, float(levels), 0.0)


@factory
def terngrad(clip: float = 2.5) -> Stage:
    """TernGrad: s·sign(x)·b with P(b = 1) = |x|/s and s = max|x| of every tensor: {−s, 0, s}.

    Wen et al., "TernGrad" (NeurIPS 2017), equations 1–3. Before that, coordinates are clipped to ±clip·σ
    of their tensor (equation 9), which is where the unbiasedness ends.

    Args:
        clip: in standard deviations of a tensor; 0 never clips, and is unbiased.
    """
    at_least(0, clip=clip)
    return _magnitude("terngrad", Groups("tensor", 1), "max", 1.0, clip)


def _magnitude(name: str, cut: Groups, norm: str, levels: float, clip: float) -> Stage:
    def size(v: Tensor) -> Tensor:
        rows = cut.zero_rows(v)
        return rows.norm(dim=-1) if norm == "l2" else largest(rows)

    def clipped(v: Tensor) -> Tensor:
        if not clip or v.numel() < 2:
            return v
        limit = clip * v.detach().std(correction=0)
        return torch.maximum(torch.minimum(v, limit), -limit)

    def send(knobs: dict[str, Tensor], x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        code, norms = {}, {}
        for k, v in x.items():
            v = clipped(v)
            norms[k] = size(v)
            step = step_of(knobs, norms[k], v)
            t = v / torch.where(step > 0, step, 1)
            # In floating point max|x|/(max|x|/s) may exceed s, and s plus a coin next to 1 rounds to s + 1.
            up = (t.abs() + noise[k].to(t.dtype)).floor()
            code[k] = (torch.sign(t) * torch.minimum(up, knobs["levels"].to(t.dtype))).to(torch.int32)
        return code, {"norm": norms}, state

    def step_of(knobs: dict[str, Tensor], scale: Tensor, like: Tensor) -> Tensor:
        return cut.spread(scale / knobs["levels"].to(scale.dtype), like)

    def receive(knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree) -> Tree:
        return {
            k: (c.to(like[k].dtype) * step_of(knobs, side["norm"][k].to(like[k].dtype), like[k]))
            for k, c in code.items()
        }

    def read(knobs: dict[str, Tensor], code: Tree, side: Side, belief: Belief, law: str) -> Tree:
        out = {}
        for k, m in belief.mean.items():
            step = step_of(knobs, side["norm"][k].to(m.dtype), m)
            if clip:  # the largest number sent may be the clip's own: beyond it the coin is certain
                m = torch.where(code[k].abs() == 0, m, torch.maximum(torch.minimum(m, step * levels), -step * levels))
            out[k] = read_coin(m, code[k].to(m.dtype) * step, step, belief.var.get(k))
        return out

    def cell(knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree) -> tuple[Tree, Tree]:
        lows, highs = {}, {}
        for k, c in code.items():
            norms = side["norm"][k].to(like[k].dtype)
            step, top = step_of(knobs, norms, like[k]), cut.spread(norms, like[k])
            at = c.to(step.dtype) * step
            low, high = torch.maximum(at - step, -top), torch.minimum(at + step, top)
            if clip:
                low = torch.where(at - step <= -top, -math.inf, low)
                high = torch.where(at + step >= top, math.inf, high)
            lows[k], highs[k] = widen(low, high) if c.numel() else (low, high)
        return lows, highs

    def moments(knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree) -> tuple[Tree, Tree]:
        """The decoded number; its coin's variance f(1 − f)step² at the average over f."""
        steps = {k: step_of(knobs, side["norm"][k].to(v.dtype), v) for k, v in like.items()}
        at = {k: c.to(steps[k].dtype) * steps[k] for k, c in code.items()}
        return at, {k: v.square() / 6 for k, v in steps.items()}

    def clear(knobs: dict[str, Tensor], side: Side, mean: Tree) -> Tree:
        """The norm in clear as an equation (L2 only; the largest magnitude is a bound, and in the cell)."""
        if norm != "l2":
            return {}
        return {
            k: (
                (size(m) - side["norm"][k].to(m.dtype)) * levels / side["norm"][k].to(m.dtype).clamp(min=1e-30)
            ).square()
            for k, m in mean.items()
        }

    def push(knobs: dict[str, Tensor], belief: Belief, side: Side | None) -> Belief:
        var = {}
        for k, m in belief.mean.items():
            step = step_of(knobs, size(m.detach()), m)
            var[k] = belief.var.get(k, torch.zeros_like(m)) + step.square() / 6
        return Belief({k: clipped(m) for k, m in belief.mean.items()}, var)

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        facts = coded(before, reset, math.ceil(math.log2(2 * levels + 1)), unbiased=not clip)
        return replace(facts, exact=facts.exact and not (clip and before.law != "none"))

    def cost(knobs: dict[str, float], before: Tree, after: Tree) -> float:
        return 32.0 * cut.sides(after)

    return Stage(
        name, "code", send, push, receive, fold, read, cell, cost=cost, clear=clear, moments=moments,
        knobs={"levels": levels}, noise="uniform",
    )  # fmt: skip
