"""Lists of noise levels in a recipe's flags."""

from __future__ import annotations

import math

from qleak.check import Expected, between, positive


def levels(text: str, name: str) -> tuple[float, ...]:
    """What "0.1,1,10" lists: finite numbers above 0, each once, in that order; "none" is left out.

    Raises:
        Expected: anything else.
    """
    parts = [part.strip() for part in text.split(",") if part.strip() != "none"]
    try:
        found = [float(part) for part in parts]
    except ValueError:
        found = [0.0]
    if not all(0 < e < math.inf for e in found):
        raise Expected(f"Expected {name}={text!r} as numbers above 0, separated by commas.")
    return tuple(dict.fromkeys(found))


def gaussian_sigma(epsilon: float, sensitivity: float, delta: float = 1e-5) -> float:
    """The smallest σ, to three digits and never below, with which one Gaussian release is (ε, δ)-private.

    δ(σ) = Φ(Δ/2σ − εσ/Δ) − e^ε·Φ(−Δ/2σ − εσ/Δ), solved by bisection: Balle & Wang, "Improving the Gaussian Mechanism
    for Differential Privacy" (ICML 2018), Theorem 8. What a run reports is the accountant's ε, not this one.

    Raises:
        Expected: an argument out of range.
    """
    positive(epsilon=epsilon, sensitivity=sensitivity)
    between(1e-300, 1 - 1e-9, delta=delta)

    from scipy.special import log_ndtr  # lazy: only where it is asked for

    def fits(sigma: float) -> bool:
        half, shift = 1 / (2 * sigma), epsilon * sigma
        lost = math.exp(log_ndtr(half - shift)) - math.exp(min(0.0, epsilon + log_ndtr(-half - shift)))
        return lost <= delta

    low, high = 1e-9, 1e9
    while high > low * (1 + 1e-9):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    unit = 10.0 ** (math.floor(math.log10(high * sensitivity)) - 2)
    return float(f"{math.ceil(high * sensitivity / unit - 1e-9) * unit:.6g}")
