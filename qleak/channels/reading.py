"""What a code says about the number in front of it: negative log-likelihoods, one per coordinate.

Every function takes the attacker's mean `m` (the guess, pushed to the code) and, where there is
noise in front, its variance `v`. All are differentiable in `m` and finite for infinite bounds.
A density and a probability differ by a constant, so losses compare within one channel only.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from qleak.types import Belief, Facts, Tree

SQRT2 = math.sqrt(2)


def widen(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """A cell moved outward by 8 ulp of its largest finite number, so that rounding cannot exclude the truth."""
    finite = torch.where(lo.isfinite(), lo, 0).abs().amax(), torch.where(hi.isfinite(), hi, 0).abs().amax()
    margin = 8 * torch.finfo(lo.dtype).eps * torch.maximum(*finite)
    return lo - margin, hi + margin


def interval(m: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Zero inside [lo, hi], squared distance outside: the hard cell as a smooth penalty."""
    return torch.relu(lo - m).square() + torch.relu(m - hi).square()


def density(m: Tensor, value: Tensor, v: Tensor | None, law: str) -> Tensor:
    """Reading a number sent in clear.

    Without noise: (m − value)². Gaussian: (m − value)²/2v + ½ ln v. Laplace of variance v = 2β²:
    |m − value|/β + ln β.
    """
    if v is None:
        return (m - value).square()
    if law == "laplace":
        scale = (v / 2).sqrt()
        return (m - value).abs() / scale + scale.log()
    return (m - value).square() / (2 * v) + v.log() / 2


def log_ndtr(x: Tensor) -> Tensor:
    """Ln Φ(x), stable in both tails. (`torch.special.log_ndtr` has no batching rule under `vmap`.)"""
    tail = x < -1
    low = torch.where(tail, x, -1.0)
    high = torch.where(tail, -1.0, x)
    below = torch.log(torch.special.erfcx(-low / SQRT2) / 2) - low.square() / 2
    return torch.where(tail, below, torch.log(torch.special.erfc(-high / SQRT2) / 2))


def soft_interval(m: Tensor, lo: Tensor, hi: Tensor, v: Tensor) -> Tensor:
    """−ln P(lo < m + z < hi), z ~ N(0, v): the exact likelihood of a code with Gaussian noise in front.

    The difference of two Φ is taken in the lower tail (mirrored if need be), as
    ln Φ(b) + ln(1 − exp(ln Φ(a) − ln Φ(b))).
    """
    sigma = v.sqrt()
    a, b = (lo - m) / sigma, (hi - m) / sigma
    mirror = torch.where(a.isfinite() & b.isfinite(), a + b, torch.where(a.isfinite(), a, b)) > 0
    a, b = torch.where(mirror, -b, a), torch.where(mirror, -a, b)
    # Beyond these limits the other bound alone decides; clamping keeps gradients finite (double where).
    open_low, open_high = a < -1e4, b > 1e4
    lower = log_ndtr(torch.where(open_low, -1.0, a.clamp(-1e4, 1e4)))
    upper = torch.where(open_high, 0.0, log_ndtr(torch.where(open_high, 0.0, b.clamp(-1e4, 1e4))))
    gap = torch.where(open_low, -1.0, lower - upper).clamp(max=-1e-6)
    return -(upper + torch.where(open_low, 0.0, torch.log(-torch.expm1(gap))))


def read_cells(bounds: tuple[Tree, Tree], belief: Belief) -> Tree:
    """The reading of a deterministic code with cells `(lo, hi)`: the interval without noise, the soft one behind noise.

    Laplace and mixed noise are read as Gaussian noise of the same variance (see `coded`).
    """
    lo, hi = bounds
    out = {}
    for k, m in belief.mean.items():
        v = belief.var.get(k)
        out[k] = interval(m, lo[k], hi[k]) if v is None else soft_interval(m, lo[k], hi[k], v)
    return out


def coded(before: Facts, reset: Facts, width: float, unbiased: bool = False) -> Facts:
    """What is known behind a code of `width` bits: read exactly alone and behind Gaussian noise, by moments elsewhere."""
    exact = reset.exact and before.law in ("none", "gauss")
    return replace(reset, unbiased=reset.unbiased and unbiased, width=float(width), exact=exact)


CLIFF = 1e-3
"""Probability below which a coin's −ln p goes on as a parabola: finite, and steeper the further out."""


def triangle(t: Tensor) -> Tensor:
    """−ln(1 − |t|): a stochastic rounding to a point that lies t steps away. Zero probability from |t| = 1 on.

    From 1 − |t| = `CLIFF` on it continues with the same value and slope and curvature 2, so that a guess far
    outside feels a pull that grows with the distance.
    """
    d = t.abs()
    beyond = d > 1 - CLIFF
    inside = -torch.log1p(-torch.where(beyond, 0, d))
    over = torch.where(beyond, d - (1 - CLIFF), 0)
    return torch.where(beyond, -math.log(CLIFF) + over / CLIFF + over.square(), inside)


def soft_triangle(t: Tensor, r: Tensor) -> Tensor:
    """−ln P of a stochastic rounding with noise of r steps in front, t steps away.

    P = r·[h((t+1)/r) − 2h(t/r) + h((t−1)/r)] with h(q) = qΦ(q) + φ(q): the triangle convolved with N(0, r²).
    Far outside, where the difference cancels, the Gaussian tail's own −ln takes over.
    """
    d = t.abs()
    near = d < 1 + 4 * r

    def h(q: Tensor) -> Tensor:
        return q * torch.erfc(-q / SQRT2) / 2 + torch.exp(-q.square() / 2) / math.sqrt(2 * math.pi)

    inside = torch.where(near, d, 0)
    # In the lower tail all three terms are small and nothing cancels to zero.
    p = r * (h((1 - inside) / r) - 2 * h(-inside / r) + h((-1 - inside) / r))
    tail = (torch.where(near, 0, d - 1) / r).square() / 2
    at_edge = 8.0 - torch.log(torch.tensor(CLIFF, dtype=t.dtype, device=t.device))
    return torch.where(near, -p.clamp(min=1e-9).log(), tail + at_edge)


def read_coin(m: Tensor, at: Tensor, step: Tensor, v: Tensor | None) -> Tensor:
    """The reading of stochastic rounding to `at` on a grid of width `step` (0, or so small that 1/step is infinite: an exact number)."""
    point = step < torch.finfo(step.dtype).tiny / CLIFF  # the steepest slope is 1/(CLIFF · step)
    width = torch.where(point, 1, step)
    t = (m - at) / width
    if v is None:
        return torch.where(point, (m - at).square(), triangle(t))
    r = (v.sqrt() / width).clamp(min=1e-6)
    return torch.where(point, (m - at).square() / (2 * v.clamp(min=1e-30)), soft_triangle(t, r))


def bernoulli(p: Tensor, one: Tensor) -> Tensor:
    """−ln p where `one`, −ln(1 − p) elsewhere; probabilities are kept 1e-6 away from 0 and 1."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -torch.where(one, p.log(), torch.log1p(-p))
