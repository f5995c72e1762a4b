"""Gaussian noise without sampling: its ε and the noise of a budget are known exactly, without an accountant.

Such releases compose to a single Gaussian (μ-GDP), so all that is spent is Σ 1/σᵢ², a plain sum.
"""

from __future__ import annotations

import math
from typing import Any

from qleak import check
from qleak.check import Expected


def gaussian_mu(event: Any) -> float | None:
    """μ = √Σ 1/σᵢ² of Gaussian releases of noise multipliers σᵢ, None for an event of anything else.

    Composed, adaptively too, they are exactly as private as one release of noise multiplier 1/μ: μ-GDP
    (Dong, Roth, Su, "Gaussian Differential Privacy", JRSS-B 2022, corollary 3.3).
    """
    import dp_accounting as dp

    match event:
        case dp.NoOpDpEvent():
            return 0.0
        case dp.GaussianDpEvent(noise_multiplier=sigma):
            return 1 / sigma if sigma > 0 else math.inf
        case dp.SelfComposedDpEvent(event=inner, count=count):
            mu = gaussian_mu(inner)
            return None if mu is None else math.sqrt(count) * mu
        case dp.ComposedDpEvent(events=events):
            parts = [gaussian_mu(inner) for inner in events]
            known = [mu for mu in parts if mu is not None]
            return math.hypot(*known) if len(known) == len(parts) else None
    return None


def mu_of(epsilon: float, delta: float = 1e-5) -> float:
    """The largest μ whose μ-GDP is (ε, δ)-differential privacy: what Gaussian releases may add up to, Σ 1/σᵢ² ≤ μ².

    Exact to rounding, and never too large: `upper(GaussianDpEvent(1/μ), delta).exact <= epsilon`.

    Args:
        epsilon: ε >= 0.
        delta: δ in (0, 1).

    Raises:
        Expected: an argument out of range.
    """
    check.at_least(0, epsilon=epsilon)
    if not 0 < delta < 1:
        raise Expected(f"Expected delta={delta!r} in (0, 1).")
    low, high = 0.0, 1.0
    while exact_epsilon(high, delta) <= epsilon:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if exact_epsilon(middle, delta) <= epsilon else (low, middle)
    return low


def exact_epsilon(mu: float, delta: float) -> float:
    """The least ε of μ-GDP at δ > 0: δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) turned around (Balle, Wang 2018)."""
    from scipy.special import log_ndtr

    if mu == 0 or delta == 1:
        return 0.0
    if math.isinf(mu):
        return math.inf
    wanted = math.log(delta)

    def excess(eps: float) -> float:
        first, second = log_ndtr(mu / 2 - eps / mu), eps + log_ndtr(-mu / 2 - eps / mu)
        return float(first + math.log(-math.expm1(second - first)) if second < first else -math.inf) - wanted

    if excess(0.0) <= 0:
        return 0.0
    # Beyond t standard deviations of the loss N(μ²/2, μ²), where Φ(−t) ≤ exp(−t²/2) = δ, nothing is left.
    low, high = 0.0, mu * mu / 2 + mu * math.sqrt(-2 * wanted)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high
