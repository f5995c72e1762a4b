"""Mean squared errors that a Fisher information allows: Cramér–Rao, and van Trees with a Gaussian prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qleak.bounds.prior import Prior
from qleak.check import at_least

SINGULAR = 1e-13  # reciprocal condition below which a float64 Gram matrix has no inverse worth the name


class Errors(NamedTuple):
    """Least mean squared errors: `mse` per pixel, their `map [n]` pixel by pixel, and the Monte-Carlo error of `mse`."""

    mse: float
    map: Tensor
    mc_error: float = 0.0


def cramer_rao(information: Tensor, exact: Tensor | None = None) -> Errors:
    """Diag F⁻¹: no unbiased estimator does better at this very image (Cramér 1946, Rao 1945); infinite where F is singular.

    Args:
        information: F `[n n]`.
        exact: gradients `[m n]` of numbers that are known without noise: errors along them are none.
    """
    spread = _inverse(information)
    if spread is None:
        return Errors(math.inf, torch.full((len(information),), math.inf, dtype=torch.float64))
    return _errors(_given(spread, exact))


def local(information: Tensor, prior: Prior, exact: Tensor | None = None) -> Errors:
    """Diag (F(x) + C⁻¹)⁻¹ at one image: the error of the best estimator, were the update linear around it.

    Exact for linear updates, Gaussian noise and x ~ N(m, C): the posterior covariance. Elsewhere not a bound but the
    linearised one: F is that of this image, not of all that the prior holds for possible.
    """
    return _errors(_given(_posterior(information, prior), exact))


def van_trees(informations: Sequence[Tensor], prior: Prior) -> Errors:
    """Diag (E_x F(x) + C⁻¹)⁻¹, for E over the prior estimated from its draws.

    For x ~ N(m, C), and any estimator, biased or not, E‖x̂ − x‖²/n is at least its mean (van Trees, *Detection,
    Estimation, and Modulation Theory* I, 1968, 2.4; Gill, Levit, Bernoulli 1995). The message's likelihood has to be
    differentiable in the mean-square sense: Gaussian and Laplace noise are, codes are not.

    The trace is convex in E F, so few draws would make the bound too strong on average. The jackknife takes its first
    order out and gives the Monte-Carlo error, one standard deviation of `mse`. Where that is not far below `mse` itself,
    there were too few draws to say anything; the corrected value may then be zero, which is no bound.

    Args:
        informations: F(x) of draws of the prior, or means over groups of equal size.
        prior: the prior.

    Raises:
        Expected: fewer than two of them.
    """
    at_least(2, draws=len(informations))
    count = len(informations)
    total = sum(informations[1:], informations[0].clone())
    naive = _posterior(total / count, prior).diagonal()
    left = torch.stack([_posterior((total - one) / (count - 1), prior).diagonal().clone() for one in informations])
    map = count * naive - (count - 1) * left.mean(0)
    means = left.mean(1)
    error = math.sqrt((count - 1) / count * float((means - means.mean()).square().sum()))
    return Errors(max(float(map.mean()), 0.0), map.clamp(min=0), error)


def psnr_of(mse: float) -> float:
    """−10·log10 of a mean squared error in [0, 1] units, in dB; −∞ for no bound on the error, ∞ for no error."""
    return math.inf if mse <= 0 else -10 * math.log10(mse) if math.isfinite(mse) else -math.inf


def _errors(spread: Tensor) -> Errors:
    map = spread.diagonal().clamp(min=0).clone()
    return Errors(float(map.mean()), map)


def _given(spread: Tensor, exact: Tensor | None) -> Tensor:
    """The covariance given that A x is known: Σ − ΣAᵀ(AΣAᵀ)⁺AΣ."""
    if exact is None or not len(exact):
        return spread
    rows = exact / exact.norm(dim=1, keepdim=True).clamp(min=1e-300)
    cross = spread @ rows.T
    return spread - cross @ torch.linalg.pinv(rows @ cross, hermitian=True, rtol=1e-10) @ cross.T


def _posterior(information: Tensor, prior: Prior) -> Tensor:
    """(F + C⁻¹)⁻¹; where that is too ill-conditioned for Cholesky, as L(1 + LᵀFL)⁻¹Lᵀ with C = LLᵀ."""
    spread = _inverse(information + prior.precision())
    if spread is not None:
        return spread
    root = prior.basis * prior.values.sqrt()
    values, basis = torch.linalg.eigh(root.T @ information @ root)
    wide = root @ basis
    return (wide / (1 + values.clamp(min=0))) @ wide.T


def _inverse(a: Tensor) -> Tensor | None:
    """The inverse of a symmetric positive matrix by Cholesky; None where float64 cannot tell it from a singular one."""
    root, failed = torch.linalg.cholesky_ex(a)
    if int(failed):
        return None
    inverse = torch.cholesky_inverse(root)
    size = float(a.abs().sum(0).max()) * float(inverse.abs().sum(0).max())
    return inverse if math.isfinite(size) and size < 1 / SINGULAR else None
