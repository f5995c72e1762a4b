"""Powers of two: a sign and an exponent."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.channels.reading import coded, read_cells, widen
from qleak.check import between, whole
from qleak.types import Belief, Facts, Side, Stage, Tree


@factory
def logarithmic(bits: int = 4) -> Stage:
    """Sign(x)·2^round(log₂|x|), the largest 2^(bits−1) − 1 exponents of every tensor; smaller numbers become 0.

    The top exponent of a tensor travels in clear (8 bits). The cell of ±2^e is [2^(e−½), 2^(e+½)], that of 0
    everything below the smallest of them. Miyashita, Lee, Murmann, "Convolutional Neural Networks using
    Logarithmic Data Representation" (2016), section 3.

    Args:
        bits: of one code, 2 … 8.
    """
    whole(bits=bits)
    between(2, 8, bits=bits)

    def top_of(v: Tensor) -> Tensor:
        largest = v.abs().amax() if v.numel() else v.new_zeros(())
        return torch.where(largest > 0, largest.clamp(min=2.0**-100).log2().round(), -100)

    def send(knobs: dict[str, Tensor], x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        code, tops = {}, {}
        for k, v in x.items():
            tops[k] = top_of(v)
            exponent = v.abs().clamp(min=2.0**-120).log2().round()
            rank = knobs["magnitudes"].to(v.dtype) - (tops[k] - exponent)  # 1 … magnitudes; below: silent
            code[k] = (torch.sign(v) * rank.clamp(min=0)).to(torch.int32)
        return code, {"top": tops}, state

    def exponent_of(knobs: dict[str, Tensor], code: Tensor, top: Tensor) -> Tensor:
        return top - (knobs["magnitudes"].to(top.dtype) - code.abs().to(top.dtype))

    def receive(knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree) -> Tree:
        return {
            k: torch.where(c == 0, 0, torch.sign(c) * torch.exp2(exponent_of(knobs, c, side["top"][k]))).to(
                like[k].dtype
            )
            for k, c in code.items()
        }

    def cell(knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree) -> tuple[Tree, Tree]:
        lows, highs = {}, {}
        for k, c in code.items():
            e = exponent_of(knobs, c, side["top"][k]).to(like[k].dtype)
            inner, outer = torch.exp2(e - 0.5), torch.exp2(e + 0.5)  # at code 0, e + ½ is the silent range
            low = torch.where(c > 0, inner, -outer)
            high = torch.where(c < 0, -inner, outer)
            lows[k], highs[k] = widen(low, high) if c.numel() else (low, high)
        return lows, highs

    def read(knobs: dict[str, Tensor], code: Tree, side: Side, belief: Belief, law: str) -> Tree:
        lo, hi = cell(knobs, code, side, belief.mean)
        if law != "none":  # the top exponent is that of the noisy numbers: its codes are open outward
            last = knobs["magnitudes"]
            hi = {k: torch.where(code[k] == last, math.inf, v) for k, v in hi.items()}
            lo = {k: torch.where(code[k] == -last, -math.inf, v) for k, v in lo.items()}
        return read_cells((lo, hi), belief)

    def push(knobs: dict[str, Tensor], belief: Belief, side: Side | None) -> Belief:
        """Straight through; a cell of [2^(e−½), 2^(e+½)] is |x|/√2 wide."""
        var = {k: belief.var.get(k, torch.zeros_like(m)) + m.detach().square() / 24 for k, m in belief.mean.items()}
        return Belief(belief.mean, var)

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        return coded(before, reset, bits)

    def cost(knobs: dict[str, float], before: Tree, after: Tree) -> float:
        return 8.0 * len(after)

    return Stage(
        "logarithmic", "code", send, push, receive, fold, read, cell, cost=cost,
        knobs={"magnitudes": 2.0 ** (bits - 1) - 1},
    )  # fmt: skip
