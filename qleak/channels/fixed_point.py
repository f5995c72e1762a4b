"""Fixed point: a grid that does not look at the data, and saturates."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.channels.reading import coded, read_cells, widen
from qleak.check import between, whole
from qleak.types import Belief, Bound, Facts, Side, Stage, Tree


@factory
def fixed_point(bits: int = 16, fraction: int = 14) -> Stage:
    """round(x·2^fraction) as a signed integer of `bits` bits, saturating at its ends; no side information.

    The cell is ± half a step of 2^−fraction; a saturated code says "at least so large". Gupta et al.,
    "Deep Learning with Limited Numerical Precision" (ICML 2015), section 3: ⟨2, 14⟩.

    Args:
        bits: of one code, sign included, 2 … 24.
        fraction: fractional bits, 0 … 40.
    """
    whole(bits=bits, fraction=fraction)
    between(2, 24, bits=bits)
    between(0, 40, fraction=fraction)

    def send(knobs: dict[str, Tensor], x: Tree, noise: Tree, state: Any) -> tuple[Tree, Side, Any]:
        low, high = ends(knobs)
        return (
            {
                k: torch.maximum(torch.minimum((v / knobs["step"].to(v.dtype)).round(), high.to(v.dtype)), low.to(v.dtype)).to(torch.int32)
                for k, v in x.items()
            },
            {},
            state,
        )  # fmt: skip

    def ends(knobs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return -knobs["half"], knobs["half"] - 1

    def receive(knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree) -> Tree:
        return {k: c.to(like[k].dtype) * knobs["step"].to(like[k].dtype) for k, c in code.items()}

    def cell(knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree) -> tuple[Tree, Tree]:
        lows, highs = {}, {}
        for k, c in code.items():
            at, (least, most) = c.to(like[k].dtype), ends(knobs)
            step = knobs["step"].to(like[k].dtype)
            low, high = widen((at - 0.5) * step, (at + 0.5) * step) if c.numel() else (at, at)
            lows[k] = torch.where(c <= least, -math.inf, low)
            highs[k] = torch.where(c >= most, math.inf, high)
        return lows, highs

    def read(knobs: dict[str, Tensor], code: Tree, side: Side, belief: Belief, law: str) -> Tree:
        return read_cells(cell(knobs, code, side, belief.mean), belief)

    def push(knobs: dict[str, Tensor], belief: Belief, side: Side | None) -> Belief:
        low, high = (e * knobs["step"] for e in ends(knobs))
        mean = {k: torch.maximum(torch.minimum(m, high.to(m.dtype)), low.to(m.dtype)) for k, m in belief.mean.items()}
        added = knobs["step"].square() / 12
        return Belief(mean, {k: belief.var.get(k, torch.zeros_like(m)) + added.to(m.dtype) for k, m in mean.items()})

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        # Saturation bounds every coordinate, and so the row: ‖·‖₂ ≤ √n · 2^(bits − 1 − fraction).
        n = sum(v.numel() for v in like.values()) if like is not None else None
        limit = None if n is None else math.sqrt(n) * 2.0 ** (bits - 1 - fraction)
        twice = None if limit is None else 2 * limit
        bounds = {"bound": Bound(2, limit), "sensitivity": Bound(2, twice, "replace-one")}
        return replace(coded(before, reset, bits), **bounds)

    knobs = {"step": 2.0**-fraction, "half": 2.0 ** (bits - 1)}
    return Stage("fixed_point", "code", send, push, receive, fold, read, cell, knobs=knobs)
