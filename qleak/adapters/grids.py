"""Even grids: a common step in every tensor, channel or bucket, found from the numbers and checked on all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qleak.adapters.formats import ENOUGH, Code
from qleak.channels.grid import Groups

EPS = 2.0**-23
MOST = 2**16  # grid points: beyond that, rounding of float32 hides the step
CUTS = (Groups("tensor", 1), Groups("channel", 1), Groups("bucket", 512))


def grid(update: dict[str, Tensor]) -> Code | None:
    """Even grids between each group's extremes, or symmetric about zero.

    The same grid is reached by rounding to nearest and by a fair coin: which of them cannot be told.
    """
    for cut in CUTS:
        if cut.per != "tensor" and all(cut.cut(v)[0] == 1 for v in update.values()):
            continue
        groups = [g for v in update.values() for g in _groups(v, cut)]
        groups = [g for g in groups if float(g.amax()) > float(g.amin())]
        for symmetric in (True, False):
            steps = steps_of(groups, symmetric)
            if steps and (not symmetric or _reached(groups, steps)):
                return _named(steps, symmetric, cut, groups)
    return None


def _reached(groups: list[Tensor], steps: int) -> bool:
    """Whether the groups' own steps are that fine: of small whole numbers, a common multiple is soon found."""
    tops = [float(g.abs().amax()) / unit for g in groups if g.numel() >= 8 and (unit := unit_of(g))]
    return not tops or sum(t > 0.9 * steps for t in tops) >= 0.5 * len(tops)


def _groups(v: Tensor, cut: Groups) -> list[Tensor]:
    flat, (count, n) = v.reshape(-1).double(), cut.cut(v)
    return [flat[i * n : (i + 1) * n] for i in range(count)]


def _places(g: Tensor, symmetric: bool) -> tuple[Tensor, float]:
    """Distinct numbers of a group over its range, and how far float32 rounds them."""
    u = g.unique()
    lo, hi = float(u[0]), float(u[-1])
    if symmetric:
        top = max(-lo, hi)
        return u / top, 2 * EPS
    return (u - lo) / (hi - lo), 4 * EPS * max(-lo, hi, abs(lo), abs(hi)) / (hi - lo)


def steps_of(groups: list[Tensor], symmetric: bool) -> int:
    """The least number of steps of which all groups' ranges are made (the half range, where symmetric); 0 for none."""
    if not groups:
        return 0
    every = [(g.numel(), *_places(g, symmetric)) for g in groups]
    every.sort(key=lambda e: -e[1].numel())
    if every[0][1].numel() > 2 * MOST:
        return 0
    spare = 1 if symmetric else 2
    for steps in _candidates(every):
        bits = 0.0
        for n, place, error in every:
            slack = max(2 * steps * error, 1e-6)
            if slack > 0.1:  # rounding hides this group's step
                continue
            at = place * steps
            if not bool(((at - at.round()).abs() <= slack).all()):
                break
            bits += max(n - spare, 0) * -math.log2(2 * slack)
        else:
            if bits >= 2 * ENOUGH + math.log2(steps) and every[0][0] > 2:
                return steps
    return 0


def _candidates(every: list[tuple[int, Tensor, float]]) -> list[int]:
    """Small multiples of one over the smallest gap, with what rounding leaves open, that fit the richest group; ascending."""
    found: set[int] = set()
    for _, place, error in every[:3]:
        gap = float((place[1:] - place[:-1]).amin())
        if gap < max(4 * error, 0.5 / MOST):
            return []
        for j in range(1, 17):
            steps = j / gap
            wide = math.ceil(steps * min(4 * error / gap, 0.02))
            found |= set(range(max(1, round(steps) - wide), min(round(steps) + wide, MOST) + 1))
    _, place, error = every[0]
    steps = torch.tensor(sorted(s for s in found if 2 * s * error <= 0.1), dtype=torch.float64)
    at = steps[:, None] * place[:: max(1, place.numel() // 100)]
    return [int(s) for s in steps[((at - at.round()).abs() <= (2 * steps[:, None] * error).clamp(min=1e-6)).all(-1)]]


def _named(steps: int, symmetric: bool, cut: Groups, groups: list[Tensor]) -> Code:
    levels = 2 * steps + 1 if symmetric else steps + 1
    options = f"levels={levels}" + (", range='max'" if symmetric else "")
    options += "" if cut.per == "tensor" else f", per='{cut.per}'" + (", bucket=512" if cut.per == "bucket" else "")
    what = {"tensor": "tensor", "channel": "channel", "bucket": "bucket of 512"}[cut.per]
    middle = "symmetric about zero" if symmetric else "from its least to its largest number"
    reasons = [
        f"every {what} lies on an even grid of {levels} points, {middle} ({len(groups)} checked)",
        "rounding to nearest and a fair coin reach the same grid",
    ]
    more = [f"stochastic({options})"]
    if symmetric and cut.per == "bucket":
        more.append(f"qsgd(levels={steps}, norm='max', bucket=512)")
    return Code(f"uniform({options})", "uniform grid", "likely", reasons, more)


def qsgd(update: dict[str, Tensor], bucket: int = 512) -> Code | None:
    """Whole multiples of a unit that every bucket has of its own, with the norm itself not among the numbers."""
    sums, variances, nonzero, tops = [], [], 0, []
    for v in update.values():
        for g in _groups(v, Groups("bucket", bucket)):
            if not bool(g.any()):
                continue
            unit = unit_of(g)
            if unit == 0:
                return None
            code = (g / unit).round().abs()
            nonzero += int((g != 0).sum()) - 1
            tops.append(int(code.amax()))
            # The coin's variance is f(1 − f): 1/6 on average above one step; below, all that is known is that it is
            # no more than the number of ones.
            ones = float((code == 1).sum())
            sums.append(float(code.square().sum() - (code > 1).sum() / 6 - ones / 2))
            variances.append(ones**2 / 12 + 4 * max(sums[-1], 1.0) / 6)
    if nonzero < 2 * ENOUGH or not tops or max(tops) < 2:
        return None
    weights = [1 / v for v in variances]
    square = sum(w * s for w, s in zip(weights, sums, strict=True)) / sum(weights)
    # Errors of the squares, taken to the level itself.
    level = max(math.sqrt(max(square, 1)), max(tops))  # no number is longer than its bucket's norm
    wide = math.sqrt(1 / sum(weights)) / (2 * level)
    usual = [2**b - 1 for b in range(1, 9)] + [2**b for b in range(1, 9)]
    usual = [s for s in usual if s >= max(tops)] or [max(tops)]
    near = min(usual, key=lambda s: abs(s - level))
    levels = near if abs(near - level) <= max(3 * wide, 0.5) else max(1, round(level))
    low, high = max(1, math.floor(level - 2 * wide)), math.ceil(level + 2 * wide)
    reasons = [
        f"every bucket of {bucket} holds whole multiples of its own step, up to {max(tops)}, and its end is no fixed multiple",
        f"the norm is not among the numbers: levels are {level:.1f} ± {wide:.1f} by the sum of squares, nearest usual {levels}",
    ]
    return Code(f"qsgd(levels={levels}, norm='l2', bucket={bucket})", "qsgd", "likely", reasons,
                [f"qsgd of {low} to {high} levels"])  # fmt: skip


def unit_of(g: Tensor) -> float:
    """The largest number of which all of `g` are whole multiples (up to 2¹² of it), to rounding; 0 for none."""
    size = g.double().abs().unique()
    size = size[size > 0]
    if not size.numel():
        return 0.0
    top = float(size[-1])
    gaps = size[1:] - size[:-1]
    gaps = gaps[gaps > 8 * EPS * top]  # the same multiple, rounded on both sides of zero
    base = min(float(size[0]), float(gaps.amin()) if gaps.numel() else top)
    for j in range(1, 9):
        unit = base / j
        if top / unit > 2**12:
            return 0.0
        unit = float(size[-1]) / round(top / unit)
        code = size / unit
        if bool(((code - code.round()).abs() <= 4 * EPS * code.clamp(min=1) + 1e-6).all()):
            return unit
    return 0.0
