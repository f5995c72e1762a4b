"""What a code says about the number in front of it: negative log-likelihoods, one per coordinate.

Every function takes the attacker's mean `m` (the guess, pushed to the code) and, where there is
noise in front, its variance `v`. All are differentiable in `m` and finite for infinite bounds.
A density and a probability differ by a constant, so losses compare within one channel only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def read_cell(m: Tensor, lo: Tensor, hi: Tensor, v: Tensor | None, law: str) -> Tensor:
    """The reading of a deterministic code: the interval without noise, the soft interval behind noise.

    Laplace and mixed noise are read as Gaussian noise of the same variance (`Facts.exact` is False).
    """
    return interval(m, lo, hi) if v is None else soft_interval(m, lo, hi, v)


def bernoulli(p: Tensor, one: Tensor) -> Tensor:
    """−ln p where `one`, −ln(1 − p) elsewhere; probabilities are kept 1e-6 away from 0 and 1."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -torch.where(one, p.log(), torch.log1p(-p))
