"""Uniform quantizers: numbers to an evenly spaced grid, to the nearest point or by a fair coin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qleak.catalog import factory
from qleak.channels.grid import Groups, extremes, groups, largest
from qleak.channels.reading import coded, read_cells, read_coin, widen
from qleak.check import Expected, between, one_of, whole
from qleak.types import Belief, Facts, Side, Stage, Tree

RANGES = ("minmax", "max")


@factory
def uniform(
    levels: int | None = None,
    bits: int | None = None,
    range: str = "minmax",
    per: str = "tensor",
    bucket: int = 512,
) -> Stage:
    """Uniform quantization, rounding to nearest.

    code = round((x − lo)/step), step = (hi − lo)/(levels − 1), decoded as lo + code·step, where lo and
    hi are the extremes of a group and travel in clear (2·32 bits), or lo = −hi = −max|x| (32 bits; an
    odd number of levels, so that zero stays zero). A constant group has step 0 and is sent exactly.
    The cell of a code is [lo + (code − ½)step, lo + (code + ½)step] within [lo, hi].

    The int8 setting (256 levels) is the one Zhu et al. 2019, section 5.2, report as a defence.

    Args:
        levels: number of grid points, 2 … 2²⁴; 256 when neither argument is given.
        bits: the same as levels = 2**bits.
        range: "minmax", or "max" for the symmetric grid of largest magnitude.
        per: what shares a grid: a "tensor", a "channel" (first axis) or a "bucket".
        bucket: coordinates of a bucket.

    Raises:
        Expected: levels or bits out of range, or both given.
    """
    grid = Grid(groups(per, bucket), range)

    def read(knobs: dict[str, Tensor], code: Tree, side: Side, belief: Belief, law: str) -> Tree:
        lo, hi = grid.cell(knobs, code, side, belief.mean, 0.5)
        if law != "none":  # behind noise the clipped end codes are open: lo and hi are the noisy extremes
            last = grid.last(knobs, next(iter(lo.values())))
            lo = {k: torch.where(code[k] == 0, -math.inf, v) for k, v in lo.items()}
            hi = {k: torch.where(code[k] == last, math.inf, v) for k, v in hi.items()}
        return read_cells((lo, hi), belief)

    # Unseen, rounding is uniform noise of variance step²/12 (Bennett 1948).
    return _stage("uniform", _levels(levels, bits, range), grid, lambda t, u: t.round(), read, 0.5, 1 / 12)


@factory
def stochastic(
    levels: int | None = None,
    bits: int | None = None,
    range: str = "minmax",
    per: str = "tensor",
    bucket: int = 512,
) -> Stage:
    """Stochastic rounding on the grid of `uniform`: up with probability frac((x − lo)/step), else down; unbiased.

    P(code | x) = max(0, 1 − |(x − lo)/step − code|): a triangle two steps wide. Gupta et al., "Deep
    Learning with Limited Numerical Precision" (ICML 2015), section 3.

    Args:
        levels: number of grid points, 2 … 2²⁴; 256 when neither argument is given.
        bits: the same as levels = 2**bits.
        range: "minmax", or "max" for the symmetric grid of largest magnitude.
        per: what shares a grid: a "tensor", a "channel" (first axis) or a "bucket".
        bucket: coordinates of a bucket.

    Raises:
        Expected: levels or bits out of range, or both given.
    """
    grid = Grid(groups(per, bucket), range)

    def read(knobs: dict[str, Tensor], code: Tree, side: Side, belief: Belief, law: str) -> Tree:
        return {
            k: read_coin(m, *grid.centre(knobs, code[k], side, k, m), belief.var.get(k)) for k, m in belief.mean.items()
        }

    # Unseen, the coin's variance f(1 − f)step² at its average over f is step²/6.
    return _stage(
        "stochastic", _levels(levels, bits, range), grid, lambda t, u: (t + u.to(t.dtype)).floor(), read, 1.0, 1 / 6,
        noise="uniform",
    )  # fmt: skip


class Grid(NamedTuple):
    """Grid points base + (code − middle)·step of every group, from its side information."""

    groups: Groups
    range: str

    def last(self, knobs: dict[str, Tensor], like: Tensor) -> Tensor:
        """The largest code; even on the symmetric grid."""
        n = knobs["levels"].to(like.dtype) - 1
        return n if self.range == "minmax" else 2 * torch.clamp((n / 2).floor(), min=1)

    def points(self, knobs: dict[str, Tensor], side: Side, name: str, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(base, middle, step) of every coordinate."""
        hi = side["hi"][name]
        last = self.last(knobs, hi)
        lo = side["lo"][name] if self.range == "minmax" else -hi
        step = self.groups.spread((hi - lo) / last, like)
        if self.range == "max":
            return torch.zeros_like(step), last / 2, step
        return self.groups.spread(lo, like), torch.zeros_like(last), step

    def centre(
        self, knobs: dict[str, Tensor], code: Tensor, side: Side, name: str, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(decoded number, step) of every coordinate."""
        base, middle, step = self.points(knobs, side, name, like)
        return base + (code.to(step.dtype) - middle) * step, step

    def receive(self, knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree) -> Tree:
        """The decoded numbers."""
        return {k: self.centre(knobs, c, side, k, like[k])[0].to(like[k].dtype) for k, c in code.items()}

    def cell(self, knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree, half: float) -> tuple[Tree, Tree]:
        """Decoded ± half·step, within the group's range, widened outward."""
        lows, highs = {}, {}
        for k, c in code.items():
            at, step = self.centre(knobs, c, side, k, like[k])
            hi = self.groups.spread(side["hi"][k], like[k])
            lo = self.groups.spread(side["lo"][k], like[k]) if self.range == "minmax" else -hi
            low, high = torch.maximum(at - half * step, lo), torch.minimum(at + half * step, hi)
            lows[k], highs[k] = widen(low, high) if c.numel() else (low, high)
        return lows, highs

    def moments(self, knobs: dict[str, Tensor], code: Tree, side: Side, like: Tree, factor: float) -> tuple[Tree, Tree]:
        """Decoded numbers, and factor·step²."""
        pairs = {k: self.centre(knobs, c, side, k, like[k]) for k, c in code.items()}
        return {k: p[0] for k, p in pairs.items()}, {k: factor * p[1].square() for k, p in pairs.items()}

    def blur(self, knobs: dict[str, Tensor], belief: Belief, factor: float) -> Belief:
        """The belief of someone who does not see the code: step from the guess itself, variance factor·step²."""
        var = {}
        for k, m in belief.mean.items():
            side = self.side(m.detach())
            step = self.points(knobs, {n: {k: v} for n, v in side.items()}, k, m)[2]
            var[k] = belief.var.get(k, torch.zeros_like(m)) + factor * step.square()
        return Belief(belief.mean, var)

    def side(self, v: Tensor) -> dict[str, Tensor]:
        """What travels in clear of one tensor: `[group]` each."""
        if self.range == "max":
            return {"hi": largest(self.groups.rows(v))}
        lo, hi = extremes(self.groups.rows(v))
        return {"lo": lo, "hi": hi}

    def cost(self, knobs: dict[str, float], before: Tree, after: Tree) -> float:
        """Bits of the scales."""
        return 32.0 * (2 if self.range == "minmax" else 1) * self.groups.sides(after)


def _stage(
    name: str, levels: int, grid: Grid, rounding: Callable[[Tensor, Any], Tensor], read: Callable[..., Tree],
    half: float, spread: float, noise: Literal["uniform"] | None = None,
) -> Stage:  # fmt: skip
    """Rounding to a grid: `rounding(place, draw) -> code`, cells of ± `half` steps, errors of variance `spread`·step²."""

    def send(knobs: dict[str, Tensor], x: Tree, draws: Tree, state: Any) -> tuple[Tree, Side, Any]:
        sides: dict[str, dict[str, Tensor]] = {}
        code = {}
        for k, v in x.items():
            for side, scale in grid.side(v).items():
                sides.setdefault(side, {})[k] = scale
            base, middle, step = grid.points(knobs, sides, k, v)
            t = (v - base) / torch.where(step > 0, step, 1) + middle
            code[k] = torch.minimum(rounding(t, draws.get(k)).clamp(min=0), grid.last(knobs, v)).to(torch.int32)
        return code, sides, state

    def fold(before: Facts, reset: Facts, like: Tree | None) -> Facts:
        return coded(before, reset, math.ceil(math.log2(levels)), unbiased=bool(noise))

    return Stage(
        name, "code", send, lambda knobs, belief, side: grid.blur(knobs, belief, spread), grid.receive, fold, read,
        lambda knobs, code, side, like: grid.cell(knobs, code, side, like, half), cost=grid.cost,
        knobs={"levels": float(levels)}, noise=noise,
        moments=lambda knobs, code, side, like: grid.moments(knobs, code, side, like, spread),
    )  # fmt: skip


def _levels(levels: int | None, bits: int | None, range: str) -> int:
    one_of(RANGES, range=range)
    if levels is not None and bits is not None:
        raise Expected(f"Expected one of levels={levels} and bits={bits}, got both.")
    if bits is not None:
        whole(bits=bits)
        between(1, 24, bits=bits)
        levels = 2**bits
    levels = 256 if levels is None else levels
    whole(levels=levels)
    between(2 if range == "minmax" else 3, 2**24, levels=levels)
    return levels
