"""Rényi curves and the data-dependent bounds of PATE: of the arg max of noisy votes, and a function of private votes themselves.

An ε that is read off private votes is private, too, so nothing here is more than a claim where it is printed. RDP stands for
Rényi differential privacy (Mironov 2017): a curve over orders α, `[order]`, float64.

Source: Papernot, Song, Mironov, Raghunathan, Talwar, Erlingsson, "Scalable Private Learning with PATE" (2018).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qleak.check import at_least, between, positive, whole


def orders(count: int = 200) -> Tensor:
    """The orders α that are tried: 1.1, 2, 3, … count − 1."""
    whole(orders=count)
    at_least(3, orders=count)
    return torch.tensor([1.1, *range(2, count)], dtype=torch.float64)


def convert(rdp: Tensor, delta: float, count: int = 200) -> float:
    """ε = min over α of RDP(α) + ln(1/δ)/(α − 1), the classic conversion (Mironov 2017, proposition 3)."""
    between(0, 1, delta=delta)
    positive(delta=delta)
    return float((rdp + math.log(1 / delta) / (orders(count) - 1)).min())


def gnmax_logq(votes: Tensor, sigma: float) -> Tensor:
    """The logarithm of a bound on Pr[the noisy arg max of `votes [… n]` is not theirs], `[…]`.

    q <= Σ_i Φ(−(max − n_i)/(√2 σ)) over the others, and <= 1 − 1/n. Papernot et al. 2018, proposition 7.
    """
    positive(sigma=sigma)
    ordered = votes.double().sort(dim=-1, descending=True).values
    gaps = ordered[..., :1] - ordered[..., 1:]
    q = torch.logsumexp(torch.special.log_ndtr(-gaps / (math.sqrt(2) * sigma)), -1)
    return q.clamp(max=math.log1p(-1 / votes.shape[-1]))


def gnmax_rdp(logq: Tensor, sigma: float, count: int = 200, least: bool = True) -> Tensor:
    """RDP `[… order]` of the noisy arg max (GNMax), given `logq […]`; α/σ² where the data-dependent bound does not hold.

    ln((1 − q)·A^{α−1} + q·B^{α−1})/(α − 1) with A = (1 − q)/(1 − (q e^{ε₂})^{1 − 1/μ₂}), B = e^{ε₁}/q^{1/(μ₁ − 1)} and
    ε_i = μ_i/σ², at μ₂ = σ√(ln 1/q), μ₁ = μ₂ + 1. Papernot et al. 2018, theorem 6 and propositions 8 and 10.

    Args:
        logq: ln q of `gnmax_logq`.
        sigma: standard deviation of the noise, in votes; a change of one teacher moves two counts by 1.
        count: orders are 1.1, 2, 3, … count − 1.
        least: the smaller of both bounds; else the data-dependent one wherever it holds, even where it is the larger.
    """
    positive(sigma=sigma)
    alpha, logq = orders(count), logq.double()[..., None]
    plain = (alpha / sigma**2).expand(*logq.shape[:-1], -1)
    high = (sigma * (-logq).sqrt()).clamp(min=1 + 1e-9)  # μ₂
    first, second = (high + 1) / sigma**2, high / sigma**2  # ε₁, ε₂
    shrunk = logq + second
    rising = logq <= (high - 1) * second - high * (torch.log1p(1 / high) + torch.log1p(1 / (high - 1)))
    holds = (high + 1 > alpha) & (sigma * (-logq).sqrt() > 1) & rising & (shrunk < 0)
    sure = _log1mexp(logq)
    a = (alpha - 1) * (sure - _log1mexp(torch.where(shrunk < 0, shrunk, -1.0) * (1 - 1 / high)))
    b = (alpha - 1) * (first - logq / high)
    bound = torch.logaddexp(sure + a, logq + b) / (alpha - 1)
    return torch.where(holds, torch.minimum(bound, plain) if least else bound, plain)


def confident_rdp(
    votes: Tensor, threshold: float, sigma_threshold: float, sigma: float, answered: Tensor, count: int = 200
) -> Tensor:
    """RDP `[order]` that the published vote (G-PATE) charges for histograms `votes [row bin]`, summed over rows.

    Every row pays for the noisy test max + N(0, σ_t²) >= `threshold`, those `answered [row]` for a GNMax, too; both by their
    data-dependent bounds. Papernot et al. 2018, algorithm 1 (Confident-GNMax).
    """
    positive(sigma_threshold=sigma_threshold)
    gap = (votes.double().amax(-1).round() - threshold) / sigma_threshold
    logq = torch.minimum(torch.special.log_ndtr(gap), torch.special.log_ndtr(-gap))
    test = gnmax_rdp(logq, math.sqrt(2) * sigma_threshold, count)
    vote = gnmax_rdp(gnmax_logq(votes, sigma), sigma, count)
    return (test + answered[..., None] * vote).sum(0)


def _log1mexp(x: Tensor) -> Tensor:
    """ln(1 − e^x) of x < 0, without cancellation."""
    return torch.where(x < -1, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x)))
