"""What can be told in so many bits: the rate–distortion bound, rigorous for any code."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qleak.bounds.prior import Prior
from qleak.check import at_least


def distortion(values: Tensor, bits: float) -> float:
    """Least mean squared error per coordinate of a Gaussian source of variances `values [n]` told in `bits` bits.

    Reverse water-filling: Σ_i min(θ, λ_i)/n, with θ such that Σ_i ½ log₂⁺(λ_i/θ) = bits (Cover, Thomas, *Elements of
    Information Theory*, theorem 10.3.3). For any message M of the image, I(x; M) ≤ H(M) ≤ bits, and no estimator of
    x from M has a smaller mean squared error on average over x ~ N(m, C): whatever the code, its rounding or its noise.

    Raises:
        Expected: a negative number of bits.
    """
    at_least(0, bits=bits)
    lam = values.double().sort(descending=True).values
    logs = lam.log2()
    # With the k largest above water, log₂ θ = (Σ_(i≤k) log₂ λ_i − 2·bits)/k; the right k is the last with θ ≤ λ_k.
    k = torch.arange(1, len(lam) + 1, dtype=torch.float64)
    water = (logs.cumsum(0) - 2 * bits) / k
    over = int((water <= logs).nonzero().max())
    theta = 2.0 ** float(water[over])
    return float((lam[over + 1 :].sum() + (over + 1) * theta) / len(lam))


def floor(prior: Prior, bits: float) -> float:
    """Least mean squared error per pixel of an image of the prior, told in `bits` bits."""
    return distortion(prior.values, bits)


def needed(prior: Prior, psnr: float) -> float:
    """Bits below which no code tells an image of the prior at `psnr` dB: the inverse of `floor`."""
    goal, low, high = 10 ** (-psnr / 10), 0.0, 1.0
    if floor(prior, 0.0) <= goal:
        return 0.0
    while floor(prior, high) > goal:
        high *= 2
    while high - low > 1e-9 * high and math.isfinite(high):
        middle = (low + high) / 2
        low, high = (middle, high) if floor(prior, middle) > goal else (low, middle)
    return high
