"""Small floating-point formats, rounded to nearest even by arithmetic; equal to torch's casts where torch has them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.channels.reading import coded, read_cells, widen
from qleak.check import one_of
from qleak.types import Belief, Facts, Side, Stage, Tree

FORMATS = {  # mantissa bits, smallest normal exponent, largest number, width
    "e5m10": (10, -14, 65504.0, 16),
    "e8m7": (7, -126, 3.3895313892515355e38, 16),
    "e4m3": (3, -6, 448.0, 8),
    "e5m2": (2, -14, 57344.0, 8),
}
SCALES = ("max", "none")


@factory
def float16() -> Stage:
    """IEEE half precision (e5m10), saturating at ±65504; subnormal below 2⁻¹⁴. 16 bits."""
    return _cast("float16", "e5m10", "none")


@factory
def bfloat16() -> Stage:
    """The upper half of a float32 (e8m7), rounded to nearest even. 16 bits."""
    return _cast("bfloat16", "e8m7", "none")


@factory
def float8(format: str = "e4m3", scale: str = "max") -> Stage:
    """Eight-bit floats, saturating. Micikevicius et al., "FP8 Formats for Deep Learning" (2022), table 1.

    Args:
        format: "e4m3" (largest 448) or "e5m2" (largest 57344), which the paper uses for gradients.
        scale: "max" scales every tensor's largest magnitude to the largest number (32 bits in clear), as
            training systems do; "none" casts as it is.
    """
    one_of(["e4m3", "e5m2"], format=format)
    one_of(SCALES, scale=scale)
    return _cast("float8", format, scale)


def ulp(v: Tensor, mantissa: int, least: int) -> Tensor:
    """Spacing of the format at v: 2^(max(⌊log₂|v|⌋, least) − mantissa), exact at powers of two."""
    guess = v.abs().clamp(min=2.0**-140).log2().floor()
    # The logarithm rounds: step back or forth where it crossed a power of two.
    guess = guess - (torch.exp2(guess) > v.abs()).to(v.dtype) + (torch.exp2(guess + 1) <= v.abs()).to(v.dtype)
    return torch.exp2(guess.clamp(min=least) - mantissa)


def _cast(name: str, form: str, scale: str) -> Stage:
    mantissa, least, largest, width = FORMATS[form]

    def factor(v: Tensor) -> Tensor:
        top = v.abs().amax() if v.numel() else v.new_zeros(())
        return torch.where(top > 0, top / largest, 1).clamp(min=1e-38) if scale == "max" else v.new_ones(())

    def send(knobs: dict, x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        units = {k: factor(v) for k, v in x.items()}
        code = {}
        for k, v in x.items():
            v = v / units[k]
            step = ulp(v, mantissa, least)
            code[k] = ((v / step).round() * step).clamp(-largest, largest)
        return code, ({"unit": units} if scale == "max" else {}), state

    def receive(knobs: dict, code: Tree, side: Side, like: Tree) -> Tree:
        return {k: (c * unit(side, k, c)).to(like[k].dtype) for k, c in code.items()}

    def unit(side: Side, k: str, like: Tensor) -> Tensor:
        return side["unit"][k].to(like.dtype) if scale == "max" else like.new_ones(())

    def cell(knobs: dict, code: Tree, side: Side, like: Tree) -> tuple[Tree, Tree]:
        lows, highs = {}, {}
        for k, c in code.items():
            c, size = c.to(like[k].dtype), c.abs().to(like[k].dtype)
            step = ulp(size, mantissa, least)
            binade = (step > 2.0 ** (least - mantissa)) & (size == step * 2**mantissa)  # finer spacing below
            inner, outer = size - torch.where(binade, step / 4, step / 2), size + step / 2
            outer = torch.where(size >= largest, math.inf, outer)
            low, high = torch.where(c >= 0, inner, -outer), torch.where(c >= 0, outer, -inner)
            low = torch.where(size == 0, -outer, low) * unit(side, k, c)
            high = high * unit(side, k, c)
            lows[k], highs[k] = widen(low, high) if c.numel() else (low, high)
        return lows, highs

    def read(knobs: dict, code: Tree, side: Side, belief: Belief, law: str) -> Tree:
        return read_cells(cell(knobs, code, side, belief.mean), belief)

    def push(knobs: dict, belief: Belief, side: Side | None) -> Belief:
        var = {}
        for k, m in belief.mean.items():
            u = factor(m.detach())
            step = ulp(m.detach() / u, mantissa, least) * u
            var[k] = belief.var.get(k, torch.zeros_like(m)) + step.square() / 12
        return Belief(belief.mean, var)

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        return coded(before, reset, width)

    def cost(knobs: dict, before: Tree, after: Tree) -> float:
        return 32.0 * len(after) if scale == "max" else 0.0

    return Stage(name, "code", send, push, receive, fold, read, cell, cost=cost)
