"""From a privacy guarantee to reconstruction: what (ε, δ), Rényi and Gaussian differential privacy leave to any attacker.

These hold for every network, image and attack, because they look at the mechanism alone: the worst pair of images. So
they are far from what a message tells of a given image, and say nothing about a channel that earns no ε.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.optimize import minimize_scalar, root_scalar
from scipy.stats import norm
from torch import Tensor

from qleak.accounting import gaussian_mu
from qleak.bounds.prior import Prior
from qleak.check import Expected, at_least, positive


def renyi(event: Any, order: float = 2.0) -> float | None:
    """D_α of a privacy event between neighbours, in nats; None where no closed form is known (sampling).

    Gaussian releases of noise multipliers σ_i: α·Σ 1/(2σ_i²). Laplace noise of multiplier b (Mironov 2017, table II):
    ln[α/(2α − 1)·e^((α−1)/b) + (α − 1)/(2α − 1)·e^(−α/b)]/(α − 1), for numbers that move by 1 in all. Both add up.
    """
    import dp_accounting as dp

    if not order > 1:
        raise Expected(f"Expected order={order!r} > 1.")
    mu = gaussian_mu(event)
    if mu is not None:
        return order * mu * mu / 2
    match event:
        case dp.LaplaceDpEvent(noise_multiplier=b):
            a, peak = order, (order - 1) / b
            rest = (a - 1) / (2 * a - 1) * math.exp(-a / b - peak)
            return (peak + math.log(a / (2 * a - 1) + rest)) / (a - 1)
        case dp.SelfComposedDpEvent(event=inner, count=count):
            one = renyi(inner, order)
            return None if one is None else count * one
        case dp.ComposedDpEvent(events=events):
            parts = [renyi(inner, order) for inner in events]
            known = [p for p in parts if p is not None]
            return math.fsum(known) if len(known) == len(parts) else None
    return None


def unbiased(epsilon: float, diameters: float | Tensor = 1.0) -> float:
    """Least mean squared error per pixel of an *unbiased* attack on a (2, ε)-Rényi private message of one image.

    MSE ≥ Σ_i diam_i²/(4n(e^ε − 1)), diam_i the range of pixel i: some image in the box has an error so large in every
    pixel at once. Guo, Karrer, Chaudhuri, van der Maaten, "Bounding training data reconstruction in private (deep)
    learning" (ICML 2022), theorem 1. It is the bound of Hammersley, Chapman and Robbins, Var x̂_i ≥ (x′_i − x_i)²/χ²
    with χ² = e^(D₂) − 1, at the x′ that is furthest in pixel i, which is at least diam_i/2 away.

    Args:
        epsilon: D₂ between messages of any two images, in nats.
        diameters: ranges of the pixels; 1 for images in [0, 1].
    """
    at_least(0, epsilon=epsilon)
    square = float(torch.as_tensor(diameters, dtype=torch.float64).square().mean())
    return math.inf if epsilon == 0 else square / 4 / math.expm1(epsilon) if epsilon < 700 else 0.0


def blind(prior: Prior, mse: float) -> float:
    """Ln κ: at most so likely is an image of the prior within `mse` per pixel of any fixed guess.

    P(‖x − z‖² ≤ n·mse) is largest at the mean (Anderson 1955), and there Chernoff's bound is
    min_t exp(t·n·mse)·Π(1 + 2tλ_i)^(−½): true, and loose by a factor that does not grow with n.
    """
    positive(mse=mse)
    lam, n = prior.values.double(), len(prior.values)
    if float(lam.mean()) <= mse:
        return 0.0

    def exponent(log_t: float) -> float:
        t = math.exp(log_t)
        return t * n * mse - 0.5 * float(torch.log1p(2 * t * lam).sum())

    middle = -math.log(2 * mse)
    best: Any = minimize_scalar(exponent, bounds=(middle - 40, middle + 10), method="bounded")
    return min(0.0, float(best.fun))


def success(
    log_kappa: float, mu: float | None = None, epsilon: float | None = None, order: float | None = None
) -> float:
    """γ: at most so likely does an attack come as close as a blind guess does with probability κ.

    - `mu`: μ-GDP between any two images: γ = Φ(Φ⁻¹(κ) + μ), the most powerful test's power at level κ (Hayes,
      Mahloujifar, Balle, "Bounding training data reconstruction in DP-SGD", NeurIPS 2023, without sampling).
    - `epsilon` alone: pure ε: γ ≤ κe^ε.
    - `epsilon`, `order`: (α, ε)-Rényi: γ ≤ (κe^ε)^((α−1)/α) (Balle, Cherubin, Hayes, "Reconstructing training data
      with informed adversaries", S&P 2022).

    Raises:
        Expected: both or none of `mu` and `epsilon` given, or ln κ > 0.
    """
    if (mu is None) == (epsilon is None) or log_kappa > 0:
        raise Expected(f"Expected one of mu={mu} and epsilon={epsilon}, and log_kappa={log_kappa!r} <= 0.")
    if mu is not None:
        return float(norm.cdf(quantile(log_kappa) + mu))
    assert epsilon is not None
    power = 1.0 if order is None else (order - 1) / order
    return math.exp(min(0.0, power * (log_kappa + epsilon)))


def quantile(log_p: float) -> float:
    """Φ⁻¹(p) from ln p, however small p is."""
    if log_p >= math.log(0.5):
        return float(norm.ppf(math.exp(log_p)))
    return root_scalar(lambda z: norm.logcdf(z) - log_p, bracket=(-math.sqrt(-2 * log_p) - 1, 0.1)).root


def reached(prior: Prior, mu: float, probability: float = 0.5) -> float:
    """PSNR in dB that no attack reaches with more than `probability`, on an image of the prior behind μ-GDP.

    The largest mse with Φ(Φ⁻¹(κ(mse)) + μ) ≤ probability, as PSNR; rigorous given the prior, for any attack.
    """
    at_least(0, mu=mu)
    if not 0 < probability < 1:
        raise Expected(f"Expected probability={probability!r} in (0, 1).")
    goal = float(norm.logcdf(norm.ppf(probability) - mu))  # ln κ allowed
    top, low = math.log(float(prior.values.mean())), math.log(1e-15)
    if blind(prior, math.exp(low)) > goal:
        return 150.0
    found = top
    if blind(prior, math.exp(top - 1e-9)) > goal:
        found = root_scalar(lambda v: blind(prior, math.exp(v)) - goal, bracket=(low, top - 1e-9)).root
    return -10 * float(found) / math.log(10)
