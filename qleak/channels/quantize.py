"""Deterministic quantizers: numbers to a grid."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.channels.reading import read_cell, widen
from qleak.check import Expected, between, whole
from qleak.types import Belief, Facts, Side, Stage, Tree


@factory
def uniform(levels: int | None = None, bits: int | None = None) -> Stage:
    """Min–max uniform quantization per tensor, rounding to nearest.

    code = round((x − lo)/step), step = (hi − lo)/(levels − 1), decoded as lo + code·step; lo and hi
    of every tensor travel in clear (2·32 bits). A constant tensor has step 0 and is sent exactly.
    The cell of a code is [lo + (code − ½)step, lo + (code + ½)step] within [lo, hi].

    The int8 setting (256 levels) is the one Zhu et al. 2019, section 5.2, report as a defence.

    Args:
        levels: number of grid points, 2 … 2²⁴; 256 when neither argument is given.
        bits: the same as levels = 2**bits.

    Raises:
        Expected: levels or bits out of range, or both given.
    """
    if levels is not None and bits is not None:
        raise Expected(f"Expected one of levels={levels} and bits={bits}, got both.")
    if bits is not None:
        whole(bits=bits)
        between(1, 24, bits=bits)
        levels = 2**bits
    levels = 256 if levels is None else levels
    whole(levels=levels)
    between(2, 2**24, levels=levels)
    width = math.ceil(math.log2(levels))

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        return replace(reset, unbiased=False, width=float(width))

    def cost(knobs: dict[str, float], before: Tree, after: Tree) -> float:
        return sum(v.numel() * math.ceil(math.log2(knobs["levels"])) + 2 * 32.0 for v in after.values())

    return Stage(
        "uniform", "code", _send, _push, _receive, fold, _read, _cell, cost=cost, knobs={"levels": float(levels)}
    )


def _step(knobs: dict[str, Tensor], lo: Tensor, hi: Tensor) -> Tensor:
    return (hi - lo) / (knobs["levels"].to(lo.dtype) - 1)


def _range(v: Tensor) -> tuple[Tensor, Tensor]:
    return (v.amin(), v.amax()) if v.numel() else (v.new_zeros(()), v.new_zeros(()))


def _send(knobs: dict[str, Tensor], x: Tree, noise: Tree, state: tuple[()]) -> tuple[Tree, Side, tuple[()]]:
    lo, hi, code = {}, {}, {}
    for k, v in x.items():
        lo[k], hi[k] = _range(v)
        step = _step(knobs, lo[k], hi[k])
        scaled = (v - lo[k]) / torch.where(step > 0, step, 1)
        code[k] = torch.minimum(scaled.round().clamp(min=0), knobs["levels"].to(v.dtype) - 1).to(torch.int32)
    return code, {"lo": lo, "hi": hi}, state


def _receive(knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree) -> Tree:
    lo, hi = side["lo"], side["hi"]
    return {k: (lo[k] + c.to(lo[k].dtype) * _step(knobs, lo[k], hi[k])).to(like[k].dtype) for k, c in code.items()}


def _cell(knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree) -> tuple[Tree, Tree]:
    lows, highs = {}, {}
    for k, c in code.items():
        lo, hi = side["lo"][k], side["hi"][k]
        step, at = _step(knobs, lo, hi), c.to(lo.dtype)
        low, high = lo + (at - 0.5) * step, lo + (at + 0.5) * step
        lows[k], highs[k] = widen(torch.maximum(low, lo), torch.minimum(high, hi)) if c.numel() else (low, high)
    return lows, highs


def _push(knobs: dict[str, Tensor], belief: Belief, side: Side | None) -> Belief:
    """Straight through: the mean as it is, rounding as uniform noise of variance step²/12 (Bennett 1948)."""
    var = {}
    for k, m in belief.mean.items():
        lo, hi = _range(m.detach())
        step = _step(knobs, lo, hi)
        var[k] = belief.var.get(k, torch.zeros_like(m)) + step.square() / 12
    return Belief(belief.mean, var)


def _read(knobs: dict[str, Tensor], code: Tree, side: Side, belief: Belief, law: str) -> Tree:
    lo, hi = _cell(knobs, code, side, belief.mean)
    if law != "none":  # behind noise the clipped end codes are open: lo and hi are the noisy extremes
        count = {k: knobs["levels"].to(v.dtype) - 1 for k, v in lo.items()}
        lo = {k: torch.where(code[k] == 0, -math.inf, v) for k, v in lo.items()}
        hi = {k: torch.where(code[k] == count[k], math.inf, v) for k, v in hi.items()}
    return {k: read_cell(m, lo[k], hi[k], belief.var.get(k), law) for k, m in belief.mean.items()}
