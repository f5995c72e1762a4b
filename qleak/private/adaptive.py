"""Adaptive clipping: Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping".

NeurIPS 2021, Algorithm 1. The bound follows a quantile γ of the norms: b̃ is a noisy share of the examples it leaves as they
are, and C ← C·exp(−η(b̃ − γ)). The count is released beside the sum, so part of the privacy is spent on it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qleak.check import Expected, between, positive


class Settings(NamedTuple):
    """What stays fixed.

    Attributes:
        quantile: γ, the share of examples to be left as they are.
        rate: η, the step in the logarithm of the bound.
        sigma: σ_b, standard deviation of the noise on the (centred) count of unclipped examples.
        batch: B, the public expected number of examples that the noisy count is divided by.
    """

    quantile: float = 0.5
    rate: float = 0.2
    sigma: float = 10.0
    batch: float = 256.0


class State(NamedTuple):
    """`bound`: C, a 0-dim tensor, positive."""

    bound: Tensor


def start(settings: Settings, bound: float = 0.1) -> State:
    """The state before the first round.

    Raises:
        Expected: a setting is out of its range.
    """
    between(0, 1, quantile=settings.quantile)
    positive(rate=settings.rate, sigma=settings.sigma, batch=settings.batch, bound=bound)
    return State(torch.tensor(float(bound)))


def share(settings: Settings, norms: Tensor, bound: Tensor, noise: Tensor) -> Tensor:
    """b̃ = ½ + (Σ_b (1[‖g_b‖ ≤ C] − ½) + σ_b·noise)/B of norms `[b]` (b may be 0) and one standard normal draw, 0-dim.

    Terms are centred, so that an example added or removed moves the sum by ½: uncentred it would be by 1, and σ_b would
    have to be twice as large for what `multiplier` counts.
    """
    return 0.5 + (((norms <= bound).to(noise.dtype) - 0.5).sum() + settings.sigma * noise) / settings.batch


def update(settings: Settings, state: State, norms: Tensor, noise: Tensor) -> State:
    """C ← C·exp(−η(b̃ − γ)), from the norms of the examples that were clipped at C."""
    seen = share(settings, norms, state.bound, noise)
    return State(state.bound * torch.exp(-settings.rate * (seen - settings.quantile)).to(state.bound.dtype))


def multiplier(noise: float, sigma: float) -> float:
    """z_Δ = (z⁻² − (2σ_b)⁻²)^(−1/2): the noise multiplier of the sum, so that sum and count together cost z.

    The count's terms, centred, have sensitivity ½: both queries are one Gaussian mechanism of multiplier z (Theorem 1
    of the paper). σ of the sum's noise is z_Δ·C.

    Args:
        noise: z, the multiplier the accountant is told.
        sigma: σ_b, see `Settings`.

    Raises:
        Expected: 2σ_b ≤ z, the count alone would cost more than both may.
    """
    positive(noise=noise, sigma=sigma)
    if 2 * sigma <= noise:
        raise Expected(
            f"Expected sigma={sigma:g} > {noise / 2:g}: the count's noise is too small for multiplier {noise:g}."
        )
    return 1 / math.sqrt(noise**-2 - (2 * sigma) ** -2)
